"""Tables of media: every kind says the same, and what is wrong is named by file and line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unimodal.pipeline import tables
from unimodal.pipeline.errors import UsageError

ROWS: list[dict[str, Any]] = [
    {"file_name": "cats/1.jpg", "text": "a cat, asleep", "lang": "en", "license": "CC0"},
    {"file_name": "ütf/2 b.jpg", "text": 'say "hi"\nand go', "lang": "", "license": ""},
    {"file_name": "s3://bucket/3.mp4", "text": "", "lang": "de", "license": "BSD"},
]


def _write(path: Path, rows: list[dict[str, Any]]) -> Path:
    import csv

    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    elif path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(
                file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ","
            )
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".ndjson", ".parquet", ".CSV"])
def test_every_kind_of_table_says_the_same(tmp_path: Path, suffix: str) -> None:
    table = _write(tmp_path / f"media{suffix.lower()}", ROWS).rename(tmp_path / f"media{suffix}")
    rows = list(tables.read_rows(table))
    assert [row.path for row in rows] == ["cats/1.jpg", "ütf/2 b.jpg", "s3://bucket/3.mp4"]
    assert [row.texts for row in rows] == [("a cat, asleep",), ('say "hi"\nand go',), ()]
    assert [row.lang for row in rows] == ["en", None, "de"]
    assert [row.meta for row in rows] == [{"license": "CC0"}, {}, {"license": "BSD"}]
    # Lines of the file, of which a quoted cell may take several; rows of Parquet.
    last = {".csv": 5, ".tsv": 5, ".jsonl": 3, ".ndjson": 3, ".parquet": 3}[suffix.lower()]
    assert rows[-1].where.endswith(f" {last}")


def test_a_list_file_has_a_path_a_line(tmp_path: Path) -> None:
    table = tmp_path / "all.lst"
    table.write_bytes("\ufeff# two pictures\r\n a b.jpg \r\n\r\n  # done\r\n./#1.png".encode())
    rows = list(tables.read_rows(table))
    assert [row.path for row in rows] == ["a b.jpg", "./#1.png"]
    assert rows[0].where == f"{table}, line 2" and rows[1].where == f"{table}, line 5"


def test_the_first_recognised_column_counts_in_any_case_of_letters(tmp_path: Path) -> None:
    row = {"TEXT": "t", "URL": "u.png", "Image": "i.png", "caption": "c", "Style": "short", "n": 3}
    (found,) = tables.read_rows(_write(tmp_path / "a.jsonl", [row]))
    assert (found.path, found.texts, found.style) == ("u.png", ("c",), "short")
    assert found.meta == {"TEXT": "t", "Image": "i.png", "n": "3"}


def test_cells_that_are_no_text_ride_along_as_json_and_bulk_stays_behind(tmp_path: Path) -> None:
    rows = [
        {
            "path": "a.png",
            "captions": ["one", None, " two "],
            "tags": ["x", "y"],
            "seen": True,
            "size": {"w": 1},
            "none": None,
            "thumb": b"\x89PNG",
            "vector": [0.5, 0.25],
        }
    ]
    (row,) = tables.read_rows(_write(tmp_path / "a.parquet", rows))
    assert row.texts == ("one", "two")
    assert row.meta == {"tags": '["x", "y"]', "seen": "true", "size": '{"w": 1}'}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", b"path,caption\na.png,x\nb\xff.png,y\n", "line 3: not UTF-8 .byte 0xff at col"),
        ("a.txt", b"a.png\nb\xff.png\n", "line 2: not UTF-8"),
        ("a.csv", b"file,words,n\n", None),
        ("a.csv", b"words,n\nx,1\n", "line 1: no column of paths .* its columns are: words, n"),
        ("a.csv", b"path,n\na.png,1\nb.png\n", "line 3: 1 cells under 2 column names"),
        ("a.csv", b"path,n\na.png,1\n,2\n", "line 3: path is no path: ''"),
        ("a.csv", b'path,n\na.png,"' + b"x" * 200_000 + b'"\n', "line 2: field larger"),
        ("a.jsonl", b'{"path": "a.png"}\n\n{"path": ', "line 3: not JSON"),
        ("a.jsonl", b"[" * 100_000, "line 1: not JSON"),
        ("a.jsonl", b'["a.png"]\n', "line 1: not an object"),
        ("a.jsonl", b'{"path": "a.png"}\n{"name": "b.png"}\n', "line 2: no column of paths"),
        ("a.jsonl", b'{"path": 7}\n', "line 1: path is no path: 7"),
        ("a.jsonl", b'{"path": "a\\u0000b"}\n', "line 1: path is no path"),
        ("a.jsonl", b'{"path": "\\ud800"}\n', "line 1: path is no path"),
        ("a.jsonl", b'{"path": "a", "text": {"en": 1}}', "line 1: text is neither a text nor"),
        ("a.parquet", b"PAR1 is not enough", ": cannot be read"),
        ("a.md", b"a.png\n", "not a table"),
    ],
)
def test_what_is_wrong_is_named_by_file_and_line(
    tmp_path: Path, name: str, content: bytes, words: str | None
) -> None:
    table = tmp_path / name
    table.write_bytes(content)
    if words is None:  # a header alone is a table without rows
        assert list(tables.read_rows(table)) == []
        return
    with pytest.raises(UsageError, match=f"{name}.*{words}"):
        list(tables.read_rows(table))


def test_a_parquet_row_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    raw = pa.array([b"a.png", b"b.png", b"c\xff.png"], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 3, raw.buffers())  # as other writers leave it
    table = tmp_path / "a.parquet"
    pq.write_table(pa.table({"path": text}), table)
    with pytest.raises(UsageError, match=r"a.parquet, row 3: not UTF-8"):
        list(tables.read_rows(table))


def test_a_table_that_is_missing_or_without_captions_says_so(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"gone.csv: cannot be read \(No such file"):
        list(tables.read_rows(tmp_path / "gone.csv"))
    table = _write(tmp_path / "a.jsonl", [{"path": "a.png", "license": "CC0"}])
    assert len(list(tables.read_rows(table))) == 1
    with pytest.raises(UsageError, match=r"line 1: no column of captions .* are: path, license"):
        list(tables.read_rows(table, captions=True))


def test_a_line_without_end_is_not_read_into_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "LONGEST_LINE", 1000)
    table = tmp_path / "film.txt"
    table.write_bytes(b"a.png\n" + b"x" * 5000)
    with pytest.raises(UsageError, match="line 2: longer than 1000 bytes"):
        list(tables.read_rows(table))


def test_a_large_parquet_file_is_never_whole_in_memory(tmp_path: Path) -> None:
    import tracemalloc

    count = 50_000
    table = tmp_path / "large.parquet"
    texts = [f"caption number {i}" for i in range(count)]
    pq.write_table(pa.table({"path": [f"{i}.png" for i in range(count)], "text": texts}), table)
    rows = tables.read_rows(table)
    next(rows)
    del texts
    tracemalloc.start()
    assert sum(1 for _ in rows) == count - 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6 << 20  # all rows as dictionaries take more than 20 MiB


def test_relative_paths_are_the_tables_then_the_callers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    for place in ("here", "there"):
        (tmp_path / place / "both.png").write_bytes(b"x")
    (tmp_path / "here" / "mine.png").write_bytes(b"x")
    (tmp_path / "there" / "x.tar").write_bytes(b"x")
    monkeypatch.chdir(tmp_path / "here")
    base = str(tmp_path / "there")
    for path, expected in [
        ("both.png", f"{base}/both.png"),
        ("mine.png", f"{tmp_path}/here/mine.png"),
        ("none.png", f"{tmp_path}/here/none.png"),
        ("x.tar#../a.png", f"{base}/x.tar#../a.png"),
        ("../there/x.tar#a.png", f"{base}/x.tar#a.png"),
        ("S3A://bucket/a//b.png", "s3://bucket/a//b.png"),
        (f"{base}/both.png", f"{base}/both.png"),
    ]:
        assert tables.absolute(path, base) == expected
    assert tables.absolute("a.png", "s3://bucket/sets") == "s3://bucket/sets/a.png"


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(), st.lists, max_leaves=5
)


@given(st.lists(st.dictionaries(st.sampled_from([*"abc", "path", "text", "lang"]), JSON)))
def test_any_json_lines_give_rows_that_a_table_can_hold_or_a_usage_error(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]
) -> None:
    table = tmp_path_factory.getbasetemp() / f"any{os.getpid()}.jsonl"
    table.write_text("\n".join(json.dumps(row) for row in rows))
    try:
        for row in tables.read_rows(table):
            kept = [row.path, *row.texts, row.style, row.lang, *row.meta, *row.meta.values()]
            pa.array(kept, pa.string())
    except UsageError as error:
        assert str(table) in str(error)


def test_a_quote_that_is_never_closed_swallows_no_rows_in_silence(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text('path,caption\na.png,"a cat\nb.png,x\nc.png,y\n')
    with pytest.raises(UsageError, match=r"t\.csv, line \d+: unexpected end of data"):
        list(tables.read_rows(table))
