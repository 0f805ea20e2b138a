"""Weighted next-token cross-entropy that never holds [tokens, vocabulary] logits.

Legend: T tokens, D width, V vocabulary.

The loss of a step is a local sum over a global weighted count: sum(weight * nll) / sum(weight),
where the denominator covers every micro-batch and every process of the step. Emu3
weighs vision targets 0.5 (arXiv 2409.18869, §2.4); how it normalises is unpublished.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

CHUNK = 256
"""Tokens whose logits exist at once."""


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Per-token losses and, in the same pass, the gradients of their weighted sum.

    torch 2.13's `F.linear_cross_entropy` with `batch_chunk_size` does the same. It is not used:
    it has no bfloat16 products under float32 weights, took 1.1 to 1.8 times the processor time
    of this loop on two cores (2,048 tokens, 4,360 ids), and torch 2.11 does not have it.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        targets: Tensor,
        weights: Tensor,
        chunk: int,
        split: tuple[Any, int] | None,
    ) -> tuple[Tensor, Tensor]:
        needs_hidden, needs_head = ctx.needs_input_grad[:2]
        matrix = head.to(hidden.dtype)
        losses = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_head = torch.zeros_like(head, dtype=torch.float32) if needs_head else None
        for start in range(0, len(targets), chunk):
            part = slice(start, start + chunk)
            logits = hidden[part] @ matrix.T  # [chunk, V], or this process's columns of it
            target = targets[part, None]
            if split is None:
                log_p = logits.log_softmax(-1, dtype=torch.float32)
                one = log_p.new_ones(target.shape)
            else:
                log_p, target, one = _split_log_softmax(logits.float(), target, *split)
            chosen = log_p.gather(1, target) * one
            losses[part] = -(chosen if split is None else _summed(chosen, split[0]))[:, 0]
            if grad_hidden is None and grad_head is None:
                continue
            grad = log_p.exp_()
            grad.scatter_add_(1, target, -one)
            grad = grad.mul_(weights[part, None]).to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = grad @ matrix
            if grad_head is not None:
                grad_head += grad.T @ hidden[part]
        if split is not None and grad_hidden is not None:
            _summed(grad_hidden, split[0])
        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.mark_non_differentiable(losses)
        return (losses * weights).sum(), losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        grad_hidden, grad_head = ctx.saved_tensors
        scale = grads[0]
        return (
            None if grad_hidden is None else grad_hidden * scale.to(grad_hidden.dtype),
            None if grad_head is None else grad_head * scale,
            None,
            None,
            None,
            None,
        )


def _split_log_softmax(
    logits: Tensor, target: Tensor, group: Any, start: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-softmax over the vocabulary of which this process has the columns from `start` on.

    Returns its columns float32 [chunk, V / processes]; the targets' places among them [chunk, 1],
    0 for those that are elsewhere; and float32 [chunk, 1] that is 1 where they are here.
    """
    import torch.distributed as dist

    top = logits.amax(-1, keepdim=True)
    dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
    logits -= top
    logits -= _summed(logits.exp().sum(-1, keepdim=True), group).log()
    local = target - start
    here = (local >= 0) & (local < logits.shape[1])
    return logits, local * here, here.float()


def _summed(tensor: Tensor, group: Any) -> Tensor:
    import torch.distributed as dist

    dist.all_reduce(tensor, group=group)
    return tensor


def weighted_cross_entropy(
    hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """Sum of weight * cross-entropy, and each token's own loss.

    `hidden` [T, D] in the compute dtype, `head` [V, D], `targets` int64 [T], `weights` float32
    [T] -> (float32 scalar that backpropagates, float32 [T] that does not). Rows of weight 0 are
    left out of the computation and report a loss of 0. At most `chunk` rows of logits exist at
    once; the result does not depend on `chunk` beyond rounding. A `head` whose rows are split over
    processes (a DTensor) stays split: only a few numbers per token travel, and the gradient of
    `hidden`, which all of those processes hold alike.
    """
    split = None
    if (mesh := getattr(head, "device_mesh", None)) is not None:
        group, rows = mesh.get_group(), -(-head.shape[0] // mesh.size())  # as torch splits them
        split, head = (group, mesh.get_local_rank() * rows), head.to_local()  # type: ignore[attr-defined]
    kept = weights.nonzero()[:, 0]
    if len(kept) == len(weights):
        total, losses = _ChunkedCrossEntropy.apply(hidden, head, targets, weights, chunk, split)
        return total, losses
    total, some = _ChunkedCrossEntropy.apply(
        hidden[kept], head, targets[kept], weights[kept], chunk, split
    )
    return total, torch.zeros_like(weights).index_copy(0, kept, some)


class LossByKind:
    """Running mean of the unweighted loss for each kind of target, such as generation/vision."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        self.sums = torch.zeros(len(names), dtype=torch.float64)
        self.counts = torch.zeros(len(names), dtype=torch.int64)

    def add(self, losses: Tensor, kinds: Tensor, weights: Tensor) -> None:
        """Add losses float32 [T] of kinds int64 [T] (index into names); weight 0 is left out."""
        on = weights > 0
        kinds, losses = kinds[on].cpu(), losses.detach()[on].double().cpu()
        self.sums.index_add_(0, kinds, losses)
        self.counts += torch.bincount(kinds, minlength=len(self.names))

    def summed(self, add: Callable[[Tensor], Tensor]) -> LossByKind:
        """The same over all processes, of which `add` sums up a tensor."""
        total = LossByKind(self.names)
        total.sums, total.counts = add(self.sums), add(self.counts)
        return total

    def means(self) -> dict[str, float]:
        """Mean loss in nats per token, of the kinds that were seen."""
        return {
            name: float(total / count)
            for name, total, count in zip(self.names, self.sums, self.counts, strict=True)
            if count
        }

    def clear(self) -> None:
        """Start over."""
        self.sums.zero_()
        self.counts.zero_()

    def state(self) -> dict[str, list[float]]:
        """Sums and counts for a checkpoint; JSON keeps them exactly."""
        return {"sums": self.sums.tolist(), "counts": self.counts.tolist()}

    def restore(self, state: dict[str, list[float]]) -> None:
        """Continue from `state`."""
        self.sums = torch.tensor(state["sums"], dtype=torch.float64)
        self.counts = torch.tensor(state["counts"], dtype=torch.int64)
