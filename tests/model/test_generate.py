"""The batched, cached, sliced way of writing against the slow, literal one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch

from unimodal.model.choice import Choice, Noise
from unimodal.model.decoder import Decoder, DecoderConfig, Shape
from unimodal.model.generate import Draft, Drawing, TorchBackend
from unimodal.model.grammar import BlockGrammar, DocumentGrammar, text_grammar
from unimodal.tokenize.document import Image, Text, parse, serialize
from unimodal.tokenize.vocabulary import Vocabulary

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def decoder(vocabulary: Vocabulary) -> Decoder:
    shape = Shape(width=48, layers=2, heads=6, kv_heads=2, ffn=80, init_std=0.2)
    return Decoder(DecoderConfig(shape, vocabulary.size, context=256)).eval()


@torch.no_grad()
def slow(decoder: Decoder, draft: Draft, drawing: Drawing) -> list[int]:
    """One draft as EMU3.md tells it: no cache, log-softmax over the whole vocabulary, guidance,
    mask, temperature, top-k, top-p, draw; every id a step of its own."""
    rows = [list(context) for context in draft.contexts]
    noise, walk, written, steps = Noise(drawing.seed, [draft.key]), draft.grammar.start(), [], 0
    every = torch.arange(decoder.config.vocabulary_size)
    while (allowed := walk.allowed) is not None:
        logits = [decoder(torch.tensor([row]))[0, -1].log_softmax(-1) for row in rows]
        guided, vision = logits[0], allowed.kind == "vision"
        if vision and len(rows) == 2:
            guided = logits[1] + draft.guidance[0] * (logits[0] - logits[1])
        elif vision and len(rows) == 3:
            a, b = draft.guidance
            guided = logits[2] + a * (logits[1] - logits[2]) + b * (logits[0] - logits[1])
        mask = torch.full_like(guided, -torch.inf)
        mask[allowed.ids] = 0
        choice = drawing.vision if vision else drawing.text
        guided = guided + mask
        if choice.temperature is None:
            token = int(guided.argmax())
        else:
            guided = guided / choice.temperature
            k = min(choice.top_k, len(allowed))
            guided[guided < guided.topk(k).values[-1]] = -torch.inf
            ordered, order = guided.sort(descending=True)
            p = ordered.softmax(-1)
            guided[order[(p.cumsum(-1) - p) >= choice.top_p]] = -torch.inf
            token = int((guided.softmax(-1) / noise.exponential(steps, every)[0]).argmax())
        steps += 1
        taken = walk.take(token)
        written += [token, *taken.given]
        for number, row in enumerate(rows):
            if taken.shared or number == 0:
                row += [token, *taken.given]
    return written


def drafts(vocabulary: Vocabulary) -> list[Draft]:
    """Pictures of several sizes, clips begun and whole, texts, documents; one to three rows."""
    bos, encode = vocabulary.bos, vocabulary.text.encode
    codes = np.random.default_rng(0).integers(0, 64, (2, 2, 3))
    grammars = [
        BlockGrammar(vocabulary, 3, 4),
        BlockGrammar(vocabulary, 2, 1),
        BlockGrammar(vocabulary, 2, 2, 2, 7.5),
        BlockGrammar(vocabulary, 2, 3, 4, 8, codes, 3),
        DocumentGrammar(vocabulary, 60, picture=True),
        DocumentGrammar(vocabulary, 70, images=2, size=(2, 3)),
        DocumentGrammar(vocabulary, 50, images=1),
        text_grammar(vocabulary, 9),
    ]
    made = []
    for number, (grammar, prompt) in enumerate(
        zip(grammars, ["a kite", "b", "", "long prompt " * 3, "c", "dd", "e", "f"], strict=True)
    ):
        for rows, guidance in ((1, ()), (2, (2.5,)), (3, (1.5, 3.0))):
            texts = [prompt, "", "neg"][:rows]
            contexts = tuple([bos, *encode(text), *grammar.opening] for text in texts)
            made.append(Draft(contexts, grammar, guidance, (number, rows)))
    return made


@pytest.mark.parametrize("greedy", [True, False])
def test_everything_is_written_as_the_slow_way_writes_it(
    decoder: Decoder, vocabulary: Vocabulary, greedy: bool
) -> None:
    if greedy:
        drawing = Drawing(Choice(None), Choice(None), 0)
    else:
        drawing = Drawing(Choice(0.8, 20, 0.9), Choice(1.1, 150, 0.97), 7)
    asked = drafts(vocabulary)
    written = TorchBackend(decoder, batch=16).generate(asked, drawing)
    for draft, ids in zip(asked, written, strict=True):
        assert ids == slow(decoder, draft, drawing), draft.grammar


def test_what_is_written_does_not_depend_on_the_batch(
    decoder: Decoder, vocabulary: Vocabulary
) -> None:
    drawing = Drawing(Choice(), Choice(1.0), 3)
    asked = drafts(vocabulary)
    whole = TorchBackend(decoder, batch=64).generate(asked, drawing)
    for batch in (1, 5):
        assert TorchBackend(decoder, batch=batch).generate(asked, drawing) == whole


def test_whoever_watches_sees_every_row_as_it_ends(
    decoder: Decoder, vocabulary: Vocabulary
) -> None:
    seen: dict[int, list[int]] = {}
    steps = 0

    def watch(done: Mapping[int, list[int]], more: int) -> None:
        nonlocal steps
        steps += more
        for number, ids in done.items():
            assert ids[: len(seen.get(number, []))] == seen.get(number, [])
            seen[number] = list(ids)

    asked = drafts(vocabulary)
    written = TorchBackend(decoder, batch=5).generate(
        asked, Drawing(Choice(), Choice(1.0), 3), watch
    )
    assert [seen[i] for i in range(len(asked))] == written
    free = [_choices(draft, ids) for draft, ids in zip(asked, written, strict=True)]
    assert steps == sum(free)


def _choices(draft: Draft, ids: Sequence[int]) -> int:
    walk, place, count = draft.grammar.start(), 0, 0
    while walk.allowed is not None:
        place += 1 + len(walk.take(ids[place]).given)
        count += 1
    assert place == len(ids)
    return count


def test_a_watch_that_raises_ends_it(decoder: Decoder, vocabulary: Vocabulary) -> None:
    def watch(done: Mapping[int, list[int]], steps: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        TorchBackend(decoder).generate(drafts(vocabulary), Drawing(Choice(), Choice(), 0), watch)


def test_a_model_may_draw_several_pictures_and_text_between(
    decoder: Decoder, vocabulary: Vocabulary
) -> None:
    """Emu3's own constraint anchors on the first picture of a context, and goes wrong here."""
    eager = Decoder(decoder.config)
    eager.load_state_dict(decoder.state_dict())
    eager.lm_head.weight.data[vocabulary.boi] *= 4
    first = Image(np.ones((2, 5), np.int64))
    context = serialize([first, Text("then")], vocabulary, eos=False).tolist()
    grammar = DocumentGrammar(vocabulary, 150, images=3, size=(3, 2))
    draft = Draft((context,), grammar)
    drawing = Drawing(Choice(), Choice(1.0), 1)
    (ids,) = TorchBackend(eager.eval()).generate([draft], drawing)
    found = parse(ids, vocabulary)
    assert sum(isinstance(one, Image) for one in found) >= 2
    assert ids == slow(eager, draft, drawing)
