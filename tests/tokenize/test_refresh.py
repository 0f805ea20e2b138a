"""New captions for old codes: the indices change, and nothing else does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image

from unimodal.pipeline.clips import CLIPS, table, write_parquet
from unimodal.pipeline.errors import UnimodalError
from unimodal.tokenize import refresh as module
from unimodal.tokenize.gather import gather
from unimodal.tokenize.plan import TokenizeSettings
from unimodal.tokenize.refresh import refresh
from unimodal.tokenize.run import tokenize
from unimodal.tokenize.shards import Shards
from unimodal.tokenize.vocabulary import Vocabulary

SMALL = TokenizeSettings(area=32 * 32, batch=3, shard_size=2)


def run_of(folder: Path, photos: Path, said: str, leave_out: str = "") -> Path:
    """A run of four photographs, with a caption each."""
    rows = []
    for number, name in enumerate(("coffee.png", "chelsea.png", "rocket.jpg", "astronaut.png")):
        if name == leave_out:
            continue
        with Image.open(photos / name) as picture:
            width, height = picture.size
        row: dict[str, Any] = dict.fromkeys(CLIPS.names)
        row |= {"part": "p", "uri": str(photos / name), "uid": f"{number:032d}", "kind": "image"}
        row |= {"source_sha256": f"{number:064d}", "width": width, "height": height}
        captions = [{"style": "given", "lang": "en", "text": f"{said} {name}"}]
        rows.append(row | {"verdict": "keep", "captions": captions})
    write_parquet(table(rows, CLIPS), folder / "clips.parquet")
    return folder


def texts(shards: Shards) -> list[str]:
    return [c["text"] for row in shards.index["captions"].to_pylist() for c in row]


def snapshot(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_captions_are_those_of_the_run_and_no_code_is_touched(
    tmp_path: Path, photos: Path, block_mean: Any
) -> None:
    old, new = (run_of(tmp_path / said, photos, said) for said in ("a", "a long"))
    shards = tokenize(old, tmp_path / "s", SMALL, tokenizer=block_mean)
    assert all(text.startswith("a ") and "long" not in text for text in texts(shards))
    before = snapshot(tmp_path / "s")
    told = refresh(new, tmp_path / "s")
    assert told == {"samples": 4, "changed": 4, "unknown": 0, "shards": 2}
    after = snapshot(tmp_path / "s")
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == {"shard-00000.parquet", "shard-00001.parquet"}
    found = Shards.open(tmp_path / "s")
    assert all(text.startswith("a long ") for text in texts(found))
    tokens = [c["tokens"] for row in found.index["captions"].to_pylist() for c in row]
    assert tokens == [len(text) for text in texts(found)]
    codes = [found.codes(row).tolist() for row in range(4)]
    assert codes == [shards.codes(row).tolist() for row in range(4)]
    assert refresh(new, tmp_path / "s")["shards"] == 0  # a second time there is nothing to do
    assert snapshot(tmp_path / "s") == after
    block_mean.encode = None  # and the run's own tokenizing finds all of it done
    assert texts(tokenize(new, tmp_path / "s", SMALL, tokenizer=block_mean)) == texts(found)


def test_a_refresh_that_was_stopped_goes_on(
    tmp_path: Path, photos: Path, block_mean: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = (run_of(tmp_path / said, photos, said) for said in ("a", "b"))
    for name in ("s", "t"):
        tokenize(old, tmp_path / name, SMALL, tokenizer=block_mean)
    refresh(new, tmp_path / "s")
    write, left = module.write_parquet, [1]

    def stops(*given: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        write(*given)

    monkeypatch.setattr(module, "write_parquet", stops)
    with pytest.raises(KeyboardInterrupt):
        refresh(new, tmp_path / "t")
    assert len(texts(Shards.open(tmp_path / "t"))) == 4  # readable all the while
    left[0] = 1
    assert refresh(new, tmp_path / "t")["shards"] == 1
    assert snapshot(tmp_path / "t") == snapshot(tmp_path / "s")


def test_samples_of_elsewhere_keep_what_they_have(
    tmp_path: Path, photos: Path, block_mean: Any
) -> None:
    old = run_of(tmp_path / "a", photos, "a")
    part = run_of(tmp_path / "b", photos, "b", leave_out="coffee.png")
    (tmp_path / "x.jsonl").write_text(json.dumps({"text": "words"}) + "\n")
    pictures = tokenize(old, tmp_path / "s", SMALL, tokenizer=block_mean)
    words = tokenize(tmp_path / "x.jsonl", tmp_path / "w", SMALL, tokenizer=block_mean)
    both = gather([pictures.path, words.path], "true", tmp_path / "both")
    told = refresh(part, both.path)
    assert (told["samples"], told["changed"], told["unknown"]) == (5, 3, 1)
    said = sorted(text.split()[0] for text in texts(Shards.open(both.path)))
    assert said == ["a", "b", "b", "b"]


def test_a_caption_of_a_stretch_goes_to_its_window(tmp_path: Path, block_mean: Any) -> None:
    from unimodal.tokenize.plan import captions_of

    given = [
        {"style": "dense", "lang": "en", "text": "first", "start_s": 0.0, "end_s": 2.0},
        {"style": "dense", "lang": "en", "text": "second", "start_s": 2.0, "end_s": 4.0},
        {"style": "given", "lang": "en", "text": "all", "start_s": None, "end_s": None},
    ]
    assert [c["text"] for c in captions_of(given, 2.0, 4.0, Vocabulary.bytes(64))] == [
        "second",
        "all",
    ]


def test_what_cannot_be_refreshed_is_one_clear_error(
    tmp_path: Path, photos: Path, block_mean: Any
) -> None:
    run = run_of(tmp_path / "a", photos, "a")
    with pytest.raises(UnimodalError, match="no clips at"):
        refresh(tmp_path, tmp_path / "s")
    with pytest.raises(UnimodalError, match="no shards at"):
        refresh(run, tmp_path / "s")
    shards = tokenize(run, tmp_path / "s", SMALL, tokenizer=block_mean)
    index = shards.path / "shard-00001.parquet"
    table = pq.read_table(index)
    write_parquet(table.replace_schema_metadata(), index)
    with pytest.raises(UnimodalError, match=r"cannot be read \(unimodal tokenize did not write it"):
        refresh(run, tmp_path / "s")
    index.write_bytes(b"none of ours")
    with pytest.raises(UnimodalError, match=r"shard-00001\.parquet cannot be read"):
        refresh(run, tmp_path / "s")
