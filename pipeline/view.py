"""The joined view: the columns of all stages, captions and verdicts, as one table of clips.

Joins are by uid, and whole columns at a time: a million clips are joined in seconds. Sources whose
bytes turn out to be equal only when they are read (objects of a bucket, members of tars) become
aliases of the first of them here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from unimodal.pipeline import caption, large
from unimodal.pipeline.clips import (
    BATCH,
    CAPTION,
    CLIPS,
    QUARANTINE,
    WATCH,
    read_parquet,
    table,
    write_parquet,
)
from unimodal.pipeline.parts import Part
from unimodal.pipeline.stage import PartFiles

Sidecars = Mapping[str, Sequence[tuple[str, int, int | str]]]


def live_rows(folder: Path, parts: Sequence[Part]) -> pa.Table:
    """Rows of the watch stage whose source is still an input, with the columns part and aliases.

    Sorted by uri, then start_pts. `folder` is the stage's.
    """
    tables = []
    aliases: dict[str, set[str]] = {}
    for part in parts:
        rows = read_parquet(PartFiles(folder, part.name).rows)
        aliases |= {s.uri: set(s.aliases) for s in part.sources if s.aliases}
        if len(part.sources) < part.members:
            live = pa.array([source.uri for source in part.sources], pa.string())
            rows = rows.filter(pc.is_in(rows.column("uri"), live))
        names = pa.array([part.name] * rows.num_rows, pa.string())
        tables.append(rows.append_column("part", names))
    rows = pa.concat_tables(tables) if tables else _no_rows()
    rows = large.one_piece(large.sort_by(rows, ["uri", "start_pts"]))
    rows = _collapse(rows, aliases)
    kind = CLIPS.field("aliases").type
    if aliases:
        lists = [sorted(aliases.get(uri, ())) for uri in rows.column("uri").to_pylist()]
        return rows.append_column("aliases", pa.array(lists, type=kind))
    return rows.append_column("aliases", _empty_lists(rows.num_rows, kind))


def with_columns(rows: pa.Table, files: Sequence[Path], schema: pa.Schema) -> pa.Table:
    """`rows` with the columns of `schema` joined by uid from Parquet files that have a uid too."""
    names = schema.names
    if not files:
        for name in names:
            rows = rows.append_column(name, pa.nulls(rows.num_rows, schema.field(name).type))
        return rows
    found = pa.concat_tables([read_parquet(file, columns=["uid", *names]) for file in files])
    return join(rows, found, schema)


def join(rows: pa.Table, found: pa.Table, schema: pa.Schema) -> pa.Table:
    """`rows` with the columns of `schema` from `found`, by uid; null where `found` has no row."""
    taken = large.one_piece(found.select(schema.names))
    if not rows.column("uid").equals(found.column("uid")):
        where = pc.index_in(rows.column("uid"), found.column("uid").combine_chunks())
        taken = large.take(taken, where.combine_chunks())
    for field in schema:
        rows = rows.append_column(field.name, taken.column(field.name).cast(field.type))
    return rows


def part_files(folder: Path, parts: Sequence[Part]) -> list[Path]:
    """The committed rows of all parts in a stage's folder."""
    return [PartFiles(folder, part.name).rows for part in parts]


def with_captions(
    clips: pa.Table, parts: Sequence[Part], given: caption.Given, sidecars: Sidecars
) -> tuple[pa.Table, list[dict[str, str]]]:
    """Clips with the columns captions and meta, and quarantine rows for sidecars that are sick."""
    texts: dict[str, list[caption.Caption]] = {}
    meta: dict[str, dict[str, str]] = {}
    unread = "this caption file cannot be read: "
    sick = [
        {"uri": uri, "stage": "caption", "reason": unread + why}
        for uri, why in sorted(given.sick.items())
    ]
    copied = clips.filter(pc.greater(pc.list_value_length(clips.column("aliases")), 0))
    aliases = dict(
        zip(*(copied.column(name).to_pylist() for name in ("uri", "aliases")), strict=True)
    )
    for part in parts:
        for source in part.sources:
            names = (source.uri, *aliases.get(source.uri, source.aliases))
            for uri in names:
                if uri in given.meta:
                    meta.setdefault(source.uri, given.meta[uri])
            found, unreadable = captions_of(names, given, sidecars)
            if found:
                texts[source.uri] = found
            sick += [
                {"uri": path, "stage": "caption", "reason": unread + why}
                for path, why in unreadable.items()
            ]
    kinds = pa.list_(CAPTION), CLIPS.field("meta").type
    columns = [_empty_lists(clips.num_rows, kind) for kind in kinds]
    if texts:
        spans = clips.select(["uri", "start_s", "end_s"]).to_batches(BATCH)
        said = [
            pa.array(
                [
                    caption.for_clip(texts.get(clip["uri"], ()), clip["start_s"], clip["end_s"])
                    for clip in some.to_pylist()
                ],
                type=kinds[0],
            )
            for some in spans
        ]
        columns[0] = pa.chunked_array(said, type=kinds[0])
    if meta:
        uris = clips.column("uri").to_pylist()
        columns[1] = pa.array([list(meta.get(uri, {}).items()) for uri in uris], type=kinds[1])
    clips = clips.append_column("captions", columns[0])
    return clips.append_column("meta", columns[1]), sick


def captions_of(
    uris: Sequence[str], given: caption.Given, sidecars: Sidecars
) -> tuple[list[caption.Caption], dict[str, str]]:
    """What people say of a source that lies at all of `uris`; and sidecars that are sick: why."""
    found = [said for uri in uris for said in given.captions.get(uri, ())]
    sick = {}
    for path in (path for uri in uris for path, _, _ in sidecars.get(uri, ())):
        try:
            found += caption.read_sidecar(path)
        except (OSError, ValueError) as error:
            sick[path] = str(error)
    return found, sick


def quarantined(folders: Sequence[Path], parts: Sequence[Part]) -> list[dict[str, str]]:
    """What the parts could not read in any of the stages' folders; its copies are named too."""
    rows = []
    for folder in folders:
        for part in parts:
            file = PartFiles(folder, part.name).quarantine
            if file.exists():
                live = {s.uri: (s.uri, *s.aliases) for s in part.sources}
                for row in read_parquet(file).to_pylist():
                    rows += [{**row, "uri": uri} for uri in live.get(row["uri"], ())]
    return sorted(rows, key=lambda row: (row["uri"], row["stage"], row["reason"]))


def write_view(
    out: Path, clips: pa.Table, refused: Sequence[dict[str, str]], folders: Mapping[str, str]
) -> None:
    """Write clips.parquet and quarantine.parquet of the run `out`, marked with what they are of."""
    mark = {"unimodal.made_of": json.dumps(folders, sort_keys=True)}
    write_parquet(table(refused, QUARANTINE), out / "quarantine.parquet", mark)
    write_parquet(clips.select(CLIPS.names).cast(CLIPS), out / "clips.parquet", mark)


def folders_of(out: Path) -> dict[str, str] | None:
    """Stage folders that the tables of the run `out` are made of.

    None if a table is not there, or they are not of the same: a run was killed between the two.
    """
    first, second = (made_of(out / name) for name in ("clips.parquet", "quarantine.parquet"))
    return first if first == second else None


def made_of(path: Path) -> dict[str, str] | None:
    """The stage folders in a table's own mark; None if there is no table or no mark."""
    if not path.exists():
        return None
    mark = (pq.read_schema(path).metadata or {}).get(b"unimodal.made_of")
    return json.loads(mark) if mark else None


def _collapse(rows: pa.Table, aliases: dict[str, set[str]]) -> pa.Table:
    """Leave out the rows of sources with the bytes of an earlier one, and note their names."""
    pairs = rows.select(["source_sha256", "uri"]).group_by(["source_sha256", "uri"]).aggregate([])
    if len(pc.unique(pairs.column("source_sha256"))) == pairs.num_rows:
        return rows
    first: dict[str, str] = {}
    copies: list[str] = []
    for pair in pairs.sort_by([("uri", "ascending")]).to_pylist():
        kept = first.setdefault(pair["source_sha256"], pair["uri"])
        if kept != pair["uri"]:
            copies.append(pair["uri"])
            aliases.setdefault(kept, set()).update({pair["uri"], *aliases.get(pair["uri"], ())})
    return rows.filter(pc.invert(pc.is_in(rows.column("uri"), pa.array(copies, pa.string()))))


def _empty_lists(count: int, kind: pa.DataType) -> pa.Array:
    return pa.array([[]], type=kind).take(pa.array([0] * count, pa.int32()))


def _no_rows() -> pa.Table:
    return WATCH.empty_table().append_column("part", pa.array([], pa.string()))
