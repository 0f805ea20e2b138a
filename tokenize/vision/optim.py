"""The optimizer of a tokenizer in training, and what its weight average knows of the codebook."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from unimodal.tokenize.training import WeightAverage
from unimodal.tokenize.vision.movq import MoVQ
from unimodal.tokenize.vision.recipe import OptimizerSettings


class Optimizer:
    """AdamW for everything; or Muon for convolutions and AdamW for the rest, at one learning rate.

    Muon (Jordan 2024) makes the update of a matrix orthogonal. A convolution [out, in, ...] is the
    matrix [out, in * ...]; scaled to AdamW's usual step size, both take the same learning rate.
    """

    def __init__(self, model: nn.Module, settings: OptimizerSettings) -> None:
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        wide = {
            n: p
            for n, p in trained.items()
            if settings.kind == "muon"
            and "embedding" not in n  # a codebook is a list of points, not a map
            and p.ndim > 1
            and min(p.shape[0], p[0].numel()) >= 32
        }
        # torch's Muon takes matrices only: these share their storage with the weights.
        self.matrices = {n: (p, nn.Parameter(p.detach().view(len(p), -1))) for n, p in wide.items()}
        self.rest = {n: p for n, p in trained.items() if n not in wide}
        self.settings = settings

        def groups(weights: dict[str, nn.Parameter]) -> list[dict[str, Any]]:
            """The encoder's and the others, each with its share of the learning rate."""
            encoder = {n for n in weights if n.startswith(("encoder.", "quant_conv."))}
            shares = ((encoder, settings.encoder), (weights.keys() - encoder, 1.0))
            return [
                {"params": [p for n, p in weights.items() if n in names], "share": share}
                for names, share in shares
                if names
            ]

        self.all: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(
                groups(self.rest),
                lr=settings.lr,
                betas=(settings.beta1, settings.beta2),
                weight_decay=settings.weight_decay,
                fused=True,
            )
        ]
        if self.matrices:
            self.all.append(
                torch.optim.Muon(
                    groups({n: m for n, (_, m) in self.matrices.items()}),
                    lr=settings.lr,
                    weight_decay=settings.weight_decay,
                    adjust_lr_fn="match_rms_adamw",
                )
            )

    def parameters(self) -> list[nn.Parameter]:
        """All that is trained."""
        return [p for p, _ in self.matrices.values()] + list(self.rest.values())

    def clip(self) -> Tensor:
        """Bound the gradients; returns their norm before that."""
        params, bound = self.parameters(), self.settings.clip
        if self.settings.clip_by == "norm":
            return nn.utils.clip_grad_norm_(params, bound)
        norm = nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
        nn.utils.clip_grad_value_(params, bound)
        return norm

    def step(self, lr: float) -> None:
        """One update at learning rate `lr`; gradients are used up."""
        for weight, matrix in self.matrices.values():
            matrix.grad = None if weight.grad is None else weight.grad.reshape(matrix.shape)
            weight.grad = None
        for optimizer in self.all:
            for group in optimizer.param_groups:
                group["lr"] = lr * group["share"]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def _each(self) -> Iterator[tuple[str, torch.optim.Optimizer, Tensor]]:
        for name, parameter in self.rest.items():
            yield name, self.all[0], parameter
        for name, (_, matrix) in self.matrices.items():
            yield name, self.all[1], matrix

    def state(self) -> dict[str, Tensor]:
        """Moments by `parameter name/key`."""
        return {
            f"{name}/{key}": torch.as_tensor(value)
            for name, optimizer, parameter in self._each()
            for key, value in optimizer.state.get(parameter, {}).items()
        }

    def load(self, state: dict[str, Tensor]) -> None:
        """Take the moments that `state()` gave."""
        values: dict[str, dict[str, Tensor]] = {}
        for key, value in state.items():
            name, _, moment = key.rpartition("/")
            values.setdefault(name, {})[moment] = value
        for name, optimizer, parameter in self._each():
            if name in values:
                optimizer.state[parameter] = values[name]


@torch.no_grad()
def jump(average: WeightAverage[MoVQ], entries: Tensor) -> None:
    """Take these entries of the codebook as they are: between two places there is nothing."""
    ours, theirs = (m.quantize.embedding.weight for m in (average.model, average.source))
    ours[entries] = theirs[entries]
