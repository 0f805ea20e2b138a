"""How good a tokenizer in training is, on material that it never sees."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unimodal.tokenize.vision import metrics
from unimodal.tokenize.vision.bank import Bank
from unimodal.tokenize.vision.movq import MoVQ
from unimodal.tokenize.vision.perceptual import LPIPS
from unimodal.tokenize.vision.pixels import to_pixels, to_uint8

PICTURES, CLIPS, SIDE = 24, 8, 256  # measured at most; pictures are centre squares of this side


@torch.no_grad()
def evaluate(
    model: MoVQ, data: Bank, device: str, lpips: LPIPS | None = None
) -> tuple[dict[str, float], np.ndarray | None]:
    """Means over held-out pictures and clips, and a sheet uint8 [H,W,3] of reconstructions.

    PSNR (dB), SSIM, kept gradient energy, codebook use and perplexity, LPIPS where it is given; of
    clips, PSNR and use. Empty and None if nothing is held out. Leaves `model` in eval mode.
    Material with a side too small for SSIM's window, or for two codes, is left out.
    """
    model.eval()
    factor = model.cfg.spatial_factor
    least = max(2 * factor, 11)
    pictures = [p for p in data.held_pictures if min(p.shape[:2]) >= least]
    clips = [c for c in data.held_clips if min(c.shape[1:3]) >= least]
    pairs: list[tuple[np.ndarray, np.ndarray]] = []
    found: dict[str, list[float]] = {}
    codes: list[Tensor] = []
    for picture in pictures[:PICTURES]:
        original = _square(picture, factor)
        codes.append(model.encode(to_pixels(original)[None, None].to(device)))
        painted = to_uint8(model.decode(codes[-1], image=True)[0, 0])
        a, b = metrics.planes(original), metrics.planes(painted)
        energy = metrics.gradient_energy(b) / metrics.gradient_energy(a).clamp_min(1e-6)
        values = {"psnr": metrics.psnr(a, b), "ssim": metrics.ssim(a, b), "energy": energy}
        if lpips is not None and min(original.shape[:2]) >= 16:
            values["lpips"] = lpips(*(to_pixels(p)[None].to(device) for p in (original, painted)))
        for name, each in values.items():
            found.setdefault(f"val_{name}", []).append(each.item())
        pairs.append((original, painted))
    used = {"val": codes}
    for clip in clips[:CLIPS]:
        height, width = (side // factor * factor for side in clip.shape[1:3])
        original = clip[:, :height, :width]
        code = model.encode(to_pixels(original)[None].to(device))
        painted = to_uint8(model.decode(code)[0])
        value = metrics.psnr(metrics.planes(original), metrics.planes(painted)).mean().item()
        found.setdefault("val_video_psnr", []).append(value)
        used.setdefault("val_video", []).append(code)
        pairs.append((original[-1], painted[-1]))
    measured = {name: float(np.mean(values)) for name, values in found.items()}
    for name, grids in used.items():
        if grids:
            flat = torch.cat([grid.flatten() for grid in grids])
            share, perplexity = metrics.codebook_usage(flat, model.cfg.codebook_size)
            measured |= {f"{name}_usage": share, f"{name}_perplexity": perplexity}
    return measured, _sheet(pairs) if pairs else None


def _square(picture: np.ndarray, factor: int) -> np.ndarray:
    side = min(picture.shape[:2])
    top, left = (picture.shape[0] - side) // 2, (picture.shape[1] - side) // 2
    cut = Image.fromarray(picture[top : top + side, left : left + side])
    size = min(SIDE, side) // factor * factor
    return np.asarray(cut.resize((size, size), Image.Resampling.BICUBIC))


def _sheet(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Original and reconstruction, side by side, six pairs to a row of 128-pixel cells."""
    cell = 128
    sheet = Image.new("RGB", (12 * cell, math.ceil(len(pairs) / 6) * cell), "white")
    for i, pair in enumerate(pairs):
        for j, pixels in enumerate(pair):
            image = Image.fromarray(pixels)
            image.thumbnail((cell, cell))
            sheet.paste(image, (((i % 6) * 2 + j) * cell, i // 6 * cell))
    return np.asarray(sheet)
