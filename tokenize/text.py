"""Text to ids and back: plain bytes, Qwen's byte-level BPE, or any `tokenizer.json`.

A text tokenizer knows nothing of control tokens. Strings such as `<|image start|>` in a user's
text are ordinary characters here, so that no caption can open a picture or end a document.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from unimodal.pipeline.errors import UnimodalError
from unimodal.pipeline.files import atomic

# Qwen's pre-split: one digit per token, and runs of newlines apart from other blanks. GPT-2's
# pattern differs on both, which gives other ids for the same ranks.
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# What a saved tokenizer's file is called. The names are fixed: a file that was given to the user
# can never point to another place on the disk.
FILES = {"bytes": None, "tiktoken": "text.tiktoken", "tokenizer.json": "tokenizer.json"}
MAX_FILE_BYTES = 256 << 20


class TextTokenizer:
    """Text <-> ids 0..size-1. Made by `TextTokenizer.load`.

    `name` is `bytes`, `tiktoken` or `tokenizer.json`; `size` is the number of ids.
    `decode(encode(text))` gives the text in Unicode's NFC form (a `tokenizer.json` follows its
    own normalizer).
    """

    def __init__(
        self,
        name: str,
        size: int,
        encode: Callable[[str], list[int]],
        decode: Callable[[list[int]], str],
        source: bytes = b"",
        part: bool = False,
    ) -> None:
        """`part`: the vocabulary file lists ids from `size` on, too, which are no text."""
        self.name = name
        self.size = size
        self._encode = encode
        self._decode = decode
        self._source = source  # the vocabulary file, byte for byte: what `save` writes
        self._part = part
        end = b"\0%d" % size if part else b""
        self._digest = hashlib.sha256(name.encode() + b"\0" + source + end).hexdigest()

    @classmethod
    def load(cls, where: str | Path, size: int | None = None) -> TextTokenizer:
        """Load `"bytes"`, a `*.tiktoken` rank file, a `tokenizer.json`, or a directory of either.

        `size`: of a `tokenizer.json`, how many of its ids are text. Those behind them, such as the
        control and vision tokens that transformers' Emu3 lists there, are never written or read.
        Raises `UnimodalError` when there is nothing to load or the file is not what it says.
        """
        if where == "bytes":
            return _bytes()
        path = _find(Path(where))
        if path is None:
            return _bytes()
        if path.stat().st_size > MAX_FILE_BYTES:
            raise UnimodalError(f"text tokenizer {path} is over {MAX_FILE_BYTES >> 20} MiB")
        source = path.read_bytes()
        if path.suffix == ".tiktoken":
            return _tiktoken(source, path)
        return _json(source, path, size or _saved_size(path.parent))

    def encode(self, text: str) -> list[int]:
        """Ids of `text`. Nothing is added in front or behind."""
        return self._encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD.

        Raises `UnimodalError` for an id that is not a text id.
        """
        plain = [int(i) for i in ids]
        bad = next((i for i in plain if not 0 <= i < self.size), None)
        if bad is not None:
            raise UnimodalError(f"id {bad} is not a text id: text ids are 0 to {self.size - 1}")
        return self._decode(plain)

    def save(self, directory: Path) -> None:
        """Write what `load(directory)` needs: `text.json`, and the vocabulary file if any."""
        directory.mkdir(parents=True, exist_ok=True)
        file = FILES[self.name]
        if file is not None:
            with atomic(directory / file) as temporary:
                temporary.write_bytes(self._source)
        record = {"tokenizer": self.name, **({"size": self.size} if self._part else {})}
        with atomic(directory / "text.json") as temporary:
            temporary.write_text(json.dumps(record) + "\n")

    def digest(self) -> str:
        """SHA-256 of the kind and the vocabulary file; equal digests give equal ids."""
        return self._digest

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TextTokenizer) and self.digest() == other.digest()

    def __hash__(self) -> int:
        return hash(self.digest())

    def __repr__(self) -> str:
        return f"TextTokenizer({self.name}, {self.size} ids)"


def _find(path: Path) -> Path | None:
    """The vocabulary file that `path` means; None for a directory that says `bytes`."""
    if path.is_file():
        if path.suffix in (".tiktoken", ".json"):
            return path
        raise UnimodalError(f"{path} is no text tokenizer: give a *.tiktoken or a tokenizer.json")
    if not path.is_dir():
        raise UnimodalError(f"no text tokenizer at {path}: give 'bytes', a file or a directory")
    if (path / "text.json").is_file():
        try:
            name = json.loads((path / "text.json").read_text())["tokenizer"]
            file = FILES[name]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UnimodalError(
                f"{path / 'text.json'} names no text tokenizer of ours; known: {', '.join(FILES)}"
            ) from error
        if file is None:
            return None
        if not (path / file).is_file():
            raise UnimodalError(f"{path} lacks {file}: copy the whole directory again")
        return path / file
    found = sorted(path.glob("*.tiktoken")) or sorted(path.glob("tokenizer.json"))
    if len(found) != 1:
        raise UnimodalError(
            f"{path} holds {len(found)} text tokenizers: name one *.tiktoken or tokenizer.json"
        )
    return found[0]


def _saved_size(directory: Path) -> int | None:
    """How many ids are text, where `save` wrote that down."""
    if not (directory / "text.json").is_file():
        return None
    size = json.loads((directory / "text.json").read_text()).get("size")  # `_find` has read it
    return size if isinstance(size, int) else None


def _normal(text: str) -> str:
    """NFC, with lone surrogates (which no UTF-8 has) as U+FFFD."""
    if text.isascii():
        return text
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return unicodedata.normalize("NFC", text)


def _bytes() -> TextTokenizer:
    return TextTokenizer(
        "bytes",
        256,
        lambda text: list(_normal(text).encode()),
        lambda ids: bytes(ids).decode("utf-8", "replace"),
    )


def _tiktoken(source: bytes, path: Path) -> TextTokenizer:
    import tiktoken

    ranks: dict[bytes, int] = {}
    for number, line in enumerate(source.splitlines(), 1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise UnimodalError(
                f"{path}:{number} is not '<base64> <rank>': {line[:40]!r}"
            ) from error
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing or sorted(ranks.values()) != list(range(len(ranks))):
        raise UnimodalError(
            f"{path} is not a whole rank file: ranks must run from 0 without a gap and hold "
            f"all 256 bytes ({len(missing)} missing); download it again"
        )
    bpe = tiktoken.Encoding("text", pat_str=QWEN_PATTERN, mergeable_ranks=ranks, special_tokens={})
    return TextTokenizer(
        "tiktoken",
        len(ranks),
        lambda text: bpe.encode_ordinary(_normal(text)),
        lambda ids: bpe.decode_bytes(ids).decode("utf-8", "replace"),
        source,
    )


def _json(source: bytes, path: Path, size: int | None) -> TextTokenizer:
    from tokenizers import Tokenizer

    try:
        inner: Any = Tokenizer.from_str(source.decode())
    except Exception as error:  # the library raises bare Exception for a bad file
        raise UnimodalError(f"{path} is not a tokenizer.json: {error}") from error
    inner.no_truncation()
    inner.no_padding()
    # The file's own special strings are ordinary text when a user writes them.
    inner.encode_special_tokens = True

    def encode(text: str) -> list[int]:
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return list(inner.encode(text, add_special_tokens=False).ids)

    whole = max(inner.get_vocab(with_added_tokens=True).values()) + 1
    if size is not None:
        added = inner.get_added_tokens_decoder().items()
        named = sorted(str(token.content) for i, token in added if i >= size and not token.special)
        if named or not 0 < size <= whole:
            what = f"writes {named[0]!r} as text" if named else f"has {whole} ids, not {size}"
            raise UnimodalError(f"{path} {what}: copy it again")
    return TextTokenizer(
        "tokenizer.json",
        size or whole,
        encode,
        lambda ids: str(inner.decode(ids, skip_special_tokens=False)),
        source,
        part=size is not None,
    )
