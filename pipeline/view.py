"""The joined view: columns of all stages, captions and verdicts, as one table of clips.

It is made again only when one of the folders that it is made of has changed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from unimodal.pipeline import caption, decide
from unimodal.pipeline.clips import CAPTION, CLIPS, QUARANTINE, WATCH, table, write_parquet
from unimodal.pipeline.parts import Part, digest
from unimodal.pipeline.presets import CurateSettings
from unimodal.pipeline.progress import Progress
from unimodal.pipeline.stage import PartFiles, Stage


def write_view(
    out: Path,
    parts: Sequence[Part],
    stage: Stage,
    settings: CurateSettings,
    given: caption.Given,
    progress: Progress,
) -> dict[str, str]:
    """Write clips.parquet and quarantine.parquet of the run `out`.

    Returns the folder of every stage that they were made of. Raises `UsageError` for a rule that
    does not evaluate.
    """
    uris = [uri for p in parts for s in p.sources for uri in (s.uri, *s.aliases)]
    sidecars = caption.find_sidecars(uris, settings.caption.sidecar)
    lying = hashlib.sha256(json.dumps(sorted(sidecars.items())).encode()).hexdigest()
    live = digest(parts)
    captions = Stage(
        "caption",
        caption.VERSION,
        settings.caption.digest(),
        (stage.folder, live, lying, given.digest()),
    )
    verdicts = Stage(
        "decide", decide.VERSION, settings.decide.digest(), (stage.folder, live, captions.folder)
    )
    folders = {s.name: s.folder for s in (stage, captions, verdicts)}
    view, quarantine = out / "clips.parquet", out / "quarantine.parquet"
    made_of = json.dumps(folders, sort_keys=True)
    if _made_of(view) == _made_of(quarantine) == made_of:
        return folders
    clips = _live_rows(out / stage.folder, parts)
    clips, sick = _with_captions(clips, parts, given, sidecars, out / captions.folder)
    verdict_file = out / verdicts.folder / "verdicts.parquet"
    if not verdict_file.exists():
        write_parquet(decide.decide(clips, settings.decide), verdict_file)
    judged = {row["uid"]: row for row in pq.read_table(verdict_file).to_pylist()}
    uids = clips.column("uid").to_pylist()
    for name in ("verdict", "reasons"):
        column = pa.array([judged[uid][name] for uid in uids], type=CLIPS.field(name).type)
        clips = clips.append_column(name, column)
    refused = [*_quarantined(out / stage.folder, parts), *sick]
    for row in refused[:20]:
        progress.note(f"quarantined {row['uri']}: {row['reason']}")
    if len(refused) > 20:
        progress.note(f"… and {len(refused) - 20} more, see {quarantine}")
    mark = {"unimodal.made_of": made_of}
    write_parquet(table(refused, QUARANTINE), quarantine, mark)
    for name in CLIPS.names:
        if name not in clips.column_names:  # its stage was not asked for
            kind = CLIPS.field(name).type
            clips = clips.append_column(name, pa.nulls(clips.num_rows, kind))
    write_parquet(clips.select(CLIPS.names).cast(CLIPS), view, mark)
    return folders


def _live_rows(folder: Path, parts: Sequence[Part]) -> pa.Table:
    """Rows of all parts whose source is still an input, with the columns part and aliases."""
    tables = []
    for part in parts:
        rows = pq.read_table(PartFiles(folder, part.name).rows, schema=WATCH)
        aliases = {source.uri: sorted(source.aliases) for source in part.sources}
        if len(part.sources) < part.members:
            rows = rows.filter(pc.is_in(rows.column("uri"), pa.array(list(aliases), pa.string())))
        uris = rows.column("uri").to_pylist()
        column = pa.array([aliases[uri] for uri in uris], type=CLIPS.field("aliases").type)
        rows = rows.append_column("part", pa.array([part.name] * len(uris), pa.string()))
        tables.append(rows.append_column("aliases", column))
    rows = pa.concat_tables(tables)
    return rows.sort_by([("uri", "ascending"), ("start_pts", "ascending")]).combine_chunks()


def _with_captions(
    clips: pa.Table,
    parts: Sequence[Part],
    given: caption.Given,
    sidecars: Mapping[str, Sequence[tuple[str, int, int]]],
    folder: Path,
) -> tuple[pa.Table, list[dict[str, str]]]:
    """Clips with the columns captions and meta, and quarantine rows for sidecars that are sick."""
    texts: dict[str, list[caption.Caption]] = {}
    meta: dict[str, dict[str, str]] = {}
    sick: list[dict[str, str]] = []
    for part in parts:
        for source in part.sources:
            found: list[caption.Caption] = []
            names = (source.uri, *source.aliases)
            for uri in names:
                found += given.captions.get(uri, [])
                meta.setdefault(source.uri, given.meta.get(uri, {}))
            for uri in names:
                for path, _, _ in sidecars.get(uri, []):
                    try:
                        found += caption.read_sidecar(Path(path))
                    except (OSError, ValueError) as error:
                        reason = f"this caption file cannot be read: {error}"
                        sick.append({"uri": path, "stage": "caption", "reason": reason})
            texts[source.uri] = found
    spans = clips.select(["uid", "uri", "start_s", "end_s"]).to_pylist()
    rows = [caption.for_clip(texts[clip["uri"]], clip["start_s"], clip["end_s"]) for clip in spans]
    column = pa.array(rows, type=pa.list_(CAPTION))
    file = folder / "captions.parquet"
    if not file.exists():
        write_parquet(pa.table({"uid": clips.column("uid"), "captions": column}), file)
    along = [list(meta[clip["uri"]].items()) for clip in spans]
    clips = clips.append_column("captions", column)
    return clips.append_column("meta", pa.array(along, type=CLIPS.field("meta").type)), sick


def _quarantined(folder: Path, parts: Sequence[Part]) -> list[dict[str, str]]:
    rows = []
    for part in parts:
        file = PartFiles(folder, part.name).quarantine
        if file.exists():
            live = {source.uri for source in part.sources}
            rows += [r for r in pq.read_table(file).to_pylist() if r["uri"] in live]
    return sorted(rows, key=lambda row: row["uri"])


def _made_of(path: Path) -> str | None:
    """The folders that a view was made of, from the file's own metadata."""
    if not path.exists():
        return None
    marks = pq.read_schema(path).metadata or {}
    return marks.get(b"unimodal.made_of", b"").decode()
