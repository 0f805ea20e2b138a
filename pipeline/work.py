"""The work of a run: steps of parts for the engine, then the stages that look at all clips at once.

    parts ─> watch, text, quality, embed, nsfw (engine) ─> captions of people ─> dedup
          ─> decide ─> a model describes what is kept ─> match (engine) ─> decide ─> clips.parquet

Where no model describes, there is one verdict, at the end. Where only the thresholds have changed,
the table is read back and judged anew.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from unimodal.pipeline import caption, decide, dedup, large, score, view
from unimodal.pipeline.captioning import describe
from unimodal.pipeline.captioning.store import Store
from unimodal.pipeline.clips import (
    BATCH,
    CLIPS,
    DEDUP,
    MATCH,
    first_text,
    read_parquet,
    write_parquet,
)
from unimodal.pipeline.engine import run_jobs
from unimodal.pipeline.errors import UnimodalError
from unimodal.pipeline.parts import Part, digest
from unimodal.pipeline.presets import CurateSettings
from unimodal.pipeline.progress import Progress
from unimodal.pipeline.stage import PartFiles, Stage
from unimodal.pipeline.stages import Stages
from unimodal.pipeline.tell import Tell
from unimodal.pipeline.worker import Job, Step


@dataclass(frozen=True)
class Engine:
    """Who does the work: auto, inline, local or ray; so many processes; a cluster's address."""

    name: str = "auto"
    workers: int | None = None
    address: str | None = None


@dataclass(frozen=True)
class Describing:
    """How far a model is asked for captions, if the settings name one."""

    ask: bool = True  # False: take what it said before, and note that there is more to ask
    opened: describe.Open | None = None  # who opens the source, where we cannot
    retry_failed: bool = False
    limit: int | None = None  # requests


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
    describing: Describing = Describing()
    told: dict[str, Any] = field(default_factory=dict)  # for run.json: what describing took


@dataclass(frozen=True)
class Joint:
    """The stages that look at all clips at once, and what they are to find."""

    captions: Stage
    described: Stage | None
    matches: Stage | None
    groups: Stage | None
    verdicts: Stage
    sidecars: view.Sidecars
    folders: dict[str, str]  # of every stage of the run


WAITS = "waits"
"""Ends the state of captions where some clips are still to be described."""


def joint(work: Work, state: str, sidecars: view.Sidecars | None = None) -> Joint:
    """The stages after the parts are done; lists the caption files that lie beside the media.

    `state` says what a model has written by now, see `Store.state`; "" if none is asked.
    """
    settings, stages = work.settings, work.stages
    live = digest(work.parts)
    uris = [uri for part in work.parts for s in part.sources for uri in (s.uri, *s.aliases)]
    if sidecars is None:
        sidecars = caption.find_sidecars(uris, settings.caption.sidecar)
    lying = hashlib.sha256(json.dumps(sorted(sidecars.items())).encode()).hexdigest()
    captions = Stage(
        "caption",
        caption.VERSION,
        settings.caption.beside(),
        (stages.watch.folder, live, lying, work.given.digest()),
    )
    reads: tuple[str, ...]
    described = None
    compared = captions  # what match is of; those of a model may grow in their folder
    if settings.caption.by_model:
        described = describe.describe_stage(settings.caption, settings.keyframes.digest())
        reads = (captions.folder, described.folder)
        compared = Stage("caption", caption.VERSION, settings.caption.first, reads)
        captions = Stage("caption", caption.VERSION, settings.caption.first, (*reads, state))
    matches = groups = None
    if "match" not in stages.skipped:
        reads = (stages.folders["embed"], compared.folder)
        matches = Stage("match", score.module("match").VERSION, settings.embed.digest(), reads)
    if "dedup" not in stages.skipped:
        reads = (*(s.folder for s in stages.by_part if s.name not in ("text", "nsfw")), live)
        groups = Stage("dedup", dedup.VERSION, settings.dedup.digest(), reads)
    others = [s for s in (described, matches, groups) if s is not None]
    before = [*stages.by_part, captions, *others]
    reads = (*(stage.folder for stage in before), live)
    verdicts = Stage("decide", decide.VERSION, settings.decide.digest(), reads)
    folders = {stage.name: stage.folder for stage in (*before, verdicts)}
    return Joint(captions, described, matches, groups, verdicts, sidecars, folders)


def join(work: Work) -> dict[str, str]:
    """Do the stages that look at all clips at once; returns the folder of every stage."""
    out, describing = work.out, work.describing
    store = store_of(work)
    plan = joint(work, store.state if store else "")
    there = view.folders_of(out)
    if there == plan.folders and not (store and describing.retry_failed):
        return plan.folders
    if store and not describing.ask:
        waiting = joint(work, store.state + WAITS, plan.sidecars)
        if there == waiting.folders:
            return waiting.folders
    clips = None
    if there is not None and {**there, "decide": plan.verdicts.folder} == plan.folders:
        clips = read_parquet(out / "clips.parquet").drop_columns(["verdict", "reasons"])
        refused = read_parquet(out / "quarantine.parquet").to_pylist()
        if store and to_describe(clips, work.settings, store, describing.retry_failed)[1]:
            clips = None
    if clips is None:
        clips, refused, plan = _columns(work, plan, store)
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


def store_of(work: Work) -> Store | None:
    """What a model has written under these settings; None if none is to write."""
    own = work.settings.caption
    if not own.by_model:
        return None
    stage = describe.describe_stage(own, work.settings.keyframes.digest())
    return Store(work.out / stage.folder, write=True)


def to_describe(
    clips: pa.Table, settings: CurateSettings, store: Store, retry_failed: bool = False
) -> tuple[dict[str, list[str]], int]:
    """Clips that pass all rules and were not described yet, uids by part; and their requests.

    What depends on captions has no say in what is to be captioned.
    """
    scored = clips.drop_columns([name for name in MATCH.names if name in clips.column_names])
    scored = view.with_columns(scored, [], MATCH)
    verdicts = decide.decide(scored, settings.decide).select(["uid", "verdict"])
    judged = view.join(scored.select(["uid", "part", "duration_s"]), verdicts, _VERDICT)
    kept = judged.filter(pc.equal(judged.column("verdict"), "keep"))
    return describe.missing(kept, store, settings.caption, retry_failed)


_VERDICT = pa.schema([CLIPS.field("verdict")])


def _columns(
    work: Work, plan: Joint, store: Store | None
) -> tuple[pa.Table, list[dict[str, str]], Joint]:
    """All columns but the verdict, what could not be read, and the plan as it came out."""
    out, parts, settings, stages = work.out, work.parts, work.settings, work.stages
    clips = view.live_rows(out / stages.watch.folder, parts)
    for name in score.SCORERS:
        schema = pa.schema([f for f in score.module(name).COLUMNS if f.name in CLIPS.names])
        ran = name in stages.folders
        files = view.part_files(out / stages.folders[name], parts) if ran else []
        clips = view.with_columns(clips, files, schema)
    clips, sick = view.with_captions(clips, parts, work.given, plan.sidecars)
    files = []
    if plan.groups is not None:
        files = [out / plan.groups.folder / "groups.parquet"]
        if not files[0].exists():
            found = dedup.group(clips, settings.dedup, _embeddings(out, parts, stages))
            write_parquet(found, files[0])
    clips = view.with_columns(clips, files, DEDUP).drop_columns(["samples"])
    if store is not None:
        left = _describe(work, clips, store)
        clips = describe.with_descriptions(clips, store, settings.caption.first)
        sick += describe.refused(store, clips)
        plan = joint(work, store.state + WAITS * left, plan.sidecars)
    caption_file = out / plan.captions.folder / "captions.parquet"
    if not caption_file.exists():
        said = large.sort_by(clips.select(["part", "uid", "captions"]), ["part"])
        write_parquet(said, caption_file, group=score.CAPTIONS)
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
        if store is not None:
            _forget_stale(out / plan.matches.folder, clips)
        do_steps(work, [step])
        files = view.part_files(out / plan.matches.folder, parts)
    clips = view.with_columns(clips, files, score.module("match").COLUMNS)
    refused = view.quarantined([out / stage.folder for stage in stages.by_part], parts)
    for row in [*refused, *sick][:20]:
        work.progress.note(f"quarantined {row['uri']}: {row['reason']}")
    if len(refused) + len(sick) > 20:
        work.progress.note(f"… and {len(refused) + len(sick) - 20} more, see quarantine.parquet")
    return clips, [*refused, *sick], plan


def _describe(work: Work, clips: pa.Table, store: Store) -> bool:
    """Have a model describe what is kept and was not described; returns whether some is left."""
    settings, how, driver = work.settings, work.describing, work.driver
    wanted, requests = to_describe(clips, settings, store, how.retry_failed)
    if not how.ask:
        if requests:
            work.progress.note(
                f"{requests} requests for captions are left: unimodal caption {work.out}"
            )
        return bool(requests)
    if requests:
        opened = how.opened or (lambda own: describe.open_source(own, driver.name, driver.address))
        made = describe.describe(
            store,
            work.out / work.stages.watch.folder,
            wanted,
            min(requests, how.limit or requests),
            settings.caption,
            opened,
            settings.patience,
            work.progress,
            how.retry_failed,
            how.limit,
        )
        work.told["last"] = made.record()
    return bool(to_describe(clips, settings, store)[1])


def _forget_stale(folder: Path, clips: pa.Table) -> None:
    """Remove what match found in parts of which a clip's first caption is another one now."""
    wanted: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for some in clips.select(["uid", "part", "captions"]).to_batches(BATCH):
        for row in some.to_pylist():
            if text := first_text(row):
                wanted[row["part"]].add((row["uid"], score.text_digest(text)))
    for part, pairs in wanted.items():
        file = PartFiles(folder, part).rows
        if file.exists():
            rows = read_parquet(file, columns=["uid", "of"]).to_pylist()
            if not pairs <= {(row["uid"], row["of"]) for row in rows}:
                file.unlink()


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
        patience.check(failed, seen, "sources", f"{why} ({thing})")

    if sources:
        begin("sources", sources, "sources")

    def end() -> None:
        for task in begun:
            progress.end(task)

    return Tell(seconds=seconds, done=done), end
