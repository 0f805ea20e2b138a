"""Conditions that a user wrote over the rows of a table: SQL, and nothing but the table."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from unimodal.pipeline.errors import UsageError, first_line

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection


@contextmanager
def locked(**tables: pa.Table) -> Iterator[DuckDBPyConnection]:
    """A database that holds these tables, and no way out of it."""
    import duckdb

    # Conditions come from scripts and settings of strangers: no files, no extensions.
    config: dict[str, Any] = {
        "enable_external_access": "false",
        "temp_directory": "",
        "lock_configuration": "true",
    }
    with duckdb.connect(":memory:", config=config) as database:
        for name, table in tables.items():
            database.register(name, table)
        yield database


def rows_where(table: pa.Table, where: str, name: str) -> pa.Array:
    """Numbers of the rows of `table`, which the condition may call `name`, that hold for `where`.

    Raises `UsageError` for a condition that cannot be evaluated, with the nearest column for one
    that is not there.
    """
    import duckdb

    numbered = table.append_column("__row", pa.array(range(table.num_rows)))
    with locked(**{name: numbered}) as database:
        try:
            rows = database.sql(f"SELECT __row FROM {name} WHERE ({where}\n) ORDER BY __row")
            return rows.to_arrow_table().column("__row").combine_chunks()
        except duckdb.Error as error:
            said = first_line(error)
            missing = re.search(r'column "(.+?)" not found', said)
            near = missing and difflib.get_close_matches(missing[1], table.column_names, 1, 0)
            hint = f"; the nearest column is {near[0]}" if near else ""
            raise UsageError(
                f'the condition "{where}" cannot be evaluated: {said}{hint}'
            ) from error
