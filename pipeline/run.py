"""`curate`: sources in, a run directory out; `update`: the same for a run that is there already.

    list ─> parts ─> watch, text, quality, embed, nsfw (engine) ─> captions ─> match (engine)
         ─> dedup ─> decide ─> clips.parquet ─> report.html

Every step looks for its own earlier result first, so the same call again only stats files, and
a call after a crash does what is missing.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from unimodal.pipeline import caption, decide, dedup, score, view
from unimodal.pipeline.clips import CAPTION, CLIPS, DEDUP, read_parquet, write_parquet
from unimodal.pipeline.engine import choose, run_jobs
from unimodal.pipeline.errors import UnimodalError, UsageError, full_disk
from unimodal.pipeline.files import atomic
from unimodal.pipeline.inputs import list_inputs
from unimodal.pipeline.lock import run_lock
from unimodal.pipeline.parts import Part, digest, plan, read_parts, write_parts
from unimodal.pipeline.presets import PRESETS, CurateSettings
from unimodal.pipeline.progress import Progress
from unimodal.pipeline.settings import build
from unimodal.pipeline.stage import PartFiles, Stage, sweep
from unimodal.pipeline.stages import (
    Stages,
    decide_stage,
    dedup_stage,
    match_stage,
    part_stages,
)
from unimodal.pipeline.tell import Tell
from unimodal.pipeline.worker import Job, Step

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
            raise UsageError(f"{path}: not a finished run directory (it has no clips.parquet)")
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
        return int(pc.sum(pc.equal(self.clips.column("verdict"), "keep")).as_py() or 0)

    @property
    def dropped(self) -> int:
        """Clips that some rule dropped."""
        return self.clips.num_rows - self.kept

    @property
    def quarantined(self) -> int:
        """Rows of the quarantine table."""
        return self.quarantine.num_rows

    @cached_property
    def settings(self) -> CurateSettings:
        """What the run was made with; raises `UsageError` if this version knows them no more."""
        return build(CurateSettings, self.info["settings"])

    def frames_tar(self, part: str) -> Path:
        """The tar that holds the sampled frames of a part's clips."""
        return PartFiles(self.path / self.info["stages"]["watch"], part).frames


@dataclass(frozen=True)
class Engine:
    """Who does the work: auto, inline, local or ray; so many processes; a cluster's address."""

    name: str = "auto"
    workers: int | None = None
    address: str | None = None


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
) -> Run:
    """Curate images and videos into the run directory `out`, or bring one up to date.

    `inputs` are files, folders, globs, tables of paths, WebDataset tars and fsspec addresses;
    `limit` takes the first so many sources, `fraction` a share of them. `engine` is auto, inline,
    local or ray, with `workers` processes (default: one per processor) and, for Ray, a cluster
    `address`. `captions` is a mapping from path to text or texts, or a table with the columns path
    and caption. `verify` compares contents, where size and modification time are trusted
    otherwise. `retry_quarantined` does the parts again in which something could not be read.

    A source that cannot be read goes to quarantine with its reason. Raises `UsageError` for
    inputs that do not exist or settings that do not evaluate, `UnimodalError` when the run
    cannot go on (locked, disk full, most sources fail).
    """
    settings = settings or CurateSettings()
    progress = progress or Progress()
    driver = Engine(choose(engine, address), workers, address)
    _check(settings)
    out = Path(out).absolute()
    _must_be_ours(out)
    given = caption.read_given(captions)
    begun = time.time()
    with run_lock(out, progress), _disk(out):
        sweep(out)
        previous = read_parts(out / "parts.parquet")
        known = [source for part in previous for source in part.sources]
        listing = list_inputs(inputs, limit=limit, fraction=fraction, known=known, verify=verify)
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
        _keep_given(given, out / "given.parquet")
        seconds = {"list": time.time() - begun}
        return _bring_up(out, parts, given, settings, stages, driver, progress, seconds)


def update(
    out: Path | str,
    settings: CurateSettings | None = None,
    *,
    engine: str = "auto",
    workers: int | None = None,
    address: str | None = None,
    progress: Progress | None = None,
) -> Run:
    """Bring a run directory up to date with other `settings`, without listing its inputs again.

    By default the settings it was made with. Raises as `curate` does.
    """
    run = Run.open(out)
    settings = settings or run.settings
    progress = progress or Progress()
    driver = Engine(choose(engine, address), workers, address)
    _check(settings)
    path = run.path.absolute()
    with run_lock(path, progress), _disk(path):
        sweep(path)
        parts = read_parts(path / "parts.parquet")
        given = _kept_given(path / "given.parquet")
        return _bring_up(path, parts, given, settings, part_stages(settings), driver, progress, {})


def _bring_up(
    out: Path,
    parts: Sequence[Part],
    given: caption.Given,
    settings: CurateSettings,
    stages: Stages,
    driver: Engine,
    progress: Progress,
    seconds: dict[str, float],
) -> Run:
    """Do what is missing of a run whose parts are known."""
    at = time.time()
    steps = [_step(out, stage, stages, settings) for stage in stages.by_part]
    _work(parts, steps, settings, driver, progress)
    sweep(out)  # what a lost node left behind
    seconds["parts"] = time.time() - at
    at = time.time()
    folders = _join(out, parts, given, settings, stages, driver, progress)
    seconds["join"] = time.time() - at
    run = Run(out)
    _write_info(run, settings, folders, stages.skipped, parts, driver.name, seconds)
    report = out / "report.html"
    if settings.report and not report.exists():
        from unimodal.pipeline.report import write_report

        write_report(run, report)
    return run


def _join(
    out: Path,
    parts: Sequence[Part],
    given: caption.Given,
    settings: CurateSettings,
    stages: Stages,
    driver: Engine,
    progress: Progress,
) -> dict[str, str]:
    """The stages that look at all clips at once; returns the folder of every stage."""
    live = digest(parts)
    uris = [uri for part in parts for s in part.sources for uri in (s.uri, *s.aliases)]
    sidecars = caption.find_sidecars(uris, settings.caption.sidecar)
    lying = hashlib.sha256(json.dumps(sorted(sidecars.items())).encode()).hexdigest()
    captions = Stage(
        "caption",
        caption.VERSION,
        settings.caption.digest(),
        (stages.watch.folder, live, lying, given.digest()),
    )
    before = [*stages.by_part, captions]
    matches = None if "match" in stages.skipped else match_stage(stages, settings, captions)
    groups = None if "dedup" in stages.skipped else dedup_stage(stages, settings, live)
    before += [stage for stage in (matches, groups) if stage is not None]
    verdicts = decide_stage(settings, live, before)
    folders = {stage.name: stage.folder for stage in (*before, verdicts)}
    mark = view.made_of(folders)
    if view.is_made_of(out, mark):
        return folders
    clips = view.live_rows(out / stages.watch.folder, parts)
    for name in score.SCORERS:
        schema = pa.schema([f for f in score.module(name).COLUMNS if f.name in CLIPS.names])
        files = view.part_files(out / stages.folders[name], parts) if name in folders else []
        clips = view.with_columns(clips, files, schema)
    clips, sick = view.with_captions(clips, parts, given, sidecars)
    caption_file = out / captions.folder / "captions.parquet"
    if not caption_file.exists():
        write_parquet(clips.select(["uid", "captions"]), caption_file)
    files = []
    if matches is not None:
        step = Step(
            "match",
            str(out / matches.folder),
            settings.embed.model_dump(mode="json"),
            reads=str(out / stages.folders["embed"]),
            captions=str(caption_file),
            model=True,
        )
        _work(parts, [step], settings, driver, progress)
        files = view.part_files(out / matches.folder, parts)
    clips = view.with_columns(clips, files, score.module("match").COLUMNS)
    files = []
    if groups is not None:
        files = [out / groups.folder / "groups.parquet"]
        if not files[0].exists():
            found = dedup.group(clips, settings.dedup, _embeddings(out, parts, stages))
            write_parquet(found, files[0])
    clips = view.with_columns(clips, files, DEDUP)
    verdict_file = out / verdicts.folder / "verdicts.parquet"
    if not verdict_file.exists():
        write_parquet(decide.decide(clips, settings.decide), verdict_file)
    schema = pa.schema([CLIPS.field("verdict"), CLIPS.field("reasons")])
    clips = view.with_columns(clips, [verdict_file], schema)
    refused = view.quarantined([out / stage.folder for stage in stages.by_part], parts)
    (out / "report.html").unlink(missing_ok=True)
    view.write_view(out, clips, [*refused, *sick], mark, progress)
    return folders


def _embeddings(out: Path, parts: Sequence[Part], stages: Stages) -> pa.Table | None:
    if "embed" in stages.skipped:
        return None
    files = view.part_files(out / stages.folders["embed"], parts)
    return pa.concat_tables([read_parquet(f, columns=["uid", "embedding"]) for f in files])


def _step(out: Path, stage: Stage, stages: Stages, settings: CurateSettings) -> Step:
    own = settings.watch() if stage.name == "watch" else getattr(settings, stage.name)
    return Step(
        stage.name,
        str(out / stage.folder),
        own.model_dump(mode="json"),
        reads="" if stage.name == "watch" else str(out / stages.watch.folder),
        model=stage.name in ("embed", "nsfw"),
    )


def _work(
    parts: Sequence[Part],
    steps: Sequence[Step],
    settings: CurateSettings,
    driver: Engine,
    progress: Progress,
) -> None:
    """Have the engine do those steps of parts that are not done yet."""
    jobs = []
    sources = 0
    for part in parts:
        missing = [step for step in steps if not step.done(part.name)]
        if missing:
            listed = [
                {k: v for k, v in asdict(source).items() if k != "copies"}
                for source in part.sources
            ]
            jobs.append(Job(part.name, missing, listed))
            if missing[0].stage == "watch":
                sources += len(listed)
    if not jobs:
        return
    tell, end = _told(progress, sources, settings)
    try:
        run_jobs(jobs, driver.name, tell, settings.patience, driver.workers, driver.address)
    finally:
        end()
    lost = {job.part for job in jobs for step in job.steps if not step.done(job.part)}
    if lost:
        raise UnimodalError(
            f"{Path(steps[0].folder).parent}: {len(lost)} parts were done but are not to be seen "
            "here; with several machines, the run directory must be on storage that all of them "
            "share"
        )


def _told(progress: Progress, sources: int, settings: CurateSettings) -> tuple[Tell, Any]:
    """Draw what workers tell, and stop the run when most sources fail."""
    counted: set[tuple[str, str]] = set()
    begun: list[str] = []
    failed = 0
    patience = settings.patience

    def begin(task: str, total: float, unit: str) -> None:
        if task not in begun:
            begun.append(task)
            progress.begin(task, total, unit)

    def seconds(amount: float) -> None:
        if amount:
            begin("video", 0, "s of video")  # its total is known only when all is decoded
            progress.advance("video", amount)

    def done(stage: str, thing: str, why: str) -> None:
        nonlocal failed
        if (stage, thing) in counted:  # a part that is tried again tells of its first ones again
            return
        counted.add((stage, thing))
        if stage != "watch":
            begin(stage, 0, "clips" if stage != "match" else "parts")
            progress.advance(stage)
            return
        progress.advance("sources")
        failed += bool(why)
        seen = len(counted)
        if failed >= patience.failures_least and failed > patience.failures * seen:
            raise UnimodalError(
                f"stopped: {failed} of the first {seen} sources could not be read, the last one "
                f"({thing}) because of: {why}. If a disk or a network was away, run the same "
                "command with --retry-quarantined; if these files are just broken, with "
                "--set patience.failures=1"
            )

    if sources:
        begin("sources", sources, "sources")

    def end() -> None:
        for task in begun:
            progress.end(task)

    return Tell(seconds=seconds, done=done), end


def _check(settings: CurateSettings) -> None:
    """A typing error in a rule shall not wait for the last video."""
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
        for file in out.glob(f"*-*/{name}.*"):
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


GIVEN = pa.schema(
    [
        pa.field("uri", pa.string(), nullable=False),
        pa.field("captions", pa.list_(CAPTION)),
        pa.field("meta", CLIPS.field("meta").type),
        pa.field("sick", pa.string()),  # why this caption file in a tar cannot be read
    ]
)
"""Captions and columns that came with the call, kept so that `update` has them too."""


def _keep_given(given: caption.Given, path: Path) -> None:
    if not given.captions and not given.meta and not given.sick:
        path.unlink(missing_ok=True)
        return
    rows = [
        {
            "uri": uri,
            "captions": [vars(found) for found in given.captions.get(uri, ())],
            "meta": list(given.meta.get(uri, {}).items()),
            "sick": given.sick.get(uri),
        }
        for uri in sorted({*given.captions, *given.meta, *given.sick})
    ]
    write_parquet(pa.Table.from_pylist(rows, schema=GIVEN), path)


def _kept_given(path: Path) -> caption.Given:
    given = caption.Given()
    if path.exists():
        names = ("text", "style", "lang", "start_s", "end_s")
        for row in read_parquet(path).to_pylist():
            if row["captions"]:
                given.captions[row["uri"]] = [
                    caption.Caption(*(found[name] for name in names)) for found in row["captions"]
                ]
            if row["meta"]:
                given.meta[row["uri"]] = dict(row["meta"])
            if row["sick"]:
                given.sick[row["uri"]] = row["sick"]
    return given


@contextmanager
def _disk(out: Path) -> Iterator[None]:
    """A full disk is one line for the user, wherever it is met."""
    try:
        yield
    except OSError as error:
        raise full_disk(error, out) or error from error


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
    folders: Mapping[str, str],
    skipped: Mapping[str, str],
    parts: Sequence[Part],
    engine: str,
    seconds: Mapping[str, float],
) -> None:
    versions = {}
    for name in ("unimodal", *LIBRARIES):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    clips = read_parquet(run.path / "clips.parquet", columns=["verdict", "duration_s"])
    kept = pc.sum(pc.equal(clips.column("verdict"), "keep")).as_py() or 0
    length = pc.sum(clips.column("duration_s")).as_py() or 0.0
    info = {
        "settings": settings.model_dump(mode="json"),
        "stages": dict(folders),
        "skipped": dict(skipped),
        "engine": engine,
        "versions": versions,
        "seconds": {name: round(taken, 3) for name, taken in seconds.items()},
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
