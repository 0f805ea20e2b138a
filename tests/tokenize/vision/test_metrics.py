"""Metrics against scikit-image's."""

from __future__ import annotations

import numpy as np
import torch
from skimage.data import astronaut
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from unimodal.tokenize.vision import metrics


def _pair() -> tuple[np.ndarray, np.ndarray]:
    a = astronaut()[100:228, 150:300]
    noise = np.random.default_rng(0).normal(0, 12, a.shape)
    return a, np.clip(a + noise, 0, 255).astype(np.uint8)


def _tensor(a: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.moveaxis(a, -1, 0).copy())[None].float()


def test_psnr_and_ssim_are_those_of_scikit_image() -> None:
    a, b = _pair()
    assert np.isclose(metrics.psnr(_tensor(a), _tensor(b)).item(), peak_signal_noise_ratio(a, b))
    theirs = structural_similarity(
        a,
        b,
        channel_axis=2,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        win_size=11,
        full=True,
    )[1][5:-5, 5:-5].mean()
    assert abs(metrics.ssim(_tensor(a), _tensor(b)).item() - theirs) < 1e-3


def test_gradient_energy_falls_with_blur_and_rises_with_noise() -> None:
    a, noisy = _pair()
    blurred = torch.nn.functional.avg_pool2d(_tensor(a), 3, 1, 1)
    plain = metrics.gradient_energy(_tensor(a))
    assert metrics.gradient_energy(blurred) < 0.7 * plain < plain
    assert metrics.gradient_energy(_tensor(noisy)) > plain


def test_usage_and_perplexity_of_an_even_half_codebook() -> None:
    share, perplexity = metrics.codebook_usage(torch.arange(8).repeat(10), 16)
    assert share == 0.5
    assert np.isclose(perplexity, 8.0)
