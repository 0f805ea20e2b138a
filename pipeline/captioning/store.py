"""What models answered, kept for good: one row per request, whatever `decide` says later.

    describe-…/journal.jsonl              answers as they come in; a killed run loses none of them
    describe-…/answers-00001-….parquet    the journal of a finished pass, never written again
    describe-…/prompt.json                what was asked, for people who look later

A request that was answered is never asked for again, unless it failed and a retry was ordered.
One writer: whoever holds the run's lock.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.compute as pc

from unimodal.pipeline import large
from unimodal.pipeline.captioning.answers import OK
from unimodal.pipeline.clips import CAPTION, read_parquet, table, write_parquet
from unimodal.pipeline.files import atomic

ANSWERS = pa.schema(
    [
        pa.field("uid", pa.string(), nullable=False),
        pa.field("piece", pa.int32(), nullable=False),
        pa.field("status", pa.string(), nullable=False),  # ok, or what was wrong first
        pa.field("detail", pa.string()),  # of a failure
        pa.field("captions", pa.list_(CAPTION)),  # one per style, each with its own status
        pa.field("tries", pa.int32()),  # times that the model was asked
        pa.field("repeats", pa.int32()),  # times that a request was sent again on the way
        pa.field("prompt_tokens", pa.int64()),  # of all tries
        pa.field("output_tokens", pa.int64()),
        pa.field("seconds", pa.float64()),  # from the first question to the last answer
    ]
)

FLUSH_S = 5.0
"""A power cut loses the answers of so many seconds; a kill loses none."""
MODULUS = 2**96
FILES = 16
"""Parquet files above which they are made one."""


class Store:
    """The answers in one stage folder, in memory by request: status alone, texts on demand.

    With `write` (and the run's lock held) it first makes Parquet of what a killed run left.
    """

    def __init__(self, folder: Path, write: bool = False) -> None:
        self.folder = folder
        self._journal: IO[bytes] | None = None
        self._synced = 0.0
        self.statuses: dict[tuple[str, int], str] = {}
        if write:
            self.merge()
        for file in self.files():
            found = read_parquet(file, columns=["uid", "piece", "status"]).to_pylist()
            for row in found:
                key = row["uid"], row["piece"]
                if self.statuses.get(key) != OK:
                    self.statuses[key] = row["status"]

    def files(self) -> list[Path]:
        """The finished files, the oldest first."""
        return sorted(self.folder.glob("answers-*.parquet"))

    @property
    def state(self) -> str:
        """Digest of all that was answered before the journal, in however many passes; "" if
        nothing was. Failures that were answered later count until many files become one."""
        sums = [int(file.stem.split("-")[2], 16) for file in self.files()]
        return f"{sum(sums) % MODULUS:024x}" if sums else ""

    def add(self, row: Mapping[str, Any]) -> None:
        """Keep an answer at once; raises `OSError` if it cannot be written."""
        if self._journal is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._journal = (self.folder / "journal.jsonl").open("ab")
        self._journal.write(json.dumps(dict(row), ensure_ascii=True).encode() + b"\n")
        self._journal.flush()
        if time.monotonic() - self._synced > FLUSH_S:
            os.fsync(self._journal.fileno())
            self._synced = time.monotonic()
        key = row["uid"], row["piece"]
        if self.statuses.get(key) != OK:
            self.statuses[key] = row["status"]

    def merge(self) -> None:
        """Make Parquet of the journal, and one file of many; harmless at any moment it is cut."""
        if self._journal is not None:
            self._journal.close()
            self._journal = None
        journal = self.folder / "journal.jsonl"
        if journal.exists():
            self._write(_best(_lines(journal)))
            journal.unlink()
        files = self.files()
        if len(files) > FILES:
            self._write(_best(row for file in files for row in read_parquet(file).to_pylist()))
            for file in files:
                file.unlink()

    def rows(self, columns: list[str] | None = None) -> pa.Table:
        """All answers, one row per request, sorted by uid and piece."""
        found = pa.concat_tables([ANSWERS.empty_table(), *map(read_parquet, self.files())])
        order = pa.table(
            {
                "uid": found.column("uid"),
                "piece": found.column("piece"),
                "worse": pc.not_equal(found.column("status"), OK),
                "age": pa.array(range(found.num_rows, 0, -1), pa.int64()),
            }
        )
        keys = [(name, "ascending") for name in ("uid", "piece", "worse", "age")]
        found = large.take(found, pc.sort_indices(order, sort_keys=keys))
        uid, piece = found.column("uid").combine_chunks(), found.column("piece").combine_chunks()
        if found.num_rows > 1:
            same = pc.and_(pc.equal(uid[1:], uid[:-1]), pc.equal(piece[1:], piece[:-1]))
            found = found.filter(pa.concat_arrays([pa.array([True]), pc.invert(same)]))
        return found if columns is None else found.select(columns)

    def note(self, asked: Mapping[str, Any]) -> None:
        """Write down what is asked, once."""
        file = self.folder / "prompt.json"
        if not file.exists():
            with atomic(file) as temporary:
                text = json.dumps(dict(asked), indent=1, ensure_ascii=False)
                temporary.write_text(text + "\n", encoding="utf-8")

    def asked(self) -> dict[str, Any]:
        """What `note` wrote down; empty if nothing was asked yet."""
        file = self.folder / "prompt.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}

    def totals(self) -> dict[str, Any]:
        """What it took, over all passes."""
        rows = self.rows()
        sums = {
            name: int(pc.sum(rows.column(name)).as_py() or 0)
            for name in ("tries", "repeats", "prompt_tokens", "output_tokens")
        }
        statuses = Counter(rows.column("status").to_pylist())
        answered = statuses.pop(OK, 0)
        return {
            "requests": rows.num_rows,
            "answered": answered,
            "failed": dict(sorted(statuses.items(), key=lambda item: (-item[1], item[0]))),
            **sums,
        }

    def _write(self, rows: list[dict[str, Any]]) -> None:
        if not rows:
            return
        last = max((int(file.name.split("-")[1]) for file in self.files()), default=0)
        path = self.folder / f"answers-{last + 1:05d}-{_sum(rows):024x}.parquet"
        write_parquet(table(rows, ANSWERS), path)


def _sum(rows: Iterable[Mapping[str, Any]]) -> int:
    """Sum of the rows' hashes, which is the same however they are spread over files. What asking
    took, in seconds and in requests that were sent again, is no part of it."""
    total = 0
    for row in rows:
        told = {name: row[name] for name in row.keys() - {"seconds", "repeats"}}
        total += int(hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:24], 16)
    return total % MODULUS


def _best(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per request, in order: a good one if there is one, else the latest."""
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for row in rows:
        key = row["uid"], row["piece"]
        if key not in found or found[key]["status"] != OK:
            found[key] = row
    return [found[key] for key in sorted(found)]


def _lines(journal: Path) -> Iterable[dict[str, Any]]:
    with journal.open("rb") as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:  # a run was killed while it wrote this
                continue
            if isinstance(row, dict) and {"uid", "piece", "status"} <= row.keys():
                yield row
