"""From shards to training batches: what each document says, which pack it is in, in what order.

Everything is a pure function of (seed, epoch, key): the order of an epoch, whether a picture is
drawn from its caption or described by it, which caption, and whether the caption is dropped. So
the position in the data is three numbers, a resumed run sees what the uninterrupted one would,
and "what was in step 1234?" can be answered afterwards.

Plans are made from the shards' index; codes are read when a batch is built. Building a batch of
2,048 tokens takes 2 ms, under 1 % of a step of the smallest recipe, so there is no worker.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from unimodal.model.packing import best_fit
from unimodal.pipeline.errors import UnimodalError
from unimodal.pipeline.settings import Settings
from unimodal.tokenize.document import (
    Image,
    Segment,
    Video,
    block_length,
    generation,
    loss_weights,
    serialize,
    understanding,
)
from unimodal.tokenize.vocabulary import Vocabulary

KINDS = (
    "generation/text",
    "generation/vision",
    "understanding/text",
    "understanding/vision",
    "structure",
)
"""Kinds of target, by which losses are reported. Structure: BOI, meta, IMG, EOL, EOF and EOI."""

WINDOW = 65_536
"""Documents that are packed together; bounds the memory and time of a plan."""


class DataSettings(Settings):
    """How documents are made from samples."""

    context: int = Field(default=4096, ge=16)
    """Tokens of one pack: the longest document, and the work of one micro-step."""
    understanding: float = Field(default=0.3, ge=0, le=1)
    """Share of documents with the caption behind the picture (describe), not before it (draw)."""
    caption_dropout: float = Field(default=0.1, ge=0, le=1)
    """Share of drawing documents whose caption is left empty: teaches the unconditional side of
    guidance."""
    styles: list[str] = Field(default_factory=list)
    """Caption styles to choose from; empty means all."""
    vision_weight: float = Field(default=0.5, ge=0)
    """Weight of a vision target where text weighs 1 (Emu3: 0.5)."""
    described_vision_weight: float = Field(default=0.5, ge=0)
    """The same in documents that describe a picture; 0 makes the picture context only."""


class ShardsLike(Protocol):
    """What is used of `unimodal.tokenize.shards.Shards`."""

    @property
    def index(self) -> Any: ...
    @property
    def vocabulary(self) -> Vocabulary: ...
    def codes(self, row: int) -> np.ndarray: ...


@dataclass(frozen=True)
class Row:
    """One picture or clip of the shards."""

    shards: int
    row: int
    key: str
    size: tuple[int, int, int]
    """T, H, W in codes."""
    fps: float | None
    """None for a still image."""


@dataclass(frozen=True)
class Document:
    """What one sample says in one epoch."""

    row: Row
    describes: bool
    caption: int | None
    """Index into the sample's captions; None: no caption."""
    length: int
    """Tokens that it takes in a pack: one less than its ids, as the last id predicts nothing."""


@dataclass(frozen=True)
class Batch:
    """One pack, ready for the decoder. T tokens of whole documents, end to end."""

    ids: Tensor
    """int64 [T]"""
    targets: Tensor
    """int64 [T]: the id behind each token, always of the same document."""
    weights: Tensor
    """float32 [T]: weight of each target in the loss."""
    kinds: Tensor
    """int64 [T]: index into KINDS."""
    positions: Tensor
    """int64 [T]: restart at 0 in each document."""
    lengths: list[int]
    """Tokens of each document."""
    keys: list[str]
    """Keys of the documents' samples."""

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on `device`."""
        names = ("ids", "targets", "weights", "kinds", "positions")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


@dataclass(frozen=True)
class Cursor:
    """Position of the next pack. All that a resumed run needs to know of the data."""

    epoch: int = 0
    window: int = 0
    pack: int = 0


def draw(seed: int, epoch: int, key: str, purpose: str) -> float:
    """A number in [0, 1) that depends on nothing but its arguments."""
    digest = hashlib.blake2b(f"{seed}/{epoch}/{key}/{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64


class Samples:
    """The index of one or more shard directories of one vocabulary, as plain arrays."""

    def __init__(self, shards: Sequence[ShardsLike], styles: Sequence[str] = ()) -> None:
        self.shards = list(shards)
        self.vocabulary = shards[0].vocabulary
        self._blocks: dict[tuple[tuple[int, int, int], float | None], int] = {}
        self.rows: dict[str, list[Row]] = {"train": [], "val": []}
        self._captions: list[tuple[np.ndarray, np.ndarray, np.ndarray, Any]] = []
        for number, one in enumerate(self.shards):
            index = one.index
            self._captions.append(_captions(index, styles))
            frames, heights, widths, rates = (
                index.column(name).to_pylist() for name in ("frames", "height", "width", "fps")
            )
            for row, (key, kind, split) in enumerate(
                zip(*(index.column(n).to_pylist() for n in ("key", "kind", "split")), strict=True)
            ):
                size = (frames[row] or 1, heights[row], widths[row])
                fps = rates[row] if kind == "video" else None
                self.rows[split].append(Row(number, row, key, size, fps))

    def captions(self, row: Row) -> int:
        """How many captions a sample has."""
        starts, _, _, _ = self._captions[row.shards]
        return int(starts[row.row + 1] - starts[row.row])

    def caption(self, row: Row, which: int) -> str:
        """Text of a caption."""
        starts, picked, _, texts = self._captions[row.shards]
        return str(texts[int(picked[starts[row.row] + which])].as_py())

    def document(self, row: Row, describes: bool, caption: int | None) -> Document:
        """The document of these choices, with its length from the index alone."""
        starts, _, tokens, _ = self._captions[row.shards]
        text = 0 if caption is None else int(tokens[starts[row.row] + caption])
        block = self._blocks.get((row.size, row.fps))
        if block is None:
            t, h, w = row.size
            frames = None if row.fps is None else t
            block = block_length(self.vocabulary, h, w, frames, row.fps)
            self._blocks[row.size, row.fps] = block
        return Document(row, describes, caption, block + text + 1)

    def segments(self, document: Document) -> list[Segment]:
        """Read the codes and the caption of a document."""
        row = document.row
        codes = self.shards[row.shards].codes(row.row)
        vision = Image(codes[0]) if row.fps is None else Video(codes, row.fps)
        text = "" if document.caption is None else self.caption(row, document.caption)
        return (understanding if document.describes else generation)(text, vision)


def _captions(index: Any, styles: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray, Any]:
    """Flat captions of an index: starts [rows + 1], picked positions, their tokens, all texts."""
    import pyarrow as pa

    column = index.column("captions").combine_chunks()
    if isinstance(column, pa.ChunkedArray):  # combine_chunks of an empty column stays chunked
        column = pa.concat_arrays(column.chunks) if column.chunks else pa.array([], column.type)
    values = column.flatten()
    sizes = np.array([len(one) if one.is_valid else 0 for one in column], np.int64)
    texts = values.field("text")
    tokens = values.field("tokens").to_numpy(zero_copy_only=False).astype(np.int64)
    kept = np.ones(len(tokens), bool)
    if styles:
        kept = np.isin(np.array(values.field("style").to_pylist(), object), list(styles))
    owner = np.repeat(np.arange(len(sizes)), sizes)
    counts = np.bincount(owner[kept], minlength=len(sizes))
    picked = np.flatnonzero(kept)
    return np.concatenate([[0], np.cumsum(counts)]), picked, tokens[picked], texts


def choose(samples: Samples, row: Row, settings: DataSettings, seed: int, epoch: int) -> Document:
    """What a sample says in an epoch: drawn or described, by which caption, or by none."""
    count = samples.captions(row)
    if count == 0:
        return samples.document(row, describes=False, caption=None)
    describes = draw(seed, epoch, row.key, "describes") < settings.understanding
    caption: int | None = int(draw(seed, epoch, row.key, "caption") * count)
    if not describes and draw(seed, epoch, row.key, "dropout") < settings.caption_dropout:
        caption = None
    return samples.document(row, describes, caption)


@dataclass(frozen=True)
class Plan:
    """The packs of one window of an epoch, in training order."""

    packs: list[list[Document]]
    skipped: int
    """Documents longer than the context: a picture is never cut."""

    def fill(self, context: int) -> float:
        """Share of the packs' room that holds tokens."""
        used = sum(document.length for pack in self.packs for document in pack)
        return used / max(1, len(self.packs) * context)


def plan(
    samples: Samples, settings: DataSettings, seed: int, epoch: int, window: int
) -> Plan | None:
    """Packs of a window of the shuffled training rows; None behind the epoch's last window."""
    rows = samples.rows["train"]
    order = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(len(rows))
    mine = order[window * WINDOW : (window + 1) * WINDOW]
    if len(mine) == 0:
        return None
    documents = [choose(samples, rows[i], settings, seed, epoch) for i in mine.tolist()]
    fitting = [document for document in documents if document.length <= settings.context]
    packs = best_fit([document.length for document in fitting], settings.context)
    shuffle = np.random.Generator(np.random.Philox(key=[seed, (epoch << 32) + window + 1]))
    ordered = [packs[i] for i in shuffle.permutation(len(packs)).tolist()]
    return Plan([[fitting[i] for i in pack] for pack in ordered], len(documents) - len(fitting))


def collate(samples: Samples, documents: Sequence[Document], settings: DataSettings) -> Batch:
    """Read and serialize the documents of a pack.

    Raises `UnimodalError` if a document is not as long as the index says.
    """
    vocabulary = samples.vocabulary
    ids, targets, weights, kinds = [], [], [], []
    for document in documents:
        whole = serialize(samples.segments(document), vocabulary)
        if len(whole) - 1 != document.length:
            raise UnimodalError(
                f"sample {document.row.key} has {len(whole)} ids where the index of its shards "
                f"says {document.length + 1}: run tokenize again"
            )
        vision = settings.described_vision_weight if document.describes else settings.vision_weight
        # A document's last id is a target only, its first one an input only: no token of one
        # document ever predicts a token of the next.
        ids.append(whole[:-1])
        targets.append(whole[1:])
        weight = loss_weights(whole, vocabulary, vision)[1:]
        if document.caption is None:
            # Up to its EOS this is how a document that describes begins. Learning EOS here would
            # teach that a picture has no description, and greedy decoding would give none.
            weight[-1] = 0
        weights.append(weight)
        kinds.append(_kinds(whole[1:], vocabulary, document.describes))
    lengths = [len(one) for one in ids]
    return Batch(
        ids=torch.from_numpy(np.concatenate(ids)),
        targets=torch.from_numpy(np.concatenate(targets)),
        weights=torch.from_numpy(np.concatenate(weights)),
        kinds=torch.from_numpy(np.concatenate(kinds)),
        positions=torch.cat([torch.arange(length) for length in lengths]),
        lengths=lengths,
        keys=[document.row.key for document in documents],
    )


def _kinds(targets: np.ndarray, vocabulary: Vocabulary, describes: bool) -> np.ndarray:
    """Index into KINDS of each target: codes are vision, block syntax is structure."""
    block = np.cumsum(targets == vocabulary.boi) > np.cumsum(targets == vocabulary.eoi)
    kinds = np.full(len(targets), 2 if describes else 0)
    kinds[block | (targets == vocabulary.eoi)] = KINDS.index("structure")
    kinds[vocabulary.is_vision(targets)] = 3 if describes else 1
    return kinds.astype(np.int64)


class Loader:
    """The endless stream of training packs from a cursor on."""

    def __init__(
        self, samples: Samples, settings: DataSettings, seed: int, cursor: Cursor | None = None
    ) -> None:
        self.samples = samples
        self.settings = settings
        self.seed = seed
        self.cursor = cursor or Cursor()
        """Position of the next pack: save it with the model."""
        self._planned: tuple[int, int] | None = None
        self._plan = Plan([], 0)
        self._check()

    def _check(self) -> None:
        rows = self.samples.rows["train"]
        if not rows:
            raise UnimodalError(
                "the shards hold no training sample: curate and tokenize more sources, "
                "or lower the share that goes to the validation split"
            )
        if not self._at(replace(self.cursor, window=0, pack=0)).packs:
            smallest = min(self.samples.document(row, False, None).length for row in rows)
            raise UnimodalError(
                f"no picture fits in data.context = {self.settings.context} tokens; "
                f"the smallest needs {smallest}: raise data.context"
            )

    @property
    def plan(self) -> Plan:
        """The plan of the cursor's window."""
        return self._at(self.cursor)

    def _at(self, cursor: Cursor) -> Plan:
        if self._planned != (cursor.epoch, cursor.window):
            made = plan(self.samples, self.settings, self.seed, cursor.epoch, cursor.window)
            self._plan = made or Plan([], 0)
            self._planned = (cursor.epoch, cursor.window)
        return self._plan

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """Build the pack at the cursor and move on."""
        while self.cursor.pack >= len(self.plan.packs):
            windows = -(-len(self.samples.rows["train"]) // WINDOW)
            epoch, window = divmod(self.cursor.epoch * windows + self.cursor.window + 1, windows)
            self.cursor = Cursor(epoch, window, 0)
        documents = self.plan.packs[self.cursor.pack]
        self.cursor = replace(self.cursor, pack=self.cursor.pack + 1)
        return collate(self.samples, documents, self.settings)


def validation(samples: Samples, settings: DataSettings, limit: int) -> list[Batch]:
    """Packs of the first `limit` validation samples, each both drawn and described."""
    documents = []
    for row in samples.rows["val"][:limit]:
        caption = 0 if samples.captions(row) else None
        tasks = (False, True) if caption is not None else (False,)
        documents += [samples.document(row, describes, caption) for describes in tasks]
    documents = [d for d in documents if d.length <= settings.context]
    packs = best_fit([d.length for d in documents], settings.context)
    # Every target counts here, also of pictures that training takes as context only.
    plain = settings.model_copy(update={"described_vision_weight": settings.vision_weight or 1.0})
    return [collate(samples, [documents[i] for i in pack], plain) for pack in packs]


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


def coding(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What the codes of shards mean: the vision tokenizer, and `joint` where groups were so."""
    joint = {"joint": True} if manifest["settings"].get("joint") else {}
    return {**manifest["vision_tokenizer"], **joint}
