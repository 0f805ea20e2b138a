"""Where one shot ends and the next begins: PySceneDetect's own detectors, fed frame by frame.

The frames are what PySceneDetect's command line would look at (long side 256, two-tap bilinear,
as coded), so the cuts equal its cuts at the same settings. Dissolves, which it does not see, are
found by a detector of our own. What the cuts mean for clips is decided here too: leave out the
transitions, trim on both sides of them, then split what is long.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np

from unimodal.pipeline.framepass import Timeline, Want
from unimodal.pipeline.observers.dissolve import Dissolves
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
    dissolve: float = 0.6
    """Straightness, 0 to 1, of the way from one shot to the next in the space of pictures; 1 is
    a dissolve between two still pictures."""
    min_scene_s: float = 0.6
    """Seconds between two cuts at least."""
    trim_s: float = 0.25
    """Seconds taken off at a detected transition, on both sides: encoders smear it. A dissolve
    or a fade is left out whole besides."""
    max_clip_s: float = 20.0
    """Seconds; a longer clip is split evenly. 0 never splits."""


@dataclass(frozen=True)
class Evidence:
    """Why a cut was seen; `clips.EVIDENCE` in a row."""

    detector: str  # adaptive | content | fade | dissolve
    score: float  # ratio | gray levels | mean gray level | straightness
    threshold: float


@dataclass(frozen=True)
class Cut:
    """A transition: the old shot is alone before `start_pts`, the new one from `end_pts` on.

    Of a hard cut both are `pts`, the first frame of the new shot.
    """

    pts: int
    start_pts: int
    end_pts: int
    evidence: Evidence


@dataclass(frozen=True)
class Span:
    """A clip to be: [start, end) in ticks, and why it begins and ends there."""

    start_pts: int
    end_pts: int
    starts_at: Boundary
    ends_at: Boundary
    start_cut: Evidence | None = None  # where it starts at a cut
    end_cut: Evidence | None = None


class Cuts:
    """Observer that runs the detectors."""

    fps = None
    wants: tuple[Want, ...] = (Want("bgr24", long_side=256, as_shown=False),)

    def __init__(self, settings: CutSettings, time_base: Fraction, fps: float | None) -> None:
        from scenedetect import AdaptiveDetector, ContentDetector, ThresholdDetector

        self._settings = settings
        self._time_base = time_base
        self._rate = Fraction(fps).limit_denominator(100_000) if fps else Fraction(25)
        self._first: int | None = None
        self._last: Any = None
        self._found: dict[str, list[Any]] = {"adaptive": [], "content": [], "fade": []}
        self._detectors: dict[str, Any] = {}
        self._changes = array("d")  # ContentDetector's score of every frame
        self._means = array("d")  # of all samples of every frame, 0 to 255
        self._dissolves = Dissolves(settings.dissolve) if settings.dissolve > 0 else None
        if settings.adaptive > 0:
            self._detectors["adaptive"] = AdaptiveDetector(
                adaptive_threshold=settings.adaptive,
                min_scene_len=settings.min_scene_s,
                window_width=settings.window,
                min_content_val=settings.min_content,
            )
        if settings.content > 0:
            self._detectors["content"] = ContentDetector(
                threshold=settings.content, min_scene_len=settings.min_scene_s
            )
        if settings.fade > 0:
            self._detectors["fade"] = ThresholdDetector(
                threshold=settings.fade, min_scene_len=settings.min_scene_s
            )
            # Its own StatsManager keeps a dictionary per frame: 8 bytes will do.
            self._detectors["fade"].stats_manager = SimpleNamespace(
                metrics_exist=lambda timecode, keys: True,
                get_metrics=lambda timecode, keys: [self._means[-1]],
            )

    def see(self, index: int, pts: int, seconds: float, images: Sequence[np.ndarray]) -> None:
        """Feed one frame, BGR uint8 [H, W, 3], to every detector."""
        import cv2
        from scenedetect.common import FrameTimecode, Timecode

        image = images[0]
        if self._first is None:
            self._first = pts
        time = FrameTimecode(Timecode(pts - self._first, self._time_base), fps=self._rate)
        self._last = time
        self._means.append(sum(cv2.sumElems(image)) / image.size)
        for name, detector in self._detectors.items():
            self._found[name] += detector.process_frame(time, image)
        changing = self._detectors.get("adaptive") or self._detectors.get("content")
        if changing is not None:
            # A StatsManager would tell too, but with one the detector looks for edges as well,
            # which makes it four times as slow. A test compares the two.
            self._changes.append(changing._frame_score)
        if self._dissolves is not None:
            self._dissolves.see(pts, seconds, image)

    def cuts(self, timeline: Timeline) -> list[Cut]:
        """What the detectors found, in order; call it after the last frame.

        Where two of them see the same cut, the first of adaptive, content and fade is named.
        """
        for name, detector in self._detectors.items():
            self._found[name] += detector.post_process(self._last)
        self._detectors = {}
        found: dict[int, Cut] = {}
        for name, times in self._found.items():
            for time in times:
                index = self._nearest(time, timeline)
                pts = int(timeline.pts[index])
                if index > 0 and pts not in found:
                    found[pts] = self._cut(name, index, timeline)
        for one in self._dissolves.spans() if self._dissolves is not None else ():
            middle = (one.start_pts + one.end_pts) // 2
            seen = Evidence("dissolve", one.score, self._settings.dissolve)
            found.setdefault(middle, Cut(middle, one.start_pts, one.end_pts, seen))
        return [found[pts] for pts in sorted(found)]

    def _nearest(self, time: Any, timeline: Timeline) -> int:
        """Number of the frame that a detector means."""
        # ThresholdDetector names frames by number, the others by time: take the nearest frame.
        first = int(timeline.pts[0])
        ticks = first + float(Fraction(time.pts) * Fraction(time.time_base) / self._time_base)
        right = int(np.searchsorted(timeline.pts, ticks))
        near = timeline.pts[max(0, right - 1) : right + 1]
        return max(0, right - 1) + int(np.argmin(np.abs(near - ticks)))

    def _cut(self, name: str, index: int, timeline: Timeline) -> Cut:
        first = last = index
        if name == "content":
            score = self._changes[index]
        elif name == "adaptive":
            score = adaptive_ratio(self._changes, index, self._settings.window)
        else:
            score = self._means[index]
            means = np.asarray(self._means)
            first, last = fade_extent(means, index, timeline, self._settings.fade)
        seen = Evidence(name, score, float(getattr(self._settings, name)))
        pts, start, end = (int(timeline.pts[i]) for i in (index, first, last))
        return Cut(pts, start, end, seen)


def adaptive_ratio(changes: Sequence[float], index: int, window: int) -> float:
    """AdaptiveDetector's score: a frame's change to the mean of its neighbors', 255 at most."""
    around = [*changes[index - window : index], *changes[index + 1 : index + 1 + window]]
    mean = sum(around) / (2.0 * window)
    return min(changes[index] / mean, 255.0) if mean >= 0.00001 else 255.0


def fade_extent(means: np.ndarray, index: int, timeline: Timeline, black: float) -> tuple[int, int]:
    """First and last frame of a fade through black around frame `index`.

    `means` are the frames' mean gray levels. From where it is black, the fade goes on in both
    directions for as long as the picture grows lighter by 2 levels in a fifth of a second, and
    for 3 s at most.
    """
    seconds = (timeline.pts - timeline.pts[0]) * float(timeline.time_base)

    def walk(step: int) -> int:
        last = 0 if step < 0 else len(means) - 1
        at = index
        while at != last and means[at] < black:
            at += step
        left, ahead = at, at
        while at != last and abs(seconds[at] - seconds[left]) < 3:
            while ahead != last and abs(seconds[ahead] - seconds[at]) < 0.2:
                ahead += step
            if means[ahead] < means[at] + 2:
                break
            at += step
        return at

    return walk(-1), walk(1)


def transitions(cuts: Sequence[Cut]) -> list[Cut]:
    """Cuts with a shot between them: what lies within a fade or a dissolve is a part of it."""

    def weight(cut: Cut) -> tuple[bool, int]:
        # A fade through black looks like a dissolve too, from the shot before to the shot after.
        return cut.evidence.detector == "fade", cut.end_pts - cut.start_pts

    merged: list[Cut] = []
    for cut in sorted(cuts, key=lambda cut: (cut.start_pts, -cut.end_pts)):
        if merged and cut.start_pts < merged[-1].end_pts:
            last = merged.pop()
            end = max(last.end_pts, cut.end_pts)
            cut = replace(max(last, cut, key=weight), start_pts=last.start_pts, end_pts=end)
        merged.append(cut)
    return merged


def spans(timeline: Timeline, cuts: Sequence[Cut], settings: CutSettings) -> list[Span]:
    """Clips between cuts: without the transitions and trimmed there, then split where too long.

    Every shot yields at least one span, however short: it is `decide` that drops.
    """
    trim = round(settings.trim_s / timeline.time_base)
    clips: list[Span] = []
    for before, after in pairwise([None, *transitions(cuts), None]):
        start = int(timeline.pts[0]) if before is None else before.end_pts
        end = timeline.end_pts if after is None else after.start_pts
        kept_start = start + (trim if before else 0)
        kept_end = end - (trim if after else 0)
        if timeline.count(kept_start, kept_end) < 1:  # shorter than its own trim: keep it whole
            kept_start, kept_end = start, end
        span = Span(
            kept_start,
            kept_end,
            "cut" if before else "source",
            "cut" if after else "source",
            before.evidence if before else None,
            after.evidence if after else None,
        )
        clips += _split(span, timeline, settings)
    return clips


def _split(span: Span, timeline: Timeline, settings: CutSettings) -> list[Span]:
    ticks = span.end_pts - span.start_pts
    seconds = float(ticks * timeline.time_base)
    # A hundredth of a second over the maximum is the container's rounding, not a longer clip.
    pieces = math.ceil((seconds - 0.01) / settings.max_clip_s) if settings.max_clip_s > 0 else 1
    if pieces <= 1:
        return [span]
    at = [span.start_pts + ticks * i // pieces for i in range(pieces + 1)]
    split = [Span(a, b, "split", "split") for a, b in pairwise(at)]
    split[0] = replace(split[0], starts_at=span.starts_at, start_cut=span.start_cut)
    split[-1] = replace(split[-1], ends_at=span.ends_at, end_cut=span.end_cut)
    return split
