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
from unimodal.model.parallel import fill
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

    def __init__(self, base: Linear, rank: int, scale: float) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.scale = base.weight, scale
        self.register_parameter("bias", None)
        self.lora_a = nn.Parameter(base.weight.new_empty(rank, base.in_features))
        self.lora_b = nn.Parameter(base.weight.new_empty(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        low = F.linear(x, self.lora_a.to(x.dtype))  # [T, rank]
        return super().forward(x) + self.scale * F.linear(low, self.lora_b.to(x.dtype))

    def merged(self) -> Tensor:
        """W + scale B A, [outputs, inputs]."""
        return self.weight + self.scale * (self.lora_b @ self.lora_a)


def adapt(decoder: Decoder, settings: LoraSettings) -> None:
    """Freeze the decoder and put adapters beside its targets, yet without values."""
    decoder.requires_grad_(False)
    for name, module in list(decoder.named_modules()):
        path, _, last = name.rpartition(".")
        if last in settings.targets and isinstance(module, Linear):
            adapted = Adapted(module, settings.rank, settings.alpha / settings.rank)
            setattr(decoder.get_submodule(path), last, adapted)


@torch.no_grad()
def start_adapters(decoder: Decoder, seed: int) -> None:
    """Give every adapter its first values: A from N(0, 1 / rank), keyed by name, and B zero."""
    for name, module in decoder.named_modules():
        if isinstance(module, Adapted):
            key = hashlib.sha256(f"{seed}:{name}.lora_a".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)
            a = torch.empty(module.lora_a.shape).normal_(
                0, 1 / len(module.lora_a), generator=generator
            )
            fill(module.lora_a, a)
            module.lora_b.zero_()


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
