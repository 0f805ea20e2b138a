"""What is seen while sequences are written: pictures row by row, words, speed, at little cost."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from unimodal.cli import live
from unimodal.cli.live import Meter, Painter, Partial, Show, Watched, half_blocks, partial
from unimodal.cli.outputs import PARTIAL
from unimodal.model.choice import Choice
from unimodal.model.generate import Draft, Drawing
from unimodal.model.grammar import BlockGrammar, DocumentGrammar, text_grammar
from unimodal.tokenize.vocabulary import Vocabulary

VOCABULARY = Vocabulary.bytes(64)


def _draft(grammar: Any, key: tuple[int, ...] = (0, 0)) -> Draft:
    return Draft(((VOCABULARY.bos, *grammar.opening),), grammar, key=key)


def _behind(grammar: BlockGrammar, codes: np.ndarray) -> list[int]:
    """Ids behind the opening of a block of these codes."""
    return grammar.ids(codes).tolist()[len(grammar.opening) :]


class Clock:
    """Seconds that pass when told to."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


class Fake:
    """The parts of a sampler that a preview uses; decoding takes `cost` seconds."""

    vocabulary = VOCABULARY

    def __init__(self, clock: Clock | None = None, cost: float = 0.0) -> None:
        self.clock, self.cost = clock, cost
        self.tokenizer = self.canvas = self
        self.decoded: list[np.ndarray] = []

    def encode(self, pixels: Any) -> Any:
        import torch

        assert not pixels.any()  # grey
        return torch.full((1, 1, 8, 8), 7)

    def pixels(self, codes: Sequence[np.ndarray], image: bool) -> list[np.ndarray]:
        if self.clock:
            self.clock.now += self.cost
        self.decoded += codes
        shown = [one[0].repeat(8, 0).repeat(8, 1)[None, ..., None] for one in codes]
        return [np.broadcast_to(one, (*one.shape[:3], 3)).astype(np.uint8) for one in shown]


def test_rows_of_a_picture_are_told_from_its_ids() -> None:
    grammar = BlockGrammar(VOCABULARY, 3, 4)
    codes = np.arange(12).reshape(3, 4)
    ids = _behind(grammar, codes)
    draft = _draft(grammar)
    assert partial([], draft, VOCABULARY) is None
    part = partial(ids[:7], draft, VOCABULARY)  # a row, its EOL, two codes
    assert part is not None and (part.drawn, part.frame) == (6, None)
    assert part.codes.tolist() == [[0, 1, 2, 3], [4, 5, -1, -1], [-1] * 4]
    part = partial(ids, draft, VOCABULARY)
    assert part is not None and part.drawn == 12 and np.array_equal(part.codes, codes)


def test_a_frame_of_a_clip_stands_on_the_frame_before_also_on_a_given_one() -> None:
    codes = np.arange(18).reshape(3, 2, 3)
    grammar = BlockGrammar(VOCABULARY, 2, 3, 3, 6.0)
    ids = _behind(grammar, codes)
    part = partial(ids[: 2 * 4 + 1 + 3], _draft(grammar), VOCABULARY)
    assert part is not None and (part.frame, part.drawn) == (1, 3)
    assert part.codes.tolist() == [[6, 7, 8], [3, 4, 5]]
    goes_on = BlockGrammar(VOCABULARY, 2, 3, 3, 6.0, codes[:2])
    part = partial([VOCABULARY.vision_start + 12], _draft(goes_on), VOCABULARY)
    assert part is not None and (part.frame, part.drawn) == (2, 1)
    assert part.codes.tolist() == [[12, 7, 8], [9, 10, 11]]


def test_a_picture_of_the_models_own_size_is_seen_once_its_size_is_written() -> None:
    text = VOCABULARY.text.encode
    free = _draft(DocumentGrammar(VOCABULARY, 100, picture=True))
    code = VOCABULARY.vision_start
    assert partial(text("2*3"), free, VOCABULARY) is None
    ids = [*text("2*3"), VOCABULARY.img, code + 5, code + 6]
    part = partial(ids, free, VOCABULARY)
    assert part is not None and part.codes.tolist() == [[5, 6, -1], [-1, -1, -1]]
    story = _draft(DocumentGrammar(VOCABULARY, 200, images=2))
    first = BlockGrammar(VOCABULARY, 1, 2).ids(np.array([[1, 2]])).tolist()
    assert partial(text("once"), story, VOCABULARY) is None
    ids = [*text("once"), *first, *text("then"), VOCABULARY.boi, *ids]
    part = partial(ids, story, VOCABULARY)
    assert part is not None and part.codes.tolist() == [[5, 6, -1], [-1, -1, -1]]


def test_what_is_not_drawn_is_grey_and_dim() -> None:
    sampler = Fake()
    part = Partial(np.array([[60, 61, -1], *[[-1, -1, -1]] * 3]), 2)
    (picture,) = Painter(sampler)([part])  # type: ignore[arg-type]
    assert sampler.decoded[0].tolist() == [[[60, 61, 7], [7, 7, 7]]]  # no row that tells nothing
    assert picture.shape == (32, 24, 3)
    assert (picture[:8, :8] == 60).all() and (picture[:8, 8:16] == 61).all()
    assert (picture[8:16] == int(7 * live.DIM)).all()
    assert (picture[16:] == int(live.GREY * live.DIM)).all()


@pytest.mark.parametrize(
    ("size", "room", "wanted"),
    [((64, 64), (100, 20), (40, 20)), ((64, 64), (30, 40), (30, 15)), ((8, 8), (40, 40), (40, 20))],
)
def test_a_picture_fits_the_terminal_with_square_pixels(
    size: tuple[int, int], room: tuple[int, int], wanted: tuple[int, int]
) -> None:
    picture = np.zeros((*size, 3), np.uint8)
    picture[: size[0] // 2] = (255, 0, 0)
    text = half_blocks(picture, *room)
    lines = text.plain.split("\n")
    assert (len(lines[0]), len(lines)) == wanted and set(text.plain) == {"▀", "\n"}
    top, bottom = text.spans[0].style, text.spans[-1].style
    assert top.color.triplet == (255, 0, 0) and bottom.bgcolor.triplet == (0, 0, 0)


def test_speed_and_time_left_count_what_is_to_come() -> None:
    clock = Clock()
    meter = Meter(4, clock)
    assert meter.left is None
    meter.begin([100, 100])
    clock.now += 2
    meter.tokens += 50
    assert (meter.rate, meter.total, meter.left) == (25, 400, 14)
    meter.skip()  # one was there already
    assert meter.total == 300 and str(meter) == "0 of 3 done, 25 tokens/s, 0:00:10 left"


def _show(clock: Clock, tmp_path: Path | None, **more: Any) -> Show:
    return Show(1, folder=tmp_path, clock=clock, **more)


def test_previews_cost_a_tenth_of_the_time(tmp_path: Path) -> None:
    clock = Clock()
    sampler = Fake(clock, cost=0.3)
    grammar = BlockGrammar(VOCABULARY, 50, 4)
    ids = _behind(grammar, np.zeros((50, 4), np.int64))
    with _show(clock, tmp_path, stream=True, quiet=True) as show:
        show.begin(sampler, [_draft(grammar)], ["a"])  # type: ignore[arg-type]
        for row in range(1, 50):
            clock.now += 0.5
            show({0: ids[: 5 * row]}, 4)
            if row > 5:
                assert show.spent <= live.SHARE * show.meter.elapsed
        assert len(sampler.decoded) in (8, 9)  # of 49 rows in 27 seconds
        assert [path.name for path in tmp_path.iterdir()] == [f"a{PARTIAL}"]
        assert Image.open(tmp_path / f"a{PARTIAL}").size == (32, 400)
    assert not list(tmp_path.iterdir())


def test_a_growing_picture_is_gone_when_the_whole_is_there_or_all_ends(tmp_path: Path) -> None:
    clock = Clock()
    grammar = BlockGrammar(VOCABULARY, 2, 2)
    ids = _behind(grammar, np.zeros((2, 2), np.int64))
    with pytest.raises(KeyboardInterrupt), _show(clock, tmp_path, stream=True, quiet=True) as show:
        show.begin(Fake(), [_draft(grammar)] * 2, ["a", "b"])  # type: ignore[arg-type]
        clock.now += 1
        show({0: ids[:3], 1: ids[:3]}, 2)
        assert len(list(tmp_path.iterdir())) == 2
        show.finished("a")
        assert [path.name for path in tmp_path.iterdir()] == [f"b{PARTIAL}"]
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_without_a_terminal_it_says_where_to_look(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock()
    grammar = BlockGrammar(VOCABULARY, 20, 40)
    with _show(clock, tmp_path, stream=True) as show:
        show.begin(Fake(), [_draft(grammar)], ["a"])  # type: ignore[arg-type]
        for _ in range(70):
            clock.now += 1
            show({}, 10)
        show.finished("a")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == (
        f"stderr is no terminal: pictures do not grow here; open {tmp_path}/*.partial.png to watch"
    )
    assert lines[1:3] == [
        "sample: 0 of 1 done, 10 tokens/s, 0:00:49 left",
        "sample: 0 of 1 done, 10 tokens/s, 0:00:19 left",
    ]
    assert lines[-1] == "sample: 1 done, 700 tokens in 70.0 s (10 tokens/s)"


def test_words_come_as_they_are_written_and_no_half_characters() -> None:
    heard = io.StringIO()
    show = Show(1, quiet=True, stream=True, words=heard)
    show.begin(Fake(), [_draft(text_grammar(VOCABULARY, 9))], ["a"])  # type: ignore[arg-type]
    ids = VOCABULARY.text.encode("añ!")
    said = []
    for count in range(1, len(ids) + 1):
        show({0: ids[:count]}, 1)
        said.append(heard.getvalue())
    show({0: [*ids, VOCABULARY.eos]}, 1)
    assert said == ["a", "a", "añ", "añ!"] and heard.getvalue() == "añ!"


def test_noise_is_keyed_by_the_whole_run_and_not_by_the_call() -> None:
    seen: list[Draft] = []

    class Backend:
        def generate(self, drafts: Sequence[Draft], drawing: Drawing, watch: Any) -> Any:
            seen.extend(drafts)
            watch({0: [1]}, 5)
            return [[1] for _ in drafts]

    told: list[tuple[Mapping[int, list[int]], int]] = []
    show = Show(2, quiet=True)
    sampler: Any = Fake()
    watched = Watched(Backend(), sampler, show, [(9, 40, 0), (8, 41, 2)], ["a", "b"])
    grammar = BlockGrammar(VOCABULARY, 2, 2)
    drafts = [_draft(grammar, (0, 0, 5)), _draft(grammar, (1, 0, 5))]
    drawing = Drawing(Choice(), Choice())
    assert watched.generate(drafts, drawing, lambda *call: told.append(call)) == [[1], [1]]
    assert [(draft.seed, draft.key) for draft in seen] == [(9, (40, 0, 5)), (8, (41, 2, 5))]
    assert told == [({0: [1]}, 5)] and show.meter.tokens == 5


def test_what_is_told_does_not_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    show = Show(1)
    show.note("a \x1b[2J")
    show.tell("b \x07")
    assert capsys.readouterr().err == "a \\x1b[2J\nb \\x07\n"
