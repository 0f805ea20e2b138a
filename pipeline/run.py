"""`curate`: sources in, a run directory out; `update`: the same for a run that is there already.

    list ─> parts ─> what `work` does with them ─> clips.parquet ─> report.html

Every step looks for its own earlier result first, so the same call again only stats files, and
a call after a crash does what is missing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from unimodal.pipeline import caption, decide, view
from unimodal.pipeline.captioning.describe import Open, prompt_of
from unimodal.pipeline.clips import CLIPS, read_parquet
from unimodal.pipeline.engine import choose
from unimodal.pipeline.errors import UsageError, telling_full_disk
from unimodal.pipeline.files import atomic, sweep
from unimodal.pipeline.inputs import list_inputs
from unimodal.pipeline.kinds import mistaken
from unimodal.pipeline.lock import run_lock
from unimodal.pipeline.parts import Part, plan, read_parts, write_parts
from unimodal.pipeline.presets import PRESETS, CurateSettings
from unimodal.pipeline.progress import Progress
from unimodal.pipeline.settings import build
from unimodal.pipeline.source import Source
from unimodal.pipeline.stage import PartFiles
from unimodal.pipeline.stages import part_stages
from unimodal.pipeline.work import Describing, Engine, Work, do_steps, join, part_steps, store_of

__all__ = ["PRESETS", "CurateSettings", "Run", "curate", "update"]

LIBRARIES = (
    *("av", "numpy", "onnxruntime", "open-clip-torch", "opencv-python-headless", "pillow"),
    *("pyarrow", "rapidocr", "ray", "scenedetect", "scenedetect-headless", "torch"),
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
            raise UsageError(
                mistaken(run.path, "run directory")
                or f"{path}: not a finished run directory (it has no clips.parquet)"
            )
        info = run.path / "run.json"
        made_of = view.made_of(run.path / "clips.parquet")
        if not info.exists() or (made_of and made_of != run.info["stages"]):
            raise UsageError(f"{path}: its last run was interrupted; curate it again")
        return run

    @cached_property
    def clips(self) -> pa.Table:
        """All clips, kept and dropped, with the columns of `clips.CLIPS`."""
        found = read_parquet(self.path / "clips.parquet")
        if found.column_names != CLIPS.names:
            raise UsageError(f"{self.path}: made by another version; curate it again")
        return found.cast(CLIPS)

    @cached_property
    def quarantine(self) -> pa.Table:
        """Sources that could not be read, with the columns of `clips.QUARANTINE`."""
        return read_parquet(self.path / "quarantine.parquet")

    @cached_property
    def info(self) -> dict[str, Any]:
        """What run.json says: settings, versions, folders, timings, totals."""
        return json.loads((self.path / "run.json").read_text())

    @property
    def kept(self) -> int:
        """Clips that passed every rule."""
        return self.info["totals"]["kept"]

    @property
    def dropped(self) -> int:
        """Clips that some rule dropped."""
        return self.info["totals"]["dropped"]

    @property
    def quarantined(self) -> int:
        """Rows of the quarantine table."""
        return self.info["totals"]["quarantined"]

    @cached_property
    def settings(self) -> CurateSettings:
        """What the run was made with; raises `UsageError` if this version knows them no more."""
        return build(CurateSettings, self.info["settings"])

    def samples(self, part: str) -> dict[str, list[dict[str, Any]]]:
        """The stored pictures of a part's clips, as `clips.SAMPLE` has them, by uid."""
        rows = PartFiles(self.path / self.info["stages"]["watch"], part).rows
        return _samples(rows, rows.stat().st_mtime_ns)

    def frames_tar(self, part: str) -> Path:
        """The tar that holds the sampled frames of a part's clips."""
        return PartFiles(self.path / self.info["stages"]["watch"], part).frames


@lru_cache(maxsize=16)
def _samples(rows: Path, mtime_ns: int) -> dict[str, list[dict[str, Any]]]:
    found = read_parquet(rows, columns=["uid", "samples"]).to_pylist()
    return {row["uid"]: row["samples"] for row in found}


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
    fraction: float | None = None,
    captions: Mapping[str, Any] | str | Path | None = None,
    verify: bool = False,
    retry_quarantined: bool = False,
    captioner: Open | None = None,
) -> Run:
    """Curate images and videos into the run directory `out`, or bring one up to date.

    `inputs` are files, folders, globs, tables of paths, WebDataset tars and fsspec addresses;
    `limit` takes the first so many sources, `fraction` a share of them. `engine` is auto, inline,
    local or ray, with `workers` processes (default: one per processor) and, for Ray, a cluster
    `address`. `captions` is a mapping from path to text or texts, or a table with the columns path
    and caption. `verify` compares contents, where size and modification time are trusted
    otherwise. `retry_quarantined` does the parts again in which something could not be read.
    `captioner` opens the source of captions that `settings.caption` names, where it is one that
    this room does not know.

    A source that cannot be read goes to quarantine with its reason. Raises `UsageError` for
    inputs that do not exist or settings that do not evaluate, `UnimodalError` when the run
    cannot go on (locked, disk full, most sources fail).
    """
    settings = settings or CurateSettings()
    progress = progress or Progress()
    driver = Engine(choose(engine, address), workers, address)
    check(settings)
    if "://" in str(out):
        raise UsageError(f"{out}: a run directory is on a disk, or on storage that is mounted")
    out = Path(out).absolute()
    _must_be_ours(out)
    given = caption.read_given(captions)
    begun = time.time()
    with _writing(out, progress):
        previous = read_parts(out / "parts.parquet")
        known = [source for part in previous for source in part.sources]
        listing = list_inputs(inputs, limit=limit, fraction=fraction, known=known, verify=verify)
        for line in _surprises(out, settings, previous, listing.sources, given):
            progress.note(line)
        given = given.over(listing.given)
        stages = part_stages(settings)
        if verify:
            _forget(out, _edited(out, previous, listing.sources))
        if retry_quarantined:
            _forget(out, _with_failures(out, previous))
        folder = out / stages.watch.folder
        parts = plan(
            listing.sources, previous, lambda name: PartFiles(folder, name).done(), settings.parts
        )
        if parts != previous or not (out / "parts.parquet").exists():
            write_parts(parts, out / "parts.parquet")
        given.write(out / "given.parquet")
        seconds = {"list": time.time() - begun}
        asking = Describing(opened=captioner)
        work = Work(out, parts, given, settings, stages, driver, progress, asking)
        return _bring_up(work, seconds)


def update(
    out: Path | str,
    settings: CurateSettings | None = None,
    *,
    engine: str = "auto",
    workers: int | None = None,
    address: str | None = None,
    progress: Progress | None = None,
    describing: Describing | None = None,
) -> Run:
    """Bring a run directory up to date with other `settings`, without listing its inputs again.

    By default the settings it was made with. A model is asked for new captions only if
    `describing` says so. Raises as `curate` does.
    """
    run = Run(Path(out))
    if not (run.path / "run.json").exists():
        raise UsageError(f"{out}: not a finished run directory (it has no run.json)")
    settings = settings or run.settings
    progress = progress or Progress()
    driver = Engine(choose(engine, address), workers, address)
    check(settings)
    path = run.path.absolute()
    with _writing(path, progress):
        parts = read_parts(path / "parts.parquet")
        given = caption.Given.read(path / "given.parquet")
        stages, asking = part_stages(settings), describing or Describing(ask=False)
        work = Work(path, parts, given, settings, stages, driver, progress, asking)
        return _bring_up(work, {})


def _bring_up(work: Work, seconds: dict[str, float]) -> Run:
    """Do what is missing of a run whose parts are known."""
    at = time.time()
    do_steps(work, part_steps(work))
    sweep(work.out)  # what a lost node left behind
    seconds["parts"] = time.time() - at
    at = time.time()
    folders = join(work)
    seconds["join"] = time.time() - at
    run = Run(work.out)
    _write_info(run, work, folders, seconds)
    report = work.out / "report.html"
    if work.settings.report and not report.exists():
        from unimodal.pipeline.report import write_report

        write_report(run, report)
    return run


def check(settings: CurateSettings) -> None:
    """A typing error in a rule or a prompt shall not wait for the last video."""
    if settings.caption.by_model:
        prompt_of(settings.caption)
    if settings.decide.extra:
        decide.decide(CLIPS.empty_table(), settings.decide)


def _forget(out: Path, names: set[str]) -> None:
    """Remove all that was committed of these parts, so that they are done again.

    And what was made of all parts: its name says which parts there are, not what is in them.
    """
    if names:
        for name in ("clips.parquet", "quarantine.parquet", "report.html"):
            (out / name).unlink(missing_ok=True)
        for pattern in ("caption-*/*", "dedup-*/*", "decide-*/*"):
            for file in out.glob(pattern):
                file.unlink()
    for name in names:
        # The commit mark goes first: a part without it is done again, whatever else is left of it.
        for pattern in (f"*-*/{name}.parquet", f"*-*/{name}.*"):
            for file in out.glob(pattern):
                file.unlink()


def _with_failures(out: Path, parts: Sequence[Part]) -> set[str]:
    names = {part.name for part in parts}
    return {f.name.split(".")[0] for f in out.glob("*-*/*.quarantine.parquet")} & names


def _edited(out: Path, previous: Sequence[Part], sources: Sequence[Any]) -> set[str]:
    """Parts with a source whose bytes are others now, though its size and time are the same."""
    now = {source.identity: source.sha256 for source in sources}
    found = set()
    for part in previous:
        then = {s.uri: s.sha256 for s in part.sources if s.sha256}
        for file in out.glob(f"watch-*/{part.name}.parquet"):
            rows = read_parquet(file, columns=["uri", "source_sha256"]).to_pylist()
            then |= {row["uri"]: row["source_sha256"] for row in rows}
        for source in part.sources:
            if (
                now.get(source.identity)
                and then.get(source.uri, now[source.identity]) != now[source.identity]
            ):
                found.add(part.name)
    return found


@contextmanager
def _writing(out: Path, progress: Progress) -> Iterator[None]:
    """Hold the run's lock; a full disk is one line for the user, wherever it is met."""
    with telling_full_disk(out), run_lock(out, progress):
        sweep(out)
        yield


def _surprises(
    out: Path,
    settings: CurateSettings,
    previous: Sequence[Part],
    sources: Sequence[Source],
    given: caption.Given,
) -> Iterator[str]:
    """What this call undoes of earlier ones, and captions that fit no source."""
    known = {name for source in sources for name in (source.uri, *source.aliases)}
    before = {source.uri for part in previous for source in part.sources}
    if gone := sorted(before - known):
        yield f"{_some(gone)} of before {_are(gone)} not among the inputs: left out"
    if strange := sorted({*given.captions, *given.meta} - known):
        yield f"of the captions, {_some(strange)} {_are(strange)} not among the inputs"
    info = out / "run.json"
    if info.exists():
        then = json.loads(info.read_text())["settings"].get("decide", {})
        now = settings.model_dump(mode="json")["decide"]
        other = [
            f"decide.{name}={value} (was {then[name]})"
            for name, value in now.items()
            if name in then and then[name] != value
        ]
        if other:
            yield f"other thresholds than the last time: {', '.join(other)}"


def _some(uris: Sequence[str]) -> str:
    return uris[0] if len(uris) == 1 else f"{len(uris):,} sources ({uris[0]}, …)"


def _are(uris: Sequence[str]) -> str:
    return "is" if len(uris) == 1 else "are"


def _must_be_ours(out: Path) -> None:
    if out.is_dir():
        names = {path.name for path in out.iterdir()}
        if names and not names & {"run.json", "parts.parquet", "run.lock"}:
            raise UsageError(f"{out}: not empty and not a run directory; name another -o")
    elif out.exists():
        raise UsageError(f"{out}: a file is in the way; name another -o")


def _captions(run: Run, work: Work) -> dict[str, Any]:
    """What captions of a model took: in all, and in the last pass that asked for any."""
    store = store_of(work)
    if store is None or not store.statuses:
        return {}
    before = {}
    if (run.path / "run.json").exists():
        before = Run(run.path).info.get("captions", {})
    same = before.get("folder") == store.folder.name
    last = work.told.get("last") or (before.get("last") if same else None)
    return {"captions": {"folder": store.folder.name, **store.totals(), "last": last}}


def _write_info(
    run: Run, work: Work, folders: Mapping[str, str], seconds: Mapping[str, float]
) -> None:
    parts = work.parts
    versions = {}
    for name in ("unimodal", *LIBRARIES):
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    clips = read_parquet(run.path / "clips.parquet", columns=["verdict", "duration_s"])
    kept = pc.sum(pc.equal(clips.column("verdict"), "keep")).as_py() or 0
    length = pc.sum(clips.column("duration_s")).as_py() or 0.0
    info = {
        "settings": work.settings.model_dump(mode="json"),
        "stages": dict(folders),
        "skipped": work.stages.skipped,
        "engine": work.driver.name,
        "versions": versions,
        "seconds": {name: round(taken, 3) for name, taken in seconds.items()},
        **_captions(run, work),
        "totals": {
            "parts": len(parts),
            "sources": sum(len(part.sources) for part in parts),
            "copies": sum(len(source.copies) for part in parts for source in part.sources),
            "clips": clips.num_rows,
            "kept": kept,
            "dropped": clips.num_rows - kept,
            "quarantined": pq.read_metadata(run.path / "quarantine.parquet").num_rows,
            "clip_seconds": round(length, 3),
        },
    }
    with atomic(run.path / "run.json") as temporary:
        temporary.write_text(json.dumps(info, indent=2) + "\n")
