"""Causal attention that never crosses a document, for training and for decoding step by step.

Legend: T packed tokens, R rows of a batch, K new tokens per row, S cache length,
        N query heads, G key/value heads (G divides N), C channels per head.

Three objects answer the decoder's one question, "what do these queries see?":

- `Packed`: T tokens, documents laid end to end, `cu_seqlens` marks where each begins.
- `SharedPacked`: the same where several processes each hold a part of the T tokens.
- `Cached`: R rows that each continue a sequence of its own length out of a static `Cache`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cache as memoize
from itertools import accumulate, pairwise
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

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [T, N, C], k and v [T, G, C] -> [T, N, C] in the dtype of `v`."""
        return _attend(q, k, v, self.lengths, self.lengths, self.dropout)


@dataclass(frozen=True)
class Share:
    """The part of a sequence that is one of `ranks` processes' own: chunks r and 2 * ranks - 1 - r
    of 2 * ranks equal ones. A chunk from the head and one from the tail make causal work even."""

    rank: int
    ranks: int
    gather: Callable[[Tensor], Tensor]
    """[T / ranks, ...] of each process -> [T, ...] in order of rank; backward sums and splits."""

    @property
    def chunks(self) -> tuple[int, int]:
        """Numbers of the two chunks."""
        return self.rank, 2 * self.ranks - 1 - self.rank

    def take(self, x: Tensor) -> Tensor:
        """[T, ...] -> this process's [T / ranks, ...]; 2 * ranks divides T."""
        return x.unflatten(0, (2 * self.ranks, -1))[list(self.chunks)].flatten(0, 1)

    def whole(self, x: Tensor) -> Tensor:
        """[T / ranks, ...] of each process -> [T, ...] in the sequence's order."""
        parts = self.gather(x).unflatten(0, (self.ranks, 2, -1))
        return torch.cat([parts[:, 0], parts[:, 1].flip(0)]).flatten(0, 1)


class SharedPacked:
    """`Packed` whose tokens are shared out over processes: keys and values travel, queries stay.

    The tokens of a chunk see one contiguous run of keys: from the start of the chunk's first
    document to the chunk's end. So each chunk is one variable-length call, whatever the documents.
    """

    def __init__(self, lengths: Sequence[int], share: Share, dropout: float = 0.0) -> None:
        """`lengths` of the whole sequence's documents, in tokens."""
        self.share = share
        self.dropout = dropout
        marks = list(accumulate(lengths, initial=0))
        size = marks[-1] // (2 * share.ranks)
        self.parts: list[tuple[slice, list[int], list[int]]] = []
        for chunk in share.chunks:
            start, end = chunk * size, (chunk + 1) * size
            seen = [(a, min(b, end)) for a, b in pairwise(marks) if a < end and b > start]
            queries = [b - max(a, start) for a, b in seen]
            self.parts.append((slice(seen[0][0], end), queries, [b - a for a, b in seen]))

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """This process's q [T/ranks, N, C], k and v [T/ranks, G, C] -> [T/ranks, N, C]."""
        dtype = _compute(v)
        whole = self.share.whole(torch.cat([k.to(dtype), v.to(dtype)], 1))
        keys, values = (one.contiguous() for one in whole.chunk(2, 1))
        attended = [
            _attend(one, keys[seen], values[seen], queries, lengths, self.dropout)
            for one, (seen, queries, lengths) in zip(q.chunk(2), self.parts, strict=True)
        ]
        return torch.cat(attended).to(v.dtype)


def _compute(v: Tensor) -> torch.dtype:
    # The CPU's bfloat16 kernel took 53 ms where the float32 one took 14.
    return torch.float32 if v.device.type == "cpu" else v.dtype


def _attend(
    q: Tensor, k: Tensor, v: Tensor, queries: list[int], keys: list[int], dropout: float
) -> Tensor:
    """Causal attention of documents: the last `queries[i]` of `keys[i]` tokens ask.

    q [sum(queries), N, C], k and v [sum(keys), G, C] -> [sum(queries), N, C] in v's dtype.
    """
    kernel = varlen_kernel() if q.is_cuda else None
    # The varlen kernel wants half precision and has no dropout.
    if kernel is not None and v.dtype in (torch.bfloat16, torch.float16) and not dropout:
        marks = [
            torch.tensor([0, *one], device=q.device).cumsum(0).to(torch.int32)
            for one in (queries, keys)
        ]
        return kernel(
            q.to(v.dtype),
            k.to(v.dtype),
            v,
            *marks,
            max(queries),
            max(keys),
            window_size=(-1, 0),  # causal, aligned at the last query and the last key
            enable_gqa=q.shape[1] != k.shape[1],
        )
    # One kernel call per document. On the CPU this took 14 ms for 20 documents of 100 tokens
    # (forward and backward, one core); padding them to a rectangle 17 ms; a dense mask over
    # all tokens 3.6x as long.
    dtype = _compute(v)
    attended = [
        F.scaled_dot_product_attention(
            one_q.transpose(0, 1)[None],
            one_k.transpose(0, 1)[None],
            one_v.transpose(0, 1)[None],
            # `is_causal` aligns the first query with the first key: right where all of them ask.
            attn_mask=None if len(one_q) == len(one_k) else _last_causal(one_q, one_k),
            dropout_p=dropout,
            is_causal=len(one_q) == len(one_k),
            enable_gqa=q.shape[1] != k.shape[1],
        )[0].transpose(0, 1)
        for one_q, one_k, one_v in zip(
            q.to(dtype).split(queries),
            k.to(dtype).split(keys),
            v.to(dtype).split(keys),
            strict=True,
        )
    ]
    return torch.cat(attended).to(v.dtype)


def _last_causal(q: Tensor, k: Tensor) -> Tensor:
    mask = torch.ones(len(q), len(k), dtype=torch.bool, device=q.device)
    return mask.tril(len(k) - len(q))


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

    def __init__(self, cache: Cache, starts: Tensor | int, new: int) -> None:
        """`starts` int64 [R], or where all rows start; `new` is K."""
        self.cache = cache
        device, rows = cache.k.device, cache.k.shape[1]
        first = not isinstance(starts, Tensor) and starts == 0
        if not isinstance(starts, Tensor):
            starts = torch.full((rows,), starts, device=device)
        self.positions = starts[:, None] + torch.arange(new, device=device)  # [R, K]
        self.seen = new if first else int(self.positions.max()) + 1
        self.rows = torch.arange(rows, device=device)[:, None]
        self.mask: Tensor | None = None  # at the beginning plain causality
        if not first:
            keys = torch.arange(self.seen, device=device)
            self.mask = (keys <= self.positions[:, :, None])[:, None]  # [R, 1, K, seen]

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
            is_causal=self.mask is None,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return attended.transpose(1, 2).reshape(q.shape).to(v.dtype)
