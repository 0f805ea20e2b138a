"""Technical quality from 0 (wrecked) to 1 (pristine), by four measures that need no weights.

    quality = sharpness * noise * blocks * exposure, each 0..1; of a video, the mean of its samples

- sharpness: how much of the differences between neighbor pixels a blur takes away; a picture that
  is blurred already has less to lose (Crete et al. 2007, "The blur effect"). Only differences that
  stand out of the noise count, so that noise does not pass for detail.
- noise: Immerkaer's estimate (1996, "Fast noise variance estimation") in the calmest tenth of the
  blocks, less what the same estimate finds at half the size: texture is there, noise is not.
- blocks: steps at the borders of the 8x8 grid against those in the middle of its blocks, in gray
  levels (the idea of Wang, Sheikh and Bovik 2002).
- exposure: the range of gray levels in use, and the share that is clipped to black or white.

On nine photographs the score falls on every step of ladders of blur, noise, JPEG, enlarging and
fading, within 0.01 (tests/pipeline/scorers/test_quality.py; rank correlation 0.97 to 1.00).

What cannot be seen: samples are scaled down to `keyframes.short_side` and stored as JPEG, so noise
of up to 4 gray levels and compression at 80 and more are gone or hidden, a coding grid is found
only in sources that were not scaled, and a large picture that was enlarged passes for sharp as long
as its stored sample is. Banding is not measured: JPEG hides and makes it. Nor is content: bokeh
costs nothing where anything is in focus, but a picture of fog is not sharp. A learned score (DOVER,
MUSIQ, Q-Align) agrees better with people where its weights are at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from unimodal.pipeline.clips import QUALITY as COLUMNS  # noqa: F401
from unimodal.pipeline.framepass import one_opencv_thread
from unimodal.pipeline.frames import Clip
from unimodal.pipeline.settings import Settings

VERSION = 1
BATCH = 1

LEAST_SIDE = 24  # pixels: under three coding blocks there is nothing to measure
LEAST_RANGE = 8.0  # gray levels: a plain area has no quality


class QualitySettings(Settings):
    """Technical quality. Each bound is where that fault begins or ends to count."""

    sharp: float = 0.75
    """Loss to blurring from which on a picture is sharp; photographs in focus have 0.65 to 0.85."""
    blurred: float = 0.12
    """The same of a picture without any detail: a Gaussian of 5 pixels leaves 0.15."""
    noise: float = 0.3
    """Gray levels of noise that are free."""
    noise_scale: float = 10.0
    """Gray levels of noise over that which divide the score by e."""
    blocks: float = 1.2
    """Gray levels of steps at the grid that are free: the stored sample has its own, and chance."""
    blocks_scale: float = 4.0
    """Gray levels of steps over that which divide the score by e."""
    clipped: float = 0.5
    """What a picture loses that is black and white only."""
    range: float = 64.0
    """Gray levels between the 1st and 99th percentile; a picture with fewer is dull."""


def absent(settings: QualitySettings) -> str | None:
    """None: it needs nothing."""
    return None


def load(settings: QualitySettings) -> Callable[[Sequence[Clip]], list[dict[str, Any]]]:
    """A function from clips to their columns."""

    def score(clips: Sequence[Clip]) -> list[dict[str, Any]]:
        with one_opencv_thread():
            return [{"quality": _quality(clip, settings)} for clip in clips]

    return score


def _quality(clip: Clip, settings: QualitySettings) -> float | None:
    found = [
        quality(*inside_bars(sample.bgr(), clip.row), settings=settings) for sample in clip.scoring
    ]
    known = [value for value in found if value is not None]
    return float(np.mean(known)) if known else None


def inside_bars(
    bgr: np.ndarray, row: Mapping[str, Any]
) -> tuple[np.ndarray, tuple[int, int] | None]:
    """A sample [H, W, 3] without its letterbox bars, and where the 8x8 grid begins in (y, x).

    The grid is None if the sample was scaled down: its grid is not the source's.
    """
    height, width = bgr.shape[:2]
    box = [row.get(f"crop_{name}") for name in ("x0", "y0", "x1", "y1")]
    whole = row.get("width") or width, row.get("height") or height
    x0, y0, x1, y1 = 0, 0, width, height
    if None not in box:
        x0, x1 = (round(box[i] * width / whole[0]) for i in (0, 2))
        y0, y1 = (round(box[i] * height / whole[1]) for i in (1, 3))
    piece = bgr[y0:y1, x0:x1]
    grid = (8 - y0 % 8, 8 - x0 % 8)
    return piece, grid if whole == (width, height) else None


def quality(
    bgr: np.ndarray, grid: tuple[int, int] | None, settings: QualitySettings
) -> float | None:
    """Quality of one picture, BGR uint8 [H, W, 3]; None if it is tiny or plain.

    `grid` is the (y, x) of the first border of its coding grid, None if it has none.
    """
    import cv2

    if min(bgr.shape[:2]) < LEAST_SIDE:
        return None
    gray = cv2.cvtColor(bgr, cv2.COLOR_BGR2GRAY)
    levels = level_range(gray)
    if levels < LEAST_RANGE:
        return None
    clipped = float(np.mean((gray <= 3) | (gray >= 252)))
    exposure = min(1.0, levels / settings.range) * (1 - settings.clipped * clipped**2)
    pixels = gray.astype(np.float32)
    sigma = noise(pixels)
    spread = settings.sharp - settings.blurred
    sharp = float(np.clip((sharpness(gray) - settings.blurred) / spread, 0, 1))
    steps = 0.0 if grid is None else blockiness(pixels, grid)
    return float(
        sharp
        * exposure
        * np.exp(-max(0.0, sigma - settings.noise) / settings.noise_scale)
        * np.exp(-max(0.0, steps - settings.blocks) / settings.blocks_scale)
    )


def level_range(gray: np.ndarray) -> float:
    """Gray levels between the 1st and the 99th percentile of a picture, uint8 [H, W]."""
    shares = np.cumsum(np.bincount(gray.ravel(), minlength=256)) / gray.size
    low, high = np.searchsorted(shares, [0.01, 0.99])
    return float(high - low)


def noise(gray: np.ndarray) -> float:
    """Standard deviation of the noise in a picture, float32 [H, W], in gray levels.

    White noise halves where four pixels are averaged; the detail of pictures does not, as its
    power falls with the square of the frequency. So with s1 what the mask answers and s2 what it
    answers at half the size, and detail alike in both: noise² = (s1² - s2²) / (1 - 1/4).
    """
    import cv2

    half = cv2.resize(gray, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
    calmest = [_roughness(plane) for plane in (gray, half)]
    fine, coarse = (float(np.percentile(rough, 10)) if rough.size else 0.0 for rough in calmest)
    return float(np.sqrt(max(0.0, fine**2 - coarse**2) / 0.75))


def _roughness(gray: np.ndarray) -> np.ndarray:
    """Immerkaer's estimate for every 16x16 block, in gray levels.

    The mask answers neither to slopes nor to straight edges. Blocks that are clipped to black or
    white are left out: noise does not show there.
    """
    import cv2

    mask = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]], np.float32)
    answer = np.abs(cv2.filter2D(gray, cv2.CV_32F, mask))[1:-1, 1:-1]
    side = min(16, *answer.shape)
    rows, columns = (length // side * side for length in answer.shape)
    means, levels = (
        plane[:rows, :columns].reshape(rows // side, side, -1, side).mean(axis=(1, 3))
        for plane in (answer, gray[1:-1, 1:-1])
    )
    return np.asarray(np.sqrt(np.pi / 2) / 6 * means[(levels > 12) & (levels < 243)])


def sharpness(gray: np.ndarray) -> float:
    """Share of the strong differences between neighbors that a 9-pixel blur takes away: 0..1.

    `gray` is uint8 [H, W]; the worse direction counts. 0 if hardly any difference stands out of
    the picture's roughness. A 3x3 median goes first: what it removes is noise rather than edges.
    """
    import cv2

    calm = cv2.medianBlur(gray, 3).astype(np.float32)
    rough = _roughness(calm)
    least = max(8.0, 4 * float(np.median(rough)) if rough.size else 0.0)
    found = []
    for axis, size in ((0, (1, 9)), (1, (9, 1))):
        before = np.abs(np.diff(calm, axis=axis))
        after = np.abs(np.diff(cv2.blur(calm, size), axis=axis))
        strong = before > least
        if np.count_nonzero(strong) > 1e-4 * gray.size:
            lost = np.maximum(before - after, 0)
            found.append(float(lost[strong].sum() / before[strong].sum()))
    return min(found, default=0.0)


def blockiness(gray: np.ndarray, grid: tuple[int, int]) -> float:
    """How much larger steps are at the 8x8 grid than amid its blocks, in gray levels.

    `gray` is float32 [H, W]; a step is a difference between neighbors beyond the mean of those on
    both sides of it. The worse direction counts.
    """
    found = []
    for first, plane in zip(grid, (gray.T, gray), strict=True):
        differences = np.abs(np.diff(plane, axis=1))
        steps = differences[:, 1:-1] - (differences[:, :-2] + differences[:, 2:]) / 2
        means = steps.mean(axis=0)  # of the border between columns i + 1 and i + 2
        border = (np.arange(len(means)) + 2 - first) % 8
        found.append(float(means[border == 0].mean() - means[border == 4].mean()))
    return max(found)
