"""Tables with more text than one array can hold, held against Arrow's own ways on small ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from unimodal.pipeline import clips, large
from unimodal.pipeline.captioning.answers import captioned
from unimodal.pipeline.clips import read_parquet, write_parquet


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> pa.Table:
    """A table of 3,000 rows in six chunks, of which all is too much to be made one piece."""
    monkeypatch.setattr(large, "WHOLE", 0)
    monkeypatch.setattr(large, "SLICE", 10_000)
    rng = np.random.default_rng(0)
    texts = [
        None if n % 7 == 0 else [{"text": "x" * n, "n": n}] * (n % 3)
        for n in rng.integers(0, 40, 3000).tolist()
    ]
    names = [f"{n:05d}" for n in rng.integers(0, 500, 3000)]
    chunks = [
        pa.table({"name": names[at : at + 500], "said": texts[at : at + 500]})
        for at in range(0, 3000, 500)
    ]
    return pa.concat_tables(chunks)


def test_rows_are_those_that_arrow_takes(rows: pa.Table) -> None:
    rng = np.random.default_rng(1)
    some = pa.array(rng.integers(0, 3000, 2000), mask=rng.random(2000) < 0.1)
    found = large.take(rows, some)
    assert found.equals(rows.take(some)) and found["said"].num_chunks > 5
    assert large.take(rows, np.array([7, 7, 2999])).equals(rows.take([7, 7, 2999]))
    assert large.take(rows.slice(600, 9), pa.array([8, 0])).equals(rows.slice(600, 9).take([8, 0]))
    nothing = rows.slice(0, 0)
    assert large.take(rows, pa.array([], pa.int64())).equals(nothing)
    assert large.take(nothing, pa.array([None], pa.int64())).to_pylist() == [
        {"name": None, "said": None}
    ]


def test_rows_are_sorted_as_arrow_sorts_them(rows: pa.Table) -> None:
    assert large.sort_by(rows, ["name"]).equals(rows.sort_by("name"))  # equal ones in their order
    assert large.one_piece(rows) is rows


def test_rows_are_sorted_on_disk_and_mapped(
    rows: pa.Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(large, "BATCH", 700)
    file = tmp_path / "rows.arrow"
    large.write_sorted(
        [rows.slice(at, 300) for at in range(0, 3000, 300)], rows.schema, "name", file
    )
    found = large.mapped(file)
    file.unlink()
    assert found.equals(rows.sort_by("name")) and found["name"].num_chunks > 4
    large.write_sorted([], rows.schema, "name", file)
    assert large.mapped(file).equals(rows.slice(0, 0))
    assert list(tmp_path.iterdir()) == [file]
    with pytest.raises(pa.ArrowInvalid):
        large.write_sorted([rows, rows.select(["name"])], rows.schema, "name", file)


def test_many_rows_are_read_in_batches(
    rows: pa.Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_parquet(rows, tmp_path / "rows.parquet", {"of": "x"})
    whole = read_parquet(tmp_path / "rows.parquet")
    monkeypatch.setattr(clips, "BATCH", 999)
    found = read_parquet(tmp_path / "rows.parquet")
    assert found.equals(whole, check_metadata=True) and found["said"].num_chunks == 4
    assert read_parquet(tmp_path / "rows.parquet", ["said"]).equals(rows.select(["said"]))


def test_clips_with_a_caption_are_counted_in_every_chunk() -> None:
    said = [[{"text": "a"}], None, [], [{"text": ""}], [{"text": None}, {"text": "b"}]]
    kind = pa.list_(pa.struct([("text", pa.string())]))
    chunks = pa.chunked_array([pa.array(said, kind), pa.array([], kind), pa.array(said[3:], kind)])
    assert captioned(chunks).tolist() == [True, False, False, False, True, False, True]
    assert captioned(chunks.slice(4, 2)).tolist() == [True, False]
    assert captioned(pa.chunked_array([], kind)).tolist() == []
