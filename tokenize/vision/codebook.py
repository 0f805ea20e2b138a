"""A codebook in training: where it starts, how it follows the latents, how dead entries revive."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from unimodal.tokenize.vision.movq import MoVQ
from unimodal.tokenize.vision.ranks import Ranks
from unimodal.tokenize.vision.recipe import CodebookSettings

LLOYD_ROUNDS = 8


class MovingCodebook:
    """Counts how the entries are used, and moves those of an `ema` codebook.

    An entry is the moving average of the latents that chose it (van den Oord et al. 2017, appendix
    A.1). `even` is how often a step would use each entry if all were used alike.
    """

    def __init__(self, model: MoVQ, settings: CodebookSettings, even: float, ranks: Ranks) -> None:
        self.quantize = model.quantize
        self.weight = model.quantize.embedding.weight
        self.moving = settings.kind == "ema"
        self.weight.requires_grad_(not self.moving)
        self.settings, self.even, self.ranks = settings, even, ranks
        self.recent = torch.zeros_like(self.weight)  # latents of the last batch, for revival
        self.adopt()

    def adopt(self) -> None:
        """Begin from the entries as they are, each as if used evenly so far."""
        self.count = torch.full_like(self.weight[:, 0], self.even, requires_grad=False)
        self.total = self.weight.detach() * self.even

    @torch.no_grad()
    def start(self, rows: Tensor) -> None:
        """Begin from the k-means centres of latents [N, C]: some rounds of Lloyd.

        Of equal latents (plain backgrounds) all but one entry stay empty; between two rounds
        they move onto latents drawn by their squared distance, as k-means++ draws.
        """
        size, generator = len(self.weight), torch.Generator().manual_seed(0)
        pick = torch.randperm(len(rows), generator=generator)
        self.weight.copy_(rows[pick[torch.arange(size) % len(rows)].to(rows.device)])
        for left in reversed(range(LLOYD_ROUNDS)):
            nearest = self.quantize(rows.T[None, :, :, None, None]).flatten()
            count = torch.bincount(nearest, minlength=size).unsqueeze(1)
            total = torch.zeros_like(self.total).index_add_(0, nearest, rows)
            far = (rows - self.weight[nearest]).square().sum(1).cpu()
            self.weight.copy_(torch.where(count > 0, total / count.clamp_min(1), self.weight))
            empty = (count[:, 0] == 0).nonzero().flatten()[: int((far > 0).sum())]
            if left and len(empty):
                chosen = torch.multinomial(far, len(empty), generator=generator)
                self.weight[empty] = rows[chosen.to(rows.device)]
        self.adopt()

    @torch.no_grad()
    def update(self, z: Tensor, codes: Tensor) -> None:
        """Count the entries that latents z [B,C,t,h,w] chose, and move them there."""
        rows, flat = z.movedim(1, -1).flatten(0, -2), codes.flatten()
        count = torch.bincount(flat, minlength=len(self.weight)).to(rows.dtype)
        rate = 1 - self.settings.decay
        self.count.lerp_(self.ranks.sum(count), rate)
        self.recent = rows
        if self.moving:
            total = torch.zeros_like(self.total).index_add_(0, flat, rows)
            self.total.lerp_(self.ranks.sum(total), rate)
            alive = (self.count > 1e-3 * self.even).unsqueeze(1)
            moved = self.total / self.count.clamp_min(1e-12).unsqueeze(1)
            self.weight.copy_(torch.where(alive, moved, self.weight))

    @torch.no_grad()
    def revive(self, rng: np.random.Generator) -> Tensor:
        """Put entries that are hardly used onto latents of the last batch; returns which."""
        dead = (self.count < self.settings.dead * self.even).nonzero().flatten()
        recent = self.ranks.gather(self.recent)
        pick = torch.from_numpy(rng.integers(len(recent), size=len(dead)))
        chosen = recent[pick.to(recent.device)]
        # Enough to live through some rounds, and little enough to move at once when it is chosen.
        count = min(1.0, 5 * self.settings.dead) * self.even
        self.weight[dead] = chosen
        self.count[dead] = count
        self.total[dead] = chosen * count
        return dead
