"""Presets on real media, and what a plan says of them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image

from unimodal.pipeline.errors import UsageError
from unimodal.pipeline.forecast import forecast
from unimodal.pipeline.inputs import list_sources
from unimodal.pipeline.presets import PRESETS, CurateSettings, preset_layer
from unimodal.pipeline.run import curate, update
from unimodal.pipeline.settings import build

BARE = ['skip=["text", "quality"]', "report=false"]


def test_score_only_keeps_all_and_strict_keeps_least(
    tmp_path: Path, bikes: Path, videos: Path
) -> None:
    out = tmp_path / "run"
    films = [bikes, videos / "bigbuckbunny.mp4"]
    kept = {}
    for name in ("score-only", "best", "strict"):
        settings = build(CurateSettings, preset_layer(name), sets=[*BARE, "cut.trim_s=0.25"])
        run = curate(films, out, settings, engine="inline")
        kept[name] = {r["uid"] for r in run.clips.to_pylist() if r["verdict"] == "keep"}
    assert len(kept["score-only"]) == run.clips.num_rows
    assert kept["strict"] <= kept["best"] < kept["score-only"] and kept["best"]
    assert len(list(out.glob("watch-*"))) == 1  # they differ in thresholds alone


def test_emu3_cuts_with_the_detectors_that_the_paper_names() -> None:
    emu3 = build(CurateSettings, preset_layer("emu3"))
    assert (emu3.cut.adaptive, emu3.cut.content, emu3.cut.fade, emu3.cut.dissolve) == (0, 27, 12, 0)
    assert (emu3.text.long_side, emu3.text.short_side) == (None, 256)
    assert (emu3.decide.flow_min, emu3.decide.flow_max, emu3.decide.video_min_s) == (0.04, None, 5)


def test_a_preset_that_is_none_is_named() -> None:
    with pytest.raises(UsageError, match=f"no preset bset: there are {', '.join(PRESETS)}"):
        preset_layer("bset")


def test_a_plan_names_what_is_missing_and_counts_what_is_to_do(
    tmp_path: Path, bikes: Path, emoji: list[Path]
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for path in [bikes, *emoji[:3]]:
        shutil.copy(path, folder)
    settings = build(CurateSettings, sets=['skip=["text"]', "report=false", "parts.max_sources=2"])
    out = tmp_path / "run"
    before = forecast(list_sources([folder]), out, settings)
    said = dict(before.stages)
    assert (before.sources, before.images, before.video_s) == (4, 3, 10.0)
    assert said["watch"] == said["quality"] == "2 of 2 parts to do"
    assert said["text"] == "skipped: switched off (skip)"
    assert said["embed"].startswith("skipped: no weights: set embed.weights=")
    assert not out.exists()
    curate([folder], out, settings, engine="inline")
    after = forecast(list_sources([folder]), out, settings)
    assert dict(after.stages)["watch"] == "done" and after.cpu_s == 0
    assert update(out, engine="inline").clips.num_rows == 8


def test_a_plan_counts_small_pictures_as_small(tmp_path: Path) -> None:
    for side in (32, 800):
        (tmp_path / str(side)).mkdir()
        for shade in range(40):
            picture = Image.new("RGB", (side, side), (shade, 99, 99))
            picture.save(tmp_path / str(side) / f"{shade}.png")
    found = {
        side: forecast(list_sources([tmp_path / str(side)]), tmp_path / "run", CurateSettings())
        for side in (32, 800)
    }
    # Measured: 1.7 ms and 3.1 kB each at 32x32, 60 ms and 64 kB at 1280x720, and a second to start.
    assert 0.8 < found[32].cpu_s < 1.5 and 2.5 < found[800].cpu_s < 4.5
    assert 40 * 2_000 < found[32].disk_bytes < 40 * 5_000 < found[800].disk_bytes / 10


def test_weights_that_were_asked_for_and_are_not_there_stop_the_run(
    tmp_path: Path, bikes: Path
) -> None:
    settings = build(CurateSettings, sets=["embed.weights=/nowhere/clip.safetensors"])
    with pytest.raises(UsageError, match=r"no file at embed\.weights=/nowhere/clip\.safetensors"):
        curate([bikes], tmp_path / "run", settings, engine="inline")
