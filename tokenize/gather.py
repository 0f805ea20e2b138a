"""Shards out of shards: those samples of some directories for which a condition holds.

    a/ b/ + "aesthetic >= 6" -> c/       "true" takes all: a merge

Samples are copied by byte range, tar to tar, members and all: no code is read, let alone made
again. What an index says is the authority, so captions that were refreshed come along; the
{key}.json inside a tar keeps those of its making. Equal input gives equal bytes, and a run that
was killed goes on where it was.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tarfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from unimodal.pipeline import large
from unimodal.pipeline.errors import UnimodalError, UsageError, full_disk
from unimodal.pipeline.lock import run_lock
from unimodal.pipeline.progress import Progress
from unimodal.pipeline.where import rows_where
from unimodal.tokenize.shard import INDEX, commit_shard, shard_paths
from unimodal.tokenize.shards import Shards, ShardWriter

TASK = "copied"
MAX_SHARD_BYTES = 256 << 20
_SPAN = ("__source", "__start", "__size")
"""Columns behind those of an index: which directory, and where in the tar the sample lies. Users'
numbers ride along under names of their own, which are never such."""


def gather(
    directories: Sequence[str | Path], where: str, out: Path, progress: Progress | None = None
) -> Shards:
    """Write the samples of `directories` for which `where` holds to `out`, and open it.

    `where` is SQL over the columns of the index. A key that several directories have is taken
    from the first of them. A source with samples in both splits goes to `val`. Raises
    `UnimodalError` if the directories are of different tokenizers, vocabularies or ways of
    encoding, if nothing holds, or if `out` is one of them or holds something else.
    """
    progress = progress or Progress()
    sources = [Shards.open(directory) for directory in directories]
    if any(source.path.resolve() == out.resolve() for source in sources):
        raise UsageError(f"{out} is among the shards that are read: choose another -o")
    settings = _common(sources) | {"where": where}
    rows = _chosen(sources, where, progress)
    scores = rows.column_names[len(INDEX) : -len(_SPAN)]
    most = max(shard["samples"] for source in sources for shard in source.manifest["shards"])
    made = [source.manifest.get("made_of") for source in sources]
    count, state = 0, hashlib.sha256()
    with run_lock(out, progress):
        try:
            first = sources[0]
            writer = ShardWriter(out, _Copy(first), first.vocabulary, settings, scores)
            progress.begin(TASK, len(rows), "samples")
            for unit in _units(rows, most):
                told = unit.to_pylist()
                text = json.dumps([writer.header, made, told], sort_keys=True)
                digest = hashlib.sha256(text.encode()).hexdigest()
                if not writer.has(count, digest):
                    writer.begin([count])
                    paths = [sources[row["__source"]].path / row["shard"] for row in told]
                    name = shard_paths(out, count)[0].name
                    both = zip(told, paths, strict=True)
                    adds = (partial(_add, row, path, name) for row, path in both)
                    commit_shard(out, count, scores, digest, adds)
                progress.advance(TASK, len(told))
                state.update(digest.encode())
                count += 1
            progress.end(TASK)
            return writer.finish(count, state.hexdigest())
        except OSError as error:
            raise full_disk(error, out) or error from error


def _common(sources: Sequence[Shards]) -> dict[str, Any]:
    """Settings that all directories were made with; raises `UnimodalError` if they do not mix."""
    first = sources[0]
    for other in sources[1:]:
        for key in ("vision_tokenizer", "vocabulary"):
            if other.manifest[key]["digest"] != first.manifest[key]["digest"]:
                raise UnimodalError(
                    f"{other.path} is of another {key.replace('_', ' ')} than {first.path}: they "
                    "do not mix; tokenize one of them again"
                )
    settings = [source.manifest["settings"] for source in sources]
    if len({bool(one.get("joint")) for one in settings}) > 1:
        raise UnimodalError(
            "clips of some of these shards were encoded jointly and of others not (setting "
            "joint): they do not mix; tokenize again"
        )
    return {k: v for k, v in settings[0].items() if all(one.get(k) == v for one in settings)}


def _chosen(sources: Sequence[Shards], where: str, progress: Progress) -> pa.Table:
    """Rows of the new index, but for their new places: in the order of directories and tars."""
    tables = [
        _spans(source).append_column("__source", pa.array([number] * len(source.index), pa.int32()))
        for number, source in enumerate(sources)
    ]
    rows = pa.concat_tables(tables, promote_options="default")
    scores = sorted(set(rows.column_names) - {*INDEX.names, *_SPAN})
    rows = rows.select([*INDEX.names, *scores, *_SPAN])
    rows = large.take(rows, rows_where(rows.drop_columns(list(_SPAN)), where, "samples"))
    if not len(rows):
        names = ", ".join(str(source.path) for source in sources)
        raise UnimodalError(f'no sample of {names} holds for "{where}"')
    rows = rows.append_column("__row", pa.array(np.arange(len(rows))))
    kept = rows.group_by("key").aggregate([("__row", "min")])["__row_min"].sort()
    if twice := len(rows) - len(kept):
        progress.note(f"{twice} samples were in several directories: taken from the first")
    rows = large.take(rows, kept.combine_chunks()).drop_columns(["__row"])
    both = rows.filter(pc.equal(rows["split"], "val"))["source_sha256"]
    split = pc.if_else(pc.is_in(rows["source_sha256"], both), "val", "train")
    at = INDEX.get_field_index("split")
    rows = rows.set_column(at, INDEX.field("split"), split)
    return large.sort_by(rows, ["__source", "shard", "__start"])


def _spans(source: Shards) -> pa.Table:
    """The index with `__start` and `__size`: where all members of a sample lie, headers and all.

    A sample begins where the one before it ends, and ends with its last member.
    """
    index = source.index
    ends = _padded(index["offset"], index["nbytes"])
    inner = pa.Table.from_struct_array(pc.list_flatten(index["segments"]))
    counts = pc.fill_null(pc.list_value_length(index["segments"]), 0).to_numpy()
    parents = np.repeat(np.arange(len(index)), counts)
    np.maximum.at(ends, parents, _padded(inner["offset"], inner["nbytes"]))
    shard = index["shard"].combine_chunks().dictionary_encode().indices.to_numpy()
    order = np.lexsort((ends, shard))
    starts = np.zeros_like(ends)
    same = shard[order[1:]] == shard[order[:-1]]
    starts[order[1:]] = np.where(same, ends[order[:-1]], 0)
    return index.append_column("__start", pa.array(starts)).append_column(
        "__size", pa.array(ends - starts)
    )


def _padded(offset: pa.ChunkedArray, nbytes: pa.ChunkedArray) -> np.ndarray:
    size = nbytes.to_numpy().astype(np.int64)
    return offset.to_numpy() + -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def _units(rows: pa.Table, most: int) -> Iterator[pa.Table]:
    """Rows of each new shard, sorted by key."""
    start, held = 0, 0
    for at, size in enumerate(rows["__size"].to_pylist()):
        if at > start and (at - start >= most or held + size > MAX_SHARD_BYTES):
            yield rows.slice(start, at - start).sort_by("key")
            start, held = at, 0
        held += size
    yield rows.slice(start).sort_by("key")


def _add(row: dict[str, Any], tar: Path, shard: str, file: io.BufferedWriter) -> dict[str, Any]:
    """Copy the members of a sample; returns its row of the new index."""
    start, size, to = row["__start"], row["__size"], file.tell()
    with tar.open("rb") as source:
        there = 0 <= start <= start + size <= os.fstat(source.fileno()).st_size
        data = os.pread(source.fileno(), size, start) if there else b""
    header = f"{row['key']}.json".encode()
    if len(data) != size or data[: len(header) + 1] != header + b"\0":
        raise UnimodalError(
            f"{tar} does not hold {row['key']} where its index says: copy these shards again, or "
            "run the same unimodal tokenize again"
        )
    file.write(data)
    row = {name: value for name, value in row.items() if name not in _SPAN} | {"shard": shard}
    for place in [row, *(row["segments"] or [])]:
        if place["nbytes"]:
            place["offset"] += to - start
    return row


class _Copy:
    """The vision tokenizer of shards, without opening it."""

    def __init__(self, shards: Shards) -> None:
        told = shards.manifest["vision_tokenizer"]
        self.directory = shards.vision_tokenizer_dir
        self.digest: str = told["digest"]
        self.codebook_size: int = told["codebook_size"]
        self.spatial_factor: int = told["spatial_factor"]

    def save(self, directory: Path) -> None:
        shutil.copytree(self.directory, directory)
