"""Dissolves: found where they are, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest

from unimodal.pipeline import media
from unimodal.pipeline.framepass import watch_frames
from unimodal.pipeline.observers import dissolve
from unimodal.pipeline.observers.cut import Cuts, CutSettings, spans
from unimodal.pipeline.observers.dissolve import Dissolves

Pictures = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def pictures(photos: Path) -> Pictures:
    """Real photographs, BGR [144, 256, 3]."""
    names = ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg", "brick.png")
    return {name: cv2.resize(cv2.imread(str(photos / name)), (256, 144)) for name in names}


def _find(frames: Sequence[np.ndarray], times: Sequence[float], threshold: float = 0.6) -> list:
    """(start, end, score) in seconds of the dissolves among BGR frames."""
    finder = Dissolves(threshold)
    for time, frame in zip(times, frames, strict=True):
        finder.see(round(time * 1000), time, frame)
    return [(one.start_pts / 1000, one.end_pts / 1000, one.score) for one in finder.spans()]


def _mixed(a: np.ndarray, b: np.ndarray, weight: float) -> np.ndarray:
    return np.round(a + weight * (b.astype(np.float32) - a)).astype(np.uint8)


def _melting(a: np.ndarray, b: np.ndarray, times: np.ndarray, at: float, length: float) -> list:
    return [_mixed(a, b, float(np.clip((t - at) / length, 0, 1))) for t in times]


@pytest.mark.parametrize("fps", [24, 25, 30, 60])
@pytest.mark.parametrize("length", [0.35, 0.7, 1.2, 2.0])
def test_a_dissolve_of_still_pictures_is_a_straight_line(
    pictures: Pictures, fps: int, length: float
) -> None:
    times = np.arange(0, 6, 1 / fps)
    ((start, end, score),) = _find(
        _melting(pictures["astronaut.png"], pictures["coffee.png"], times, 2, length), times
    )
    assert score > 0.98
    assert start == pytest.approx(2, abs=0.1) and end == pytest.approx(2 + length, abs=0.1)


def test_what_changes_without_being_mixed_is_no_dissolve(pictures: Pictures) -> None:
    times = np.arange(0, 4, 1 / 25)
    a, b = pictures["astronaut.png"], pictures["coffee.png"]
    wide = np.concatenate([a, b, pictures["chelsea.png"], pictures["rocket.jpg"]], axis=1)
    bricks = np.tile(pictures["brick.png"], (1, 4, 1))
    black = np.zeros_like(a)
    title = cv2.putText(a.copy(), "A title", (20, 80), 0, 2, (255, 255, 255), 6)
    cases = {
        "hard cuts": [(a, b, wide[:, 512:768])[int(t // 0.9) % 3] for t in times],
        "a slow pan": [wide[:, round(60 * t) :][:, :256] for t in times],
        "a fast pan": [wide[:, round(190 * t) :][:, :256] for t in times],
        "a pan over bricks": [bricks[:, round(120 * t) :][:, :256] for t in times],
        "a flash": [_mixed(a, np.full_like(a, 255), 0.8 * (2 <= t < 2.1)) for t in times],
        "a fade in": _melting(black, a, times, 1, 1.5),
        "a fade out": _melting(a, black, times, 1, 1.5),
        "a title": _melting(a, title, times, 1, 1),
        "a still": [a] * len(times),
    }
    for name, frames in cases.items():
        assert _find(frames, times) == [], name


def test_real_videos_without_dissolves_have_none(videos: Path) -> None:
    for path in sorted(videos.glob("*.mp4")):
        with media.open_video(path) as video:
            cuts = Cuts(CutSettings(), video.time_base, video.probe.fps)
            timeline = watch_frames(video, [cuts])
        assert all(cut.evidence.detector != "dissolve" for cut in cuts.cuts(timeline)), path.name


def test_one_real_shot_that_melts_into_another_is_left_out_of_the_clips(
    bikes: Path, tmp_path: Path, write_video: Callable[..., Path]
) -> None:
    shots = [
        [frame for _, frame in media.iter_frames(bikes, a * 512, b * 512, size=(144, 256))]
        for a, b in ((77, 136), (138, 186))
    ]
    old, new, length = shots[0], shots[1], 15
    mixed = [
        _mixed(a, b, (i + 1) / (length + 1))
        for i, (a, b) in enumerate(zip(old[-length:], new, strict=False))
    ]
    frames = [*old[:-length], *mixed, *new[length:]]
    path = write_video(tmp_path / "melt.mp4", frames)
    with media.open_video(path) as video:
        cuts = Cuts(CutSettings(), video.time_base, video.probe.fps)
        timeline = watch_frames(video, [cuts])
    (cut,) = cuts.cuts(timeline)
    assert cut.evidence.detector == "dissolve"
    assert cut.evidence.score >= cut.evidence.threshold == 0.6
    first, second = spans(timeline, [cut], CutSettings())
    begin = len(old) - length  # the first mixed frame
    assert timeline.count(0, first.end_pts) <= begin
    assert timeline.count(0, second.start_pts) >= begin + length
    # Not much more than the dissolve and the trim on both sides is lost.
    lost = len(frames) - timeline.count(0, first.end_pts)
    lost -= timeline.count(second.start_pts, timeline.end_pts)
    assert lost <= length + 2 * 0.25 * 25 + 12


def test_a_dissolve_is_found_where_the_frame_rate_varies(pictures: Pictures) -> None:
    rng = np.random.default_rng(0)
    times = np.cumsum(rng.choice((0.01, 0.033, 0.08), 200))
    ((start, end, _),) = _find(
        _melting(pictures["chelsea.png"], pictures["rocket.jpg"], times, 3, 1.0), times
    )
    assert start == pytest.approx(3, abs=0.15) and end == pytest.approx(4, abs=0.15)


def test_dissolves_are_found_at_every_place_in_a_block_and_memory_stays_bounded(
    pictures: Pictures,
) -> None:
    times = np.arange(0, 240, 0.08)
    names = ["astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg"]
    # A period that is no divisor of a block's 20.48 s moves from block to block.
    frames = []
    for t in times:
        number, into = int(t // 7.3), t % 7.3
        a, b = (pictures[names[k % 4]] for k in (number, number + 1))
        frames.append(_mixed(a, b, float(np.clip((into - 6) / 1.2, 0, 1))))
    finder = Dissolves(0.6)
    most = 0
    for time, frame in zip(times, frames, strict=True):
        finder.see(round(time * 1000), float(time), frame)
        most = max(most, len(finder._samples))
    found = finder.spans()
    expected = [7.3 * k + 6 for k in range(len(found))]
    assert len(found) == int((240 - 7.2) // 7.3) + 1
    assert [one.start_pts / 1000 for one in found] == pytest.approx(expected, abs=0.1)
    assert most <= dissolve.BLOCK + 4 * dissolve.REACH


def test_videos_too_short_for_a_window_have_no_dissolve() -> None:
    frames = [np.full((2, 256, 3), 10 * i, np.uint8) for i in range(4)]
    for count in range(5):
        assert _find(frames[:count], [0.1 * i for i in range(count)]) == []
