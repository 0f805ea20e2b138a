"""The index of shards as plain columns: what each sample is, how long, and what it may say.

A row is a number: of the rows of all shard directories, one behind the other. Here are numbers
alone, about 80 bytes a row; texts and keys stay in the index, which is mapped where it is large.
Nothing grows with training.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from unimodal.pipeline.errors import UnimodalError
from unimodal.tokenize.document import (
    FREE,
    Piece,
    block_length,
    block_template,
    parts_length,
    segment_length,
)
from unimodal.tokenize.vocabulary import Vocabulary

TASKS = ("caption", "text", "chat", "interleaved", "edit")
"""What a row of the index can be; see `unimodal.tokenize.document.ROLES`."""

WHOLE, UNTOLD, ALONE = -1, -2, -3
"""Stand for a caption's number where there is none. Of an edit: all of it; without its
instruction; without its source as well."""
DROPPED = ("instruction", "source")
"""Roles that an edit may leave out, in this order."""

DIGESTED = (
    *("key", "source_sha256", "kind", "task", "split", "frames", "height", "width", "fps"),
    *("captions", "segments"),
)
"""Columns of the index that a run depends on."""


class ShardsLike(Protocol):
    """What is used of `unimodal.tokenize.shards.Shards`."""

    @property
    def index(self) -> Any: ...
    @property
    def vocabulary(self) -> Vocabulary: ...
    def codes(self, row: int) -> np.ndarray: ...
    def segments(self, row: int) -> list[Piece]: ...


def draw(seed: int, epoch: int | np.ndarray, keys: int | np.ndarray, purpose: str) -> np.ndarray:
    """Numbers in [0, 1) that depend on nothing but the arguments; float64, one per key.

    `keys` are uint64 as `hashed` gives them. The mixing is that of SplitMix64 (Steele, Lea and
    Flood 2014).
    """
    mixed = np.atleast_1d(np.asarray(keys, np.uint64)) ^ np.uint64(hashed(f"{seed}/{purpose}"))
    for more in (np.uint64(0), np.asarray(epoch, np.uint64)):
        mixed = (mixed + more) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed ^= mixed >> np.uint64(31)
    return (mixed >> np.uint64(11)) * 2.0**-53


def hashed(text: str) -> int:
    """64 bits of a text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


class Samples:
    """The index of one or more shard directories of one vocabulary."""

    def __init__(self, shards: Sequence[ShardsLike], styles: Sequence[str] = ()) -> None:
        self.shards = list(shards)
        self.vocabulary = shards[0].vocabulary
        tables = [
            _Columns(batch, self.vocabulary, styles)
            for one in self.shards
            for batch in one.index.to_batches()
            or [pa.RecordBatch.from_pylist([], schema=one.index.schema)]
        ]
        self._keys = [table.keys for table in tables]
        self._texts = [table.texts for table in tables]
        self._picked = [table.picked for table in tables]
        self.starts = np.cumsum([0, *(len(one.index) for one in self.shards)])
        """First row of each directory, and behind them the number of rows."""
        self._starts: list[int] = self.starts.tolist()
        self._batches: list[int] = np.cumsum([0, *(len(table.keys) for table in tables)]).tolist()
        self._blocks: dict[object, tuple[np.ndarray, np.ndarray]] = {}
        self.tasks, self.sizes, self.rates, self.hashes, self.lengths, tokens, counts, val = (
            np.concatenate([getattr(table, name) for table in tables])
            for name in ("tasks", "sizes", "rates", "hashes", "lengths", "tokens", "counts", "val")
        )
        self._inner = sum((table.inner for table in tables), Counter[tuple[Any, ...]]())
        self._dropped = np.concatenate([table.dropped for table in tables])
        self._tokens = np.append(tokens, np.int32(0))
        self._first = np.concatenate([[0], np.cumsum(counts)])
        self.rows = {"train": np.flatnonzero(~val), "val": np.flatnonzero(val)}
        """Rows of each split."""

        self.recent: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        """Long texts that were written last: see `batch`."""
        vocabulary = self.vocabulary
        self._classes = np.zeros(vocabulary.size, np.int8)
        self._classes[vocabulary.vision_start :][: vocabulary.codebook_size] = 1
        for one in (vocabulary.boi, vocabulary.img, vocabulary.eoi, vocabulary.eol, vocabulary.eof):
            self._classes[one] = 2

    def name(self, number: int) -> str:
        """How errors call a directory."""
        return str(getattr(self.shards[number], "path", f"shards {number}"))

    def splittable(self, rows: np.ndarray) -> np.ndarray:
        """Which rows may be cut: plain text."""
        return self.tasks[rows] == TASKS.index("text")

    def classes(self, ids: np.ndarray) -> np.ndarray:
        """Text (0), vision (1) or structure (2) of ids that begin outside a vision block; [T]."""
        found = self._classes[ids]
        opened, shown = (
            np.flatnonzero(ids == one) for one in (self.vocabulary.boi, self.vocabulary.img)
        )
        for first, behind in zip(opened.tolist(), shown.tolist(), strict=True):
            found[first:behind] = 2  # the meta text too
        return found

    def captions(self, rows: np.ndarray | int) -> np.ndarray:
        """How many captions rows have."""
        return self._first[np.asarray(rows) + 1] - self._first[rows]

    def caption(self, row: int, which: int) -> str:
        """Text of a caption."""
        number = bisect_right(self._batches, row) - 1
        at = self._first[row] + which - self._first[self._batches[number]]
        picked = self._picked[number]
        return str(self._texts[number][int(at if picked is None else picked[at])].as_py())

    def caption_ids(self, row: int, which: int) -> np.ndarray:
        """Ids of a caption."""
        ids = self.vocabulary.text.encode(self.caption(row, which))
        if self.vocabulary.text.size <= 256:  # ten times as fast as from a list
            return np.frombuffer(bytes(ids), np.uint8)
        return np.array(ids, np.int64)

    def length(self, rows: np.ndarray, captions: np.ndarray) -> np.ndarray:
        """Tokens of documents of `rows` with these captions (-1: none; of edits see `WHOLE`).

        One less than their ids, as the last id predicts nothing.
        """
        at = np.where(captions < 0, 0, self._first[rows] + captions)
        text = self._tokens[np.minimum(at, len(self._tokens) - 1)]
        text = np.where(captions < 0, -self._dropped[rows, np.maximum(WHOLE - captions, 0)], text)
        return self.lengths[rows] + text

    def key(self, row: int) -> str:
        """Key of a row."""
        number = bisect_right(self._batches, row) - 1
        return str(self._keys[number][row - self._batches[number]].as_py())

    def codes(self, row: int) -> np.ndarray:
        """Codes [T, H, W] of a row with captions."""
        number, own = self._place(row)
        return self.shards[number].codes(own)

    def segments(self, row: int) -> list[Piece]:
        """Pieces of a row of another task."""
        number, own = self._place(row)
        return self.shards[number].segments(own)

    def block(self, shape: tuple[int, ...], rate: float) -> tuple[np.ndarray, np.ndarray]:
        """The vision block of codes [T, H, W], see `block_template`, and its `classes`."""
        moving = rate == rate
        key = (shape, rate if moving else None)
        if key not in self._blocks:
            t, h, w = shape
            ids = block_template(self.vocabulary, h, w, *((t, rate) if moving else ()))
            filled = np.where(ids == FREE, self.vocabulary.vision_start, ids)
            self._blocks[key] = filled, self.classes(filled)
        return self._blocks[key]

    def grids(self, context: int, limit: int = 64) -> list[dict[str, Any]]:
        """The commonest shapes of training samples that fit in `context`: kind, size, fps, samples.
        Captioned ones first; of those in other documents, as edits, only what these do not tell."""
        rows = self.rows["train"][self.tasks[self.rows["train"]] == 0]
        rows = rows[self.length(rows, np.full(len(rows), WHOLE)) <= context]
        alike, first = _alike(*self.sizes[rows].T, self.rates[rows])
        found = []
        for row, count in zip(rows[first].tolist(), np.bincount(alike).tolist(), strict=True):
            fps = None if np.isnan(self.rates[row]) else float(self.rates[row])
            kind = "image" if fps is None else "video"
            size = self.sizes[row].tolist()
            found.append({"kind": kind, "size": size, "fps": fps, "samples": count})
        alone = {str([*one.values()][:3]) for one in found}
        inner = [
            {"kind": kind, "size": size, "fps": fps, "samples": count}
            for (kind, *size, fps), count in self._inner.items()
        ]
        return [
            *sorted(found, key=_often)[:limit],
            *sorted((o for o in inner if str([*o.values()][:3]) not in alone), key=_often)[:limit],
        ]

    def digests(self) -> list[str]:
        """Of what each directory's index says of its samples, 16 hex digits: tells whether a run
        is resumed with the same data. Where codes lie in the tars does not count."""
        return [_digest(one.index) for one in self.shards]

    def _place(self, row: int) -> tuple[int, int]:
        """Number of the directory of a row, and the row within it."""
        number = bisect_right(self._starts, row) - 1
        return number, row - self._starts[number]


def _often(grid: dict[str, Any]) -> tuple[int, str]:
    """Order of grids: the commonest first."""
    return -grid["samples"], str([*grid.values()])


def _inner(segments: Any) -> Counter[tuple[Any, ...]]:
    """Pictures and clips among the pieces of documents, by (kind, frames, height, width, fps)."""
    names = ["kind", "frames", "height", "width", "fps"]
    told = pc.list_flatten(segments)
    table = pa.table([told.field(name) for name in names], names=names)
    shown = table.filter(pc.not_equal(table["kind"], "text"))
    counted = shown.group_by(names).aggregate([([], "count_all")])
    return Counter({tuple(row[n] for n in names): row["count_all"] for row in counted.to_pylist()})


class _Columns:
    """The part of `Samples` of some rows of a directory."""

    def __init__(
        self, index: pa.RecordBatch, vocabulary: Vocabulary, styles: Sequence[str]
    ) -> None:
        column = index.column
        self.keys = column("key")
        self.hashes = np.array([hashed(key) for key in self.keys.to_pylist()], np.uint64)
        self.val = pc.equal(column("split"), "val").to_numpy(zero_copy_only=False).astype(bool)
        names = pc.index_in(column("task"), pa.array(TASKS))
        self.tasks = pc.fill_null(names, len(TASKS)).to_numpy(zero_copy_only=False).astype(np.uint8)
        if (self.tasks == len(TASKS)).any():
            raise UnimodalError(
                f"the index knows a task that this version does not ({', '.join(TASKS)}): "
                "install the version that wrote it"
            )
        sizes = [column(name).to_numpy() for name in ("frames", "height", "width")]  # int32
        self.sizes = np.stack(sizes, axis=1)
        moving = pc.equal(column("kind"), "video").to_numpy(zero_copy_only=False)
        rates = pc.fill_null(column("fps"), np.nan).to_numpy(zero_copy_only=False)
        self.rates = np.where(moving, rates, np.nan)
        """NaN for a still image."""
        self.dropped = np.zeros((len(self.tasks), 1 + len(DROPPED)), np.int32)
        """Tokens that an edit is shorter by: whole, `UNTOLD`, `ALONE`."""
        segments = column("segments")
        self.lengths = self._lengths(segments, vocabulary)
        self.inner = _inner(segments.filter(pa.array(~self.val & (self.tasks > 0))))
        """Pictures and clips in documents of the training split, by (kind, T, H, W, fps)."""
        self._captions(column("captions"), styles)

    def _lengths(self, segments: Any, vocabulary: Vocabulary) -> np.ndarray:
        """Tokens of each row's document, its caption not counted."""
        lengths = np.zeros(len(self.tasks), np.int64)
        rows = np.flatnonzero(self.tasks == 0)
        if len(rows):
            alike, first = _alike(*self.sizes[rows].T, self.rates[rows])
            shapes = [(*self.sizes[row].tolist(), float(self.rates[row])) for row in rows[first]]
            blocks = [
                block_length(vocabulary, h, w, *(() if np.isnan(fps) else (t, fps)))
                for t, h, w, fps in shapes
            ]
            lengths[rows] = np.array(blocks)[alike] + 1
        rows = np.flatnonzero(self.tasks)
        if not len(rows):
            return lengths
        # Documents that differ in nothing but their texts' lengths are counted once.
        told = pc.list_flatten(segments)
        counts = pc.fill_null(pc.list_value_length(segments), 0).to_numpy(zero_copy_only=False)
        starts = np.concatenate([[0], np.cumsum(counts)])
        tokens = pc.fill_null(told.field("tokens"), 0).to_numpy(zero_copy_only=False)
        sums = np.concatenate([[0], np.cumsum(tokens)])
        names = ("kind", "role", "frames", "height", "width", "fps")
        alike, _ = _alike(
            *(told.field(n).dictionary_encode().indices.fill_null(-1).to_numpy() for n in names)
        )
        spoken = [  # of each segment that is a text, and has a role that may be dropped
            np.cumsum([0, *(tokens * pc.equal(told.field("role"), role).to_numpy(False))])
            for role in DROPPED
        ]
        edit = TASKS.index("edit")
        known: dict[tuple[int, bytes], tuple[int, list[int]]] = {}
        for row in rows.tolist():
            first, last = starts[row], starts[row + 1]
            form = (int(self.tasks[row]), alike[first:last].tobytes())
            if form not in known:
                one = told.slice(first, last - first).to_pylist()
                whole = parts_length(TASKS[self.tasks[row]], one, vocabulary)
                pictures = [  # of each role
                    sum(
                        segment_length(segment, vocabulary)
                        for segment in one
                        if segment["role"] == role and segment["kind"] != "text"
                    )
                    for role in DROPPED
                ]
                known[form] = whole - 1 - int(sums[last] - sums[first]), pictures
            fixed, pictures = known[form]
            lengths[row] = fixed + sums[last] - sums[first]
            if self.tasks[row] == edit:
                parts = zip(pictures, spoken, strict=True)
                self.dropped[row, 1:] = np.cumsum([p + s[last] - s[first] for p, s in parts])
        return lengths

    def _captions(self, captions: Any, styles: Sequence[str]) -> None:
        """Flat captions: how many each row has, which ones of all texts, and their tokens."""
        values = captions.flatten()
        sizes = pc.fill_null(pc.list_value_length(captions), 0).to_numpy(zero_copy_only=False)
        tokens = values.field("tokens").to_numpy(zero_copy_only=False).astype(np.int32)
        self.counts, self.picked, self.tokens = sizes, None, tokens
        if styles:
            wanted = pc.is_in(values.field("style"), pa.array(list(styles), pa.string()))
            kept = wanted.to_numpy(zero_copy_only=False).astype(bool)
            owner = np.repeat(np.arange(len(sizes)), sizes)
            self.counts = np.bincount(owner[kept], minlength=len(sizes))
            self.picked = np.flatnonzero(kept)
            self.tokens = tokens[kept]
        self.texts = values.field("text")


def _digest(index: Any) -> str:
    found = hashlib.sha256()
    for name in DIGESTED:
        column = index.column(name)
        _hash(found, column.chunks or [pa.array([], column.type)])
    return found.hexdigest()[:16]


def _hash(found: Any, chunks: Sequence[Any]) -> None:
    """Hash the values of a column, however it is cut; nulls as 0 or nothing, since what lies under
    them is chance."""
    kind = chunks[0].type
    if pa.types.is_list(kind):
        _hash(found, [pc.list_value_length(chunk) for chunk in chunks])
        _hash(found, [chunk.flatten() for chunk in chunks])
    elif pa.types.is_struct(kind):
        for number in range(kind.num_fields):
            _hash(found, [chunk.field(number) for chunk in chunks])
    elif pa.types.is_string(kind):
        _hash(found, [pc.binary_length(chunk) for chunk in chunks])
        for chunk in chunks:
            whole = pa.ListArray.from_arrays([0, len(chunk)], pc.fill_null(chunk, ""))
            found.update(pc.binary_join(whole, "")[0].as_buffer())
    else:
        for chunk in chunks:
            found.update(pc.fill_null(chunk, 0).to_numpy(zero_copy_only=False))


def _alike(*columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number rows so that equal ones have one number: the numbers, and a row of each."""
    numbers = np.zeros(len(columns[0]), np.int64)
    for column in columns:
        _, part = np.unique(column, return_inverse=True)
        _, numbers = np.unique(numbers * (len(column) + 1) + part, return_inverse=True)
    return numbers, np.unique(numbers, return_index=True)[1]
