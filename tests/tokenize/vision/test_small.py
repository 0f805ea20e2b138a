"""The shipped tokenizers on pictures they were not trained on; the lists are the benchmark's."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import small_tokenizer as benchmark
from unimodal.tokenize.vision.tokenizer import SHIPPED, VisionTokenizer


@pytest.fixture(scope="module")
def small() -> VisionTokenizer:
    return VisionTokenizer.load("small")


@pytest.fixture(scope="module")
def more_codes() -> VisionTokenizer:
    return VisionTokenizer.load("small-16k")


@pytest.mark.parametrize("name", SHIPPED)
def test_the_weights_stay_small(name: str) -> None:
    assert (SHIPPED[name] / "model.safetensors").stat().st_size <= 20 * 2**20


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


def test_more_codes_are_two_and_a_half_decibels_above_a_blurred_copy(
    small: VisionTokenizer, more_codes: VisionTokenizer
) -> None:
    assert more_codes.codebook_size == 4 * small.codebook_size
    found = benchmark.photographs(more_codes)
    assert np.mean([one.psnr - one.blurred for one in found]) >= 2.5
    # It trades sharpness for closeness: less energy than the other keeps, and never noise.
    assert 0.4 <= np.mean([one.energy for one in found]) <= 1.0


@pytest.mark.slow
def test_more_codes_do_for_emoji_and_video_too(more_codes: VisionTokenizer) -> None:
    assert np.mean([one.psnr for one in benchmark.emoji(more_codes)]) >= 24.0
    assert np.mean([one.psnr for one in benchmark.videos(more_codes)]) >= 25.0
