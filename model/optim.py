"""What moves the decoder's weights."""

from __future__ import annotations

import torch

from unimodal.model.decoder import Decoder
from unimodal.model.recipe import OptimizerSettings


def optimizers(decoder: Decoder, settings: OptimizerSettings) -> list[torch.optim.Optimizer]:
    """Optimizers of all parameters that want gradients: AdamW, or Muon over the blocks' matrices
    and AdamW over the rest."""
    trained = [p for p in decoder.parameters() if p.requires_grad]
    blocks = {p for p in decoder.model.layers.parameters() if p.dim() > 1}
    muon = [p for p in trained if p in blocks and settings.kind == "muon"]
    rest = [p for p in trained if settings.kind == "adamw" or p not in blocks]
    groups = [
        {"params": [p for p in rest if p.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in rest if p.dim() == 1], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(
        groups,
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        fused=settings.fused,
        foreach=not settings.fused,
    )
    if not muon:
        return [adamw]
    orthogonal = torch.optim.Muon(
        muon,
        lr=settings.lr,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )
    return [adamw, orthogonal]
