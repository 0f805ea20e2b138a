"""Cuts: equal to PySceneDetect's own command line, and turned into clips by the rules."""

from __future__ import annotations

import csv
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from unimodal.pipeline import media
from unimodal.pipeline.framepass import Timeline, watch_frames
from unimodal.pipeline.observers.cut import Cuts, CutSettings, spans


def _cut_frames(path: Path, settings: CutSettings) -> list[int]:
    with media.open_video(path) as video:
        cuts = Cuts(settings, video.time_base, video.probe.fps)
        timeline = watch_frames(video, [cuts])
        return [int(np.searchsorted(timeline.pts, pts)) for pts in cuts.cuts(timeline)]


def _command_line(path: Path, folder: Path, *detectors: str) -> list[int]:
    command = [sys.executable, "-m", "scenedetect", "-i", str(path), "-o", str(folder), "-q"]
    command += [*detectors, "list-scenes", "-q", "-s", "-f", "scenes.csv"]
    subprocess.run(command, check=True, capture_output=True)
    with (folder / "scenes.csv").open() as file:
        starts = [int(row["Start Frame"]) - 1 for row in csv.DictReader(file)]
    return starts[1:]


CASES = {
    "best": (
        CutSettings(),
        ["detect-adaptive", "-t", "3.5", "-f", "3", "-c", "15", "detect-threshold", "-t", "12"],
    ),
    "emu3": (
        CutSettings(adaptive=0, content=27),
        ["detect-content", "-t", "27", "detect-threshold", "-t", "12"],
    ),
    "nervous": (
        CutSettings(adaptive=0, content=10, fade=60, min_scene_s=0.2),
        ["-m", "0.2s", "detect-content", "-t", "10", "detect-threshold", "-t", "60"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_cuts_equal_the_command_line_of_pyscenedetect(
    bikes: Path, tmp_path: Path, case: str
) -> None:
    settings, detectors = CASES[case]
    mine = _cut_frames(bikes, settings)
    assert mine == _command_line(bikes, tmp_path, *detectors)
    assert len(mine) >= 4


@pytest.mark.slow
def test_cuts_equal_the_command_line_on_every_video_and_setting(
    videos: Path, tmp_path: Path
) -> None:
    for path in sorted(videos.glob("*.mp4")):
        for settings, detectors in CASES.values():
            assert _cut_frames(path, settings) == _command_line(path, tmp_path, *detectors)


def test_the_true_cuts_of_a_real_video_are_found(bikes: Path) -> None:
    found = _cut_frames(bikes, CutSettings(adaptive=0, content=27))
    # Last frames of shots, by eye: 29, 75, 136, 186, 241.
    assert found == [30, 76, 137, 187, 242]


def test_cuts_of_a_rendered_video_and_a_fade_are_found(
    tmp_path: Path, write_video: Callable[..., Path], moving: Callable[..., list[np.ndarray]]
) -> None:
    shots = [moving(30, seed=seed) for seed in range(4)]
    ramp = [*np.linspace(1, 0, 10), *np.zeros(4), *np.linspace(0, 1, 10)]
    fade = [(shots[3][0] * level).astype(np.uint8) for level in ramp]
    frames = [*shots[0], *shots[1], *shots[2], *fade, *moving(20, seed=3)]
    path = write_video(tmp_path / "cuts.mp4", frames)
    found = _cut_frames(path, CutSettings())
    assert found[:2] == [30, 60]
    assert any(abs(cut - 102) <= 2 for cut in found)  # the middle of the black, 90 + 12


def _timeline(frames: int, ticks: int = 40) -> Timeline:
    pts = np.arange(frames, dtype=np.int64) * ticks
    return Timeline(pts, frames * ticks, Fraction(1, 1000))  # 25 fps in milliseconds


def test_clips_are_trimmed_at_cuts_only() -> None:
    timeline = _timeline(250)
    clips = spans(timeline, [4000], CutSettings())
    assert [(c.start_pts, c.end_pts, c.starts_at, c.ends_at) for c in clips] == [
        (0, 3750, "source", "cut"),
        (4250, 10_000, "cut", "source"),
    ]


def test_long_clips_are_split_evenly_after_trimming() -> None:
    timeline = _timeline(25 * 60)
    clips = spans(timeline, [8000], CutSettings(max_clip_s=20))
    lengths = [c.end_pts - c.start_pts for c in clips]
    assert lengths == [7750, 17250, 17250, 17250]  # 51.75 s in three
    assert [c.starts_at for c in clips] == ["source", "cut", "split", "split"]
    assert all(a.end_pts == b.start_pts for a, b in pairwise(clips[1:]))
    assert len(spans(timeline, [8000], CutSettings(max_clip_s=0))) == 2


def test_a_shot_shorter_than_its_trim_stays_as_a_row() -> None:
    clips = spans(_timeline(100), [1000, 1200], CutSettings())
    assert [(c.start_pts, c.end_pts) for c in clips] == [(0, 750), (1000, 1200), (1450, 4000)]
