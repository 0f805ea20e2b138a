"""The decoding schedule against the documents that the serializer writes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unimodal.model.grammar import BlockGrammar, TextGrammar
from unimodal.tokenize.document import Image, Video, serialize
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
    grammar = TextGrammar(vocabulary)
    assert grammar.allowed.tolist() == [*range(256), vocabulary.eos]
    assert int(grammar.allowed[grammar.eos]) == vocabulary.eos
