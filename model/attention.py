"""Causal attention that never crosses a document, for training and for decoding step by step.

Legend: T packed tokens, R rows of a batch, K new tokens per row, S cache length,
        N query heads, G key/value heads (G divides N), C channels per head.

Two objects answer the decoder's one question, "what do these queries see?":

- `Packed`: T tokens, documents laid end to end, `cu_seqlens` marks where each begins.
- `Cached`: R rows that each continue a sequence of its own length out of a static `Cache`.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from functools import cache as memoize
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@memoize
def varlen_kernel() -> Any | None:
    """torch's variable-length flash attention if this build has it for CUDA, else None.

    The CUDA path has not been run by the project yet (its development machines have no GPU);
    it is written from torch 2.13's documentation.
    """
    if not torch.cuda.is_available():
        return None
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


class Packed:
    """Documents laid end to end: token t sees the tokens of its own document up to itself."""

    def __init__(self, lengths: Sequence[int], dropout: float = 0.0) -> None:
        """`lengths` in tokens; `dropout` on attention probabilities, used while training only."""
        self.lengths = list(lengths)
        self.dropout = dropout

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Tensor, dropout: float = 0.0) -> Packed:
        """From cumulative lengths [documents + 1], the first 0 and the last T."""
        marks = cu_seqlens.tolist()
        return cls([end - start for start, end in pairwise(marks)], dropout)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [T, N, C], k and v [T, G, C] -> [T, N, C] in the dtype of `v`."""
        kernel = varlen_kernel() if q.is_cuda else None
        # The varlen kernel wants half precision and has no dropout.
        if kernel is not None and v.dtype in (torch.bfloat16, torch.float16) and not self.dropout:
            marks = torch.tensor([0, *self.lengths], device=q.device).cumsum(0).to(torch.int32)
            longest = max(self.lengths)
            return kernel(
                q.to(v.dtype),
                k.to(v.dtype),
                v,
                marks,
                marks,
                longest,
                longest,
                window_size=(-1, 0),
                enable_gqa=q.shape[1] != k.shape[1],
            )
        return self._per_document(q, k, v)

    def _per_document(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # One kernel call per document. On the CPU this took 14 ms for 20 documents of 100 tokens
        # (forward and backward, one core); padding them to a rectangle 17 ms; a dense mask over
        # all tokens 3.6x as long. The CPU's bfloat16 kernel took 53 ms, hence float32 there.
        dtype = torch.float32 if q.device.type == "cpu" else v.dtype
        attended = [
            F.scaled_dot_product_attention(
                one_q.transpose(0, 1)[None],
                one_k.transpose(0, 1)[None],
                one_v.transpose(0, 1)[None],
                dropout_p=self.dropout,
                is_causal=True,
                enable_gqa=q.shape[1] != k.shape[1],
            )[0].transpose(0, 1)
            for one_q, one_k, one_v in zip(
                q.to(dtype).split(self.lengths),
                k.to(dtype).split(self.lengths),
                v.to(dtype).split(self.lengths),
                strict=True,
            )
        ]
        return torch.cat(attended).to(v.dtype)


class Cache:
    """Keys and values of every layer, [layers, R, G, S, C], allocated once per generation."""

    def __init__(
        self,
        layers: int,
        rows: int,
        kv_heads: int,
        length: int,
        head_dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (layers, rows, kv_heads, length, head_dim)
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)

    def select(self, rows: Tensor) -> Cache:
        """A cache of these rows only, int64 [rows]."""
        chosen = copy(self)
        chosen.k, chosen.v = self.k[:, rows], self.v[:, rows]
        return chosen

    @property
    def length(self) -> int:
        """Positions that each row can hold."""
        return self.k.shape[3]


class Cached:
    """K new tokens for each of R rows, row r starting at position `starts[r]` of its sequence.

    Rows are of unequal length without any left padding: a row writes at its own positions. Where
    K is too long for a row (a shorter prompt, padded on the right), the surplus entries lie
    beyond the row's end: nothing looks there before later tokens have overwritten them.
    """

    def __init__(self, cache: Cache, starts: Tensor, new: int) -> None:
        """`starts` int64 [R]; `new` is K."""
        self.cache = cache
        self.positions = starts[:, None] + torch.arange(new, device=starts.device)  # [R, K]
        self.seen = int(self.positions.max()) + 1
        keys = torch.arange(self.seen, device=starts.device)
        self.mask = (keys <= self.positions[:, :, None])[:, None]  # [R, 1, K, seen]
        self.rows = torch.arange(len(starts), device=starts.device)[:, None]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store k, v [R*K, G, C], then q [R*K, N, C] -> [R*K, N, C] in the dtype of `v`."""
        r, new = self.positions.shape
        keys, values = self.cache.k[layer], self.cache.v[layer]
        keys[self.rows, :, self.positions] = k.view(r, new, *k.shape[1:]).to(keys.dtype)
        values[self.rows, :, self.positions] = v.view(r, new, *v.shape[1:]).to(values.dtype)
        attended = F.scaled_dot_product_attention(
            q.view(r, new, *q.shape[1:]).transpose(1, 2).to(keys.dtype),
            keys[:, :, : self.seen],
            values[:, :, : self.seen],
            attn_mask=self.mask,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return attended.transpose(1, 2).reshape(q.shape).to(v.dtype)
