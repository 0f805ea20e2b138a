"""One unit of rows: read their pictures, encode them, and put the documents together.

    corpora.drafts -> pictures by size, texts counted -> a Sample with the pieces of each document

Rows are read ahead, and their pictures are encoded in batches of one size, as those of clips are.
A row of which a picture or a text cannot be had goes to the quarantine as a whole.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from unimodal.pipeline.errors import MediaError, reason
from unimodal.tokenize.corpora import Draft, RowUnit, drafts
from unimodal.tokenize.document import Image, Piece, Text, parts_length
from unimodal.tokenize.plan import split_of, windows
from unimodal.tokenize.shards import Sample

if TYPE_CHECKING:
    from unimodal.tokenize.unit import Work

STAGE = "tokenize"
HELD = 8
"""Batches of pictures that may wait for others of their size."""


@dataclass
class Read:
    """A row with all that it names."""

    draft: Draft
    pictures: list[np.ndarray] = field(default_factory=list)
    """uint8 [1, H, W, 3] of each, resized."""
    tokens: list[int | None] = field(default_factory=list)
    """Of each piece that is a text."""
    source_sha256: str = ""
    """Of the first picture's bytes, so that all that is said of it is in one split; else of the
    texts."""


def documents(work: Work, unit: RowUnit) -> tuple[list[Sample], list[dict[str, str]]]:
    """Samples of a unit of rows, and rows {uri, reason} of those that gave none."""
    rows = list(drafts(unit, work.setup.settings))
    things = [work.thing(k) for k in range(len(rows))]
    killed = {k: work.poison[thing] for k, thing in enumerate(things) if thing in work.poison}
    # A picture that killed a worker is not touched again, whichever row shows it; of several in
    # a row, nobody knows which it was.
    alone = {k: uris[0] for k in killed if len(uris := _uris(rows[k])) == 1}
    killers = {uri: killed[k] for k, uri in alone.items()}
    batches = _Batches(work)
    done: list[tuple[Read, list[tuple[int, int]]]] = []
    lost: list[dict[str, str]] = []
    waiting: deque[tuple[int, Future[Read]]] = deque()

    def settle() -> None:
        k, future = waiting.popleft()
        work.tell.begin(STAGE, things[k])
        why = ""
        if (error := future.exception()) is None:
            read = future.result()
            done.append((read, [batches.add(pixels) for pixels in read.pictures]))
        else:
            work.give_up(error)
            why = reason(error) if isinstance(error, Exception) else str(error)
            lost.append({"uri": rows[k].where, "reason": why})
        work.tell.done(STAGE, things[k], why)

    with ThreadPoolExecutor(max(1, work.threads)) as pool:
        for k, draft in enumerate(rows):
            work.tell.begin(STAGE, things[k])
            waiting.append((k, pool.submit(_read, work, draft, killed.get(k, ""), killers)))
            if len(waiting) > 2 * work.threads:
                settle()
        while waiting:
            settle()
    batches.finish()
    samples = [
        _sample(work, read, [batches.codes(*place) for place in places]) for read, places in done
    ]
    return samples, lost


def _read(work: Work, draft: Draft, killed: str, killers: Mapping[str, str]) -> Read:
    """The pictures of a row, decoded and resized, and its texts counted; raises `MediaError`."""
    if draft.problem or killed:
        raise MediaError(draft.problem or killed)
    read, setup, told = Read(draft), work.setup, []
    texts = json.dumps([value for kind, _, value in draft.pieces if kind == "text"])
    for kind, role, value in draft.pieces:
        one: dict[str, Any] = {"kind": kind, "role": role}
        if kind == "text":
            one["tokens"] = len(setup.vocabulary.text.encode(value))
        else:
            try:
                if value in killers:
                    raise MediaError(killers[value])
                one |= _picture(work, value, read)
            except MediaError as error:
                raise MediaError(f"{value}: {error.reason}") from error
        read.tokens.append(one.get("tokens"))
        told.append(one)
    read.source_sha256 = read.source_sha256 or hashlib.sha256(texts.encode()).hexdigest()
    length = parts_length(draft.task, told, setup.vocabulary)
    if read.pictures and length > setup.settings.max_tokens:  # plain text may be split, these not
        raise MediaError(f"{length} tokens, over max_tokens {setup.settings.max_tokens}")
    return read


def _picture(work: Work, uri: str, read: Read) -> dict[str, int]:
    """Add a picture to what was read, by the same rules as a clip's; returns its grid."""
    from unimodal.pipeline import fetch
    from unimodal.pipeline.inputs import sha256_of
    from unimodal.pipeline.media import read_image
    from unimodal.tokenize.unit import fit

    setup = work.setup
    with fetch.local(uri, keep=True, tick=lambda _: work.tell.seconds(0.0)) as path:
        shown = read_image(path)
        read.source_sha256 = read.source_sha256 or sha256_of(path)
    row = {"uid": "picture", "kind": "image", "height": shown.shape[0], "width": shown.shape[1]}
    factor = setup.tokenizer.spatial_factor
    (window,) = windows(row, setup.settings, setup.vocabulary, factor)
    read.pictures.append(fit(shown, window)[None])
    return dict(zip(("height", "width"), window.grid, strict=True))


def _sample(work: Work, read: Read, codes: list[np.ndarray]) -> Sample:
    draft, pictures = read.draft, iter(codes)
    pieces = [
        Piece(Text(value) if kind == "text" else Image(next(pictures)), role)
        for kind, role, value in draft.pieces
    ]
    return Sample(
        key=draft.key,
        uid=draft.key.partition("-")[0],
        kind="document",
        codes=None,
        split=split_of(read.source_sha256, work.setup.settings.val_fraction),
        source_sha256=read.source_sha256,
        scores=draft.scores,
        meta=draft.meta,
        task=draft.task,
        pieces=pieces,
        tokens=read.tokens,
    )


class _Batches:
    """Pictures that wait for others of their size, and the codes of those that had company."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.open: dict[tuple[int, ...], list[np.ndarray]] = {}
        self.numbers: dict[tuple[int, ...], int] = {}  # of the open batches
        self.futures: dict[int, Future[np.ndarray]] = {}

    def add(self, pixels: np.ndarray) -> tuple[int, int]:
        """Batch and place where the codes of a picture, uint8 [1, H, W, 3], will be."""
        batch, size = self.work.setup.settings.batch, pixels.shape
        self.numbers.setdefault(size, len(self.futures) + len(self.open))
        self.open.setdefault(size, []).append(pixels)
        place = self.numbers[size], len(self.open[size]) - 1
        if len(self.open[size]) == batch:
            self._encode(size)
        elif sum(map(len, self.open.values())) >= HELD * batch:
            self._encode(max(self.open, key=lambda size: len(self.open[size])))
        return place

    def finish(self) -> None:
        """Encode what still waits."""
        for size in list(self.open):
            self._encode(size)

    def codes(self, batch: int, place: int) -> np.ndarray:
        """Codes [H/8, W/8] of one picture."""
        return self.futures[batch].result()[place, 0]

    def _encode(self, size: tuple[int, ...]) -> None:
        self.futures[self.numbers.pop(size)] = self.work.later(np.stack(self.open.pop(size)))


def _uris(draft: Draft) -> list[str]:
    return [value for kind, _, value in draft.pieces if kind == "image"]
