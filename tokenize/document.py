"""What a legal sequence looks like: one description for serializer, parser and sampler.

    document     = [BOS] (text | vision block | EOS)* [EOS]    an inner EOS ends a turn of a chat
    vision block = BOI meta IMG (frame EOF)+ EOI          an image has one frame
    frame        = (W codes EOL) * H                       EOL ends every row, the last one too

`meta` is text. For an image it is `H*W` in codes, height first, as in Emu3 (arXiv 2409.18869).
Emu3's format for video is unpublished; ours is `T*H*W@fps`: T latent frames of 4 pictures each,
and pictures per second, so that the duration is 4 T / fps seconds.

Given the meta, a block has no freedom but its codes. `block_template` writes that down once: the
serializer fills it in, the parser compares with it, and the sampler draws only where it is FREE.

Chats are written with Emu3-Chat's template, whose literal period behind a question is kept:

    BOS "You are a helpful assistant. " ("USER: " question ". ASSISTANT:" answer EOS)+

A question may hold pictures anywhere. Further turns are ours (Emu3 publishes one), after Vicuna,
whose template this is. Each text is encoded by itself, so that lengths follow from counts: the
"?" of a question and the "." behind it are two ids, where one line encoded whole might give one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import Any

import numpy as np

from unimodal.pipeline.errors import UnimodalError
from unimodal.tokenize.vocabulary import Vocabulary

SPATIAL = 8
"""Pixels along a side of one code of Emu3's vision tokenizer."""
TEMPORAL = 4
"""Pictures in one latent frame of it."""

FREE = -1
"""Stands in a template where a vision code goes."""

# At most six digits for a side keeps a hostile meta from asking for astronomically many ids.
_META = re.compile(r"(?:(\d{1,6})\*)?(\d{1,6})\*(\d{1,6})(?:@(\d{1,4}(?:\.\d{1,3})?))?", re.ASCII)


class DocumentError(UnimodalError):
    """The ids are no legal document, or a segment cannot be written as ids."""


@dataclass(frozen=True)
class Text:
    """A stretch of text."""

    text: str


@dataclass(frozen=True, eq=False)
class Image:
    """Vision codes [H, W] of one still image."""

    codes: np.ndarray

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Image) and np.array_equal(self.codes, other.codes)


@dataclass(frozen=True, eq=False)
class Video:
    """Vision codes [T, H, W] of T latent frames, and the rate of the pictures they stand for.

    `fps` is kept to a thousandth, which is what the meta text carries.
    """

    codes: np.ndarray
    fps: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "fps", round(float(self.fps), 3))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Video):
            return False
        return self.fps == other.fps and np.array_equal(self.codes, other.codes)


@dataclass(frozen=True)
class End:
    """EOS inside a document: the end of a turn of a chat."""


Segment = Text | Image | Video | End

SYSTEM = "You are a helpful assistant. "
ROLES = {
    "text": ("text",),
    "interleaved": ("text",),
    "chat": ("user", "assistant"),
    "edit": ("source", "instruction", "result"),
}
"""Of each task, the roles that its pieces have, in this order."""


@dataclass(frozen=True)
class Piece:
    """A segment of a document, and who says it: see `ROLES`."""

    segment: Text | Image | Video
    role: str = "text"


@dataclass(frozen=True)
class Part:
    """A segment as it stands in a sequence, and whether it is to be predicted."""

    segment: Segment
    target: bool


def compose(task: str, pieces: Sequence[Piece]) -> list[Part]:
    """The whole document, template and all, but for its BOS and last EOS.

    Targets are: every piece of `text` and `interleaved`; answers and the EOS behind each in
    `chat`; the result in `edit`, whose source and instruction are context. Raises
    `DocumentError` if the roles are not those of the task, see `ROLES`.
    """
    placed = _layout(task, [piece.role for piece in pieces])
    return [
        Part(pieces[at].segment if isinstance(at, int) else at, target) for at, target in placed
    ]


def _layout(task: str, roles: Sequence[str]) -> Iterator[tuple[int | Text | End, bool]]:
    """Pieces by number, and what the template puts between them, each with whether a target."""
    if task not in ROLES:
        raise DocumentError(f"no task is called {task}: there are {', '.join(ROLES)}")
    numbered = groupby(enumerate(roles), lambda one: one[1])
    turns = [(role, [i for i, _ in some]) for role, some in numbered]
    said, known = [role for role, _ in turns], ROLES[task]
    if task == "chat":
        good = said == list(known) * (len(said) // 2)
    else:
        good = said == list(known)
    if not (good and said):
        wanted = ", ".join(known) + (", in turn" if task == "chat" else "")
        raise DocumentError(f"a document of task {task} has {wanted}, not {', '.join(said)}")
    for number, (role, places) in enumerate(turns):
        if role == "user":
            yield Text("USER: " if number else f"{SYSTEM}USER: "), False
        for place in places:
            yield place, role not in ("user", "source", "instruction")
        if role == "user":
            yield Text(". ASSISTANT:"), False
        elif role == "assistant" and number + 1 < len(turns):  # the last one's is the document's
            yield End(), True


def write(
    parts: Sequence[Part], vocabulary: Vocabulary, vision_weight: float, eos: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Ids of a document, int64 [S], and the weight of each as a target, float32 [S].

    Text and EOS that are targets weigh 1, a vision block `vision_weight` from BOI to EOI: codes,
    and also meta, EOL and EOF, which say nothing of their own (Emu3 does not publish how it
    counts them). All else weighs 0; the last EOS is a target where the last part is one.
    Raises `DocumentError` as `serialize` does.
    """
    pieces = [_ids(part.segment, vocabulary) for part in parts]
    weighed = [part.target and _weight(part.segment, vision_weight) for part in parts]
    last = [vocabulary.eos] if eos else []
    ids = np.concatenate([[vocabulary.bos], *pieces, last], dtype=np.int64, casting="unsafe")
    values = [0, *weighed, bool(parts) and parts[-1].target]
    lengths = [1, *map(len, pieces), len(last)]
    return ids, np.repeat(np.array(values, np.float32), lengths)


def _weight(segment: Segment, vision_weight: float) -> float:
    return vision_weight if isinstance(segment, Image | Video) else 1.0


def parts_length(task: str, segments: Sequence[Mapping[str, Any]], vocabulary: Vocabulary) -> int:
    """Number of ids that `write` gives for a document, from `segments` of the index alone.

    Each has kind, role, and its counts: tokens of a text; frames, height, width and fps else.
    """
    around = _around(task, tuple(segment["role"] for segment in segments), vocabulary)
    return around + sum(segment_length(segment, vocabulary) for segment in segments)


@lru_cache(maxsize=1024)
def _around(task: str, roles: tuple[str, ...], vocabulary: Vocabulary) -> int:
    """Number of ids around the pieces of a document: BOS, EOS and what the template puts there."""
    parts = [at for at, _ in _layout(task, roles) if not isinstance(at, int)]
    return len(serialize(parts, vocabulary))


def segment_length(segment: Mapping[str, Any], vocabulary: Vocabulary) -> int:
    """Number of ids of one of the index's `segments`, or of the codes of one of its rows."""
    if segment["kind"] == "text":
        return int(segment["tokens"])
    moving = (segment["frames"], segment["fps"]) if segment["kind"] == "video" else ()
    return _block_length(vocabulary, segment["height"], segment["width"], *moving)


def generation(caption: str, vision: Image | Video) -> list[Segment]:
    """Segments of a document that teaches to draw: caption first."""
    return [Text(caption), vision]


def understanding(caption: str, vision: Image | Video) -> list[Segment]:
    """Segments of a document that teaches to describe: caption last."""
    return [vision, Text(caption)]


def meta_text(height: int, width: int, frames: int | None = None, fps: float | None = None) -> str:
    """`H*W`, or `T*H*W@fps` for a video; sizes in codes, `fps` without needless digits."""
    sides = (height, width) if frames is None else (frames, height, width)
    if not all(1 <= side <= 999_999 for side in sides):
        raise DocumentError(f"a vision block of {'x'.join(map(str, sides))} codes is not possible")
    if frames is None:
        return f"{height}*{width}"
    if fps is None or not 0.001 <= fps < 10_000:
        raise DocumentError(f"a video needs a rate between 0.001 and 10000 fps, not {fps}")
    rate = f"{fps:.3f}".rstrip("0").rstrip(".")
    return f"{frames}*{height}*{width}@{rate}"


def block_length(
    vocabulary: Vocabulary,
    height: int,
    width: int,
    frames: int | None = None,
    fps: float | None = None,
) -> int:
    """Number of ids in a vision block, without building it."""
    meta = vocabulary.text.encode(meta_text(height, width, frames, fps))
    return len(meta) + 3 + (frames or 1) * (height * (width + 1) + 1)


_block_length = lru_cache(maxsize=1024)(block_length)


def block_template(
    vocabulary: Vocabulary,
    height: int,
    width: int,
    frames: int | None = None,
    fps: float | None = None,
) -> np.ndarray:
    """The whole vision block, BOI to EOI, with FREE in place of every code.

    `height`, `width` and `frames` count codes (`frames` latent frames of 4 pictures; None means
    a still image), `fps` pictures. Returns int64 [block_length]. Raises `DocumentError` for
    sizes that no block can have.
    """
    meta = vocabulary.text.encode(meta_text(height, width, frames, fps))
    row = np.full(width + 1, FREE, np.int64)
    row[-1] = vocabulary.eol
    frame = np.append(np.tile(row, height), vocabulary.eof)
    return np.concatenate(
        [
            [vocabulary.boi, *meta, vocabulary.img],
            np.tile(frame, frames or 1),
            [vocabulary.eoi],
        ]
    ).astype(np.int64)


def serialize(
    segments: Iterable[Segment], vocabulary: Vocabulary, bos: bool = True, eos: bool = True
) -> np.ndarray:
    """Ids of a document, int64 [S].

    Raises `DocumentError` for codes of a wrong shape or outside the codebook.
    """
    pieces: list[Any] = [[vocabulary.bos]] if bos else []
    pieces += [_ids(segment, vocabulary) for segment in segments]
    pieces += [[vocabulary.eos]] if eos else [[]]
    return np.concatenate(pieces, dtype=np.int64, casting="unsafe")


def _ids(segment: Segment, vocabulary: Vocabulary) -> np.ndarray:
    if isinstance(segment, Text):
        return np.array(vocabulary.text.encode(segment.text), np.int64)
    if isinstance(segment, End):
        return np.array([vocabulary.eos])
    return _block(segment, vocabulary)


def check_codes(segment: Image | Video, vocabulary: Vocabulary) -> None:
    """Raise `DocumentError` for codes of a wrong shape or outside the codebook."""
    codes = np.asarray(segment.codes)
    if codes.dtype.kind not in "iu" or codes.ndim != (2 if isinstance(segment, Image) else 3):
        want = "[H, W]" if isinstance(segment, Image) else "[T, H, W]"
        raise DocumentError(
            f"{type(segment).__name__} needs whole-number codes {want}, "
            f"not {codes.dtype} {list(codes.shape)}"
        )
    if codes.size and (codes.min() < 0 or codes.max() >= vocabulary.codebook_size):
        raise DocumentError(
            f"code {codes.max() if codes.min() >= 0 else codes.min()} is outside the codebook of "
            f"{vocabulary.codebook_size}: the codes are from another vision tokenizer"
        )


def _block(segment: Image | Video, vocabulary: Vocabulary) -> np.ndarray:
    check_codes(segment, vocabulary)
    codes = np.asarray(segment.codes)
    if isinstance(segment, Image):
        template = _template(vocabulary, *codes.shape)
    else:
        frames, height, width = codes.shape
        template = _template(vocabulary, height, width, frames, segment.fps)
    ids = template.copy()
    ids[ids == FREE] = codes.reshape(-1).astype(np.int64) + vocabulary.vision_start
    return ids


_template = lru_cache(maxsize=64)(block_template)
"""Pictures of one size are many."""


def parse(ids: Sequence[int] | np.ndarray, vocabulary: Vocabulary) -> list[Segment]:
    """Segments of a document: the inverse of `serialize`.

    BOS, EOS and PAD behind them may be there or not. Texts that follow one another come back as
    one. Raises `DocumentError` naming the position (counted from 0) of the first illegal id.
    """
    ids = np.asarray(ids, np.int64).reshape(-1)
    end = len(ids)
    while end and ids[end - 1] == vocabulary.pad:
        end -= 1
    if end and ids[end - 1] == vocabulary.eos:
        end -= 1
    position = 1 if end and ids[0] == vocabulary.bos else 0
    text = vocabulary.is_text(ids)
    segments: list[Segment] = []
    while position < end:
        if ids[position] == vocabulary.boi:
            segment, position = _parse_block(ids, position, end, vocabulary)
            segments.append(segment)
        elif text[position]:
            stop = position + _run(text[position:end])
            segments.append(Text(vocabulary.text.decode(ids[position:stop].tolist())))
            position = stop
        elif ids[position] == vocabulary.eos:
            segments.append(End())
            position += 1
        else:
            raise DocumentError(
                f"position {position}: {_describe(ids[position], vocabulary)} outside a block"
            )
    return segments


def _parse_block(
    ids: np.ndarray, start: int, end: int, vocabulary: Vocabulary
) -> tuple[Image | Video, int]:
    """The block whose BOI is at `start`, and the position behind its EOI."""
    opening = start + 1 + _run(vocabulary.is_text(ids[start + 1 : end]))
    if opening == end or ids[opening] != vocabulary.img:
        found = "the end" if opening == end else _describe(ids[opening], vocabulary)
        raise DocumentError(f"position {opening}: {found} where the block's IMG should be")
    meta = vocabulary.text.decode(ids[start + 1 : opening].tolist()).strip()
    match = _META.fullmatch(meta)
    if match is None or (match[1] is None) != (match[4] is None):
        raise DocumentError(f"position {start + 1}: {meta[:40]!r} is neither H*W nor T*H*W@fps")
    frames, fps = (int(match[1]), float(match[4])) if match[1] else (None, None)
    height, width = int(match[2]), int(match[3])
    try:
        # Known from the numbers alone: no array is made for a size that the ids cannot hold.
        stop = start + block_length(vocabulary, height, width, frames, fps)
        if stop > end:
            raise DocumentError(f"{meta} needs {stop - end} more ids than there are")
        template = block_template(vocabulary, height, width, frames, fps)
    except DocumentError as error:
        raise DocumentError(f"position {start}: {error}") from None
    block = ids[start:stop]
    free = template == FREE
    wrong = np.where(free, ~vocabulary.is_vision(block), block != template)
    if wrong.any():
        at = int(wrong.argmax())
        want = "a vision code" if free[at] else _describe(template[at], vocabulary)
        raise DocumentError(
            f"position {start + at}: {_describe(block[at], vocabulary)} "
            f"where {want} should be in a block of {meta}"
        )
    codes = block[free] - vocabulary.vision_start
    if frames is None or fps is None:
        return Image(codes.reshape(height, width)), stop
    return Video(codes.reshape(frames, height, width), fps), stop


def _run(mask: np.ndarray) -> int:
    """How many True stand at the front of `mask`."""
    return len(mask) if mask.all() else int(mask.argmin())


def _describe(token: int, vocabulary: Vocabulary) -> str:
    """How an error calls one id."""
    for name, value in vocabulary.specials.items():
        if token == value:
            return name.upper()
    if vocabulary.vision_start <= token < vocabulary.vision_start + vocabulary.codebook_size:
        return f"vision code {token - vocabulary.vision_start}"
    return f"text id {token}" if 0 <= token < vocabulary.text.size else f"unknown id {token}"
