"""From prompts to pictures, clips and descriptions.

Legend: P sequences that are drawn at once, R rows of the batch (P, or 2 P with guidance),
        K vision ids, D width.

Every sequence has a conditional row and, with guidance, an unconditional one, all in one batch
out of one static cache, each row at its own positions. Three savings, all exact: inside a block
only the vision rows of the head are computed; given ids cost no head; they are fed together with
the drawn id before them. Guidance works on raw logits of that slice: the normalisers that
log-softmax would subtract are constants per row and cancel in the softmax that follows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from unimodal.model.attention import Cache, Cached
from unimodal.model.checkpoint import find, read_json
from unimodal.model.choice import Choice, Noise
from unimodal.model.decoder import Decoder
from unimodal.model.grammar import BlockGrammar, TextGrammar
from unimodal.model.recipe import RECIPES, SamplingSettings
from unimodal.pipeline.errors import UnimodalError, UsageError
from unimodal.pipeline.progress import Progress
from unimodal.pipeline.settings import build, load_recipe
from unimodal.tokenize.document import Image, Video, block_length, serialize
from unimodal.tokenize.vocabulary import Vocabulary

SPATIAL = 8
"""Pixels per code along a side."""
TEMPORAL = 4
"""Pictures per latent frame."""


class VisionTokenizerLike(Protocol):
    """What is used of `unimodal.tokenize.vision.tokenizer.VisionTokenizer`."""

    @property
    def codebook_size(self) -> int: ...
    def encode(self, pixels: Tensor, joint: bool = False) -> Tensor: ...
    def decode(self, codes: Tensor, image: bool = False, joint: bool = False) -> Tensor: ...


class Sampler:
    """A decoder, its vocabulary and its vision tokenizer, ready to draw and describe."""

    def __init__(
        self,
        decoder: Decoder,
        vocabulary: Vocabulary,
        tokenizer: VisionTokenizerLike,
        grids: Sequence[dict[str, Any]] = (),
        defaults: SamplingSettings = SamplingSettings(),
        batch: int = 32,
        joint: bool = False,
    ) -> None:
        """`grids`: what the decoder was trained on, the most frequent first (`data.json`).
        `defaults`: how it draws where a call does not say (`[sampling]` of `config.toml`).
        `batch`: sequences that are drawn at once; results do not depend on it.
        `joint`: whether the codes of a clip were made jointly.

        Raises `UnimodalError` if the parts are not made for one another.
        """
        if decoder.config.vocabulary_size < vocabulary.size:
            raise UnimodalError(
                f"the decoder has {decoder.config.vocabulary_size} ids, its vocabulary "
                f"{vocabulary.size}: the checkpoint was put together from two"
            )
        if tokenizer.codebook_size != vocabulary.codebook_size:
            raise UnimodalError(
                f"the vision tokenizer has {tokenizer.codebook_size} codes, the vocabulary "
                f"{vocabulary.codebook_size}: use the tokenizer that the shards were made with"
            )
        self.decoder = decoder
        self.vocabulary = vocabulary
        self.tokenizer = tokenizer
        self.grids = list(grids)
        self.defaults = defaults
        self.batch = batch
        self.joint = joint

    @classmethod
    def load(cls, checkpoint: str | Path, device: str = "auto", batch: int = 32) -> Sampler:
        """Load a checkpoint directory (or one of its steps) that `unimodal train` wrote."""
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        top, step = find(Path(checkpoint))
        return cls.for_checkpoint(top, Decoder.load(step, device), batch)

    @classmethod
    def for_checkpoint(cls, top: Path, decoder: Decoder, batch: int = 32) -> Sampler:
        """A sampler for `decoder` with the vocabulary and vision tokenizer kept in `top`."""
        from unimodal.tokenize.vision.tokenizer import VisionTokenizer

        for name in ("vocabulary", "vision_tokenizer", "data.json"):
            if not (top / name).exists():
                raise UnimodalError(
                    f"{top} has no {name}: a checkpoint of unimodal train keeps it beside its "
                    "steps; copy the whole directory"
                )
        about = read_json(top / "data.json")
        vocabulary = Vocabulary.load(top / "vocabulary")
        if vocabulary.digest() != about["vocabulary"]["digest"]:
            raise UnimodalError(
                f"{top / 'vocabulary'} is not the vocabulary of this checkpoint: copy it again"
            )
        tokenizer = VisionTokenizer.load(top / "vision_tokenizer")
        if tokenizer.digest != about["vision_tokenizer"]["digest"]:
            raise UnimodalError(
                f"{top / 'vision_tokenizer'} is not the vision tokenizer that this checkpoint was "
                "trained with (its weights have another digest): copy the right one there"
            )
        settings = SamplingSettings()
        if (top / "config.toml").is_file():
            settings = build(
                SamplingSettings, load_recipe(top / "config.toml", RECIPES).get("sampling", {})
            )
        joint = bool(about["vision_tokenizer"].get("joint"))
        return cls(decoder, vocabulary, tokenizer, about.get("grids", ()), settings, batch, joint)

    # --- drawing ---------------------------------------------------------------------------

    def images(
        self,
        prompts: Sequence[str],
        size: tuple[int, int] | None = None,
        n: int = 1,
        guidance: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        plausible: float | None = None,
        seed: int = 0,
        negative: str = "",
        progress: Progress | None = None,
    ) -> list[list[np.ndarray]]:
        """`n` pictures for each prompt: uint8 [H, W, 3].

        `size` is (height, width) in pixels, multiples of 8; by default what training saw most.
        `guidance` 1 is none; `negative` is the prompt that guidance leads away from. Where a value
        is None, the checkpoint's own recipe says how it is best drawn from.
        Raises `UnimodalError` for values out of range and for what the context cannot hold.
        """
        grammar = self.grammar(*self.grid(size, "image")[1:])
        choice = self._choice(temperature, top_k, top_p, plausible)
        codes = self.codes(prompts, grammar, n, guidance, choice, seed, negative, progress)
        flat = [one for row in codes for one in row]
        pictures = [pixels[0] for pixels in self.pixels([one[None] for one in flat], True)]
        return [pictures[i * n : (i + 1) * n] for i in range(len(prompts))]

    def videos(
        self,
        prompts: Sequence[str],
        size: tuple[int, int] | None = None,
        frames: int | None = None,
        fps: float | None = None,
        n: int = 1,
        guidance: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        plausible: float | None = None,
        seed: int = 0,
        negative: str = "",
        progress: Progress | None = None,
    ) -> list[list[np.ndarray]]:
        """`n` clips for each prompt: uint8 [frames, H, W, 3].

        `frames` is a multiple of 4, `fps` what the clip is to be shown at; both default, like
        `size`, to what training saw most. Otherwise as `images`.
        """
        latent, height, width = self.grid(size, "video")
        if frames is not None:
            if frames < TEMPORAL or frames % TEMPORAL:
                near = max(TEMPORAL, round(frames / TEMPORAL) * TEMPORAL)
                raise UsageError(f"frames {frames} must be a multiple of {TEMPORAL}: try {near}")
            latent = frames // TEMPORAL
        if fps is None:
            fps = next((g["fps"] for g in self.grids if g["kind"] == "video"), 8.0)
        if not 0 < fps < math.inf:
            raise UsageError(f"fps {fps} must be positive")
        grammar = self.grammar(height, width, latent, fps)
        choice = self._choice(temperature, top_k, top_p, plausible)
        codes = self.codes(prompts, grammar, n, guidance, choice, seed, negative, progress)
        clips = self.pixels([one for row in codes for one in row], False)
        return [clips[i * n : (i + 1) * n] for i in range(len(prompts))]

    def codes(
        self,
        prompts: Sequence[str],
        grammar: BlockGrammar,
        n: int = 1,
        guidance: float | None = None,
        choice: Choice | None = None,
        seed: int = 0,
        negative: str = "",
        progress: Progress | None = None,
        first: int = 0,
    ) -> list[list[np.ndarray]]:
        """`n` code arrays of the grammar's shape for each prompt, int64.

        `first` is the number of the first prompt, of a list that is drawn in parts.
        """
        guidance = self.defaults.guidance if guidance is None else guidance
        choice = choice or self._choice()
        if not (0 < guidance < math.inf):
            raise UsageError(f"guidance {guidance} must be positive (1 is none)")
        if n < 1:
            raise UsageError(f"n {n} must be at least 1")
        encode, bos = self.vocabulary.text.encode, self.vocabulary.bos
        contexts = [[bos, *encode(prompt), *grammar.opening] for prompt in prompts]
        empty = [bos, *encode(negative), *grammar.opening]
        rest = len(grammar.template) - len(grammar.opening)
        named = zip([*prompts, negative], [*contexts, empty], strict=True)
        for prompt, context in named:
            self._fits(len(context) - len(grammar.opening), grammar, rest, prompt)
        keys = [(prompt, sample) for prompt in range(len(prompts)) for sample in range(n)]
        progress = progress or Progress()
        progress.begin("sample", len(keys) * len(grammar), "codes")
        drawn: list[np.ndarray] = []
        for start in range(0, len(keys), self.batch):
            mine = keys[start : start + self.batch]
            ids = self._draw(
                [contexts[prompt] for prompt, _ in mine],
                empty if guidance != 1 else None,
                grammar,
                guidance,
                choice,
                Noise(seed, [(first + prompt, sample) for prompt, sample in mine], self._device),
                progress,
            )
            drawn += [one.reshape(grammar.shape) for one in ids.cpu().numpy()]
        progress.end("sample")
        return [drawn[i * n : (i + 1) * n] for i in range(len(prompts))]

    @torch.inference_mode()
    def _draw(
        self,
        contexts: list[list[int]],
        empty: list[int] | None,
        grammar: BlockGrammar,
        guidance: float,
        choice: Choice,
        noise: Noise,
        progress: Progress,
    ) -> Tensor:
        """Codes int64 [P, free positions]; `empty` is the unconditional context, None without
        guidance."""
        p = len(contexts)
        rows = contexts if empty is None else [*contexts, *[empty] * p]
        # The last code and what is behind it are never fed: nothing is predicted from them.
        length = max(map(len, rows)) + len(grammar.template) - len(grammar.opening)
        decoding = _Decoding(self.decoder, len(rows), length)
        head = self.decoder.lm_head.weight[grammar.vision].to(self.decoder.compute)  # [K, D]
        hidden = decoding.feed(rows)
        codes = torch.empty(p, len(grammar), dtype=torch.int64, device=self._device)
        for step, behind in enumerate(grammar.behind):
            logits = (hidden @ head.T).float()  # [R, K]
            if empty is not None:
                logits = choice.guide(logits[:p], logits[p:], guidance)
            codes[:, step] = choice.pick(logits, partial(noise, head.shape[0]))
            progress.advance("sample", p)
            if step + 1 < len(grammar):
                ids = (codes[:, step, None] + grammar.vision.start).repeat(len(rows) // p, 1)
                given = torch.tensor(behind, dtype=torch.int64, device=self._device)
                hidden = decoding.feed(torch.cat([ids, given.expand(len(rows), -1)], dim=1))
        return codes

    # --- describing ------------------------------------------------------------------------

    def describe(
        self,
        images: Sequence[np.ndarray],
        max_tokens: int = 256,
        temperature: float | None = None,
        top_k: int = 2048,
        top_p: float = 1.0,
        seed: int = 0,
        fps: float | None = None,
        progress: Progress | None = None,
    ) -> list[str]:
        """A description of each picture or clip.

        Each is uint8 [H, W, 3] or [frames, H, W, 3], scaled to the area that training saw most,
        or codes (any other integer type) [H, W] or [T, H, W]. `temperature` None always takes
        the likeliest id. A description ends with EOS, or at `max_tokens` or the context.
        """
        if max_tokens < 1:
            raise UsageError(f"max-tokens {max_tokens} must be at least 1")
        choice = Choice(temperature, top_k, top_p)
        prefixes = [self._described(image, fps) for image in images]
        context = self.decoder.config.context
        for number, prefix in enumerate(prefixes):
            if len(prefix) >= context:
                raise UnimodalError(
                    f"picture {number} takes {len(prefix)} tokens, the context of this "
                    f"checkpoint holds {context}: make it smaller"
                )
        progress = progress or Progress()
        progress.begin("describe", len(images), "pictures")
        texts: list[str] = []
        for start in range(0, len(prefixes), self.batch):
            mine = prefixes[start : start + self.batch]
            keys = [(start + i, 0) for i in range(len(mine))]
            noise = Noise(seed, keys, self._device)
            texts += [
                self.vocabulary.text.decode(ids)
                for ids in self._write(mine, max_tokens, choice, noise)
            ]
            progress.advance("describe", len(mine))
        progress.end("describe")
        return texts

    @torch.inference_mode()
    def _write(
        self, prefixes: list[list[int]], max_tokens: int, choice: Choice, noise: Noise
    ) -> list[list[int]]:
        """Text ids behind each prefix, up to EOS, `max_tokens` or the end of the context."""
        grammar = TextGrammar(self.vocabulary)
        head = self.decoder.lm_head.weight[grammar.allowed.to(self._device)]
        head = head.to(self.decoder.compute)
        limits = [min(max_tokens, self.decoder.config.context - len(one)) for one in prefixes]
        longest = max(len(one) + limit for one, limit in zip(prefixes, limits, strict=True))
        decoding = _Decoding(self.decoder, len(prefixes), longest)
        hidden = decoding.feed(prefixes)
        texts: list[list[int]] = [[] for _ in prefixes]
        open_rows = list(range(len(prefixes)))
        while open_rows:
            logits = (hidden @ head.T).float()
            chosen = choice.pick(logits, partial(noise, head.shape[0], open_rows)).tolist()
            kept = []
            for place, (row, column) in enumerate(zip(open_rows, chosen, strict=True)):
                if column != grammar.eos:
                    texts[row].append(column)
                    if len(texts[row]) < limits[row]:
                        kept.append(place)
            open_rows = [open_rows[place] for place in kept]
            if open_rows:
                if len(kept) < len(chosen):
                    decoding.keep(kept)
                hidden = decoding.feed([[texts[row][-1]] for row in open_rows])
        return texts

    def _described(self, image: np.ndarray, fps: float | None) -> list[int]:
        """Ids up to where a description begins: BOS and the vision block."""
        codes = np.asarray(image)
        if codes.dtype == np.uint8:
            codes = self._encode(codes)
        segment: Image | Video
        if codes.ndim == 2:
            segment = Image(codes)
        else:
            rate = next((g["fps"] for g in self.grids if g["kind"] == "video"), 8.0)
            segment = Video(codes, fps or rate)
        return serialize([segment], self.vocabulary, eos=False).tolist()

    def _encode(self, pixels: np.ndarray) -> np.ndarray:
        """Codes [H, W] of a picture, or [T, H, W] of a clip, scaled as in training."""
        from unimodal.tokenize.vision.pixels import area_size, resize, to_pixels

        if pixels.ndim not in (3, 4) or pixels.shape[-1] != 3 or not pixels.size:
            raise UsageError(f"a picture is [H, W, 3] and a clip [F, H, W, 3], not {pixels.shape}")
        kind = "image" if pixels.ndim == 3 else "video"
        _, height, width = self.grid(None, kind)
        clip = pixels[None] if pixels.ndim == 3 else _whole_groups(pixels)
        sides = area_size(clip.shape[1], clip.shape[2], height * width * SPATIAL**2)
        scaled = np.stack([resize(frame, sides) for frame in clip])
        codes = self.tokenizer.encode(to_pixels(scaled)[None], self.joint)[0].cpu().numpy()
        return codes[0] if kind == "image" else codes

    # --- shared ----------------------------------------------------------------------------

    @property
    def _device(self) -> torch.device:
        return self.decoder.lm_head.weight.device

    def _choice(
        self,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        plausible: float | None = None,
    ) -> Choice:
        own = self.defaults
        return Choice(
            own.temperature if temperature is None else temperature,
            own.top_k if top_k is None else top_k,
            own.top_p if top_p is None else top_p,
            own.plausible if plausible is None else plausible,
        )

    def grid(self, size: tuple[int, int] | None, kind: str) -> tuple[int, int, int]:
        """(T, H, W) in codes of a size in pixels, or of what training saw most."""
        seen = next((tuple(g["size"]) for g in self.grids if g["kind"] == kind), None)
        if size is None:
            if seen is None:
                raise UsageError(
                    f"this checkpoint does not tell of any {kind} it was trained on: give a size"
                )
            return int(seen[0]), int(seen[1]), int(seen[2])
        if any(side < SPATIAL or side % SPATIAL for side in size):
            near = "x".join(str(max(SPATIAL, round(side / SPATIAL) * SPATIAL)) for side in size)
            raise UsageError(
                f"size {size[0]}x{size[1]}: both sides must be multiples of {SPATIAL}: try {near}"
            )
        return int(seen[0]) if seen else 1, size[0] // SPATIAL, size[1] // SPATIAL

    def grammar(
        self, height: int, width: int, frames: int | None = None, fps: float | None = None
    ) -> BlockGrammar:
        """The schedule of a block; sizes in codes. Raises `UnimodalError` if no context holds it,
        before it is built: that takes time and memory of its length."""
        context = self.decoder.config.context
        block = block_length(self.vocabulary, height, width, frames, fps)
        if 1 + block > context:
            shape = f"{height}*{width}" if frames is None else f"{frames}*{height}*{width}"
            raise UnimodalError(
                f"{shape} codes take {block} tokens, the context of this checkpoint holds "
                f"{context}: choose a smaller size or fewer frames"
            )
        return BlockGrammar(self.vocabulary, height, width, frames, fps)

    def _fits(self, prompt_ids: int, grammar: BlockGrammar, rest: int, prompt: str) -> None:
        context, block = self.decoder.config.context, len(grammar.template)
        if prompt_ids + block <= context:
            return
        shape = "*".join(map(str, grammar.shape))
        shown = prompt if len(prompt) <= 40 else prompt[:40] + "…"
        raise UnimodalError(
            f"prompt {shown!r} takes {prompt_ids} tokens; with {block} of {shape} codes that is "
            f"over the context of {context}: shorten it by {prompt_ids + block - context}"
        )

    def pixels(self, codes: list[np.ndarray], image: bool) -> list[np.ndarray]:
        """uint8 [frames, H, W, 3] of codes [T, H, W], all of one shape."""
        from unimodal.tokenize.vision.pixels import to_uint8

        clips: list[np.ndarray] = []
        for start in range(0, len(codes), self.batch):
            part = torch.from_numpy(np.stack(codes[start : start + self.batch]))
            clips += list(to_uint8(self.tokenizer.decode(part, image, self.joint)))
        return clips


class _Decoding:
    """Rows being continued: the cache, and how far each row has come."""

    def __init__(self, decoder: Decoder, rows: int, length: int) -> None:
        self.decoder = decoder
        self.cache: Cache = decoder.cache(rows, length)
        self.device = decoder.lm_head.weight.device
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=self.device)

    def feed(self, rows: Tensor | list[list[int]]) -> Tensor:
        """Append ids to each row ([R, k], or lists of unequal length); hidden states [R, D]
        behind each row's last id."""
        if isinstance(rows, list):
            counts = torch.tensor([len(row) for row in rows], device=self.device)
            longest = max(map(len, rows))
            padded = [row + [0] * (longest - len(row)) for row in rows]  # see `Cached`
            ids = torch.tensor(padded, dtype=torch.int64, device=self.device)
        else:
            ids = rows
            counts = torch.full((len(ids),), ids.shape[1], device=self.device)
        step = Cached(self.cache, self.lengths, ids.shape[1])
        hidden = self.decoder.hidden(ids.flatten(), step.positions.flatten(), step)
        self.lengths = self.lengths + counts
        return hidden.view(*ids.shape, -1)[torch.arange(len(ids)), counts - 1]

    def keep(self, rows: list[int]) -> None:
        """Go on with these rows only."""
        chosen = torch.tensor(rows, device=self.device)
        self.cache = self.cache.select(chosen)
        self.lengths = self.lengths[chosen]


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
