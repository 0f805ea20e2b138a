"""How long it takes to decide on a million clips again, and to tell what every rule costs.

First in memory, then as the whole command over a run directory of 20,000 videos.

    .venv/bin/python benchmarks/decide.py [clips]

The clips are made up: a third images, scores spread so that about half is dropped, a tenth in
groups of near-duplicates, one score in twenty not measured. All rules are on.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from unimodal.pipeline.caption import Given
from unimodal.pipeline.clips import CLIPS
from unimodal.pipeline.decide import DecideSettings, decide, what_if
from unimodal.pipeline.judged import advice, judge
from unimodal.pipeline.parts import Part, write_parts
from unimodal.pipeline.presets import CurateSettings
from unimodal.pipeline.progress import Progress
from unimodal.pipeline.source import Source
from unimodal.pipeline.stages import part_stages
from unimodal.pipeline.view import write_view
from unimodal.pipeline.work import Engine, Work, joint

# Every rule has a threshold.
SETTINGS = DecideSettings(
    image_max_aspect=3.0,
    video_max_s=60.0,
    contrast_min=20.0,
    blur_min=50.0,
    freeze_max=0.9,
    flash_max=0.2,
    quality_min=0.2,
    match_min=0.15,
)


def made_up(count: int) -> pa.Table:
    """A joined view of `count` clips with every score, without samples and captions."""
    rng = np.random.default_rng(0)
    image = rng.random(count) < 1 / 3

    def column(values: np.ndarray, only: np.ndarray | None = None) -> pa.Array:
        null = rng.random(count) < 0.05
        return pa.array(values, mask=null if only is None else null | ~only)

    grouped = rng.random(count) < 0.1
    best = rng.integers(0, max(1, count // 30), count)
    uid = pa.array(np.char.mod("%032x", np.arange(count)))
    columns = {
        "part": pa.array(np.char.mod("%04x", np.arange(count) // 1000)),
        "uid": uid,
        "uri": pa.array(np.char.mod("/media/%08d.mp4", np.arange(count))),
        "kind": pa.array(np.where(image, "image", "video")),
        "width": pa.array(rng.choice([320, 640, 1280, 1920], count).astype(np.int32)),
        "height": pa.array(rng.choice([240, 720, 1080], count).astype(np.int32)),
        "duration_s": column(rng.gamma(3, 4, count), ~image),
        "flow_mean": column(rng.gamma(1.5, 0.02, count), ~image),
        "luma_mean": column(rng.normal(110, 45, count).clip(0, 255)),
        "contrast": column(rng.gamma(9, 6, count)),
        "blur": column(rng.gamma(2, 300, count)),
        "colorfulness": column(rng.gamma(3, 10, count)),
        "freeze_ratio": column(rng.beta(0.3, 3, count), ~image),
        "flash_ratio": column(rng.beta(0.3, 9, count), ~image),
        "text_area_mean": column(rng.beta(0.3, 20, count)),
        "text_area_p90": column(rng.beta(0.3, 10, count)),
        "text_track_s": column(rng.exponential(0.3, count), ~image),
        "text_corner": column(rng.beta(0.2, 4, count), ~image),
        "quality": column(rng.beta(5, 3, count)),
        "aesthetic": column(rng.normal(5.6, 0.7, count)),
        "nsfw": column(rng.beta(0.1, 3, count)),
        "text_match": column(rng.normal(0.25, 0.06, count)),
        "dup_group": uid.take(pa.array(best, mask=~grouped)),
        "dup_rank": pa.array(rng.integers(0, 9, count).astype(np.int32), mask=~grouped),
    }
    table = pa.table(columns)
    rest = [field for field in CLIPS if field.name not in columns]
    for field in rest:
        table = table.append_column(field.name, pa.nulls(count, field.type))
    return table.select(CLIPS.names)


def run_directory(folder: Path, clips: pa.Table, videos: int = 20_000) -> Path:
    """A finished run of so many clips, as far as deciding looks at it; sources in 200 parts."""
    settings = CurateSettings(decide=SETTINGS, report=False)
    names = [f"/media/{number:08d}.mp4" for number in range(videos)]
    parts = [
        Part(f"{at:016x}", tuple(Source(name, 1, 1) for name in names[at : at + 100]), 100)
        for at in range(0, videos, 100)
    ]
    out = folder / "run"
    out.mkdir()
    write_parts(parts, out / "parts.parquet")
    given, stages = Given(), part_stages(settings)
    work = Work(out, parts, given, settings, stages, Engine("inline"), Progress())
    for stage in stages.by_part:
        (out / stage.folder).mkdir()
        for part in parts:
            (out / stage.folder / f"{part.name}.parquet").touch()
    judged = decide(clips, SETTINGS)
    clips = clips.drop_columns(["verdict", "reasons", "uri", "source_sha256"])
    clips = clips.append_column("source_sha256", clips.column("uid"))
    clips = clips.append_column("uri", pa.array([names[i % videos] for i in range(len(clips))]))
    for name in ("verdict", "reasons"):
        clips = clips.append_column(name, judged.column(name))
    folders = joint(work, "").folders
    write_view(out, clips.select(CLIPS.names), [], folders)
    kept = pc.sum(pc.equal(judged.column("verdict"), "keep")).as_py()
    totals = {"kept": kept, "dropped": len(clips) - kept, "quarantined": 0}
    info = {"settings": settings.model_dump(mode="json"), "stages": folders, "skipped": {}}
    info["totals"] = totals
    (out / "run.json").write_text(json.dumps(info))
    return out


def timed(name: str, call: object, *arguments: object) -> object:
    """Call and print how long it took."""
    wall, before = time.perf_counter(), os.times()
    found = call(*arguments)  # type: ignore[operator]
    wall = time.perf_counter() - wall
    cpu = sum(os.times()[:4]) - sum(before[:4])  # with the children that it waited for
    print(f"{name:40s} {wall:6.2f} s {cpu:6.2f} CPU s")
    return found


def main(count: int = 1_000_000) -> None:
    """Print seconds and peak memory."""
    clips = made_up(count)
    decide(clips.slice(0, 1000), SETTINGS)  # the first call loads the library
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    old = timed(f"decide, {count:,} clips", decide, clips, SETTINGS)
    reasons = old["reasons"].combine_chunks()  # type: ignore[index]
    kept = sum(1 for verdict in old["verdict"].to_pylist() if verdict == "keep")  # type: ignore[index]
    print(f"  kept {kept:,}; {len(reasons.flatten()):,} reasons")
    new = timed(
        "decide again, two thresholds changed",
        decide,
        clips,
        SETTINGS.model_copy(update={"flow_max": 0.08, "blur_min": 40.0}),
    )
    found = timed("what_if", what_if, old, new)
    print(f"  {found.dropped:,} more dropped, {found.kept:,} kept again")  # type: ignore[attr-defined]
    judged = timed("judge", judge, clips, SETTINGS)
    for line in advice(judged, SETTINGS):  # type: ignore[arg-type]
        print(f"  {line}")
    with tempfile.TemporaryDirectory() as folder:
        out = run_directory(Path(folder), clips)
        command = [str(Path(sys.executable).parent / "unimodal"), "decide", str(out), "-q"]
        change = ["--set", "decide.flow_max=0.08"]
        timed("unimodal decide --what-if", subprocess.check_call, [*command, *change, "--what-if"])
        timed("unimodal decide", subprocess.check_call, [*command, *change])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"peak memory {peak / 1024:.0f} MiB, {before / 1024:.0f} of it the clips")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
