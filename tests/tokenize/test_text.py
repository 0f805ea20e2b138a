"""Text tokenizers: what goes in comes out, and no text becomes a control token."""

from __future__ import annotations

import base64
import json
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unimodal.pipeline.errors import UnimodalError
from unimodal.tokenize.text import TextTokenizer

MERGES = [b"he", b"ll", b"hell", b"hello", b" w", b"\n\n"]


def rank_file(path: Path, merges: list[bytes] = MERGES) -> Path:
    """A small rank file: every byte, then `merges`."""
    tokens = [bytes([i]) for i in range(256)] + merges
    lines = (f"{base64.b64encode(token).decode()} {i}" for i, token in enumerate(tokens))
    path.write_text("\n".join(lines) + "\n")
    return path


def tokenizer_json(path: Path) -> Path:
    """A byte-level BPE of the `tokenizers` library that knows a special string."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["<|im_end|>"])
    inner.enable_truncation(4)
    inner.save(str(path))
    return path


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_bytes_give_back_the_text_in_nfc(text: str) -> None:
    tokenizer = TextTokenizer.load("bytes")
    ids = tokenizer.encode(text)
    clean = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert tokenizer.decode(ids) == unicodedata.normalize("NFC", clean)
    assert all(0 <= i < tokenizer.size == 256 for i in ids)


def test_ranks_give_back_the_text_and_merge_by_rank(tmp_path: Path) -> None:
    tokenizer = TextTokenizer.load(rank_file(tmp_path / "small.tiktoken"))
    assert tokenizer.size == 256 + len(MERGES)
    assert tokenizer.encode("hello") == [256 + MERGES.index(b"hello")]
    for text in ["hello world 12 €", "line\n\nline\t", "e\u0301", "", "\ud800"]:
        clean = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        assert tokenizer.decode(tokenizer.encode(text)) == unicodedata.normalize("NFC", clean)


def test_digits_are_single_ids(tmp_path: Path) -> None:
    tokenizer = TextTokenizer.load(rank_file(tmp_path / "small.tiktoken", [b"90", b"12"]))
    assert len(tokenizer.encode("90*12")) == 5


def test_half_a_character_decodes_to_a_replacement() -> None:
    tokenizer = TextTokenizer.load("bytes")
    assert tokenizer.decode(tokenizer.encode("é")[:1]) == "\ufffd"


def test_emu3s_control_strings_in_text_are_ordinary_text(qwen_ranks: Path) -> None:
    tokenizer = TextTokenizer.load(qwen_ranks)
    text = "<|endoftext|><|image start|>90*90<|image token|><|visual token 000001|><|extra_204|>"
    ids = tokenizer.encode(text)
    assert max(ids) < tokenizer.size == 151_643 and tokenizer.decode(ids) == text


def test_qwens_pattern_is_not_gpt2s(qwen_ranks: Path) -> None:
    """Newlines stay together and apart from words; digits stay alone; text is NFC."""
    tokenizer = TextTokenizer.load(qwen_ranks)
    pieces = [tokenizer.decode([i]) for i in tokenizer.encode("line1\n\n\nline2\n 12")]
    assert pieces == ["line", "1", "\n\n\n", "line", "2", "\n", " ", "1", "2"]
    assert tokenizer.encode("e\u0301") == tokenizer.encode("é")


def test_control_strings_in_text_are_ordinary_text(tmp_path: Path) -> None:
    text = "<|im_end|><|image start|><|extra_203|>"
    for where in (
        "bytes",
        rank_file(tmp_path / "small.tiktoken"),
        tokenizer_json(tmp_path / "tokenizer.json"),
    ):
        tokenizer = TextTokenizer.load(where)
        ids = tokenizer.encode(text)
        assert len(ids) == len(text)  # none of these merges any of it
        assert max(ids) < 256
        assert tokenizer.decode(ids) == text


def test_tokenizer_json_neither_truncates_nor_loses_added_ids(tmp_path: Path) -> None:
    tokenizer = TextTokenizer.load(tokenizer_json(tmp_path / "tokenizer.json"))
    assert tokenizer.size == 257
    assert len(tokenizer.encode("far longer than four")) == 20


def test_saved_tokenizers_are_equal_and_give_equal_ids(tmp_path: Path) -> None:
    for number, where in enumerate(
        ["bytes", rank_file(tmp_path / "a.tiktoken"), tokenizer_json(tmp_path / "tokenizer.json")]
    ):
        tokenizer = TextTokenizer.load(where)
        tokenizer.save(tmp_path / str(number))
        again = TextTokenizer.load(tmp_path / str(number))
        assert again == tokenizer
        assert (again.name, again.size) == (tokenizer.name, tokenizer.size)
        assert again.encode("hello world\n\n1") == tokenizer.encode("hello world\n\n1")


def test_of_a_tokenizer_json_only_the_first_ids_may_be_text(tmp_path: Path) -> None:
    """transformers' Emu3 lists control and vision tokens in the same file, behind the text."""
    from tokenizers import AddedToken, Tokenizer

    whole = Tokenizer.from_file(str(tokenizer_json(tmp_path / "tokenizer.json")))
    whole.add_special_tokens([AddedToken("<|begin|>", special=True)])
    whole.save(str(tmp_path / "tokenizer.json"))
    part = TextTokenizer.load(tmp_path / "tokenizer.json", size=256)
    assert part.size == 256 and part != TextTokenizer.load(tmp_path / "tokenizer.json")
    assert max(part.encode("<|begin|>")) < 256
    with pytest.raises(UnimodalError, match="id 257 is not a text id"):
        part.decode([257])
    part.save(tmp_path / "saved")
    again = TextTokenizer.load(tmp_path / "saved")
    assert again == part and again.size == 256
    with pytest.raises(UnimodalError, match="has 258 ids, not 300"):
        TextTokenizer.load(tmp_path / "tokenizer.json", size=300)
    whole.add_tokens(["plain"])
    whole.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UnimodalError, match="writes 'plain' as text"):
        TextTokenizer.load(tmp_path / "tokenizer.json", size=256)


def test_ids_that_are_not_text_are_refused() -> None:
    with pytest.raises(UnimodalError, match="id 256 is not a text id"):
        TextTokenizer.load("bytes").decode([65, 256])


def test_what_is_no_tokenizer_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "bad.tiktoken").write_text("not base64 at all\n")
    (tmp_path / "holes.tiktoken").write_text("YQ== 7\n")
    (tmp_path / "bad.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "empty").mkdir()
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "text.json").write_text(json.dumps({"tokenizer": "../../etc"}))
    for name, message in [
        ("bad.tiktoken", "bad.tiktoken:1"),
        ("holes.tiktoken", "not a whole rank file"),
        ("bad.json", "not a tokenizer.json"),
        ("notes.txt", "no text tokenizer"),
        ("empty", "holds 0 text tokenizers"),
        ("strange", "names no text tokenizer"),
        ("absent", "no text tokenizer at"),
    ]:
        with pytest.raises(UnimodalError, match=message):
            TextTokenizer.load(tmp_path / name)


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        (
            "a portrait of young girl. masterpiece, film grained, best quality.",
            "64 33033 315 3908 3743 13 58731 11 4531 1081 2627 11 1850 4271 13",
        ),
        ("a shiba inu", "64 557 34938 304 84"),
        ("You are a helpful assistant. USER: ", "2610 525 264 10950 17847 13 13872 25 220"),
        ("Please describe the image. ASSISTANT:", "5501 7512 279 2168 13 35560 3846 2821 25"),
        ("90*90", "24 15 9 24 15"),
        ("68*120", "21 23 9 16 17 15"),
    ],
)
def test_golden_ids_of_emu3(text: str, ids: str, qwen_ranks: Path) -> None:
    tokenizer = TextTokenizer.load(qwen_ranks)
    assert tokenizer.encode(text) == [int(i) for i in ids.split()]
    assert tokenizer.decode(tokenizer.encode(text)) == text
