"""Groups of near-duplicates: pictures that hash alike, or whose embeddings almost coincide.

    hash    64 bits a sample. A picture is near another when their hashes differ in few bits; a
            video when two of its three samples are near two of the other's, in the same order
            (a re-encoded or slightly trimmed copy agrees in those; two shots that share a logo
            or one frame do not). Brightness and contrast must agree too: the hash sees neither.
    cosine  of embeddings, where a model was given.

Images are compared with images, videos with videos; one source's clips among themselves too.

A group is a star. Clips are gone through from the best down: a clip joins the best clip before it
that stands for itself and is near, else it stands for itself. So every member is near the best of
its group, and a slow pan does not chain its first frame to its last. The result is exactly that
of comparing all with all (embeddings: see `_Cosine`), and independent of the order of rows.

What makes it fast is that only those who stand for themselves are ever compared with: a million
copies of one picture are a million comparisons. Candidates share bands of bits, by the pigeonhole
principle; the key of a video is taken from two of its samples, so that a logo which opens fifty
thousand clips fills no bucket. The more clips there are, the longer the keys, of which there must
be more then: buckets stay small (docs/scale.md). It is sorting and counting of arrays in place,
with numpy: a join in a database would write the candidate pairs out first, and has no notion of a
star.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain, combinations, product
from math import comb, prod
from typing import Annotated

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from unimodal.pipeline.clips import DEDUP
from unimodal.pipeline.errors import UnimodalError
from unimodal.pipeline.settings import Settings

VERSION = 1

GROUPS = pa.schema([pa.field("uid", pa.string(), nullable=False), *DEDUP])
"""What dedup writes: a row per clip, sorted by uid; nulls where nothing is near."""

INFORMATIVE = 24
"""Bits that a hash must have set: half of 64 lie above their median, unless many are equal.

Flat frames and bare stripes have all but a few coefficients at zero; their hashes are alike
whatever they show, so such a sample counts neither for nor against.
"""

BLOCK = 4096
"""Clips that are compared with each other at once, at the bottom of the recursion."""

DENSE = 256
"""Near pairs that each of a block may have on average, however often they are found."""

CHUNK = 1 << 17
"""Candidate pairs in memory at a time."""

EXACT = 10_000
"""Embeddings up to which all are compared with all."""

ONE = ((2, 0), (3, 0), (4, 0))
TWO = ((1, 1), (1, 2), (2, 2))
"""Ways to find candidates, the second for pairs of hashes: so many bands of either are equal."""

PROBES = 8
"""Cells of embedding space, nearest first, that a clip is compared with."""

Near = Callable[[np.ndarray, np.ndarray], Iterator[tuple[np.ndarray, np.ndarray]]]
"""From clips and better clips, by place in the ranking, to near pairs (worse, better)."""


class DedupSettings(Settings):
    """What counts as a near-duplicate. "none" switches a measure off."""

    distance: Annotated[int, Field(ge=0, le=12)] | None = 6
    """Bits, of 64, in which the hashes of two near pictures differ at most. At 6, about nine of ten
    copies are found that are half the size, JPEG of quality 40 or cut by 1 % on each side."""
    light: Annotated[float, Field(ge=0)] | None = 12.0
    """Gray levels by which mean brightness and contrast of near clips may differ; colorfulness
    by twice as much."""
    cosine: Annotated[float, Field(gt=0, lt=1)] | None = 0.95
    """Cosine of two embeddings above which they are near, where there are embeddings."""


def group(clips: pa.Table, settings: DedupSettings, embeddings: pa.Table | None = None) -> pa.Table:
    """Groups of near-duplicates among `clips`: a table of `GROUPS`.

    `clips` has uid, kind and samples, and of the columns pixels, aesthetic, quality, duration_s,
    luma_mean, contrast and colorfulness what was measured; `embeddings` has uid and embedding.
    The best of a group, rank 0, has more pixels inside its letterbox bars, then the higher
    aesthetic score, then quality, then length, then the smaller uid; what is null comes last.
    Raises `UnimodalError` for embeddings of unequal length.
    """
    ranking = _ranking(clips)
    uids = clips.column("uid").combine_chunks().take(ranking)
    ranking = ranking.to_numpy()
    nears: list[Near] = []
    if settings.distance is not None:
        nears.append(_Hash(clips, ranking, settings.distance, settings.light).near)
    if settings.cosine is not None and embeddings is not None and embeddings.num_rows:
        nears.append(_Cosine(uids, embeddings, settings.cosine).near)

    def near(worse: np.ndarray, better: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        return chain.from_iterable(find(worse, better) for find in nears)

    best = np.arange(clips.num_rows)
    for kind in ("image", "video"):
        of_kind = pc.equal(clips.column("kind"), kind).to_numpy()[ranking]
        _stars(np.flatnonzero(of_kind), near, best)
    return _table(uids, best)


def _ranking(clips: pa.Table) -> pa.Array:
    """Rows from the best down."""
    names = clips.column_names
    pixels = pc.multiply(_int64(clips, "width"), _int64(clips, "height"))
    if {"crop_x0", "crop_y0", "crop_x1", "crop_y1"} <= set(names):
        x0, y0, x1, y1 = (_int64(clips, f"crop_{edge}") for edge in ("x0", "y0", "x1", "y1"))
        pixels = pc.coalesce(pc.multiply(pc.subtract(x1, x0), pc.subtract(y1, y0)), pixels)
    keys = {"pixels": pc.fill_null(pixels, -1)}
    for name in ("aesthetic", "quality", "duration_s"):
        if name in names:
            keys[name] = pc.fill_null(clips.column(name).cast(pa.float64()), -np.inf)
    table = pa.table({**keys, "uid": clips.column("uid")})
    order = [*((name, "descending") for name in keys), ("uid", "ascending")]
    return pc.sort_indices(table, sort_keys=order)


def _stars(clips: np.ndarray, near: Near, best: np.ndarray) -> np.ndarray:
    """Set `best` of `clips`, places in the ranking in rising order; returns those of themselves.

    The better half first; who is near one of its stars is settled, and the rest go on.
    """
    beats = _beats(clips, near)
    if beats is not None:
        free = np.ones(len(clips), bool)
        for i in range(len(clips)):
            if free[i]:
                members = beats[i] & free
                best[clips[members]] = clips[i]
                free &= ~members
        return clips[free]
    half = len(clips) // 2
    stars, rest = _stars(clips[:half], near, best), clips[half:]
    for worse, better in near(rest, stars):
        np.minimum.at(best, worse, better)
    return np.concatenate([stars, _stars(rest[best[rest] == rest], near, best)])


def _beats(clips: np.ndarray, near: Near) -> np.ndarray | None:
    """Which clips are near which worse ones, bool [N, N]; None if that is too much at once."""
    if len(clips) > BLOCK:
        return None
    beats = np.zeros((len(clips), len(clips)), bool)
    seen = 0
    for worse, better in near(clips, clips):
        seen += len(worse)
        if seen > DENSE * len(clips) > DENSE**2:  # mostly copies: fewer would stand for them
            return None
        beats[np.searchsorted(clips, better), np.searchsorted(clips, worse)] = True
    return beats


def _table(uids: pa.Array, best: np.ndarray) -> pa.Table:
    """`GROUPS` of clips in ranking order, of which each has the place of its best."""
    sizes = np.bincount(best, minlength=len(best))
    order = np.argsort(best, kind="stable")  # group by group, the best of each first
    rank = np.empty(len(best), np.int32)
    rank[order] = np.arange(len(best)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    alone = sizes[best] < 2
    columns = [uids, uids.take(pa.array(best, mask=alone)), pa.array(rank, mask=alone)]
    return pa.Table.from_arrays(columns, schema=GROUPS).sort_by("uid").combine_chunks()


class _Hash:
    """Nearness by perceptual hash, of clips in ranking order."""

    def __init__(
        self, clips: pa.Table, ranking: np.ndarray, distance: int, light: float | None
    ) -> None:
        self._distance = distance
        count, hashes = _scoring_hashes(clips)
        self._count, self._hashes = count[ranking], hashes[ranking]
        self._light: list[tuple[np.ndarray, float]] = []
        for name, factor in (("luma_mean", 1), ("contrast", 1), ("colorfulness", 2)):
            if light is not None and name in clips.column_names:
                values = clips.column(name).cast(pa.float64()).to_numpy()[ranking]
                self._light.append((values, factor * light))

    def near(
        self, worse: np.ndarray, better: np.ndarray
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for rows, ways in ((self._ones, ONE), (self._twos, TWO)):
            for w, b in _candidates(rows(worse), rows(better), ways, self._distance):
                fits = b < w
                for values, tolerance in self._light:  # what is not measured (NaN) fits
                    fits &= ~(np.abs(values[w] - values[b]) > tolerance)
                yield w[fits], b[fits]

    def _ones(self, clips: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows (clip, hash, 0) of clips with one sample: its hash must agree."""
        one = clips[self._count[clips] == 1]
        return one, self._hashes[one, 0], np.zeros(len(one), np.uint64)

    def _twos(self, clips: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows (clip, hash, later hash) of clips with more: one such row must agree.

        That is two samples of two or three, in order, and more than half in any case; a clip
        of one sample never has as many in common with one of two.
        """
        two, three = clips[self._count[clips] >= 2], clips[self._count[clips] == 3]
        at = self._hashes
        return (
            np.concatenate([two, three, three]),
            np.concatenate([at[two, 0], at[three, 0], at[three, 1]]),
            np.concatenate([at[two, 1], at[three, 2], at[three, 2]]),
        )


def _scoring_hashes(clips: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """How many informative scoring samples clips have, up to 3, and their hashes uint64 [N, 3]."""
    owners, hashes, before = [], [], 0
    for chunk in clips.column("samples").chunks:
        flat = pc.list_flatten(chunk)
        owner = pc.list_parent_indices(chunk).to_numpy(zero_copy_only=False)
        scoring = pc.struct_field(flat, "scoring").to_numpy(zero_copy_only=False).astype(bool)
        value = pc.struct_field(flat, "hash").to_numpy(zero_copy_only=False).astype(np.uint64)
        chosen = scoring & (np.bitwise_count(value) >= INFORMATIVE)
        owners.append(owner[chosen] + before)
        hashes.append(value[chosen])
        before += len(chunk)
    owner = np.concatenate(owners or [np.zeros(0, np.int64)])
    value = np.concatenate(hashes or [np.zeros(0, np.uint64)])
    count = np.bincount(owner, minlength=clips.num_rows)
    total = count[owner]
    place = np.arange(len(owner)) - (np.cumsum(count) - count)[owner]
    # Of more than three: the first, the middle one and the last.
    column = np.where(total <= 3, place, 3)
    for i, wanted in enumerate((0 * total, (total - 1) // 2, total - 1)):
        column[(total > 3) & (place == wanted)] = i
    found = np.zeros((clips.num_rows, 4), np.uint64)
    found[owner, column] = value
    return np.minimum(count, 3), found[:, :3]


def _masks(distance: int, equal: int) -> list[np.uint64]:
    """Masks of which hashes within `distance` are equal under one: of distance + equal bands that
    share the 64 bits out, so many are. Every band has bits of all frequencies."""
    count = distance + equal
    bands = [sum(1 << bit for bit in range(i, 64, count)) for i in range(count)]
    return [np.uint64(sum(some)) for some in combinations(bands, equal)]


def _cheapest(
    ways: tuple[tuple[int, int], ...], distance: int, worse: int, better: int
) -> tuple[int, int]:
    """The way with the least work: to sort rows by each key, and to compare candidates, which is a
    sixth of that each (measured at 3,000,000 clips), if hashes are evenly spread."""

    def work(equal: tuple[int, int]) -> float:
        keys = prod(comb(distance + some, some) for some in equal)
        bits = sum(64 * some / (distance + some) for some in equal if some)
        return keys * (worse + better + worse * better / 2**bits / 6)

    return min(ways, key=work)


def _candidates(
    worse: tuple[np.ndarray, np.ndarray, np.ndarray],
    better: tuple[np.ndarray, np.ndarray, np.ndarray],
    ways: tuple[tuple[int, int], ...],
    distance: int,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of clips of which two rows (clip, hash, hash) agree within `distance` in both hashes.

    A pair may come several times.
    """
    clip_w, x_w, y_w = worse
    clip_b, x_b, y_b = better
    if not len(clip_w) or not len(clip_b):
        return
    width = max(8, min(28, len(clip_b).bit_length()))
    masks = (_masks(distance, equal) for equal in _cheapest(ways, distance, len(x_w), len(x_b)))
    for mask_x, mask_y in product(*masks):
        key = _key(x_b & mask_x, y_b & mask_y, width)
        order = np.sort((key << np.uint64(32)) | np.arange(len(key), dtype=np.uint64))
        order = (order & np.uint64(0xFFFFFFFF)).astype(np.int64)  # rows by key
        ends = np.cumsum(np.bincount(key.astype(np.int64), minlength=1 << width))
        clip_s, x_s, y_s = clip_b[order], x_b[order], y_b[order]
        key = _key(x_w & mask_x, y_w & mask_y, width).astype(np.int64)
        end = ends[key]
        start = np.where(key > 0, ends[key - 1], 0)
        for w, b in _expand(start, end):
            near = np.flatnonzero(np.bitwise_count(x_w[w] ^ x_s[b]) <= distance)
            w, b = w[near], b[near]
            near = np.bitwise_count(y_w[w] ^ y_s[b]) <= distance
            if near.any():
                yield clip_w[w[near]], clip_s[b[near]]


def _key(x: np.ndarray, y: np.ndarray, width: int) -> np.ndarray:
    """Numbers below 2 ** width; equal (x, y) give equal numbers."""
    mixed = x * np.uint64(0x9E3779B97F4A7C15)  # golden ratio: Fibonacci hashing
    mixed ^= (y + np.uint64(1)) * np.uint64(0xC2B2AE3D27D4EB4F)  # a prime of xxHash
    mixed ^= mixed >> np.uint64(29)
    return (mixed * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(64 - width)


def _expand(start: np.ndarray, end: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All (i, j) with start[i] <= j < end[i], about `CHUNK` at a time."""
    rows = np.flatnonzero(end > start)
    sizes = (end - start)[rows]
    total = np.cumsum(sizes)
    first = 0
    while first < len(rows):
        done = total[first - 1] if first else 0
        last = max(first + 1, int(np.searchsorted(total, done + CHUNK, "right")))
        size = sizes[first:last]
        i = np.repeat(rows[first:last], size)
        j = np.arange(len(i)) + np.repeat(start[rows[first:last]] - (np.cumsum(size) - size), size)
        yield i, j
        first = last


class _Cosine:
    """Nearness by embedding, of clips in ranking order.

    Up to `EXACT` embeddings, all pairs are compared. Beyond, space is cut into about sqrt(2 N)
    cells by k-means, a clip lies in one and is compared with better clips in the `PROBES` cells
    nearest to it. Pairs whose cells lie further apart are missed: none of 808 in a set with
    topics, 40 of 888 where space has no structure at all (benchmarks/dedup.py).
    """

    def __init__(self, uids: pa.Array, embeddings: pa.Table, cosine: float) -> None:
        self._cosine = cosine
        vectors = embeddings
        if vectors.column("embedding").null_count:
            vectors = vectors.filter(pc.is_valid(vectors.column("embedding")))
        self._vectors = _matrix(vectors.column("embedding"))
        self._scale = np.sqrt(np.einsum("nd,nd->n", self._vectors, self._vectors))
        row = pc.fill_null(pc.index_in(uids, vectors.column("uid").combine_chunks()), -1)
        self._row = row.to_numpy(zero_copy_only=False).astype(np.int64)  # of a clip; -1: none
        usable = np.zeros(len(self._scale) + 1, bool)  # its last place is for row -1
        usable[:-1] = np.isfinite(self._scale) & (self._scale > 0)
        self._row[~usable[self._row]] = -1
        known = np.flatnonzero(self._row >= 0)
        self._cells = np.zeros((len(uids), 1), np.int64)
        self._count = 1
        if len(known) > EXACT:
            centers = self._centers(known)
            self._count = len(centers)
            self._cells = np.full((len(uids), PROBES), -1)
            for start in range(0, len(known), BLOCK):
                part = known[start : start + BLOCK]
                alike = self._unit(part) @ centers.T
                nearest = np.argpartition(-alike, PROBES - 1, axis=1)[:, :PROBES]
                order = np.argsort(-np.take_along_axis(alike, nearest, axis=1), axis=1)
                self._cells[part] = np.take_along_axis(nearest, order, axis=1)

    def near(
        self, worse: np.ndarray, better: np.ndarray
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        worse, better = (clips[self._row[clips] >= 0] for clips in (worse, better))
        home = self._cells[better, 0]
        if len(worse) * len(better) < 3000 * self._count:  # one product costs less than a loop
            for w, b in self._compare(worse, better):
                probed = (self._cells[w] == self._cells[b, :1]).any(axis=1)
                yield w[probed], b[probed]
            return
        order = np.argsort(home, kind="stable")
        better, home = better[order], home[order]
        probes = self._cells[worse].ravel()
        order = np.argsort(probes, kind="stable")
        probing, probes = np.repeat(worse, self._cells.shape[1])[order], probes[order]
        for cell in np.unique(home):
            b = better[slice(*np.searchsorted(home, (cell, cell + 1)))]
            w = probing[slice(*np.searchsorted(probes, (cell, cell + 1)))]
            yield from self._compare(w, b)

    def _compare(
        self, worse: np.ndarray, better: np.ndarray
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for i in range(0, len(worse), 2 * BLOCK):
            left = worse[i : i + 2 * BLOCK]
            a = self._unit(left)
            for j in range(0, len(better), 2 * BLOCK):
                right = better[j : j + 2 * BLOCK]
                alike = a @ self._unit(right).T
                w, b = np.nonzero(alike > self._cosine - 1e-4)
                # float32 products differ between machines in the last digits: near the
                # threshold they do not decide.
                near = alike[w, b] > self._cosine + 1e-4
                doubt = np.flatnonzero(~near)
                for k in range(0, len(doubt), BLOCK):
                    pair = doubt[k : k + BLOCK]
                    x, y = (
                        self._unit(c).astype(np.float64) for c in (left[w[pair]], right[b[pair]])
                    )
                    near[pair] = np.einsum("nd,nd->n", x, y) > self._cosine
                w, b = left[w[near]], right[b[near]]
                yield w[b < w], b[b < w]

    def _unit(self, clips: np.ndarray) -> np.ndarray:
        rows = self._row[clips]
        return self._vectors[rows] / self._scale[rows, None]

    def _centers(self, known: np.ndarray) -> np.ndarray:
        """Unit vectors float32 [K, D]: spherical k-means on a sample, from a fixed start."""
        rng = np.random.default_rng(0)
        count = round((2 * len(known)) ** 0.5)
        sample = self._unit(np.sort(rng.choice(known, min(len(known), 32 * count), replace=False)))
        centers = sample[rng.choice(len(sample), count, replace=False)]
        for _ in range(5):
            nearest = np.concatenate(
                [
                    (sample[i : i + BLOCK] @ centers.T).argmax(axis=1)
                    for i in range(0, len(sample), BLOCK)
                ]
            )
            order = np.argsort(nearest, kind="stable")
            filled, first = np.unique(nearest[order], return_index=True)
            sums = np.add.reduceat(sample[order], first, axis=0)
            centers[filled] = sums / np.linalg.norm(sums, axis=1, keepdims=True)
        return centers


def _matrix(embeddings: pa.ChunkedArray) -> np.ndarray:
    """Embeddings as float32 [N, D]; one chunk is not copied."""
    lengths = pc.unique(pc.list_value_length(embeddings)).to_pylist()
    if len(lengths) > 1 or None in lengths:
        raise UnimodalError(
            f"embeddings have {sorted(filter(None, lengths))} dimensions, so they are of "
            "different models: remove the embed folders and run again"
        )
    chunks = [
        pc.list_flatten(chunk).to_numpy(zero_copy_only=False).reshape(len(chunk), -1)
        for chunk in embeddings.chunks
        if len(chunk)
    ]
    if len(chunks) == 1:
        return chunks[0].astype(np.float32, copy=False)
    return np.concatenate(chunks or [np.zeros((0, 1))]).astype(np.float32, copy=False)


def _int64(clips: pa.Table, name: str) -> pa.ChunkedArray:
    if name not in clips.column_names:
        return pa.chunked_array([pa.nulls(clips.num_rows, pa.int64())])
    return clips.column(name).cast(pa.int64())
