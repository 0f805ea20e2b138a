"""Pixels as codes and back, and the sizes that a checkpoint draws."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from unimodal.model.grammar import BlockGrammar, DocumentGrammar
from unimodal.pipeline.errors import UnimodalError, UsageError
from unimodal.tokenize.document import SPATIAL, TEMPORAL, Image, Video, block_length, check_codes
from unimodal.tokenize.vocabulary import Vocabulary

if TYPE_CHECKING:
    from unimodal.model.emu3 import Manner

Size = tuple[int, int] | str | None
"""(height, width) in pixels, multiples of 8; `free`: as the model writes it; None: as training saw
most."""


class VisionTokenizerLike(Protocol):
    """What is used of `unimodal.tokenize.vision.tokenizer.VisionTokenizer`."""

    @property
    def codebook_size(self) -> int: ...
    def encode(self, pixels: Tensor, joint: bool = False) -> Tensor: ...
    def decode(self, codes: Tensor, image: bool = False, joint: bool = False) -> Tensor: ...


@dataclass
class Canvas:
    """What pictures and clips are made of: a vision tokenizer, and what is known of their sizes."""

    vocabulary: Vocabulary
    tokenizer: VisionTokenizerLike
    context: int
    """Ids that the decoder holds."""
    grids: list[dict[str, Any]]
    """What the decoder was trained on, the most frequent first (`data.json`)."""
    joint: bool = False
    """Whether the codes of a clip were made jointly."""
    manner: Manner | None = None
    """How Emu3's own checkpoints want pictures scaled and questions put; None: as ours."""
    batch: int = 32
    """Pictures or clips that are decoded at once."""

    def segment(self, media: np.ndarray, fps: float | None) -> Image | Video:
        """A picture or clip, pixels or codes, as a segment; of the pixels of a clip no more frames
        than `seen` says."""
        codes = np.asarray(media)
        if codes.dtype == np.uint8:
            codes = self.encode(codes[: self.seen] if codes.ndim == 4 else codes)
        if codes.ndim == 2:
            return Image(codes)
        return Video(codes, self.fps(fps))

    def codes(self, media: np.ndarray, kind: str) -> np.ndarray:
        """Codes [H, W] of a picture or [T, H, W] of a clip, which may be given as codes."""
        codes = np.asarray(media)
        if codes.dtype == np.uint8:
            codes = self.encode(codes)
        if codes.ndim != (2 if kind == "image" else 3) or not codes.size:
            wanted = "a picture" if kind == "image" else "a clip"
            raise UsageError(f"{wanted} is needed here, not codes of shape {list(codes.shape)}")
        check_codes(Image(codes) if kind == "image" else Video(codes, 1.0), self.vocabulary)
        return codes.astype(np.int64)

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """Codes [H, W] of a picture, or [T, H, W] of a clip, scaled as in training."""
        from unimodal.tokenize.unit import exact_arithmetic
        from unimodal.tokenize.vision.pixels import resize, to_pixels

        if pixels.ndim not in (3, 4) or pixels.shape[-1] != 3 or not pixels.size:
            raise UsageError(f"a picture is [H, W, 3] and a clip [F, H, W, 3], not {pixels.shape}")
        kind = "image" if pixels.ndim == 3 else "video"
        clip = pixels[None] if pixels.ndim == 3 else _whole_groups(pixels)
        sides = self.scaled(clip.shape[1], clip.shape[2], kind)
        resized = np.stack([resize(frame, sides) for frame in clip])
        with exact_arithmetic():
            codes = self.tokenizer.encode(to_pixels(resized)[None], self.joint)[0].cpu().numpy()
        return codes[0] if kind == "image" else codes

    def scaled(self, height: int, width: int, kind: str) -> tuple[int, int]:
        """(height, width) that a picture or the frames of a clip are scaled to, in pixels."""
        from unimodal.tokenize.vision.pixels import area_size

        if self.manner is not None:
            return self.manner.size(height, width)
        _, rows, columns = self.grid(None, kind)
        return area_size(height, width, rows * columns * SPATIAL**2)

    @property
    def seen(self) -> int | None:
        """Frames of a clip that are looked at, from its beginning: as many as the clips that
        training saw most, for words about longer ones are never learned. None: all, where it saw
        no clips."""
        return self.grid(None, "video")[0] * TEMPORAL if self.commonest("video") else None

    def commonest(self, kind: str) -> dict[str, Any] | None:
        """What training saw most of `image` or `video`; None: it saw none."""
        return next((grid for grid in self.grids if grid["kind"] == kind), None)

    def fps(self, fps: float | None) -> float:
        """Frames a second of a clip: as asked, or as training saw most."""
        if fps is None:
            fps = (self.commonest("video") or {"fps": 8.0})["fps"]
        if not 0 < fps < math.inf:
            raise UsageError(f"fps {fps} must be positive")
        return float(fps)

    def grid(self, size: tuple[int, int] | None, kind: str) -> tuple[int, int, int]:
        """(T, H, W) in codes of a size in pixels, or of what training saw most."""
        seen = self.commonest(kind)
        latent, height, width = map(int, seen["size"]) if seen else (1, 0, 0)
        if size is None:
            if seen is None:
                raise UsageError(
                    f"this checkpoint does not tell of any {kind} it was trained on: give a size"
                )
            return latent, height, width
        if any(side < SPATIAL or side % SPATIAL for side in size):
            near = "x".join(str(max(SPATIAL, round(side / SPATIAL) * SPATIAL)) for side in size)
            raise UsageError(
                f"size {size[0]}x{size[1]}: both sides must be multiples of {SPATIAL}: try {near}"
            )
        return latent, size[0] // SPATIAL, size[1] // SPATIAL

    def picture(self, size: Size) -> tuple[int, int]:
        """(H, W) in codes of a picture of a size in pixels, or of what training saw most."""
        if isinstance(size, str):
            raise UsageError(f"size {size}: height and width in pixels, or free")
        return self.grid(size, "image")[1:]

    def picture_grammar(self, size: Size) -> BlockGrammar | DocumentGrammar:
        """The schedule of a picture of that size, or of one whose size is written first."""
        if size != "free":
            return self.grammar(*self.picture(size))
        return DocumentGrammar(self.vocabulary, self.context, picture=True)

    def grammar(
        self,
        height: int,
        width: int,
        frames: int | None = None,
        fps: float | None = None,
        begun: np.ndarray | None = None,
        until: int | None = None,
    ) -> BlockGrammar:
        """The schedule of a block; sizes in codes. Raises `UnimodalError` if no context holds it,
        before it is built: that takes time and memory of its length."""
        context = self.context
        block = block_length(self.vocabulary, height, width, frames, fps)
        if 1 + block > context:
            shape = f"{height}*{width}" if frames is None else f"{frames}*{height}*{width}"
            raise UnimodalError(
                f"{shape} codes take {block} tokens, the context of this checkpoint holds "
                f"{context}: choose a smaller size or fewer frames"
            )
        until = None if until is None or begun is None else len(begun) + until
        return BlockGrammar(self.vocabulary, height, width, frames, fps, begun, until)

    def pixels(self, codes: Sequence[np.ndarray], image: bool) -> list[np.ndarray]:
        """uint8 [frames, H, W, 3] of codes [T, H, W] each."""
        from unimodal.tokenize.vision.pixels import to_uint8

        clips: list[np.ndarray] = [np.empty(0)] * len(codes)
        alike: dict[tuple[int, ...], list[int]] = {}
        for number, one in enumerate(codes):
            alike.setdefault(one.shape, []).append(number)
        for numbers in alike.values():
            for start in range(0, len(numbers), self.batch):
                mine = numbers[start : start + self.batch]
                part = torch.from_numpy(np.stack([codes[i] for i in mine]))
                made = to_uint8(self.tokenizer.decode(part, image, self.joint))
                for number, clip in zip(mine, made, strict=True):
                    clips[number] = clip
        return clips


def latent_frames(frames: int, name: str = "frames") -> int:
    """Latent frames of so many pictures; raises `UsageError` unless 4 make one."""
    if frames < TEMPORAL or frames % TEMPORAL:
        near = max(TEMPORAL, round(frames / TEMPORAL) * TEMPORAL)
        raise UsageError(f"{name} {frames} must be a multiple of {TEMPORAL}: try {near}")
    return frames // TEMPORAL


def _whole_groups(clip: np.ndarray) -> np.ndarray:
    """A clip [F, H, W, 3] cut to a multiple of 4 frames, or its last frame repeated up to 4."""
    if len(clip) < TEMPORAL:
        return np.concatenate([clip, np.repeat(clip[-1:], TEMPORAL - len(clip), axis=0)])
    return clip[: len(clip) // TEMPORAL * TEMPORAL]


def contact_sheet(images: Sequence[np.ndarray], columns: int = 8, gap: int = 2) -> np.ndarray:
    """Pictures uint8 [H, W, 3] of one size side by side on white, `columns` to a row."""
    if not images:
        raise UsageError("a contact sheet needs at least one picture")
    height, width = images[0].shape[:2]
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    shape = (rows * (height + gap) - gap, columns * (width + gap) - gap, 3)
    sheet = np.full(shape, 255, np.uint8)
    for number, image in enumerate(images):
        top, left = (number // columns) * (height + gap), (number % columns) * (width + gap)
        sheet[top : top + height, left : left + width] = image
    return sheet
