"""Samples of one unit: its clips, or rows of files, read ahead and encoded in batches.

    windows of clips                          -> pictures -> codes ─┐
    corpora.drafts -> pictures, texts counted -> codes of pictures ─┴> Sample

A clip, or a row, of which a picture or a text cannot be had goes to the quarantine as a whole.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from unimodal.pipeline.errors import MediaError, reason
from unimodal.tokenize.corpora import Draft, RowUnit, drafts, finite
from unimodal.tokenize.document import Image, Piece, Text, parts_length
from unimodal.tokenize.pictures import fit, image_pixels, video_pixels
from unimodal.tokenize.plan import Unit, Window, captions_of, score_columns, split_of, windows
from unimodal.tokenize.shard import Sample

if TYPE_CHECKING:
    from unimodal.tokenize.unit import Codes, Work

STAGE = "tokenize"


def clips(work: Work, unit: Unit) -> tuple[list[Sample], list[dict[str, str]]]:
    """Samples of a unit of clips, and rows {uri, reason} of those that gave none."""
    images = sorted((w for w in unit.windows if w.fps is None), key=lambda w: (w.size, w.key))
    videos = [w for w in unit.windows if w.fps is not None]
    films = [list(same) for _, same in groupby(videos, key=lambda w: w.clip["uid"])]
    things = [[window] for window in images] + films
    uris = [thing[0].clip["uri"] for thing in things]
    # A file that killed a worker is not touched again, whichever clip of it did so.
    killed = [work.poison.get(work.thing(k), "") for k in range(len(things))]
    killers = {uri: why for uri, why in zip(uris, killed, strict=True) if why}

    def reads(some: Iterable[list[Window]]) -> Iterator[list[Callable[[], np.ndarray]]]:
        # One after another: a stream that was read holds its decoder, and the last window's pixels.
        for thing in some:
            stream = _pixels(work, thing, killers.get(thing[0].clip["uri"], ""))
            yield [partial(next, stream)] * len(thing)

    most, count = 2 * work.setup.settings.batch, len(images)
    # The windows of a video come out of one decoder, one after another.
    pictures = chain(
        work.ahead(reads(things[:count]), 0, work.threads, most),
        work.ahead(reads(films), count, min(work.threads, 1), 2),
    )
    found: list[tuple[Window, Codes]] = []
    lost = list(unit.unfit)
    for thing, uri in zip(things, uris, strict=True):
        whole: list[tuple[Window, Codes]] = []
        failed: Exception | None = None
        for window in thing:
            got = next(pictures)
            if isinstance(got, Exception):
                failed = failed or got
            elif failed is None:
                whole.append((window, work.image(got) if window.fps is None else work.film(got)))
        if failed is None:
            found += whole
        else:
            lost.append({"uri": uri, "reason": reason(failed)})
    work.close(*work.open)
    for k in range(len(things), len(things) + len(unit.unfit)):
        work.tell.done(STAGE, work.thing(k), "")
    return [_sample(work, w, codes().reshape(-1, *w.grid)) for w, codes in found], lost


def _pixels(work: Work, clip: Sequence[Window], killed: str) -> Iterator[np.ndarray]:
    """uint8 [1, H, W, 3] of an image, or [F, H, W, 3] of each window of a video."""
    if killed:
        raise MediaError(killed)
    if clip[0].fps is None:
        yield image_pixels(clip[0], work.tick)[None]
    else:
        yield from video_pixels(clip, work.tick)


def _sample(work: Work, window: Window, codes: np.ndarray) -> Sample:
    """The window with its codes [T, H/8, W/8] and everything that is known of its clip."""
    clip, setup = window.clip, work.setup
    start, end = window.span()
    return Sample(
        key=window.key,
        uid=clip["uid"],
        kind=clip["kind"],
        codes=codes,
        split=split_of(clip["source_sha256"], setup.settings.val_fraction),
        source_sha256=clip["source_sha256"],
        fps=None if window.fps is None else float(window.fps),
        start_s=start,
        end_s=end,
        captions=captions_of(clip.get("captions"), start, end, setup.vocabulary),
        scores={name: finite(clip[name]) for name in score_columns(setup.clips.schema)},
        meta=dict(clip.get("meta") or []),
    )


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
    killed = {k: why for k in range(len(rows)) if (why := work.poison.get(work.thing(k)))}
    # A picture that killed a worker is not touched again, whichever row shows it; of several in
    # a row, nobody knows which it was.
    alone = {k: uris[0] for k in killed if len(uris := _uris(rows[k])) == 1}
    killers = {uri: killed[k] for k, uri in alone.items()}
    reads = [[partial(_read, work, row, killed.get(k, ""), killers)] for k, row in enumerate(rows)]
    done: list[tuple[Read, list[Codes]]] = []
    lost: list[dict[str, str]] = []
    for row, got in zip(rows, work.ahead(reads, 0, work.threads, 2 * work.threads), strict=True):
        if isinstance(got, Exception):
            lost.append({"uri": row.where, "reason": reason(got)})
        else:
            done.append((got, [work.image(pixels) for pixels in got.pictures]))
            got.pictures.clear()  # what waits for its batch is held there
    work.close(*work.open)
    return [_document(work, read, [get()[0] for get in codes]) for read, codes in done], lost


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

    setup = work.setup
    with fetch.local(uri, keep=True, tick=work.tick) as path:
        shown = read_image(path)
        read.source_sha256 = read.source_sha256 or sha256_of(path)
    row = {"uid": "picture", "kind": "image", "height": shown.shape[0], "width": shown.shape[1]}
    factor = setup.tokenizer.spatial_factor
    (window,) = windows(row, setup.settings, setup.vocabulary, factor)
    read.pictures.append(fit(shown, window)[None])
    return dict(zip(("height", "width"), window.grid, strict=True))


def _document(work: Work, read: Read, codes: list[np.ndarray]) -> Sample:
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


def _uris(draft: Draft) -> list[str]:
    return [value for kind, _, value in draft.pieces if kind == "image"]
