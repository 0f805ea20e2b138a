"""How one id is chosen from logits, and where the chance in it comes from."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from unimodal.pipeline.errors import UsageError


@dataclass(frozen=True)
class Choice:
    """How one id is chosen from logits."""

    temperature: float | None = 1.0
    """None: the most likely id, always."""
    top_k: int = 2048
    top_p: float = 1.0
    plausible: float = 0.0
    """Columns with less than this share of the likeliest one's probability, before guidance, are
    out. Guidance extrapolates: where both rows are sure, it multiplies the noise in the logits of
    what neither means. Of 100 prompts that a small model knew by heart, guidance 3 drew 9 right
    without and 100 with 0.1 (contrastive decoding has the same rule: arXiv 2210.15097, §3.3)."""

    def __post_init__(self) -> None:
        if self.temperature is not None and not 0 < self.temperature < math.inf:
            raise UsageError(f"temperature {self.temperature} must be positive (1 is neutral)")
        if self.top_k < 1:
            raise UsageError(f"top-k {self.top_k} must be at least 1")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top-p {self.top_p} must be above 0 and at most 1")
        if not 0 <= self.plausible < 1:
            raise UsageError(f"plausible {self.plausible} must be at least 0 and below 1")

    def guide(self, rows: Sequence[Tensor], scales: Sequence[Tensor]) -> Tensor:
        """Guided logits float32 [P, V] from those of the rows of each sequence, [P, V] each.

        Two rows, conditional c and unconditional u, and one scale s [P, 1]: u + s (c - u). Three
        rows, c, i without the instruction and u with neither, and two scales a and b:
        u + a (i - u) + b (c - i) (InstructPix2Pix, arXiv 2211.09800, §3.2.1). On raw logits: the
        normalisers that log-softmax would subtract are one number per row and cancel.
        """
        logits = rows[-1]
        for place, scale in enumerate(scales):
            logits = logits + scale * (rows[-2 - place] - rows[-1 - place])
        if not self.plausible:
            return logits
        least = rows[0].max(-1, keepdim=True).values + math.log(self.plausible)
        return logits.masked_fill(rows[0] < least, -math.inf)

    def pick(self, logits: Tensor, noise: Callable[[Tensor], Tensor]) -> Tensor:
        """Column index int64 [P] from float32 logits [P, V].

        Temperature, then top-k, then top-p, then a draw: the smallest of exponential noise over
        probability falls on each column with just its probability (the Gumbel-max trick), so
        that a draw needs no more than noise, which is asked for by columns int64 [V] or [P, k].
        """
        if self.temperature is None or self.top_k == 1 or logits.shape[-1] == 1:
            return logits.argmax(-1)
        if self.temperature != 1:
            logits = logits / self.temperature
        if self.top_k >= logits.shape[-1] and self.top_p == 1:
            columns = torch.arange(logits.shape[-1], device=logits.device)
            return (logits - noise(columns).log()).argmax(-1)
        k = min(self.top_k, logits.shape[-1])
        kept, columns = candidates(logits, k)
        if self.top_p < 1:
            kept, among = kept.topk(k, dim=-1)
            columns = columns.gather(-1, among)
            p = kept.softmax(-1)
            kept = kept.masked_fill((p.cumsum(-1) - p) >= self.top_p, -math.inf)  # enough before
        score = kept - noise(columns).log()
        while True:
            best = score.argmax(-1, keepdim=True)
            if kept.shape[-1] == k:
                return columns.gather(-1, best)[:, 0]
            low = (kept > kept.gather(-1, best)).sum(-1) >= k  # a candidate, but none of the k
            if not low.any():
                return columns.gather(-1, best)[:, 0]
            score[low, best[low, 0]] = -math.inf


def candidates(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row of [P, V] and perhaps some more, and their columns int64, [P, C]
    each; rows that have fewer of these than others are filled up with -inf.

    On a CPU a bound from every eighth column leaves few in question, and which of them are among
    the k matters of the one drawn alone: a draw for 8 rows of 32,768 and k of 2,048 took 1.8 ms so,
    2.3 with the `topk` of what the bound leaves. A bound that is too high or of no use is seen.
    """
    v = logits.shape[-1]
    if logits.device.type != "cpu" or v < 8 * k:
        return logits.topk(k, dim=-1, sorted=False)
    share = -(-k // 8)
    # Four standard deviations more than a random eighth of the columns would have of them.
    sure = min(share + 4 * math.isqrt(share) + 1, v // 8)
    least = logits[:, ::8].topk(sure, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    within = logits.numpy() >= least.numpy()  # eight times as fast as torch's comparison
    counts = within.sum(-1)
    if counts.min() < k or counts.max() > v // 2:
        return logits.topk(k, dim=-1, sorted=False)
    inside = np.arange(counts.max()) < counts[:, None]
    places = np.zeros(inside.shape, np.int64)
    places[inside] = np.flatnonzero(within) % v
    columns = torch.from_numpy(places)
    values = logits.gather(-1, columns)
    return values.masked_fill_(torch.from_numpy(~inside), -math.inf), columns


class Noise:
    """Exponential noise that is a pure function of (seed, sequence, step, id).

    No stream is consumed, so a sequence is drawn alike whatever else is in the batch, on whatever
    device, and by whichever program computes its logits; and noise is made only for the ids that
    are still in question. The bits are two rounds of a 32-bit integer hash (Wellons's
    `lowbias32`, nullprogram.com/blog/2018/07/31), keyed by SHA-256 of seed and sequence.
    """

    def __init__(
        self,
        seed: int | Sequence[int],
        keys: Sequence[tuple[int, ...]],
        device: torch.device | str = "cpu",
    ) -> None:
        """`keys` of the P sequences: prompt, sample, and what else tells them apart. `seed` is one
        for all, or one for each."""
        seeds = [seed] * len(keys) if isinstance(seed, int) else seed
        words = []
        for own, key in zip(seeds, keys, strict=True):
            digest = hashlib.sha256("/".join(map(str, (own, *key))).encode()).digest()
            words.append(np.frombuffer(digest[:8], "<i4").astype(np.int32))
        self.keys = torch.from_numpy(np.stack(words)).to(device)  # int32 [P, 2]

    def exponential(
        self, steps: Tensor | int, ids: Tensor, rows: Sequence[int] | Tensor | None = None
    ) -> Tensor:
        """float32 [P, K] for ids int64 [K] or [P, K] at the `steps`-th choice (an int, or int64
        [P]), of all sequences or of `rows` alone."""
        keys = self.keys if rows is None else self.keys[rows]
        if isinstance(steps, Tensor):
            steps = steps.to(keys.device, torch.int32)[..., None]
        salt = _hash(keys + steps)  # [P, 2]
        bits = _hash(_hash(ids.to(torch.int32) ^ salt[:, :1]) + salt[:, 1:])
        # (bits + 1/2) / 2^32 of the bits as unsigned; float32 keeps small values, the likeliest
        # winners, to a relative 2^-24.
        uniform = bits.to(torch.float32) * 2.0**-32 + 2.0**-33
        uniform = torch.where(uniform < 0, uniform + 1, uniform)
        return -torch.log1p(-uniform)


def _hash(x: Tensor) -> Tensor:
    """A bijection of int32 that has each bit of the result depend on each bit of `x`."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    x = (x ^ ((x >> 15) & 0x1FFFF)) * -2073254261  # 0x846CA68B
    return x ^ ((x >> 16) & 0xFFFF)
