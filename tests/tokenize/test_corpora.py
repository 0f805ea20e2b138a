"""Documents from files: what a file holds is recognised, streamed, and never half read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image as Pillow

from unimodal.pipeline.errors import UnimodalError, UsageError
from unimodal.pipeline.lock import run_lock
from unimodal.pipeline.progress import Progress
from unimodal.tokenize import corpora
from unimodal.tokenize import rows as files
from unimodal.tokenize.corpora import RowUnit, drafts, find_corpora, row_units
from unimodal.tokenize.document import Image, Piece, Text, compose, parts_length, write
from unimodal.tokenize.gather import gather
from unimodal.tokenize.run import TokenizeSettings, estimate, tokenize
from unimodal.tokenize.shards import Shards
from unimodal.tokenize.vocabulary import Vocabulary

SMALL = TokenizeSettings(area=32 * 32, batch=3, shard_size=4, val_fraction=0.3)


def lines(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def picture(path: Path, size: tuple[int, int] = (40, 40), seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    coarse = Pillow.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8))
    coarse.resize(size, Pillow.Resampling.BICUBIC).save(path)
    return path


def planned(paths: Sequence[Path | str], **changes: Any) -> tuple[list[RowUnit], list[Any]]:
    settings = SMALL.model_copy(update=changes)
    units = list(row_units(find_corpora(paths, settings), settings))
    return units, [draft for unit in units for draft in drafts(unit, settings)]


def texts(found: Sequence[Any]) -> list[str]:
    return [draft.pieces[0][2] if draft.pieces else f"! {draft.problem}" for draft in found]


def snapshot(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


QA = [
    {"from": "human", "value": "<image>\nWhat is it?"},
    {"from": "gpt", "value": "A cat."},
    {"from": "human", "value": "Sure?"},
    {"from": "gpt", "value": "Yes."},
]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Files of every kind, with pictures of three shapes beside them."""
    folder = tmp_path_factory.mktemp("corpora")
    for number, size in enumerate([(40, 40), (80, 40), (40, 80), (40, 40), (80, 40)]):
        picture(folder / f"{number}.png", size, number)
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n but no more")
    chats = [{"id": str(n), "image": f"{n}.png", "conversations": QA} for n in range(5)]
    chats.append({"id": "text", "conversations": QA[2:]})
    chats.append({"id": "broken", "image": "broken.png", "conversations": QA})
    (folder / "llava.json").write_text(json.dumps(chats, indent=1))
    pages = [
        {"content": ["First", {"image": "0.png"}, {"text": "then"}, {"image": "1.png"}, "end"]},
        {"content": [{"image": "2.png"}, {"image": "gone.png"}]},
        {"content": [{"image": "3.png"}, "one more"]},
    ]
    edits = [
        {"source": "0.png", "instruction": "wider", "result": "1.png", "score": 0.5},
        {"source": ["2.png", "3.png"], "instruction": "join", "result": "4.png", "score": 7},
    ]
    (folder / "book.txt").write_text("A book.\n\nIts second paragraph.\n")
    return [
        folder / "llava.json",
        lines(folder / "pages.jsonl", pages),
        lines(folder / "edits.ndjson", edits),
        folder / "book.txt",
        lines(folder / "texts.jsonl", [{"text": f"text {n}", "url": "u"} for n in range(9)]),
    ]


def test_documents_of_every_kind_become_samples_and_bad_rows_are_told_of(
    mixed: list[Path], tmp_path: Path, block_mean: Any
) -> None:
    shards = tokenize(mixed, tmp_path, SMALL, tokenizer=block_mean)
    rows = shards.index.to_pylist()
    tasks = [row["task"] for row in rows]
    counts = {task: tasks.count(task) for task in sorted(set(tasks))}
    assert counts == {"chat": 6, "edit": 2, "interleaved": 2, "text": 10}
    vocabulary = shards.vocabulary
    by_task: dict[str, list[list[Piece]]] = {}
    for at, row in enumerate(rows):
        pieces = shards.segments(at)
        by_task.setdefault(row["task"], []).append(pieces)
        ids, _ = write(compose(row["task"], pieces), vocabulary, 0.5)
        assert len(ids) == parts_length(row["task"], row["segments"], vocabulary)
    chat = max(by_task["chat"], key=len)
    assert [piece.role for piece in chat] == ["user", "user", "assistant", "user", "assistant"]
    assert isinstance(chat[0].segment, Image) and chat[1].segment == Text("What is it?")
    page = max(by_task["interleaved"], key=len)
    assert [p.segment.text for p in page if isinstance(p.segment, Text)] == ["First", "then", "end"]
    assert [isinstance(p.segment, Image) for p in page] == [False, True, False, True, False]
    edit = max(by_task["edit"], key=len)
    assert [p.role for p in edit] == ["source", "source", "instruction", "result"]
    scores = {len(r["segments"]): r["score"] for r in rows if r["task"] == "edit"}
    assert scores == {3: 0.5, 4: 7.0} and rows[tasks.index("chat")]["score"] is None
    lost = pq.read_table(tmp_path / "quarantine.parquet").to_pylist()
    assert [(Path(row["uri"]).name, row["reason"].rpartition("/")[2][:25]) for row in lost] == [
        ("llava.json, row 7", "broken.png: its image for"),
        ("pages.jsonl, line 2", "gone.png: no such file"),
    ]
    meta = json.loads(tar_member(tmp_path, rows[tasks.index("text")], "json"))
    assert meta["task"] == "text" and meta["meta"] in ({}, {"url": "u"})


def tar_member(folder: Path, row: dict[str, Any], suffix: str) -> bytes:
    import tarfile

    with tarfile.open(folder / row["shard"]) as tar:
        member = tar.extractfile(f"{row['key']}.{suffix}")
        assert member is not None
        return member.read()


def test_pictures_of_documents_are_made_as_those_of_clips(
    mixed: list[Path], tmp_path: Path, block_mean: Any
) -> None:
    """Resized by the same settings, in batches of one size."""
    import torch

    shards = tokenize(mixed[0], tmp_path, SMALL, tokenizer=block_mean)
    assert {shape[0] for shape in block_mean.shapes} <= {1, 2, 3}
    folder = mixed[0].parent
    codes = {
        row["segments"][0]["height"]: shards.segments(at)[0].segment
        for at, row in enumerate(shards.index.to_pylist())
        if row["segments"][0]["kind"] == "image"
    }
    with Pillow.open(folder / "2.png") as tall:
        segment = codes[6]
        size = (segment.codes.shape[1] * 8, segment.codes.shape[0] * 8)
        resized = np.array(tall.convert("RGB").resize(size, Pillow.Resampling.BICUBIC))
    pixels = torch.from_numpy(resized).permute(2, 0, 1).float().div(127.5).sub(1)
    expected = type(block_mean)().encode(pixels[None, None].contiguous())[0, 0].numpy()
    assert np.abs(segment.codes.astype(int) - expected).max() <= 1
    narrow = SMALL.model_copy(update={"max_aspect": 1.5})
    tokenize(mixed[0], tmp_path / "narrow", narrow, tokenizer=block_mean)
    lost = pq.read_table(tmp_path / "narrow" / "quarantine.parquet")["reason"].to_pylist()
    assert sum("max_aspect" in why for why in lost) == 3
    short = SMALL.model_copy(update={"max_tokens": 50})
    with pytest.raises(UnimodalError, match="none of the clips or rows"):
        tokenize(mixed[2], tmp_path / "short", short, tokenizer=block_mean)
    lost = pq.read_table(tmp_path / "short" / "quarantine.parquet")["reason"].to_pylist()
    assert all("over max_tokens 50" in why for why in lost)


def test_what_is_said_of_one_picture_is_in_one_split(tmp_path: Path, block_mean: Any) -> None:
    for number in range(8):
        picture(tmp_path / f"{number}.png", seed=number)
    rows = [
        {"image": f"{n % 8}.png", "conversations": [{"from": "human", "value": f"{n}?"}, QA[1]]}
        for n in range(32)
    ]
    shards = tokenize(
        lines(tmp_path / "qa.jsonl", rows), tmp_path / "o", SMALL, tokenizer=block_mean
    )
    splits: dict[str, set[str]] = {}
    for row in shards.index.to_pylist():
        splits.setdefault(row["source_sha256"], set()).add(row["split"])
    assert len(splits) == 8 and all(len(one) == 1 for one in splits.values())
    assert shards.manifest["totals"]["val"] > 0


def test_an_interrupted_run_resumes_to_the_same_bytes(
    mixed: list[Path], tmp_path: Path, block_mean: Any
) -> None:
    whole = tokenize(mixed, tmp_path / "whole", SMALL, tokenizer=block_mean)
    encode, left = block_mean.encode, [4]

    def stops(pixels: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return encode(pixels)

    block_mean.encode = stops
    with pytest.raises(KeyboardInterrupt):
        tokenize(mixed, tmp_path / "cut", SMALL, tokenizer=block_mean)
    block_mean.encode = encode
    vocabulary = Vocabulary.bytes(256)
    told = estimate(mixed, tmp_path / "cut", SMALL, block_mean, vocabulary)
    assert 0 < told["done"] < told["shards"] == len(whole.manifest["shards"])
    other = SMALL.model_copy(update={"batch": 1})  # changes no code: it may change
    tokenize(mixed, tmp_path / "cut", other, tokenizer=block_mean)
    assert snapshot(tmp_path / "cut") == snapshot(tmp_path / "whole")
    block_mean.encode = stops  # nothing is left to be done
    tokenize(mixed, tmp_path / "cut", SMALL, tokenizer=block_mean)
    assert (
        estimate(mixed, tmp_path / "cut", SMALL, block_mean, vocabulary)["done"] == told["shards"]
    )


@pytest.mark.slow
def test_a_pool_of_workers_writes_the_same_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("".join(f"line {n}\n" for n in range(300)))
    by_line = SMALL.model_copy(update={"text_by": "line", "shard_size": 1})
    for engine in ("inline", "local"):
        tokenize(tmp_path / "a.txt", tmp_path / engine, by_line, engine=engine, workers=2)
    assert snapshot(tmp_path / "inline") == snapshot(tmp_path / "local")
    assert len(Shards.open(tmp_path / "local").manifest["shards"]) == 5


def test_texts_are_files_paragraphs_or_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\ntwo\n\n\n  three\r\n\nfour é")
    for by, expected in [
        ("file", ["one\ntwo\n\n\n  three\r\n\nfour é"]),
        ("paragraph", ["one\ntwo", "  three", "four é"]),
        ("line", ["one", "two", "  three", "four é"]),
    ]:
        _, found = planned([path], text_by=by)
        assert texts(found) == expected
    assert len({draft.key for draft in found}) == 4


@pytest.mark.parametrize("by", ["file", "paragraph", "line"])
def test_long_texts_are_cut_between_words_and_never_inside_a_character(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    monkeypatch.setattr(files, "MAX_TEXT_BYTES", 16)
    whole = "eins zwei dreißig\nvierzig €€€€€€€€€€€€ fünf\n\nsechs sieben acht neun zehn"
    (tmp_path / "a.txt").write_text(whole)
    _, found = planned([tmp_path / "a.txt"], text_by=by)
    said = texts(found)
    assert max(len(text.encode()) for text in said) <= 16
    assert not any("\ufffd" in text or text.startswith("!") for text in said)
    kept = "".join(said).replace(" ", "").replace("\n", "")
    assert kept == whole.replace(" ", "").replace("\n", "")


def test_units_are_bounded_by_bytes_and_rows_and_read_back_what_was_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpora, "TEXTS", 2)
    monkeypatch.setattr(corpora, "MAX_UNIT_BYTES", 400)
    rows = [{"text": f"{n} " + "x" * (n % 7) * 20} for n in range(60)]
    jsonl = tmp_path / "a.jsonl"
    jsonl.write_text("\n\n".join(json.dumps(row) for row in rows))  # blank lines between
    array = tmp_path / "a.json"
    array.write_text(" \n[" + ",\n ".join(json.dumps(row) for row in rows) + "]")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=25)
    found = {}
    for path in (jsonl, array, tmp_path / "a.parquet"):
        units, said = planned([path])
        found[path.suffix] = texts(said)
        assert all(unit.clips <= 8 for unit in units) and sum(u.clips for u in units) == 60
        if path.suffix != ".parquet":
            assert all(sum(s.end - s.start for s in u.spans) <= 400 for u in units)
        again = [
            RowUnit.of(json.loads(json.dumps({"number": u.number, **u.facts()}))) for u in units
        ]
        assert again == units
    assert found[".jsonl"] == found[".json"] == found[".parquet"] == [r["text"] for r in rows]
    (draft, *_) = planned([jsonl])[1][30:]
    assert draft.where.endswith("a.jsonl, line 61")
    assert planned([array])[1][30].where.endswith("a.json, row 31")


def test_small_files_share_a_shard_and_tasks_do_not(mixed: list[Path], tmp_path: Path) -> None:
    for number in range(5):
        (tmp_path / f"{number}.txt").write_text(f"text {number}")
    units, found = planned([str(tmp_path / "*.txt")])
    assert len(units) == 1 and texts(found) == [f"text {n}" for n in range(5)]
    units, _ = planned(mixed)
    assert [{s.corpus.task for s in unit.spans} for unit in units] == [
        {"chat"},
        {"chat"},
        {"interleaved"},
        {"edit"},
        {"text"},
    ]
    limited = list(row_units(find_corpora(mixed, SMALL), SMALL, limit=9))
    assert sum(unit.clips for unit in limited) == 9


def test_files_behind_a_limit_are_not_read(tmp_path: Path) -> None:
    first = lines(tmp_path / "a.jsonl", [{"text": "a"}, {"text": "b"}])
    pq.write_table(pa.table({"text": ["c"]}), tmp_path / "b.parquet")
    corpora = find_corpora([first, str(tmp_path / "b.parquet")], SMALL)
    (tmp_path / "b.parquet").write_bytes(b"broken by now")
    (unit,) = row_units(corpora, SMALL, limit=2)
    assert unit.clips == 2
    with pytest.raises(UsageError, match=r"b.parquet: cannot be read"):
        list(row_units(corpora, SMALL, limit=3))


def test_a_change_in_a_file_changes_only_units_from_there_on(tmp_path: Path) -> None:
    rows = [{"conversations": [{"from": "human", "value": str(n)}, QA[1]]} for n in range(12)]
    before, _ = planned([lines(tmp_path / "a.jsonl", rows)])
    rows[5]["conversations"][0]["value"] = "x"
    after, _ = planned([lines(tmp_path / "b.jsonl", rows)])  # another name does not matter
    same = [a.digest({}) == b.digest({}) for a, b in zip(before, after, strict=True)]
    assert same == [True, False, True]


def test_rows_that_are_no_documents_say_why(tmp_path: Path) -> None:
    def problems(name: str, rows: Sequence[Any]) -> list[str]:
        _, found = planned([lines(tmp_path / name, rows)])
        return [draft.problem for draft in found]

    assert problems("t.jsonl", [{"text": "a"}, {"text": " "}, {"text": 3}, [1], {"x": 1}]) == [
        "",
        "text is no text: ' '",
        "text is no text: 3",
        "not an object",
        "text is no text: None",
    ]
    turn = {"from": "human", "value": "a <image>"}
    assert problems(
        "c.jsonl",
        [
            {"conversations": QA},
            {"conversations": [turn]},
            {"conversations": [{"from": "system", "value": "x"}, *QA]},
            {"image": ["a", "b"], "conversations": [turn, QA[1]]},
            {"image": {"bytes": "x"}, "conversations": QA},
            {"image": "a\0b", "conversations": QA},
        ],
    ) == [
        "1 <image> in its conversations for 0 pictures",
        "its conversations are not human and gpt in turn, but human",
        "its conversations are not human and gpt in turn, but system, human, gpt, human, gpt",
        "1 <image> in its conversations for 2 pictures",
        "image is no path: {'bytes': 'x'}",
        "image is no path: 'a\\x00b'",
    ]
    edits = [{"source": "a", "instruction": "", "result": "b"}, {"source": [], "instruction": "x"}]
    assert [why[:22] for why in problems("e.jsonl", edits)] == [
        "instruction is no text",
        "result is no path: Non",
    ]
    assert problems("i.jsonl", [{"content": []}, {"content": [{"video": "a"}]}]) == [
        "nothing is in it",
        "text is no text: None",
    ]
    with (tmp_path / "t.jsonl").open("ab") as file:
        file.write(b'{"text": "cut\n{"text": "\xff"}\n{"text": "half \\ud800"}\n')
    _, found = planned([tmp_path / "t.jsonl"])
    assert found[5].problem.startswith("not JSON") and found[6].problem.startswith("not UTF-8")
    assert found[7].pieces[0][2] == "half ?"


def test_a_line_without_end_costs_a_row_and_not_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "MAX_ROW_BYTES", 100)
    monkeypatch.setattr(corpora, "MAX_UNIT_BYTES", 150)
    rows = [{"text": "a"}, {"text": "b" * 1000}, {"text": "c"}]
    _, found = planned([lines(tmp_path / "a.jsonl", rows)])
    assert [text[:10] for text in texts(found)] == ["a", "! not JSON", "c"]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.png", b"\x89PNG", "a.png: not a file of texts or documents .*unimodal curate"),
        ("a.txt", b"\xff\xfe\0a", "a.txt: cannot be read as .txt .*utf-8"),
        ("a.jsonl", b"word\n", "a.jsonl: cannot be read as .jsonl"),
        ("a.jsonl", b"", "a.jsonl: holds no row"),
        (
            "a.jsonl",
            b'{"caption": "x", "path": "y"}',
            "neither texts .*: the first has caption, path",
        ),
        ("a.json", b'{"text": "x"}', "its outermost value is no array"),
        ("a.json", b"[1, 2]", "holds no row"),
        ("a.json", b'[{"text": "x"}, {"text', r"a\.json: cannot be read .*breaks off in row 2"),
        ("a.parquet", b"PAR1", "a.parquet: cannot be read as .parquet"),
    ],
)
def test_files_that_are_none_are_one_clear_error(
    tmp_path: Path, name: str, data: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UsageError, match=message):
        planned([tmp_path / name])


def test_a_missing_file_and_two_folders_are_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file; tokenize takes a run of unimodal curate"):
        planned([tmp_path / "*.jsonl"])
    with pytest.raises(UsageError, match="with several inputs each must be a file"):
        find_corpora([tmp_path, tmp_path], SMALL)


def test_pictures_may_lie_elsewhere_and_a_moved_row_is_found_by_its_words(
    mixed: list[Path], tmp_path: Path, block_mean: Any
) -> None:
    there = tmp_path / "llava.json"
    there.write_bytes(mixed[0].read_bytes())
    elsewhere = SMALL.model_copy(update={"images": str(mixed[0].parent)})
    moved = tokenize(there, tmp_path / "moved", elsewhere, tokenizer=block_mean)
    first = tokenize(mixed[0], tmp_path / "first", SMALL, tokenizer=block_mean)
    assert moved.index.equals(first.index)


def test_two_runs_never_write_one_directory(
    mixed: list[Path], tmp_path: Path, block_mean: Any
) -> None:
    with run_lock(tmp_path / "out", Progress()), pytest.raises(UnimodalError, match="run"):
        tokenize(mixed, tmp_path / "out", SMALL, tokenizer=block_mean)


def test_a_row_whose_picture_was_mended_is_done_when_asked_for(
    mixed: list[Path], tmp_path: Path, block_mean: Any
) -> None:
    path = lines(tmp_path / "p.jsonl", [{"content": ["a", {"image": "p.png"}]}, {"content": ["b"]}])
    assert len(tokenize(path, tmp_path / "o", SMALL, tokenizer=block_mean)) == 1
    picture(tmp_path / "p.png")
    assert len(tokenize(path, tmp_path / "o", SMALL, tokenizer=block_mean)) == 1
    again = tokenize(path, tmp_path / "o", SMALL, tokenizer=block_mean, retry_quarantined=True)
    assert len(again) == 2


def test_parquet_rows_ride_along_without_their_bytes(tmp_path: Path) -> None:
    rows = [{"text": "a", "score": 0.5, "bytes": b"x", "url": "u", "id": 3}] * 3
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    _, found = planned([tmp_path / "a.parquet"])
    assert found[0].scores == {"score": 0.5} and found[0].meta == {"id": "3", "url": "u"}
    assert find_corpora([tmp_path / "a.parquet"], SMALL)[0].numbers == ("score",)


def test_columns_of_numbers_never_clash_with_our_own(tmp_path: Path, block_mean: Any) -> None:
    kept = dict.fromkeys(["row", "size", "source", "start", "\ud800"], 1.5)
    left_out = dict.fromkeys(["Key", "OFFSET", "split", "__row"], 2)
    rows = [{"text": f"text {n}"} | kept | left_out | {"row": 9 - n} for n in range(4)]
    path = lines(tmp_path / "a.jsonl", rows)
    made = tokenize(path, tmp_path / "o", SMALL, tokenizer=block_mean)
    assert made.index.column_names[17:] == ["?", "row", "size", "source", "start"]
    found = gather([made.path], 'row >= 8 AND size = 1.5 AND "?" > 1', tmp_path / "c")
    assert sorted(found.segments(n)[0].segment.text for n in range(2)) == ["text 0", "text 1"]
    assert found.index["size"].to_pylist() == found.index["source"].to_pylist() == [1.5, 1.5]
    assert planned([path])[1][0].meta == dict.fromkeys(left_out, "2")


def test_a_first_row_that_is_too_deep_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "deep.jsonl"
    path.write_text('{"text": "x", "a": ' + "[" * 200_000 + "]" * 200_000 + "}\n")
    with pytest.raises(UsageError, match=r"deep\.jsonl: cannot be read as \.jsonl \(.*recursion"):
        find_corpora([path], SMALL)
    # Later ones are rows that are no documents, also where reading goes deeper than writing.
    deeper = ['{"text": "x", "a": ' + "[" * n + "]" * n + "}\n" for n in range(1, 1001)]
    path.write_text("".join(deeper))
    found = planned([path])[1]
    assert len(found) == 1000 and found[0].meta["a"] == "[]"
    assert all("recursion" in draft.problem for draft in found if not draft.meta)


def test_a_picture_that_killed_a_worker_is_not_touched_again(
    tmp_path: Path, block_mean: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the supervisor asks for it: one row after another, the culprit named and left alone."""
    from unimodal.pipeline import fetch
    from unimodal.pipeline.tell import Tell
    from unimodal.pipeline.worker import Job, do
    from unimodal.tokenize import run as module

    for number in range(3):
        picture(tmp_path / f"{number}.png", seed=number)
    rows = [{"content": [f"row {n}", {"image": f"{n % 3}.png"}]} for n in range(4)]
    opened: list[str] = []
    hand: set[str] = set()

    def begin(stage: str, thing: str) -> None:
        hand.add(thing)
        assert len(hand) == 1  # what was begun last and is not done is the row in hand

    def once(jobs: list[Job], *others: object) -> None:
        for job in jobs:
            job.one_by_one, job.poison = True, {f"tokenize:{job.part}#0": "its worker died"}
            do(job, Tell(begin=begin, done=lambda stage, thing, why: hand.discard(thing)))

    local = fetch.local
    monkeypatch.setattr(fetch, "local", lambda uri, **k: (opened.append(uri), local(uri, **k))[1])
    monkeypatch.setattr(module, "run_jobs", once)
    shards = tokenize(
        lines(tmp_path / "a.jsonl", rows), tmp_path / "o", SMALL, tokenizer=block_mean
    )
    lost = pq.read_table(tmp_path / "o" / "quarantine.parquet").to_pylist()
    assert [row["uri"][-6:] for row in lost] == ["line 1", "line 4"] and len(shards) == 2
    assert all("its worker died" in row["reason"] for row in lost)
    assert not hand and {Path(uri).name for uri in opened} == {"1.png", "2.png"}
