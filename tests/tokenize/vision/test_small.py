"""The shipped tokenizer on pictures it was not trained on; the lists are the benchmark's."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import small_tokenizer as benchmark
from unimodal.tokenize.vision import VisionTokenizer
from unimodal.tokenize.vision.tokenizer import SHIPPED


@pytest.fixture(scope="module")
def small() -> VisionTokenizer:
    return VisionTokenizer.load("small")


def test_the_weights_stay_small() -> None:
    assert (SHIPPED["small"] / "model.safetensors").stat().st_size <= 20 * 2**20


def test_photographs_beat_a_blurred_copy_by_a_decibel_and_keep_their_sharpness(
    small: VisionTokenizer,
) -> None:
    found = benchmark.photographs(small)
    assert len(found) == 12
    assert np.mean([one.psnr - one.blurred for one in found]) >= 1.0
    # More than the source's own energy would be noise.
    assert 0.6 <= np.mean([one.energy for one in found]) <= 1.0
    assert benchmark.usage(found, small.codebook_size)[0] > 0.4


def test_held_out_emoji_reach_24_decibels(small: VisionTokenizer) -> None:
    found = benchmark.emoji(small)
    assert len(found) > 40
    assert np.mean([one.psnr for one in found]) >= 24.0


def test_real_video_comes_back(small: VisionTokenizer) -> None:
    found = benchmark.videos(small)
    assert np.mean([one.psnr for one in found]) > 20.0
