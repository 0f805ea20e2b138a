"""The stages as filters: clip rows as JSON Lines in, the same rows with more columns out.

    unimodal cut videos/ | unimodal flow | jq -c 'select(.duration_s > 3)' | unimodal text

`cut` decodes everything once into a run directory in the cache, and its rows name the tar that
holds their pictures (`frames_tar`). Later filters read that; where it is gone, or was made with
other settings, they decode the span of the clip. Keys that no stage knows ride along.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa

from unimodal.pipeline import caption, decide, dedup, score, view, watch
from unimodal.pipeline import stages as stages_of
from unimodal.pipeline.again import look_again
from unimodal.pipeline.captioning import describe
from unimodal.pipeline.captioning.requests import (
    Request,
    count_of,
    prepared,
    requests_of,
    without_frames,
)
from unimodal.pipeline.clips import CLIPS, WATCH, read_parquet
from unimodal.pipeline.engine import choose
from unimodal.pipeline.errors import MediaError, UsageError
from unimodal.pipeline.frames import Clip, read_clip
from unimodal.pipeline.presets import CurateSettings
from unimodal.pipeline.progress import Progress
from unimodal.pipeline.run import Run, curate
from unimodal.pipeline.stage import Stage
from unimodal.pipeline.stages import SKIPPABLE

Row = dict[str, Any]

SPAN_KEYS = ("start_s", "start_pts", "end_pts", "time_base", "width", "height")

FLOW = ("flow_mean", "flow_median", "flow_p90")


def cache_folder() -> Path:
    """Where `cut` keeps its pass: $UNIMODAL_CACHE, else unimodal/ in the user's cache directory."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("UNIMODAL_CACHE") or Path(base) / "unimodal")


def read_rows(lines: Iterable[str]) -> Iterator[Row]:
    """Clip rows of JSON Lines; raises `UsageError` that names the first line that is none."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"standard input, line {number}: not JSON ({error})") from error
        if not isinstance(row, dict) or not {"uid", "uri", "kind"} <= row.keys():
            raise UsageError(
                f"standard input, line {number}: not a clip row (it needs uid, uri and kind); "
                "rows come from `unimodal cut`"
            )
        lacks = [name for name in SPAN_KEYS if row["kind"] == "video" and row.get(name) is None]
        if lacks:
            raise UsageError(f"standard input, line {number}: a video without {', '.join(lacks)}")
        yield row


def cut_rows(
    inputs: Sequence[str | Path],
    settings: CurateSettings,
    cache: Path,
    *,
    progress: Progress | None = None,
    limit: int | None = None,
    **engine: Any,
) -> tuple[Iterator[Row], Run]:
    """Rows of all clips of `inputs`, after one decode into `cache`; and the run it was kept in."""
    bare = settings.model_copy(update={"skip": SKIPPABLE, "report": False})
    asked = json.dumps([sorted(os.path.abspath(i) for i in inputs), bare.watch().digest(), limit])  # noqa: PTH100
    out = cache / f"cut-{hashlib.sha256(asked.encode()).hexdigest()[:16]}"
    run = curate(inputs, out, bare, progress=progress, limit=limit, **engine)
    told = {*WATCH.names, "part", "aliases", "meta"} - {*FLOW}
    names = [name for name in CLIPS.names if name in told]

    def rows() -> Iterator[Row]:
        for batch in run.clips.select(names).to_batches(max_chunksize=1000):
            for row in batch.to_pylist():
                kept = run.samples(row["part"])[row["uid"]]
                tar = str(run.frames_tar(row["part"]))
                meta = dict(row["meta"] or [])
                yield {**row, "meta": meta, "samples": kept, "frames_tar": tar}

    return rows(), run


def flow_rows(rows: Iterable[Row], settings: CurateSettings, progress: Progress) -> Iterator[Row]:
    """Rows with the motion scores; nothing is decoded where the pass is still in the cache."""
    folder = Stage("watch", watch.VERSION, settings.watch().digest()).folder
    for row in rows:
        tar = Path(row.get("frames_tar") or "")
        kept = _watched(str(tar)) if tar.parent.name == folder else {}
        found: Mapping[str, Any] = kept.get(row["uid"], {})
        if not found:
            try:
                found = look_again(row, settings.watch()).row
            except (MediaError, OSError) as error:
                progress.note(f"{row['uri']}: {error}; its scores are null")
        yield {**row, **{name: found.get(name) for name in FLOW}}


def score_rows(
    rows: Iterable[Row], stages: Sequence[str], settings: CurateSettings, progress: Progress
) -> Iterator[Row]:
    """Rows with the columns of the scorers in `stages`; those without weights are told of."""
    active = []
    for name in stages:
        if why := stages_of.why_not(name, settings):
            progress.note(f"{name} is skipped: {why}")
        else:
            active.append(name)
    for row in rows:
        found: Row = {}
        try:
            clip = _clip(row, settings) if active else None
        except (MediaError, OSError) as error:
            progress.note(f"{row['uri']}: {error}; its scores are null")
            clip = None
        for name in active:
            columns = score.module(name).COLUMNS.names
            found |= dict.fromkeys(columns)
            if clip is not None:
                found |= score.loaded(name, getattr(settings, name))([clip])[0]
        yield {**row, **found}


def dedup_rows(rows: Iterable[Row], settings: CurateSettings) -> Iterator[Row]:
    """Rows with their near-duplicate groups; all rows are read before the first is written."""
    held = list(rows)
    groups = dedup.group(_table(held), settings.dedup, _embeddings(held))
    found = {row["uid"]: row for row in groups.to_pylist()}
    for row in held:
        yield {**row, **found[row["uid"]]}


def decide_rows(rows: Iterable[Row], settings: CurateSettings) -> Iterator[Row]:
    """Rows with verdict and reasons; all rows are read before the first is written."""
    held = list(rows)
    verdicts = decide.decide(_table(held), settings.decide).to_pylist()
    for row, judged in zip(held, verdicts, strict=True):
        yield {**row, **judged}


def caption_rows(
    rows: Iterable[Row],
    settings: CurateSettings,
    given: caption.Given,
    progress: Progress,
    opened: describe.Open | None = None,
    engine: str = "auto",
    address: str | None = None,
) -> Iterator[Row]:
    """Rows with captions: given, beside their source, or of a model if the settings name one.

    All rows are read before the first is written. A model is not asked for rows whose verdict is
    drop. `opened` opens a source that `describe.open_source` does not know.
    """
    held = list(rows)
    said: dict[str, list[Row]] = {}
    if settings.caption.by_model:
        opened = opened or (lambda own: describe.open_source(own, choose(engine, address), address))
        said = _described(held, settings, progress, opened)
    uris = {uri for row in held for uri in (row["uri"], *(row.get("aliases") or ()))}
    sidecars = caption.find_sidecars(sorted(uris), settings.caption.sidecar)
    for row in held:
        names = (row["uri"], *(row.get("aliases") or ()))
        found, sick = view.captions_of(names, given, sidecars)
        for path, why in sick.items():
            progress.note(f"{path}: {why}")
        captions = caption.for_clip(found, row.get("start_s"), row.get("end_s"))
        own = said.get(row["uid"], [])
        captions = own + captions if settings.caption.first == "model" else captions + own
        yield {**row, "captions": captions}


def _described(
    rows: Sequence[Row], settings: CurateSettings, progress: Progress, opened: describe.Open
) -> dict[str, list[Row]]:
    """What a model says of rows, by uid."""
    own, prompt = settings.caption, describe.prompt_of(settings.caption)
    unique = {row["uid"]: row for row in rows if row.get("verdict") != "drop"}

    def requests() -> Iterator[Request]:
        for row in unique.values():
            try:
                yield from requests_of(_clip(row, settings), own)
            except (MediaError, OSError) as error:
                yield from without_frames(row, own, str(error))

    captioner = opened(own)
    found = []
    progress.begin("captions", sum(count_of(row, own) for row in unique.values()), "requests")
    try:
        for answer in describe.answered(prepared(requests(), own, 16), captioner, own, prompt):
            progress.advance("captions")
            found.append(answer)
            if answer["status"] != "ok":
                uri, detail = unique[answer["uid"]]["uri"], answer["detail"]
                progress.note(f"{uri}: {answer['status']}" + (f" ({detail})" if detail else ""))
    finally:
        captioner.close()
        progress.end("captions")
    return describe.by_clip(sorted(found, key=lambda one: (one["uid"], one["piece"])))


def _clip(row: Row, settings: CurateSettings) -> Clip:
    path = row.get("frames_tar")
    if path and row.get("samples") and Path(path).exists():
        try:
            return read_clip(_tar(path), row)
        except (KeyError, tarfile.TarError):
            pass  # the cache was made anew since, or is none
    return look_again(row, settings.watch())


@lru_cache(maxsize=4)
def _tar(path: str) -> tarfile.TarFile:
    return tarfile.open(path)


@lru_cache(maxsize=4)
def _watched(tar: str) -> dict[str, Row]:
    file = Path(tar.removesuffix(".frames.tar") + ".parquet")
    if not file.exists():
        return {}
    return {row["uid"]: row for row in read_parquet(file, columns=["uid", *FLOW]).to_pylist()}


def _table(rows: Sequence[Row]) -> pa.Table:
    """Rows as a table: known columns as `clips.CLIPS` has them, other plain values as they are."""
    known = [field for field in CLIPS if field.name not in ("verdict", "reasons", "meta")]
    known.append(WATCH.field("samples"))
    columns = {
        field.name: pa.array([row.get(field.name) for row in rows], type=field.type)
        for field in known
    }
    others = {key for row in rows for key in row} - {
        *CLIPS.names,
        "samples",
        "embedding",
        "frames_tar",
    }
    for key in sorted(others):
        try:
            columns[key] = pa.array([row.get(key) for row in rows])
        except (pa.ArrowInvalid, pa.ArrowTypeError):
            continue  # of several kinds: no rule can speak of it
    return pa.table(columns)


def _embeddings(rows: Sequence[Row]) -> pa.Table | None:
    found = [(row["uid"], row["embedding"]) for row in rows if row.get("embedding")]
    if not found:
        return None
    uids, vectors = zip(*found, strict=True)
    return pa.table({"uid": uids, "embedding": pa.array(vectors, pa.list_(pa.float32()))})
