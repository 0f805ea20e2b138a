"""One id space for everything: text ids | special ids | vision ids.

    0 .. text.size-1                           text
    pad bos eos img boi eoi eol eof            control tokens, anywhere outside the other ranges
    vision_start .. vision_start+codebook-1    vision codes

Text comes first, so the two ranges and eight numbers say everything. The vocabulary is saved
with every data set and checkpoint, and its digest tells whether two of them fit together.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from unimodal.pipeline.errors import UnimodalError
from unimodal.pipeline.files import atomic
from unimodal.tokenize.text import TextTokenizer

SPECIALS = ("pad", "bos", "eos", "img", "boi", "eoi", "eol", "eof")
FORMAT = 1

# Emu3's ids: Qwen's 151,643 ranks, three of Qwen's control tokens, 205 spare ones, then the
# three image markers and 32,768 vision tokens.
EMU3_TEXT_IDS = 151_643
EMU3_IDS = {
    "pad": 151_643,
    "bos": 151_849,
    "eos": 151_850,
    "img": 151_851,
    "boi": 151_852,
    "eoi": 151_853,
    "eol": 151_846,
    "eof": 151_847,
}
EMU3_VISION_START = 151_854
EMU3_CODEBOOK_SIZE = 32_768


@dataclass(frozen=True)
class Vocabulary:
    """The ranges and control ids of one id space.

    `img` opens the codes of a vision block, `boi`/`eoi` enclose the block, `eol` ends a row of
    codes and `eof` a frame. Raises `UnimodalError` if ranges overlap.
    """

    text: TextTokenizer
    pad: int
    bos: int
    eos: int
    img: int
    boi: int
    eoi: int
    eol: int
    eof: int
    vision_start: int
    codebook_size: int

    def __post_init__(self) -> None:
        specials = self.specials
        vision = range(self.vision_start, self.vision_start + self.codebook_size)
        clash = [name for name, i in specials.items() if i < self.text.size or i in vision]
        if len(set(specials.values())) != len(SPECIALS):
            clash.append("two control tokens with one id")
        if self.codebook_size < 1 or self.vision_start < self.text.size:
            clash.append("vision ids")
        if clash:
            raise UnimodalError(f"vocabulary ranges overlap: {', '.join(clash)}; rebuild it")

    @classmethod
    def build(cls, text: TextTokenizer, codebook_size: int) -> Vocabulary:
        """Text ids, the eight control tokens right behind them, then the vision codes."""
        ids = {name: text.size + i for i, name in enumerate(SPECIALS)}
        start = text.size + len(SPECIALS)
        return cls(text=text, vision_start=start, codebook_size=codebook_size, **ids)

    @classmethod
    def bytes(cls, codebook_size: int) -> Vocabulary:
        """The vocabulary of tiny models: 256 bytes, 8 control tokens, `codebook_size` codes."""
        return cls.build(TextTokenizer.load("bytes"), codebook_size)

    @classmethod
    def emu3(cls, rank_file: str | Path, codebook_size: int = EMU3_CODEBOOK_SIZE) -> Vocabulary:
        """Emu3's own ids (arXiv 2409.18869): 184,622 with the released codebook.

        `rank_file` is `emu3.tiktoken` of its release, or `qwen.tiktoken`, or a directory with
        one of them.
        """
        text = TextTokenizer.load(rank_file)
        if text.name != "tiktoken" or text.size != EMU3_TEXT_IDS:
            raise UnimodalError(
                f"{rank_file} is not Qwen's rank file ({EMU3_TEXT_IDS} ranks): the emu3 "
                f"vocabulary needs emu3.tiktoken of Emu3's release, or qwen.tiktoken"
            )
        return cls(
            text=text, vision_start=EMU3_VISION_START, codebook_size=codebook_size, **EMU3_IDS
        )

    @classmethod
    def named(cls, name: str, codebook_size: int) -> Vocabulary:
        """The vocabulary that a user's setting means, with room for `codebook_size` codes.

        `bytes`; `emu3:FILE` with Qwen's rank file; a directory that `save` wrote; or the file of
        a text tokenizer (*.tiktoken, tokenizer.json), with our control tokens behind it.
        """
        if name == "bytes":
            return cls.bytes(codebook_size)
        preset, colon, file = name.partition(":")
        if preset == "emu3":
            if not colon:
                raise UnimodalError(
                    "the emu3 vocabulary needs its rank file: write emu3:PATH/emu3.tiktoken "
                    "(or qwen.tiktoken, which is the same)"
                )
            return cls.emu3(file, codebook_size)
        if not Path(name).exists():
            raise UnimodalError(f"no vocabulary {name}: give bytes, emu3:FILE, a file or a folder")
        if (Path(name) / "vocabulary.json").is_file():
            return cls.load(name)
        return cls.build(TextTokenizer.load(name), codebook_size)

    @property
    def specials(self) -> dict[str, int]:
        """Control tokens by name."""
        return {name: getattr(self, name) for name in SPECIALS}

    @property
    def size(self) -> int:
        """Number of ids: rows of the embedding and of the head."""
        return max(self.vision_start + self.codebook_size, max(self.specials.values()) + 1)

    def is_vision(self, ids: np.ndarray) -> np.ndarray:
        """Which of `ids` (any shape) are vision codes; bool, same shape."""
        return (ids >= self.vision_start) & (ids < self.vision_start + self.codebook_size)

    def is_text(self, ids: np.ndarray) -> np.ndarray:
        """Which of `ids` (any shape) are text; bool, same shape."""
        return (ids >= 0) & (ids < self.text.size)

    def save(self, directory: Path) -> None:
        """Write `vocabulary.json` and the text tokenizer's files."""
        self.text.save(directory)
        with atomic(directory / "vocabulary.json") as temporary:
            temporary.write_text(json.dumps(self._record(), indent=2, sort_keys=True) + "\n")

    @classmethod
    def load(cls, directory: str | Path) -> Vocabulary:
        """Read what `save` wrote; raises `UnimodalError` if it is not whole."""
        path = Path(directory) / "vocabulary.json"
        if not path.is_file():
            raise UnimodalError(f"no vocabulary at {directory}: it should hold vocabulary.json")
        try:
            record = json.loads(path.read_text())
            names = (*SPECIALS, "vision_start", "codebook_size")
            ids = {name: _whole(record[name]) for name in names}
            digest = record["text_digest"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UnimodalError(f"{path} is damaged ({error!r}): copy it again") from error
        if record.get("format") != FORMAT:
            raise UnimodalError(
                f"{path} has format {record.get('format')}, this version reads {FORMAT}: "
                "install the version that wrote it"
            )
        text = TextTokenizer.load(directory)
        if text.digest() != digest:
            raise UnimodalError(
                f"{directory} holds another text tokenizer than vocabulary.json was made with: "
                "copy the whole directory again"
            )
        return cls(text=text, **ids)

    def digest(self) -> str:
        """SHA-256 of all ranges and the text tokenizer; equal digests give equal ids."""
        return hashlib.sha256(json.dumps(self._record(), sort_keys=True).encode()).hexdigest()

    def _record(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            **self.specials,
            "vision_start": self.vision_start,
            "codebook_size": self.codebook_size,
            "text_tokenizer": self.text.name,
            "text_digest": self.text.digest(),
            "text_size": self.text.size,
        }


def _whole(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r} is not an id")
    return value
