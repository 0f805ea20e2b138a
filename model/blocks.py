"""How the blocks of a decoder run while it trains: what is kept for backward, and compiled or not.

The mathematics is the same in every mode, and with "full" and "selective" also the bits: dropout
masks are drawn again from the same state.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from unimodal.model.attention import Packed, SharedPacked
from unimodal.model.decoder import Block, Decoder

Recompute = Literal["none", "selective", "full"]


def prepare(decoder: Decoder, recompute: Recompute = "none", compiled: bool = False) -> None:
    """Let every block compute so while it trains; evaluation and sampling stay as they are.

    `recompute`: "full" keeps a block's input alone and computes the block again in backward;
    "selective" keeps the results of matrix products and of attention too: nearly all of the
    arithmetic, a fraction of the memory. `compiled` runs blocks through `torch.compile`.
    """
    if compiled:
        # Traced, a call would be compiled for every pack anew: it depends on its lengths.
        for kind in (Packed, SharedPacked):
            kind.attend = torch.compiler.disable(kind.attend)  # type: ignore[method-assign]
    for block in decoder.model.layers:
        assert isinstance(block, Block)
        fast: Callable[..., Any] = block.forward
        if recompute != "none":
            context: dict[str, Any] = {}
            if recompute == "selective":
                context["context_fn"] = partial(_selective, decoder)
            fast = partial(checkpoint, fast, use_reentrant=False, **context)
        if compiled:
            fast = torch.compile(fast)
        if fast is not block.forward:
            block.forward = partial(_run, block, fast, block.forward)  # type: ignore[method-assign]


def _run(block: Block, fast: Callable[..., Any], plain: Callable[..., Any], *args: Any) -> Any:
    return (fast if block.training else plain)(*args)


def _selective(decoder: Decoder) -> Any:
    kept = ["mm", "addmm", "linear"]
    if not decoder.config.shape.dropout:
        # With dropout it draws random numbers: kept, it would not draw them again, and all masks
        # behind it would be others than in the forward pass.
        kept += ["_scaled_dot_product", "_varlen_attn"]

    def policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        name = str(operation).split(".")[1:2]  # aten.mm.default
        keeps = bool(name) and name[0].startswith(tuple(kept))
        return CheckpointPolicy.MUST_SAVE if keeps else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)
