"""Rows that are continued step by step out of a static cache.

Legend: R rows, K new ids per row, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unimodal.model.attention import Cache, Cached
from unimodal.model.decoder import Decoder

SLACK = 16
"""Positions behind a row's end that a longer row's ids may spill into, see `Cached`."""


class Decoding:
    """Rows being continued: the cache, and how far each row has come."""

    def __init__(self, decoder: Decoder, rows: int, length: int) -> None:
        """For `rows` sequences of at most `length` ids."""
        self.decoder = decoder
        self.cache: Cache = decoder.cache(rows, length + SLACK)
        self.device = decoder.lm_head.weight.device
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=self.device)

    def prefill(self, contexts: Sequence[Sequence[int]]) -> Tensor:
        """Begin each row with its context; hidden states [R, D] behind it."""
        counts = torch.tensor([len(one) for one in contexts], device=self.device)
        ids = torch.zeros(len(contexts), int(counts.max()), dtype=torch.int64)
        for row, context in enumerate(contexts):
            ids[row, : len(context)] = torch.tensor(context)
        return self.feed(ids.to(self.device), counts)

    def feed(self, ids: Tensor, counts: Tensor | None = None) -> Tensor:
        """Append ids [R, K] to the rows; hidden states [R, D] behind each row's last one.

        Of row r only the first `counts[r]` ids count, all by default. A row with none stays as it
        was, and its hidden state is nobody's.
        """
        rows, new = ids.shape
        step = Cached(self.cache, self.lengths, new)
        hidden = self.decoder.hidden(ids.flatten(), step.positions.flatten(), step)
        hidden = hidden.view(rows, new, -1)
        if counts is None:
            self.lengths = self.lengths + new
            return hidden[:, -1]
        self.lengths = self.lengths + counts
        return hidden[torch.arange(rows, device=self.device), (counts - 1).clamp(min=0)]

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only."""
        chosen = torch.tensor(rows, device=self.device)
        self.cache = self.cache.select(chosen)
        self.lengths = self.lengths[chosen]
