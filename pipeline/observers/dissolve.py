"""Where one shot melts into the next: no frame differs much from the one before, yet all changes.

During a dissolve every frame is (1 - a) A + a B with a going from 0 to 1: in the space of
pictures the video walks along a straight line. Motion walks along a curve, because what moves
changes one pixel after the other, and a cut jumps. So five samples F0 … F4, evenly spaced and
without their mean, score

    straightness = |F4 - F0| / (|F1 - F0| + |F2 - F1| + |F3 - F2| + |F4 - F3|)

which is 1 for a dissolve of still pictures and falls with the motion in them. Windows of five
lengths, 0.3 to 2.2 s, are tried at every sample. What must hold besides:

- no step is most of the way (a cut), and none goes backwards (a flash);
- the ends differ as different pictures do, in most of the picture (no title that comes and goes);
- contrast sags as it must when two pictures are mixed (Alattar 1993). A fast pan over a texture
  is straight enough at times, but its contrast stays.

Samples are gray, 32 pixels on the long side: finer ones see more of the motion, coarser ones take
pans for dissolves. Figures are in docs/accuracy.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

FPS = 12.5
"""Samples per second: a dissolve of 0.3 s still has the five that the score needs."""
SIDE = 32
STEPS = 4
STRIDES = (1, 2, 3, 5, 7)
"""Samples from one of the five to the next."""
REACH = STEPS * max(STRIDES)
BLOCK = 256
"""Samples judged at once: enough to make numpy's calls cheap, half a megabyte of pictures."""

LARGEST_STEP, SMALLEST_STEP = 0.5, 0.05  # shares of the way from F0 to F4
LEAST_CHANGE = 8.0  # root mean square of F4 - F0 in gray levels
LEAST_NOVELTY = 0.5  # |F4 - F0|² / (|F0|² + |F4|²): 0 if equal, 1 if uncorrelated
MOST_ALIKE = 0.7  # correlation of F0 and F4: a picture that only grows lighter is the same
LEAST_SPREAD = 0.35  # of the change over the picture: 0.64 if normally distributed, 0 for a spot
LARGEST_BULGE = 0.35  # contrast in the middle: 0 as of a mixture, 1 as if nothing were mixed
BLACK_MEAN, BLACK_DEVIATION = 16.0, 6.0  # gray levels; to and from black is ThresholdDetector's


@dataclass(frozen=True)
class Dissolve:
    """A transition: the old shot is alone before `start_pts`, the new one from `end_pts` on."""

    start_pts: int
    end_pts: int
    score: float  # straightness of its best window


class Dissolves:
    """Finds dissolves among the frames that go by; it holds half a minute of small gray samples."""

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold
        self._due = 0.0
        self._pts: list[int] = []
        self._samples: list[np.ndarray] = []
        self._first = 0  # the first of the held samples that no judged window begins with
        self._found: list[Dissolve] = []  # one per window, in order of the windows' beginnings

    def see(self, pts: int, seconds: float, image: np.ndarray) -> None:
        """Take a frame, BGR uint8 [H, W, 3], if one is due on the grid k / FPS of PTS time."""
        if seconds + 1e-6 < self._due:
            return
        self._due = (math.floor((seconds + 1e-6) * FPS) + 1) / FPS
        self._pts.append(pts)
        self._samples.append(_small(image))
        if len(self._samples) >= self._first + BLOCK + 2 * REACH:
            self._judge(self._first + BLOCK)
            done = self._first - REACH  # a window's surroundings tell where its dissolve begins
            del self._pts[:done], self._samples[:done]
            self._first = REACH

    def spans(self) -> list[Dissolve]:
        """All dissolves in order of time, none overlapping; call it after the last frame."""
        self._judge(len(self._samples))
        merged: list[Dissolve] = []
        for one in sorted(self._found, key=lambda one: one.start_pts):
            if merged and one.start_pts < merged[-1].end_pts:
                last = merged.pop()
                end = max(last.end_pts, one.end_pts)
                one = Dissolve(last.start_pts, end, max(last.score, one.score))
            merged.append(one)
        return merged

    def _judge(self, last: int) -> None:
        """Judge the windows that begin with the held samples `_first` … last - 1."""
        if len(self._samples) <= STEPS:
            return
        samples, pts = np.stack(self._samples), np.asarray(self._pts, dtype=np.float64)
        for start, end, score in _windows(samples, self._first, last):
            if score >= self._threshold:
                span = _extent(samples, pts, start, end)
                self._found.append(Dissolve(*span, score))
        self._first = last


def _small(image: np.ndarray) -> np.ndarray:
    """A gray picture of `SIDE` pixels on the long side, flat: float32 [P]."""
    import cv2

    factor = SIDE / max(image.shape[:2])
    size = (max(1, round(image.shape[1] * factor)), max(1, round(image.shape[0] * factor)))
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    return cv2.cvtColor(small, cv2.COLOR_BGR2GRAY).astype(np.float32).ravel()


def _windows(samples: np.ndarray, first: int, last: int) -> list[tuple[int, int, float]]:
    """Windows (start, end, straightness) that may be dissolves, of samples float32 [N, P]."""
    means = samples.mean(axis=1)
    flat = samples - means[:, None]
    contrast = np.einsum("np,np->n", flat, flat)
    pixels = flat.shape[1]
    black = (means < BLACK_MEAN) & (contrast < pixels * BLACK_DEVIATION**2)
    found: list[tuple[int, int, float]] = []
    for stride in STRIDES:
        length = STEPS * stride
        begin = np.arange(first, min(last, len(flat) - length))
        if not len(begin):
            continue
        five = [flat[begin + k * stride] for k in range(STEPS + 1)]
        steps = np.stack([b - a for a, b in pairwise(five)])
        way = five[-1] - five[0]
        square = np.einsum("np,np->n", way, way) + 1e-6
        shares = np.einsum("snp,np->sn", steps, way) / square
        walked = np.sqrt(np.einsum("snp,snp->sn", steps, steps)).sum(axis=0)
        before, after = contrast[begin], contrast[begin + length]
        product = np.einsum("np,np->n", five[0], five[-1])
        # |(1 - a) A + a B|² = (1 - a) |A|² + a |B|² - a (1 - a) |B - A|²
        done = np.clip(shares[: STEPS // 2].sum(axis=0), 0.05, 0.95)
        sag = done * (1 - done) * square
        unmixed = (1 - done) * before + done * after
        bulge = (contrast[begin + length // 2] - unmixed + sag) / sag
        likely = (
            (shares.max(axis=0) <= LARGEST_STEP)
            & (shares.min(axis=0) >= SMALLEST_STEP)
            & (square >= pixels * LEAST_CHANGE**2)
            & (square >= LEAST_NOVELTY * (before + after))
            & (product <= MOST_ALIKE * np.sqrt(before * after))
            & (np.abs(way).sum(axis=1) ** 2 >= LEAST_SPREAD * pixels * square)
            & (bulge <= LARGEST_BULGE)
            & ~black[begin]
            & ~black[begin + length]
        )
        straight = np.sqrt(square) / (walked + 1e-6)
        for i in np.flatnonzero(likely):
            found.append((int(begin[i]), int(begin[i]) + length, float(straight[i])))
    return found


def _extent(samples: np.ndarray, pts: np.ndarray, start: int, end: int) -> tuple[int, int]:
    """PTS at which the dissolve of a window begins and ends: where a straight line of a(t),
    fitted to its middle part, meets 0 and 1."""
    margin = (end - start) // 4
    around = slice(max(0, start - margin), min(len(samples), end + margin + 1))
    flat = samples[around] - samples[around].mean(axis=1, keepdims=True)
    old, new = flat[start - around.start], flat[end - around.start]
    a = (flat - old) @ (new - old) / ((new - old) @ (new - old))
    right = start - around.start + int(np.argmax(a[start - around.start :] >= 0.5))
    left = right - 1
    while left > 0 and a[left] > 0.2:
        left -= 1
    while right < len(a) - 1 and a[right] < 0.8:
        right += 1
    times = pts[around]
    speed, at_zero = np.polyfit(a[left : right + 1], times[left : right + 1], 1)
    low, high = sorted((at_zero, at_zero + speed))
    # A fit may run away where the picture moves; the surroundings bound it.
    return math.floor(max(low, times[0])), math.ceil(min(high, times[-1]))
