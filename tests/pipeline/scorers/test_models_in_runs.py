"""Stages with weights in whole runs: embeddings, agreement with captions, on every engine."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from unimodal.pipeline.presets import CurateSettings
from unimodal.pipeline.run import Run, curate
from unimodal.pipeline.settings import build

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
