"""Where one shot ends and the next begins: PySceneDetect's own detectors, fed frame by frame.

The frames are what PySceneDetect's command line would look at (long side 256, two-tap bilinear,
as coded), so the cuts equal its cuts at the same settings. What the cuts mean for clips is
decided here too: trim at cuts, then split what is long.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from unimodal.pipeline.framepass import Timeline, Want
from unimodal.pipeline.settings import Settings

Boundary = Literal["source", "cut", "split"]


class CutSettings(Settings):
    """Shot detection, and how shots become clips. A threshold of 0 switches its detector off."""

    adaptive: float = 3.5
    """AdaptiveDetector: ratio of a frame's change to that of its neighbors. PySceneDetect's
    benchmark sweep (BBC, AutoShot, ClipShots) has its best hard-cut F1 at 3.5, window 3."""
    window: int = 3
    """AdaptiveDetector: neighbors on each side, in frames."""
    min_content: float = 15.0
    """AdaptiveDetector: least change of a frame, in gray levels."""
    content: float = 0.0
    """ContentDetector: change of a frame, in gray levels."""
    fade: int = 12
    """ThresholdDetector: a fade to black goes below this gray level."""
    min_scene_s: float = 0.6
    """Seconds between two cuts at least."""
    trim_s: float = 0.25
    """Seconds taken off at a detected cut, on both sides: encoders and dissolves smear it."""
    max_clip_s: float = 20.0
    """Seconds; a longer clip is split evenly. 0 never splits."""


@dataclass(frozen=True)
class Span:
    """A clip to be: [start, end) in ticks, and why it begins and ends there."""

    start_pts: int
    end_pts: int
    starts_at: Boundary
    ends_at: Boundary


class Cuts:
    """Observer that runs the detectors."""

    fps = None
    wants: tuple[Want, ...] = (Want("bgr24", long_side=256, as_shown=False),)

    def __init__(self, settings: CutSettings, time_base: Fraction, fps: float | None) -> None:
        from scenedetect import AdaptiveDetector, ContentDetector, ThresholdDetector

        self._time_base = time_base
        self._rate = Fraction(fps).limit_denominator(100_000) if fps else Fraction(25)
        self._first: int | None = None
        self._last: Any = None
        self._found: list[Any] = []
        self._detectors: list[Any] = []
        if settings.adaptive > 0:
            self._detectors.append(
                AdaptiveDetector(
                    adaptive_threshold=settings.adaptive,
                    min_scene_len=settings.min_scene_s,
                    window_width=settings.window,
                    min_content_val=settings.min_content,
                )
            )
        if settings.content > 0:
            self._detectors.append(
                ContentDetector(threshold=settings.content, min_scene_len=settings.min_scene_s)
            )
        if settings.fade > 0:
            self._detectors.append(
                ThresholdDetector(threshold=settings.fade, min_scene_len=settings.min_scene_s)
            )

    def see(self, index: int, pts: int, seconds: float, images: Sequence[np.ndarray]) -> None:
        """Feed one frame, BGR uint8 [H, W, 3], to every detector."""
        from scenedetect.common import FrameTimecode, Timecode

        if self._first is None:
            self._first = pts
        time = FrameTimecode(Timecode(pts - self._first, self._time_base), fps=self._rate)
        self._last = time
        for detector in self._detectors:
            self._found += detector.process_frame(time, images[0])

    def cuts(self, timeline: Timeline) -> list[int]:
        """PTS of the first frame of every shot but the first; call it after the last frame."""
        for detector in self._detectors:
            self._found += detector.post_process(self._last)
        self._detectors = []
        found: set[int] = set()
        first = int(timeline.pts[0])
        for time in self._found:
            # ThresholdDetector names frames by number, the others by time: take the nearest frame.
            ticks = first + float(Fraction(time.pts) * Fraction(time.time_base) / self._time_base)
            right = int(np.searchsorted(timeline.pts, ticks))
            near = timeline.pts[max(0, right - 1) : right + 1]
            found.add(int(near[np.argmin(np.abs(near - ticks))]))
        return sorted(found - {first})


def spans(timeline: Timeline, cuts: Sequence[int], settings: CutSettings) -> list[Span]:
    """Clips between cuts: trimmed at detected cuts first, then split evenly where too long.

    Every shot yields at least one span, however short: it is `decide` that drops.
    """
    trim = round(settings.trim_s / timeline.time_base)
    edges = [int(timeline.pts[0]), *cuts, timeline.end_pts]
    clips: list[Span] = []
    for number, (start, end) in enumerate(pairwise(edges)):
        starts_at: Boundary = "source" if number == 0 else "cut"
        ends_at: Boundary = "source" if number == len(edges) - 2 else "cut"
        kept_start = start + (trim if starts_at == "cut" else 0)
        kept_end = end - (trim if ends_at == "cut" else 0)
        if timeline.count(kept_start, kept_end) < 1:  # shorter than its own trim: keep it whole
            kept_start, kept_end = start, end
        clips += _split(Span(kept_start, kept_end, starts_at, ends_at), timeline, settings)
    return clips


def _split(span: Span, timeline: Timeline, settings: CutSettings) -> list[Span]:
    ticks = span.end_pts - span.start_pts
    seconds = float(ticks * timeline.time_base)
    # A hundredth of a second over the maximum is the container's rounding, not a longer clip.
    pieces = math.ceil((seconds - 0.01) / settings.max_clip_s) if settings.max_clip_s > 0 else 1
    if pieces <= 1:
        return [span]
    at = [span.start_pts + ticks * i // pieces for i in range(pieces + 1)]
    return [
        Span(
            at[i],
            at[i + 1],
            span.starts_at if i == 0 else "split",
            span.ends_at if i == pieces - 1 else "split",
        )
        for i in range(pieces)
    ]
