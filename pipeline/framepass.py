"""One decode per video: frames go by once, and observers see them at the sizes they ask for.

    reader ──frame──> swscale, once per size asked for ──> cut, flicker      every frame
                                                      └──> flow, light, keyframes   2 a second

An observer keeps numbers per frame or sample (bytes, not pictures), and is asked for a span's
columns when all cuts are known. So memory does not grow with resolution, and with length only
by a few dozen bytes a frame. A still image is a video of one frame.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

import numpy as np

from unimodal.pipeline.errors import MediaError
from unimodal.pipeline.media import Frame, Video


@dataclass(frozen=True)
class Want:
    """A size and color format that an observer asks for; equal wants are scaled once."""

    format: str  # "bgr24" or "gray"
    short_side: int | None = None  # pixels; never enlarged
    long_side: int | None = None
    as_shown: bool = True  # rotated and with pixel aspect; False: as it was coded


class Observer(Protocol):
    """Something that watches frames go by."""

    @property
    def fps(self) -> float | None:
        """Samples per second of PTS time; None for every frame."""

    @property
    def wants(self) -> tuple[Want, ...]:
        """The images it asks for."""

    def see(self, index: int, pts: int, seconds: float, images: Sequence[np.ndarray]) -> None:
        """One frame: index among all frames, ticks, seconds from the first, an image per want."""


@dataclass
class Timeline:
    """When every frame of a source is shown."""

    pts: np.ndarray  # int64 [frames], strictly rising
    end_pts: int  # when the last frame is gone
    time_base: Fraction

    def seconds(self, pts: int) -> float:
        """Seconds from the first frame to `pts`."""
        return float((pts - int(self.pts[0])) * self.time_base)

    def count(self, start_pts: int, end_pts: int) -> int:
        """Frames with start <= pts < end."""
        return int(np.searchsorted(self.pts, end_pts) - np.searchsorted(self.pts, start_pts))


def watch_frames(
    video: Video,
    observers: Sequence[Observer],
    tick: Callable[[float], None] | None = None,
    span: tuple[int, int, int] | None = None,
) -> Timeline:
    """Decode `video` once and show its frames to `observers`.

    `tick` is told the seconds of video that went by, about twice a second of them. With `span`
    (start PTS, end PTS, PTS of the source's first frame), a video that stands at a key frame
    before it is shown from start to end only, sampled at the times of a pass over the whole. Raises
    `MediaError` if the video breaks off or is damaged.
    """
    pts: list[int] = []
    due = {observer.fps: 0.0 for observer in observers if observer.fps is not None}
    first_pts = duration = 0
    told = 0.0
    with one_opencv_thread():
        for index, frame in enumerate(video.frames()):
            if span is not None and frame.pts >= span[1]:
                break
            if index == 0:
                first_pts = frame.pts if span is None else span[2]
                # The grid goes on where the frame before this one left it.
                before = float((frame.pts - first_pts) * video.time_base)
                before -= 1 / (video.probe.fps or 25)
                due = {rate: max(0, math.floor(before * rate) + 1) / rate for rate in due}
            seconds = float((frame.pts - first_pts) * video.time_base)
            # Sampling follows the clock, on the grid k / fps, whatever the frame rate does.
            now = {rate for rate, at in due.items() if seconds + 1e-6 >= at}
            for rate in now:
                due[rate] = (math.floor((seconds + 1e-6) * rate) + 1) / rate
            if span is not None and frame.pts < span[0]:
                continue
            pts.append(frame.pts)
            duration = frame.duration
            _show(video, frame, index, seconds, observers, now)
            if tick is not None and seconds - told >= 0.5:
                tick(seconds - told)
                told = seconds
    if not pts:
        raise MediaError("no frame can be decoded", video.path)
    if duration <= 0:
        duration = _usual_step(pts, video)
    timeline = Timeline(np.asarray(pts, dtype=np.int64), pts[-1] + duration, video.time_base)
    if span is None:
        video.check_complete(first_pts, timeline.end_pts)
    if tick is not None:
        tick(timeline.seconds(timeline.end_pts) - told)
    return timeline


def scaled_size(width: int, height: int, want: Want) -> tuple[int, int]:
    """(width, height) of a frame scaled for `want`, never enlarged, at least 1 pixel."""
    factor = 1.0
    if want.short_side is not None:
        factor = min(1.0, want.short_side / min(width, height))
    if want.long_side is not None:
        factor = min(factor, want.long_side / max(width, height))
    return max(1, round(width * factor)), max(1, round(height * factor))


def scaled(video: Video, frame: Frame, want: Want) -> np.ndarray:
    """One frame as `want` asks: uint8 [H, W] or [H, W, 3]."""
    if want.as_shown:
        size = scaled_size(video.probe.width, video.probe.height, want)
        return video.upright(frame, size, want.format)
    size = scaled_size(*video.coded, want)
    return video.scaled(frame, size, want.format, fast=True)


@contextmanager
def one_opencv_thread() -> Iterator[None]:
    """OpenCV's DIS flow works in one stripe per thread, and its result depends on their number."""
    import cv2

    before = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(before)


def within(times: Sequence[int], start_pts: int, end_pts: int) -> slice:
    """Where in rising `times` the samples of [start, end) are."""
    return slice(bisect_left(times, start_pts), bisect_left(times, end_pts))


def pairs_within(
    first: Sequence[int], second: Sequence[int], start_pts: int, end_pts: int
) -> slice:
    """Where the pairs (first[i], second[i]) are that lie in [start, end) with both ends."""
    return slice(bisect_left(first, start_pts), bisect_left(second, end_pts))


def _show(
    video: Video,
    frame: Frame,
    index: int,
    seconds: float,
    observers: Sequence[Observer],
    now: set[float],
) -> None:
    images: dict[Want, np.ndarray] = {}
    for observer in observers:
        if observer.fps is not None and observer.fps not in now:
            continue
        for want in observer.wants:
            if want not in images:
                images[want] = scaled(video, frame, want)
        observer.see(index, frame.pts, seconds, [images[want] for want in observer.wants])


def _usual_step(pts: list[int], video: Video) -> int:
    """Ticks that the last frame is shown for when the container does not say."""
    if len(pts) > 1:
        return max(1, int(np.median(np.diff(pts[-100:]))))
    if video.probe.fps:
        return max(1, round(1 / (video.probe.fps * video.time_base)))
    return 1
