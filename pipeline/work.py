"""The work of a run: steps of parts for the engine, then the stages that look at all clips at once.

    parts ─> watch, text, quality, embed, nsfw (engine) ─> captions ─> match (engine)
          ─> dedup ─> decide ─> clips.parquet

Where only the thresholds have changed, the table is read back and judged anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa

from unimodal.pipeline import caption, decide, dedup, score, view
from unimodal.pipeline.clips import CLIPS, DEDUP, read_parquet, write_parquet
from unimodal.pipeline.engine import run_jobs
from unimodal.pipeline.errors import UnimodalError
from unimodal.pipeline.parts import Part, digest
from unimodal.pipeline.presets import CurateSettings
from unimodal.pipeline.progress import Progress
from unimodal.pipeline.stage import Stage
from unimodal.pipeline.stages import Stages, decide_stage, dedup_stage, match_stage
from unimodal.pipeline.tell import Tell
from unimodal.pipeline.worker import Job, Step


@dataclass(frozen=True)
class Engine:
    """Who does the work: auto, inline, local or ray; so many processes; a cluster's address."""

    name: str = "auto"
    workers: int | None = None
    address: str | None = None


@dataclass(frozen=True)
class Work:
    """A run directory that is being brought up to date, with the lock held."""

    out: Path
    parts: Sequence[Part]
    given: caption.Given
    settings: CurateSettings
    stages: Stages
    driver: Engine
    progress: Progress


@dataclass(frozen=True)
class Joint:
    """The stages that look at all clips at once, and what they are to find."""

    captions: Stage
    matches: Stage | None
    groups: Stage | None
    verdicts: Stage
    sidecars: view.Sidecars
    folders: dict[str, str]  # of every stage of the run


def joint(work: Work) -> Joint:
    """The stages after the parts are done; lists the caption files that lie beside the media."""
    settings, stages = work.settings, work.stages
    live = digest(work.parts)
    uris = [uri for part in work.parts for s in part.sources for uri in (s.uri, *s.aliases)]
    sidecars = caption.find_sidecars(uris, settings.caption.sidecar)
    lying = hashlib.sha256(json.dumps(sorted(sidecars.items())).encode()).hexdigest()
    captions = Stage(
        "caption",
        caption.VERSION,
        settings.caption.digest(),
        (stages.watch.folder, live, lying, work.given.digest()),
    )
    matches = None if "match" in stages.skipped else match_stage(stages, settings, captions)
    groups = None if "dedup" in stages.skipped else dedup_stage(stages, settings, live)
    before = [*stages.by_part, captions, *(s for s in (matches, groups) if s is not None)]
    verdicts = decide_stage(settings, live, before)
    folders = {stage.name: stage.folder for stage in (*before, verdicts)}
    return Joint(captions, matches, groups, verdicts, sidecars, folders)


def join(work: Work) -> dict[str, str]:
    """Do the stages that look at all clips at once; returns the folder of every stage."""
    out, plan = work.out, joint(work)
    there = view.folders_of(out)
    if there == plan.folders:
        return plan.folders
    if there is not None and {**there, "decide": plan.verdicts.folder} == plan.folders:
        clips = read_parquet(out / "clips.parquet").drop_columns(["verdict", "reasons"])
        refused = read_parquet(out / "quarantine.parquet").to_pylist()
    else:
        clips, refused = _columns(work, plan)
    verdict_file = out / plan.verdicts.folder / "verdicts.parquet"
    if verdict_file.exists():
        judged = read_parquet(verdict_file)
    else:
        judged = decide.decide(clips, work.settings.decide)
        write_parquet(judged, verdict_file)
    schema = pa.schema([CLIPS.field("verdict"), CLIPS.field("reasons")])
    clips = view.join(clips, judged, schema)
    (out / "report.html").unlink(missing_ok=True)
    view.write_view(out, clips, refused, plan.folders)
    return plan.folders


def _columns(work: Work, plan: Joint) -> tuple[pa.Table, list[dict[str, str]]]:
    """All columns but the verdict, and what could not be read."""
    out, parts, settings, stages = work.out, work.parts, work.settings, work.stages
    clips = view.live_rows(out / stages.watch.folder, parts)
    for name in score.SCORERS:
        schema = pa.schema([f for f in score.module(name).COLUMNS if f.name in CLIPS.names])
        files = []
        if name in stages.folders:
            files = view.part_files(out / stages.folders[name], parts)
        clips = view.with_columns(clips, files, schema)
    clips, sick = view.with_captions(clips, parts, work.given, plan.sidecars)
    caption_file = out / plan.captions.folder / "captions.parquet"
    if not caption_file.exists():
        write_parquet(clips.select(["uid", "captions"]), caption_file)
    files = []
    if plan.matches is not None:
        step = Step(
            "match",
            str(out / plan.matches.folder),
            settings.embed.model_dump(mode="json"),
            reads=str(out / stages.folders["embed"]),
            captions=str(caption_file),
            model=True,
        )
        do_steps(work, [step])
        files = view.part_files(out / plan.matches.folder, parts)
    clips = view.with_columns(clips, files, score.module("match").COLUMNS)
    files = []
    if plan.groups is not None:
        files = [out / plan.groups.folder / "groups.parquet"]
        if not files[0].exists():
            found = dedup.group(clips, settings.dedup, _embeddings(out, parts, stages))
            write_parquet(found, files[0])
    clips = view.with_columns(clips, files, DEDUP).drop_columns(["samples"])
    refused = view.quarantined([out / stage.folder for stage in stages.by_part], parts)
    for row in [*refused, *sick][:20]:
        work.progress.note(f"quarantined {row['uri']}: {row['reason']}")
    if len(refused) + len(sick) > 20:
        work.progress.note(f"… and {len(refused) + len(sick) - 20} more, see quarantine.parquet")
    return clips, [*refused, *sick]


def _embeddings(out: Path, parts: Sequence[Part], stages: Stages) -> pa.Table | None:
    if "embed" in stages.skipped:
        return None
    files = view.part_files(out / stages.folders["embed"], parts)
    return pa.concat_tables([read_parquet(f, columns=["uid", "embedding"]) for f in files])


def part_steps(work: Work) -> list[Step]:
    """What has to be done with every part."""
    return [_step(work.out, stage, work.stages, work.settings) for stage in work.stages.by_part]


def _step(out: Path, stage: Stage, stages: Stages, settings: CurateSettings) -> Step:
    own = settings.watch() if stage.name == "watch" else getattr(settings, stage.name)
    return Step(
        stage.name,
        str(out / stage.folder),
        own.model_dump(mode="json"),
        reads="" if stage.name == "watch" else str(out / stages.watch.folder),
        model=stage.name == "embed",
    )


def do_steps(work: Work, steps: Sequence[Step]) -> None:
    """Have the engine do those steps of parts that are not done yet; raises `UnimodalError`."""
    jobs = []
    sources = 0
    for part in work.parts:
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
    tell, end = _told(work, sources)
    try:
        driver = work.driver
        run_jobs(jobs, driver.name, tell, work.settings.patience, driver.workers, driver.address)
    finally:
        end()
    lost = {job.part for job in jobs for step in job.steps if not step.done(job.part)}
    if lost:
        raise UnimodalError(
            f"{Path(steps[0].folder).parent}: {len(lost)} parts were done but are not to be seen "
            "here; with several machines, the run directory must be on storage that all of them "
            "share"
        )


def _told(work: Work, sources: int) -> tuple[Tell, Callable[[], None]]:
    """Draw what workers tell, and stop the run when most sources fail."""
    counted: set[tuple[str, str]] = set()
    begun: list[str] = []
    failed = seen = 0
    progress, patience = work.progress, work.settings.patience

    def begin(task: str, total: float, unit: str) -> None:
        if task not in begun:
            begun.append(task)
            progress.begin(task, total, unit)

    def seconds(amount: float) -> None:
        if amount:
            begin("video", 0, "s of video")  # its total is known only when all is decoded
            progress.advance("video", amount)

    def done(stage: str, thing: str, why: str) -> None:
        nonlocal failed, seen
        if (stage, thing) in counted:  # a part that is tried again tells of its first ones again
            return
        counted.add((stage, thing))
        if stage != "watch":
            begin(stage, 0, "clips" if stage != "match" else "parts")
            progress.advance(stage)
            return
        progress.advance("sources")
        failed += bool(why)
        seen += 1
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
