"""Cuts: equal to PySceneDetect's own command line, and turned into clips by the rules."""

from __future__ import annotations

import csv
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from scenedetect import AdaptiveDetector, FrameTimecode, StatsManager, ThresholdDetector

from unimodal.pipeline import media
from unimodal.pipeline.clips import WATCH
from unimodal.pipeline.framepass import Timeline, watch_frames
from unimodal.pipeline.inputs import list_sources
from unimodal.pipeline.observers.cut import (
    Cut,
    Cuts,
    CutSettings,
    Evidence,
    fade_extent,
    spans,
    transitions,
)
from unimodal.pipeline.watch import WatchSettings, watch_part


def _cuts(path: Path, settings: CutSettings) -> tuple[Timeline, list[Cut]]:
    with media.open_video(path) as video:
        cuts = Cuts(settings, video.time_base, video.probe.fps)
        timeline = watch_frames(video, [cuts])
        return timeline, cuts.cuts(timeline)


def _cut_frames(path: Path, settings: CutSettings) -> list[int]:
    timeline, cuts = _cuts(path, settings)
    return [int(np.searchsorted(timeline.pts, cut.pts)) for cut in cuts]


def _command_line(path: Path, folder: Path, *detectors: str) -> list[int]:
    command = [sys.executable, "-m", "scenedetect", "-i", str(path), "-o", str(folder), "-q"]
    command += [*detectors, "list-scenes", "-q", "-s", "-f", "scenes.csv"]
    subprocess.run(command, check=True, capture_output=True)
    with (folder / "scenes.csv").open() as file:
        starts = [int(row["Start Frame"]) - 1 for row in csv.DictReader(file)]
    return starts[1:]


CASES = {
    "best": (
        CutSettings(dissolve=0),
        ["detect-adaptive", "-t", "3.5", "-f", "3", "-c", "15", "detect-threshold", "-t", "12"],
    ),
    "emu3": (
        CutSettings(adaptive=0, content=27, dissolve=0),
        ["detect-content", "-t", "27", "detect-threshold", "-t", "12"],
    ),
    "nervous": (
        CutSettings(adaptive=0, content=10, fade=60, min_scene_s=0.2, dissolve=0),
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


class Stats:
    """Observer that has PySceneDetect itself keep the numbers of every frame."""

    fps = None
    wants = Cuts.wants

    def __init__(self) -> None:
        self.kept = StatsManager()
        self.detectors = [AdaptiveDetector(3.5, 15, 3), ThresholdDetector()]
        for detector in self.detectors:
            detector.stats_manager = self.kept

    def see(self, index: int, pts: int, seconds: float, images: Sequence[np.ndarray]) -> None:
        for detector in self.detectors:
            detector.process_frame(FrameTimecode(index, fps=25.0), images[0])


@pytest.mark.parametrize(
    ("settings", "column"),
    [
        (CutSettings(fade=0), "adaptive_ratio (w=3)"),
        (CutSettings(adaptive=0, content=15, fade=0), "content_val"),
        (CutSettings(adaptive=0, fade=80), "average_rgb"),
    ],
)
def test_the_evidence_of_a_cut_is_what_pyscenedetect_measures_there(
    bikes: Path, settings: CutSettings, column: str
) -> None:
    stats = Stats()
    with media.open_video(bikes) as video:
        cuts = Cuts(settings, video.time_base, video.probe.fps)
        timeline = watch_frames(video, [cuts, stats])
    found = cuts.cuts(timeline)
    assert found
    for cut in found:
        frame = int(np.searchsorted(timeline.pts, cut.pts))
        (theirs,) = stats.kept.get_metrics(FrameTimecode(frame, fps=25.0), [column])
        assert cut.evidence.score == pytest.approx(theirs, rel=1e-12)
        assert cut.evidence.threshold == (settings.adaptive or settings.content or settings.fade)
        assert (cut.evidence.score >= cut.evidence.threshold) == (column != "average_rgb")


def test_a_row_says_which_detector_saw_where_its_clip_begins_and_ends(
    bikes: Path, photos: Path, tmp_path: Path
) -> None:
    settings = WatchSettings(cut=CutSettings(adaptive=0, content=27, max_clip_s=1.0))
    watch_part("p", list_sources([bikes, photos / "coffee.png"]), settings, tmp_path)
    rows = pq.read_table(tmp_path / "p.parquet", schema=WATCH).to_pylist()
    assert {row["starts_at"] for row in rows} == {None, "source", "cut", "split"}
    for row in rows:
        for reason, evidence in (
            (row["starts_at"], row["start_cut"]),
            (row["ends_at"], row["end_cut"]),
        ):
            assert (evidence is None) == (reason != "cut")
            if evidence is not None:
                assert evidence["detector"] == "content"
                assert evidence["score"] >= evidence["threshold"] == 27


def test_a_still_picture_that_jumps_has_the_largest_ratio_there_is(
    tmp_path: Path, write_video: Callable[..., Path]
) -> None:
    frames = [np.full((64, 64, 3), 40, np.uint8)] * 30 + [np.full((64, 64, 3), 200, np.uint8)] * 30
    _, cuts = _cuts(write_video(tmp_path / "jump.mp4", frames), CutSettings())
    assert [cut.evidence for cut in cuts] == [Evidence("adaptive", 255.0, 3.5)]


def _remux(source: Path, target: Path, shift: int) -> Path:
    """Copy the packets of a video, shown `shift` ticks later (earlier, if it is negative)."""
    import av

    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(video=0):
            if packet.dts is None:
                continue
            packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
            packet.stream = stream
            new.mux(packet)
    return target


@pytest.mark.parametrize("seconds", [-1, 3])
def test_an_edit_list_moves_cuts_with_the_frames_that_it_shows(
    bikes: Path, tmp_path: Path, seconds: int
) -> None:
    # Times before zero make the muxer write an edit list that hides them, B-frames and all;
    # later ones make an empty edit at the start.
    settings = CutSettings(adaptive=0, content=27)
    path = _remux(bikes, tmp_path / "edited.mp4", seconds * 12800)
    assert b"elst" in path.read_bytes()
    plain, expected = _cuts(bikes, settings)
    edited, cuts = _cuts(path, settings)
    hidden = max(0, -seconds)
    assert len(edited.pts) == 250 - 25 * hidden
    times = [plain.seconds(cut.pts) - hidden for cut in expected]
    times = [time for time in times if time >= settings.min_scene_s]
    assert [edited.seconds(cut.pts) for cut in cuts] == pytest.approx(times)
    # The frame at a cut's PTS is the first of the new shot, in either file.
    for cut, twin in zip(cuts[::-1], expected[::-1], strict=False):
        (_, mine), (_, same) = (
            next(media.iter_frames(file, one.pts, one.pts + 1, size=(68, 160)))
            for file, one in ((path, cut), (bikes, twin))
        )
        assert np.array_equal(mine, same)


def test_rotation_metadata_changes_no_cut(bikes: Path, tmp_path: Path) -> None:
    data = bikes.read_bytes()
    one = 1 << 16
    at = data.index(b"tkhd") + 4 + 40  # ISO/IEC 14496-12 §8.3.2, version 0
    turned = tmp_path / "turned.mp4"
    matrix = struct.pack(">9i", 0, one, 0, -one, 0, 0, 0, 0, 1 << 30)
    turned.write_bytes(data[:at] + matrix + data[at + 36 :])
    assert media.probe(turned).width == 272
    assert _cuts(turned, CutSettings())[1] == _cuts(bikes, CutSettings())[1]


def test_cuts_are_told_in_time_stamps_where_the_frame_rate_varies(
    tmp_path: Path, write_video: Callable[..., Path], moving: Callable[..., list[np.ndarray]]
) -> None:
    # 25 frames a second, then 10, then 50: shots of 1.2, 3 and 0.9 s.
    steps = [100] * 30 + [250] * 30 + [50] * 45
    pts = np.concatenate([[0], np.cumsum(steps)[:-1]])
    frames = [*moving(30), *moving(30, seed=1), *moving(45, seed=2)]
    path = write_video(tmp_path / "vfr.mkv", frames, pts=[int(p) for p in pts])
    timeline, cuts = _cuts(path, CutSettings())
    assert [timeline.seconds(cut.pts) for cut in cuts] == pytest.approx([1.2, 4.2], abs=1e-3)


def _timeline(frames: int, ticks: int = 40) -> Timeline:
    pts = np.arange(frames, dtype=np.int64) * ticks
    return Timeline(pts, frames * ticks, Fraction(1, 1000))  # 25 fps in milliseconds


def _hard(pts: int) -> Cut:
    return Cut(pts, pts, pts, Evidence("adaptive", 5.0, 3.5))


def test_clips_are_trimmed_at_cuts_only() -> None:
    timeline = _timeline(250)
    clips = spans(timeline, [_hard(4000)], CutSettings())
    assert [(c.start_pts, c.end_pts, c.starts_at, c.ends_at) for c in clips] == [
        (0, 3750, "source", "cut"),
        (4250, 10_000, "cut", "source"),
    ]


def test_a_transition_is_in_no_clip() -> None:
    melt = Cut(4000, 3000, 5000, Evidence("dissolve", 0.9, 0.6))
    clips = spans(_timeline(250), [melt], CutSettings())
    assert [(c.start_pts, c.end_pts) for c in clips] == [(0, 2750), (5250, 10_000)]
    assert (clips[0].start_cut, clips[0].end_cut) == (None, melt.evidence)
    assert (clips[1].start_cut, clips[1].end_cut) == (melt.evidence, None)


def test_what_lies_within_a_transition_is_a_part_of_it() -> None:
    melt = Cut(4000, 3000, 5000, Evidence("dissolve", 0.9, 0.6))
    fade = Cut(5100, 4500, 5500, Evidence("fade", 0.0, 12.0))
    assert transitions([_hard(1000), _hard(3500), melt]) == [_hard(1000), melt]
    # A hard cut where the dissolve ends, or right before it, stands for itself.
    assert transitions([_hard(2999), melt, _hard(5000)]) == [_hard(2999), melt, _hard(5000)]
    (both,) = transitions([melt, fade])
    assert (both.start_pts, both.end_pts, both.evidence) == (3000, 5500, fade.evidence)


def test_a_fade_reaches_from_the_full_picture_through_black_to_the_full_picture() -> None:
    timeline = _timeline(200)  # 25 fps
    level = np.interp(np.arange(200), [0, 50, 75, 85, 110, 199], [90, 90, 0, 0, 120, 121])
    first, last = fade_extent(level, 80, timeline, 12)
    assert abs(first - 50) <= 2 and abs(last - 110) <= 2
    # A video that begins black has no picture before.
    assert fade_extent(level[75:], 5, timeline, 12)[0] == 0


def test_long_clips_are_split_evenly_after_trimming() -> None:
    timeline = _timeline(25 * 60)
    clips = spans(timeline, [_hard(8000)], CutSettings(max_clip_s=20))
    lengths = [c.end_pts - c.start_pts for c in clips]
    assert lengths == [7750, 17250, 17250, 17250]  # 51.75 s in three
    assert [c.starts_at for c in clips] == ["source", "cut", "split", "split"]
    # A split is nobody's finding.
    assert [c.start_cut is None for c in clips] == [True, False, True, True]
    assert [c.end_cut is None for c in clips] == [False, True, True, True]
    assert all(a.end_pts == b.start_pts for a, b in pairwise(clips[1:]))
    assert len(spans(timeline, [_hard(8000)], CutSettings(max_clip_s=0))) == 2


def test_a_shot_shorter_than_its_trim_stays_as_a_row() -> None:
    clips = spans(_timeline(100), [_hard(1000), _hard(1200)], CutSettings())
    assert [(c.start_pts, c.end_pts) for c in clips] == [(0, 750), (1000, 1200), (1450, 4000)]
