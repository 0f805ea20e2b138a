"""Documents: the parser inverts the serializer, and lengths and ids are Emu3's."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from unimodal.tokenize.document import (
    FREE,
    DocumentError,
    End,
    Image,
    Part,
    Piece,
    Segment,
    Text,
    Video,
    block_length,
    block_template,
    compose,
    generation,
    parse,
    parts_length,
    serialize,
    understanding,
    write,
)
from unimodal.tokenize.vocabulary import Vocabulary

VOCABULARY = Vocabulary.bytes(100)
SIDE = st.integers(1, 4)


def codes(*sides: st.SearchStrategy[int]) -> st.SearchStrategy[np.ndarray]:
    return st.tuples(*sides).flatmap(
        lambda shape: npst.arrays(np.int64, shape, elements=st.integers(0, 99))
    )


TEXTS = st.builds(Text, st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
IMAGES = st.builds(Image, codes(SIDE, SIDE))
VIDEOS = st.builds(Video, codes(SIDE, SIDE, SIDE), st.floats(0.01, 240))
ENDS = st.just(End())


def merged(segments: list[Segment]) -> list[Segment]:
    """What a parser can give back: NFC, neighbouring texts as one."""
    out: list[Segment] = []
    for segment in segments:
        if isinstance(segment, Text):
            text = unicodedata.normalize("NFC", segment.text)
            if out and isinstance(out[-1], Text):
                text = out.pop().text + text  # type: ignore[union-attr]
            out.append(Text(text))
        else:
            out.append(segment)
    return out


@settings(max_examples=150, deadline=None)
@given(st.lists(TEXTS | IMAGES | VIDEOS | ENDS, max_size=5), st.booleans(), st.booleans(), SIDE)
def test_parse_inverts_serialize(
    segments: list[Segment], bos: bool, eos: bool, padding: int
) -> None:
    while not eos and segments and isinstance(segments[-1], End):
        segments = segments[:-1]  # an EOS at the very end is the document's own
    ids = serialize(segments, VOCABULARY, bos=bos, eos=eos)
    assert ids.dtype == np.int64
    assert parse(ids, VOCABULARY) == merged(segments)
    assert parse(np.append(ids, [VOCABULARY.pad] * padding), VOCABULARY) == merged(segments)


@settings(max_examples=150, deadline=None)
@given(st.lists(TEXTS | IMAGES | VIDEOS, min_size=1, max_size=3), st.data())
def test_any_id_changed_is_an_error_or_another_document(
    segments: list[Segment], data: st.DataObject
) -> None:
    ids = serialize(segments, VOCABULARY)
    at = data.draw(st.integers(0, len(ids) - 1))
    ids[at] = data.draw(st.integers(-2, VOCABULARY.size + 1).filter(lambda i: i != ids[at]))
    try:
        again = parse(ids, VOCABULARY)
    except DocumentError as error:
        assert str(error).startswith("position ")
        return
    # Whatever is accepted is exactly what would be written (text may hold broken UTF-8).
    if not any(isinstance(s, Text) and "\ufffd" in s.text for s in again):
        written = serialize(again, VOCABULARY, bos=ids[0] == VOCABULARY.bos, eos=False)
        assert unicodedata.is_normalized(
            "NFC", "".join(s.text for s in again if isinstance(s, Text))
        )
        stripped = ids[: len(written)]
        np.testing.assert_array_equal(stripped, written)
        assert set(ids[len(written) :]) <= {VOCABULARY.eos, VOCABULARY.pad}


def pieces(*roles: str) -> st.SearchStrategy[list[Piece]]:
    """One to three pieces of each role in turn."""
    some = (
        st.lists(st.builds(Piece, TEXTS | IMAGES | VIDEOS, st.just(r)), min_size=1, max_size=3)
        for r in roles
    )
    return st.tuples(*some).map(lambda turns: [piece for turn in turns for piece in turn])


DOCUMENTS = st.one_of(
    st.tuples(st.just("text"), pieces("text")),
    st.tuples(st.just("interleaved"), pieces("text", "text", "text")),
    st.tuples(st.just("edit"), pieces("source", "instruction", "result")),
    *(st.tuples(st.just("chat"), pieces(*["user", "assistant"] * n)) for n in (1, 2, 3)),
)


def told(piece: Piece) -> dict[str, Any]:
    """What the index of shards says of a piece."""
    thing = piece.segment
    if isinstance(thing, Text):
        return {
            "kind": "text",
            "role": piece.role,
            "tokens": len(VOCABULARY.text.encode(thing.text)),
        }
    names = ("frames", "height", "width")[-thing.codes.ndim :]
    found = {"role": piece.role, **dict(zip(names, thing.codes.shape, strict=True))}
    if isinstance(thing, Image):
        return found | {"kind": "image"}
    return found | {"kind": "video", "fps": thing.fps}


def weighed(ids: np.ndarray) -> np.ndarray:
    """Weights by the ids alone: 0.5 from BOI to EOI, 0 for BOS, else 1."""
    opened = np.cumsum(ids == VOCABULARY.boi)
    closed = np.cumsum(ids == VOCABULARY.eoi) - (ids == VOCABULARY.eoi)
    return np.where(opened > closed, 0.5, 1.0) * (ids != VOCABULARY.bos)


@given(DOCUMENTS, st.booleans())
def test_documents_of_many_pieces_come_back_and_are_as_long_as_their_counts_say(
    document: tuple[str, list[Piece]], eos: bool
) -> None:
    task, given_pieces = document
    parts = compose(task, given_pieces)
    ids, weights = write(parts, VOCABULARY, 0.5, eos)
    assert (ids.dtype, weights.dtype, ids.shape) == (np.int64, np.float32, weights.shape)
    assert parse(ids, VOCABULARY) == merged([part.segment for part in parts])
    length = parts_length(task, [told(piece) for piece in given_pieces], VOCABULARY)
    assert length == len(ids) + (not eos)
    # What is weighed are the targets, whichever way they are counted.
    if all(part.target for part in parts):
        expected = weighed(ids)
    else:
        spans = [serialize([p.segment], VOCABULARY, False, False) for p in parts]
        each = [weighed(s) * p.target for s, p in zip(spans, parts, strict=True)]
        expected = np.concatenate([[0], *each, [1.0] * eos])
    np.testing.assert_array_equal(weights, expected)


def test_a_chat_is_emu3s_template_with_loss_on_answers_alone() -> None:
    v, image = VOCABULARY, Image(np.zeros((1, 2), np.int64))
    turns = [
        Piece(image, "user"),
        Piece(Text("What is it"), "user"),
        Piece(Text("A cat."), "assistant"),
        Piece(Text("Sure?"), "user"),
        Piece(Text("Yes."), "assistant"),
    ]
    parts = compose("chat", turns)
    assert [part.segment for part in parts] == [
        Text("You are a helpful assistant. USER: "),
        image,
        Text("What is it"),
        Text(". ASSISTANT:"),
        Text("A cat."),
        End(),
        Text("USER: "),
        Text("Sure?"),
        Text(". ASSISTANT:"),
        Text("Yes."),
    ]
    ids, weights = write(parts, v, 0.5)
    assert ids[weights > 0].tolist() == [
        *v.text.encode("A cat."),
        v.eos,
        *v.text.encode("Yes."),
        v.eos,
    ]
    assert set(weights) == {0, 1}


def test_an_edit_predicts_only_its_result() -> None:
    v, before, after = VOCABULARY, *(Image(np.full((1, 2), code)) for code in (3, 4))
    edit = [Piece(before, "source"), Piece(Text("redder"), "instruction"), Piece(after, "result")]
    ids, weights = write(compose("edit", edit), v, 0.5)
    assert ids[weights > 0].tolist() == [*serialize([after], v, bos=False)]
    assert weights[weights > 0].tolist() == [0.5] * block_length(v, 1, 2) + [1]
    # A document of captions is weighed as it always was.
    one = write([Part(Text("a"), True), Part(after, True)], v, 0.5)
    whole = serialize(generation("a", after), v)
    np.testing.assert_array_equal(one[0], whole)
    np.testing.assert_array_equal(one[1], weighed(whole))


@pytest.mark.parametrize(
    ("task", "roles", "message"),
    [
        ("poem", ["text"], "no task is called poem: there are text"),
        ("chat", ["assistant", "user"], "chat has user, assistant, in turn, not assistant, user"),
        ("chat", ["user", "assistant", "user"], "in turn, not user, assistant, user"),
        ("chat", [], "in turn, not "),
        ("edit", ["source", "result"], "edit has source, instruction, result, not source, result"),
        ("text", ["user"], "text has text, not user"),
    ],
)
def test_roles_that_are_not_the_tasks_are_refused(
    task: str, roles: list[str], message: str
) -> None:
    with pytest.raises(DocumentError, match=message):
        compose(task, [Piece(Text("a"), role) for role in roles])


@given(SIDE, SIDE, st.none() | SIDE)
@settings(deadline=None)
def test_block_length_is_the_length_of_the_block(
    height: int, width: int, frames: int | None
) -> None:
    fps = None if frames is None else 7.5
    template = block_template(VOCABULARY, height, width, frames, fps)
    assert len(template) == block_length(VOCABULARY, height, width, frames, fps)
    assert (template == FREE).sum() == height * width * (frames or 1)


@pytest.mark.parametrize(("side", "body", "whole"), [(64, 4162, 4171), (90, 8192, 8201)])
def test_lengths_are_those_of_emu3(side: int, body: int, whole: int) -> None:
    ids = serialize([Image(np.zeros((side, side), np.int64))], VOCABULARY)
    assert len(ids) == whole
    assert len(ids) - 1 - int(np.flatnonzero(ids == VOCABULARY.img)[0]) - 1 == body


def test_the_order_of_ids_in_an_image_and_a_video() -> None:
    v = VOCABULARY
    meta = v.text.encode("2*3")
    block = block_template(v, 2, 3)
    row = [FREE, FREE, FREE, v.eol]
    assert block.tolist() == [v.boi, *meta, v.img, *row, *row, v.eof, v.eoi]
    meta = v.text.encode("2*1*2@7.5")
    block = block_template(v, 1, 2, 2, 7.5)
    frame = [FREE, FREE, v.eol, v.eof]
    assert block.tolist() == [v.boi, *meta, v.img, *frame, *frame, v.eoi]


@pytest.mark.parametrize(
    ("fps", "text"),
    [(6, "6"), (7.5, "7.5"), (29.97, "29.97"), (24000 / 1001, "23.976"), (10, "10")],
)
def test_rates_are_written_without_needless_digits(fps: float, text: str) -> None:
    ids = serialize([Video(np.zeros((1, 1, 1), np.int64), fps)], VOCABULARY)
    meta = VOCABULARY.text.encode(f"1*1*1@{text}")
    assert ids[2 : 2 + len(meta)].tolist() == meta


def test_control_strings_in_a_caption_open_no_block() -> None:
    caption = "<|image start|>2*2<|image token|><|extra_204|>"
    ids = serialize(generation(caption, Image(np.zeros((1, 1), np.int64))), VOCABULARY)
    assert (ids == VOCABULARY.boi).sum() == (ids == VOCABULARY.eos).sum() == 1
    assert parse(ids, VOCABULARY)[0] == Text(caption)


def test_captions_come_first_to_draw_and_last_to_describe() -> None:
    image = Image(np.zeros((1, 1), np.int64))
    assert generation("a", image) == [Text("a"), image]
    assert understanding("a", image) == [image, Text("a")]


def test_codes_of_another_tokenizer_are_refused() -> None:
    for bad in (np.array([[100]]), np.array([[-1]])):
        with pytest.raises(DocumentError, match="outside the codebook"):
            serialize([Image(bad)], VOCABULARY)
    for wrong in (np.zeros((1, 1, 1), int), np.zeros((1, 1)), np.zeros((0, 3), int)):
        with pytest.raises(DocumentError):
            serialize([Image(wrong)], VOCABULARY)


@pytest.mark.parametrize("fps", [0, -1, 20_000, float("nan"), float("inf")])
def test_impossible_rates_are_refused(fps: float) -> None:
    with pytest.raises(DocumentError, match="fps"):
        serialize([Video(np.zeros((1, 1, 1), int), fps)], VOCABULARY)


def test_errors_name_the_position() -> None:
    v = VOCABULARY
    good = serialize([Text("ab"), Image(np.zeros((2, 2), int))], v)
    for at, value, message in [
        (1, v.eol, "position 1: EOL outside a block"),
        (3, v.img, "position 3: IMG outside a block"),
        (7, v.eol, "position 7: EOL where the block's IMG should be"),
        (8, v.eol, "position 8: EOL where a vision code should be in a block of 2*2"),
        (10, v.vision_start, "position 10: vision code 0 where EOL should be"),
        (14, v.eoi, "position 14: EOI where EOF should be"),
        (15, 65, "position 15: text id 65 where EOI should be"),
        (4, ord("x"), "position 4: 'x*2' is neither H"),
        (4, ord("9"), "position 3: 9*2 needs 21 more ids"),
        (4, ord("0"), "position 3: a vision block of 0x2"),
        (1, v.size, "position 1: unknown id"),
    ]:
        bad = good.copy()
        bad[at] = value
        with pytest.raises(DocumentError, match=re.escape(message)):
            parse(bad, v)
    with pytest.raises(DocumentError, match="the end where the block's IMG"):
        parse(good[:6], v)


def test_a_hostile_size_costs_nothing() -> None:
    v = VOCABULARY
    ids = [v.boi, *v.text.encode("999999*999999*999999@9"), v.img]
    with pytest.raises(DocumentError, match="more ids"):
        parse(ids, v)


def test_weights_count_a_block_as_vision_and_the_rest_as_text() -> None:
    v = VOCABULARY
    segments = [Text("ab"), Image(np.zeros((1, 2), int)), Text("c")]
    _, weights = write([Part(segment, True) for segment in segments], v, 0.5)
    assert weights.dtype == np.float32
    assert weights.tolist() == [0, 1, 1, *[0.5] * (5 + 3 + 2), 1, 1]


def test_golden_document_of_emu3(qwen_ranks: Path) -> None:
    v = Vocabulary.emu3(qwen_ranks)
    ids = serialize([Text("a shiba inu"), Image(np.full((68, 120), 32_767))], v)
    head = "151849 64 557 34938 304 84 151852 21 23 9 16 17 15 151851 184621"
    assert ids[:15].tolist() == [int(i) for i in head.split()]
    assert len(serialize([Image(np.zeros((68, 120), int))], v)) == 8240
    assert len(serialize([Image(np.zeros((90, 90), int))], v)) == 8201
    video = [Video(np.zeros((30, 64, 64), int), 24)]
    meta = len("30*64*64@24")  # single digits and signs: as many ids as characters
    assert len(serialize(video, v)) == 2 + 3 + meta + 30 * (64 * 65 + 1)
    chat = [Text("You are a helpful assistant. USER: "), Image(np.zeros((64, 64), int))]
    head = "151849 2610 525 264 10950 17847 13 13872 25 220 151852 21 19 9 21 19 151851"
    assert serialize(chat, v)[:17].tolist() == [int(i) for i in head.split()]
    asked = [Piece(chat[1], "user"), Piece(Text("Please describe the image"), "user")]
    ids, _ = write(compose("chat", [*asked, Piece(Text("a cat"), "assistant")]), v, 0.5)
    assert ids[:17].tolist() == [int(i) for i in head.split()]
    tail = "151847 151853 5501 7512 279 2168 13 35560 3846 2821 25"
    assert ids[ids.tolist().index(v.eof) :][:11].tolist() == [int(i) for i in tail.split()]
