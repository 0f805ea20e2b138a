"""Documents from files: texts, questions and answers, interleaved pictures and texts, edits.

    .txt                      texts: a file, a paragraph or a line is a document (text_by)
    .jsonl .ndjson .json      rows are objects, a line each or in one array
    .parquet                  rows

What the rows of a file are follows from the keys of its first one:

    {"text": …}                                               text (text_column)
    {"image": path, "conversations": [{"from", "value"}, …]}  chat, LLaVA's form
    {"content": ["words", {"image": path}, …]}                interleaved
    {"source": path, "instruction": …, "result": path}        edit

Files are read as streams: a unit of work is a stretch of them, by bytes or by rows, and is read
again by who does it. docs/documents.md describes the formats.
"""

from __future__ import annotations

import codecs
import glob
import hashlib
import io
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import TypeAdapter

from unimodal.pipeline import tables
from unimodal.pipeline.errors import MediaError, UsageError, first_line
from unimodal.tokenize.plan import TokenizeSettings
from unimodal.tokenize.rows import STEP, records
from unimodal.tokenize.shard import INDEX

if TYPE_CHECKING:
    import pyarrow.parquet as pq

FORMATS = {".txt": "txt", ".jsonl": "lines", ".ndjson": "lines", ".json": "array"}
FORMATS |= {".parquet": "parquet"}
KEYS = {
    "chat": ("conversations",),
    "interleaved": ("content",),
    "edit": ("source", "instruction", "result"),
}
"""Keys by which the rows of a task are known; those of texts have the text column alone."""
SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}

TEXTS = 64
"""A shard holds so many times `shard_size` samples of text, which are small and quickly done."""
MAX_UNIT_BYTES = 64 << 20
"""A unit of rows is closed at this size, however few they are."""


@dataclass(frozen=True)
class Corpus:
    """A file, and what its rows are."""

    path: str
    format: str
    """txt | lines | array | parquet"""
    task: str
    numbers: tuple[str, ...] = ()
    """Columns of numbers, which ride along into the index."""


@dataclass(frozen=True)
class Span:
    """A stretch of a file."""

    corpus: Corpus
    start: int
    """In bytes, or rows of a Parquet file; the end is exclusive."""
    end: int
    number: int
    """Of its first row, counted over all files from 0."""
    rows: int
    """At most so many are read."""
    row: int
    """Of its first row in the file, from 1: a line, where the format has lines."""
    content: str
    """Digest of what is in it."""


@dataclass(frozen=True)
class RowUnit:
    """The work for one shard of documents."""

    number: int
    spans: list[Span]
    unfit: list[dict[str, str]] = field(default_factory=list)
    """Rows {uri, reason} known beforehand to give no sample: none, rows are looked at later."""

    @property
    def clips(self) -> int:
        """Rows that are looked at."""
        return sum(span.rows for span in self.spans)

    @property
    def pictures(self) -> bool:
        """Whether there may be pictures to encode."""
        return self.spans[0].corpus.task != "text"

    def digest(self, header: Mapping[str, Any]) -> str:
        """Names the result: all that the shard's bytes depend on, but for the pictures."""
        facts = [(s.content, s.number, s.rows, s.corpus.task, s.corpus.numbers) for s in self.spans]
        return hashlib.sha256(json.dumps([header, facts], sort_keys=True).encode()).hexdigest()

    def facts(self) -> dict[str, Any]:
        """What a worker needs to know, for `RowUnit.of`."""
        return {"spans": [asdict(span) for span in self.spans]}

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> RowUnit:
        """What `facts` told."""
        return cls(facts["number"], TypeAdapter(list[Span]).validate_python(facts["spans"]))


@dataclass(frozen=True)
class Draft:
    """A document before its pictures are read."""

    where: str
    """File and row, for messages."""
    key: str
    task: str
    pieces: list[tuple[str, str, str]] = field(default_factory=list)
    """Kind (text or image), role, and the text or the picture's uri."""
    scores: dict[str, float | None] = field(default_factory=dict)
    meta: dict[str, str] = field(default_factory=dict)
    problem: str = ""
    """Why the row is no document."""


def find_corpora(things: Sequence[str | Path], settings: TokenizeSettings) -> list[Corpus]:
    """What the files named by `things` (paths or globs) hold, in this order.

    Raises `UsageError` for a file that is none, saying what it holds and what was wanted.
    """
    paths: dict[str, None] = {}
    for thing in map(str, things):
        found = [thing] if Path(thing).exists() else sorted(glob.glob(thing, recursive=True))  # noqa: PTH207
        if not found:
            raise UsageError(
                f"{thing}: no such file; tokenize takes a run of unimodal curate, or files of "
                f"texts or documents ({', '.join(FORMATS)})"
            )
        paths |= dict.fromkeys(os.path.abspath(path) for path in found)  # noqa: PTH100
    return [_recognise(Path(path), settings) for path in paths]


def _recognise(path: Path, settings: TokenizeSettings) -> Corpus:
    form = FORMATS.get(path.suffix.lower())
    if path.is_dir():
        raise UsageError(f"{path}: with several inputs each must be a file of texts or documents")
    if form is None:
        raise UsageError(
            f"{path}: not a file of texts or documents (one ends in {', '.join(FORMATS)}); media "
            "go through unimodal curate first"
        )
    try:
        if form == "txt":
            with path.open("rb") as file:
                codecs.getincrementaldecoder("utf-8")().decode(file.read(STEP))
            return Corpus(str(path), form, "text")
        first = next(_first_rows(path, form), None)
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: cannot be read as {path.suffix} ({error})") from error
    if not isinstance(first, dict):
        raise UsageError(f"{path}: holds no row that is an object; see docs/documents.md")
    fitting = [task for task, names in KEYS.items() if set(names) <= first.keys()]
    task = fitting[0] if fitting else "text"
    names = KEYS.get(task, (settings.text_column,))
    if settings.text_column not in first and task == "text":
        raise UsageError(
            f"{path}: its rows are neither texts (key {settings.text_column}; another: --set "
            "text_column=…), chats (conversations), interleaved documents (content) nor edits "
            f"(source, instruction, result): the first has {', '.join(map(str, first)) or 'no key'}"
        )
    numbers = {
        tables.clean(name).lower(): tables.clean(name)
        for name, value in reversed(first.items())
        if isinstance(value, int | float) and not isinstance(value, bool)
        if name not in names and not name.startswith("__")
    }
    for own in (*INDEX.names, "id"):  # SQL knows no case; what is left out stays in the metadata
        numbers.pop(own, None)
    return Corpus(str(path), form, task, tuple(sorted(numbers.values())))


def _first_rows(path: Path, form: str) -> Iterator[Any]:
    if form == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches(1, columns=_columns(file)):
                    yield from batch.to_pylist()
        except pa.ArrowException as error:
            raise ValueError(first_line(error)) from error
        return
    with path.open("rb") as file:
        for _, _, data in records(file, form, "", 0):
            yield json.loads(data.decode("utf-8-sig"))


def _columns(file: pq.ParquetFile) -> list[str]:
    return [column.name for column in file.schema_arrow if not tables.bulky(column.type)]


def row_units(
    corpora: Iterable[Corpus], settings: TokenizeSettings, limit: int | None = None
) -> Iterator[RowUnit]:
    """The work, shard by shard; only rows of one task share a shard. Every byte is read once."""
    todo: list[Span] = []
    number = rows = held = size = 0

    for corpus in corpora:
        if limit is not None and rows >= limit:
            break
        most = settings.shard_size * (TEXTS if corpus.task == "text" else 1)
        for span, weight in _spans(corpus, settings, most, rows):
            if limit is not None and span.number + span.rows > limit:
                span = replace(span, rows=limit - span.number)
            if span.rows < 1:
                break
            full = held + span.rows > most or size + weight > MAX_UNIT_BYTES
            if todo and (full or todo[0].corpus.task != corpus.task):
                yield RowUnit(number, todo)
                number, todo, held, size = number + 1, [], 0, 0
            todo.append(span)
            rows = span.number + span.rows
            held, size = held + span.rows, size + weight
    if todo:
        yield RowUnit(number, todo)


def _spans(
    corpus: Corpus, settings: TokenizeSettings, most: int, number: int
) -> Iterator[tuple[Span, int]]:
    """Stretches of a file, of at most `most` rows and about `MAX_UNIT_BYTES`; and their bytes."""
    try:
        spans = _parquet_spans if corpus.format == "parquet" else _byte_spans
        yield from spans(corpus, settings, most, number)
    except (OSError, ValueError) as error:
        raise UsageError(f"{corpus.path}: cannot be read ({error})") from error


def _byte_spans(
    corpus: Corpus, settings: TokenizeSettings, most: int, number: int
) -> Iterator[tuple[Span, int]]:
    with Path(corpus.path).open("rb") as file:
        start = end = rows = first = 0
        state = hashlib.sha256()
        for at, line, data in records(file, corpus.format, settings.text_by, 0):
            if rows and (rows >= most or at + len(data) - start > MAX_UNIT_BYTES):
                yield Span(corpus, start, end, number, rows, first, state.hexdigest()), end - start
                number, rows, state = number + rows, 0, hashlib.sha256()
            if not rows:
                start, first = at, line
            state.update(b"%d:" % len(data))
            state.update(data)
            rows, end = rows + 1, at + len(data)
        if rows:
            yield Span(corpus, start, end, number, rows, first, state.hexdigest()), end - start


def _parquet_spans(
    corpus: Corpus, settings: TokenizeSettings, most: int, number: int
) -> Iterator[tuple[Span, int]]:
    import pyarrow.parquet as pq

    from unimodal.pipeline.inputs import sha256_of

    content = sha256_of(corpus.path)
    with pq.ParquetFile(corpus.path) as file:
        groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
        at = 0
        for group in groups:
            each = max(1, group.total_byte_size // max(1, group.num_rows))
            step = max(1, min(most, MAX_UNIT_BYTES // each))
            for start in range(0, group.num_rows, step):
                rows = min(step, group.num_rows - start)
                span = Span(corpus, at, at + rows, number, rows, at + 1, f"{content}@{at}")
                yield span, rows * each
                number, at = number + rows, at + rows


def drafts(unit: RowUnit, settings: TokenizeSettings) -> Iterator[Draft]:
    """Rows of a unit as documents to be, one for each row that the plan counted.

    Raises `UnimodalError` if a file is not as it was.
    """
    for span in unit.spans:
        base = settings.images or str(Path(span.corpus.path).parent)
        count = 0
        for row, value in _rows(span, settings):
            if count == span.rows:
                break
            yield _draft(span, row, span.number + count, value, settings, base)
            count += 1
        if count != span.rows:
            raise UsageError(
                f"{span.corpus.path} has changed since it was planned: run the same command again"
            )


def _rows(span: Span, settings: TokenizeSettings) -> Iterator[tuple[int, Any]]:
    """Number in the file, and value, of each row; a value that cannot be read is an exception."""
    corpus = span.corpus
    if corpus.format == "parquet":
        yield from _parquet_rows(span)
        return
    with Path(corpus.path).open("rb") as file:
        file.seek(span.start)
        part = io.BytesIO(file.read(span.end - span.start))
    for _, row, data in records(part, corpus.format, settings.text_by, 1):
        try:
            text = data.decode("utf-8-sig")
            said = {settings.text_column: text.strip("\r\n")}
            value = said if corpus.format == "txt" else json.loads(text)
        except (ValueError, RecursionError) as error:
            value = error
        yield span.row + row - 1, value


def _parquet_rows(span: Span) -> Iterator[tuple[int, Any]]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(span.corpus.path) as file:
        rows = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        starts = np.cumsum([0, *rows])
        group = int(np.searchsorted(starts, span.start, "right")) - 1  # it lies in one
        if group == len(rows):
            return
        position = int(starts[group])
        for batch in file.iter_batches(256, [group], _columns(file)):
            start, end = max(span.start - position, 0), min(span.end - position, len(batch))
            for i in range(start, end):
                try:
                    yield position + i + 1, batch.slice(i, 1).to_pylist()[0]
                except UnicodeDecodeError as error:
                    yield position + i + 1, error
            position += len(batch)


def _draft(
    span: Span, row: int, number: int, value: Any, settings: TokenizeSettings, base: str
) -> Draft:
    corpus = span.corpus
    name = "line" if corpus.format == "lines" else "row"
    where = f"{corpus.path}, {name} {row}"
    try:
        if isinstance(value, Exception):
            form = "UTF-8" if isinstance(value, UnicodeError) else "JSON"
            raise ValueError(f"not {form}: {value}")
        if not isinstance(value, dict):
            raise ValueError("not an object")
        said = list(_pieces(corpus.task, value, settings))
        if not said:
            raise ValueError("nothing is in it")
        written = json.dumps([corpus.task, said]).encode()
        pieces = [(k, role, _uri(v, base) if k == "image" else v) for k, role, v in said]
        known = {settings.text_column, "image", *corpus.numbers, *KEYS.get(corpus.task, ())}
        cells = {tables.clean(str(name)): cell for name, cell in value.items()}
        meta = {name: tables.as_text(cell) for name, cell in cells.items() if name not in known}
    except (ValueError, RecursionError) as error:
        return Draft(where, "", corpus.task, problem=str(error)[:500])
    return Draft(
        where,
        f"{hashlib.sha256(written).hexdigest()[:32]}-{number:09d}",
        corpus.task,
        pieces,
        {name: finite(cells.get(name)) for name in corpus.numbers},
        {name: text for name, text in meta.items() if text},
    )


def _pieces(
    task: str, row: Mapping[str, Any], settings: TokenizeSettings
) -> Iterator[tuple[str, str, str]]:
    """Kind, role, and text or path of each piece; raises `ValueError` for what is none."""
    if task == "text":
        yield "text", "text", _text(row.get(settings.text_column), settings.text_column)
    elif task == "chat":
        yield from _turns(row)
    elif task == "edit":
        for path in _list(row.get("source")):
            yield "image", "source", _path(path, "source")
        yield "text", "instruction", _text(row.get("instruction"), "instruction")
        yield "image", "result", _path(row.get("result"), "result")
    else:
        for item in _list(row.get("content")):
            told = item if isinstance(item, dict) else {"text": item}
            if told.get("image") is not None:
                yield "image", "text", _path(told["image"], "image")
            elif told.get("text") != "":
                yield "text", "text", _text(told.get("text"), "text")


def _turns(row: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """A conversation of LLaVA's: <image> stands for the next of the row's pictures."""
    images = [_path(path, "image") for path in _list(row.get("image"))]
    turns = [turn for turn in _list(row.get("conversations")) if isinstance(turn, dict)]
    roles = [SPEAKERS.get(str(turn.get("from"))) for turn in turns]
    if not turns or roles != ["user", "assistant"] * (len(turns) // 2):
        said = ", ".join(str(turn.get("from")) for turn in turns) or "nobody"
        raise ValueError(f"its conversations are not human and gpt in turn, but {said:.100}")
    values = [_text(turn.get("value"), "value") for turn in turns]
    places = sum(value.count("<image>") for value in values)
    if images and not places:
        values[0], places = "<image>" * len(images) + values[0], len(images)
    if places != len(images):
        raise ValueError(f"{places} <image> in its conversations for {len(images)} pictures")
    rest = iter(images)
    for role, value in zip(roles, values, strict=True):
        for number, text in enumerate(value.split("<image>")):
            if number:
                yield "image", str(role), next(rest)
            if text := text.strip("\n"):
                yield "text", str(role), text


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name} is no text: {value!r:.60}")
    return tables.clean(value)


def _path(value: Any, name: str) -> str:
    if not isinstance(value, str) or not value or "\0" in value or tables.clean(value) != value:
        raise ValueError(f"{name} is no path: {value!r:.60}")
    return value


def _uri(path: str, base: str) -> str:
    try:
        return tables.absolute(path, base)
    except (OSError, MediaError) as error:
        raise ValueError(f"{path}: {error}") from error


def finite(value: Any) -> float | None:
    """A number as the index has it: None for what is none, or is not finite."""
    try:
        number = float(value) if isinstance(value, int | float) else math.nan
    except OverflowError:
        return None
    return number if math.isfinite(number) else None
