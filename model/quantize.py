"""Smaller weights for sampling: bfloat16, or int8 with a scale for each row.

    decoder = convert(Decoder.load("ckpt"), "int8")

Weights alone: a row of a matrix becomes whole numbers of -127 to 127 and a float32 scale, by which
its largest entry is 127. Products are computed in bfloat16, norms, softmax and logits in float32
as ever. Nothing is calibrated, so it works for any weights, and takes seconds.
"""

from __future__ import annotations

from functools import cache as memoize
from itertools import chain
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unimodal.model.decoder import Decoder, Linear
from unimodal.pipeline.errors import UsageError

Weights = Literal["float32", "bfloat16", "int8"]
WEIGHTS: tuple[Weights, ...] = ("float32", "bfloat16", "int8")
FEW = 64
"""Rows up to which torch's CPU product of int8 weights is faster than making them bfloat16."""


@memoize
def multiplies_int8() -> bool:
    """Whether torch multiplies bfloat16 by int8 weights on this CPU as they are.

    32,768 x 512 by 2 rows took 1.7 ms so, against 55 ms by a converted copy and 7.1 ms in float32.
    The operator is not documented.
    """
    try:
        one = torch.ones(32, 32, dtype=torch.int8)
        x = torch.ones(1, 32, dtype=torch.bfloat16)
        found = torch._weight_int8pack_mm(x, one, torch.ones(32, dtype=torch.bfloat16))
        return torch.equal(found, torch.full((1, 32), 32, dtype=torch.bfloat16))
    except (RuntimeError, AttributeError, TypeError):
        return False


def int8_linear(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x [T, D] -> [T, outputs] in the dtype of `x`, for int8 `weight` [outputs, D] and float32
    `scale` [outputs]."""
    if x.device.type == "cpu" and x.numel() // x.shape[-1] <= FEW and multiplies_int8():
        ones = torch.ones(len(weight), dtype=torch.bfloat16)
        few = x.reshape(-1, x.shape[-1]).to(torch.bfloat16)
        found = torch._weight_int8pack_mm(few, weight, ones).view(*x.shape[:-1], -1)
    else:
        found = F.linear(x, weight.to(x.dtype))
    return (found * scale).to(x.dtype)


def quantize(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [rows, D] and float32 scales [rows] whose product is nearest to `matrix`."""
    scale = matrix.float().abs().amax(-1).clamp(min=1e-30) / 127
    return (matrix.float() / scale[:, None]).round().to(torch.int8), scale


class Int8Linear(nn.Module):
    """A projection of `unimodal.model.decoder.Linear` with int8 weights."""

    weight: Tensor
    scale: Tensor

    def __init__(self, matrix: Tensor) -> None:
        """Of weights [outputs, inputs]."""
        super().__init__()
        self.out_features, self.in_features = matrix.shape
        weight, scale = quantize(matrix)
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return int8_linear(x, self.weight, self.scale)


class Int8Embedding(nn.Module):
    """An embedding with int8 weights; float32 out."""

    weight: Tensor
    scale: Tensor

    def __init__(self, matrix: Tensor) -> None:
        """Of weights [ids, D]."""
        super().__init__()
        weight, scale = quantize(matrix)
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)

    def forward(self, ids: Tensor) -> Tensor:
        return self.weight[ids].float() * self.scale[ids][..., None]


@torch.no_grad()
def convert(decoder: Decoder, weights: str) -> Decoder:
    """The same decoder with its matrices in place as `weights` says; for sampling alone.

    Raises `UsageError` for another name than those of `WEIGHTS`.
    """
    if weights not in WEIGHTS:
        raise UsageError(f"weights {weights!r} are not one of {', '.join(WEIGHTS)}")
    if weights == "int8":
        for module in list(decoder.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, Linear):
                    setattr(module, name, Int8Linear(child.weight))
                elif isinstance(child, nn.Embedding):
                    setattr(module, name, Int8Embedding(child.weight))
    else:
        for parameter in decoder.parameters():
            if parameter.dim() > 1:
                parameter.data = parameter.data.to(getattr(torch, weights))
    decoder.compute = torch.float32 if weights == "float32" else torch.bfloat16
    return decoder


def weight_bytes(decoder: Decoder) -> int:
    """Bytes that a decoder's weights take."""
    held = chain(decoder.parameters(), decoder.buffers())
    return sum(one.numel() * one.element_size() for one in held)
