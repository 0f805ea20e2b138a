"""Shards out of shards: what holds is copied as it is, whatever lies around it."""

from __future__ import annotations

import shutil
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from unimodal.pipeline.clips import write_parquet
from unimodal.pipeline.errors import UnimodalError, UsageError
from unimodal.pipeline.progress import Progress
from unimodal.tokenize.document import (
    Image,
    Piece,
    Text,
    Video,
    compose,
    generation,
    serialize,
    write,
)
from unimodal.tokenize.gather import gather
from unimodal.tokenize.shards import Sample, Shards, ShardWriter
from unimodal.tokenize.stats import Statistics
from unimodal.tokenize.vocabulary import Vocabulary

VOCABULARY = Vocabulary.bytes(256)


def sample(number: int, split: str = "train", source: str | None = None, **scores: float) -> Sample:
    rng = np.random.default_rng(number)
    text = f"picture {number}"
    return Sample(
        key=f"k{number:04d}",
        uid=f"k{number:04d}",
        kind="image" if number % 3 else "video",
        codes=rng.integers(0, 256, (1 if number % 3 else 2, 2, 3 + number % 2)),
        split=split,
        source_sha256=source or f"{number:064d}",
        fps=None if number % 3 else 8.0,
        captions=[{"style": "given", "lang": "en", "text": text, "tokens": len(text)}],
        scores=scores,
    )


def document(number: int) -> Sample:
    rng = np.random.default_rng(number)
    pieces = [
        Piece(Text("which"), "user"),
        Piece(Image(rng.integers(0, 256, (2, 2))), "user"),
        Piece(Video(rng.integers(0, 256, (2, 1, 2)), 4), "user"),
        Piece(Text("this one"), "assistant"),
    ]
    key = f"d{number:04d}"
    return Sample(
        key, key, "document", None, "train", "e" * 64, task="chat", pieces=pieces,
        tokens=[5, None, None, 8],
    )  # fmt: skip


@pytest.fixture
def make(block_mean: Any) -> Callable[..., Shards]:
    def run(
        out: Path,
        shards: Sequence[Sequence[Sample]],
        scores: Sequence[str] = ("aesthetic",),
        **changes: Any,
    ) -> Shards:
        told = {"tokenizer": block_mean, "vocabulary": VOCABULARY, "settings": {"area": 64}}
        writer = ShardWriter(out, **(told | changes), scores=scores)
        for number, samples in enumerate(shards):
            writer.write(number, f"unit {number}", samples)
        return writer.finish(len(shards), "made of this")

    return run


def snapshot(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def content(shards: Shards) -> dict[str, Any]:
    """All that is read of each sample, by key."""
    found = {}
    for row, told in enumerate(shards.index.to_pylist()):
        if told["task"] == "caption":
            found[told["key"]] = (shards.codes(row).tolist(), told["captions"])
        else:
            found[told["key"]] = (shards.segments(row), [])
    return found


TWO = [
    [[sample(n, aesthetic=float(n)) for n in range(4)], [document(4), sample(5, aesthetic=5.0)]],
    [[document(6), sample(7, flow=0.5), sample(8), sample(9)], [sample(1, aesthetic=9.0)]],
]


def test_what_holds_is_copied_as_it_is(tmp_path: Path, make: Callable[..., Shards]) -> None:
    a = make(tmp_path / "a", TWO[0])
    b = make(tmp_path / "b", TWO[1], ["aesthetic", "flow"])
    before = snapshot(tmp_path)
    where = "aesthetic >= 2 OR flow > 0 OR task = 'chat'"
    found = gather([a.path, b.path], where, tmp_path / "c")
    assert {k: v for k, v in snapshot(tmp_path).items() if not k.startswith("c/")} == before
    keys = ["d0004", "d0006", "k0001", "k0002", "k0003", "k0005", "k0007"]
    assert found.index["key"].to_pylist() == keys
    everything = content(b) | content(a)
    assert content(found)["k0002"] == everything["k0002"]
    kept = {key: value for key, value in everything.items() if key in keys}
    kept["k0001"] = content(b)["k0001"]  # a's has no aesthetic of 2
    assert content(found) == kept
    assert found.index.column_names[-2:] == ["aesthetic", "flow"]
    assert found.manifest["totals"]["samples"] == 7 and found.vocabulary == VOCABULARY
    for shard in found.manifest["shards"]:  # and others can read it
        with tarfile.open(found.path / shard["name"]) as tar:
            names = tar.getnames()
        for key in {name.partition(".")[0] for name in names}:
            assert f"{key}.json" in names
    assert found.manifest["settings"] == {"area": 64, "where": where}


def test_true_merges_and_a_key_is_taken_once(tmp_path: Path, make: Callable[..., Shards]) -> None:
    a, b = make(tmp_path / "a", TWO[0]), make(tmp_path / "b", TWO[1])
    notes: list[str] = []

    class Told(Progress):
        def note(self, message: str) -> None:
            notes.append(message)

    found = gather([a.path, b.path], "true", tmp_path / "c", Told())
    assert content(found) == content(b) | content(a) and len(found) == 10
    assert notes == ["1 samples were in several directories: taken from the first"]
    again = gather([found.path], "key < 'k'", tmp_path / "d")
    assert content(again) == {k: v for k, v in content(found).items() if k < "k"}


def test_equal_input_gives_equal_bytes_wherever_it_was_stopped(
    tmp_path: Path, make: Callable[..., Shards], monkeypatch: pytest.MonkeyPatch
) -> None:
    from unimodal.tokenize import gather as module

    a, b = make(tmp_path / "a", TWO[0]), make(tmp_path / "b", TWO[1])
    gather([a.path, b.path], "true", tmp_path / "c")
    assert len(list((tmp_path / "c").glob("*.tar"))) > 2
    commit, left = module.commit_shard, [2]

    def stops(*given: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        commit(*given)

    monkeypatch.setattr(module, "commit_shard", stops)
    with pytest.raises(KeyboardInterrupt):
        gather([a.path, b.path], "true", tmp_path / "d")
    with pytest.raises(UnimodalError, match="unfinished"):
        Shards.open(tmp_path / "d")
    left[0] = 1  # the two that are there are not made again
    gather([a.path, b.path], "true", tmp_path / "d")
    assert snapshot(tmp_path / "d") == snapshot(tmp_path / "c")
    left[0] = 0
    gather([a.path, b.path], "true", tmp_path / "d")


def test_no_source_is_in_both_splits(tmp_path: Path, make: Callable[..., Shards]) -> None:
    a = make(tmp_path / "a", [[sample(1, "train", "s"), sample(2, "train", "t")]])
    b = make(tmp_path / "b", [[sample(3, "val", "s")]])
    found = gather([a.path, b.path], "true", tmp_path / "c").index
    splits = dict(zip(found["key"].to_pylist(), found["split"].to_pylist(), strict=True))
    assert splits == {"k0001": "val", "k0002": "train", "k0003": "val"}


def test_what_does_not_mix_is_one_clear_error(
    tmp_path: Path, make: Callable[..., Shards], block_mean: Any
) -> None:
    a = make(tmp_path / "a", TWO[0]).path
    other = make(tmp_path / "b", TWO[0], tokenizer=type(block_mean)("1" * 64)).path
    joint = make(tmp_path / "j", TWO[0], settings={"area": 64, "joint": True}).path
    out = tmp_path / "out"
    for where, given, to, message in [
        ("true", [a, other], out, "b is of another vision tokenizer than .*a: they do not mix"),
        ("true", [a, joint], out, "encoded jointly"),
        ("aestetic > 1", [a], out, "aestetic.* not found.*nearest column is aesthetic"),
        ("1; DROP", [a], out, "cannot be evaluated: Parser Error"),
        ("key IN (SELECT * FROM read_text('/etc/passwd'))", [a], out, "cannot be evaluated"),
        ("aesthetic > 99", [a], out, 'no sample of .*a holds for "aesthetic > 99"'),
        ("true", [a], a, "is among the shards that are read"),
        ("true", [a], other, "another vision tokenizer"),
        ("true", [tmp_path], out, "no shards at"),
    ]:
        with pytest.raises(UnimodalError, match=message):
            gather(given, where, to)
        assert not out.exists()
    gather([a], "true", out)
    with pytest.raises(UnimodalError, match="where was 'true', now 'false or true'"):
        gather([a], "false or true", out)
    with pytest.raises(UsageError):
        gather([a], "nothing(key)", tmp_path / "new")


def test_an_index_that_disagrees_with_its_tar_is_an_error(
    tmp_path: Path, make: Callable[..., Shards]
) -> None:
    a = make(tmp_path / "a", TWO[0]).path
    tar = a / "shard-00000.tar"
    data = tar.read_bytes()
    tar.write_bytes(data.replace(b"k0002.json", b"k0009.json"))
    with pytest.raises(
        UnimodalError, match=r"shard-00000\.tar does not hold k0002 where its index"
    ):
        gather([a], "true", tmp_path / "c")
    table = pq.read_table(a / "shard-00001.parquet")
    tar.write_bytes(data)
    metadata = {"unimodal": table.schema.metadata[b"unimodal"].decode()}

    def shift(name: str, by: int) -> None:
        rows = [row | {name: row[name] + by} for row in table.to_pylist()]
        shifted = table.from_pylist(rows, schema=table.schema)
        write_parquet(shifted, a / "shard-00001.parquet", metadata)

    for name in ("offset", "nbytes"):  # no memory is asked for that is not there
        shift(name, 2**50)
        with pytest.raises(UnimodalError, match=r"shard-00001\.tar does not hold \w+ where its"):
            gather([a], "true", tmp_path / name)
    shift("offset", 512)
    found = gather([a], "true", tmp_path / "d")
    with pytest.raises(UnimodalError, match="does not hold the codes of k0005"):
        content(found)


def test_statistics_count_what_is_written(tmp_path: Path, make: Callable[..., Shards]) -> None:
    shards = make(tmp_path / "a", [*TWO[0], [replace(sample(11, "val"), captions=[])]])
    lengths = []
    for row, told in enumerate(shards.index.to_pylist()):
        if told["task"] == "caption":
            codes = shards.codes(row)
            thing = Image(codes[0]) if told["kind"] == "image" else Video(codes, told["fps"])
            said = max((c["text"] for c in told["captions"]), key=len, default="")
            lengths.append(len(serialize(generation(said, thing), VOCABULARY)))
        else:
            parts = compose(told["task"], shards.segments(row))
            lengths.append(len(write(parts, VOCABULARY, 0.5)[0]))
    found = Statistics(shards)
    assert found.lengths.tolist() == lengths
    record = found.record()
    assert record["lengths"]["max"] == max(lengths) and record["uncaptioned"] == 1
    assert record["lengths"]["p50"] == sorted(lengths)[3] and len(lengths) == 7
    counts = {(t["task"], t["kind"], t["split"]): t["count_all"] for t in record["tasks"]}
    assert counts == {
        ("caption", "image", "train"): 3,
        ("caption", "image", "val"): 1,
        ("caption", "video", "train"): 2,
        ("chat", "document", "train"): 1,
    }
    assert sum(t["tokens_sum"] for t in record["tasks"]) == record["tokens"]
    sizes = {
        (s["kind"], s["frames"], s["height"], s["width"]): s["count_all"] for s in record["sizes"]
    }
    assert sizes[("image", 1, 2, 2)] == sizes[("video", 2, 1, 2)] == 1  # of the document
    assert sum(sizes.values()) == 6 + 2
    (caption,) = record["captions"]
    assert (caption["count_all"], caption["tokens_sum"]) == (5, 5 * len("picture 1"))
    shutil.rmtree(shards.path / "vision_tokenizer")  # none of it needs the weights
    Statistics(Shards.open(shards.path)).record()
