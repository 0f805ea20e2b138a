"""Measures of light on pictures whose values are known."""

from __future__ import annotations

import numpy as np
import pytest

from unimodal.pipeline.observers.light import (
    Flicker,
    Light,
    LightSettings,
    colorfulness,
    content_box,
)


def _flicker(levels: list[int]) -> Flicker:
    flicker = Flicker(LightSettings())
    for i, level in enumerate(levels):
        flicker.see(i, i, i / 25, [np.full((4, 4, 3), level, np.uint8)])
    return flicker


def test_brightness_black_frames_and_flashes() -> None:
    columns = _flicker([100] * 6 + [0, 0] + [200] * 2).columns(0, 10)
    assert columns["luma_mean"] == pytest.approx(100, abs=1e-3)
    assert columns["black_ratio"] == pytest.approx(0.2)
    assert columns["flash_ratio"] == pytest.approx(2 / 9)
    # Inside one span only: the jump between 5 and 6 belongs to neither half.
    assert _flicker([100] * 6 + [0] * 6).columns(0, 6)["flash_ratio"] == 0


def _light(grays: list[np.ndarray]) -> Light:
    light = Light(LightSettings())
    for i, gray in enumerate(grays):
        light.see(i, i, i / 2, [gray, np.repeat(gray[..., None], 3, axis=2)])
    return light


def test_a_picture_that_stands_still_is_frozen_and_one_that_moves_is_not() -> None:
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 256, (64, 64), dtype=np.uint8) for _ in range(3)]
    light = _light([noise[0], noise[0], noise[0], noise[1], noise[2]])
    assert light.columns(0, 5)["freeze_ratio"] == 0.5
    assert light.columns(2, 5)["freeze_ratio"] == 0.0
    assert light.columns(4, 5)["freeze_ratio"] is None


def test_blur_lowers_the_blur_score_and_gray_has_no_color() -> None:
    import cv2

    rng = np.random.default_rng(0)
    sharp = rng.integers(0, 256, (64, 64), dtype=np.uint8)
    soft = cv2.GaussianBlur(sharp, (0, 0), 2)
    first, second = _light([sharp]).columns(0, 1), _light([soft]).columns(0, 1)
    assert (first["blur"] or 0) > 20 * (second["blur"] or 0) > 0
    assert first["colorfulness"] == 0
    rainbow = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert colorfulness(rainbow) > 50


def test_bars_that_stay_black_are_cropped_and_nothing_else() -> None:
    scene = np.full((100, 200), 90, np.uint8)
    scene[:12], scene[-12:] = 0, 3
    dark_moment = scene.copy()
    dark_moment[12:50] = 0  # half the picture is dark for once: no bar
    crop = _light([scene, dark_moment]).crop(0, 2, 1280, 640)
    assert (crop["crop_x0"], crop["crop_x1"]) == (0, 1280)
    # 12 of 100 rows are 76.8 of 640; a sample more, so that no line of the bar is left.
    assert 77 <= crop["crop_y0"] <= 84 and 640 - 84 <= crop["crop_y1"] <= 640 - 77
    plain = _light([np.full((100, 200), 90, np.uint8)]).crop(0, 1, 640, 320)
    assert plain == {"crop_x0": 0, "crop_y0": 0, "crop_x1": 640, "crop_y1": 320}
    black = _light([np.zeros((100, 200), np.uint8)]).crop(0, 1, 640, 320)
    assert black == plain
    assert content_box(np.zeros((4, 4), np.uint8), 24) is None
