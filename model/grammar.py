"""What may come next: the documents of `unimodal.tokenize.document`, read forward.

A grammar says which ids of a sequence are chosen and which are given. A choice is out of a few
ranges of ids, so a mask costs nothing to find: only those rows of the head are computed. What has
no choice is given: EOL, EOF and EOI always, BOI, meta and IMG where the size is known.

    grammar = BlockGrammar(vocabulary, 64, 64)
    walk = grammar.start()                   # behind [..., *grammar.opening]
    while walk.allowed is not None:
        given = walk.take(some id of walk.allowed.ids).given

Emu3's own constraint (github.com/baaivision/Emu3) finds its place by the first IMG and the
remainder of a division, which goes wrong for a second picture and for grids of one or two columns;
here each block carries its own schedule.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from unimodal.tokenize.document import FREE, block_length, block_template, meta_text
from unimodal.tokenize.vocabulary import Vocabulary

SIDES = range(1, 129)
"""Sides in codes that a model may give a picture of its own choice; Emu3.5 allows 10 to 99."""


@dataclass(frozen=True)
class Allowed:
    """The ids that may come next. Equal sets compare equal, whoever made them."""

    kind: str
    """vision, text or size: which settings choose among them, and whether guidance applies."""
    ranges: tuple[tuple[int, int], ...]
    """First id and the one behind the last, of each run of ids."""

    def __len__(self) -> int:
        return sum(stop - start for start, stop in self.ranges)

    @cached_property
    def ids(self) -> Tensor:
        """int64 [K]: the ids in order of the columns of their logits."""
        return torch.cat([torch.arange(start, stop) for start, stop in self.ranges])

    def rows(self, matrix: Tensor) -> Tensor:
        """[V, ...] -> [K, ...]: a view where the ids are one run."""
        parts = [matrix[start:stop] for start, stop in self.ranges]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


@dataclass(frozen=True)
class Taken:
    """What a choice leads to."""

    given: Sequence[int] = ()
    """Ids that follow without a choice."""
    shared: bool = True
    """Whether the chosen id and the given ones go to the rows of guidance too: blocks do, from
    BOI to EOI, and text does not, so that those rows see pictures and no words of the reply (as
    in Emu3.5, arXiv 2510.26583)."""


class Walk(Protocol):
    """Where one sequence stands."""

    @property
    def allowed(self) -> Allowed | None:
        """Out of what the next id is chosen; None where the sequence has ended."""

    @property
    def blind(self) -> bool:
        """Whether `take` goes on alike whatever was chosen, as inside a block."""

    def take(self, token: int | None) -> Taken:
        """Go on behind a chosen id; None will do where `blind`."""


class Grammar(Protocol):
    """A kind of continuation."""

    @property
    def opening(self) -> Sequence[int]:
        """Ids that a context ends with."""

    @property
    def most(self) -> int:
        """The most ids that come behind a context."""

    def start(self) -> Walk:
        """A walk from behind the context."""


def vision_ids(vocabulary: Vocabulary) -> Allowed:
    """Every code."""
    start = vocabulary.vision_start
    return Allowed("vision", ((start, start + vocabulary.codebook_size),))


def text_ids(vocabulary: Vocabulary, picture: bool = False) -> Allowed:
    """Text, then EOS, then BOI if a `picture` may begin."""
    ends = (vocabulary.eos, vocabulary.boi) if picture else (vocabulary.eos,)
    return Allowed("text", ((0, vocabulary.text.size), *((end, end + 1) for end in ends)))


class BlockGrammar:
    """One vision block of a known size, or what is left of it."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        height: int,
        width: int,
        frames: int | None = None,
        fps: float | None = None,
        begun: np.ndarray | None = None,
        until: int | None = None,
    ) -> None:
        """Sizes in codes, as for `block_template`. `begun` [t, H, W] are codes of the first t
        latent frames that the context holds already; `until` ends the walk behind so many latent
        frames, the block being unfinished.
        """
        self.template = block_template(vocabulary, height, width, frames, fps)
        self.shape = (height, width) if frames is None else (frames, height, width)
        start = vocabulary.vision_start
        self.vision = slice(start, start + vocabulary.codebook_size)
        """The ids that a free position may take: the rows of the head that are computed."""
        self.allowed = vision_ids(vocabulary)
        free = np.flatnonzero(self.template == FREE)
        done = 0 if begun is None else begun.size
        last = len(free) if until is None else until * height * width
        opening = self.template[: free[done]].copy()
        if begun is not None:
            opening[opening == FREE] = begun.reshape(-1).astype(np.int64) + start
        self.opening: list[int] = opening.tolist()
        """BOI, meta and IMG, and what is begun."""
        ends = [*free[1:].tolist(), len(self.template)]
        self.behind: list[list[int]] = [
            self.template[a + 1 : b].tolist()
            for a, b in zip(free[done:last], ends[done:last], strict=True)
        ]
        """For each free position the given ids between it and the next, often none; behind the
        last one EOL, EOF and EOI."""

    def __len__(self) -> int:
        """Number of free positions."""
        return len(self.behind)

    @property
    def most(self) -> int:
        """Number of ids behind the opening."""
        return len(self) + sum(map(len, self.behind))

    def start(self) -> BlockWalk:
        """A walk from behind the opening."""
        return BlockWalk(self)

    def ids(self, codes: np.ndarray) -> np.ndarray:
        """The whole block with these codes, int64."""
        block = self.template.copy()
        block[block == FREE] = np.asarray(codes, np.int64).reshape(-1) + self.vision.start
        return block

    def codes(self, ids: Sequence[int]) -> np.ndarray:
        """Codes int64 [..., H, W] among ids that were written behind the opening: all of them for
        a picture, whole latent frames of a clip."""
        found = np.asarray(ids, np.int64)
        found = found[(found >= self.vision.start) & (found < self.vision.stop)]
        shape = self.shape if len(self.shape) == 2 else (-1, *self.shape[1:])
        return (found - self.vision.start).reshape(shape)


@dataclass
class BlockWalk:
    """A place in a block."""

    grammar: BlockGrammar
    place: int = 0
    """Free positions that are filled."""
    blind: bool = field(default=True, init=False)

    @property
    def allowed(self) -> Allowed | None:
        return self.grammar.allowed if self.place < len(self.grammar) else None

    def take(self, token: int | None) -> Taken:
        self.place += 1
        return Taken(self.grammar.behind[self.place - 1])


@dataclass
class Size:
    """Metas that begin alike: a node of the tree of all that a model may write."""

    sides: tuple[int, int] | None = None
    """Of the meta that ends here: height and width in codes."""
    next: dict[int, Size] = field(default_factory=dict)
    """By the next id."""
    least: int = 1 << 60
    """Length in ids of the shortest block below."""


@lru_cache(maxsize=4)
def size_tree(vocabulary: Vocabulary) -> Size:
    """Every `H*W` with both sides in `SIDES`, as this vocabulary writes it.

    A tree of whole encodings serves any text tokenizer: Qwen's writes a digit an id, others may
    write `64` as one.
    """
    root = Size()
    for height in SIDES:
        for width in SIDES:
            node = root
            ids = vocabulary.text.encode(meta_text(height, width))
            length = len(ids) + 3 + height * (width + 1) + 1
            node.least = min(node.least, length)
            for one in ids:
                node = node.next.setdefault(one, Size())
                node.least = min(node.least, length)
            node.sides = height, width
    return root


@dataclass(frozen=True)
class DocumentGrammar:
    """Text up to EOS, with pictures in between; or one picture whose size the model writes."""

    vocabulary: Vocabulary
    room: int
    """Ids that may be written at most: what the context has left."""
    tokens: int | None = None
    """The most text ids; None: as `room` has."""
    images: int = 0
    """The most pictures."""
    size: tuple[int, int] | None = None
    """Height and width of every picture in codes; None: as the model writes them."""
    picture: bool = False
    """The context ends with BOI: the model writes the size and draws, and that is all."""

    @property
    def opening(self) -> list[int]:
        """BOI of a lone picture."""
        return [self.vocabulary.boi] if self.picture else []

    @property
    def most(self) -> int:
        """The most ids behind the context."""
        if self.images or self.picture or self.tokens is None:
            return self.room
        return min(self.room, self.tokens)

    def start(self) -> DocumentWalk:
        """A walk from behind the context."""
        return DocumentWalk(self)


class DocumentWalk:
    """A place in a document."""

    def __init__(self, grammar: DocumentGrammar) -> None:
        self.grammar = grammar
        self.room = grammar.room
        self.tokens = grammar.room if grammar.tokens is None else grammar.tokens
        self.images = grammar.images
        self.node: Size | None = None
        self.block: BlockWalk | None = None
        self.allowed: Allowed | None = None
        if grammar.picture:
            # BOI stands already; what is left of the block has one id less.
            self._enter(size_tree(grammar.vocabulary), 1, skip=False)
        else:
            self._write()

    @property
    def blind(self) -> bool:
        return self.block is not None

    def take(self, token: int | None) -> Taken:
        self.room -= 1
        if self.block is not None:
            given = self.block.take(token).given
            self.room -= len(given)
            self.allowed = self.block.allowed
            if self.allowed is None:
                self.block = None
                if not self.grammar.picture:
                    self._write()
            return Taken(given)
        if token is None:
            raise ValueError("a document goes on by what was chosen")
        if self.node is not None:
            given = self._sized(token)
        elif token == self.grammar.vocabulary.boi:
            given = self._picture()
        elif token == self.grammar.vocabulary.eos:
            self.allowed = None
            return Taken(shared=False)
        else:
            self.tokens -= 1
            self._write()
            return Taken(shared=False)
        self.room -= len(given)
        return Taken(given)

    def _write(self) -> None:
        """In text."""
        vocabulary, size = self.grammar.vocabulary, self.grammar.size
        if self.room < 1 or self.tokens < 1:
            self.allowed = None
            return
        picture = self.images > 0
        if picture:
            least = block_length(vocabulary, *size) if size else size_tree(vocabulary).least
            picture = least <= self.room
        self.allowed = text_ids(vocabulary, picture)

    def _picture(self) -> list[int]:
        """Behind BOI."""
        self.images -= 1
        if self.grammar.size is None:
            return self._enter(size_tree(self.grammar.vocabulary), 1)
        return self._open(self.grammar.size)[1:]

    def _sized(self, token: int) -> list[int]:
        """Behind an id of a size, or the IMG that ends it."""
        node = self.node
        assert node is not None
        if token == self.grammar.vocabulary.img:
            assert node.sides is not None
            self._open(node.sides)
            return []
        spent = self.spent + 1
        return self._enter(node.next[token], spent)

    def _enter(self, node: Size, spent: int, skip: bool = True) -> list[int]:
        """At a node, `spent` ids of the block being written, or past what has no choice."""
        # The ids of this block that are written were taken off `room`, but for those given here.
        room = self.room + spent
        given: list[int] = []
        while True:
            fits = [i for i, below in node.next.items() if below.least <= room]
            ends = node.sides is not None and self._length(node) <= room
            if ends and not fits:
                assert node.sides is not None
                self.node = node
                self._open(node.sides)
                return [*given, self.grammar.vocabulary.img]
            if len(fits) != 1 or ends or not skip:
                break
            given.append(fits[0])
            node, spent = node.next[fits[0]], spent + 1
        self.node, self.spent = node, spent
        ids = [*sorted(fits), *([self.grammar.vocabulary.img] if ends else [])]
        self.allowed = Allowed("size", tuple(_runs(ids))) if ids else None
        return given

    def _length(self, node: Size) -> int:
        assert node.sides is not None
        return block_length(self.grammar.vocabulary, *node.sides)

    def _open(self, size: tuple[int, int]) -> list[int]:
        """Behind IMG of a block; its opening."""
        grammar = BlockGrammar(self.grammar.vocabulary, *size)
        self.node, self.block = None, grammar.start()
        self.allowed = self.block.allowed
        return grammar.opening


def _runs(ids: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Runs of neighbours in `ids`, in the order they stand."""
    start = 0
    for place in range(1, len(ids) + 1):
        if place == len(ids) or ids[place] != ids[place - 1] + 1:
            yield ids[start], ids[place - 1] + 1
            start = place


def text_grammar(vocabulary: Vocabulary, tokens: int) -> DocumentGrammar:
    """A stretch of at most `tokens` ids of text that may end with EOS."""
    return DocumentGrammar(vocabulary, tokens, tokens)
