"""The stages after watch that work part by part: text, quality, embed, nsfw, match.

    watch-…/<part>.{parquet,frames.tar} ──> a scorer ──> text-…/<part>.parquet: uid and its columns

A clip that a scorer fails on gets nulls and a quarantine row; nulls never drop a clip. A model is
loaded once per process and kept from part to part.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from unimodal.pipeline.clips import first_text, read_parquet, table
from unimodal.pipeline.errors import MediaError, UnimodalError, reason, telling_full_disk
from unimodal.pipeline.frames import Clip, read_clips
from unimodal.pipeline.stage import PartFiles
from unimodal.pipeline.tell import Tell

if TYPE_CHECKING:
    from unimodal.pipeline.worker import Job, Step

SCORERS = ("text", "quality", "embed", "nsfw")
"""Modules of `pipeline/scorers` that read pictures, in the order in which they run."""

CAPTIONS = 8192
"""Captions that the match stage reads at once at least: a part has not to read all of them."""

Scorer = Callable[[Sequence[Clip]], list[dict[str, Any]]]

_LOADED: dict[tuple[str, str], Any] = {}


def module(stage: str) -> Any:
    """The module of a scorer: its VERSION, COLUMNS, BATCH, absent and load."""
    return importlib.import_module(f"unimodal.pipeline.scorers.{stage}")


def loaded(stage: str, settings: Any) -> Any:
    """The scorer of `stage`, its model in memory."""
    key = (stage, settings.model_dump_json())
    if key not in _LOADED:
        _LOADED[key] = module(stage).load(settings)
    return _LOADED[key]


def score_part(job: Job, step: Step, poison: Mapping[str, str], tell: Tell) -> None:
    """Score the clips of a part that the watch stage kept in `step.reads`; commit the columns.

    Clips in `poison` (uid: reason) have killed a worker before and are not looked at; with
    `job.one_by_one` it is known which clip does so. Raises `UnimodalError` if the model cannot be
    loaded or the disk is full.
    """
    part, stage, folder = job.part, step.stage, Path(step.folder)
    scorer = module(stage)
    settings = getattr(scorer, f"{stage.capitalize()}Settings").model_validate(step.settings)
    score = loaded(stage, settings)
    tell.seconds(0.0)  # a model took its time to load: that was no stuck clip
    rows: list[dict[str, Any]] = []
    quarantined: list[dict[str, str]] = []
    with telling_full_disk(folder):
        waiting = read_clips(Path(step.reads), part)
        while clips := list(islice(waiting, 1 if job.one_by_one else scorer.BATCH)):
            tell.begin(stage, clips[0].row["uid"])
            for clip, found, why in _scored(clips, score, poison):
                rows.append({"uid": clip.row["uid"], **found})
                if why:
                    uri, line = clip.row["uri"], f"clip {clip.row['uid']}: {why}"
                    quarantined.append({"uri": uri, "stage": stage, "reason": line, "part": part})
                tell.done(stage, clip.row["uid"], why)
        schema = pa.schema([pa.field("uid", pa.string(), nullable=False), *scorer.COLUMNS])
        PartFiles(folder, part).commit(table(rows, schema), quarantined)


def match_part(job: Job, step: Step, tell: Tell) -> None:
    """Compare the first caption of each clip with its embedding, and commit the cosines.

    `step.captions` has the columns part, uid and captions, sorted by part. The column `of` says
    which text it was.
    """
    part = job.part
    settings = module("embed").EmbedSettings.model_validate(step.settings)
    tell.begin("match", part)
    rows = read_parquet(PartFiles(Path(step.reads), part).rows, columns=["uid", "embedding"])
    mine = [("part", "==", part)]
    first = first_texts(pq.read_table(step.captions, columns=["uid", "captions"], filters=mine))
    vectors = {row["uid"]: row["embedding"] for row in rows.to_pylist() if row["uid"] in first}
    known = [uid for uid, vector in vectors.items() if vector is not None]
    cosines: dict[str, float] = {}
    for at in range(0, len(known), 64):
        some = known[at : at + 64]
        units = np.asarray([vectors[uid] for uid in some], np.float32)
        found = loaded("match", settings)([first[uid] for uid in some], units)
        cosines |= zip(some, found, strict=True)
        tell.seconds(0.0)
    columns = [pa.field("uid", pa.string(), nullable=False), *module("match").COLUMNS]
    schema = pa.schema([*columns, pa.field("of", pa.string())])
    compared = (
        {"uid": uid, "text_match": cosines.get(uid), "of": text_digest(first[uid])}
        for uid in vectors
    )
    PartFiles(Path(step.folder), part).commit(table(compared, schema), [])
    tell.done("match", part, "")


def first_texts(captions: pa.Table) -> dict[str, str]:
    """The caption to use of each clip that has one; a table with the columns uid and captions."""
    rows = captions.select(["uid", "captions"]).to_pylist()
    return {row["uid"]: text for row in rows if (text := first_text(row))}


def text_digest(text: str) -> str:
    """Name of a text, 16 hex digits."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _scored(
    clips: Sequence[Clip], score: Scorer, poison: Mapping[str, str]
) -> Iterator[tuple[Clip, dict[str, Any], str]]:
    """Each clip with what was found, and why nothing was."""
    healthy = [clip for clip in clips if clip.row["uid"] not in poison]
    found: dict[str, dict[str, Any]] = {}
    try:
        found = dict(zip((c.row["uid"] for c in healthy), score(healthy), strict=True))
    except Exception as error:  # one clip of the batch is at fault, or the model is
        if isinstance(error, UnimodalError) and not isinstance(error, MediaError):
            raise
    for clip in clips:
        uid = clip.row["uid"]
        if uid in found:
            yield clip, found[uid], ""
        elif uid in poison:
            yield clip, {}, poison[uid]
        else:
            try:
                yield clip, score([clip])[0], ""
            except Exception as error:
                yield clip, {}, reason(error)
