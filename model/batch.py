"""A pack as tensors: its documents read from the shards and written end to end.

Samples with captions are written here, each part straight to its place in the pack: that is most
of what a loader does, and a fifth of the time of writing documents one by one. A test holds it to
`unimodal.tokenize.document.serialize`; all other documents are written there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from unimodal.model.samples import ALONE, DROPPED, TASKS, WHOLE, Samples
from unimodal.pipeline.errors import UnimodalError
from unimodal.tokenize.document import compose, write

if TYPE_CHECKING:
    from unimodal.model.data import DataSettings

KINDS = (
    "generation/text",
    "generation/vision",
    "understanding/text",
    "understanding/vision",
    "structure",
    "text",
    "chat/text",
    "interleaved/text",
    "interleaved/vision",
    "edit/text",
    "edit/vision",
)
"""Kinds of target, by which losses are reported. Structure: BOI, meta, IMG, EOL, EOF and EOI.
EOS counts as text; of an edit it is all the text that is learned."""

_FORMS = ("generation", "understanding", *TASKS[1:])
_KINDS_OF = np.array(
    [
        [
            KINDS.index(form if form == "text" else f"{form}/text"),
            KINDS.index(f"{form}/vision" if f"{form}/vision" in KINDS else "structure"),
            KINDS.index("structure"),
        ]
        for form in _FORMS
    ]
)
"""Kind of a text, vision and structure target in documents of each form."""
RECENT = 1 << 22
"""Ids of long texts that are kept: all pieces of a text are cut from one writing of it."""


class Document(NamedTuple):
    """What one sample says in one epoch, or a piece of a text."""

    row: int
    describes: bool
    caption: int
    """Which of the sample's captions; -1: none; of an edit see `samples.WHOLE`."""
    total: int
    """Its tokens: one less than its ids, as the last id predicts nothing."""
    start: int
    stop: int
    """Which of them stand here: all, but for a text that was cut."""

    @property
    def length(self) -> int:
        """Tokens that it takes in a pack."""
        return self.stop - self.start


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


def collate(samples: Samples, documents: Sequence[Document], settings: DataSettings) -> Batch:
    """Read and serialize the documents of a pack.

    Raises `UnimodalError` if a document is not as long as the index says.
    """
    lengths = [document.length for document in documents]
    ends = np.cumsum(lengths)
    ids, targets, kinds = (np.empty(ends[-1], np.int64) for _ in range(3))
    weights, last = np.empty(len(ids), np.float32), []
    for document, stop in zip(documents, ends.tolist(), strict=True):
        place = slice(stop - document.length, stop)
        views = ids[place], weights[place], kinds[place]
        add = _other if samples.tasks[document.row] else _captioned
        last.append(add(samples, document, settings, views))
    # A document's last id is a target only, its first one an input only: no token of one document
    # ever predicts a token of the next.
    targets[:-1] = ids[1:]
    targets[ends - 1] = last
    if settings.caption_weight != 1:
        weights[kinds == KINDS.index("generation/text")] *= settings.caption_weight
    positions = np.arange(max(lengths))
    return Batch(
        ids=torch.from_numpy(ids),
        targets=torch.from_numpy(targets),
        weights=torch.from_numpy(weights),
        kinds=torch.from_numpy(kinds),
        positions=torch.from_numpy(np.concatenate([positions[:length] for length in lengths])),
        lengths=lengths,
        keys=[samples.key(document.row) for document in documents],
    )


Views = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Where a document goes: its ids but the last; weights and kinds of its ids but the first."""


def _captioned(samples: Samples, document: Document, settings: DataSettings, views: Views) -> int:
    """A picture or clip, drawn from its caption or described by it; returns its last id."""
    ids, weights, kinds = views
    row, describes, caption = document.row, document.describes, document.caption
    codes = samples.codes(row)
    block, classes = samples.block(codes.shape, float(samples.rates[row]))
    text = samples.caption_ids(row, caption) if caption >= 0 else block[:0]
    size = len(block)
    if 1 + size + len(text) != len(ids):
        raise _unequal(samples, document, 2 + size + len(text))
    first = 1 if describes else 1 + len(text)
    ids[0] = samples.vocabulary.bos
    if describes:
        ids[1 + size :] = text
    else:
        ids[1:first] = text
    ids[first : first + size] = block
    t, h, w = codes.shape
    behind = first + size - 1
    grid = ids[behind - t * (h * (w + 1) + 1) : behind].reshape(t, -1)[:, :-1]
    grid = grid.reshape(t, h, w + 1)[:, :, :-1]
    np.add(codes, samples.vocabulary.vision_start, out=grid, dtype=np.int64)
    weights.fill(1)
    weights[first - 1 : behind] = (
        settings.described_vision_weight if describes else settings.vision_weight
    )
    if caption < 0:
        # Up to its EOS this is how a document that describes begins. Learning EOS here would
        # teach that a picture has no description, and greedy decoding would give none.
        weights[-1] = 0
    kinds_of = _KINDS_OF[int(describes)]
    kinds.fill(kinds_of[0])
    kinds_of.take(classes, out=kinds[first - 1 : behind], mode="clip")
    return samples.vocabulary.eos


def _other(samples: Samples, document: Document, settings: DataSettings, views: Views) -> int:
    """A document of another task, or a piece of a text; returns its last id."""
    row, recent = document.row, samples.recent
    task = int(samples.tasks[row])
    written = recent.get(row)
    if written is None:
        pieces = samples.segments(row)
        parts = compose(TASKS[task], pieces)
        if document.caption < WHOLE:
            dropped = DROPPED[: WHOLE - document.caption]
            placed = zip(parts, pieces, strict=True)  # an edit has no template between its pieces
            parts = [part for part, piece in placed if piece.role not in dropped]
        written = write(parts, samples.vocabulary, settings.vision_weight)
        if document.caption == ALONE:  # no EOS to learn, see `_captioned`
            written[1][-1] = 0
    whole, weighed = written
    if len(whole) != document.total + 1:
        raise _unequal(samples, document, len(whole))
    if document.length < document.total and row not in recent:
        while recent and sum(len(one) for one, _ in recent.values()) + len(whole) > RECENT:
            del recent[next(iter(recent))]
        recent[row] = written
    ids, weights, kinds = views
    targets = slice(document.start + 1, document.stop + 1)
    ids[:], weights[:] = whole[document.start : document.stop], weighed[targets]
    kinds[:] = _KINDS_OF[task + 1][samples.classes(whole[targets])]
    return int(whole[document.stop])


def _unequal(samples: Samples, document: Document, found: int) -> UnimodalError:
    return UnimodalError(
        f"sample {samples.key(document.row)} has {found} ids where the index of its shards "
        f"says {document.total + 1}: run tokenize again"
    )
