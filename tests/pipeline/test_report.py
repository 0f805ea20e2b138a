"""The report: true to the run, safe to open, the same for the same run, quick for large ones."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
import tarfile
import time
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unimodal.pipeline.clips import CLIPS, WATCH
from unimodal.pipeline.errors import MediaError
from unimodal.pipeline.markup import h, join
from unimodal.pipeline.presets import CurateSettings
from unimodal.pipeline.report import write_report
from unimodal.pipeline.report.charts import BASE, WIDTH, Block, Cut, histogram, timeline
from unimodal.pipeline.report.facts import KEPT, Facts
from unimodal.pipeline.report.pictures import BOX, layout, members, places
from unimodal.pipeline.run import Run, curate
from unimodal.pipeline.settings import build

EVIL = 'a"><img src=x onerror="window.pwned=1">\'`</script><script>window.pwned=2</script>&amp;'
"""As a file's name it has no slash; browsers run it wherever it is not escaped."""

SETTINGS = build(
    CurateSettings,
    sets=[
        'skip=["text", "quality", "embed", "nsfw", "match"]',
        *("decide.image_min_area=0", "decide.luma_min=150", "report=false"),
        'decide.extra=["any: colorfulness > 30"]',
    ],
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, bikes: Path, emoji: list[Path]) -> Run:
    folder = tmp_path_factory.mktemp("report") / "in"
    folder.mkdir()
    shutil.copy(bikes, folder / f"{EVIL.replace('/', '')}.mp4")
    for path in emoji[:30]:
        shutil.copy(path, folder)
    (folder / f"broken {EVIL.replace('/', '')}.mp4").write_text("no video")
    (folder / f"{emoji[0].stem}.txt").write_text(f"{EVIL} \u202e\x1b[31m\x00 {'long ' * 200}")
    (folder / f"{emoji[1].stem}.txt").write_text("a plain caption")
    return curate([folder], folder.parent / "run", SETTINGS, engine="inline")


@pytest.fixture(scope="module")
def page(run: Run, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = write_report(run, tmp_path_factory.mktemp("page") / "report.html")
    return path.read_text(encoding="utf-8")


class Parsed(HTMLParser):
    """Elements with their attributes, and the text between them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return "".join(self.words)


def test_what_strangers_wrote_is_text_and_nothing_else(page: str) -> None:
    parsed = Parsed(page)
    tags = Counter(tag for tag, _ in parsed.elements)
    assert tags["script"] == tags["style"] == 1
    assert not tags.keys() & {"iframe", "object", "embed", "link", "base", "form", "foreignobject"}
    for _, attributes in parsed.elements:
        assert not [name for name in attributes if name.startswith("on") or name == "style"]
        for name in ("src", "href", "action"):
            assert re.match(
                r"data:image/jpeg;base64,[A-Za-z0-9+/=]+$|#", attributes.get(name) or "#"
            )
    assert parsed.text.count("window.pwned") >= 3  # file, caption and quarantine are shown
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", page)


def test_nothing_but_the_pages_own_style_and_script_is_allowed(page: str) -> None:
    parsed = Parsed(page)
    (policy,) = [
        a["content"]
        for tag, a in parsed.elements
        if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy is not None and policy.startswith("default-src 'none'; img-src data:;")
    for tag in ("style", "script"):
        (body,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.S)
        digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert "unsafe" not in policy and "http:" not in page and "https:" not in page


def test_equal_runs_give_equal_bytes_wherever_they_lie(run: Run, page: str, tmp_path: Path) -> None:
    shutil.copytree(run.path, tmp_path / "elsewhere")
    info = json.loads((tmp_path / "elsewhere" / "run.json").read_text())
    info |= {"engine": "ray", "seconds": {"watch": 1e6}}
    (tmp_path / "elsewhere" / "run.json").write_text(json.dumps(info))
    assert write_report(Run.open(tmp_path / "elsewhere")).read_text() == page
    assert (tmp_path / "elsewhere" / "report.html").exists()


def test_the_figures_are_those_of_the_verdicts(run: Run, page: str) -> None:
    rows = run.clips.to_pylist()
    kept = sum(row["verdict"] == "keep" for row in rows)
    assert f"<h1><strong>{kept}</strong> of {len(rows)} clips kept</h1>" in page
    reasons = [{r.split(":", 2)[2] for r in row["reasons"]} for row in rows]
    found = re.findall(
        r"<tr[^>]*><th [^>]*><code>(.*?)</code>.*?<td>(\d+)<small>.*?<td>(\d+)</td>", page
    )
    counted = {
        rule: (sum(rule in own for own in reasons), sum(own == {rule} for own in reasons))
        for rule in {rule for own in reasons for rule in own}
    }
    assert len(counted) >= 4
    seen = {
        rule.replace("≥", ">=").replace("≤", "<=").replace("×", "*"): pair for rule, *pair in found
    }
    seen = {rule.replace("&gt;", ">").replace("&lt;", "<"): pair for rule, pair in seen.items()}
    for rule, (dropped, alone) in counted.items():
        assert seen[rule] == [str(dropped), str(alone)]
    for rule, pair in seen.items():  # and no rule is said to drop what it does not
        assert rule in counted or pair == ["0", "0"]


def test_clips_near_a_threshold_are_the_nearest_on_either_side(run: Run) -> None:
    facts = Facts(run)
    for number, failed, passed in facts.near:
        rule = facts.rules[number]
        assert rule.threshold is not None
        for rows, side in ((failed, rule.drops), (passed, rule.passes)):
            distances = np.abs(rule.values - rule.threshold)
            assert all(side[row] for row in rows)
            others = [i for i in np.flatnonzero(side) if i not in rows]
            assert list(distances[list(rows)]) == sorted(distances[list(rows)])
            if rows and others:
                assert distances[others].min() >= distances[rows[-1]]
    assert any(failed and passed for _, failed, passed in facts.near)


def test_every_clip_that_is_shown_has_its_picture(run: Run, page: str) -> None:
    facts = Facts(run)
    shown = {row["uid"] for row in facts.shown.values()}
    sampled = {row["uid"] for row in facts.shown.values() if row["samples"]}
    assert set(facts.pictures.clips) == sampled and len(sampled) > 25
    assert len(facts.pictures.strips) == 1
    articles = re.findall(r'<article class="clip (\w+)"[^>]*data-uid="(\w+)"', page)
    assert {uid for _, uid in articles} == shown
    verdicts = dict(
        zip(*(run.clips.column(c).to_pylist() for c in ("uid", "verdict")), strict=True)
    )
    assert all(verdicts[uid] == verdict for verdict, uid in articles)


def test_a_report_is_written_where_frames_are_missing_or_cut_off(run: Run, tmp_path: Path) -> None:
    shutil.copytree(run.path, tmp_path / "run")
    torn = Run.open(tmp_path / "run")
    tar = torn.frames_tar(torn.clips.column("part")[0].as_py())
    tar.write_bytes(tar.read_bytes()[: tar.stat().st_size // 3])
    some = Facts(torn)
    assert 0 < len(some.pictures.clips) < len(some.shown)
    tar.unlink()
    for rows in tar.parent.glob("*.parquet"):
        rows.unlink()
    assert "no picture" in write_report(Run.open(torn.path)).read_text()


def test_a_run_without_clips_has_a_report_of_what_went_wrong(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_text("x")
    run = curate([tmp_path / "a.mp4"], tmp_path / "run", SETTINGS, engine="inline")
    page = write_report(run).read_text()
    assert "0</strong> of 0 clips kept" in page and "not a video that can be read" in page


def test_captions_that_a_model_failed_to_write_are_told_as_such(run: Run, tmp_path: Path) -> None:
    shutil.copytree(run.path, tmp_path / "run")
    failed = {"style": "dense", "model": "a-model", "status": "failed: no answer", "text": None}
    at = run.clips.schema.get_field_index("captions")
    captions = pa.array([[failed]] * run.clips.num_rows, CLIPS.field("captions").type)
    clips = run.clips.set_column(at, CLIPS.field("captions"), captions)
    pq.write_table(clips, tmp_path / "run" / "clips.parquet")
    page = write_report(Run.open(tmp_path / "run")).read_text()
    assert "none: failed: no answer" in page and "<td>a-model</td>" in page


def test_a_large_run_costs_seconds_and_a_few_megabytes(run: Run, tmp_path: Path) -> None:
    shutil.copytree(run.path, tmp_path / "run")
    many = 30_000
    rng = np.random.default_rng(0)
    rows = run.clips.take(pa.array(np.arange(many) % run.clips.num_rows))
    columns = {name: rows.column(name) for name in CLIPS.names}
    columns["uid"] = pa.array([f"{i:032x}" for i in range(many)])
    columns["flow_mean"] = pa.array(rng.uniform(0, 0.2, many))
    columns["dup_group"] = pa.array([f"{i // 3:032x}" if i < 900 else None for i in range(many)])
    columns["dup_rank"] = pa.array([i % 3 if i < 900 else None for i in range(many)], pa.int32())
    grown = (
        pa.table(columns).cast(CLIPS).sort_by([("uri", "ascending"), ("start_pts", "ascending")])
    )
    pq.write_table(grown, tmp_path / "run" / "clips.parquet")
    owners = rows.select(["part", "uid"]).to_pylist()  # whose pictures each new clip shows
    for part in {row["part"] for row in owners}:
        stored = [
            {"uid": f"{i:032x}", "samples": run.samples(part)[row["uid"]]}
            for i, row in enumerate(owners)
            if row["part"] == part
        ]
        kept_at = tmp_path / "run" / run.info["stages"]["watch"] / f"{part}.parquet"
        schema = pa.schema([WATCH.field("uid"), WATCH.field("samples")])
        pq.write_table(pa.Table.from_pylist(stored, schema=schema), kept_at)
    begun = time.monotonic()
    path = write_report(Run.open(tmp_path / "run"))
    took = time.monotonic() - begun
    page = path.read_text()
    kept = sum(verdict == "keep" for verdict in grown.column("verdict").to_pylist())
    assert f"{KEPT} of {kept:,} shown" in page
    assert "900 clips in 300 groups" in page
    assert path.stat().st_size < 8e6
    assert took < 15  # measured: 2 s


def test_places_are_where_tarfile_finds_them_and_broken_tars_are_told(
    run: Run, tmp_path: Path
) -> None:
    row = run.clips.to_pylist()[0]
    row["samples"] = run.samples(row["part"])[row["uid"]]
    tar = run.frames_tar(row["part"])
    wanted = [*members(row), "not-there.jpg"]
    found = places(tar, wanted)
    with tarfile.open(tar) as whole:
        assert found == {
            name: (whole.getmember(name).offset_data, whole.getmember(name).size)
            for name in members(row)
        }
    for content in (b"", b"x" * 2048, tar.read_bytes()[:124] + b"-" + tar.read_bytes()[125:4096]):
        (tmp_path / "bad.tar").write_bytes(content)
        with pytest.raises(MediaError, match="frames cannot be read"):
            places(tmp_path / "bad.tar", wanted)


@settings(deadline=None)
@given(
    count=st.integers(1, 3),
    width=st.integers(1, 8000),
    height=st.integers(1, 8000),
)
def test_frames_in_a_picture_lie_inside_it_and_apart(count: int, width: int, height: int) -> None:
    boxes, wide, high = layout(count, width / height, width)
    assert len(boxes) == count and 0 < wide <= BOX[0] and 0 < high <= BOX[1]
    taken = np.zeros((high, wide), int)
    for x, y, w, tall in boxes:
        assert w > 0 and tall > 0 and x + w <= wide and y + tall <= high
        taken[y : y + tall, x : x + w] += 1
    assert taken.max() == 1


@settings(deadline=None)
@given(
    values=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40),
    cut=st.floats(-1e6, 1e6),
    scale=st.sampled_from([1e-9, 1.0, 1e6]),
)
def test_a_cut_line_stands_between_the_values_that_it_parts(
    values: list[float], cut: float, scale: float
) -> None:
    from unimodal.pipeline.report.charts import _Scale

    data = np.array(values) * scale
    axis = _Scale.around(data, [cut * scale])
    places = axis.place(data)
    at = axis.x(cut * scale)
    assert 0 <= at <= WIDTH and (places >= 0).all() and (places <= 1).all()
    assert all(place * WIDTH <= at + 1e-6 for place in places[data < cut * scale])
    assert all(place * WIDTH >= at - 1e-6 for place in places[data > cut * scale])
    assert axis.count(data).sum() == len(data)
    assert all(axis.low <= tick <= axis.high * (1 + 1e-9) or tick < 0 for tick in axis.ticks())
    drawn = histogram(data, data[:0], [Cut(">=", cut * scale)], "x")
    tops = [float(y) for y in re.findall(r'<rect class="keep" x="[\d.]+" y="([\d.]+)"', drawn)]
    assert tops and all(0 <= y < BASE for y in tops)


def test_a_timeline_of_very_many_clips_stays_small() -> None:
    blocks = [Block(i, i + 0.8, "drop" if i % 3 else "keep", "a" * 50, "#x") for i in range(5000)]
    assert len(timeline(blocks, list(range(5000)), 5000.0)) < 300_000
    assert timeline(blocks[:9], [], 9.0).count("<title>") == 9


def test_markup_escapes_all_but_what_it_made_itself() -> None:
    made = h("p", h("b", EVIL), "<i>", ["&", None, 3, h("br")], title=EVIL, hidden=True, id=None)
    parsed = Parsed(made)
    assert parsed.elements == [("p", {"title": EVIL, "hidden": None}), ("b", {}), ("br", {})]
    assert parsed.text == EVIL + "<i>&3"
    assert join(["<", h("i")]) == "&lt;<i></i>"
    assert h("p", "a\x00\x1b\ud800b\n") == "<p>a\ufffd\ufffd\ufffdb\n</p>"


HEAD = """
window.found = { errors: [], refused: [] };
addEventListener("error", (e) => found.errors.push(String(e.message)));
addEventListener("securitypolicyviolation", (e) => found.refused.push(e.violatedDirective));
"""

TAIL = """
const $ = (s) => [...document.querySelectorAll(s)];
const press = (key) => document.activeElement.dispatchEvent(
  new KeyboardEvent("keydown", { key, bubbles: true }));
found.pwned = window.pwned || 0;
found.width = innerWidth;
found.overflow = document.documentElement.scrollWidth - innerWidth;
const boxed = (e) => e.closest(".scroll, pre, nav ul, svg");
const right = (e) => e.getBoundingClientRect().right;
found.wide = $("body *").filter((e) => !boxed(e) && right(e) > innerWidth + 1)
  .map((e) => e.tagName + "." + e.className);
found.requests = performance.getEntriesByType("resource").map((e) => e.name)
  .filter((n) => !n.startsWith("data:"));
found.unloaded = $("img").filter((e) => !e.complete || !e.naturalWidth).length;
found.pictures = $("img").length;
found.dark = getComputedStyle(document.body).backgroundColor;
const visible = () => $(".clips article.clip:not([hidden])");
found.all = visible().length;
const pick = (value) => {
  const radio = $(".filter input[type=radio]").find((e) => e.value === value);
  radio.checked = true;
  radio.dispatchEvent(new Event("input", { bubbles: true }));
};
pick("drop");
found.dropped = visible().map((e) => e.dataset.verdict);
pick("");
const box = $(".filter select")[0];
box.value = box.options[1].value;
box.dispatchEvent(new Event("input", { bubbles: true }));
found.byRule = visible().map((e) => e.dataset.rules);
found.rule = box.value;
box.value = "";
const words = $(".filter input[type=search]")[0];
words.value = "a PLAIN caption";
words.dispatchEvent(new Event("input", { bubbles: true }));
found.byWords = visible().length;
words.value = "";
words.dispatchEvent(new Event("input", { bubbles: true }));
const dialog = $("dialog")[0];
const uid = () => dialog.querySelector("article").dataset.uid;
$("article.clip .open")[0].click();
found.opened = [dialog.open, uid()];
press("ArrowRight");
found.next = uid();
press("ArrowLeft");
found.back = uid();
found.focus = dialog.contains(document.activeElement);
found.details = dialog.querySelectorAll("dt").length;
dialog.close();
const nameless = "img:not([alt]), svg[role=img]:not([aria-label]), button:not([aria-label])";
found.unnamed = $(nameless).length;
found.headings = $("h1, h2, h3, h4").map((e) => Number(e.tagName[1]));
parent.postMessage(JSON.stringify(found), "*");
"""

FRAME = """<!doctype html><body><script>
addEventListener("message", (event) => document.body.dataset.found = event.data);
</script><iframe src="probed.html" style="border: 0; width: {width}px; height: 1400px"></iframe>
"""
"""Chromium's own window is 500 pixels wide at least."""


@pytest.fixture(scope="module")
def browse(page: str) -> Callable[..., dict[str, Any]]:
    """Function that opens the page in Chromium at a width, tries it and tells what it found."""
    names = ("chromium", "chromium-browser", "google-chrome")
    chromium = next(filter(None, map(shutil.which, names)), None)
    if chromium is None:
        pytest.skip("no Chromium is installed")

    def open_page(folder: Path, width: int, *flags: str) -> dict[str, Any]:
        # The policy stays in force, with the two probes allowed beside the page's own script.
        probed = page
        for probe in (HEAD, TAIL):
            digest = base64.b64encode(hashlib.sha256(probe.encode()).digest()).decode()
            own = "script-src &#x27;"
            probed = probed.replace(own, f"{own}sha256-{digest}&#x27; &#x27;")
        probed = probed.replace("<title>", f"<script>{HEAD}</script><title>", 1)
        probed = probed.replace("</body>", f"<script>{TAIL}</script></body>")
        (folder / "probed.html").write_text(probed, encoding="utf-8")
        (folder / "frame.html").write_text(FRAME.format(width=width))
        command = [
            *(chromium, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"),
            *("--disable-background-networking", f"--user-data-dir={folder / 'profile'}"),
            *("--window-size=1400,1400", "--virtual-time-budget=3000", *flags, "--dump-dom"),
            (folder / "frame.html").as_uri(),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        body = next(a for tag, a in Parsed(done.stdout).elements if tag == "body")
        assert body.get("data-found"), done.stderr[-2000:]
        return json.loads(body["data-found"] or "")

    return open_page


@pytest.mark.parametrize("width", [390, 1280])
def test_in_a_browser_all_fits_nothing_is_fetched_and_nothing_fails(
    tmp_path: Path, browse: Callable[..., dict[str, Any]], width: int
) -> None:
    dark = () if width == 390 else ("--blink-settings=preferredColorScheme=0",)
    found = browse(tmp_path, width, *dark)
    assert found["errors"] == found["refused"] == found["requests"] == []
    assert found["pwned"] == 0
    assert found["width"] == width and found["overflow"] <= 0 and found["wide"] == []
    assert found["pictures"] > 20 and found["unloaded"] == 0
    lightness = sum(map(int, re.findall(r"\d+", found["dark"])[:3])) / 3
    assert lightness < 60 if dark else lightness > 200

    assert 0 < len(found["dropped"]) < found["all"] and set(found["dropped"]) == {"drop"}
    assert found["byRule"] and all(found["rule"] in rules.split() for rules in found["byRule"])
    assert found["byWords"] >= 1
    assert found["opened"][0] and found["focus"] and found["details"] >= 8
    assert found["next"] and found["back"] == found["opened"][1]
    assert found["unnamed"] == 0
    steps = np.diff([1, *found["headings"]])
    assert found["headings"][0] == 1 and steps.max() <= 1  # no level is skipped
