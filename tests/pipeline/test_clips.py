"""What a clip is called, and how its rows are kept."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pyarrow.parquet as pq

from unimodal.pipeline.clips import CLIPS, WATCH, clip_uid, image_uid, table, write_parquet


def test_uid_follows_from_bytes_and_span_alone() -> None:
    base = clip_uid("ab", 0, 100, Fraction(1, 50))
    assert base == clip_uid("ab", 0, 100, Fraction(2, 100))
    others = [
        clip_uid("ac", 0, 100, Fraction(1, 50)),
        clip_uid("ab", 1, 100, Fraction(1, 50)),
        clip_uid("ab", 0, 101, Fraction(1, 50)),
        clip_uid("ab", 0, 100, Fraction(1, 25)),
        image_uid("ab"),
    ]
    assert len({base, *others}) == 6
    assert len(base) == 32


def test_equal_tables_give_equal_bytes(tmp_path: Path) -> None:
    row = {"uid": "a", "uri": "/x", "source_sha256": "s", "kind": "image", "width": 3}
    for name in ("one", "two"):
        write_parquet(table([row], WATCH), tmp_path / f"{name}.parquet", {"made_of": "x"})
    assert (tmp_path / "one.parquet").read_bytes() == (tmp_path / "two.parquet").read_bytes()
    read = pq.read_table(tmp_path / "one.parquet", schema=WATCH).to_pylist()[0]
    assert read["width"] == 3 and read["duration_s"] is None and read["samples"] is None


def test_the_view_has_every_column_of_the_design() -> None:
    promised = """uid uri aliases source_sha256 kind start_s end_s duration_s start_pts end_pts
        time_base width height fps frames codec crop_x0 crop_y0 crop_x1 crop_y1 captions meta
        verdict reasons"""
    assert set(promised.split()) <= set(CLIPS.names)
    assert [f.name for f in CLIPS.field("captions").type.value_type] == (
        ["style", "lang", "text", "start_s", "end_s", "model", "prompt_hash", "status"]
    )
