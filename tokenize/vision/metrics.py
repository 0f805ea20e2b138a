"""How close a reconstruction is: PSNR, SSIM, gradient energy; and how the codebook is used."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def planes(pixels: np.ndarray) -> Tensor:
    """uint8 [H,W,3] or [B,H,W,3] -> float32 [B,3,H,W] in [0,255], as the figures here take it."""
    frames = pixels if pixels.ndim == 4 else pixels[None]
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(frames, -1, 1))).float()


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of pictures [B,3,H,W] in [0,255], one value a picture."""
    error = (a.double() - b.double()).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(255.0**2 / error.clamp_min(1e-10))


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of pictures [B,3,H,W] in [0,255], mean over channels, one a picture.

    Wang et al. 2004: Gaussian window of 11, sigma 1.5, K1 0.01, K2 0.03, without padding.
    """
    grid = torch.arange(11, dtype=torch.float64) - 5
    line = torch.exp(-(grid**2) / (2 * 1.5**2))
    line = (line / line.sum()).expand(a.shape[1], 1, 11)

    def blur(x: Tensor) -> Tensor:
        rows = F.conv2d(x, line[..., None], groups=x.shape[1])
        return F.conv2d(rows, line[..., None, :], groups=x.shape[1])

    a, b = a.double(), b.double()
    mu_a, mu_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mu_a**2, blur(b * b) - mu_b**2
    cov = blur(a * b) - mu_a * mu_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    value = ((2 * mu_a * mu_b + c1) * (2 * cov + c2)) / (
        (mu_a**2 + mu_b**2 + c1) * (var_a + var_b + c2)
    )
    return value.mean(dim=(1, 2, 3))


def gradient_energy(x: Tensor) -> Tensor:
    """Mean squared difference of neighbouring pixels of [B,3,H,W], both directions, one a picture.

    A blurred copy has less of it than its source, noise has more: the ratio to the source tells
    sharpness, which PSNR does not.
    """
    x = x.double()
    across = (x[..., :, 1:] - x[..., :, :-1]).square().mean(dim=(1, 2, 3))
    down = (x[..., 1:, :] - x[..., :-1, :]).square().mean(dim=(1, 2, 3))
    return across + down


def codebook_usage(codes: Tensor, size: int) -> tuple[float, float]:
    """Share of the codebook's `size` entries that occur in `codes`, and their perplexity."""
    counts = torch.bincount(codes.flatten().cpu(), minlength=size).double()
    p = counts / counts.sum().clamp_min(1)
    entropy = -(p * torch.log(p.clamp_min(1e-12))).sum()
    return float((counts > 0).double().mean()), float(torch.exp(entropy))
