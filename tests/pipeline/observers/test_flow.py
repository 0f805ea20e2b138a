"""The motion score: right in pixels, blind to cuts."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
import pytest

from unimodal.pipeline.observers.flow import Flow, FlowSettings, flow_score


@pytest.mark.parametrize("step", [0.0, 2.0, 6.0])
def test_the_score_is_the_displacement_over_the_short_side(
    moving: Callable[..., list[np.ndarray]], step: float
) -> None:
    before, after = (
        cv2.cvtColor(f, cv2.COLOR_RGB2GRAY) for f in moving(2, size=(256, 400), step=step)
    )
    dis = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_ULTRAFAST)
    # A tenth of a pixel, and 15 %: at the border, what comes in has no counterpart.
    assert flow_score(before, after, dis) * 256 == pytest.approx(step, rel=0.15, abs=0.1)


def test_pairs_across_a_cut_count_for_no_clip(moving: Callable[..., list[np.ndarray]]) -> None:
    flow = Flow(FlowSettings())
    still, other = (cv2.cvtColor(moving(1, seed=s)[0], cv2.COLOR_RGB2GRAY) for s in (1, 2))
    for i, gray in enumerate([still, still, other, other]):
        flow.see(i, i * 10, i / 2, [gray])
    assert flow.columns(0, 20)["flow_mean"] == pytest.approx(0, abs=1e-3)
    assert flow.columns(20, 40)["flow_mean"] == pytest.approx(0, abs=1e-3)
    across = flow.columns(0, 40)["flow_mean"]
    assert across is not None and across > 0.01
    assert flow.columns(0, 10)["flow_mean"] is None  # one sample is no pair


def test_pictures_too_small_for_flow_have_no_score() -> None:
    flow = Flow(FlowSettings())
    for i in range(3):
        flow.see(i, i, i / 2, [np.full((1, 7), i, np.uint8)])
    assert flow.columns(0, 3) == {"flow_mean": None, "flow_median": None, "flow_p90": None}
