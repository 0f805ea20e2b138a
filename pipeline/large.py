"""Arrow tables in another order, also those with more text than one array can hold.

An array of strings has offsets of 32 bits: it ends at 2 GiB, which the captions of a million clips
reach. A table may hold more, as its columns are chunks; but `Table.take`, `sort_by` and
`combine_chunks` first make one array of a column, and fail. These do not. What should not take
memory either is sorted into a file (`write_sorted`) and `mapped`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from unimodal.pipeline.clips import BATCH

WHOLE = 1 << 30
"""Bytes of a table, in all columns, that is still made one piece."""
SLICE = 1 << 25
"""Bytes that are put in order at a time, about."""


def take(table: pa.Table, rows: pa.Array | np.ndarray) -> pa.Table:
    """Rows of a table by number, in the order of `rows`; null where that is null."""
    if table.nbytes <= WHOLE:
        return table.take(rows)
    return pa.Table.from_batches(slices(table, rows), table.schema)


def sort_by(table: pa.Table, names: Sequence[str]) -> pa.Table:
    """A table in rising order of columns; equal rows stay in theirs, nulls come last."""
    keys = [(name, "ascending") for name in names]
    return take(table, pc.sort_indices(table, sort_keys=keys))


def one_piece(table: pa.Table) -> pa.Table:
    """The table in one chunk, if that can be: most of Arrow is faster then."""
    return table.combine_chunks() if table.nbytes <= WHOLE else table


def slices(table: pa.Table, rows: pa.Array | np.ndarray) -> Iterator[pa.RecordBatch]:
    """`take`, some rows at a time."""
    table = pa.concat_tables([table, _nothing(table.schema)])  # what a null stands for
    batches = table.to_batches()
    starts = np.cumsum([0, *map(len, batches)])
    numbers = pc.fill_null(pa.array(rows), len(table) - 1).to_numpy(zero_copy_only=False)
    size = min(BATCH, max(1, SLICE * len(table) // max(1, table.nbytes)))
    for at in range(0, len(numbers), size):
        wanted = numbers[at : at + size]
        order = np.argsort(wanted, kind="stable")
        found = wanted[order]
        cuts = np.searchsorted(found, starts)
        parts = [
            batch.take(pa.array(found[first:behind] - start))
            for batch, start, (first, behind) in zip(
                batches, starts.tolist(), pairwise(cuts.tolist()), strict=False
            )
            if first < behind
        ]
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        yield pa.concat_batches(parts).take(pa.array(back))


def write_sorted(tables: Iterable[pa.Table], schema: pa.Schema, by: str, file: Path) -> None:
    """Write the rows of tables into an Arrow IPC file, in rising order of a column of strings.

    Memory is flat but for that column. Raises `OSError` if the disk is full, and
    `pa.ArrowException` for a table of another schema.
    """
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        first = Path(folder) / "unsorted.arrow"
        _write(_joined(tables), schema, first)
        rows = mapped(first)
        order = pc.sort_indices(rows, sort_keys=[(by, "ascending")])
        _write(slices(rows, order), schema, file)
    pa.default_memory_pool().release_unused()


def mapped(file: Path) -> pa.Table:
    """The table in an Arrow IPC file, of which memory holds what is looked at, once for all
    processes. The file may be removed then."""
    return pa.ipc.open_file(pa.memory_map(str(file))).read_all()


def _joined(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Tables of some thousand rows, as each takes time of its own."""
    held: list[pa.Table] = []
    for table in tables:
        held.append(table)
        if sum(map(len, held)) >= BATCH or sum(one.nbytes for one in held) >= SLICE:
            yield pa.concat_tables(held).combine_chunks()
            held = []
    if held:
        yield pa.concat_tables(held).combine_chunks()


def _write(rows: Iterable[pa.Table | pa.RecordBatch], schema: pa.Schema, file: Path) -> None:
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for some in rows:
            writer.write(some)


def _nothing(schema: pa.Schema) -> pa.Table:
    """A row of nulls."""
    return pa.Table.from_arrays([pa.nulls(1, field.type) for field in schema], schema=schema)
