"""New captions for old codes: the index of each shard is written again, and nothing else.

    run/clips.parquet -> captions by uid and window -> shard-NNNNN.parquet

The index is the authority for captions; the {key}.json inside a tar keeps those of its making, as
a tar is not touched. Each file is replaced as a whole, so a run that was killed goes on where it
was, and readers find the old captions or the new.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from unimodal.pipeline.clips import read_parquet, write_parquet
from unimodal.pipeline.files import sweep
from unimodal.pipeline.lock import run_lock
from unimodal.pipeline.progress import Progress
from unimodal.tokenize.plan import (
    TokenizeSettings,
    captions_of,
    clips_file,
    kept_clips,
    units,
)
from unimodal.tokenize.shards import HEADER, Shards

TASK = "captions"


def refresh(run_dir: Path, out: Path, progress: Progress | None = None) -> dict[str, int]:
    """Take the captions of a run over into the shards at `out`; returns counts.

    `samples`, `changed` (captions), `unknown` (not in the run: they keep what they have), and
    `shards` of which the index was written. Documents have no captions and are passed over.
    Afterwards `unimodal tokenize` of the same run finds these shards done. Raises `UnimodalError`
    if there is no run or there are no finished shards.
    """
    progress = progress or Progress()
    said = read_parquet(clips_file(run_dir), columns=["uid", "captions"])
    uids = said["uid"].combine_chunks()
    with run_lock(out, progress):
        shards = Shards.open(out)
        sweep(out)
        digests = dict(_digests(run_dir, shards))
        total = dict.fromkeys(("samples", "changed", "unknown", "shards"), 0)
        progress.begin(TASK, len(shards.manifest["shards"]), "shards")
        for number, shard in enumerate(shards.manifest["shards"]):
            index = (out / shard["name"]).with_suffix(".parquet")
            table, unit = shards.part(number)
            rows = table.to_pylist()
            places = pc.index_in(table["uid"], uids).to_pylist()
            changed = 0
            for row, place in zip(rows, places, strict=True):
                total["samples"] += 1
                if row["task"] != "caption" or place is None:
                    total["unknown"] += row["task"] == "caption"
                    continue
                given = said["captions"][place].as_py()
                new = captions_of(given, row["start_s"], row["end_s"], shards.vocabulary)
                changed += new != row["captions"]
                row["captions"] = new
            keys, digest = digests.get(number, (set(), ""))
            note = unit | ({"digest": digest} if keys == {row["key"] for row in rows} else {})
            if changed or note != unit:
                told = {"unimodal": json.dumps(note, sort_keys=True)}
                write_parquet(pa.Table.from_pylist(rows, schema=table.schema), index, told)
                total["shards"] += 1
            total["changed"] += changed
            progress.advance(TASK)
        progress.end(TASK)
    if total["unknown"]:
        progress.note(f"{total['unknown']} samples are not in {run_dir}: they keep their captions")
    return total


def _digests(run_dir: Path, shards: Shards) -> Iterator[tuple[int, tuple[set[str], str]]]:
    """Keys and digest of each unit, as `unimodal tokenize` of the run would plan it."""
    header = {name: shards.manifest[name] for name in HEADER}
    if "where" in header["settings"]:
        return  # gathered from elsewhere: no run makes these
    settings = TokenizeSettings(**header["settings"])
    factor = header["vision_tokenizer"]["spatial_factor"]
    for unit in units(kept_clips(run_dir), settings, shards.vocabulary, factor):
        yield unit.number, ({window.key for window in unit.windows}, unit.digest(header))
