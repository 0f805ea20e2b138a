"""Captions from a server: never the wrong ones, whatever goes wrong; see `answering.py`."""

from __future__ import annotations

import shutil
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from tests.pipeline.answering import Answering, answering, digest_of, saying
from unimodal.pipeline.errors import UnimodalError
from unimodal.pipeline.presets import CurateSettings
from unimodal.pipeline.report import write_report
from unimodal.pipeline.run import Run, curate, update
from unimodal.pipeline.settings import build
from unimodal.pipeline.why import text, why
from unimodal.pipeline.work import Describing

BARE = (
    *('skip=["text", "quality", "embed", "nsfw", "dedup", "match"]', "decide.image_min_area=0"),
    *("decide.video_min_s=1.5", "decide.video_min_side=none", "decide.flow_max=none"),
    *("parts.max_sources=7", "report=false", "caption.backoff_s=0.01", "caption.patience_s=20"),
    *("caption.source=endpoint", "caption.model=a-model", "caption.in_flight=16"),
)


def _settings(server: Answering | str, *sets: str) -> CurateSettings:
    url = server if isinstance(server, str) else server.url
    return build(CurateSettings, sets=[*BARE, f"caption.url={url}", *sets])


def _frames(run: Run, clip: dict[str, Any]) -> list[bytes]:
    """What a captioner is to see of a clip."""
    samples = run.samples(clip["part"])[clip["uid"]]
    with tarfile.open(run.frames_tar(clip["part"])) as tar:
        files = [tar.extractfile(s["member"]) for s in samples if s["keyframe"]]
        return [file.read() for file in files if file]


def _expected(run: Run, clip: dict[str, Any]) -> dict[str, str]:
    styles = ["short", "dense", "style"]
    if clip["kind"] == "video":
        styles = ["short", "dense", "motion", "camera", "style"]
    return {style: saying(digest_of(_frames(run, clip)), style) for style in styles}


def _said(clip: dict[str, Any]) -> dict[str, str]:
    return {c["style"]: c["text"] for c in clip["captions"] if c["status"] == "ok"}


def _kept(run: Run) -> list[dict[str, Any]]:
    return [clip for clip in run.clips.to_pylist() if clip["verdict"] == "keep"]


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory, bikes: Path, emoji: list[Path]) -> Path:
    folder = tmp_path_factory.mktemp("media")
    shutil.copy(bikes, folder)
    for path in emoji[:24]:
        shutil.copy(path, folder)
    return folder


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory, media: Path) -> Path:
    """A run without captions, to be copied."""
    out = tmp_path_factory.mktemp("bare") / "run"
    settings = build(CurateSettings, sets=[s for s in BARE if not s.startswith("caption.")])
    return curate([media], out, settings, engine="inline").path


@pytest.fixture
def run_dir(tmp_path: Path, bare: Path) -> Path:
    return Path(shutil.copytree(bare, tmp_path / "run"))


def _describe(out: Path, settings: CurateSettings, **how: Any) -> Run:
    return update(out, settings, engine="inline", describing=Describing(**how))


def test_every_caption_is_of_its_clip_though_requests_interleave_wait_and_fail(
    run_dir: Path,
) -> None:
    """The text is computed from the pictures that came: any other pairing would be seen."""
    faults = (
        *("500", "429", "drop", "half", "broken json", "empty", "chinese", "loop", "refusal"),
        *("503", "no json", "cut off", "refusal in json", None, None),
    )

    def fault(digest: str, before: int) -> str | None:
        return faults[int(digest[:8], 16) % len(faults)] if before == 0 else None

    def delay(digest: str) -> float:
        return int(digest[8:12], 16) / 0xFFFF * 0.15

    with answering(fault, delay) as server:
        run = _describe(run_dir, _settings(server))
    kept = _kept(run)
    assert {clip["kind"] for clip in kept} == {"image", "video"} and len(kept) > 24
    for clip in kept:
        assert _said(clip) == _expected(run, clip)
        assert {c["status"] for c in clip["captions"]} == {"ok"}
        assert {c["model"] for c in clip["captions"]} == {"a-model"}
    assert all(not clip["captions"] for clip in run.clips.to_pylist() if clip not in kept)
    assert 3 < server.most <= 16
    told = run.info["captions"]
    assert told["requests"] == told["answered"] == len(kept) and not told["failed"]
    assert told["tries"] > len(kept) and told["repeats"] > 0
    assert told["output_tokens"] == 20 * told["tries"] and told["last"]["output_tokens_per_s"] > 0
    waited = [t for t in server.times.values() if len(t) > 1]
    limited = [
        times
        for digest, times in server.times.items()
        if faults[int(digest[:8], 16) % len(faults)] == "429"
    ]
    assert waited and all(times[1] - times[0] >= 0.3 for times in limited)


def test_what_failed_says_why_and_only_that_is_asked_again(run_dir: Path) -> None:
    faults = ("refusal", "loop", "chinese", "cut off", "broken json", "400", "500", "no json")

    def fault(digest: str, before: int) -> str | None:
        at = int(digest[:8], 16) % 16
        return faults[at] if sick and at < len(faults) else None

    sick = True
    with answering(fault) as server:
        settings = _settings(server, "caption.retries=1", "patience.failures=1")
        run = _describe(run_dir, settings)
        kept = _kept(run)
        failed = [c for c in kept if int(digest_of(_frames(run, c))[:8], 16) % 16 < len(faults)]
        statuses = {
            *("refused", "repeats itself", "wrong language", "truncated", "broken JSON"),
            *("request refused", "server error", "no answer"),
        }
        seen = set()
        for clip in kept:
            if clip not in failed:
                assert _said(clip) == _expected(run, clip)
                continue
            assert [c["style"] for c in clip["captions"]] == list(_expected(run, clip))
            assert all(c["text"] is None and c["status"] in statuses for c in clip["captions"])
            seen |= {c["status"] for c in clip["captions"]}
        assert len(seen) >= 5 and sum(run.info["captions"]["failed"].values()) == len(failed)
        told = [row for row in run.quarantine.to_pylist() if row["stage"] == "caption"]
        assert {row["reason"].split()[1].rstrip(":") for row in told} == {c["uid"] for c in failed}
        explained = text(why(run, failed[0]["uid"]))
        assert failed[0]["captions"][0]["status"] in explained and "prompt dense 1" in explained
        assert "piece 0" in explained and "a-model" in explained
        page = write_report(run).read_text()
        assert f"{len(kept) - len(failed)} of {len(kept)} kept clips have a caption" in page
        assert all(f"<td>{status}</td>" in page for status in seen)

        for again in (_describe(run_dir, settings), _describe(run_dir, settings, ask=False)):
            assert again.info["captions"]["failed"]  # nobody ordered it
        server.seen.clear()
        sick = False
        run = _describe(run_dir, settings, retry_failed=True)
        assert server.asked == {digest_of(_frames(run, clip)) for clip in failed}
        assert all(_said(clip) == _expected(run, clip) for clip in _kept(run))
        assert run.info["captions"]["answered"] == len(kept) and not run.quarantine.num_rows
        seeds = [body["seed"] for body in server.bodies]
        assert min(seeds) == 0 and max(seeds) >= 3  # a failed question is asked with other seeds


def test_another_threshold_describes_only_what_is_newly_kept(run_dir: Path) -> None:
    half = "decide.image_min_area=none", 'decide.extra=["image: colorfulness > 100"]'
    with answering() as server:
        first = _describe(run_dir, _settings(server, *half))
        few = {digest_of(_frames(first, clip)) for clip in _kept(first)}
        assert server.asked == few and 0 < len(few) < 20
        server.seen.clear()
        looser = _describe(run_dir, _settings(server), ask=False)  # as `decide` does
        assert not server.seen and len(_kept(looser)) > len(few)
        assert {len(clip["captions"]) for clip in _kept(looser)} == {0, 3, 5}
        second = _describe(run_dir, _settings(server))
        assert server.asked == {digest_of(_frames(second, c)) for c in _kept(second)} - few
        assert all(_said(clip) == _expected(second, clip) for clip in _kept(second))
        server.seen.clear()
        third = _describe(run_dir, _settings(server, *half))  # captions stay, whatever is decided
        assert not server.seen
        assert sum(bool(c["captions"]) for c in third.clips.to_pylist()) == len(_kept(second))


def test_another_prompt_begins_anew_and_patience_does_not(run_dir: Path, tmp_path: Path) -> None:
    own = tmp_path / "mine.toml"
    package = Path(sys.modules["unimodal.pipeline.captioning"].__file__ or "").parent
    own.write_text((package / "prompts" / "dense.toml").read_text().replace("exactly", "well"))
    with answering() as server:
        folders = set()
        for sets, asks in (
            ((), True),
            (("caption.in_flight=3", "caption.timeout_s=9", "cut.trim_s=0.25"), False),
            ((f"caption.prompt={own}",), True),
            (("caption.model=b-model",), True),
            ((f"caption.prompt={own}",), False),
        ):
            server.seen.clear()
            run = _describe(run_dir, _settings(server, *sets), limit=2)
            _describe(run_dir, _settings(server, *sets), ask=False)
            assert bool(server.seen) == asks or (not asks and len(server.seen) == 2)
            folders.add(run.info["stages"]["describe"])
        assert len(folders) == 3


def test_a_try_on_a_few_leaves_the_rest_for_later(run_dir: Path) -> None:
    with answering() as server:
        run = _describe(run_dir, _settings(server), limit=5)
        assert run.info["captions"]["requests"] == len(server.seen) == 5
        run = _describe(run_dir, _settings(server))
        assert run.info["captions"]["requests"] == len(server.seen) == len(_kept(run))
        assert set(server.seen.values()) == {1}


def test_a_server_that_is_gone_ends_the_run_with_one_line_and_what_is_done_is_kept(
    run_dir: Path,
) -> None:
    def fault(digest: str, before: int) -> str | None:
        return "drop" if len(server.seen) > 10 else None

    with answering(fault) as server:
        settings = _settings(server, "caption.patience_s=0.5", "caption.in_flight=2")
        with pytest.raises(UnimodalError, match=r"given no answer for 0\.5 s") as error:
            _describe(run_dir, settings)
        assert "\n" not in str(error.value) and server.url in str(error.value)
    with pytest.raises(UnimodalError, match="what is done is kept"):
        _describe(run_dir, settings)  # now nobody listens at all
    with answering() as server:
        run = _describe(run_dir, _settings(server))
        # Two are under way at a time, and the eleventh is the first that goes unanswered.
        assert len(_kept(run)) - 12 <= len(server.seen) <= len(_kept(run)) - 9
        assert all(_said(clip) == _expected(run, clip) for clip in _kept(run))


@pytest.mark.parametrize(("fault", "told"), [("401", "valid key"), ("404", "right address")])
def test_what_will_not_pass_ends_the_run_at_once(run_dir: Path, fault: str, told: str) -> None:
    with (
        answering(lambda digest, before: fault) as server,
        pytest.raises(UnimodalError, match=f"HTTP {fault}: told to fail.*{told}"),
    ):
        _describe(run_dir, _settings(server))
    assert max(server.seen.values()) == 1


def test_a_server_of_nonsense_stops_the_run_before_all_is_asked(run_dir: Path) -> None:
    with answering(lambda digest, before: "refusal") as server:
        settings = _settings(server, "patience.failures_least=10", "caption.in_flight=4")
        with pytest.raises(UnimodalError, match=r"stopped: 10 of the first 10.*refused 10"):
            _describe(run_dir, settings)
        assert len(server.seen) < 20


def test_hostile_words_are_escaped_and_huge_ones_refused(run_dir: Path) -> None:
    def fault(digest: str, before: int) -> str:
        return "huge" if int(digest[:2], 16) % 8 == 0 else "hostile"

    with answering(fault) as server:
        run = _describe(run_dir, _settings(server, "patience.failures=1"))
    said = [c for clip in run.clips.to_pylist() for c in clip["captions"]]
    assert {c["status"] for c in said} == {"ok", "too long"}
    assert all("\x1b" not in c["text"] and "\u202e" not in c["text"] for c in said if c["text"])
    assert any("<script>" in (c["text"] or "") for c in said)
    page = write_report(run).read_text()
    assert "<script>window" not in page and "&lt;script&gt;window" in page
    assert "onerror=alert(1)>" not in page
    assert len(page) < 3_000_000


def test_the_key_is_sent_and_never_written(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    secret = "sk-" + "secret" * 6
    monkeypatch.setenv("MY_KEY", secret)
    with answering(lambda digest, before: "400" if before % 2 else None) as server:
        run = _describe(run_dir, _settings(server, "caption.api_key_env=MY_KEY"))
        write_report(run)
    assert {headers["Authorization"] for headers in server.headers} == {f"Bearer {secret}"}
    for file in run_dir.rglob("*"):
        assert file.is_dir() or secret.encode() not in file.read_bytes()
    assert secret not in "".join(capfd.readouterr())
    with pytest.raises(UnimodalError, match="a key does not belong in it"):
        _settings(f"http://me:{secret}@localhost/v1")


def test_clips_whose_frames_are_missing_are_told_of_and_others_described(run_dir: Path) -> None:
    some = Run(run_dir)
    part = next(clip["part"] for clip in _kept(some) if clip["kind"] == "image")
    tar = some.frames_tar(part)
    lost = {clip["uid"] for clip in _kept(some) if clip["part"] == part}
    tar.write_bytes(tar.read_bytes()[:2048])  # of the first clip there is half
    with answering() as server:
        run = _describe(run_dir, _settings(server))
    for clip in _kept(run):
        if clip["uid"] in lost:
            assert {(c["status"], c["text"]) for c in clip["captions"]} == {("no frames", None)}
        else:
            assert _said(clip) == _expected(run, clip)
    reasons = [row["reason"] for row in run.quarantine.to_pylist()]
    assert len(reasons) == len(lost) and all("no frames" in why for why in reasons)
