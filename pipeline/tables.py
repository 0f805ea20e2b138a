"""Tables of media: list files, CSV, TSV, JSON Lines and Parquet, one row at a time.

    path,caption,license            file_name is a path too, text a caption; see PATHS and TEXTS
    cats/1.jpg,"a cat, asleep",CC0

A list file has a path a line; lines that are blank or begin with # are passed over. Columns that
are neither path, caption, style nor lang ride along as text. Whatever is wrong is a `UsageError`
that names the file, the line and the remedy: a table is written for the purpose, and half of it
is not what was meant.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unimodal.pipeline import remote, tars
from unimodal.pipeline.errors import UsageError, first_line

LISTS = (".txt", ".lst", ".list")
SUFFIXES = frozenset({*LISTS, ".csv", ".tsv", ".jsonl", ".ndjson", ".parquet"})

PATHS = ("path", "uri", "url", "file", "file_name", "filename", "image", "video", "media")
"""Columns that may hold the path, in any case of letters; the first of them that a table has."""
TEXTS = ("caption", "captions", "text", "prompt")
"""Columns that may hold the caption, or a list of them."""

LONGEST_LINE = 16 << 20  # bytes; a file with longer ones is no table
BATCH = 4096  # rows of a Parquet file in memory


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a table."""

    where: str  # "media.csv, line 7", for messages
    path: str  # as it is written
    texts: tuple[str, ...]
    style: str | None
    lang: str | None
    meta: dict[str, str]


def is_table(name: str) -> bool:
    """Whether a file of this name is read as a table of media."""
    return os.path.splitext(name)[1].lower() in SUFFIXES  # noqa: PTH122


def read_rows(
    table: Path,
    shown: str | None = None,
    captions: bool = False,
    paths: Sequence[str] = PATHS,
) -> Iterator[Row]:
    """Rows of a table, in order; its kind follows from the suffix of `shown` (default: its path).

    With `captions`, a table without a column of captions is an error; `paths` are the columns that
    may hold the path. Raises `UsageError`.
    """
    name = shown or str(table)
    suffix = os.path.splitext(name)[1].lower()  # noqa: PTH122
    if suffix not in SUFFIXES:
        raise UsageError(f"{name}: not a table (one ends in {', '.join(sorted(SUFFIXES))})")
    try:
        if suffix == ".parquet":
            numbered: Iterator[tuple[str, Mapping[str, Any]]] = _parquet(table, name, paths)
        elif suffix in (".csv", ".tsv"):
            numbered = _csv(table, name, "\t" if suffix == ".tsv" else ",", paths)
        elif suffix in LISTS:
            numbered = _list(table, name)
        else:
            numbered = _json_lines(table, name)
        roles: dict[tuple[str, ...], _Roles] = {}
        for where, cells in numbered:
            names = tuple(cells)
            if names not in roles:  # rows of JSON may differ in their keys
                roles[names] = _Roles.of(names, where, captions, paths)
            yield roles[names].row(where, cells)
    except OSError as error:
        raise UsageError(f"{name}: cannot be read ({error.strerror or error})") from error


def absolute(path: str, base: str | None) -> str:
    """The uri that a path in a table means.

    A relative one is looked for in the table's folder `base`, then in the working directory.
    Links are kept: they are the names that the user knows.
    """
    if remote.is_remote(path):
        return remote.canonical(path)
    if base is not None and remote.is_remote(base):
        return f"{base}/{path}"
    for candidate in [path] if base is None else [os.path.join(base, path), path]:  # noqa: PTH118
        if (member := tars.split(candidate)) is not None:
            return f"{os.path.abspath(member[0])}#{member[1]}"  # noqa: PTH100
        if os.path.lexists(candidate):
            return os.path.abspath(candidate)  # noqa: PTH100
    return os.path.abspath(path)  # noqa: PTH100


def as_text(value: Any) -> str | None:
    """A cell that rides along, as text: JSON for what is neither text nor null."""
    if value is None or isinstance(value, str):
        return None if value is None else clean(value)
    return clean(json.dumps(value, ensure_ascii=False, default=str))


def clean(text: str) -> str:
    """Text that UTF-8 can hold: JSON can spell halves of characters."""
    return text.encode("utf-8", "replace").decode()


@dataclass(frozen=True)
class _Roles:
    """Which column is what."""

    path: str
    text: str | None
    style: str | None
    lang: str | None
    others: tuple[str, ...]

    @classmethod
    def of(cls, names: Sequence[str], where: str, captions: bool, paths: Sequence[str]) -> _Roles:
        lower = {name.strip().lower(): name for name in reversed(names)}
        path = next((lower[name] for name in paths if name in lower), None)
        text = next((lower[name] for name in TEXTS if name in lower), None)
        has = f"its columns are: {', '.join(names) or 'none'}"
        if path is None:
            raise UsageError(f"{where}: no column of paths (one of {', '.join(paths)}); {has}")
        if captions and text is None:
            raise UsageError(f"{where}: no column of captions (one of {', '.join(TEXTS)}); {has}")
        style, lang = lower.get("style"), lower.get("lang")
        others = tuple(name for name in names if name not in (path, text, style, lang))
        return cls(path, text, style, lang, others)

    def row(self, where: str, cells: Mapping[str, Any]) -> Row:
        path = cells[self.path]
        if not isinstance(path, str) or not path or "\0" in path or clean(path) != path:
            raise UsageError(f"{where}: {self.path} is no path: {path!r:.80}")
        texts = cells[self.text] if self.text else None
        texts = [texts] if isinstance(texts, str) else texts or []
        if not isinstance(texts, list) or not all(isinstance(t, str | None) for t in texts):
            raise UsageError(f"{where}: {self.text} is neither a text nor a list of texts")
        meta = {name: as_text(cells[name]) for name in self.others}
        return Row(
            where,
            path,
            tuple(clean(text.strip()) for text in texts if text and text.strip()),
            as_text(cells[self.style]) or None if self.style else None,
            as_text(cells[self.lang]) or None if self.lang else None,
            {name: value for name, value in meta.items() if value},
        )


def _lines(table: Path, name: str) -> Iterator[tuple[int, str]]:
    with table.open("rb") as file:
        number = 0
        while raw := file.readline(LONGEST_LINE + 1):
            number += 1
            if len(raw) > LONGEST_LINE:
                raise UsageError(f"{name}, line {number}: longer than {LONGEST_LINE} bytes")
            try:
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UsageError(
                    f"{name}, line {number}: not UTF-8 (byte {raw[error.start]:#04x} at column "
                    f"{error.start + 1}); save it as UTF-8"
                ) from error


def _list(table: Path, name: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, line in _lines(table, name):
        path = line.strip()
        if path and not path.startswith("#"):
            yield f"{name}, line {number}", {"path": path}


def _json_lines(table: Path, name: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, line in _lines(table, name):
        if not line.strip():
            continue
        where = f"{name}, line {number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{where}: not JSON ({error})") from error
        if not isinstance(value, dict):
            raise UsageError(f'{where}: not an object such as {{"path": "a.jpg"}}')
        yield where, value


def _csv(
    table: Path, name: str, delimiter: str, paths: Sequence[str]
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    reader = csv.reader((line for _, line in _lines(table, name)), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    try:
        for cells in reader:
            where = f"{name}, line {reader.line_num}"
            if not any(cells):
                continue
            if header is None:
                header = [cell.strip() for cell in cells]
                _Roles.of(header, where, False, paths)
                continue
            if len(cells) != len(header):
                raise UsageError(f"{where}: {len(cells)} cells under {len(header)} column names")
            yield where, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise UsageError(f"{name}, line {reader.line_num}: {error}") from error


def _parquet(
    table: Path, name: str, paths: Sequence[str]
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(table) as file:
            columns = [field.name for field in file.schema_arrow if not bulky(field.type)]
            _Roles.of(columns, name, False, paths)
            number = 0
            for batch in file.iter_batches(BATCH, columns=columns):
                for cells in _cells(batch, name, number):
                    number += 1
                    yield f"{name}, row {number}", cells
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise UsageError(f"{name}: cannot be read ({first_line(error)})") from error


def _cells(batch: Any, name: str, before: int) -> list[dict[str, Any]]:
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        for index in range(batch.num_rows):
            try:
                batch.slice(index, 1).to_pylist()
            except UnicodeDecodeError as error:
                where = f"{name}, row {before + index + 1}"
                raise UsageError(f"{where}: not UTF-8 ({error.reason})") from error
        raise


def bulky(kind: Any) -> bool:
    """Whether a Parquet column is no text to ride along: bytes, vectors, and structs of them."""
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return any(bulky(field.type) for field in kind)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return pa.types.is_floating(kind.value_type) or bulky(kind.value_type)
    return (
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_fixed_size_binary(kind)
    )
