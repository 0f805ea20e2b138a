"""What shards hold, counted from their index alone."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from unimodal.tokenize.document import block_length, parts_length
from unimodal.tokenize.shards import Shards
from unimodal.tokenize.vocabulary import Vocabulary

SIZE = ("kind", "frames", "height", "width", "fps")
PERCENTILES = (5, 25, 50, 75, 95, 99)


class Statistics:
    """Counts of one shard directory."""

    def __init__(self, shards: Shards) -> None:
        self.index = shards.index
        self.vocabulary: Vocabulary = shards.vocabulary
        self.captioned = self.index.filter(pc.equal(self.index["task"], "caption"))
        inner = pa.Table.from_struct_array(pc.list_flatten(self.index["segments"]))
        self.blocks = inner.filter(pc.not_equal(inner["kind"], "text")).select(SIZE)
        """Pictures and clips inside documents."""

    @cached_property
    def sizes(self) -> list[dict[str, Any]]:
        """Pictures and clips of each size, in samples and inside documents: `SIZE`, `count_all`."""
        both = [self.captioned.select(SIZE), self.blocks]
        every = pa.concat_tables(both, promote_options="permissive").combine_chunks()
        found = every.group_by(list(SIZE)).aggregate([([], "count_all")]).to_pylist()
        return sorted(found, key=lambda size: (-size["count_all"], *map(str, size.values())))

    @cached_property
    def captions(self) -> list[dict[str, Any]]:
        """Captions of each style and language: `count_all`, `tokens_sum`; the frequent first."""
        said = pa.Table.from_struct_array(pc.list_flatten(self.index["captions"]))
        said = said.combine_chunks().group_by(["style", "lang"])
        said = said.aggregate([([], "count_all"), ("tokens", "sum")])
        return said.sort_by([("count_all", "descending")]).to_pylist()

    @cached_property
    def tokens(self) -> np.ndarray:
        """Tokens of each sample, int64 [N]: of documents all, of others without their caption."""
        return self._lengths(longest=False)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Ids of each sample's document, int64 [N], with its longest caption: what it needs."""
        return self._lengths(longest=True)

    def _lengths(self, longest: bool) -> np.ndarray:
        known: dict[tuple[Any, ...], int] = {}
        shared: dict[tuple[Any, ...], int] = {}
        lengths = np.zeros(len(self.index), np.int64)
        names = (*SIZE, "task", "segments", "captions") if longest else (*SIZE, "task", "segments")
        at = 0
        for batch in self.index.select(names).to_batches(max_chunksize=4096):
            for row in batch.to_pylist():
                if row["task"] == "caption":
                    lengths[at] = self._block(row, known)
                    if longest:
                        said = (caption["tokens"] for caption in row["captions"] or [])
                        lengths[at] += max(said, default=0) + 2
                else:
                    inner = row["segments"]
                    key = (row["task"], *(one["role"] for one in inner))
                    if key not in shared:  # what a template adds follows from who speaks alone
                        bare = [{"kind": "text", "role": r, "tokens": 0} for r in key[1:]]
                        shared[key] = parts_length(row["task"], bare, self.vocabulary)
                    lengths[at] = shared[key] + sum(self._block(one, known) for one in inner)
                at += 1
        return lengths

    def _block(self, told: Mapping[str, Any], known: dict[tuple[Any, ...], int]) -> int:
        if told["kind"] == "text":
            return int(told["tokens"])
        size = tuple(told[name] for name in SIZE)
        if size not in known:
            known[size] = size_length(told, self.vocabulary)
        return known[size]

    def record(self) -> dict[str, Any]:
        """All of it, for people and programs."""
        samples = self.index.select(["task", "kind", "split"])
        table = samples.append_column("tokens", pa.array(self.tokens)).combine_chunks()
        kinds = table.group_by(["task", "kind", "split"])
        tasks = kinds.aggregate([([], "count_all"), ("tokens", "sum")])
        tasks = tasks.sort_by([(name, "ascending") for name in ("task", "kind", "split")])
        percentiles = np.percentile(self.lengths, PERCENTILES, method="nearest")
        lengths = {f"p{p}": int(n) for p, n in zip(PERCENTILES, percentiles, strict=True)}
        extremes = {"min": int(self.lengths.min()), "max": int(self.lengths.max())}
        said = pc.list_value_length(self.captioned["captions"]).to_numpy()
        return {
            "tasks": tasks.to_pylist(),
            "sizes": self.sizes,
            "captions": self.captions,
            "lengths": lengths | extremes,
            "tokens": int(self.tokens.sum()),
            "uncaptioned": int((said == 0).sum()),
        }


def size_length(told: Mapping[str, Any], vocabulary: Vocabulary) -> int:
    """Tokens of the vision block of a row of the index, or of a segment."""
    moving = (told["frames"], told["fps"]) if told["kind"] == "video" else ()
    return block_length(vocabulary, told["height"], told["width"], *moving)
