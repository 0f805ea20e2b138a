"""Captions from a server: never the wrong ones, whatever goes wrong; see `answering.py`."""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest

from tests.pipeline.answering import Answering, answering, digest_of, saying
from unimodal.pipeline.presets import CurateSettings
from unimodal.pipeline.run import Run, curate, update
from unimodal.pipeline.settings import build
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
    for path in emoji[:40]:
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
    assert {clip["kind"] for clip in kept} == {"image", "video"} and len(kept) > 40
    for clip in kept:
        assert _said(clip) == _expected(run, clip)
        assert {c["status"] for c in clip["captions"]} == {"ok"}
        assert {c["model"] for c in clip["captions"]} == {"a-model"}
    assert all(not clip["captions"] for clip in run.clips.to_pylist() if clip not in kept)
    assert 4 < server.most <= 16
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
