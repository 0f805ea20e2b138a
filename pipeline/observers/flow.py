"""How much moves: optical flow between samples, as a fraction of the short side.

Emu3 (arXiv 2409.18869, §2.1) scores clips this way, with 2 samples a second at short side 256.
DIS flow agrees with Farneback to a few percent at two thirds of the cost of the whole pass.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np

from unimodal.pipeline.framepass import Want, pairs_within
from unimodal.pipeline.settings import Settings


class FlowSettings(Settings):
    """The motion score."""

    fps: float = 2.0
    """Samples per second that are compared with their neighbors."""
    short_side: int = 256
    """Pixels at which flow is computed; the score is divided by it and has no unit."""


SMALLEST = 32
"""Pixels of short side below which DIS has no pyramid to work on: such clips have no score."""


class Flow:
    """Observer that measures motion between consecutive samples."""

    def __init__(self, settings: FlowSettings) -> None:
        import cv2

        self.fps = settings.fps
        self.wants: tuple[Want, ...] = (Want("gray", short_side=settings.short_side),)
        self._dis = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_ULTRAFAST)
        self._previous: tuple[int, np.ndarray] | None = None
        self._from, self._to, self._scores = array("q"), array("q"), array("d")

    def see(self, index: int, pts: int, seconds: float, images: Sequence[np.ndarray]) -> None:
        """Compare a gray sample, uint8 [H, W], with the one before."""
        gray = np.ascontiguousarray(images[0])
        if min(gray.shape) >= SMALLEST and self._previous is not None:
            before, earlier = self._previous
            if earlier.shape == gray.shape:
                self._from.append(before)
                self._to.append(pts)
                self._scores.append(flow_score(earlier, gray, self._dis))
        self._previous = (pts, gray)

    def columns(self, start_pts: int, end_pts: int) -> dict[str, float | None]:
        """Mean, median and 90th percentile over the pairs that lie within the span.

        A pair across a cut lies in no span, so a cut never counts as motion.
        """
        scores = self._scores[pairs_within(self._from, self._to, start_pts, end_pts)]
        if not scores:
            return {"flow_mean": None, "flow_median": None, "flow_p90": None}
        return {
            "flow_mean": float(np.mean(scores)),
            "flow_median": float(np.median(scores)),
            "flow_p90": float(np.percentile(scores, 90)),
        }


def flow_score(previous: np.ndarray, current: np.ndarray, dis: Any) -> float:
    """Mean flow magnitude between two gray frames, uint8 [H, W], divided by the short side."""
    flow = dis.calc(previous, current, None)  # float32 [H, W, 2], pixels
    return float(np.hypot(flow[..., 0], flow[..., 1]).mean() / min(previous.shape))
