"""Captions that people wrote, and which clip they belong to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from unimodal.pipeline.caption import (
    Caption,
    find_sidecars,
    for_clip,
    read_given,
    read_sidecar,
)
from unimodal.pipeline.errors import UsageError

VTT = """WEBVTT - a title

NOTE nothing to see

1
00:00.000 --> 00:02.000 align:start
<v Ann>hello <b>there</b>

00:00:03.500 --> 00:00:06.000
a second
line
"""


def _texts(rows: list[dict[str, Any]]) -> list[str]:
    return [row["text"] for row in rows]


def test_sidecars_are_found_in_order_of_precedence(tmp_path: Path) -> None:
    names = ["cat.png", "cat.txt", "cat.json", "cat.png.txt", "dog.txt.png", "dog.txt", "x.md"]
    for name in names:
        (tmp_path / name).write_text("x")
    uris = [str(tmp_path / "cat.png"), str(tmp_path / "dog.txt.png"), str(tmp_path / "none.png")]
    found = find_sidecars(uris, ("json", "txt", "vtt"))
    assert [Path(p).name for p, _, _ in found[uris[0]]] == ["cat.json", "cat.png.txt", "cat.txt"]
    assert uris[1] not in found and uris[2] not in found


def test_every_shape_of_json_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for value, expected in [
        ("one", ["one"]),
        ({"caption": " one ", "other": 3}, ["one"]),
        ({"text": "one", "captions": ["two", {"text": "three", "style": "dense"}]}, None),
        ([{"caption": "one"}, "two"], ["one", "two"]),
        ({"caption": ""}, []),
    ]:
        path.write_text(json.dumps(value))
        texts = [caption.text for caption in read_sidecar(path)]
        assert texts == (expected if expected is not None else ["one", "two", "three"])
    path.write_text(json.dumps({"text": "one", "start_s": 10**400, "end_s": float("nan")}))
    assert read_sidecar(path) == [Caption("one")]
    path.write_text(json.dumps({"text": "one", "start_s": True, "end_s": 2}))
    assert read_sidecar(path) == [Caption("one", end_s=2.0)]
    path.write_text('{"caption": ')
    with pytest.raises(ValueError):
        read_sidecar(path)
    path.write_text("3")
    with pytest.raises(ValueError, match="expected a text"):
        read_sidecar(path)


def test_a_text_file_is_one_caption(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffa red kite\nover the sea\n".encode())
    assert read_sidecar(path) == [Caption("a red kite\nover the sea")]
    path.write_text("  \n")
    assert read_sidecar(path) == []


def test_cues_go_to_the_clip_that_holds_most_of_them(tmp_path: Path) -> None:
    path = tmp_path / "a.vtt"
    path.write_text(VTT)
    cues = read_sidecar(path)
    assert [(c.text, c.start_s, c.end_s) for c in cues] == [
        ("hello there", 0.0, 2.0),
        ("a second line", 3.5, 6.0),
    ]
    assert _texts(for_clip(cues, 0.0, 4.0)) == ["hello there"]
    (row,) = for_clip(cues, 1.0, 6.0)
    assert (row["text"], row["start_s"], row["end_s"]) == ("a second line", 2.5, 5.0)
    assert row["style"] == "subtitle"
    (both,) = for_clip(cues, 0.0, 10.0)
    assert both["text"] == "hello there a second line"
    assert both["end_s"] == 6.0


def test_cues_may_hold_what_the_format_escapes(tmp_path: Path) -> None:
    path = tmp_path / "a.vtt"
    path.write_text("WEBVTT\n\n00:00.000 --> 00:01.000\n<v Ann>Tom &amp; Jerry &lt;3</v>\n")
    assert [cue.text for cue in read_sidecar(path)] == ["Tom & Jerry <3"]


def test_the_first_of_equal_captions_stays() -> None:
    rows = for_clip([Caption("a"), Caption("b", "dense"), Caption("a", "later")], None, None)
    assert [(row["text"], row["style"]) for row in rows] == [("a", "sidecar"), ("b", "dense")]
    assert {row["status"] for row in rows} == {"ok"}


def test_a_table_of_captions_brings_its_other_columns_along(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    table = tmp_path / "captions.jsonl"
    rows = [
        {"path": "a.png", "caption": ["one", "two"], "lang": "en", "license": "CC0"},
        {"path": "/far/b.png", "caption": "three"},
    ]
    table.write_text("\n".join(json.dumps(row) for row in rows))
    given = read_given(table)
    mine = given.captions[str(tmp_path / "a.png")]
    assert [(c.text, c.style, c.lang) for c in mine] == [
        ("one", "given", "en"),
        ("two", "given", "en"),
    ]
    assert given.meta == {str(tmp_path / "a.png"): {"license": "CC0"}}
    assert given.captions["/far/b.png"][0].text == "three"

    sheet = tmp_path / "captions.csv"
    sheet.write_text('path,caption,style\na.png,"one, and more",short\n')
    (caption,) = read_given(sheet).captions[str(tmp_path / "a.png")]
    assert (caption.text, caption.style) == ("one, and more", "short")
    assert read_given(sheet).digest() != given.digest() == read_given(table).digest()


def test_a_table_without_the_columns_is_named(tmp_path: Path) -> None:
    table = tmp_path / "captions.csv"
    table.write_text("file,words\na.png,one\n")
    with pytest.raises(UsageError, match=r"line 2: no column of captions .* are: file, words"):
        read_given(table)
    with pytest.raises(UsageError, match="cannot be read"):
        read_given(tmp_path / "gone.jsonl")
