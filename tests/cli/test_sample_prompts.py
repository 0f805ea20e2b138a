"""What is asked: command line, files of prompts, sizes; and what is wrong with them."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from unimodal.cli.prompts import Item, Request, read_prompts, request, requests
from unimodal.pipeline.errors import UsageError


def _prompts(items: list[Item]) -> list[tuple[int, str]]:
    return [(item.number, item.request.prompt) for item in items]


@pytest.mark.parametrize(
    ("ratio", "area", "grid"),
    [  # EMU3.md's table, height first; transposes swap
        ("1:1", 518400, (90, 90)),
        ("4:3", 518400, (78, 104)),
        ("16:9", 518400, (68, 120)),
        ("3:2", 518400, (73, 110)),
        ("9:16", 518400, (120, 68)),
        ("1:1", 262144, (64, 64)),
        ("4:3", 262144, (55, 74)),
        ("16:9", 262144, (48, 85)),
        ("3:2", 262144, (52, 78)),
        ("1:1", 1048576, (128, 128)),
        ("1:1", 8 * 8 * 2 * 2 + 8 * 8 * 2 + 16, (2, 2)),  # 2.5 codes: halves to even
    ],
)
def test_the_grid_of_a_ratio_is_that_of_emu3(ratio: str, area: int, grid: tuple[int, int]) -> None:
    asked = request({"ratio": ratio, "area": area})
    assert asked.pixels(lambda: (0, 0)) == (grid[0] * 8, grid[1] * 8)


def test_half_a_size_is_completed_by_what_training_saw() -> None:
    assert request({}).pixels(lambda: (64, 128)) is None
    assert request({"area": 4 * 64 * 128}).pixels(lambda: (64, 128)) == (128, 256)
    assert request({"ratio": "1:2"}).pixels(lambda: (64, 128)) == (128, 64)
    assert request({"size": "16x24"}).pixels(lambda: (64, 128)) == (16, 24)
    assert request({"size": "free"}).pixels(lambda: (64, 128)) == "free"


@pytest.mark.parametrize(
    ("fields", "direction", "suffix"),
    [
        ({"prompt": "a"}, "image", "png"),
        ({"prompt": "a", "format": "webp"}, "image", "webp"),
        ({"prompt": "a", "frames": 8}, "video", "mp4"),
        ({"continue": "a.mp4", "format": "gif"}, "continue", "gif"),
        ({"edit": "a.png", "prompt": "red"}, "edit", "png"),
        ({"describe": "a.png"}, "describe", "txt"),
        ({"describe": ["a.png", "b.png"], "ask": "which?"}, "ask", "txt"),
        ({"document": "a.json"}, "document", "png"),
        ({"prompt": "a", "format": "text"}, "text", "txt"),
    ],
)
def test_fields_say_the_direction(fields: dict[str, Any], direction: str, suffix: str) -> None:
    asked = request(fields)
    assert (asked.direction, asked.suffix) == (direction, suffix)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"guidance": 0}, "guidance = 0: Input should be greater than 0"),
        ({"guidance": float("nan")}, "guidance"),
        ({"temperature": -1}, "temperature = -1: Input should be greater than 0"),
        ({"frames": 6}, "frames 6 must be a multiple of 4: try 8"),
        ({"size": "12"}, "write height x width in pixels"),
        ({"size": "20x16"}, "both sides must be multiples of 8: try 16x16"),
        ({"size": "16x16", "ratio": "1:1"}, "leave out --ratio and --area"),
        ({"ratio": "0:1"}, "write width : height"),
        ({"ratio": "wide"}, "write width : height"),
        ({"n": 0}, "n = 0"),
        ({"frames": 8, "size": "free"}, "a clip needs a size"),
        ({"format": "mp4"}, "a picture is png or webp; for a clip say how many --frames"),
        ({"format": "bmp"}, "png, webp, mp4, gif or text"),
        ({"frames": 4, "format": "png"}, "a clip is mp4 or gif or webp"),
        ({"describe": "a.png", "n": 2}, "--describe takes no"),
        ({"describe": "a.png", "edit": "b.png"}, "are different things to ask"),
        ({"ask": "what?"}, "--ask TEXT FILE"),
        ({"edit": "a.png"}, "takes an instruction"),
        ({"edit": "a.png", "prompt": "x", "negative": "y"}, "an edit is led away from the picture"),
        ({"document": "a.json", "negative": "y"}, "a document is led away from its pictures"),
        ({"describe": "a.png", "text": {"temperature": 2}}, "takes no --set text.…; without text."),
        ({"ask": "w?", "describe": "a.png", "size": "8x8"}, "--ask takes no --size"),
        ({"fps": 8, "overlap": 4}, "a picture takes no --set fps, --set overlap; for a clip"),
        ({"image_guidance": 2}, "a picture takes no --set image_guidance"),
        ({"images": 2}, "a picture takes no --set images"),
        ({"max_tokens": 5}, "a picture takes no --set max_tokens"),
        ({"frames": 8, "overlap": 4}, "a clip takes no --set overlap"),
        ({"continue": "a.mp4", "size": "8x8"}, "--continue takes no --size; the clip keeps its"),
        ({"format": "text", "plausible": 0.1}, "--format text takes no --set plausible"),
        ({"temperature": 0}, "temperature = 0: Input should be greater than 0; it is of words al"),
        ({"describe": "a.png", "temperature": -0.5}, "greater than 0, or 0 for words"),
        ({"edit": "a.png", "prompt": "x", "frames": 4}, "makes clips"),
        ({"guidence": 3}, "did you mean guidance?"),
    ],
)
def test_what_cannot_be_meant_is_said(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError) as error:
        request({"prompt": "a kite", **fields} if "edit" not in fields else fields)
    assert says in str(error.value)


def test_the_command_line_makes_a_request_of_each_prompt_or_file() -> None:
    items, _, _ = requests(["a", "b"], {"guidance": 2.0, "seed": None})
    assert _prompts(items) == [(0, "a"), (1, "b")]
    assert all(item.request.guidance == 2.0 for item in items)
    items, _, _ = requests(["b.png"], {"describe": ["a.png"]})
    assert [item.request.describe for item in items] == [("a.png",), ("b.png",)]
    items, _, _ = requests(["a.png", "b.png"], {"ask": "which?"})
    assert [item.request.files for item in items] == [("a.png", "b.png")]
    items, _, _ = requests(["red", "blue"], {"edit": "a.png"})
    assert [(item.request.edit, item.request.prompt) for item in items] == [
        ("a.png", "red"),
        ("a.png", "blue"),
    ]
    items, _, _ = requests([], {"continue": "a.mp4", "frames": 8})
    assert [item.request.direction for item in items] == ["continue"]


def test_settings_without_an_option_are_set_by_name() -> None:
    items, _, load = requests(["a"], {"frames": 8}, ["fps=12", "load.weights=int8"])
    assert items[0].request.fps == 12 and load.weights == "int8"
    items, _, _ = requests([], {}, ["text.top_k=5"], "story.json")
    assert items[0].request.text.top_k == 5
    with pytest.raises(UsageError, match=r"did you mean load\.weights"):
        requests(["a"], {}, ["load.weight=int8"])
    with pytest.raises(UsageError, match=r"load\.weights"):
        requests(["a"], {}, ["load.weights=int3"])


def test_words_take_temperature_0() -> None:
    assert request({"describe": "a.png", "temperature": 0}).temperature == 0
    asked = request({"document": "a.json", "text": {"temperature": 0}})
    assert asked.text.temperature == 0


def test_of_what_is_said_for_all_lines_each_takes_what_counts_for_it(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    lines = [{"prompt": "a"}, {"describe": "a.png"}, {"describe": "a.png", "guidance": 2}]
    file.write_text("\n".join(map(json.dumps, lines)))
    items, bad = read_prompts(str(file), {"guidance": 2.0, "max_tokens": 9})
    assert [(one.request.guidance, one.request.max_tokens) for one in items] == [
        (2, None),
        (None, 9),
    ]
    assert [one.reason for one in bad] == ["--describe takes no --guidance"]
    with pytest.raises(UsageError, match=r"a\.jsonl: no line takes --set overlap"):
        read_prompts(str(file), {"guidance": 2.0, "overlap": 4})


def test_lines_of_text_are_prompts_numbered_by_place(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes('\ufeffa kite\n\n  a cat \n{"not": "read"}\n'.encode())
    items, bad = read_prompts(str(file), {"guidance": 2.0})
    assert _prompts(items) == [(0, "a kite"), (1, "a cat"), (2, '{"not": "read"}')]
    assert [item.line for item in items] == [1, 3, 4] and not bad
    assert items[1].where == f"{file}, line 3" and items[1].request.guidance == 2.0


def test_bad_lines_are_kept_with_their_numbers_and_shift_nobody(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    lines = [
        '{"prompt": "a", "seed": 3, "n": 2}',
        '{"prompt": "b", "guidence": 3}',
        "[1]",
        "nonsense",
        '{"seed": 1}',
        '{"prompt": "c", "size": "16x16", "guidance": 4}',
        '{"caption": "d"}',
        '{"prompt": "e", "frames": 6}',
    ]
    file.write_bytes("\n".join(lines).encode() + b'\n{"prompt": "\xff"}\n')
    items, bad = read_prompts(str(file), {"guidance": 2.0})
    assert _prompts(items) == [(0, "a"), (5, "c"), (6, "d")]
    assert (items[0].request.seed, items[0].request.n, items[0].request.guidance) == (3, 2, 2.0)
    assert items[1].request.guidance == 4.0
    assert [one.line for one in bad] == [2, 3, 4, 5, 8, 9]
    reasons = ["did you mean guidance", "not an object", "not JSON", "no prompt", "try 8", "UTF-8"]
    for one, reason in zip(bad, reasons, strict=True):
        assert reason in one.reason
    assert bad[0].given == {"prompt": "b", "guidence": 3} and bad[2].given == "nonsense"


def test_tables_need_a_column_of_prompts_and_may_have_others(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('id,Prompt,size\n1,"a, b",16x16\n2,c,\n3,d\n4,,8x8\n')
    items, bad = read_prompts(str(tmp_path / "a.csv"), {})
    assert _prompts(items) == [(0, "a, b"), (1, "c"), (3, "")]
    assert [item.request.size for item in items] == ["16x16", None, "8x8"]
    assert [(one.line, one.reason) for one in bad] == [(4, "2 cells under 3 column names")]
    table = pa.table({"caption": ["a", "b"], "seed": [3, None], "score": [0.1, 0.2]})
    pq.write_table(table, tmp_path / "a.parquet")
    items, bad = read_prompts(str(tmp_path / "a.parquet"), {"seed": 9})
    assert _prompts(items) == [(0, "a"), (1, "b")] and not bad
    assert [item.request.seed for item in items] == [3, 9]
    (tmp_path / "b.csv").write_text("id,name\n1,a\n")
    with pytest.raises(UsageError, match=r"no column of prompts .*its columns are: id, name"):
        read_prompts(str(tmp_path / "b.csv"), {})


def test_stdin_takes_prompts_and_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    text = 'a kite\n{"prompt": "a cat", "seed": 4}\n'
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    items, bad = read_prompts("-", {})
    assert _prompts(items) == [(0, "a kite"), (1, "a cat")] and not bad
    assert items[1].request.seed == 4


def test_paths_are_counted_from_the_file(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"edit": "a.png", "prompt": "red"}) + "\n")
    items, _ = read_prompts(str(file), {})
    assert items[0].base == tmp_path


@pytest.mark.parametrize("name", ["a.doc", "none.txt", "empty.txt"])
def test_files_that_hold_no_prompts_are_refused_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "a.doc").write_text("a kite")
    with pytest.raises(UsageError, match=name):
        read_prompts(str(tmp_path / name), {})


def test_names_come_from_what_is_asked() -> None:
    def title(**fields: Any) -> str:
        return Item(0, Request(**fields)).title

    assert title(prompt="a kite") == "a kite"
    assert title(describe=("b/photo.jpg",)) == "photo"
    assert title(describe=("shards#key-0001",)) == "key-0001"
    assert title(describe=("a.png",), ask="which?") == "which?"
    assert title(document="b/story.json") == "story"
