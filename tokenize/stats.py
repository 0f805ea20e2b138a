"""What shards hold, counted from their index alone."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from unimodal.tokenize.document import parts_length, segment_length
from unimodal.tokenize.shards import Shards

SIZE = ("kind", "frames", "height", "width", "fps")
PERCENTILES = (5, 25, 50, 75, 95, 99)


class Statistics:
    """Counts of one shard directory."""

    def __init__(self, shards: Shards) -> None:
        self.index = shards.index
        self.vocabulary = shards.vocabulary
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
        told = pa.Table.from_struct_array(pc.list_flatten(self.index["captions"]))
        said = told.select(["style", "lang", "tokens"]).combine_chunks().group_by(["style", "lang"])
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
        lengths = np.zeros(len(self.index), np.int64)
        names = (*SIZE, "task", "segments", "captions") if longest else (*SIZE, "task", "segments")
        batches = self.index.select(names).to_batches(max_chunksize=4096)
        for at, row in enumerate(row for batch in batches for row in batch.to_pylist()):
            if row["task"] != "caption":
                lengths[at] = parts_length(row["task"], row["segments"], self.vocabulary)
                continue
            lengths[at] = segment_length(row, self.vocabulary)
            if longest:
                said = (caption["tokens"] for caption in row["captions"] or [])
                lengths[at] += max(said, default=0) + 2
        return lengths

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
