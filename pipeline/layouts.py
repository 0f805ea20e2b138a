"""A run as a data set for other tools: its clips encoded to the frame, with the tables they read.

    huggingface   videos/{uid}.mp4, videos/metadata.jsonl; images/ likewise; videos.parquet;
                  what is known of each clip in videos/.clips
                  for `datasets` (videofolder, imagefolder), finetrainers, video-dataset-scripts
    open-sora     files/{uid}.mp4 and .png, meta.csv and meta.parquet
    webdataset    {part}.tar with {uid}.mp4 or .png, {uid}.txt, {uid}.json
                  for webdataset, `datasets` and Megatron-Energon

Always cut exactly: those tools take numbers of frames, sizes and rates from the tables, and know
nothing of a lead-in, of rotation tags or of uneven frame rates.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
import shutil
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, get_args

import pyarrow as pa
import pyarrow.compute as pc

from unimodal.pipeline import large
from unimodal.pipeline.clips import first_text, write_parquet
from unimodal.pipeline.errors import UnimodalError, UsageError, telling_full_disk
from unimodal.pipeline.export import VERSION, Exported, export_clips, write_lines
from unimodal.pipeline.files import atomic
from unimodal.pipeline.progress import Progress
from unimodal.pipeline.run import Run
from unimodal.pipeline.where import rows_where

Layout = Literal["huggingface", "open-sora", "webdataset"]

NOTES = ".clips"
"""`datasets` passes over names with a dot; .json and .txt would make a folder one of texts."""

OPEN_SORA = ["path", "text", "num_frames", "height", "width", "aspect_ratio", "resolution", "fps"]
"""Columns that Open-Sora 2.0 requires (its docs/train.md); aspect_ratio is height / width."""


def export_dataset(
    run: Run,
    out: Path | str,
    layout: Layout,
    *,
    where: str = "verdict = 'keep'",
    crop: bool = False,
    crf: int = 18,
    progress: Progress | None = None,
) -> Exported:
    """Write the clips of a run for which `where` holds, in the layout of another tool.

    What is there already and whole is kept. The first caption of a clip is its text, on one line;
    a clip without one has the empty text. Raises as `export_clips` does.
    """
    out, progress = Path(out), progress or Progress()
    if layout not in get_args(Layout):
        raise UsageError(f"no layout {layout}: there are {', '.join(get_args(Layout))}")
    chosen = large.take(run.clips, rows_where(run.clips, where, "clips"))
    scores = [field.name for field in chosen.schema if pa.types.is_floating(field.type)]
    given: dict[str, Any] = {"mode": "exact", "crop": crop, "crf": crf, "progress": progress}
    done = Exported(out)
    with telling_full_disk(out):
        out.mkdir(parents=True, exist_ok=True)
        if layout == "webdataset":
            return _tars(run, chosen, out, given, done)
        if layout == "open-sora":
            done = export_clips(run, out / "files", where=chosen, **given)
            rows = [_open_sora(row, out / "files", scores) for row in _exported(out / "files")]
            _tables(out, rows, [*OPEN_SORA, "uid", *_known(rows, scores)])
        else:
            for kind in ("image", "video"):
                rows, folder = _of(chosen, "kind", kind), out / f"{kind}s"
                if rows.num_rows:
                    _add(done, export_clips(run, folder, where=rows, notes=NOTES, **given))
                    _folder(folder, scores)
    done.out = out
    return done


def _of(rows: pa.Table, column: str, value: str) -> pa.Table:
    return rows.filter(pc.equal(rows.column(column), value))


def _add(done: Exported, more: Exported) -> None:
    done.written += more.written
    done.kept += more.kept
    done.failed += more.failed


def _exported(folder: Path) -> Iterator[dict[str, Any]]:
    with (folder / "clips.jsonl").open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def caption(row: Mapping[str, Any]) -> str:
    """The first caption of a clip on one line, without control characters; empty if it has none."""
    return " ".join(re.sub(r"[\x00-\x1f\x7f]+", " ", first_text(row) or "").split())


def _known(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[str]:
    """Columns that any row has a value for, without those that the layout has already."""
    return [n for n in names if n not in OPEN_SORA and any(row[n] is not None for row in rows)]


def _folder(folder: Path, scores: Sequence[str]) -> None:
    """What `datasets` reads beside media, and a table of files where these are videos."""
    rows = [
        {
            "file_name": row["export"]["file"],
            "caption": caption(row),
            "uid": row["uid"],
            "frames": row["frames"] or 1,
            "width": row["export"]["width"],
            "height": row["export"]["height"],
            **{name: row[name] for name in scores},
        }
        for row in _exported(folder / NOTES)
    ]
    empty = {name for name in scores if all(row[name] is None for row in rows)}
    rows = [{key: value for key, value in row.items() if key not in empty} for row in rows]
    with atomic(folder / "metadata.jsonl") as temporary, temporary.open("w") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")  # as ASCII: no line breaks but ours
    if folder.name == "videos":  # beside the folder: inside, finetrainers would take it for tars
        files = [{"file": row.pop("file_name"), **row} for row in rows]
        write_parquet(pa.Table.from_pylist(files), folder.with_name("videos.parquet"))


def _open_sora(row: Mapping[str, Any], folder: Path, scores: Sequence[str]) -> dict[str, Any]:
    height, width = row["export"]["height"], row["export"]["width"]
    return {
        "path": str((folder / row["export"]["file"]).absolute()),
        "text": caption(row),
        "num_frames": row["frames"] or 1,
        "height": height,
        "width": width,
        "aspect_ratio": height / width,
        "resolution": height * width,
        "uid": row["uid"],
        **{name: row[name] for name in scores},  # fps among them; none for an image
    }


def _tables(out: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """The same as CSV, and as Parquet, in which a text may be "None" without becoming nothing."""
    with atomic(out / "meta.csv") as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    kept = [{name: row[name] for name in columns} for row in rows]
    write_parquet(pa.Table.from_pylist(kept), out / "meta.parquet")


def _tars(
    run: Run,
    chosen: pa.Table,
    out: Path,
    given: Mapping[str, Any],
    done: Exported,
) -> Exported:
    """A tar for each part of the run: no source is in two, so a split by tars is one by sources.

    `tars.json` says what each was made of; it is written after them, and tells what is done.
    """
    listed = out / "tars.json"
    made: dict[str, Any] = {}
    with suppress(OSError, ValueError):  # none yet, or damaged: all tars are made again
        made = json.loads(listed.read_text())
    if not isinstance(made, dict) or not all(isinstance(one, dict) for one in made.values()):
        made = {}
    parts = sorted(set(chosen.column("part").to_pylist()))
    for part in {*parts, *made}:
        if not re.fullmatch("[0-9a-f]{16}", part):  # it becomes a file's name
            raise UnimodalError(f"{part!r} is no name of a part: curate into a new run")
    for stale in set(made) - set(parts):
        (out / f"{stale}.tar").unlink(missing_ok=True)
        del made[stale]
    captioned: dict[str, list[Any]] = {part: [] for part in parts}
    for row in chosen.select(["part", "uid", "captions"]).to_pylist():
        captioned[row["part"]].append([row["uid"], caption(row)])
    for part in parts:
        tar, files = out / f"{part}.tar", out / f".{part}"
        asked = json.dumps([VERSION, given["crop"], given["crf"], captioned[part]])
        digest = hashlib.sha256(asked.encode()).hexdigest()[:16]
        if made.get(part, {}).get("digest") == digest and tar.exists():
            done.kept += made[part]["clips"]
            continue
        more = export_clips(run, files, where=_of(chosen, "part", part), **given)
        rows = list(_exported(files))
        with (
            atomic(tar) as temporary,
            tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as to,
        ):
            for row in rows:
                _pack(to, row, files)
        _add(done, more)
        # With something missing, the next run tries it again.
        made[part] = {"digest": "" if more.failed else digest, "clips": len(rows)}
        with atomic(listed) as temporary:
            temporary.write_text(json.dumps(made, indent=1, sort_keys=True) + "\n")
        shutil.rmtree(files)
    write_lines(out / "failed.jsonl", done.failed)
    return done


def _pack(tar: tarfile.TarFile, row: Mapping[str, Any], folder: Path) -> None:
    """Append a clip: equal clips give equal bytes."""
    file = row["export"]["file"]
    note = json.dumps(row, ensure_ascii=False, sort_keys=True).encode()
    for name, data in (
        (f"{row['uid']}.json", note),
        (file, (folder / file).read_bytes()),
        (f"{row['uid']}.txt", caption(row).encode()),
    ):
        info = tarfile.TarInfo(name)
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
