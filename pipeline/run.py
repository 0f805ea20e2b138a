"""`curate`: sources in, a run directory out. And `Run`, to read one.

    list ─> parts ─> watch (engine) ─> captions ─> decide ─> clips.parquet

Every step looks for its own earlier result first, so the same call again only stats files, and
a call after a crash does what is missing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from unimodal.pipeline import caption, decide, watch
from unimodal.pipeline.clips import CLIPS, QUARANTINE
from unimodal.pipeline.engine import choose, run_jobs
from unimodal.pipeline.errors import UnimodalError, UsageError
from unimodal.pipeline.files import atomic
from unimodal.pipeline.inputs import list_sources
from unimodal.pipeline.lock import run_lock
from unimodal.pipeline.parts import Part, plan, read_parts, write_parts
from unimodal.pipeline.presets import PRESETS, CurateSettings
from unimodal.pipeline.progress import Progress
from unimodal.pipeline.stage import PartFiles, Stage, sweep
from unimodal.pipeline.view import write_view
from unimodal.pipeline.watch import Tell
from unimodal.pipeline.worker import Job

__all__ = ["PRESETS", "CurateSettings", "Run", "curate"]

LIBRARIES = (
    *("av", "numpy", "opencv-python-headless", "pillow", "pyarrow", "ray"),
    *("scenedetect", "scenedetect-headless"),
)


@dataclass(frozen=True)
class Run:
    """A run directory."""

    path: Path

    @classmethod
    def open(cls, path: Path | str) -> Run:
        """Open a finished run; raises `UsageError` if `path` is none."""
        run = cls(Path(path))
        if not (run.path / "clips.parquet").exists():
            raise UsageError(f"{path}: not a finished run directory (it has no clips.parquet)")
        return run

    @cached_property
    def clips(self) -> pa.Table:
        """All clips, kept and dropped, with the columns of `clips.CLIPS`."""
        return pq.read_table(self.path / "clips.parquet", schema=CLIPS)

    @cached_property
    def quarantine(self) -> pa.Table:
        """Sources that could not be read, with the columns of `clips.QUARANTINE`."""
        return pq.read_table(self.path / "quarantine.parquet", schema=QUARANTINE)

    @cached_property
    def info(self) -> dict[str, Any]:
        """What run.json says: settings, versions, folders, timings, totals."""
        return json.loads((self.path / "run.json").read_text())

    @property
    def kept(self) -> int:
        """Clips that passed every rule."""
        return int(pc.sum(pc.equal(self.clips.column("verdict"), "keep")).as_py() or 0)

    @property
    def dropped(self) -> int:
        """Clips that some rule dropped."""
        return self.clips.num_rows - self.kept

    @property
    def quarantined(self) -> int:
        """Rows of the quarantine table."""
        return self.quarantine.num_rows

    def frames_tar(self, part: str) -> Path:
        """The tar that holds the keyframes of a part's clips."""
        return PartFiles(self.path / self.info["stages"]["watch"], part).frames


def curate(
    inputs: Sequence[str | Path],
    out: Path | str,
    settings: CurateSettings | None = None,
    *,
    engine: str = "auto",
    workers: int | None = None,
    address: str | None = None,
    progress: Progress | None = None,
    limit: int | None = None,
    captions: Mapping[str, Any] | str | Path | None = None,
) -> Run:
    """Curate images and videos into the run directory `out`, or bring one up to date.

    `inputs` are files, folders and globs; `limit` takes the first so many sources. `engine` is
    auto, inline, local or ray, with `workers` processes (default: one per processor) and, for
    Ray, a cluster `address`. `captions` is a mapping from path to text or texts, or a .jsonl or
    .csv file with the columns path and caption.

    A source that cannot be read goes to quarantine with its reason. Raises `UsageError` for
    inputs that do not exist or settings that do not evaluate, `UnimodalError` when the run
    cannot go on (locked, disk full).
    """
    settings = settings or CurateSettings()
    progress = progress or Progress()
    engine = choose(engine, address)
    if settings.decide.extra:  # a typing error shall not wait for the last video
        decide.decide(CLIPS.empty_table(), settings.decide)
    out = Path(out).absolute()
    _must_be_ours(out)
    given = caption.read_given(captions)
    begun = time.time()
    with run_lock(out, progress):
        sweep(out)
        previous = read_parts(out / "parts.parquet")
        known = [source for part in previous for source in part.sources]
        sources = list_sources(inputs, limit, known)
        stage = Stage("watch", watch.VERSION, settings.watch().digest())
        folder = out / stage.folder
        parts = plan(sources, previous, lambda name: PartFiles(folder, name).done(), settings.parts)
        if parts != previous or not (out / "parts.parquet").exists():
            write_parts(parts, out / "parts.parquet")
        listed = time.time()
        _watch(parts, folder, settings, engine, workers, address, progress)
        watched = time.time()
        stages = write_view(out, parts, stage, settings, given, progress)
        run = Run(out)
        _write_info(run, settings, stages, parts, engine, (begun, listed, watched, time.time()))
    return run


def _watch(
    parts: Sequence[Part],
    folder: Path,
    settings: CurateSettings,
    engine: str,
    workers: int | None,
    address: str | None,
    progress: Progress,
) -> None:
    pending = [part for part in parts if not PartFiles(folder, part.name).done()]
    if not pending:
        return
    jobs = [
        Job(
            stage="watch",
            part=part.name,
            folder=str(folder),
            sources=[
                {k: v for k, v in asdict(source).items() if k != "copies"}
                for source in part.sources
            ],
            settings=settings.watch().model_dump(mode="json"),
        )
        for part in pending
    ]
    progress.begin("sources", sum(len(part.sources) for part in pending), "sources")
    progress.begin("video", 0, "s of video")  # its total is known only when all is decoded
    counted: set[str] = set()

    def done(uri: str) -> None:
        if uri not in counted:  # a part that is tried again tells of its first sources again
            counted.add(uri)
            progress.advance("sources")

    tell = Tell(
        seconds=lambda seconds: progress.advance("video", seconds) if seconds else None, done=done
    )
    run_jobs(jobs, engine, tell, settings.patience, workers, address)
    progress.end("video")
    progress.end("sources")
    lost = [part.name for part in pending if not PartFiles(folder, part.name).done()]
    if lost:
        raise UnimodalError(
            f"{folder}: {len(lost)} parts were done but are not to be seen here; with several "
            "machines, the run directory must be on storage that all of them share"
        )


def _must_be_ours(out: Path) -> None:
    if out.is_dir():
        names = {path.name for path in out.iterdir()}
        if names and not names & {"run.json", "parts.parquet", "run.lock"}:
            raise UsageError(f"{out}: not empty and not a run directory; name another -o")
    elif out.exists():
        raise UsageError(f"{out}: a file is in the way; name another -o")


def _write_info(
    run: Run,
    settings: CurateSettings,
    stages: Mapping[str, str],
    parts: Sequence[Part],
    engine: str,
    times: tuple[float, float, float, float],
) -> None:
    begun, listed, watched, ended = times
    versions = {}
    for name in ("unimodal", *LIBRARIES):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    clips = pq.read_table(run.path / "clips.parquet", columns=["verdict", "duration_s"])
    kept = pc.sum(pc.equal(clips.column("verdict"), "keep")).as_py() or 0
    seconds = pc.sum(clips.column("duration_s")).as_py() or 0.0
    info = {
        "settings": settings.model_dump(mode="json"),
        "stages": dict(stages),
        "engine": engine,
        "versions": versions,
        "seconds": {
            "list": round(listed - begun, 3),
            "watch": round(watched - listed, 3),
            "join": round(ended - watched, 3),
        },
        "totals": {
            "parts": len(parts),
            "sources": sum(len(part.sources) for part in parts),
            "copies": sum(len(source.copies) for part in parts for source in part.sources),
            "clips": clips.num_rows,
            "kept": kept,
            "dropped": clips.num_rows - kept,
            "quarantined": pq.read_metadata(run.path / "quarantine.parquet").num_rows,
            "clip_seconds": round(seconds, 3),
        },
    }
    with atomic(run.path / "run.json") as temporary:
        temporary.write_text(json.dumps(info, indent=2) + "\n")
