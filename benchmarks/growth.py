"""How time and memory grow: each step of the road at 1x, 10x and 100x, a fresh process per point.

    OMP_NUM_THREADS=1 python -m benchmarks.growth [case ...] [--scale 1] [-o DIR] [--json FILE]
        [--plot docs/pictures/growth.png]

Media are tiny generated pictures; what comes after the frame pass works on made-up rows, 128
pictures to a part, a run directory as `curate` leaves it. Making the inputs is not measured, start
of the program is. Printed are seconds, CPU seconds, peak memory of the largest process, and the
exponents of CPU time and memory between the last two sizes (1 is in proportion; n log n is up to
1.1 there). `--scale 0.1` tries it on a tenth. With `--plan` it compares what `curate --plan` says
of tiny pictures with what they take.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# This process stays small: a child begins with the peak memory of its parent.

PROGRAM = str(Path(sys.executable).parent / "unimodal")
CASES: dict[str, tuple[str, int]] = {
    "list": ("list files and say what would be done (`curate --plan`)", 1_000),
    "curate": ("`curate`, pictures of 32x32, one process", 100),
    "again": ("`curate` again, nothing changed", 100),
    "tokenize": ("`tokenize`, pictures of 32x32, one process", 100),
    "join": ("join, dedup, decide, clips.parquet, made-up rows", 10_000),
    "decide": ("`decide` with another threshold", 10_000),
    "report": ("`report`", 10_000),
    "plan": ("`tokenize --plan`", 10_000),
    "dedup": ("near-duplicates alone, three hashes a clip", 10_000),
    "shards": ("write shards of 4x4 codes, and their manifest", 1_000),
    "inspect": ("`inspect` shards", 1_000),
    "index": ("open the index of shards and plan an epoch of training", 1_000),
}
"""What is measured, and the smallest number of items; then ten and a hundred times as many."""

SHARED = {"again": "curate", "tokenize": "curate", "decide": "join", "report": "join"}
SHARED |= {"plan": "join", "inspect": "shards", "index": "shards"}
"""Cases that work on what another one made."""


# --- inputs and work, in children ------------------------------------------------------------


def pictures(folder: Path, count: int) -> None:
    """Files of 32x32 pixels, all different, a thousand to a folder."""
    import cv2
    import numpy as np

    rng = np.random.default_rng(0)
    for number in range(count):
        inner = folder / f"{number // 1000:04d}"
        inner.mkdir(parents=True, exist_ok=True)
        small = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        picture = cv2.resize(small, (32, 32), interpolation=cv2.INTER_CUBIC)
        cv2.imwrite(str(inner / f"{number:07d}.png"), picture)


def work_of(out: Path, count: int) -> Any:
    """The work of a run over `count` made-up pictures of which only the watch stage is there."""
    from unimodal.pipeline.caption import Given
    from unimodal.pipeline.parts import PartSettings, group
    from unimodal.pipeline.presets import CurateSettings
    from unimodal.pipeline.progress import Progress
    from unimodal.pipeline.source import Source
    from unimodal.pipeline.stages import part_stages
    from unimodal.pipeline.work import Engine, Work

    settings = CurateSettings(report=False, skip=("text", "quality"))
    names = [f"/media/{number:010d}.png" for number in range(count)]
    parts = group([Source(name, 1, 1) for name in names], PartSettings())
    stages = part_stages(settings)
    return Work(out, parts, Given(), settings, stages, Engine("inline"), Progress())


def rows(out: Path, count: int) -> None:
    """Write what the frame pass would have: a table and a picture a part."""
    import io
    import tarfile

    import cv2
    import numpy as np
    import pyarrow as pa

    from benchmarks.decide import made_up
    from benchmarks.dedup import hashes, table
    from unimodal.pipeline.clips import SAMPLE, WATCH
    from unimodal.pipeline.parts import write_parts
    from unimodal.pipeline.stage import PartFiles

    work = work_of(out, count)
    out.mkdir()
    write_parts(work.parts, out / "parts.parquet")
    found = made_up(count)
    codes = hashes(np.random.default_rng(0), count, 1)
    samples = table(codes, "image").column("samples").combine_chunks()
    fields = samples.values.flatten()
    member = pa.array(["one.jpg"]).take(pa.array(np.zeros(count, np.int32)))
    inner = pa.StructArray.from_arrays([member, *fields[1:]], fields=list(SAMPLE))
    samples = pa.ListArray.from_arrays(samples.offsets, inner)
    picture = cv2.imencode(".jpg", np.full((64, 64, 3), 99, np.uint8))[1].tobytes()
    member_info = tarfile.TarInfo("one.jpg")
    member_info.size = len(picture)

    def frames(path: Path) -> None:
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            tar.addfile(member_info, io.BytesIO(picture))

    uids = found.column("uid")
    columns = {"uri": [s.uri for part in work.parts for s in part.sources], "kind": None}
    columns |= {"source_sha256": uids, "samples": samples, "uid": uids}
    columns["kind"] = pa.array(["image"]).take(pa.array(np.zeros(count, np.int32)))
    for field in WATCH:
        if field.name not in columns:
            columns[field.name] = found.column(field.name)
    whole = pa.table({f.name: columns[f.name] for f in WATCH}, schema=WATCH)
    start = 0
    for part in work.parts:
        files = PartFiles(out / work.stages.watch.folder, part.name)
        files.commit(whole.slice(start, len(part.sources)), [], frames)
        start += len(part.sources)


def joined(out: Path, count: int) -> None:
    """What `curate` does when all parts are done, but for the report."""
    from unimodal.pipeline import run
    from unimodal.pipeline.parts import read_parts

    work = work_of(out, count)
    assert len(read_parts(out / "parts.parquet")) == len(work.parts)
    run._bring_up(work, {})


def near(count: int) -> None:
    """Group what is near, of clips with three hashes, one in twenty a copy of one."""
    import numpy as np

    from benchmarks.dedup import table
    from unimodal.pipeline import dedup

    rng = np.random.default_rng(0)
    found = rng.integers(0, 2**64, (count, 3), dtype=np.uint64)  # `hashes` takes 1 GB for 300,000
    found[rng.choice(count, count // 20, replace=False)] = found[0]
    dedup.group(table(found, "video"), dedup.DedupSettings(), None)


def shards(out: Path, count: int) -> None:
    """Write shards of 512 samples."""
    from types import SimpleNamespace

    import numpy as np

    from unimodal.tokenize.shards import Sample, ShardWriter
    from unimodal.tokenize.vocabulary import Vocabulary

    fake = SimpleNamespace(codebook_size=4096, spatial_factor=8, digest="0" * 64)
    fake.save = lambda path: path.mkdir()
    writer = ShardWriter(out, fake, Vocabulary.bytes(4096), {})
    caption = [{"style": "short", "lang": "en", "text": "a red kite", "tokens": 10}]
    each = {"kind": "image", "split": "train", "source_sha256": "0" * 64, "captions": caption}
    codes = np.arange(16).reshape(1, 4, 4)
    starts = range(0, count, 512)
    for number, start in enumerate(starts):
        keys = [f"key{row:09d}" for row in range(start, min(count, start + 512))]
        samples = [Sample(key=key, uid=key, codes=codes, **each) for key in keys]
        writer.write(number, "unit", samples)
    writer.finish(len(starts))


def epoch(out: Path) -> None:
    """Open shards and plan a pass over them."""
    from unimodal.model.data import DataSettings, Loader, Samples
    from unimodal.tokenize.shards import Shards

    Loader(Samples([Shards.open(out)]), DataSettings(context=4096), 0).plan  # noqa: B018


def child(what: str, out: Path, count: int) -> None:
    """Do one thing in this process."""
    match what:
        case "pictures":
            pictures(out, count)
        case "rows":
            rows(out, count)
        case "join":
            joined(out, count)
        case "dedup":
            near(count)
        case "shards":
            shards(out, count)
        case "index":
            epoch(out)


# --- measuring ---------------------------------------------------------------------------------


def command_of(case: str, work: Path, count: int) -> list[str]:
    """The command that is measured; its inputs are in `work`."""
    run = str(work / "run")
    first = [PROGRAM, "curate", str(work / "media"), "-o", run, "-q", "--engine", "inline"]
    first += ["--set", "decide.image_min_area=0"]
    tokens = [PROGRAM, "tokenize", run, "-o", str(work / "tokens"), "-q", "--set", "area=1024"]
    return {
        "list": [*first, "--plan", "--json"],
        "curate": first,
        "again": first,
        "tokenize": [*tokens, "--engine", "inline"],
        "decide": [PROGRAM, "decide", run, "-q", "--set", "decide.blur_min=40"],
        "report": [PROGRAM, "report", run],
        "plan": [*tokens, "--plan"],
        "inspect": [PROGRAM, "inspect", str(work / "run"), "-o", str(work / "page"), "-q"],
    }.get(case) or own(case, work / "run", count)


def own(what: str, out: Path, count: int) -> list[str]:
    """This script, doing one thing."""
    return [sys.executable, "-m", "benchmarks.growth", "--child", what, str(out), str(count)]


def measure(command: list[str], limit_s: float = 900) -> dict[str, Any]:
    """Wall and CPU seconds and peak MB of a command and all that it starts; its stdout."""
    with tempfile.TemporaryFile() as told:
        start = time.perf_counter()
        process = subprocess.Popen(["timeout", str(limit_s), *command], stdout=told)
        _, status, used = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        told.seek(0)
        said = told.read().decode()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}")
    cpu = used.ru_utime + used.ru_stime
    found = {"wall_s": wall, "cpu_s": cpu, "peak_mb": used.ru_maxrss / 1024}
    return {name: round(value, 2) for name, value in found.items()} | {"said": said}


def prepare(case: str, work: Path, count: int) -> None:
    """Make the inputs of a case that shares none."""
    if case in ("list", "curate"):
        measure(own("pictures", work / "media", count))
    elif case == "join":
        measure(own("rows", work / "run", count))


def exponents(points: list[dict[str, Any]]) -> dict[str, float]:
    """d log y / d log n between the last two points, and of CPU time by least squares over all."""
    x = [math.log(p["n"]) for p in points]
    found = {}
    for name in ("cpu_s", "peak_mb"):
        y = [math.log(p[name]) for p in points]
        found[name] = round((y[-1] - y[-2]) / (x[-1] - x[-2]), 2)
    y = [math.log(p["cpu_s"]) for p in points]
    mx, my = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True))
    found["fit"] = round(slope / sum((a - mx) ** 2 for a in x), 2)
    return found


def grow(cases: list[str], scale: float, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Measure cases at three sizes, and print a row of the table when one is done."""
    found: dict[str, list[dict[str, Any]]] = {}
    print("| what | items | seconds | CPU s | peak MB | exponent, CPU (all three) | memory |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for case in cases:
        text, base = CASES[case]
        points = []
        for times in (1, 10, 100):
            count = max(10, round(base * times * scale))
            work = folder / f"{SHARED.get(case, case)}-{count}"
            work.mkdir(parents=True, exist_ok=True)
            first = SHARED.get(case)
            if first and not (work / "run").exists():
                prepare(first, work, count)
                measure(command_of(first, work, count))
            elif not first:
                prepare(case, work, count)
            taken = measure(command_of(case, work, count))
            points.append({"n": count} | {k: v for k, v in taken.items() if k != "said"})
        found[case] = points
        by = exponents(points)
        cells = [
            " / ".join(f"{p[name]:{form}}" for p in points)
            for name, form in (("n", ","), ("wall_s", ".1f"), ("cpu_s", ".1f"), ("peak_mb", ",.0f"))
        ]
        last = f"{by['cpu_s']:.2f} ({by['fit']:.2f}) | {by['peak_mb']:.2f}"
        print(f"| {text} | {' | '.join(cells)} | {last} |", flush=True)
    return found


def compare_plan(counts: list[int], folder: Path, more: list[str]) -> list[dict[str, Any]]:
    """Print what `curate --plan` says of tiny pictures beside what `curate` takes."""
    print("| pictures | CPU s planned | taken | ratio | MB planned | taken | ratio | peak MB |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    rows = []
    for count in counts:
        work = folder / f"plan-{count}"
        work.mkdir(parents=True, exist_ok=True)
        prepare("curate", work, count)
        command = [*command_of("curate", work, count), *more]
        said = json.loads(measure([*command, "--plan", "--json"])["said"])
        taken = measure(command)
        held = sum(f.stat().st_size for f in (work / "run").rglob("*") if f.is_file()) / 1e6
        planned = said["disk_bytes"] / 1e6
        print(
            f"| {count:,} | {said['cpu_s']:.1f} | {taken['cpu_s']:.1f} | "
            f"{said['cpu_s'] / taken['cpu_s']:.2f} | {planned:.1f} | {held:.1f} | "
            f"{planned / held:.2f} | {taken['peak_mb']:.0f} |",
            flush=True,
        )
        plan = {"cpu_s": said["cpu_s"], "disk_mb": planned}
        rows.append({"n": count, "planned": plan, "disk_mb": held, **taken, "said": None})
    return rows


def plot(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Two charts on logarithmic axes, CPU seconds and peak MB against items."""
    from PIL import Image, ImageDraw, ImageFont

    width, height, left, top, inner = 1500, 640, 70, 50, (500, 500)
    image = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(16)
    colors = ["#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b"]
    colors += ["#e377c2", "#7f7f7f", "#bcbd22", "#17becf", "#000000", "#3d5a00"]
    every = [p for points in found.values() for p in points]
    low_n = math.floor(math.log10(min(p["n"] for p in every)))
    high_n = math.ceil(math.log10(max(p["n"] for p in every)))
    for number, (name, title) in enumerate((("cpu_s", "CPU seconds"), ("peak_mb", "peak MB"))):
        x0 = left + number * (inner[0] + 80)
        low = math.floor(math.log10(min(p[name] for p in every)))
        high = math.ceil(math.log10(max(p[name] for p in every)))

        def place(n: float, y: float) -> tuple[float, float]:
            """Pixels of a point given by its logarithms."""
            across = (n - low_n) / (high_n - low_n)
            up = (y - low) / (high - low)  # noqa: B023 - used within this turn of the loop
            return x0 + across * inner[0], top + (1 - up) * inner[1]  # noqa: B023

        draw.text((x0, 15), f"{title}, by number of items", "black", font)
        for n in range(low_n, high_n + 1):
            draw.line([place(n, low), place(n, high)], "#dddddd")
            draw.text((place(n, low)[0], top + inner[1] + 8), f"{10**n:,}", "black", font, "ma")
        for y in range(low, high + 1):
            draw.line([place(low_n, y), place(high_n, y)], "#dddddd")
            draw.text((x0 - 6, place(low_n, y)[1]), f"{10.0**y:g}", "black", font, "rm")
        if name == "cpu_s":  # what is in proportion rises like this line
            span = min(high - low, high_n - low_n)
            draw.line([place(low_n, low), place(low_n + span, low + span)], "#aaaaaa", 3)
        for color, points in zip(colors, found.values(), strict=False):
            line = [place(math.log10(p["n"]), math.log10(p[name])) for p in points]
            draw.line(line, color, 3)
            for x, y in line:
                draw.ellipse([x - 5, y - 5, x + 5, y + 5], color)
    for row, (color, case) in enumerate(zip(colors, found, strict=False)):
        y = top + 10 + 30 * row
        draw.line([(1240, y), (1275, y)], color, 4)
        draw.text((1285, y), case, "black", font, "lm")
    draw.text((1240, top + 10 + 30 * len(found)), "gray: in proportion", "#777777", font, "lm")
    image.save(path, optimize=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("cases", nargs="*", metavar="case", help=", ".join(CASES))
    parser.add_argument("--scale", type=float, default=1)
    parser.add_argument("--plan", type=int, nargs="+", help="pictures of each comparison")
    parser.add_argument("--more", nargs="+", default=[], help="options of `curate`, with --plan")
    parser.add_argument("-o", "--out", type=Path, help="folder for inputs, to be kept")
    parser.add_argument("--json", type=Path, help="add the figures to this file")
    parser.add_argument("--plot", type=Path, help="draw what the file of --json holds")
    given = parser.parse_args()
    for case in given.cases:
        if case not in CASES:
            parser.error(f"{case}: no such case; there are {', '.join(CASES)}")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    held = json.loads(given.json.read_text()) if given.json and given.json.exists() else {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.out or Path(temporary)
        if given.plan:
            more = [word for one in given.more for word in ("--set", one)]
            held["plan"] = held.get("plan", []) + compare_plan(given.plan, folder, more)
        elif given.cases or not given.plot:
            held["growth"] = held.get("growth", {}) | grow(
                given.cases or list(CASES), given.scale, folder
            )
    if given.json:
        given.json.write_text(json.dumps(held, indent=1) + "\n")
    if given.plot:
        plot({case: held["growth"][case] for case in CASES if case in held["growth"]}, given.plot)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
    else:
        main()
