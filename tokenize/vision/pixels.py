"""Pictures as the tokenizer sees them: sizes, resizing, and uint8 to [-1, 1] and back.

EMU3.md: RGB, resized with PIL's bicubic filter on uint8 (a tensor resize differs in the last bit,
and a bit can be another code), scaled to [-1, 1]; back to uint8 by truncation, as released.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from unimodal.pipeline.errors import MediaError

if TYPE_CHECKING:
    from torch import Tensor

MAX_ASPECT = 5.0  # long side over short side, as in the released image processor


def smart_size(
    height: int,
    width: int,
    min_pixels: int,
    max_pixels: int,
    factor: int = 8,
    max_aspect: float = MAX_ASPECT,
) -> tuple[int, int]:
    """(height, width), multiples of `factor`, near the given size and within the pixel bounds.

    The rule of the released image processor: round each side (halves to even), then, outside the
    bounds, scale both by the same root and round towards the bound. Raises `MediaError` for a side
    under `factor` or an aspect ratio over `max_aspect`, as the original does.
    """
    if min(height, width) < factor:
        raise MediaError(f"{width}x{height} is under {factor} pixels on one side")
    if max(height, width) / min(height, width) > max_aspect:
        raise MediaError(f"{width}x{height} is more than {max_aspect:g} times as long as wide")
    rows = max(factor, round(height / factor) * factor)
    columns = max(factor, round(width / factor) * factor)
    if rows * columns > max_pixels:
        beta = (height * width / max_pixels) ** 0.5
        rows = max(factor, int(height / beta // factor) * factor)
        columns = max(factor, int(width / beta // factor) * factor)
    elif rows * columns < min_pixels:
        beta = (min_pixels / (height * width)) ** 0.5
        rows = int(-(-height * beta // factor)) * factor
        columns = int(-(-width * beta // factor)) * factor
    return rows, columns


def area_size(height: int, width: int, area: int, factor: int = 8) -> tuple[int, int]:
    """(height, width), multiples of `factor`, of about `area` pixels with the aspect ratio kept."""
    scale = (area / (height * width)) ** 0.5
    rows = max(factor, round(height * scale / factor) * factor)
    columns = max(factor, round(width * scale / factor) * factor)
    return rows, columns


def resize(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 [H,W,3] to (height, width) with PIL's bicubic filter."""
    if pixels.shape[:2] == size:
        return pixels
    image = Image.fromarray(pixels).resize((size[1], size[0]), Image.Resampling.BICUBIC)
    return np.asarray(image)


def to_pixels(pixels: np.ndarray) -> Tensor:
    """uint8 [..., H, W, 3] -> float32 [..., 3, H, W] in [-1, 1], contiguous."""
    import torch

    channels_first = np.ascontiguousarray(np.moveaxis(pixels, -1, -3))
    return torch.from_numpy(channels_first).float().div_(255).sub_(0.5).div_(0.5)


def to_uint8(pixels: Tensor) -> np.ndarray:
    """float [..., 3, H, W] in [-1, 1] -> uint8 [..., H, W, 3], clipped and truncated."""
    import torch

    scaled = (pixels.float() * 0.5 + 0.5).mul(255).clamp(0, 255).to(torch.uint8)
    return np.moveaxis(scaled.cpu().numpy(), -3, -1)
