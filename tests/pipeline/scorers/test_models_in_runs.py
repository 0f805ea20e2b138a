"""Stages with weights in whole runs: embeddings, agreement with captions, on every engine."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from unimodal.pipeline.captioning.captioner import Answer, Ask, Batched
from unimodal.pipeline.captioning.settings import CaptionSettings
from unimodal.pipeline.presets import PRESETS, CurateSettings
from unimodal.pipeline.run import Run, curate, update
from unimodal.pipeline.settings import build
from unimodal.pipeline.work import Describing

Tree = Callable[[Path], dict[str, bytes]]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, bikes: Path, photos: Path) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "bikes.mp4").symlink_to(bikes)
    for name in ("coffee.png", "chelsea.png", "astronaut.png"):
        (folder / name).symlink_to(photos / name)
        (folder / name).with_suffix(".txt").write_text(f"a picture of {name[:-4]}")
    return folder


@pytest.fixture(scope="module")
def settings(small_clip: Path) -> CurateSettings:
    return build(
        CurateSettings,
        sets=[
            f"embed.weights={small_clip / 'small.pt'}",
            f"embed.config={small_clip / 'small.json'}",
            'skip=["text", "quality"]',
            "parts.max_sources=2",
        ],
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, inputs: Path, settings: CurateSettings) -> Run:
    return curate([inputs], tmp_path_factory.mktemp("whole") / "run", settings, engine="inline")


@pytest.mark.slow
def test_captioned_clips_have_a_match_and_others_have_none(whole: Run) -> None:
    rows = whole.clips.to_pylist()
    assert {row["kind"] for row in rows if row["text_match"] is not None} == {"image"}
    assert all(-1 <= row["text_match"] <= 1 for row in rows if row["kind"] == "image")
    assert set(whole.info["stages"]) == {"watch", "embed", "caption", "match", "dedup", "decide"}


class _Painter:
    """A model of ours: it knows a picture's mean colour, and tells it in words."""

    batch = 2

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.closed = 0

    def close(self) -> None:
        self.closed += 1

    def describe(
        self, clips: Mapping[str, Sequence[np.ndarray]], asks: Mapping[str, Ask]
    ) -> dict[str, Answer]:
        self.asked += clips
        colours = {key: np.mean([f.mean((0, 1)) for f in found], 0) for key, found in clips.items()}
        return {
            key: Answer(
                f"A surface of {r:.0f} parts red, {g:.0f} green and {b:.0f} blue as a whole."
            )
            for key, (r, g, b) in reversed(colours.items())
        }


@pytest.mark.slow
def test_captions_of_a_model_of_ours_are_matched_and_what_is_kept_is_decided_again(
    tmp_path: Path, whole: Run
) -> None:
    out = Path(shutil.copytree(whole.path, tmp_path / "run"))
    painter = _Painter()

    def opened(settings: CaptionSettings) -> Batched:
        return Batched(painter)

    def describe(*sets: str, **how: int) -> dict[str, dict[str, Any]]:
        own = ("source=checkpoint", "model=ours", "prompt=dense", 'styles=["dense"]')
        layers = whole.info["settings"], PRESETS["score-only"]  # nothing is dropped
        settings = build(CurateSettings, *layers, sets=[*(f"caption.{s}" for s in own), *sets])
        asking = Describing(opened=opened, **how)  # type: ignore[arg-type]
        run = update(out, settings, engine="inline", describing=asking)
        return {row["uid"]: row for row in run.clips.to_pylist()}

    before = {row["uid"]: row["text_match"] for row in whole.clips.to_pylist()}
    one = describe(limit=1)
    changed = {uid for uid, row in one.items() if row["text_match"] != before[uid]}
    assert len(changed) == len(painter.asked) == 1
    matched = {p: p.stat().st_mtime_ns for p in out.glob("match-*/*.parquet")}
    two = describe(limit=1)
    assert sum(row["text_match"] != before[uid] for uid, row in two.items()) == 2
    same = [p for p, mtime in matched.items() if p.stat().st_mtime_ns == mtime]
    assert len(same) == len(matched) - 1 > 0  # only the part with a new caption was compared again
    all_ = describe()
    # A clip of a few frames may have no picture that was stored.
    kept = {uid for uid, row in all_.items() if row["captions"][0]["status"] != "no frames"}
    assert len(kept) > 4
    assert {uid for uid, row in all_.items() if row["text_match"] != before[uid]} == kept
    assert len(painter.asked) == len(kept)
    for uid in kept:
        first, *others = all_[uid]["captions"]
        assert first["text"].startswith("A surface of") and first["model"] == "ours"
        assert all(said["style"] == "sidecar" for said in others)
    strict = describe("decide.match_min=0.999")
    assert {row["verdict"] for uid, row in strict.items() if uid in kept} == {"drop"}
    assert all(strict[uid]["captions"] == all_[uid]["captions"] for uid in kept)
    assert len(painter.asked) == len(kept)  # what captions decide has no say in who is described


@pytest.mark.slow
def test_weights_that_are_replaced_under_their_name_are_noticed(
    tmp_path: Path, inputs: Path, settings: CurateSettings, small_clip: Path
) -> None:
    import torch

    own = tmp_path / "own.pt"
    shutil.copy(small_clip / "small.pt", own)
    settings = build(
        CurateSettings, settings.model_dump(mode="json"), sets=[f"embed.weights={own}"]
    )
    image = [inputs / "coffee.png"]
    before = curate(image, tmp_path / "run", settings, engine="inline")
    first = (before.info["stages"]["embed"], before.clips.column("text_match").to_pylist())
    weights = torch.load(own, weights_only=True)
    torch.save({name: value * 1.5 for name, value in weights.items()}, own)
    after = curate(image, tmp_path / "run", settings, engine="inline")
    assert after.info["stages"]["embed"] != first[0]


@pytest.mark.slow
def test_models_run_on_actors_that_hold_a_gpu_and_write_the_same_bytes(
    tmp_path: Path, inputs: Path, settings: CurateSettings, whole: Run, tree: Tree
) -> None:
    """Ray believes in the one GPU that it is told of; the model finds none and uses the CPU."""
    import ray
    from ray.cluster_utils import Cluster

    assert not ray.is_initialized()
    home = Path(tempfile.mkdtemp(prefix="um"))
    cluster = Cluster()
    try:
        cluster.add_node(num_cpus=2, num_gpus=1, temp_dir=str(home))
        cluster.wait_for_nodes()
        curate([inputs], tmp_path / "run", settings, engine="ray", address=cluster.address)
        logs = [p for p in home.glob("session_*/logs/*") if p.is_file()]
        assert any(b"_RayModels" in path.read_bytes() for path in logs)
    finally:
        ray.shutdown()
        cluster.shutdown()
        shutil.rmtree(home, ignore_errors=True)
    assert tree(tmp_path / "run") == tree(whole.path)
