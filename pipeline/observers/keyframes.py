"""Small pictures of every clip, so that no later stage opens the video again.

Where clips begin and end is known only when all frames have gone by. So samples are compressed
as they go by and spooled to a file on disk; memory holds their times and places alone.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO

import numpy as np

from unimodal.pipeline.framepass import Want, within
from unimodal.pipeline.settings import Settings


class KeyframeSettings(Settings):
    """The pictures that later stages read."""

    fps: float = 2.0
    """Samples per second; all of them are kept, as text is looked for in each."""
    short_side: int = 448
    """Pixels; smaller sources are not enlarged."""
    count: int = 12
    """Keyframes: samples of a clip at most, evenly spaced, that captioners see."""
    scoring: int = 3
    """How many of the keyframes scorers look at."""
    quality: int = 90
    """JPEG quality."""


@dataclass(frozen=True)
class Picture:
    """A spooled JPEG."""

    pts: int
    seconds: float
    offset: int
    size: int
    hash: int


class Keyframes:
    """Observer that compresses samples into `spool`, a file opened for reading and writing."""

    def __init__(self, settings: KeyframeSettings, spool: IO[bytes]) -> None:
        self.fps = settings.fps
        self.wants: tuple[Want, ...] = (Want("bgr24", short_side=settings.short_side),)
        self._settings = settings
        self._spool = spool
        self._pts = array("q")
        self._pictures: list[Picture] = []

    def see(self, index: int, pts: int, seconds: float, images: Sequence[np.ndarray]) -> None:
        """Spool one sample, BGR uint8 [H, W, 3]."""
        import cv2

        quality = [cv2.IMWRITE_JPEG_QUALITY, self._settings.quality]
        done, data = cv2.imencode(".jpg", images[0], quality)
        if not done:
            raise ValueError(f"JPEG encoding failed for a {images[0].shape} frame")
        offset = self._spool.seek(0, 2)
        self._spool.write(data.tobytes())
        self._pts.append(pts)
        self._pictures.append(Picture(pts, seconds, offset, len(data), perceptual_hash(images[0])))

    def choose(self, start_pts: int, end_pts: int) -> list[tuple[Picture, bool, bool]]:
        """The span's samples: (picture, is it a keyframe, do scorers look at it)."""
        inside = self._pictures[within(self._pts, start_pts, end_pts)]
        chosen = even(len(inside), self._settings.count)
        scoring = {chosen[i] for i in even(len(chosen), self._settings.scoring)}
        keyframes = set(chosen)
        return [(picture, i in keyframes, i in scoring) for i, picture in enumerate(inside)]


def even(total: int, wanted: int) -> list[int]:
    """Up to `wanted` indices out of `total`, each in the middle of its equal share."""
    if total <= wanted:
        return list(range(total))
    return [(2 * i + 1) * total // (2 * wanted) for i in range(wanted)]


def perceptual_hash(bgr: np.ndarray) -> int:
    """64-bit DCT hash of a BGR picture, uint8 [H, W, 3]; near pictures differ in few bits.

    The 8x8 lowest frequencies of a 32x32 gray copy, each above or below their median; the mean
    (the first of them) says nothing of the picture and is left out of the median.
    """
    import cv2

    gray = cv2.cvtColor(bgr, cv2.COLOR_BGR2GRAY)
    small = cv2.resize(gray, (32, 32), interpolation=cv2.INTER_AREA).astype(np.float32)
    low = cv2.dct(small)[:8, :8].ravel()
    bits = low > np.median(low[1:])
    return int(np.packbits(bits).view(">u8")[0])
