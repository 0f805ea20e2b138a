"""The sampler against transformers' generate, against itself, and against bad input."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessorList,
    PrefixConstrainedLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

from unimodal.model import canvas
from unimodal.model import sample as module
from unimodal.model.canvas import contact_sheet
from unimodal.model.checkpoint import load_decoder, weights_config
from unimodal.model.choice import Choice, Noise
from unimodal.model.decoder import Decoder, DecoderConfig, Shape
from unimodal.model.generate import Draft, Drawing, TorchBackend
from unimodal.model.grammar import BlockGrammar, text_grammar
from unimodal.model.recipe import SamplingSettings, TrainSettings
from unimodal.model.sample import Sampler
from unimodal.model.train import train
from unimodal.pipeline.errors import UnimodalError, UsageError
from unimodal.tokenize.document import (
    FREE,
    Image,
    Piece,
    Text,
    Video,
    compose,
    parse,
    serialize,
)
from unimodal.tokenize.shards import Shards
from unimodal.tokenize.vision.pixels import to_uint8
from unimodal.tokenize.vision.tokenizer import VisionTokenizer
from unimodal.tokenize.vocabulary import Vocabulary

PROMPTS = ["a", "a red kite", "", "the quick brown fox"]
GREEDY = Choice(temperature=None)
GRIDS = [
    {"kind": "image", "size": [1, 4, 5], "fps": None, "samples": 8},
    {"kind": "video", "size": [2, 4, 4], "fps": 6.0, "samples": 1},
]


@pytest.fixture(scope="module")
def decoder(vocabulary: Vocabulary) -> Decoder:
    shape = Shape(width=48, layers=2, heads=6, kv_heads=2, ffn=80, init_std=0.2)
    return Decoder(DecoderConfig(shape, vocabulary.size, context=128)).eval()


@pytest.fixture(scope="module")
def sampler(decoder: Decoder, vocabulary: Vocabulary, tokenizer: VisionTokenizer) -> Sampler:
    return Sampler(decoder, vocabulary, tokenizer, GRIDS)


def _stack(rows: list[list[np.ndarray]]) -> np.ndarray:
    return np.stack([one for row in rows for one in row])


def test_greedy_guided_drawing_equals_transformers_generate_token_for_token(
    sampler: Sampler, decoder: Decoder, vocabulary: Vocabulary
) -> None:
    grammar = BlockGrammar(vocabulary, 4, 5)
    config = LlamaConfig(
        vocab_size=vocabulary.size,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        rope_theta=1e6,
        pad_token_id=vocabulary.pad,
        eos_token_id=vocabulary.eos,
    )
    theirs = LlamaForCausalLM(config).eval()
    theirs.load_state_dict(decoder.state_dict())
    negative = "blurry"
    ours = sampler.codes(PROMPTS, grammar, guidance=3.0, choice=GREEDY, negative=negative)
    vision = list(range(grammar.vision.start, grammar.vision.stop))
    for prompt, (codes,) in zip(PROMPTS, ours, strict=True):
        context, empty = (
            torch.tensor([[vocabulary.bos, *vocabulary.text.encode(text), *grammar.opening]])
            for text in (prompt, negative)
        )

        def allowed(_: int, ids: torch.Tensor, start: int = context.shape[1]) -> Sequence[int]:
            place = grammar.template[len(grammar.opening) + len(ids) - start]
            return vision if place == FREE else [int(place)]

        rest = len(grammar.template) - len(grammar.opening)
        out = theirs.generate(
            context,
            do_sample=False,
            max_new_tokens=rest,
            logits_processor=LogitsProcessorList(
                [
                    UnbatchedClassifierFreeGuidanceLogitsProcessor(
                        3.0, theirs, unconditional_ids=empty
                    ),
                    PrefixConstrainedLogitsProcessor(allowed, num_beams=1),
                ]
            ),
        )[0, context.shape[1] - len(grammar.opening) :]
        assert out.tolist() == grammar.ids(codes).tolist()


@torch.no_grad()
def test_sliced_guidance_equals_guidance_on_full_log_probabilities(
    sampler: Sampler, decoder: Decoder, vocabulary: Vocabulary
) -> None:
    """The same noise gives the same codes as the slow, literal way of EMU3.md: log-softmax over
    the whole vocabulary, guidance, mask, temperature, top-k, top-p, with no cache."""
    grammar = BlockGrammar(vocabulary, 3, 4)
    choice = Choice(temperature=0.8, top_k=20, top_p=0.9)
    fast = _stack(sampler.codes(PROMPTS, grammar, guidance=2.5, choice=choice, seed=11))
    for number, prompt in enumerate(PROMPTS):
        noise = Noise(11, [(number, 0)], torch.device("cpu"))
        conditional = [vocabulary.bos, *vocabulary.text.encode(prompt), *grammar.opening]
        unconditional = [vocabulary.bos, *grammar.opening]
        drawn = []
        for behind in grammar.behind:
            c, u = (
                decoder(torch.tensor([ids]))[0, -1].log_softmax(-1)
                for ids in (conditional, unconditional)
            )
            guided = u + 2.5 * (c - u)
            mask = torch.full_like(guided, -torch.inf)
            mask[grammar.vision] = 0
            logits = (guided + mask) / 0.8
            logits[logits < logits.topk(20).values[-1]] = -torch.inf
            ordered, order = logits.sort(descending=True)
            p = ordered.softmax(-1)
            logits[order[(p.cumsum(-1) - p) >= 0.9]] = -torch.inf
            ids = torch.arange(vocabulary.size)
            score = logits.softmax(-1) / noise.exponential(len(drawn), ids)[0]
            code = int(score.argmax()) - vocabulary.vision_start
            drawn.append(code)
            for ids in (conditional, unconditional):
                ids += [code + vocabulary.vision_start, *behind]
        assert drawn == fast[number].reshape(-1).tolist()


def test_samples_do_not_depend_on_the_batch(
    decoder: Decoder, vocabulary: Vocabulary, tokenizer: VisionTokenizer
) -> None:
    grammar = BlockGrammar(vocabulary, 4, 5)
    drawn = [
        _stack(
            Sampler(decoder, vocabulary, tokenizer, batch=batch).codes(
                PROMPTS, grammar, n=3, seed=5
            )
        )
        for batch in (1, 5, 32)
    ]
    assert np.array_equal(drawn[0], drawn[1])
    assert np.array_equal(drawn[0], drawn[2])


def test_seed_prompt_and_sample_each_give_other_codes_and_a_seed_the_same(
    sampler: Sampler, vocabulary: Vocabulary
) -> None:
    grammar = BlockGrammar(vocabulary, 4, 5)
    first = _stack(sampler.codes(["a", "a"], grammar, n=2, seed=1))
    assert len({one.tobytes() for one in first}) == 4
    assert np.array_equal(first, _stack(sampler.codes(["a", "a"], grammar, n=2, seed=1)))
    assert not np.array_equal(first, _stack(sampler.codes(["a", "a"], grammar, n=2, seed=2)))


def test_a_list_drawn_in_parts_gives_the_same_codes(
    sampler: Sampler, vocabulary: Vocabulary
) -> None:
    grammar = BlockGrammar(vocabulary, 4, 5)
    whole = _stack(sampler.codes(["a", "b", "c"], grammar, n=2, seed=1))
    part = _stack(sampler.codes(["b", "c"], grammar, n=2, seed=1, first=1))
    assert np.array_equal(whole[2:], part)


def test_guidance_of_one_is_plain_sampling_and_more_of_it_moves_the_codes(
    sampler: Sampler, vocabulary: Vocabulary
) -> None:
    grammar = BlockGrammar(vocabulary, 4, 5)

    def draw(guidance: float) -> np.ndarray:
        return _stack(sampler.codes(PROMPTS, grammar, guidance=guidance))

    assert np.array_equal(draw(1.0), draw(1.0 + 1e-9))  # one row each, or two
    assert not np.array_equal(draw(1.0), draw(5.0))


@pytest.mark.parametrize("width", [1, 2, 5])
def test_drawn_blocks_are_legal_documents(
    sampler: Sampler, vocabulary: Vocabulary, width: int
) -> None:
    grammar = BlockGrammar(vocabulary, 3, width)
    ((codes,),) = sampler.codes(["kite"], grammar)
    (segment,) = parse(grammar.ids(codes), vocabulary)
    assert segment == Image(codes)
    grammar = BlockGrammar(vocabulary, 3, width, 2, 7.5)
    ((codes,),) = sampler.codes(["kite"], grammar)
    (segment,) = parse(grammar.ids(codes), vocabulary)
    assert segment == Video(codes, 7.5)


def test_a_call_without_values_draws_as_the_checkpoints_recipe_says(
    decoder: Decoder, vocabulary: Vocabulary, tokenizer: VisionTokenizer
) -> None:
    own = SamplingSettings(guidance=1.5, temperature=0.5, top_k=7, top_p=0.9, plausible=0.1)
    told = Sampler(decoder, vocabulary, tokenizer, GRIDS)
    values = own.model_dump(include={"guidance", "temperature", "top_k", "top_p", "plausible"})
    by_recipe = Sampler(decoder, vocabulary, tokenizer, GRIDS, own).images(["kite"])
    assert np.array_equal(by_recipe, told.images(["kite"], **values))
    assert not np.array_equal(by_recipe, told.images(["kite"]))


def test_pictures_and_clips_have_the_size_asked_for(sampler: Sampler) -> None:
    pictures = sampler.images(["a", "b"], size=(24, 40), n=2, top_k=5)
    assert [len(row) for row in pictures] == [2, 2]
    assert pictures[0][0].shape == (24, 40, 3) and pictures[0][0].dtype == np.uint8
    assert sampler.images(["a"])[0][0].shape == (32, 40, 3)  # the grid of training
    ((clip,),) = sampler.videos(["a"], size=(16, 24), frames=8, fps=6)
    assert clip.shape == (8, 16, 24, 3)
    assert sampler.videos(["a"])[0][0].shape == (8, 32, 32, 3)


def test_pictures_are_the_decoded_codes(sampler: Sampler, vocabulary: Vocabulary) -> None:
    from unimodal.tokenize.vision.pixels import to_uint8

    pictures = sampler.images(["a", "kite"], size=(32, 40), seed=3)
    codes = sampler.codes(["a", "kite"], BlockGrammar(vocabulary, 4, 5), seed=3)
    decoded = sampler.tokenizer.decode(torch.from_numpy(_stack(codes))[:, None], image=True)
    assert np.array_equal(_stack(pictures), to_uint8(decoded)[:, 0])


@torch.no_grad()
def test_greedy_description_equals_the_full_forward(
    sampler: Sampler, decoder: Decoder, vocabulary: Vocabulary
) -> None:
    rng = np.random.default_rng(0)
    grids = [rng.integers(0, 64, (3, 4)), rng.integers(0, 64, (2, 2)), rng.integers(0, 64, (4, 5))]
    texts = sampler.describe(grids, max_tokens=12)
    allowed = [*range(256), vocabulary.eos]
    for codes, text in zip(grids, texts, strict=True):
        grammar = BlockGrammar(vocabulary, *codes.shape)
        ids = [vocabulary.bos, *grammar.ids(codes).tolist()]
        written: list[int] = []
        while len(written) < 12:
            logits = decoder(torch.tensor([ids + written]))[0, -1, allowed]
            best = allowed[int(logits.argmax())]
            if best == vocabulary.eos:
                break
            written.append(best)
        assert text == vocabulary.text.decode(written)


def test_descriptions_stop_at_eos_and_do_not_depend_on_the_batch(
    decoder: Decoder, vocabulary: Vocabulary, tokenizer: VisionTokenizer
) -> None:
    eager = Decoder(decoder.config)
    eager.load_state_dict(decoder.state_dict())
    eager.lm_head.weight.data[vocabulary.eos] *= 3  # EOS after a few ids, at unequal times
    rng = np.random.default_rng(1)
    grids = [rng.integers(0, 64, (2, 2 + i % 3)) for i in range(6)]
    one, all_ = (
        Sampler(eager.eval(), vocabulary, tokenizer, batch=batch).describe(
            grids, max_tokens=20, temperature=1.0, seed=4
        )
        for batch in (1, 32)
    )
    assert one == all_
    lengths = [len(vocabulary.text.encode(text)) for text in all_]
    assert min(lengths) < 15 and len(set(lengths)) > 1


def test_a_picture_is_described_from_its_codes_at_the_trained_size(sampler: Sampler) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (64, 80, 3), dtype=np.uint8)
    codes = sampler.canvas.encode(picture)
    assert codes.shape == (4, 5)
    assert sampler.describe([picture], max_tokens=8) == sampler.describe([codes], max_tokens=8)
    clip = np.stack([picture] * 11)  # a clip is cut to whole groups of four frames, or filled up
    assert sampler.canvas.encode(clip).shape[0] == 2
    assert sampler.canvas.encode(clip[:2]).shape[0] == 1


def test_of_a_clip_no_more_is_looked_at_than_training_saw(sampler: Sampler) -> None:
    rng = np.random.default_rng(0)
    clip = rng.integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)
    assert sampler.canvas.seen == 8
    assert sampler.canvas.segment(clip, None) == sampler.canvas.segment(clip[:8], None)
    assert sampler.describe([clip], 6) == sampler.describe([clip[:8]], 6)
    assert sampler.ask([[clip]], ["what?"], 4) == sampler.ask([[clip[:8]]], ["what?"], 4)
    codes = rng.integers(0, 64, (4, 4, 4))  # codes are taken as they are
    segment = sampler.canvas.segment(codes, None)
    assert isinstance(segment, Video) and len(segment.codes) == 4
    bare = Sampler(sampler.decoder, sampler.vocabulary, sampler.tokenizer, GRIDS[:1])
    assert bare.canvas.seen is None


def test_each_prompt_may_have_its_own_size_guidance_and_negative(
    sampler: Sampler, vocabulary: Vocabulary
) -> None:
    sizes, scales, against = [(16, 24), (32, 8), (24, 24)], [1.0, 3.0, 2.0], ["", "a", "dark"]
    together = sampler.images(PROMPTS[:3], sizes, n=2, guidance=scales, negative=against, seed=9)
    assert [one[0].shape[:2] for one in together] == sizes
    for place in range(3):
        grammar = sampler.canvas.grammar(sizes[place][0] // 8, sizes[place][1] // 8)
        alone = sampler.codes(
            [PROMPTS[place]],
            grammar,
            n=2,
            guidance=scales[place],
            negative=against[place],
            seed=9,
            first=place,
        )
        pictures = sampler.canvas.pixels([one[None] for one in alone[0]], True)
        assert np.array_equal(np.stack(pictures)[:, 0], np.stack(together[place]))


def test_a_free_size_is_written_by_the_model(sampler: Sampler, vocabulary: Vocabulary) -> None:
    pictures = sampler.images(["a", "kite"], "free", n=2, seed=1)
    for picture in (one for group in pictures for one in group):
        height, width = picture.shape[0] // 8, picture.shape[1] // 8
        assert height * (width + 1) < 128


def test_a_suffix_and_a_negative_of_the_recipe_are_used(
    decoder: Decoder, vocabulary: Vocabulary, tokenizer: VisionTokenizer
) -> None:
    own = SamplingSettings(suffix=", sharp", negative="blurry")
    told = Sampler(decoder, vocabulary, tokenizer, GRIDS)
    by_recipe = Sampler(decoder, vocabulary, tokenizer, GRIDS, own)
    wanted = told.images(["a, sharp"], negative="blurry")
    assert np.array_equal(by_recipe.images(["a"]), wanted)
    assert not np.array_equal(by_recipe.images(["a"], negative=""), wanted)


def test_a_clip_goes_on_from_its_last_frames_for_as_long_as_is_asked(
    decoder: Decoder, vocabulary: Vocabulary, tokenizer: VisionTokenizer
) -> None:
    """Window by window: each is a clip of the trained length that begins with the last codes."""
    grids = [{"kind": "video", "size": [3, 2, 3], "fps": 6.0, "samples": 1}]
    sampler = Sampler(decoder, vocabulary, tokenizer, grids)
    codes = np.random.default_rng(0).integers(0, 64, (2, 2, 3))
    ((clip,),) = sampler.extend([codes], frames=16, prompts=["kite"], overlap=4, seed=2)
    assert clip.shape == (8 + 16, 16, 24, 3)
    known = codes
    for number, until in enumerate((2, 2)):  # 4 latent frames more, two a window
        grammar = BlockGrammar(vocabulary, 2, 3, 3, 6.0, known[-1:], 1 + until)
        rows = tuple(
            [vocabulary.bos, *vocabulary.text.encode(text), *grammar.opening]
            for text in ("kite", "")
        )
        draft = Draft(rows, grammar, (3.0,), (0, 0, number))
        (ids,) = TorchBackend(decoder).generate([draft], Drawing(Choice(), Choice(), 2))
        known = np.concatenate([known, grammar.codes(ids)])
    assert len(known) * 4 == len(clip)
    assert np.array_equal(clip, sampler.canvas.pixels([known], False)[0])
    # In the first frames it is what was given; three samples differ behind them.
    several = sampler.extend([codes], frames=4, n=3)[0]
    assert all(np.array_equal(one[:8], clip[:8]) for one in several)
    assert len({one.tobytes() for one in several}) == 3


def test_an_edit_sees_the_picture_and_the_instruction(
    sampler: Sampler, decoder: Decoder, vocabulary: Vocabulary
) -> None:
    """The rows of an edit are what training calls an edit document, and the same without."""
    codes = np.random.default_rng(0).integers(0, 64, (3, 4))
    pieces = [
        Piece(Image(codes), "source"),
        Piece(Text("make it red"), "instruction"),
        Piece(Image(codes), "result"),
    ]
    parts = compose("edit", pieces)
    whole = serialize([part.segment for part in parts], vocabulary, eos=False).tolist()
    made: list[Draft] = []

    class Kept:
        def generate(self, drafts: Sequence[Draft], drawing: Drawing, watch: Any) -> Any:
            made.extend(drafts)
            return TorchBackend(decoder).generate(drafts, drawing, watch)

    spied = Sampler(decoder, vocabulary, sampler.tokenizer, GRIDS, backend=Kept())
    ((picture,),) = spied.edit([codes], ["make it red"], guidance=2.0, image_guidance=1.5)
    assert picture.shape == (24, 32, 3)
    grammar = sampler.canvas.grammar(3, 4)
    full, image, none = made[0].contexts
    assert full == whole[: len(full)] and len(full) + grammar.most == len(whole)
    block = grammar.ids(codes).tolist()
    assert image == [vocabulary.bos, *block, *grammar.opening]
    assert none == [vocabulary.bos, *grammar.opening]
    assert made[0].guidance == (1.5, 2.0)
    spied.edit([codes], ["make it red"], guidance=2.0)  # the picture is not led to: two rows
    assert made[1].contexts == (full, image) and made[1].guidance == (2.0,)
    spied.edit([codes], ["make it red"], guidance=1.0)
    assert made[2].contexts == (full,)
    assert spied.edit([codes], ["x"], size=(16, 16))[0][0].shape == (16, 16, 3)


def test_an_edit_of_free_size_ends_where_the_context_does(
    sampler: Sampler, decoder: Decoder, vocabulary: Vocabulary
) -> None:
    """Sizes are only those that fit behind the picture and the instruction."""
    made: list[tuple[Draft, list[int]]] = []

    class Kept:
        def generate(self, drafts: Sequence[Draft], drawing: Drawing, watch: Any) -> Any:
            written = TorchBackend(decoder).generate(drafts, drawing, watch)
            made.extend(zip(drafts, written, strict=True))
            return written

    spied = Sampler(decoder, vocabulary, sampler.tokenizer, GRIDS, backend=Kept())
    codes = np.random.default_rng(0).integers(0, 64, (6, 6))
    spied.edit([codes], ["make it as red as can be"], "free", n=8, guidance=2.0, image_guidance=1.5)
    assert len(made) == 8
    for draft, ids in made:
        longest = max(map(len, draft.contexts))
        assert draft.grammar.most == 128 - longest
        assert longest + len(ids) <= 128


@torch.no_grad()
def test_a_question_is_asked_in_the_chat_template(
    sampler: Sampler, decoder: Decoder, vocabulary: Vocabulary
) -> None:
    codes = np.random.default_rng(0).integers(0, 64, (2, 3))
    (answer,) = sampler.ask([[codes]], ["what?"], max_tokens=8)
    block = sampler.canvas.grammar(2, 3).ids(codes).tolist()
    encode = vocabulary.text.encode
    ids = [vocabulary.bos, *encode("You are a helpful assistant. USER: "), *block]
    ids += [*encode("what?"), *encode(". ASSISTANT:")]
    start = len(ids)
    allowed = [*range(256), vocabulary.eos]
    while len(ids) - start < 8:
        best = allowed[int(decoder(torch.tensor([ids]))[0, -1, allowed].argmax())]
        if best == vocabulary.eos:
            break
        ids.append(best)
    assert answer == vocabulary.text.decode(ids[start:])
    # A conversation ends the answers before with EOS, as training writes it.
    turns = ["a?", "b", "c?"]
    pieces = [Piece(Text(t), ("user", "assistant")[i % 2]) for i, t in enumerate([*turns, ""])]
    parts = [part.segment for part in compose("chat", pieces)]
    whole = serialize(parts, vocabulary, eos=False).tolist()
    (told,) = sampler.ask([[]], [turns], max_tokens=4)
    grammar = text_grammar(vocabulary, 4)
    drawing = Drawing(Choice(None), Choice(None))
    (ids,) = TorchBackend(decoder).generate([Draft((whole,), grammar)], drawing)
    assert told == vocabulary.text.decode([i for i in ids if i != vocabulary.eos])


def test_a_recipes_question_describes(
    decoder: Decoder, vocabulary: Vocabulary, tokenizer: VisionTokenizer
) -> None:
    own = SamplingSettings(describe="what is it?")
    asks = Sampler(decoder, vocabulary, tokenizer, GRIDS, own)
    codes = np.random.default_rng(0).integers(0, 64, (2, 3))
    assert asks.describe([codes], 6) == asks.ask([[codes]], ["what is it?"], 6)


def test_text_goes_on_as_text(sampler: Sampler, decoder: Decoder, vocabulary: Vocabulary) -> None:
    (text,) = sampler.write(["once"], max_tokens=6)
    grammar = text_grammar(vocabulary, 6)
    context = [vocabulary.bos, *vocabulary.text.encode("once")]
    drawing = Drawing(Choice(None), Choice(None))
    (ids,) = TorchBackend(decoder).generate([Draft((context,), grammar)], drawing)
    assert text == vocabulary.text.decode([i for i in ids if i != vocabulary.eos])
    assert sampler.write(["once"], 6, temperature=1.0, seed=1) != sampler.write(
        ["once"], 6, temperature=1.0, seed=2
    )


def test_temperature_0_is_the_likeliest_word_whatever_the_recipe_says(
    decoder: Decoder, vocabulary: Vocabulary, tokenizer: VisionTokenizer, sampler: Sampler
) -> None:
    bold = Sampler(decoder, vocabulary, tokenizer, GRIDS, SamplingSettings(text_temperature=9.0))
    assert bold.write(["once"], 8) != sampler.write(["once"], 8)
    assert bold.write(["once"], 8, temperature=0) == sampler.write(["once"], 8)


def test_texts_and_pictures_come_back_in_their_order(
    decoder: Decoder, vocabulary: Vocabulary, tokenizer: VisionTokenizer
) -> None:
    eager = Decoder(decoder.config)
    eager.load_state_dict(decoder.state_dict())
    eager.lm_head.weight.data[vocabulary.boi] *= 4
    sampler = Sampler(eager.eval(), vocabulary, tokenizer, GRIDS)
    codes = np.random.default_rng(0).integers(0, 64, (2, 3))
    words = Choice(1.0)
    (reply,) = sampler.interleave(
        [["a", codes, "b"]], images=2, max_tokens=60, size=(16, 24), text=words, seed=1
    )
    pictures = [one for one in reply if not isinstance(one, str)]
    assert len(pictures) == 2 and all(one.shape == (16, 24, 3) for one in pictures)
    (plain,) = sampler.interleave([["a", codes]], images=0, max_tokens=9, text=words)
    assert all(isinstance(one, str) for one in plain)
    # Each document may have a guidance of its own, and the others do not change with it.
    two = sampler.interleave(
        [["a", codes, "b"], ["a", codes]],
        images=2,
        max_tokens=60,
        size=(16, 24),
        text=words,
        seed=1,
        guidance=[sampler.defaults.guidance, 1.0],
    )
    assert [one for one in two[0] if isinstance(one, str)] == [r for r in reply if type(r) is str]


def test_a_misspelt_keyword_is_an_error(sampler: Sampler) -> None:
    with pytest.raises(TypeError, match="there is no guidence"):
        sampler.images(["a"], guidence=2.0)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: s.images(["a"], size=(30, 40)), "multiples of 8: try 32x40"),
        (lambda s: s.images(["a"], guidance=0.0), "guidance 0.0 must be positive"),
        (lambda s: s.images(["a"], guidance=float("nan")), "guidance nan must be positive"),
        (lambda s: s.images(["a"], temperature=0.0), "temperature 0.0 must be positive"),
        (lambda s: s.images(["a"], top_k=0), "top-k 0 must be at least 1"),
        (lambda s: s.images(["a"], top_p=1.5), "top-p 1.5 must be above 0"),
        (lambda s: s.images(["a"], n=0), "n 0 must be at least 1"),
        (lambda s: s.images(["a"], size=(96, 96)), r"12\*12 codes take 165 tokens, .* holds 128"),
        (
            lambda s: s.images(["a" * 100]),
            "takes 101 tokens; with 31 of 4.5 .* is 4 over",
        ),
        (lambda s: s.images(["a"], negative="b" * 100), "'bbbb.* is 4 over the context"),
        (lambda s: s.images(["a", "b"], guidance=[1.0]), "1 values of guidance for 2 prompts"),
        (lambda s: s.images(["a"], "big"), "size big: height and width in pixels, or free"),
        (lambda s: s.images(["a" * 125], "free"), "'aaaa.*over the context of 128: say less"),
        (lambda s: s.edit([np.ones((4, 5), int)], ["a"], image_guidance=0), "image-guidance 0 mu"),
        (
            lambda s: s.edit([np.ones((9, 9), int)], ["a"]),
            "prompt 'a' takes .* over the",
        ),
        (lambda s: s.edit([np.ones((4, 5), int)], ["a"], negative="x"), "an edit .* no negative"),
        (lambda s: s.edit([np.ones((4, 5), int)], ["a"], negative=["x"]), "an edit .* no negative"),
        (lambda s: s.edit([np.ones((4, 5), int)], ["a"], n=0), "n 0 must be at least 1"),
        (lambda s: s.extend([np.ones((2, 4, 4), int)], 8, n=0), "n 0 must be at least 1"),
        (lambda s: s.interleave([["a"]], max_tokens=-5), "max-tokens -5 must be at least 1"),
        (lambda s: s.interleave([["a"]], guidance=[1.0, 2.0]), "2 values of guidance for 1 pro"),
        (lambda s: s.interleave([["a"]], negative="x"), "a document is led .* takes no negative"),
        (lambda s: s.extend([np.full((2, 4, 4), 64)], 8), "code 64 is outside the codebook of 64"),
        (lambda s: s.extend([np.full((2, 4, 4), -1)], 8), "code -1 is outside the codebook of 64"),
        (lambda s: s.extend([np.zeros((2, 4, 4))], 8), "Video needs whole-number codes"),
        (lambda s: s.edit([np.ones((4, 5), int)], []), "1 pictures have 0 instructions"),
        (lambda s: s.edit([np.ones((2, 4, 5), int)], ["a"]), "a picture is needed here"),
        (lambda s: s.extend([np.ones((2, 4, 4), int)], 6), "frames 6 must be a multiple of 4"),
        (lambda s: s.extend([np.ones((2, 4, 4), int)], 8, overlap=8), "overlap of 8 frames leaves"),
        (lambda s: s.extend([np.ones((4, 4), int)], 8), "a clip is needed here"),
        (lambda s: s.ask([[]], [["a", "b"]]), "must end with a question"),
        (lambda s: s.write(["a" * 200]), "prompt 0 takes 201 tokens, the context"),
        (lambda s: s.interleave([["a" * 200]]), "document 0 takes 201 tokens, the context"),
        (lambda s: s.videos(["a"], frames=6), "frames 6 must be a multiple of 4: try 8"),
        (lambda s: s.videos(["a"], fps=0.0), "fps 0.0 must be positive"),
        (lambda s: s.describe([np.zeros((12, 12), int)]), "takes 166 tokens, the context"),
        (lambda s: s.describe([np.zeros((4, 4), np.uint8)]), "a picture is .H, W, 3."),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(
    sampler: Sampler, call: Callable[[Sampler], Any], message: str
) -> None:
    with pytest.raises(UnimodalError, match=message) as caught:
        call(sampler)
    assert "\n" not in str(caught.value)


def test_what_no_context_holds_is_never_built(
    sampler: Sampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(canvas, "BlockGrammar", None)  # of such a size it takes gigabytes
    with pytest.raises(UnimodalError, match=r"50000\*50000 codes take 25000\d+ tokens"):
        sampler.images(["a"], size=(400_000, 400_000))
    with pytest.raises(UnimodalError, match=r"900000\*4\*4 codes take 189000\d+ tokens"):
        sampler.videos(["a"], frames=3_600_000)


@pytest.fixture(scope="module")
def checkpoint(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_shards: Shards,
    tiny_settings: Callable[..., TrainSettings],
) -> Path:
    out = tmp_path_factory.mktemp("run") / "ckpt"
    return train([tiny_shards.path], out, tiny_settings("steps=4", "log.sample_every=4"))


def test_a_checkpoint_samples_after_a_move_and_by_step(checkpoint: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(checkpoint, tmp_path / "moved")
    (picture,) = Sampler.load(moved, device="cpu").images(["picture 1"])[0]
    (again,) = Sampler.load(moved / "step-00000004", device="cpu").images(["picture 1"])[0]
    assert picture.shape == (32, 40, 3)
    assert np.array_equal(picture, again)


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8"])
def test_a_checkpoint_is_loaded_with_the_weights_that_are_asked_for(
    checkpoint: Path, weights: str
) -> None:
    sampler = Sampler.load(checkpoint, device="cpu", weights=weights)
    assert sampler.decoder.lm_head.weight.dtype == getattr(torch, weights)
    assert sampler.images(["picture 1"], size=(16, 24))[0][0].shape == (16, 24, 3)
    with pytest.raises(UsageError, match="weights 'int3' are not one of float32, bfloat16, int8"):
        Sampler.load(checkpoint, weights="int3")


def test_what_only_training_needs_is_not_of_the_digest(checkpoint: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(checkpoint, tmp_path / "moved")
    before = Sampler.load(moved, device="cpu").digest
    (moved / "step-00000004" / "optimizer.safetensors").unlink()
    after = Sampler.load(moved, device="cpu")
    assert before == after.digest
    (moved / "step-00000004" / "model.safetensors").write_bytes(b"others")
    del after.digest
    assert before != after.digest


def test_pixels_are_made_on_the_device_that_was_asked_for(
    checkpoint: Path, decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, asked = VisionTokenizer.load, []

    def load(name: Path, device: str = "cpu") -> VisionTokenizer:
        asked.append(device)
        return real(name)

    monkeypatch.setattr(VisionTokenizer, "load", load)
    monkeypatch.setattr(module, "load_decoder", lambda step, *_: real_decoder(step, "cpu"))
    real_decoder = load_decoder
    Sampler.load(checkpoint, device="cuda:1")
    assert asked == ["cuda:1"]
    with torch.device("meta"):
        there = Decoder(weights_config(checkpoint), seed=None)
    Sampler.for_checkpoint(checkpoint, there)
    assert asked[1] == "meta"


def test_a_server_is_a_backend_and_holds_the_weights(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from unimodal.model import vllm_server

    class Server:
        def __init__(self, url: str, vocabulary: Vocabulary) -> None:
            self.url, self.vocabulary = url, vocabulary

    monkeypatch.setattr(vllm_server, "VllmServer", Server)
    sampler = Sampler.load(checkpoint, device="cpu", backend="http://localhost:8000")
    assert isinstance(sampler.backend, Server) and sampler.backend.url == "http://localhost:8000"
    assert sampler.backend.vocabulary is sampler.vocabulary and sampler.canvas.grids
    assert sampler.decoder.lm_head.weight.device.type == "meta"


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"backend": "jax"}, "backend jax: torch or vllm"),
        ({"backend": "vllm", "compile": True}, "vLLM compiles by itself: leave out load.compile"),
        ({"backend": "http://a:1", "compile": True}, "vLLM compiles by itself"),
        ({"backend": "http://a:1", "weights": "int8"}, "http://a:1 has its own weights"),
    ],
)
def test_what_a_backend_does_not_take_is_refused_before_it_starts(
    checkpoint: Path, how: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        Sampler.load(checkpoint, device="cpu", **how)
    assert "\n" not in str(caught.value)


def test_training_leaves_a_grid_of_samples(checkpoint: Path) -> None:
    import PIL.Image

    with PIL.Image.open(checkpoint / "samples" / "step-00000004.png") as sheet:
        assert sheet.size == (6 * 42 - 2, 32)  # 4 training and 2 validation captions


def test_a_checkpoint_of_another_vision_tokenizer_is_refused(
    checkpoint: Path, tmp_path: Path, tokenizer: VisionTokenizer, vocabulary: Vocabulary
) -> None:
    moved = shutil.copytree(checkpoint, tmp_path / "moved")
    about = json.loads((moved / "data.json").read_text())
    about["vision_tokenizer"]["digest"] = "0" * 64
    (moved / "data.json").write_text(json.dumps(about))
    with pytest.raises(UnimodalError, match="not the vision tokenizer that this checkpoint was"):
        Sampler.load(moved)
    shutil.rmtree(moved / "vision_tokenizer")
    with pytest.raises(UnimodalError, match="has no vision_tokenizer"):
        Sampler.load(moved)
    small = Decoder(DecoderConfig(Shape(width=8, layers=1, heads=2, kv_heads=1, ffn=8), 100))
    with pytest.raises(UnimodalError, match="the decoder has 100 ids, its vocabulary 328"):
        Sampler(small, vocabulary, tokenizer)


def test_a_contact_sheet_holds_every_picture() -> None:
    pictures = [np.full((4, 6, 3), shade, np.uint8) for shade in range(5)]
    sheet = contact_sheet(pictures, columns=3, gap=1)
    assert sheet.shape == (9, 20, 3)
    assert [sheet[row * 5, column * 7, 0] for row in (0, 1) for column in (0, 1, 2)] == [
        0,
        1,
        2,
        3,
        4,
        255,
    ]
    with pytest.raises(UsageError):
        contact_sheet([])


def test_a_caption_written_into_the_ids_cannot_open_a_block(
    sampler: Sampler, vocabulary: Vocabulary
) -> None:
    ids = vocabulary.text.encode("<|image start|>")
    assert all(0 <= i < 256 for i in ids)
    assert parse([vocabulary.bos, *ids], vocabulary) == [Text("<|image start|>")]


def test_clips_of_joint_codes_are_painted_jointly(
    decoder: Decoder, vocabulary: Vocabulary, tokenizer: VisionTokenizer
) -> None:
    """Apart, the second latent frame does not see the first; jointly, it does."""
    codes = np.random.default_rng(0).integers(0, vocabulary.codebook_size, (2, 3, 3))
    for joint in (False, True):
        sampler = Sampler(decoder, vocabulary, tokenizer, GRIDS, joint=joint)
        painted = sampler.canvas.pixels([codes], image=False)[0]
        whole = tokenizer.decode(torch.from_numpy(codes)[None], joint=joint)
        assert np.array_equal(painted, to_uint8(whole)[0])
    apart = tokenizer.decode(torch.from_numpy(codes)[None])
    assert not torch.equal(whole, apart)
