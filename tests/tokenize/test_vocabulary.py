"""The vocabulary: ranges that never overlap, and Emu3's exact ids."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from unimodal.pipeline.errors import UnimodalError
from unimodal.tokenize import vocabulary as module
from unimodal.tokenize.document import Image, serialize
from unimodal.tokenize.text import TextTokenizer
from unimodal.tokenize.vocabulary import SPECIALS, Vocabulary


def fake_qwen(path: Path) -> Path:
    """A rank file with as many ranks as Qwen's, so that the layout can be tested without it."""
    import base64

    tokens = [bytes([i]) for i in range(256)]
    tokens += [b"\xff" + i.to_bytes(3, "big") for i in range(module.EMU3_TEXT_IDS - 256)]
    lines = (f"{base64.b64encode(token).decode()} {i}" for i, token in enumerate(tokens))
    path.write_text("\n".join(lines))
    return path


def test_every_id_of_a_small_vocabulary_has_one_meaning() -> None:
    vocabulary = Vocabulary.bytes(64)
    ids = np.arange(vocabulary.size)
    kinds = vocabulary.is_text(ids).astype(int) + vocabulary.is_vision(ids)
    specials = [getattr(vocabulary, name) for name in SPECIALS]
    kinds[specials] += 1
    assert (kinds == 1).all()
    assert vocabulary.size == 256 + 8 + 64
    assert not vocabulary.is_vision(np.array([-1, vocabulary.size])).any()


def test_emu3_ids_are_the_published_ones(tmp_path: Path) -> None:
    vocabulary = Vocabulary.emu3(fake_qwen(tmp_path / "fake.tiktoken"))
    assert vocabulary.size == 184_622
    assert (vocabulary.bos, vocabulary.eos, vocabulary.pad) == (151_849, 151_850, 151_643)
    assert (vocabulary.boi, vocabulary.img, vocabulary.eoi) == (151_852, 151_851, 151_853)
    assert (vocabulary.eol, vocabulary.eof) == (151_846, 151_847)
    assert (vocabulary.vision_start, vocabulary.codebook_size) == (151_854, 32_768)


def test_emu3_has_every_id_where_its_release_has_it(tmp_path: Path) -> None:
    """The release lists its ids as names in a row, behind the ranks of its BPE."""
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    names += [f"<|extra_{i}|>" for i in range(205)]
    names += ["<|image token|>", "<|image start|>", "<|image end|>"]
    names += [f"<|visual token {code:06d}|>" for code in range(32_768)]
    released = {name: 151_643 + i for i, name in enumerate(names)}
    vocabulary = Vocabulary.emu3(fake_qwen(tmp_path / "fake.tiktoken"))
    assert vocabulary.size == 151_643 + len(names)
    assert vocabulary.specials == {
        "pad": released["<|endoftext|>"],
        "bos": released["<|extra_203|>"],
        "eos": released["<|extra_204|>"],
        "img": released["<|image token|>"],
        "boi": released["<|image start|>"],
        "eoi": released["<|image end|>"],
        "eol": released["<|extra_200|>"],
        "eof": released["<|extra_201|>"],
    }
    ids = np.arange(vocabulary.size)
    vision = [released[f"<|visual token {code:06d}|>"] for code in range(32_768)]
    np.testing.assert_array_equal(np.flatnonzero(vocabulary.is_vision(ids)), vision)
    np.testing.assert_array_equal(np.flatnonzero(vocabulary.is_text(ids)), np.arange(151_643))
    codes = np.arange(32_768).reshape(256, 128)
    written = serialize([Image(codes)], vocabulary)
    assert written[vocabulary.is_vision(written)].tolist() == vision


def test_emu3_refuses_other_ranks() -> None:
    with pytest.raises(UnimodalError, match=r"emu3\.tiktoken"):
        Vocabulary.emu3("bytes")


def test_a_saved_vocabulary_is_the_same_and_its_digest_too(tmp_path: Path) -> None:
    vocabulary = Vocabulary.bytes(64)
    vocabulary.save(tmp_path)
    assert Vocabulary.load(tmp_path) == vocabulary
    assert Vocabulary.load(tmp_path).digest() == vocabulary.digest()
    assert Vocabulary.bytes(65).digest() != vocabulary.digest()


def test_overlapping_ranges_are_refused() -> None:
    text = TextTokenizer.load("bytes")
    ids = {name: 256 + i for i, name in enumerate(SPECIALS)}
    for change in ({"eos": ids["bos"]}, {"eol": 65}, {"eof": 270}, {"vision_start": 200}):
        arguments = {"vision_start": 264, "codebook_size": 16} | ids | change
        with pytest.raises(UnimodalError, match="overlap"):
            Vocabulary(text=text, **arguments)


def test_a_damaged_vocabulary_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(UnimodalError, match="no vocabulary at"):
        Vocabulary.load(tmp_path)
    Vocabulary.bytes(64).save(tmp_path)
    whole = json.loads((tmp_path / "vocabulary.json").read_text())
    for change, message in [
        ({"format": 99}, "format 99"),
        ({"bos": "257"}, "damaged"),
        ({"bos": -1}, "damaged"),
        ({"codebook_size": None}, "damaged"),
        ({"text_digest": "0" * 64}, "another text tokenizer"),
    ]:
        (tmp_path / "vocabulary.json").write_text(json.dumps(whole | change))
        with pytest.raises(UnimodalError, match=message):
            Vocabulary.load(tmp_path)
