"""Several processes that train one network, as `torchrun` starts them; or one, which needs nothing.

Each rank works on its part of every batch. Gradients are averaged and statistics summed before they
are used, so that all ranks hold the same weights and codebook, and the result does not depend on
how many there are (but for the order of sums).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

BUCKET = 1 << 24  # values that are averaged in one message: 64 MiB
WAIT = timedelta(hours=2)  # for rank 0 to measure and save


@dataclass(frozen=True)
class Ranks:
    """This process and how many there are; every method is called by all of them alike."""

    rank: int = 0
    world: int = 1

    def mean(self, tensor: Tensor) -> Tensor:
        """Mean over ranks, in place."""
        return self.sum(tensor).div_(self.world) if self.world > 1 else tensor

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, rows: Tensor) -> Tensor:
        """The rows [N, ...] of all ranks, in order of rank; N is the same everywhere."""
        if self.world == 1:
            return rows
        parts = [torch.empty_like(rows) for _ in range(self.world)]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    def share(self, module: nn.Module) -> None:
        """Give every rank the weights of rank 0."""
        for tensor in module.state_dict().values() if self.world > 1 else ():
            dist.broadcast(tensor, 0)

    def mean_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Average the gradients over ranks, in place."""
        if self.world == 1:
            return
        bucket: list[Tensor] = []
        grads = [p.grad for p in parameters if p.grad is not None]
        for i, grad in enumerate(grads):
            bucket.append(grad)
            if sum(g.numel() for g in bucket) >= BUCKET or i == len(grads) - 1:
                flat = self.mean(torch.cat([g.flatten() for g in bucket]))
                for g, part in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                    g.copy_(part.view_as(g))
                bucket = []


@contextmanager
def joined(device: str) -> Iterator[tuple[Ranks, str]]:
    """This process's rank (of `torchrun`'s environment), and the device that it computes on."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Ranks(), device
        return
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    cuda = device.startswith("cuda")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo", timeout=WAIT)
    try:
        yield Ranks(dist.get_rank(), world), device
    finally:
        dist.destroy_process_group()
