"""One pass: who sees what, and when."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from unimodal.pipeline import media
from unimodal.pipeline.framepass import Want, pairs_within, scaled_size, watch_frames, within


class Witness:
    """An observer that remembers what it saw."""

    def __init__(self, fps: float | None, *wants: Want) -> None:
        self.fps = fps
        self.wants = wants
        self.seconds: list[float] = []
        self.shapes: set[tuple[int, ...]] = set()

    def see(self, index: int, pts: int, seconds: float, images: Sequence[np.ndarray]) -> None:
        self.seconds.append(seconds)
        self.shapes |= {image.shape for image in images}


def test_sampling_follows_the_clock_at_a_variable_rate(
    tmp_path: Path, write_video: Callable[..., Path], moving: Callable[..., list[np.ndarray]]
) -> None:
    at = [0.0, 0.1, 0.2, 0.6, 0.7, 2.4, 2.5, 2.6]
    path = write_video(tmp_path / "v.mkv", moving(8), pts=[round(s * 2500) for s in at])
    every, sampled = Witness(None), Witness(2.0, Want("gray", short_side=48))
    ticks: list[float] = []
    with media.open_video(path) as video:
        timeline = watch_frames(video, [every, sampled], ticks.append)
    assert every.seconds == pytest.approx(at, abs=2e-3)
    # The first frame at or after each point of the half-second grid.
    assert sampled.seconds == pytest.approx([0.0, 0.6, 2.4, 2.5], abs=2e-3)
    assert sum(ticks) == pytest.approx(timeline.seconds(timeline.end_pts))
    assert timeline.count(int(timeline.pts[1]), int(timeline.pts[4])) == 3


def test_observers_get_the_sizes_they_ask_for(bikes: Path) -> None:
    wants = (Want("gray", short_side=128), Want("bgr24", long_side=256), Want("gray"))
    witness = Witness(1.0, *wants)
    with media.open_video(bikes) as video:
        watch_frames(video, [witness])
    assert witness.shapes == {(128, 301), (109, 256, 3), (272, 640)}
    assert len(witness.seconds) == 10


def test_nothing_is_enlarged_and_nothing_vanishes() -> None:
    assert scaled_size(72, 72, Want("gray", short_side=448)) == (72, 72)
    assert scaled_size(5000, 2, Want("gray", long_side=256)) == (256, 1)


def test_spans_are_half_open_and_pairs_need_both_ends_inside() -> None:
    times = [0, 10, 20, 30]
    assert times[within(times, 10, 30)] == [10, 20]
    first, second = times[:-1], times[1:]
    assert first[pairs_within(first, second, 5, 31)] == [10, 20]
    assert first[pairs_within(first, second, 5, 30)] == [10]
    assert first[pairs_within(first, second, 25, 30)] == []
