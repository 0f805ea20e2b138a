"""What can be told from brightness and color alone: exposure, sharpness, bars, freezes, flashes.

All of it rides on frames that others have asked for, at the cost of a few reductions.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np

from unimodal.pipeline.framepass import Want, pairs_within, within
from unimodal.pipeline.settings import Settings


class LightSettings(Settings):
    """Measures of light."""

    fps: float = 2.0
    """Samples per second for sharpness, contrast, color, bars and freezes."""
    black: float = 16.0
    """Mean gray level below which a frame is black."""
    flash: float = 20.0
    """Change of mean gray level between neighbor frames that counts as a flash."""
    freeze: float = 0.5
    """Mean change in gray levels between samples below which the picture stands still."""
    bar: int = 24
    """Gray level that no pixel of a letterbox bar exceeds."""


class Flicker:
    """Observer of every frame's mean brightness."""

    fps = None
    wants: tuple[Want, ...] = (Want("bgr24", long_side=256, as_shown=False),)

    def __init__(self, settings: LightSettings) -> None:
        self._settings = settings
        self._pts = array("q")
        self._luma = array("f")

    def see(self, index: int, pts: int, seconds: float, images: Sequence[np.ndarray]) -> None:
        """Note the mean luma of a BGR frame, uint8 [H, W, 3]."""
        import cv2

        blue, green, red, _ = cv2.mean(images[0])
        self._pts.append(pts)
        self._luma.append(0.114 * blue + 0.587 * green + 0.299 * red)  # BT.601

    def columns(self, start_pts: int, end_pts: int) -> dict[str, float | None]:
        """Mean luma (0..255), share of black frames, share of frame pairs that flash."""
        luma = np.asarray(self._luma[within(self._pts, start_pts, end_pts)])
        if not len(luma):
            return {"luma_mean": None, "black_ratio": None, "flash_ratio": None}
        jumps = np.abs(np.diff(luma)) > self._settings.flash
        return {
            "luma_mean": float(luma.mean(dtype=np.float64)),
            "black_ratio": float((luma < self._settings.black).mean()),
            "flash_ratio": float(jumps.mean()) if len(jumps) else None,
        }


class Light:
    """Observer of samples: contrast, blur, color, freezes and letterbox bars."""

    def __init__(self, settings: LightSettings) -> None:
        self.fps = settings.fps
        self.wants: tuple[Want, ...] = (
            Want("gray", short_side=256),
            Want("bgr24", long_side=256, as_shown=False),
        )
        self._settings = settings
        self._pts = array("q")
        self._measures: list[tuple[float, float, float]] = []  # contrast, blur, colorfulness
        self._from, self._to, self._still = array("q"), array("q"), array("b")
        self._boxes: list[tuple[int, int, int, int] | None] = []
        self._size = (1, 1)
        self._previous: np.ndarray | None = None

    def see(self, index: int, pts: int, seconds: float, images: Sequence[np.ndarray]) -> None:
        """Measure a gray sample, uint8 [H, W], and its color twin, BGR uint8 [h, w, 3]."""
        import cv2

        gray, color = images
        if self._previous is not None and self._previous.shape == gray.shape:
            change = float(cv2.absdiff(self._previous, gray).mean())
            self._from.append(self._pts[-1])
            self._to.append(pts)
            self._still.append(change < self._settings.freeze)
        self._previous = gray
        self._pts.append(pts)
        blur = float(cv2.Laplacian(gray, cv2.CV_32F).var())
        self._measures.append((float(gray.std()), blur, colorfulness(color)))
        self._boxes.append(content_box(gray, self._settings.bar))
        self._size = (gray.shape[1], gray.shape[0])

    def columns(self, start_pts: int, end_pts: int) -> dict[str, float | None]:
        """Means over the span's samples; freeze_ratio over pairs that lie within the span."""
        values = np.asarray(self._measures[within(self._pts, start_pts, end_pts)])
        still = self._still[pairs_within(self._from, self._to, start_pts, end_pts)]
        found: dict[str, float | None] = {"contrast": None, "blur": None, "colorfulness": None}
        if len(values):
            means = values.mean(axis=0)
            found = dict(zip(found, map(float, means), strict=True))
        return {**found, "freeze_ratio": float(np.mean(still)) if still else None}

    def crop(self, start_pts: int, end_pts: int, width: int, height: int) -> dict[str, int]:
        """The box inside the letterbox bars over a span, in pixels of the shown frame.

        Bars must stay black throughout: the box is the union over samples. It is rounded inward,
        so that no line of a bar is left, and is the whole frame where there are no bars.
        """
        boxes = [box for box in self._boxes[within(self._pts, start_pts, end_pts)] if box]
        x0, y0, x1, y1 = 0, 0, width, height
        if boxes:
            union = np.asarray(boxes)
            w, h = self._size
            left, top = union[:, 0].min(), union[:, 1].min()
            right, bottom = union[:, 2].max(), union[:, 3].max()
            # Under 2 % a dark edge is an encoder's doing; over three quarters it is a dark scene.
            if left + w - right > 0.02 * w and right - left > 0.25 * w:
                x0, x1 = _inward(left, right, w, width)
            if top + h - bottom > 0.02 * h and bottom - top > 0.25 * h:
                y0, y1 = _inward(top, bottom, h, height)
        return {"crop_x0": x0, "crop_y0": y0, "crop_x1": x1, "crop_y1": y1}


def colorfulness(bgr: np.ndarray) -> float:
    """Hasler and Süsstrunk's measure (2003) of a BGR picture, uint8 [H, W, 3]; 0 is gray."""
    blue, green, red = (bgr[..., i].astype(np.float32) for i in range(3))
    red_green = red - green
    yellow_blue = 0.5 * (red + green) - blue
    spread = np.hypot(red_green.std(), yellow_blue.std())
    offset = np.hypot(red_green.mean(), yellow_blue.mean())
    return float(spread + 0.3 * offset)


def content_box(gray: np.ndarray, bar: int) -> tuple[int, int, int, int] | None:
    """Half-open box (x0, y0, x1, y1) outside of which no pixel exceeds `bar`; None if all black."""
    rows = np.flatnonzero(gray.max(axis=1) > bar)
    columns = np.flatnonzero(gray.max(axis=0) > bar)
    if not len(rows):
        return None
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _inward(low: int, high: int, small: int, full: int) -> tuple[int, int]:
    """Scale [low, high) of `small` pixels to `full` pixels; a moved edge goes one sample inward."""
    first = 0 if low == 0 else int(np.ceil((low + 1) * full / small))
    last = full if high == small else int(np.floor((high - 1) * full / small))
    return first, last
