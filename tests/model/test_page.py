"""The page of `unimodal serve` in a real browser: Chromium without a screen."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.model.served import Held, listening, small_sampler
from unimodal.model import media, serve
from unimodal.model.asked import Limits
from unimodal.model.sample import Sampler

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))),
    os.environ.get("CHROMIUM"),
)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium: install it, or name its program in CHROMIUM"
)

HOSTILE = "<img src=x onerror=\"document.title='caught'\"><script>alert(1)</script>"
PICTURE = np.random.default_rng(1).integers(0, 256, (32, 40, 3), np.uint8)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        # Containers have no user namespaces for Chromium's sandbox; all it opens is ours.
        running = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture(scope="module")
def made() -> tuple[Sampler, Held]:
    return small_sampler()


Open = Callable[..., Any]


@pytest.fixture
def opened(browser: Any, made: tuple[Sampler, Held]) -> Iterator[Open]:
    """Function that opens the page of a server with the given settings; what goes wrong in the
    page (errors, refused requests of any kind) is in `page.troubles`."""
    sampler, held = made
    servers, contexts = [], []

    def go(**given: Any) -> Any:
        given = {"name": "small", "learned": {"caption": 9, "chat": 1, "edit": 1}} | given
        app = serve.application(sampler, **given)
        server = listening(app)
        url = server.__enter__()
        servers.append(server)
        context = browser.new_context(viewport={"width": 1100, "height": 800})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(30_000)
        page.troubles = []
        page.on("pageerror", lambda error: page.troubles.append(str(error)))
        page.on("console", lambda told: told.type == "error" and page.troubles.append(told.text))
        page.on(
            "request",
            lambda asked: (
                asked.url.startswith((url, "blob:", "data:")) or page.troubles.append(asked.url)
            ),
        )
        page.goto(url)
        page.queue = app.state.queue
        return page

    yield go
    held.free.set()
    held.reached.clear()
    for context in contexts:
        context.close()
    for server in servers:
        server.__exit__(None, None, None)


def ready(page: Any) -> Any:
    page.wait_for_function("() => document.getElementById('model').textContent !== ''")
    return page


def draw(page: Any) -> None:
    """Start, and wait for the end."""
    page.click("#go")
    page.wait_for_selector("#cancel", state="hidden")
    assert page.inner_text("#error") == ""


def test_a_prompt_becomes_a_picture_that_can_be_kept(opened: Open, made: Any) -> None:
    page = ready(opened())
    page.fill("#prompt", "a kite")
    page.click("summary")
    page.fill("#seed", "5")
    page.keyboard.press("Control+Enter")
    image = page.wait_for_selector(".card:has(.tools) img")
    size = image.evaluate("img => [img.naturalWidth, img.naturalHeight]")
    assert size == [40, 32]
    assert "seed 5" in page.inner_text("figcaption")
    with page.expect_download() as download:
        page.click("text=Download")
    assert download.value.suggested_filename == "a-kite-s5-0.png"
    guidance = float(page.input_value("#guidance"))
    (expected,) = made[0].images(["a kite"], seed=5, guidance=guidance)[0]
    data = Path(download.value.path()).read_bytes()
    with Image.open(io.BytesIO(data)) as kept:
        assert (np.asarray(kept) == expected).all() and '"a kite"' in kept.text["unimodal"]
    assert page.locator("#strip li").count() == 1 and not page.troubles


def test_the_picture_grows_row_by_row_and_cancel_frees_the_queue(
    opened: Open, made: tuple[Sampler, Held]
) -> None:
    held = made[1]
    page = ready(opened())
    page.fill("#prompt", "a kite")
    held.free.clear()
    page.click("#go")
    assert held.reached.wait(20)
    # Let one row through, and hold again at the next.
    held.reached.clear()
    held.free.set()
    held.free.clear()
    page.wait_for_selector("#results img")
    assert page.is_visible("#cancel") and page.locator(".tools").count() == 0
    assert "a second" in page.inner_text("#told")
    page.keyboard.press("Escape")
    page.wait_for_selector("#cancel", state="hidden")
    held.free.set()
    page.wait_for_function("() => document.querySelectorAll('#results img').length === 0")
    assert page.inner_text("#error") == ""
    draw(page)
    assert page.locator(".card .tools").count() == 1
    assert page.queue.counts["cancelled"] == 1 and not page.troubles


def test_what_people_write_is_text(opened: Open, made: tuple[Sampler, Held]) -> None:
    page = ready(opened(name=HOSTILE))
    assert HOSTILE in page.inner_text("#model")
    page.fill("#prompt", HOSTILE)
    page.fill("#n", "2")
    draw(page)
    assert page.locator(".words-of").all_inner_texts() == [HOSTILE, HOSTILE]
    assert page.locator("#results img").count() == 2  # the two pictures, and no other
    assert page.locator("#results script, #strip script").count() == 0
    page.click("#strip button >> nth=0")
    assert page.title() == f"{HOSTILE} · unimodal" and not page.troubles


def test_a_dropped_picture_is_described_and_asked_about(opened: Open, made: Any) -> None:
    page = ready(opened())
    drop(page, media.picture(PICTURE, "png"), "image/png")
    assert page.is_checked("[value=chat]")
    page.wait_for_selector("#shown img")
    page.fill("#tokens", "9")
    draw(page)
    (expected,) = made[0].describe([PICTURE], max_tokens=9)
    assert page.text_content(".answer") == expected
    page.fill("#prompt", HOSTILE)
    draw(page)
    assert page.inner_text(".words-of") == HOSTILE and not page.troubles


def drop(page: Any, data: bytes, kind: str) -> None:
    """Let go of a file over the page."""
    page.evaluate(
        """([bytes, type]) => {
            const given = new DataTransfer();
            given.items.add(new File([new Uint8Array(bytes)], "<b>.png", {type}));
            for (const name of ["dragenter", "dragover", "drop"])
                document.body.dispatchEvent(
                    new DragEvent(name, {dataTransfer: given, bubbles: true, cancelable: true}));
        }""",
        [list(data), kind],
    )


def test_a_picture_is_edited_and_a_clip_continued(opened: Open) -> None:
    page = ready(opened())
    page.check("[value=edit]", force=True)
    drop(page, media.picture(PICTURE, "png"), "image/png")
    page.fill("#prompt", "make it blue")
    draw(page)
    size = page.eval_on_selector(".card img", "img => [img.naturalWidth, img.naturalHeight]")
    assert size == [40, 32]
    page.check("[value=videos]", force=True)
    page.fill("#prompt", "a ball")
    draw(page)
    assert page.eval_on_selector(".card img", "img => img.naturalWidth") == 32
    page.click(".tools button:text-is('Continue')")
    page.fill("#frames", "4")
    draw(page)
    name = page.get_attribute(".tools a", "download")
    assert name is not None and name.endswith(".webp")
    assert page.locator("#strip li").count() == 3 and not page.troubles


def test_errors_are_one_line_in_the_page(opened: Open) -> None:
    page = ready(opened(limits=Limits(pictures=2, upload=100_000)))
    page.click("#go")
    assert page.inner_text("#error") == "Say what is to be drawn"
    page.fill("#prompt", "a")
    for field, value, words in (
        ("#n", "3", "n 3 is over the limit of 2"),
        ("#n", "0", "n: Input should be greater than or equal to 1"),
    ):
        page.fill(field, value)
        page.click("#go")
        page.wait_for_function("() => document.getElementById('error').textContent !== ''")
        assert page.inner_text("#error") == words
    drop(page, b"x" * 100_001, "image/png")
    assert "the limit is 100,000" in page.inner_text("#error")
    drop(page, b"hello", "image/png")
    page.click("#go")
    page.wait_for_function("() => document.getElementById('error').textContent.includes('neither')")
    drop(page, b"hello", "text/plain")
    assert page.inner_text("#error") == "Only pictures and videos can be given."


def test_what_the_checkpoint_cannot_do_is_switched_off(opened: Open) -> None:
    page = ready(opened(learned={"caption": 9}))
    off = page.eval_on_selector_all("[name=mode]:disabled", "all => all.map(one => one.value)")
    assert off == ["edit"]
    page.check("[value=chat]", force=True)
    assert page.inner_text("#go") == "Describe" and page.is_disabled("#prompt")
    drop(page, media.picture(PICTURE, "png"), "image/png")
    draw(page)
    assert page.locator(".answer").count() == 1


def test_a_key_is_asked_for_once(opened: Open) -> None:
    page = opened(key="s")
    page.wait_for_selector("#secret")
    page.fill("#secret", "wrong")
    page.keyboard.press("Enter")
    page.wait_for_function("() => document.getElementById('error').textContent !== ''")
    assert page.inner_text("#error") == "This is not the server's key."
    page.fill("#secret", "s")
    page.keyboard.press("Enter")
    ready(page)
    page.reload()
    ready(page)
    page.fill("#prompt", "a")
    draw(page)
    assert page.locator(".tools").count() == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_it_without_scrolling_sideways(
    browser: Any, opened: Open, scheme: str
) -> None:
    page = ready(opened())
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": 360, "height": 740})
    for mode in ("images", "videos", "edit", "extend", "chat"):
        page.check(f"[value={mode}]", force=True)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
    # Text stands out from its ground: WCAG's contrast of 4.5 and more.
    for what in ("#about", "#named", "#go", ".empty", "textarea"):
        assert page.eval_on_selector(what, CONTRAST) >= 4.5, what


CONTRAST = """element => {
    const parts = (colour) => colour.match(/[\\d.]+/g).map(Number);
    const light = ([r, g, b]) => {
        const linear = [r, g, b].map(
            (v) => (v /= 255) <= .04 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
        return .2126 * linear[0] + .7152 * linear[1] + .0722 * linear[2];
    };
    let ground = element;
    while (ground && (parts(getComputedStyle(ground).backgroundColor)[3] ?? 1) === 0)
        ground = ground.parentElement;
    const of = light(parts(getComputedStyle(element).color));
    const on = light(parts(getComputedStyle(ground).backgroundColor));
    return (Math.max(of, on) + .05) / (Math.min(of, on) + .05);
}"""
