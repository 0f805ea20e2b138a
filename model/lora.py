"""LoRA: small matrices beside frozen ones (Hu et al. 2021, arXiv 2106.09685).

y = W x + (alpha / rank) B A x, with A [rank, inputs] random, B [outputs, rank] zero at the start:
training begins as the decoder is. Only A and B have gradients and moments.
"""

from __future__ import annotations

import hashlib
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from unimodal.model.decoder import Decoder, Linear
from unimodal.pipeline.settings import Settings

Target = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class LoraSettings(Settings):
    """Adapters instead of all weights."""

    rank: int = Field(default=0, ge=0)
    """Rows of A and columns of B; 0 trains all weights."""
    alpha: float = Field(default=16.0, gt=0)
    """The adapters' part is scaled by alpha / rank."""
    targets: tuple[Target, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    """Projections of every block that get adapters."""


class Adapted(Linear):
    """A projection whose weight is frozen, and its adapter."""

    def __init__(self, base: Linear, rank: int, scale: float, generator: torch.Generator) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.scale = base.weight, scale
        self.register_parameter("bias", None)
        a = torch.empty(rank, base.in_features).normal_(0, 1 / rank, generator=generator)
        self.lora_a = nn.Parameter(a.to(base.weight))
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, rank).to(base.weight))

    def forward(self, x: Tensor) -> Tensor:
        low = F.linear(x, self.lora_a.to(x.dtype))  # [T, rank]
        return super().forward(x) + self.scale * F.linear(low, self.lora_b.to(x.dtype))

    def merged(self) -> Tensor:
        """W + scale B A, [outputs, inputs]."""
        return self.weight + self.scale * (self.lora_b @ self.lora_a)


def adapt(decoder: Decoder, settings: LoraSettings, seed: int) -> None:
    """Freeze the decoder and put adapters beside its targets; nothing for rank 0."""
    if not settings.rank:
        return
    decoder.requires_grad_(False)
    for name, module in list(decoder.named_modules()):
        path, _, last = name.rpartition(".")
        if last in settings.targets and isinstance(module, Linear):
            key = hashlib.sha256(f"{seed}:{name}.lora_a".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)
            scale = settings.alpha / settings.rank
            adapted = Adapted(module, settings.rank, scale, generator)
            setattr(decoder.get_submodule(path), last, adapted)


def is_adapted(decoder: Decoder) -> bool:
    """Whether `adapt` has been here."""
    return any(isinstance(module, Adapted) for module in decoder.modules())


@torch.no_grad()
def merged(decoder: Decoder) -> dict[str, Tensor]:
    """The state of an ordinary decoder that computes the same."""
    state = {n: t for n, t in decoder.state_dict().items() if ".lora_" not in n}
    for name, module in decoder.named_modules():
        if isinstance(module, Adapted):
            state[f"{name}.weight"] = module.merged()
    return state
