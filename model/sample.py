"""From prompts to pictures, clips and words: what is asked, as sequences to be written.

Each method lays out the contexts of its documents (`unimodal.tokenize.document`), hands them as
drafts to a backend (`unimodal.model.generate`, or vLLM), and turns the ids that come back into
pixels or text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, Unpack

import numpy as np
import torch

from unimodal.model.canvas import (
    TEMPORAL,
    Canvas,
    Size,
    VisionTokenizerLike,
    latent_frames,
)
from unimodal.model.checkpoint import find, load_decoder, weights_config
from unimodal.model.choice import Choice
from unimodal.model.decoder import Decoder
from unimodal.model.generate import Backend, Draft, Drawing, TorchBackend, Watch
from unimodal.model.grammar import BlockGrammar, DocumentGrammar, Grammar, size_tree, text_grammar
from unimodal.model.how import (
    How,
    Words,
    check_count,
    check_guidance,
    codes_choice,
    each,
    first,
    scales_of,
    words_choice,
)
from unimodal.model.naming import weight_files
from unimodal.model.quantize import WEIGHTS, convert
from unimodal.model.recipe import RECIPES, SamplingSettings
from unimodal.model.records import read_about
from unimodal.pipeline.errors import UnimodalError, UsageError
from unimodal.pipeline.progress import Progress
from unimodal.pipeline.scorers.weights import fingerprint
from unimodal.pipeline.settings import build, load_recipe
from unimodal.tokenize.document import (
    Image,
    Piece,
    Text,
    compose,
    parse,
    serialize,
)
from unimodal.tokenize.vocabulary import Vocabulary

if TYPE_CHECKING:
    from unimodal.model.emu3 import Manner

T = TypeVar("T")


class Sampler:
    """A decoder, its vocabulary and its vision tokenizer, ready to draw and describe.

    Its methods take, besides what they say themselves, the keywords of `How` where they draw and of
    `Words` where they write. What comes depends on the seed, the number of the prompt and of the
    sample, and on nothing else that is drawn with it (matrix products of other batch sizes round
    otherwise: two codes that are equally likely to within float32's rounding may change places).

    They raise `UsageError` for values out of range, and `UnimodalError` for what the context cannot
    hold.
    """

    def __init__(
        self,
        decoder: Decoder,
        vocabulary: Vocabulary,
        tokenizer: VisionTokenizerLike,
        grids: Sequence[dict[str, Any]] = (),
        defaults: SamplingSettings = SamplingSettings(),
        batch: int = 32,
        joint: bool = False,
        backend: Backend | None = None,
        source: Path | None = None,
        manner: Manner | None = None,
        kind: str | None = None,
    ) -> None:
        """`grids`: what the decoder was trained on, the most frequent first (`data.json`).
        `defaults`: how it draws where a call does not say (`[sampling]` of `config.toml`).
        `batch`: sequences that are drawn at once; results do not depend on it.
        `joint`: whether the codes of a clip were made jointly.
        `backend`: what writes; by default `decoder` itself, of which else only the shape is used.
        `source`: the directory of its weights.
        `manner`: how Emu3's own checkpoints want pictures scaled and questions put; None: as ours.
        `kind`: which of those it is used as.

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
        self.defaults = defaults
        self.batch = batch
        self.backend: Backend = backend or TorchBackend(decoder, batch)
        self.source = source
        context = decoder.config.context
        self.canvas = Canvas(vocabulary, tokenizer, context, list(grids), joint, manner, batch)
        self.kind = kind

    @classmethod
    def load(
        cls,
        checkpoint: str | Path,
        device: str = "auto",
        batch: int = 32,
        *,
        weights: str | None = None,
        compile: bool = False,
        backend: str = "torch",
        tokenizer: str | Path | None = None,
        kind: str | None = None,
        engine: Mapping[str, Any] | None = None,
    ) -> Sampler:
        """Load a checkpoint directory (or one of its steps) that `unimodal train` wrote, or a
        directory of Emu3 in its own or in transformers' layout.

        `weights` bfloat16 or int8 takes less memory than what is stored; `compile` runs each step
        through `torch.compile`; `backend` is torch, vllm, or the address of a `vllm serve` that
        holds the same model (`unimodal.model.vllm_server`); `tokenizer` is the directory of the
        vision tokenizer where the checkpoint has none; `kind` is what an Emu3 is to be used as:
        gen, stage1 or chat; `engine` are further arguments of `VllmBackend`.
        """
        from unimodal.model import emu3

        path = Path(checkpoint)
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        remote = is_address(backend)
        check_backend(backend, weights, compile)
        if weights is not None and weights not in WEIGHTS:
            raise UsageError(f"weights {weights!r} are not one of {', '.join(WEIGHTS)}")
        top, step = find(path)
        parts = emu3.load(path, device, tokenizer, kind) if emu3.is_emu3(path) else None
        if backend != "torch":
            with torch.device("meta"):  # for its shape
                decoder = Decoder(weights_config(path), seed=None)
        else:
            large = parts is not None and weights is None and device != "cpu"
            dtype = torch.bfloat16 if large or weights in ("bfloat16", "int8") else torch.float32
            if parts is not None:
                emu3.check_room(path, device, dtype)
            decoder = load_decoder(step, device, dtype)
            decoder.compute = dtype  # in another one, steps would hold the matrices twice
            if weights is not None:
                convert(decoder, weights)
        if parts is None:
            if tokenizer is not None or kind is not None:
                what = "kind" if tokenizer is None else "tokenizer"
                raise UsageError(
                    f"{path} is no directory of Emu3, it needs no load.{what}: omit it"
                )
            made = cls.for_checkpoint(top, decoder, batch, step, device)
        else:
            made = cls(
                decoder,
                parts.vocabulary,
                parts.tokenizer,
                parts.grids,
                parts.defaults,
                batch,
                source=step,
                manner=parts.manner,
                kind=parts.kind,
            )
        if remote:
            from unimodal.model.vllm_server import VllmServer

            made.backend = VllmServer(backend, made.vocabulary)
        elif backend == "vllm":
            from unimodal.model.vllm import VllmBackend

            made.backend = VllmBackend.load(path, made.vocabulary, weights, **engine or {})
        elif compile:
            made.backend = TorchBackend(decoder, batch, compile)
        return made

    @classmethod
    def for_checkpoint(
        cls,
        top: Path,
        decoder: Decoder,
        batch: int = 32,
        step: Path | None = None,
        device: str | None = None,
    ) -> Sampler:
        """A sampler for `decoder` with the vocabulary and vision tokenizer kept in `top`; that
        computes on `device`, by default the decoder's."""
        from unimodal.tokenize.vision.tokenizer import VisionTokenizer

        for name in ("vocabulary", "vision_tokenizer", "data.json"):
            if not (top / name).exists():
                raise UnimodalError(
                    f"{top} has no {name}: a checkpoint of unimodal train keeps it beside its "
                    "steps; copy the whole directory"
                )
        about = read_about(top)
        vocabulary = Vocabulary.load(top / "vocabulary")
        if vocabulary.digest() != about["vocabulary"]["digest"]:
            raise UnimodalError(
                f"{top / 'vocabulary'} is not the vocabulary of this checkpoint: copy it again"
            )
        device = device or str(decoder.lm_head.weight.device)
        tokenizer = VisionTokenizer.load(top / "vision_tokenizer", device)
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
        grids = about.get("grids", ())
        return cls(decoder, vocabulary, tokenizer, grids, settings, batch, joint, source=step)

    @cached_property
    def digest(self) -> str | None:
        """Digest of the weights that were loaded; None if they came from no directory."""
        if self.source is None:
            return None
        return fingerprint(*map(str, weight_files(self.source)))

    # --- drawing ---------------------------------------------------------------------------

    def images(
        self,
        prompts: Sequence[str],
        size: Size | list[Size] = None,
        n: int = 1,
        **how: Unpack[How],
    ) -> list[list[np.ndarray]]:
        """`n` pictures for each prompt: uint8 [H, W, 3], of one size for all or one for each."""
        grammars = [self.canvas.picture_grammar(one) for one in each(size, len(prompts), "size")]
        return self._pictures(self._drafts(prompts, grammars, n, how), n, how)

    def videos(
        self,
        prompts: Sequence[str],
        size: tuple[int, int] | list[tuple[int, int] | None] | None = None,
        frames: int | None = None,
        fps: float | None = None,
        n: int = 1,
        **how: Unpack[How],
    ) -> list[list[np.ndarray]]:
        """`n` clips for each prompt: uint8 [frames, H, W, 3].

        `frames` is a multiple of 4, `fps` what the clip is to be shown at; both default, like
        `size`, to what training saw most.
        """
        fps = self.canvas.fps(fps)
        grammars = []
        for one in each(size, len(prompts), "size"):
            latent, height, width = self.canvas.grid(one, "video")
            latent = latent if frames is None else latent_frames(frames)
            grammars.append(self.canvas.grammar(height, width, latent, fps))
        codes = self._draw(self._drafts(prompts, grammars, n, how), how)
        return _grouped(self.canvas.pixels(codes, False), n)

    def extend(
        self,
        clips: Sequence[np.ndarray],
        frames: int,
        prompts: Sequence[str] | None = None,
        overlap: int | None = None,
        fps: float | None = None,
        n: int = 1,
        **how: Unpack[How],
    ) -> list[list[np.ndarray]]:
        """`n` continuations of each clip: uint8 [F + frames, H, W, 3], what was given in front.

        A clip is uint8 [F, H, W, 3], scaled as in training, or codes [T, H, W]; what comes back of
        it is what its codes say. The decoder is asked for clips of the length that training saw
        most, which begin with the last `overlap` frames there are (half a clip by default), again
        and again until `frames` more are drawn: so there is no end that the context sets. `prompts`
        say what the clips show.
        """
        check_count(n, "n")
        window, _, _ = self.canvas.grid(None, "video")
        latent, keep = latent_frames(frames), max(1, window // 2)
        if overlap is not None:
            keep = latent_frames(overlap, "overlap")
        if keep >= window:
            raise UsageError(
                f"an overlap of {keep * TEMPORAL} frames leaves nothing to draw of clips of "
                f"{window * TEMPORAL}, which training saw most: give less"
            )
        fps = self.canvas.fps(fps)
        given = [self.canvas.codes(clip, "video") for clip in clips]
        texts = [""] * len(clips) if prompts is None else list(prompts)
        if len(texts) != len(clips):
            raise UsageError(f"{len(clips)} clips have {len(texts)} prompts: one for each")
        known = [codes for codes in given for _ in range(n)]
        ends = [len(codes) + latent for codes in known]
        goal, rounds = sum(latent * codes[0].size for codes in known), 0
        progress, watch = how.get("progress") or Progress(), how.get("watch")
        scales = scales_of(how, self.defaults, len(clips))
        away = each(how.get("negative"), len(clips), "negative")
        progress.begin("sample", goal, "codes")
        while open_ := [i for i, codes in enumerate(known) if len(codes) < ends[i]]:
            grammars = []
            for i in open_:
                begun = known[i][-keep:]
                until = min(window - len(begun), ends[i] - len(known[i]))
                height, width = known[i].shape[1:]
                grammars.append(self.canvas.grammar(height, width, window, fps, begun, until))
            # A round of its own: the same noise again would draw the same again.
            part = how | {
                "guidance": [scales[i // n] for i in open_],
                "negative": [away[i // n] for i in open_],
                "watch": _numbered(watch, open_),
            }
            keys = [(i // n, i % n, rounds) for i in open_]
            asked = [texts[i // n] for i in open_]
            drafts = self._drafts(asked, grammars, 1, part, keys)
            for i, drawn in zip(open_, self._draw(drafts, part, begun=True), strict=True):
                known[i] = np.concatenate([known[i], drawn])
            rounds += 1
        progress.end("sample")
        return _grouped(self.canvas.pixels(known, False), n)

    def edit(
        self,
        images: Sequence[np.ndarray],
        instructions: Sequence[str],
        size: Size | list[Size] = None,
        n: int = 1,
        image_guidance: float | None = None,
        **how: Unpack[How],
    ) -> list[list[np.ndarray]]:
        """`n` pictures for each picture and what is to be done to it: uint8 [H, W, 3].

        A picture is uint8 [H, W, 3], scaled as in training, or codes [H, W]; the result has its
        size unless `size` says. `guidance` leads towards the instruction, `image_guidance` towards
        the picture: three rows, see `Choice.guide`; where that is 1, two are enough. There is no
        `negative`.
        """
        if _any(how.get("negative")):
            raise UsageError(
                "an edit is led away from the picture without the instruction: it takes no negative"
            )
        check_count(n, "n")
        if len(images) != len(instructions):
            raise UsageError(f"{len(images)} pictures have {len(instructions)} instructions")
        towards = self.defaults.image_guidance if image_guidance is None else image_guidance
        check_guidance(towards, "image-guidance")
        bos, encode = self.vocabulary.bos, self.vocabulary.text.encode
        scales = scales_of(how, self.defaults, len(images))
        sizes = each(size, len(images), "size")
        drafts: list[Draft] = []
        for place, (image, text) in enumerate(zip(images, instructions, strict=True)):
            codes = self.canvas.codes(image, "image")
            block = self._ids([Image(codes)])
            if sizes[place] is None:
                grammar: BlockGrammar | DocumentGrammar = self.canvas.grammar(*codes.shape)
            else:
                grammar = self.canvas.picture_grammar(sizes[place])
            full = [bos, *block, *encode(text), *grammar.opening]
            rows = [full]
            scale = scales[place]
            if scale != 1 or towards != 1:
                rows.append([bos, *block, *grammar.opening])
            if towards != 1:
                rows.append([bos, *grammar.opening])
            self._fits(len(full), grammar, text)
            grammar = self._bounded(grammar, rows)
            by = ((towards, scale) if towards != 1 else (scale,))[: len(rows) - 1]
            for copy in range(n):
                drafts.append(Draft(tuple(rows), grammar, by, (place, copy)))
        return self._pictures(drafts, n, how)

    def codes(
        self,
        prompts: Sequence[str],
        grammar: BlockGrammar,
        n: int = 1,
        guidance: float | list[float] | None = None,
        choice: Choice | None = None,
        seed: int = 0,
        negative: str | list[str] | None = None,
        progress: Progress | None = None,
        first: int = 0,
    ) -> list[list[np.ndarray]]:
        """`n` code arrays of the grammar's shape for each prompt, int64.

        `first` is the number of the first prompt, of a list that is drawn in parts.
        """
        keys = [(first + prompt, copy) for prompt in range(len(prompts)) for copy in range(n)]
        how: How = {
            "guidance": guidance,
            "negative": negative,
            "seed": seed,
            "progress": progress,
        }
        drafts = self._drafts(prompts, [grammar] * len(prompts), n, how, keys)
        return _grouped(self._draw(drafts, how, choice), n)

    # --- words -----------------------------------------------------------------------------

    def describe(
        self,
        images: Sequence[np.ndarray],
        max_tokens: int | None = None,
        fps: float | None = None,
        **how: Unpack[Words],
    ) -> list[str]:
        """A description of each picture or clip.

        Each is uint8 [H, W, 3] or [frames, H, W, 3], scaled to the area that training saw most,
        or codes (any other integer type) [H, W] or [T, H, W]. Of frames only the first `seen` are
        looked at. A description ends with EOS, or at `max_tokens` or the context. A checkpoint
        whose recipe has a question to describe by is asked that.
        """
        contexts = [self.described(image, fps) for image in images]
        return self.texts(contexts, "picture", max_tokens, how)

    def described(self, image: np.ndarray, fps: float | None = None) -> list[int]:
        """The ids behind which the description of a picture or clip is to be written."""
        if question := self.defaults.describe:
            return self._asked([image], [question], fps)
        return [self.vocabulary.bos, *self._ids([self.canvas.segment(image, fps)])]

    def ask(
        self,
        media: Sequence[Sequence[np.ndarray]],
        questions: Sequence[str | Sequence[str]],
        max_tokens: int | None = None,
        fps: float | None = None,
        **how: Unpack[Words],
    ) -> list[str]:
        """The answer to each question about the pictures and clips beside it, often one.

        The chat template of `unimodal.tokenize.document`: what is shown stands before the question.
        Instead of a question a conversation may be given, questions and answers in turn, the last
        one a question; what is shown belongs to its first. Otherwise as `describe`.
        """
        if len(media) != len(questions):
            raise UsageError(f"{len(media)} sets of pictures have {len(questions)} questions")
        contexts = []
        for shown, asked in zip(media, questions, strict=True):
            contexts.append(self._asked(shown, [asked] if isinstance(asked, str) else asked, fps))
        return self.texts(contexts, "question", max_tokens, how)

    def _asked(
        self, shown: Sequence[np.ndarray], turns: Sequence[str], fps: float | None
    ) -> list[int]:
        """The ids behind which the answer to the last of `turns` is to be written."""
        if len(turns) % 2 == 0:
            raise UsageError("a conversation must end with a question")
        if self.canvas.manner is not None:
            blocks = [self._ids([self.canvas.segment(one, fps)]) for one in shown]
            return self.canvas.manner.prompt(self.vocabulary, blocks, list(turns))
        pieces = [Piece(self.canvas.segment(one, fps), "user") for one in shown]
        for place, turn in enumerate([*turns, ""]):
            pieces.append(Piece(Text(turn), ("user", "assistant")[place % 2]))
        parts = compose("chat", pieces)[:-1]  # the answer is to be written
        return [self.vocabulary.bos, *self._ids([part.segment for part in parts])]

    def write(
        self,
        prompts: Sequence[str],
        max_tokens: int | None = None,
        **how: Unpack[Words],
    ) -> list[str]:
        """How each text goes on, up to EOS, `max_tokens` or the end of the context."""
        encode, bos = self.vocabulary.text.encode, self.vocabulary.bos
        contexts = [[bos, *encode(prompt)] for prompt in prompts]
        return self.texts(contexts, "prompt", max_tokens, how)

    def interleave(
        self,
        documents: Sequence[Sequence[str | np.ndarray]],
        images: int = 4,
        max_tokens: int | None = None,
        size: Size = "free",
        text: Choice | None = None,
        **how: Unpack[How],
    ) -> list[list[str | np.ndarray]]:
        """How each document of texts and pictures goes on: texts, and pictures uint8 [H, W, 3].

        Up to EOS, `images` pictures and `max_tokens` ids in all (by default what the context
        holds). `temperature` and so on are of codes, `text` says how words are chosen. Guidance
        leads from pictures that stand behind pictures alone to those that stand behind the words
        too; there is no `negative`.
        """
        if _any(how.get("negative")):
            raise UsageError(
                "a document is led away from its pictures without the words: it takes no negative"
            )
        bos, context = self.vocabulary.bos, self.decoder.config.context
        if max_tokens is not None:
            check_count(max_tokens, "max-tokens")
        scales = scales_of(how, self.defaults, len(documents))
        grid = None if size == "free" else self.canvas.picture(size)
        drafts = []
        for place, document in enumerate(documents):
            segments = [
                Text(one) if isinstance(one, str) else Image(self.canvas.codes(one, "image"))
                for one in document
            ]
            full = [bos, *self._ids(segments)]
            room = context - len(full)
            if room < 1:
                raise UnimodalError(
                    f"document {place} takes {len(full)} tokens, the context of this checkpoint "
                    f"holds {context}: shorten it"
                )
            room = room if max_tokens is None else min(room, max_tokens)
            rows, scale = [full], scales[place]
            if scale != 1:
                rows.append([bos, *self._ids([s for s in segments if isinstance(s, Image)])])
            grammar = DocumentGrammar(self.vocabulary, room, images=images, size=grid)
            drafts.append(Draft(tuple(rows), grammar, (scale,)[: len(rows) - 1], (place, 0)))
        written = self._generate(drafts, codes_choice(how, self.defaults), text, how)
        replies: list[list[str | np.ndarray]] = []
        for ids in written:
            reply: list[str | np.ndarray] = []
            for segment in parse(ids, self.vocabulary):
                if isinstance(segment, Text):
                    reply.append(segment.text)
                elif isinstance(segment, Image):
                    reply.append(self.canvas.pixels([segment.codes[None]], True)[0][0])
            replies.append(reply)
        return replies

    def texts(
        self,
        contexts: Sequence[list[int]],
        what: str,
        max_tokens: int | None,
        how: Words,
    ) -> list[str]:
        """The text that is written behind each context of ids; `what` an error calls one."""
        choice = words_choice(how, self.defaults)
        max_tokens = first(max_tokens, self.defaults.max_tokens)
        check_count(max_tokens, "max-tokens")
        held, drafts = self.decoder.config.context, []
        for number, ids in enumerate(contexts):
            if len(ids) >= held:
                raise UnimodalError(
                    f"{what} {number} takes {len(ids)} tokens, the context of this "
                    f"checkpoint holds {held}: make it smaller"
                )
            grammar = text_grammar(self.vocabulary, min(max_tokens, held - len(ids)))
            drafts.append(Draft((ids,), grammar, key=(number, 0)))
        written = self._generate(drafts, Choice(), choice, how)
        eos = self.vocabulary.eos
        return [self.vocabulary.text.decode([i for i in ids if i != eos]) for ids in written]

    # --- shared ----------------------------------------------------------------------------

    def _generate(
        self,
        drafts: Sequence[Draft],
        vision: Choice,
        text: Choice | None,
        how: How | Words,
        begun: bool = False,
    ) -> list[list[int]]:
        """Ids of each draft; `begun`: progress was told how many there are to be."""
        own, watch = self.defaults, how.get("watch")
        text = text or Choice(own.text_temperature, own.text_top_k, own.text_top_p)
        progress = how.get("progress") or Progress()

        def seen(done: Mapping[int, list[int]], steps: int) -> None:
            progress.advance("sample", steps)
            if watch is not None:
                watch(done, steps)

        if not begun:
            progress.begin("sample", sum(_steps(one.grammar) for one in drafts), "tokens")
        seed = how.get("seed", 0)
        if isinstance(seed, list):
            if len(seed) <= max(draft.key[0] for draft in drafts):
                raise UsageError(f"{len(seed)} values of seed for more prompts: one for each")
            drafts = [replace(d, key=(0, *d.key[1:]), seed=seed[d.key[0]]) for d in drafts]
            seed = 0  # of none
        written = self.backend.generate(drafts, Drawing(vision, text, seed), seen)
        if not begun:
            progress.end("sample")
        return written

    def _drafts(
        self,
        prompts: Sequence[str],
        grammars: Sequence[BlockGrammar | DocumentGrammar],
        n: int,
        how: How,
        keys: Sequence[tuple[int, ...]] | None = None,
    ) -> list[Draft]:
        """`n` drafts for each prompt, a vision block behind it."""
        check_count(n, "n")
        keys = keys or [(prompt, copy) for prompt in range(len(prompts)) for copy in range(n)]
        scales = scales_of(how, self.defaults, len(prompts))
        away = each(how.get("negative"), len(prompts), "negative")
        encode, bos = self.vocabulary.text.encode, self.vocabulary.bos
        drafts = []
        for place, (prompt, grammar) in enumerate(zip(prompts, grammars, strict=True)):
            opening, against = grammar.opening, away[place]
            against = self.defaults.negative if against is None else against
            rows = []
            for text in [prompt + self.defaults.suffix, against][: 1 if scales[place] == 1 else 2]:
                context = [bos, *encode(text), *opening]
                self._fits(len(context), grammar, text)
                rows.append(context)
            grammar = self._bounded(grammar, rows)
            scale = (scales[place],)[: len(rows) - 1]
            for copy in range(n):
                drafts.append(Draft(tuple(rows), grammar, scale, keys[place * n + copy]))
        return drafts

    def _bounded(
        self, grammar: BlockGrammar | DocumentGrammar, rows: Sequence[Sequence[int]]
    ) -> BlockGrammar | DocumentGrammar:
        """A grammar whose sizes fit behind the longest of these contexts."""
        if isinstance(grammar, BlockGrammar):
            return grammar
        return replace(grammar, room=self.decoder.config.context - max(map(len, rows)))

    def _draw(
        self,
        drafts: Sequence[Draft],
        how: How,
        choice: Choice | None = None,
        begun: bool = False,
    ) -> list[np.ndarray]:
        """Codes [H, W] or [T, H, W] of the block of each draft."""
        choice = choice or codes_choice(how, self.defaults)
        made = []
        written = self._generate(drafts, choice, None, how, begun)
        for draft, ids in zip(drafts, written, strict=True):
            if isinstance(draft.grammar, BlockGrammar):
                made.append(draft.grammar.codes(ids))
            else:
                (segment,) = parse([*draft.grammar.opening, *ids], self.vocabulary)
                assert isinstance(segment, Image)
                made.append(segment.codes)
        return made

    def _pictures(self, drafts: Sequence[Draft], n: int, how: How) -> list[list[np.ndarray]]:
        """The pictures of drafts, `n` to a prompt: uint8 [H, W, 3]."""
        painted = self.canvas.pixels([codes[None] for codes in self._draw(drafts, how)], True)
        return _grouped([pixels[0] for pixels in painted], n)

    def _ids(self, segments: Sequence[Any]) -> list[int]:
        """Ids of segments, without BOS and EOS."""
        return serialize(segments, self.vocabulary, bos=False, eos=False).tolist()

    def _fits(self, length: int, grammar: BlockGrammar | DocumentGrammar, prompt: str) -> None:
        """`length` of the context, the grammar's opening being its end."""
        held, opened = self.decoder.config.context, len(grammar.opening)
        if isinstance(grammar, BlockGrammar):
            block, shape = opened + grammar.most, "*".join(map(str, grammar.shape))
        else:
            block, shape = size_tree(self.vocabulary).least, "1*1"
        over = length - opened + block - held
        if over > 0:
            shown = prompt if len(prompt) <= 40 else prompt[:40] + "…"
            raise UnimodalError(
                f"prompt {shown!r} takes {length - opened} tokens; with {block} of {shape} codes "
                f"that is {over} over the context of {held}: say less, or draw a smaller picture"
            )


def is_address(backend: str) -> bool:
    """Whether a backend is a server."""
    return backend.startswith(("http://", "https://"))


def check_backend(backend: str, weights: str | None, compile: bool) -> None:
    """Raise `UsageError` for what `Sampler.load` cannot mean by these."""
    if backend not in ("torch", "vllm") and not is_address(backend):
        raise UsageError(f"backend {backend}: torch or vllm, or http://HOST:PORT of a vllm serve")
    if compile and backend != "torch":
        raise UsageError("vLLM compiles by itself: leave out load.compile, or use --backend torch")
    if weights is not None and is_address(backend):
        raise UsageError(f"{backend} has its own weights: leave out load.weights")


def _any(value: str | Sequence[str | None] | None) -> bool:
    """Whether a prompt, or one of a list, says something."""
    return bool(value) if value is None or isinstance(value, str) else any(value)


def _steps(grammar: Grammar) -> int:
    """Choices that are to be made, so far as they are known."""
    if isinstance(grammar, BlockGrammar):
        return len(grammar)
    written_size = isinstance(grammar, DocumentGrammar) and grammar.picture
    return 0 if written_size else grammar.most


def _grouped(flat: Sequence[T], n: int) -> list[list[T]]:
    return [list(flat[i : i + n]) for i in range(0, len(flat), n)]


def _numbered(watch: Watch | None, numbers: Sequence[int]) -> Watch | None:
    """`watch` for drafts that have other numbers elsewhere."""
    if watch is None:
        return None

    def seen(done: Mapping[int, list[int]], steps: int) -> None:
        watch({numbers[i]: ids for i, ids in done.items()}, steps)

    return seen
