"""Shards: equal bytes for equal input, readable by others, and nothing in them is trusted."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from unimodal.pipeline.clips import write_parquet
from unimodal.pipeline.errors import UnimodalError
from unimodal.tokenize.document import Image, Piece, Text, Video, compose, parts_length
from unimodal.tokenize.document import write as write_ids
from unimodal.tokenize.shards import INDEX, Sample, Shards, ShardWriter
from unimodal.tokenize.vocabulary import Vocabulary

VOCABULARY = Vocabulary.bytes(256)
SETTINGS = {"area": 4096}


def sample(name: str, frames: int = 1, split: str = "train", seed: int = 0) -> Sample:
    rng = np.random.default_rng(seed)
    return Sample(
        key=name,
        uid=name,
        kind="image" if frames == 1 else "video",
        codes=rng.integers(0, 256, (frames, 3, 5)),
        split=split,
        source_sha256=hashlib.sha256(name.encode()).hexdigest(),
        fps=None if frames == 1 else 8.0,
        captions=[{"style": "given", "lang": "en", "text": f"a {name} é", "tokens": 9}],
        scores={"contrast": 1.5, "flow_mean": None},
        meta={"licence": "CC0"},
    )


SAMPLES = [[sample("b", seed=1), sample("a", 2, seed=2)], [sample("c", split="val", seed=3)]]


@pytest.fixture
def write(block_mean: Any) -> Callable[..., Shards]:
    def run(out: Path, shards: list[list[Sample]] = SAMPLES, **changes: Any) -> Shards:
        arguments = {"tokenizer": block_mean, "vocabulary": VOCABULARY, "settings": SETTINGS}
        writer = ShardWriter(out, **(arguments | changes), scores=["contrast", "flow_mean"])
        for number, samples in enumerate(shards):
            writer.write(number, f"unit {number}", samples, [{"uri": "x.png", "reason": "broken"}])
        return writer.finish(len(shards))

    return run


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_what_was_written_is_read_back(tmp_path: Path, write: Callable[..., Shards]) -> None:
    shards = write(tmp_path)
    assert shards.index["key"].to_pylist() == ["a", "b", "c"]
    by_name = {s.key: s for group in SAMPLES for s in group}
    for row, key in enumerate("abc"):
        codes = shards.codes(row)
        assert codes.dtype == np.uint16
        np.testing.assert_array_equal(codes, by_name[key].codes)
    first = shards.index.slice(0, 1).to_pylist()[0]
    assert (first["frames"], first["height"], first["width"], first["fps"]) == (2, 3, 5, 8.0)
    assert first["captions"] == [{"style": "given", "lang": "en", "text": "a a é", "tokens": 9}]
    assert (first["contrast"], first["flow_mean"]) == (1.5, None)
    assert shards.index.schema.field("contrast").type == pa.float64()
    assert list(shards.index.schema)[: len(INDEX)] == list(INDEX)
    assert shards.vocabulary == VOCABULARY
    assert (shards.vision_tokenizer_dir / "config.json").is_file()
    totals = {"samples": 3, "train": 2, "val": 1, "vision_codes": 60, "quarantined": 2}
    assert shards.manifest["totals"] == totals and len(shards) == 3


def document(name: str) -> Sample:
    """A chat of two pictures, a clip and three texts."""
    rng = np.random.default_rng(7)
    first, second, third = (rng.integers(0, 256, size) for size in ((2, 3), (4, 1), (2, 2, 2)))
    pieces = [
        Piece(Image(first), "user"),
        Piece(Text("which of é"), "user"),
        Piece(Image(second), "user"),
        Piece(Video(third, 7.5), "user"),
        Piece(Text(""), "user"),
        Piece(Text("the second"), "assistant"),
    ]
    tokens = [len(p.segment.text.encode()) if isinstance(p.segment, Text) else None for p in pieces]
    return Sample(
        name, name, "document", None, "train", "0" * 64, task="chat", pieces=pieces, tokens=tokens
    )


def test_documents_are_read_back_and_their_members_have_names(
    tmp_path: Path, write: Callable[..., Shards]
) -> None:
    import webdataset

    shards = write(tmp_path, [[document("d"), sample("a")]])
    assert shards.segments(1) == list(document("d").pieces)
    told = shards.index.slice(1, 1).to_pylist()[0]
    assert (told["kind"], told["task"], told["frames"], told["captions"]) == (
        "document",
        "chat",
        0,
        [],
    )
    length = parts_length("chat", told["segments"], VOCABULARY)
    assert length == len(write_ids(compose("chat", shards.segments(1)), VOCABULARY, 0.5)[0])
    assert shards.index["segments"][0].as_py() is None
    assert shards.manifest["totals"]["vision_codes"] == 15 + 6 + 4 + 8
    url = str(tmp_path / "shard-00000.tar")
    found = list(webdataset.WebDataset([url], shardshuffle=False).decode())[1]
    names = [segment["member"] for segment in found["json"]["segments"]]
    assert names == ["vision.npy", "1.txt", "vision.1.npy", "vision.2.npy", "4.txt", "5.txt"]
    assert found["1.txt"] == "which of é"
    np.testing.assert_array_equal(found["vision.2.npy"], document("d").pieces[3].segment.codes)


def test_a_document_that_is_not_there_is_an_error(
    tmp_path: Path, write: Callable[..., Shards]
) -> None:
    shards = write(tmp_path, [[document("d")]])
    tar = tmp_path / "shard-00000.tar"
    whole, segments = tar.read_bytes(), shards.index["segments"][0].as_py()
    at = segments[5]["offset"]
    for data, message in [
        (whole[: at + 3], "3 bytes of text where 10 should be"),
        (whole[:at] + b"\xff" + whole[at + 1 :], "can't decode byte"),
        (whole.replace(b"NUMPY", b"DUMPY"), "magic string"),
    ]:
        tar.write_bytes(data)
        with pytest.raises(UnimodalError, match=f"the document d .*{message}.*delete shard-00000"):
            shards.segments(0)


def test_shards_of_another_format_are_refused(
    tmp_path: Path, write: Callable[..., Shards], block_mean: Any
) -> None:
    old = write(tmp_path / "old").path
    manifest = json.loads((old / "manifest.json").read_text()) | {"format": 1}
    (old / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UnimodalError, match="has shard format 1, this version reads 2"):
        Shards.open(old)
    with pytest.raises(UnimodalError, match="has shard format 1, this version reads 2"):
        ShardWriter(old, block_mean, VOCABULARY, SETTINGS)


def test_equal_samples_give_equal_bytes_in_any_order(
    tmp_path: Path, write: Callable[..., Shards]
) -> None:
    write(tmp_path / "one")
    write(tmp_path / "two", [list(reversed(group)) for group in SAMPLES])
    assert snapshot(tmp_path / "one") == snapshot(tmp_path / "two")
    write(tmp_path / "one")  # and writing over it changes nothing
    assert snapshot(tmp_path / "one") == snapshot(tmp_path / "two")
    with tarfile.open(tmp_path / "one" / "shard-00000.tar") as tar:
        members = tar.getmembers()
    assert [m.name for m in members] == ["a.json", "a.vision.npy", "b.json", "b.vision.npy"]
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.isreg()) for m in members} == {
        (0, 0, 0, "", "", True)
    }


def test_plain_webdataset_reads_it(tmp_path: Path, write: Callable[..., Shards]) -> None:
    import webdataset

    shards = write(tmp_path, [*SAMPLES, []])  # an empty shard among them
    urls = [str(tmp_path / shard["name"]) for shard in shards.manifest["shards"]]
    found = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert [s["__key__"] for s in found] == ["a", "b", "c"]
    for row, got in enumerate(found):
        np.testing.assert_array_equal(got["vision.npy"], shards.codes(row))
        assert got["json"]["captions"][0]["text"] == f"a {got['__key__']} é"
        assert got["json"]["meta"] == {"licence": "CC0"}


def test_a_finished_shard_is_known_by_its_unit(
    tmp_path: Path, write: Callable[..., Shards], block_mean: Any
) -> None:
    write(tmp_path)
    writer = ShardWriter(tmp_path, block_mean, VOCABULARY, SETTINGS)
    assert writer.has(0, "unit 0") and writer.has(1, "unit 1")
    assert not writer.has(0, "unit 1") and not writer.has(2, "unit 2")
    tar = tmp_path / "shard-00001.tar"
    tar.write_bytes(tar.read_bytes()[:-512])
    assert not writer.has(1, "unit 1")
    (tmp_path / "shard-00000.parquet").write_bytes(b"PAR1")
    assert not writer.has(0, "unit 0")


def test_a_shorter_run_leaves_no_shard_behind(tmp_path: Path, write: Callable[..., Shards]) -> None:
    write(tmp_path / "long")
    write(tmp_path / "long", SAMPLES[:1])
    write(tmp_path / "short", SAMPLES[:1])
    assert snapshot(tmp_path / "long") == snapshot(tmp_path / "short")


def test_an_unfinished_directory_does_not_open(
    tmp_path: Path, write: Callable[..., Shards], block_mean: Any
) -> None:
    write(tmp_path)
    writer = ShardWriter(tmp_path, block_mean, VOCABULARY, SETTINGS)
    Shards.open(tmp_path)  # nothing is changed yet
    writer.write(0, "new", SAMPLES[0])
    with pytest.raises(UnimodalError, match="unfinished: run the same"):
        Shards.open(tmp_path)


def test_shards_of_two_makes_never_mix(
    tmp_path: Path, write: Callable[..., Shards], block_mean: Any
) -> None:
    write(tmp_path)
    other = type(block_mean)("1" * 64)
    with pytest.raises(UnimodalError, match=r"another vision tokenizer.*choose another --out"):
        write(tmp_path, tokenizer=other)
    with pytest.raises(UnimodalError, match="area was 4096, now 64"):
        write(tmp_path, settings={"area": 64})
    with pytest.raises(UnimodalError, match="room for 255 vision codes, the tokenizer has 256"):
        write(tmp_path / "new", vocabulary=Vocabulary.bytes(255))
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(UnimodalError, match="not empty and not a shards directory"):
        write(tmp_path)


def test_nothing_written_is_an_error_that_says_why(
    tmp_path: Path, write: Callable[..., Shards]
) -> None:
    with pytest.raises(UnimodalError, match=r"quarantine\.parquet says why \(first: broken\)"):
        write(tmp_path, [[]])
    rows = pq.read_table(tmp_path / "quarantine.parquet").to_pylist()
    assert rows == [{"uri": "x.png", "stage": "tokenize", "reason": "broken", "part": None}]


def test_damaged_directories_name_the_shard_and_the_remedy(
    tmp_path: Path, write: Callable[..., Shards]
) -> None:
    whole = snapshot(write(tmp_path).path)

    def broken(name: str, data: bytes | None) -> None:
        for file, content in whole.items():
            (tmp_path / file).write_bytes(content)
        if data is None:
            (tmp_path / name).unlink()
        else:
            (tmp_path / name).write_bytes(data)

    manifest = json.loads(whole["manifest.json"])
    manifest["shards"][0]["name"] = "../shard-00000.tar"
    tar, index = whole["shard-00000.tar"], whole["shard-00001.parquet"]
    for name, data, message in [
        ("shard-00001.tar", None, r"shard-00001.tar is missing: delete shard-00001\.\* and run"),
        ("shard-00001.parquet", None, r"shard-00001\.parquet is missing"),
        ("shard-00000.tar", tar[:-100], r"shard-00000.tar has \d+ bytes instead of"),
        ("shard-00000.parquet", index, "is not the index of shard-00000.tar"),
        ("shard-00000.parquet", b"PAR1xx", r"shard-00000\.parquet cannot be read"),
        ("manifest.json", b"{", r"manifest\.json is damaged"),
        ("manifest.json", b"[]", r"manifest\.json is damaged"),
        ("manifest.json", json.dumps(manifest).encode(), "no name of a shard"),
        ("manifest.json", b'{"format": 3}', "shard format 3, this version reads 2"),
        ("manifest.json", None, "no shards at"),
        ("vocabulary/vocabulary.json", None, "no vocabulary"),
    ]:
        broken(name, data)
        with pytest.raises(UnimodalError, match=message):
            shards = Shards.open(tmp_path)
            assert len(shards.index) == 3
            _ = shards.vocabulary


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("a pickle was opened",))


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array)
    return stream.getvalue()


def test_hostile_codes_are_refused(tmp_path: Path, write: Callable[..., Shards]) -> None:
    shards = write(tmp_path)
    tar = tmp_path / "shard-00000.tar"
    whole, row = tar.read_bytes(), shards.index.slice(0, 1).to_pylist()[0]
    start, size = row["offset"], row["nbytes"]
    assert whole[start : start + 6] == b"\x93NUMPY"
    objects = np.empty(1, object)
    objects[0] = Bomb()
    huge = npy(np.zeros((2, 3, 5), np.uint16)).replace(b"(2, 3, 5)", b"(9,9**9,)")
    for hostile in [
        npy(objects),
        pickle.dumps(Bomb()),
        huge,
        npy(np.full((2, 3, 5), 999, np.uint16)),  # outside the codebook
        npy(np.zeros((2, 3, 5), np.int16)),
        npy(np.zeros((2, 5, 3), np.uint16)),
        b"\x93NUMPY\x01\0\x76\0" + b"(" * 118,
        b"",
    ]:
        data = hostile[:size].ljust(size, b"\0")
        tar.write_bytes(whole[:start] + data + whole[start + size :])
        with pytest.raises(
            UnimodalError, match=r"does not hold the codes of a .*delete shard-00000"
        ):
            shards.codes(0)


def test_a_tar_cut_behind_our_back_is_an_error(
    tmp_path: Path, write: Callable[..., Shards]
) -> None:
    shards = write(tmp_path)
    row = shards.index.slice(0, 1).to_pylist()[0]
    tar = tmp_path / "shard-00000.tar"
    tar.write_bytes(tar.read_bytes()[: row["offset"] + row["nbytes"] - 1])
    with pytest.raises(UnimodalError, match="59 bytes of codes"):
        shards.codes(0)


@pytest.mark.parametrize(
    "change",
    [
        {"offset": 1 << 60},
        {"offset": -1},
        {"nbytes": 1 << 40},
        {"nbytes": 0},
        {"height": 1 << 30, "width": 1 << 30},
        {"frames": 0},
        {"shard": "../../etc/passwd"},
        {"shard": "shard-00001.tar"},
    ],
)
def test_a_hostile_index_reads_nothing_else(
    tmp_path: Path, write: Callable[..., Shards], change: dict[str, Any]
) -> None:
    write(tmp_path)
    path = tmp_path / "shard-00000.parquet"
    table = pq.read_table(path)
    rows = [row | change for row in table.to_pylist()]
    write_parquet(pa.Table.from_pylist(rows, schema=table.schema), path)
    with pytest.raises(UnimodalError, match="delete shard-00000"):
        Shards.open(tmp_path).codes(0)


def test_names_inside_a_tar_never_become_paths(
    tmp_path: Path, write: Callable[..., Shards]
) -> None:
    """The reader goes by the index: whatever a member is called, nothing is made of it."""
    shards = write(tmp_path / "shards")
    tar = tmp_path / "shards" / "shard-00000.tar"
    data = bytearray(tar.read_bytes())
    name = b"../../../escape.npy\0"
    data[: len(name)] = name
    tar.write_bytes(data)
    before = sorted(tmp_path.rglob("*"))
    assert shards.codes(0).shape == (2, 3, 5)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("key", ["../a", "a.b", "", "a/b", "x" * 81, "a\n"])
def test_keys_that_a_reader_could_misread_are_refused(
    tmp_path: Path, write: Callable[..., Shards], key: str
) -> None:
    with pytest.raises(ValueError, match="cannot be a sample key"):
        write(tmp_path, [[sample(key)]])


def test_codes_outside_the_codebook_are_refused(
    tmp_path: Path, write: Callable[..., Shards]
) -> None:
    from dataclasses import replace

    for codes in (np.full((1, 1, 1), 256), np.full((1, 1, 1), -1), np.zeros((1, 1))):
        with pytest.raises(ValueError, match="codes of a"):
            write(tmp_path, [[replace(sample("a"), codes=codes)]])
