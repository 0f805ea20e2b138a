"""Requests in step, in an engine made of a loop: no vLLM is needed to see what they write."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from unimodal.model.choice import Choice
from unimodal.model.decoder import Decoder, DecoderConfig, Shape
from unimodal.model.generate import Draft, Drawing, TorchBackend
from unimodal.model.grammar import BlockGrammar, DocumentGrammar, text_grammar
from unimodal.model.paired import OutOfStep, Pairing, Request, Stretch, Writing, describe, rebuild
from unimodal.pipeline.errors import UsageError
from unimodal.tokenize.vocabulary import Vocabulary

sys.path.append(str(Path(__file__).parent))
from vllm_engine import chi_square_z  # type: ignore[import-not-found]

CONTEXT = 128
GREEDY = Drawing(Choice(temperature=None), Choice(temperature=None))
DRAWN = Drawing(Choice(0.9, top_k=40, plausible=0.05), Choice(0.4, top_k=20, top_p=0.9), seed=7)


@pytest.fixture(scope="module")
@torch.no_grad()
def decoder(vocabulary: Vocabulary) -> Decoder:
    shape = Shape(width=48, layers=2, heads=6, kv_heads=2, ffn=80, init_std=0.2)
    made = Decoder(DecoderConfig(shape, vocabulary.size, CONTEXT)).eval()
    # So that documents come to pictures: BOI is likelier than what is likeliest.
    head = made.lm_head.weight.data
    first = made(torch.tensor([[vocabulary.bos, 65, 66]]))[0, -1, : vocabulary.text.size]
    head[vocabulary.boi] = 1.1 * head[first.argmax()]
    return made


@pytest.fixture(scope="module")
def drafts(vocabulary: Vocabulary) -> list[Draft]:
    """Of every kind: pictures, a clip that goes on, an edit, documents, free sizes, text."""
    bos, encode = vocabulary.bos, vocabulary.text.encode
    made = []
    for number, (prompt, negative, size, scale) in enumerate(
        [("a red kite", "", (4, 5), 3.0), ("", "blurry", (1, 1), 2.0), ("sea", "x", (3, 2), 1.5)]
    ):
        grammar = BlockGrammar(vocabulary, *size)
        rows = [[bos, *encode(text), *grammar.opening] for text in (prompt, negative)]
        made.append(Draft(tuple(rows), grammar, (scale,), (number, 0)))
    begun = torch.arange(8).reshape(2, 2, 2).numpy()
    clip = BlockGrammar(vocabulary, 2, 2, 4, 6.0, begun=begun, until=3)
    made.append(Draft(([bos, 9, *clip.opening], [bos, *clip.opening]), clip, (2.0,), (3, 1)))
    edit = BlockGrammar(vocabulary, 2, 3)
    three = ([bos, 8, 9, *edit.opening], [bos, 8, *edit.opening], [bos, *edit.opening])
    made.append(Draft(three, edit, (1.5, 3.0), (4, 0), seed=1))
    for size in ((2, 2), None):
        document = DocumentGrammar(vocabulary, 90, 12, images=2, size=size)
        made.append(Draft(([bos, 65, 66], [bos]), document, (2.0,), (5, len(made))))
    free = DocumentGrammar(vocabulary, 80, picture=True)
    rows = ([bos, 67, vocabulary.boi], [bos, vocabulary.boi])
    made.append(Draft(rows, free, (2.5,), (6, 0)))
    made.append(Draft(([bos, 70, 71],), text_grammar(vocabulary, 15), (), (7, 0)))
    made.append(Draft(([bos, 72, *edit.opening],), edit, (), (8, 0)))
    return made


@torch.no_grad()
def _step(decoder: Decoder, pairing: Pairing, size: int, lost: Sequence[int] = ()) -> Tensor:
    """One step of the engine; what rows in `lost` wrote is thrown away. Its logits."""
    logits = torch.zeros(size, decoder.config.vocabulary_size)
    for place, request in pairing.requests.items():
        ids = torch.tensor([[*request.prompt, *request.written]])
        logits[place] = decoder(ids)[0, -1]
    pairing.apply(logits)
    for place, request in pairing.requests.items():
        if place not in lost:
            request.written.append(int(logits[place].argmax()))
    return logits


def _write(
    decoder: Decoder,
    vocabulary: Vocabulary,
    drafts: Sequence[Draft],
    drawing: Drawing,
    disturb: Callable[[Pairing], Sequence[int]] | None = None,
) -> list[list[int]]:
    """All drafts at once, each with its next stretch as soon as the last is over."""
    pairing = Pairing(vocabulary, CONTEXT, "cpu")
    writings = [Writing(draft, drawing, vocabulary) for draft in drafts]
    running: dict[int, list[Request]] = {}
    names = 0
    while True:
        for number, writing in enumerate(writings):
            if writing.rows and number not in running:
                stretch = Stretch.parse(writing.stretch(str(names := names + 1)).json())
                prompts = writing.prompts()
                running[number] = [Request(stretch, prompt, []) for prompt in prompts]
                assert len({len(prompts), writing.rows}) == 1
        if not running:
            return [writing.ids for writing in writings]
        requests = [request for rows in running.values() for request in rows]
        random.Random(names).shuffle(requests)  # rows stand anywhere in the batch
        pairing.requests = dict(enumerate(requests))
        pairing.regroup()
        lost = [] if disturb is None else disturb(pairing)
        seen = {number: len(rows[0].written) for number, rows in running.items()}
        _step(decoder, pairing, len(requests), lost)
        for number, rows in list(running.items()):
            assert len({tuple(row.written) for row in rows}) == 1
            written = rows[0].written
            if len(written) > seen[number] and writings[number].read(written[-1], len(rows)):
                del running[number]


@pytest.mark.parametrize("drawing", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_requests_in_step_write_what_the_torch_backend_writes(
    decoder: Decoder, vocabulary: Vocabulary, drafts: list[Draft], drawing: Drawing
) -> None:
    expected = TorchBackend(decoder).generate(drafts, drawing)
    assert _write(decoder, vocabulary, drafts, drawing) == expected
    assert any(vocabulary.boi in ids for ids in expected[5:7])  # a document came to a picture


def test_what_the_engine_computes_twice_does_no_harm(
    decoder: Decoder, vocabulary: Vocabulary, drafts: list[Draft]
) -> None:
    """All rows of a draft lose a step now and then, as when vLLM recomputes them."""
    chance = random.Random(3)

    def disturb(pairing: Pairing) -> list[int]:
        lost = {name for name in pairing.groups if chance.random() < 0.2}
        for request in pairing.requests.values():  # preempted and resumed: a list of its own
            request.written = list(request.written)
        return [i for i, one in pairing.requests.items() if one.stretch.name in lost]

    expected = TorchBackend(decoder).generate(drafts, DRAWN)
    assert _write(decoder, vocabulary, drafts, DRAWN, disturb) == expected


def _pair(vocabulary: Vocabulary, draft: Draft) -> tuple[Pairing, Writing, list[Request]]:
    writing = Writing(draft, GREEDY, vocabulary)
    stretch = writing.stretch("one")
    requests = [Request(stretch, prompt, []) for prompt in writing.prompts()]
    return Pairing(vocabulary, CONTEXT, "cpu"), writing, requests


def test_a_row_without_its_twin_ends_at_once(
    decoder: Decoder, vocabulary: Vocabulary, drafts: list[Draft]
) -> None:
    pairing, writing, (first, twin) = _pair(vocabulary, drafts[0])
    pairing.requests = {0: first}
    pairing.regroup()
    _step(decoder, pairing, 1)
    assert first.written == [vocabulary.pad]
    with pytest.raises(OutOfStep, match="not computed together"):
        writing.read(first.written[0], 2)
    # The twin comes a step late: it does not join a row that has ended.
    pairing.requests = {0: first, 1: twin}
    pairing.regroup()
    _step(decoder, pairing, 2)
    assert twin.written == [vocabulary.pad]


def test_a_row_that_falls_behind_ends_its_draft(
    decoder: Decoder, vocabulary: Vocabulary, drafts: list[Draft]
) -> None:
    pairing, writing, (first, twin) = _pair(vocabulary, drafts[0])
    pairing.requests = {0: first, 1: twin}
    pairing.regroup()
    for _ in range(3):
        _step(decoder, pairing, 2)
    _step(decoder, pairing, 2, lost=[1])  # the twin alone has to do it again
    _step(decoder, pairing, 2)
    assert first.written[-1] == twin.written[-1] == vocabulary.pad
    assert vocabulary.pad not in first.written[:4]
    for token in first.written[:4]:
        assert not writing.read(token, 2)
    with pytest.raises(OutOfStep):
        writing.read(vocabulary.pad, 2)
    # Sent again from there, the draft comes out as if nothing had been.
    stretch = writing.stretch("two")
    again = [Request(stretch, prompt, []) for prompt in writing.prompts()]
    pairing.requests = dict(enumerate(again))
    pairing.regroup()
    while not again[0].written or not writing.read(again[0].written[-1], 2):
        _step(decoder, pairing, 2)
    assert [writing.ids] == TorchBackend(decoder).generate(drafts[:1], GREEDY)


def test_a_request_that_is_none_of_the_rows_ends_and_leaves_them_alone(
    decoder: Decoder, vocabulary: Vocabulary, drafts: list[Draft]
) -> None:
    pairing, _, rows = _pair(vocabulary, drafts[0])
    stranger = Request(rows[0].stretch, [vocabulary.bos], [])
    double = Request(rows[0].stretch, rows[0].prompt, [])
    pairing.requests = dict(enumerate([stranger, *rows, double]))
    pairing.regroup()
    _step(decoder, pairing, 4)
    assert stranger.written == double.written == [vocabulary.pad]
    assert rows[0].written == rows[1].written != [vocabulary.pad]


def test_rows_of_other_requests_keep_their_logits(
    decoder: Decoder, vocabulary: Vocabulary, drafts: list[Draft]
) -> None:
    pairing, _, rows = _pair(vocabulary, drafts[0])
    pairing.requests = {0: rows[0], 2: rows[1]}
    pairing.regroup()
    logits = torch.randn(4, vocabulary.size)
    before = logits.clone()
    pairing.apply(logits)
    assert torch.equal(logits[[1, 3]], before[[1, 3]])
    assert (logits[[0, 2]] != before[[0, 2]]).sum() == 2


@pytest.mark.parametrize(
    "change",
    [
        {"rows": [1, 2, 3]},
        {"rows": "12"},
        {"guidance": [float("inf")]},
        {"written": -1},
        {"seed": "0"},
        {"vision": {"temperature": -1}},
        {"vision": {"warmth": 1}},
        {"grammar": []},
        {"extra": 1},
    ],
)
def test_a_stretch_that_nobody_would_send_is_refused(
    vocabulary: Vocabulary, drafts: list[Draft], change: dict[str, object]
) -> None:
    record = json.loads(Writing(drafts[0], GREEDY, vocabulary).stretch("one").json())
    assert Stretch.parse(json.dumps(record)).rows == record["rows"]
    with pytest.raises(ValueError, match="no stretch of a draft"):
        Stretch.parse(json.dumps({**record, **change}))
    for text in (None, "", "[]", "{", 7):
        with pytest.raises(ValueError, match="no stretch of a draft"):
            Stretch.parse(text)


@pytest.mark.parametrize(
    "grammar",
    [
        {"shape": [90_000, 90_000], "done": 0, "last": 1},
        {"shape": [0, 4], "done": 0, "last": 1},
        {"shape": [2, 2], "done": 3, "last": 2},
        {"shape": []},
        {"shape": ["a", 2], "done": 0, "last": 1},
        {"room": 10**9, "tokens": None, "images": 1, "size": None, "picture": False},
        {"room": 9, "tokens": None, "images": 1, "size": [10**9, 10**9], "picture": False},
        {},
    ],
)
def test_a_grammar_that_cannot_be_ends_its_request_and_not_the_engine(
    decoder: Decoder, vocabulary: Vocabulary, drafts: list[Draft], grammar: dict[str, object]
) -> None:
    record = json.loads(Writing(drafts[-1], GREEDY, vocabulary).stretch("one").json())
    request = Request(Stretch(**{**record, "grammar": grammar}), drafts[-1].contexts[0], [])
    pairing = Pairing(vocabulary, CONTEXT, "cpu")
    pairing.requests = {0: request}
    pairing.regroup()
    _step(decoder, pairing, 1)
    assert request.written == [vocabulary.pad]


def test_a_grammar_travels_whole(vocabulary: Vocabulary, drafts: list[Draft]) -> None:
    for draft in drafts:
        twin = rebuild(json.dumps(describe(draft.grammar)), vocabulary, CONTEXT)
        if isinstance(draft.grammar, BlockGrammar):
            assert isinstance(twin, BlockGrammar) and twin.behind == draft.grammar.behind
        else:
            assert twin == draft.grammar
    with pytest.raises(UsageError, match="torch backend"):
        describe(object())  # type: ignore[arg-type]


@torch.no_grad()
def test_draws_have_the_probabilities_of_the_guided_logits(
    decoder: Decoder, vocabulary: Vocabulary
) -> None:
    """Chi-square over 6,000 drafts of one code each, against the exact distribution."""
    grammar = BlockGrammar(vocabulary, 1, 1)
    rows = ([vocabulary.bos, 65, *grammar.opening], [vocabulary.bos, *grammar.opening])
    scale, temperature, count = 1.7, 0.8, 6000
    drawing = Drawing(Choice(temperature, top_k=4096), Choice(), seed=5)
    pairing, requests = Pairing(vocabulary, CONTEXT, "cpu"), []
    for sample in range(count):
        writing = Writing(Draft(rows, grammar, (scale,), (0, sample)), drawing, vocabulary)
        stretch = writing.stretch(str(sample))
        requests += [Request(stretch, prompt, []) for prompt in rows]
    pairing.requests = dict(enumerate(requests))
    pairing.regroup()
    own, other = (decoder(torch.tensor([row]))[0, -1] for row in rows)
    logits = pairing.apply(torch.stack([own, other]).repeat(count, 1))
    drawn = logits[::2].argmax(-1)
    assert torch.equal(drawn, logits[1::2].argmax(-1))
    vision = slice(*grammar.allowed.ranges[0])
    p = ((other + scale * (own - other))[vision] / temperature).double().softmax(-1)
    seen = torch.bincount(drawn - vision.start, minlength=len(p)).double()
    assert chi_square_z(seen, p * count) < 3.1  # one in a thousand
