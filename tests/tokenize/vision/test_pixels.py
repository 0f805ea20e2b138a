"""Sizes and conversions of the released image processor."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from unimodal.pipeline.errors import MediaError
from unimodal.tokenize.vision.pixels import area_size, resize, smart_size, to_pixels, to_uint8


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((512, 512), (512, 512)),
        ((2000, 1000), (1448, 720)),  # over the maximum: both sides round down
        ((100, 100), (512, 512)),  # under the minimum: both sides round up
        ((516, 524), (512, 528)),  # halves round to even multiples
    ],
)
def test_smart_size_follows_the_released_rule(
    shape: tuple[int, int], expected: tuple[int, int]
) -> None:
    assert smart_size(*shape, min_pixels=262144, max_pixels=1048576) == expected


@pytest.mark.parametrize("shape", [(7, 100), (100, 600)])
def test_smart_size_refuses_slivers(shape: tuple[int, int]) -> None:
    with pytest.raises(MediaError, match=f"{shape[1]}x{shape[0]}"):
        smart_size(*shape, min_pixels=64, max_pixels=1 << 20)


def test_area_size_keeps_the_aspect_within_one_code() -> None:
    height, width = area_size(1080, 1920, 512 * 512)
    assert height % 8 == width % 8 == 0
    assert abs(height * width / 512**2 - 1) < 0.05
    assert abs(width / height / (1920 / 1080) - 1) < 0.05


def test_uint8_survives_the_round_trip_but_for_truncation() -> None:
    picture = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    back = to_uint8(to_pixels(picture))
    assert np.abs(back.astype(int) - picture).max() <= 1
    assert to_uint8(torch.tensor([[[[0.999]], [[2.0]], [[-2.0]]]])).tolist() == [[[[254, 255, 0]]]]


def test_resizing_to_the_same_size_changes_nothing() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    assert resize(picture, (16, 24)) is picture
    assert resize(picture, (8, 8)).shape == (8, 8, 3)
