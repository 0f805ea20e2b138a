"""From shards to training batches: what each document says, which pack it is in, in what order.

Everything is a pure function of (seed, epoch, key): the order of an epoch, whether a picture is
drawn from its caption or described by it, which caption, and whether the caption is dropped. So
the position in the data is three numbers for each source (a shard directory) and one for the
pack, a resumed run sees what the uninterrupted one would, whatever the number of processes, and
"what was in step 1234?" can be answered afterwards.

Documents of all sources are mixed by weight into a window, the window is packed, and the packs
are shuffled. Plans are made from the shards' index alone; codes and texts are read when a batch
is built. That takes well under 1 % of a step of the smallest recipe, so there is no worker.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from unimodal.model.batch import KINDS, Batch, Document, collate
from unimodal.model.packing import deal, pack
from unimodal.model.samples import ALONE, TASKS, UNTOLD, WHOLE, Samples, draw
from unimodal.pipeline.errors import UnimodalError
from unimodal.pipeline.large import mapped
from unimodal.pipeline.settings import Settings

if TYPE_CHECKING:
    from unimodal.model.parallel import Mesh

__all__ = [
    "KINDS",
    "Batch",
    "Cursor",
    "DataSettings",
    "Document",
    "Loader",
    "Plan",
    "Samples",
    "choose",
    "coding",
    "collate",
    "draw",
    "open_shards",
    "plan",
    "share",
    "validation",
]

WINDOW = 65_536
"""Documents that are mixed and packed together; bounds the memory and time of a plan."""
EMPTY = 100
"""Windows in which nothing fits before a loader gives up."""


class DataSettings(Settings):
    """How documents are made from samples."""

    weights: list[float] = Field(default_factory=list)
    """Share of the tokens that each shard directory gets, in the order they are given, whatever
    their sum; empty: by its size. A directory's epochs are its own."""
    context: int = Field(default=4096, ge=16)
    """Tokens of one pack: the longest document, and the work of one micro-step."""
    understanding: float = Field(default=0.3, ge=0, le=1)
    """Share of documents with the caption behind the picture (describe), not before it (draw)."""
    caption_dropout: float = Field(default=0.1, ge=0, le=1)
    """Share of drawing documents whose caption is left empty: teaches the unconditional side of
    guidance."""
    instruction_dropout: float = Field(default=0.1, ge=0, le=1)
    """Share of edits whose instruction is left out: teaches the side of guidance that knows the
    source alone."""
    source_dropout: float = Field(default=0.5, ge=0, le=1)
    """Share of these that lose their source as well: the side of guidance that knows nothing."""
    styles: list[str] = Field(default_factory=list)
    """Caption styles to choose from; empty means all."""
    vision_weight: float = Field(default=0.5, ge=0)
    """Weight of a vision target where text weighs 1 (Emu3: 0.5)."""
    caption_weight: float = Field(default=1.0, ge=0)
    """Weight of the text of documents that draw; 0 learns the picture alone, as Emu3's quality
    fine-tuning does."""
    described_vision_weight: float = Field(default=0.5, ge=0)
    """The same in documents that describe a picture; 0 makes the picture context only."""
    alike: bool = False
    """Make steps of packs whose attention costs about the same, rather than of any packs. For
    long contexts with few packs a process, where the others wait for the one with a video."""


@dataclass(frozen=True)
class Cursor:
    """Position of the next pack. All that a resumed run needs to know of the data."""

    sources: tuple[tuple[int, int, int], ...] = ()
    """Where the present window begins in each source: its epoch, how many rows of that are done,
    and how many tokens it gave since the start. Empty: at the start."""
    pack: int = 0
    """Packs of the window that are done."""
    begun: int = 0
    """Packs of a step that were done already when the window began."""

    def __post_init__(self) -> None:  # JSON has no tuples
        object.__setattr__(self, "sources", tuple(tuple(one) for one in self.sources))

    @property
    def epoch(self) -> int:
        """Of the source that is furthest."""
        return max((epoch for epoch, _, _ in self.sources), default=0)


def choose(
    samples: Samples, rows: np.ndarray, epochs: int | np.ndarray, settings: DataSettings, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """What samples say in an epoch: bool [N], described rather than drawn; int64 [N], by which of
    the captions, -1 for none, and what an edit leaves out, see `samples.WHOLE`."""
    keys, counts = samples.hashes[rows], samples.captions(rows)
    describes = (draw(seed, epochs, keys, "describes") < settings.understanding) & (counts > 0)
    captions = (draw(seed, epochs, keys, "caption") * counts).astype(np.int64)
    dropped = draw(seed, epochs, keys, "dropout") < settings.caption_dropout
    captions[(counts == 0) | (dropped & ~describes)] = WHOLE
    untold = samples.tasks[rows] == TASKS.index("edit")
    untold &= draw(seed, epochs, keys, "instruction") < settings.instruction_dropout
    captions[untold] = UNTOLD
    captions[untold & (draw(seed, epochs, keys, "source") < settings.source_dropout)] = ALONE
    return describes, captions


@dataclass(frozen=True)
class Source:
    """One shard directory as a part of the mixture."""

    number: int
    rows: np.ndarray
    """Its training rows."""
    weight: float
    tokens: int
    """Of its first epoch."""

    def rate(self) -> float:
        """Documents for each unit of weight."""
        return self.weight * len(self.rows) / self.tokens


def mixture(samples: Samples, settings: DataSettings, seed: int) -> list[Source]:
    """The sources with their weights.

    Raises `UnimodalError` for weights that do not fit, no training sample, and a source of which
    nothing fits in the context.
    """
    count, given = len(samples.shards), settings.weights
    if given and (len(given) != count or not all(0 < weight < math.inf for weight in given)):
        raise UnimodalError(
            f"data.weights = {given} for {count} shard directories: give each a number above 0, "
            "and leave out a directory that should not count"
        )
    sources = []
    for number, (first, behind) in enumerate(pairwise(samples.starts.tolist())):
        rows = samples.rows["train"]
        rows = rows[(rows >= first) & (rows < behind)]
        if not len(rows):
            if given:
                raise UnimodalError(
                    f"{samples.name(number)} has a weight in data.weights but no training sample"
                )
            continue
        lengths = samples.length(rows, choose(samples, rows, 0, settings, seed)[1])
        fits = _fits(samples, rows, lengths, settings.context)
        if not fits.any():
            raise UnimodalError(
                f"nothing of {samples.name(number)} fits in data.context = {settings.context} "
                f"tokens; the smallest needs {lengths.min()}: raise data.context"
            )
        tokens = int(lengths[fits].sum())
        sources.append(Source(number, rows, given[number] if given else tokens, tokens))
    if not sources:
        raise UnimodalError(
            "the shards hold no training sample: curate and tokenize more sources, "
            "or lower the share that goes to the validation split"
        )
    return sources


def _fits(samples: Samples, rows: np.ndarray, lengths: np.ndarray, context: int) -> np.ndarray:
    return (lengths <= context) | samples.splittable(rows)


@dataclass(frozen=True)
class Plan:
    """The packs of one window, in training order."""

    packs: list[list[Document]]
    skipped: int
    """Documents longer than the context: a picture is never cut."""
    longest: int
    """Tokens of the longest of these."""
    behind: tuple[tuple[int, int, int], ...]
    """`Cursor.sources` of the next window."""

    def fill(self, context: int) -> float:
        """Share of the packs' room that holds tokens."""
        used = sum(document.length for pack in self.packs for document in pack)
        return used / max(1, len(self.packs) * context)

    def left_out(self, context: int) -> str:
        """What does not fit, and the context that would hold it; empty where everything fits."""
        if not self.skipped:
            return ""
        wanted = -(-self.longest // 256) * 256
        return (
            f"{self.skipped} documents are longer than data.context = {context:,} and left out: "
            f"--set data.context={wanted} holds all"
        )


def _generator(*what: object) -> np.random.Generator:
    digest = hashlib.blake2b("/".join(map(str, what)).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def plan(
    samples: Samples,
    sources: Sequence[Source],
    settings: DataSettings,
    seed: int,
    positions: Sequence[tuple[int, int, int]],
    group: int = 1,
    begun: int = 0,
) -> Plan:
    """Packs of the window that begins at `positions`, see `Cursor.sources`; `group` make a step,
    the first of which has `begun` packs of the window before.

    Next comes always the source that is furthest behind its share of the tokens. A window ends
    with the epoch of the largest source, or after about WINDOW documents.
    """
    lead = max(range(len(sources)), key=lambda number: sources[number].tokens)
    rates = [source.rate() for source in sources]
    left = len(sources[lead].rows) - positions[lead][1]
    windows = -(-left // max(1, int(WINDOW * rates[lead] / sum(rates))))
    count = -(-left // windows)
    taken: list[tuple[np.ndarray, ...]] = []
    for number, (epoch, done, tokens) in enumerate(positions):
        source, some = sources[number], count
        if number != lead:  # more than its part, as the window ends when a source has no more
            some = min(int(1.25 * count * rates[number] / rates[lead]) + 64, WINDOW)
        at = done + np.arange(some)
        epochs = epoch + at // len(source.rows)
        orders = [
            _generator(seed, "order", source.number, one).permutation(len(source.rows))
            for one in range(epoch, int(epochs[-1]) + 1)
        ]
        rows = source.rows[np.concatenate(orders)[at]]
        describes, captions = choose(samples, rows, epochs, settings, seed)
        lengths = samples.length(rows, captions)
        fits = _fits(samples, rows, lengths, settings.context)
        begins = tokens + np.concatenate([[0], np.cumsum(lengths * fits)])
        taken.append((rows, describes, captions, lengths, fits, begins))
    clocks = [one[-1] / source.weight for one, source in zip(taken, sources, strict=True)]
    end = min(clock[-1] for clock in clocks)
    kept, behind, skipped, longest = [], [], 0, 0
    for source, (*columns, fits, begins), clock, (epoch, done, _) in zip(
        sources, taken, clocks, positions, strict=True
    ):
        stop = len(fits) if clock[-1] == end else int(np.searchsorted(clock[:-1], end))
        more, done = divmod(done + stop, len(source.rows))
        behind.append((epoch + more, done, int(begins[stop])))
        on = np.flatnonzero(fits[:stop])
        skipped += stop - len(on)
        longest = max(longest, int(columns[-1][:stop][~fits[:stop]].max(initial=0)))
        kept.append([column[on] for column in (clock, *columns)])
    clock, rows, describes, captions, lengths = (
        np.concatenate(column) for column in zip(*kept, strict=True)
    )
    order = np.argsort(clock, kind="stable")
    packs = _packed(
        samples, settings, rows[order], describes[order], captions[order], lengths[order]
    )
    shuffle = _generator(seed, "packs", *positions[lead][:2])
    shuffled = [packs[i] for i in shuffle.permutation(len(packs)).tolist()]
    if settings.alike:  # in steps of packs that cost the same, the steps in any order
        shuffled.sort(key=_cost)
        # Steps that two windows share are made of the cheapest packs of both.
        first = -begun % group
        whole = first + (len(shuffled) - first) % group
        steps = [shuffled[i : i + group] for i in range(whole, len(shuffled), group)]
        inner = [one for i in shuffle.permutation(len(steps)).tolist() for one in steps[i]]
        shuffled = shuffled[:first] + inner + shuffled[first:whole]
    return Plan(shuffled, skipped, longest, tuple(behind))


def _cost(documents: Sequence[Document]) -> int:
    """Of attention, which is within documents."""
    return sum(document.length**2 for document in documents)


class Loader:
    """The endless stream of training packs from a cursor on."""

    def __init__(
        self, samples: Samples, settings: DataSettings, seed: int, cursor: Cursor | None = None
    ) -> None:
        """Raises `UnimodalError` as `mixture` does, and for a cursor in other shards."""
        self.samples = samples
        self.settings = settings
        self.seed = seed
        self.sources = mixture(samples, settings, seed)
        start = ((0, 0, 0),) * len(self.sources)
        self.cursor = replace(cursor or Cursor(), sources=(cursor and cursor.sources) or start)
        """Position of the next pack: save it with the model."""
        if len(self.cursor.sources) != len(self.sources):
            raise UnimodalError(
                f"the position is in {len(self.cursor.sources)} shard directories, not in "
                f"{len(self.sources)}: give those that the run began with"
            )
        self._planned: object = None
        self._plan = Plan([], 0, 0, ())
        self._group = 1

    @property
    def plan(self) -> Plan:
        """The plan of the cursor's window."""
        at = self.cursor.sources, self._group, self.cursor.begun
        if self._planned != at:
            self._planned = at
            self._plan = plan(self.samples, self.sources, self.settings, self.seed, *at)
        return self._plan

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """Build the pack at the cursor and move on."""
        return self.step(1)[0]

    def step(self, packs: int, rank: int = 0, world: int = 1) -> list[Batch]:
        """This rank's packs of the next optimizer step, which has `packs` over all ranks.

        Every rank moves the cursor alike, and gets as many packs; dealt so that all have about
        as much attention to compute. Raises `ValueError` if `packs` is no multiple of `world`.
        """
        self._group = packs if self.settings.alike else 1
        chosen = [self._take(done) for done in range(packs)]
        mine = deal([_cost(one) for one in chosen], world)[rank]
        return [collate(self.samples, chosen[i], self.settings) for i in mine]

    def _take(self, done: int = 0) -> list[Document]:
        """The next pack, of a step that has `done` of them already."""
        for _ in range(EMPTY):
            if self.cursor.pack < len(self.plan.packs):
                documents = self.plan.packs[self.cursor.pack]
                self.cursor = replace(self.cursor, pack=self.cursor.pack + 1)
                return documents
            self.cursor = Cursor(self.plan.behind, 0, done % self._group)
        raise UnimodalError(
            f"nothing fits in data.context = {self.settings.context} tokens any more: raise it"
        )


def validation(samples: Samples, settings: DataSettings, limit: int) -> list[Batch]:
    """Packs of the first `limit` validation samples, captioned ones both drawn and described."""
    rows = samples.rows["val"][:limit]
    rows = np.repeat(rows, 1 + (samples.captions(rows) > 0))
    describes = np.diff(rows, prepend=-1) == 0
    captions = np.where(samples.captions(rows) > 0, 0, -1)
    lengths = samples.length(rows, captions)
    on = _fits(samples, rows, lengths, settings.context)
    chosen = _packed(samples, settings, rows[on], describes[on], captions[on], lengths[on])
    # Codes of described pictures count here also where training takes them as context only.
    plain = {"described_vision_weight": settings.vision_weight or 1.0, "caption_weight": 1.0}
    return [collate(samples, one, settings.model_copy(update=plain)) for one in chosen]


def _packed(
    samples: Samples,
    settings: DataSettings,
    rows: np.ndarray,
    describes: np.ndarray,
    captions: np.ndarray,
    lengths: np.ndarray,
) -> list[list[Document]]:
    told = list(zip(*(one.tolist() for one in (rows, describes, captions, lengths)), strict=True))
    packs = pack(lengths, settings.context, samples.splittable(rows))
    return [[Document._make((*told[i], *cut)) for i, *cut in one] for one in packs]


def open_shards(paths: Sequence[Path]) -> list[Any]:
    """Open shard directories; raises `UnimodalError` unless all are of one vocabulary and
    vision tokenizer."""
    from unimodal.tokenize.shards import Shards

    if not paths:
        raise UnimodalError("no shards given: name at least one directory that tokenize made")
    opened = [Shards.open(path) for path in paths]
    for path, one in zip(paths[1:], opened[1:], strict=True):
        if one.vocabulary.digest() != opened[0].vocabulary.digest():
            raise UnimodalError(
                f"shards {path} and {paths[0]} have different vocabularies: tokenize them alike"
            )
        if coding(one.manifest) != coding(opened[0].manifest):
            raise UnimodalError(
                f"the codes of {path} and {paths[0]} are of different vision tokenizers, or those "
                "of one are joint: tokenize them alike"
            )
    return opened


def share(shards: Sequence[Any], mesh: Mesh) -> None:
    """Let one process of each machine read the large indexes among these, for all to map."""
    from unimodal.tokenize.shards import HELD

    large = [one for one in shards if len(one) > HELD]
    if mesh.world == 1 or not large:
        return
    with mesh.machine() as (folder, first):
        files = [folder / f"{number}.arrow" for number in range(len(large))]
        with mesh.together():
            for one, file in zip(large, files, strict=True):
                if first:
                    one.write_index(file)
        for one, file in zip(large, files, strict=True):
            one.index = mapped(file)


def coding(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What the codes of shards mean: the vision tokenizer, and `joint` where groups were so."""
    joint = {"joint": True} if manifest["settings"].get("joint") else {}
    return {**manifest["vision_tokenizer"], **joint}
