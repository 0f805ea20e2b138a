"""The decoding schedule against the documents that the serializer writes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unimodal.model.grammar import BlockGrammar, DocumentGrammar, size_tree, text_grammar
from unimodal.tokenize.document import Image, Video, parse, serialize
from unimodal.tokenize.vocabulary import Vocabulary


@given(st.integers(1, 6), st.integers(1, 6), st.one_of(st.none(), st.integers(1, 3)))
@settings(deadline=None, max_examples=40)
def test_drawing_by_the_schedule_writes_what_the_serializer_writes(
    height: int, width: int, frames: int | None
) -> None:
    vocabulary = Vocabulary.bytes(64)
    fps = None if frames is None else 7.5
    grammar = BlockGrammar(vocabulary, height, width, frames, fps)
    codes = np.random.default_rng(0).integers(0, 64, grammar.shape)
    ids = list(grammar.opening)
    for code, behind in zip(codes.reshape(-1).tolist(), grammar.behind, strict=True):
        ids += [code + vocabulary.vision_start, *behind]
    segment = Image(codes) if fps is None else Video(codes, fps)
    expected = serialize([segment], vocabulary, bos=False, eos=False).tolist()
    assert ids == expected == grammar.ids(codes).tolist()


@pytest.mark.parametrize(("width", "given"), [(1, [1] * 5), (3, [0, 0, 1] * 5)])
def test_one_line_end_is_fed_with_the_last_code_of_each_row(width: int, given: list[int]) -> None:
    grammar = BlockGrammar(Vocabulary.bytes(64), 5, width)
    assert [len(one) for one in grammar.behind[:-1]] == given[:-1]
    assert len(grammar.behind[-1]) == 3  # EOL, EOF, EOI


def test_text_allows_text_ids_and_eos_alone() -> None:
    vocabulary = Vocabulary.bytes(64)
    walk = text_grammar(vocabulary, 2).start()
    assert walk.allowed is not None
    assert walk.allowed.ids.tolist() == [*range(256), vocabulary.eos]
    matrix = torch.arange(vocabulary.size)
    assert torch.equal(walk.allowed.rows(matrix), walk.allowed.ids)
    assert not walk.take(65).shared
    walk.take(66)
    assert walk.allowed is None  # at its limit


@given(st.integers(0, 2**32 - 1), st.integers(0, 3), st.integers(0, 120), st.booleans())
@settings(deadline=None, max_examples=150)
def test_whatever_is_chosen_a_document_is_legal_and_fits(
    seed: int, images: int, room: int, fixed: bool
) -> None:
    """Random choices out of what is allowed, pictures preferred: what comes parses, keeps to its
    numbers, and never outgrows the room."""
    vocabulary, rng = Vocabulary.bytes(64), np.random.default_rng(seed)
    size = (2, 3) if fixed else None
    walk = DocumentGrammar(vocabulary, room, images=images, size=size).start()
    ids: list[int] = []
    while (allowed := walk.allowed) is not None:
        was_inside = allowed.kind != "text"
        token = int(rng.choice(allowed.ids))
        if vocabulary.boi in allowed.ids and rng.random() < 0.3:
            token = vocabulary.boi
        taken = walk.take(None if walk.blind and token % 2 else token)
        ids += [token, *taken.given]
        assert taken.shared == was_inside or token == vocabulary.boi
    assert len(ids) <= room
    assert ids[-1:] == [vocabulary.eos] or len(ids) == room
    found = [one for one in parse(ids, vocabulary) if isinstance(one, Image)]
    assert len(found) <= images
    assert not fixed or all(one.codes.shape == (2, 3) for one in found)


@given(st.integers(0, 2**32 - 1), st.integers(9, 200))
@settings(deadline=None, max_examples=100)
def test_a_size_that_the_model_writes_is_one_that_fits(seed: int, room: int) -> None:
    vocabulary, rng = Vocabulary.bytes(64), np.random.default_rng(seed)
    grammar = DocumentGrammar(vocabulary, room, picture=True)
    walk, ids = grammar.start(), list(grammar.opening)
    while (allowed := walk.allowed) is not None:
        token = int(rng.choice(allowed.ids))
        ids += [token, *walk.take(token).given]
    (segment,) = parse(ids, vocabulary)
    assert isinstance(segment, Image) and len(ids) - 1 <= room


def test_every_size_has_a_place_in_the_tree() -> None:
    vocabulary = Vocabulary.bytes(64)
    for height, width in ((1, 1), (12, 3), (128, 128), (64, 100)):
        node = size_tree(vocabulary)
        for one in vocabulary.text.encode(f"{height}*{width}"):
            node = node.next[one]
        assert node.sides == (height, width)


def test_what_emu3s_table_says_comes_next_is_what_comes_next() -> None:
    """EMU3's constraint by offset from IMG, W of 3 and more, where it is right."""
    vocabulary = Vocabulary.bytes(64)
    for height, width in ((1, 3), (4, 5), (6, 3)):
        grammar = BlockGrammar(vocabulary, height, width)
        ids = grammar.ids(np.zeros(grammar.shape, int)).tolist()
        behind = ids[ids.index(vocabulary.img) + 1 :]
        for offset, found in enumerate(behind, 1):
            if offset % (width + 1) == 0:
                wanted = vocabulary.eol
            elif offset == height * (width + 1) + 1:
                wanted = vocabulary.eof
            elif offset == height * (width + 1) + 2:
                wanted = vocabulary.eoi
            else:
                wanted = vocabulary.vision_start
            assert found == wanted


@pytest.mark.parametrize("until", [2, 3])
def test_a_clip_that_is_begun_goes_on_in_its_next_frame(until: int) -> None:
    vocabulary = Vocabulary.bytes(64)
    codes = np.random.default_rng(0).integers(0, 64, (3, 2, 4))
    whole = BlockGrammar(vocabulary, 2, 4, 3, 7.5)
    rest = BlockGrammar(vocabulary, 2, 4, 3, 7.5, codes[:1], until)
    walk, ids = rest.start(), []
    for code in codes[1:until].reshape(-1).tolist():
        ids += [code + vocabulary.vision_start, *walk.take(None).given]
    assert walk.allowed is None and len(ids) == rest.most
    written = [*rest.opening, *ids]
    assert written == whole.ids(codes)[: len(written)].tolist()
    assert np.array_equal(rest.codes(ids), codes[1:until])
