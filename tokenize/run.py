"""From a curated run, or files of documents, to shards: the plan, who does it, what came of it.

    run/clips.parquet -> plan.units ────────┐
    x.jsonl y.txt     -> corpora.row_units ─┴> jobs for an engine (unit.do_unit) -> shards/

A unit is one shard, and a job of `unimodal.pipeline.engine`: the same bytes come out in this
process, in a pool or on Ray. Workers write tars and their indices; the manifest and the quarantine
are written here. Batches are fixed by the plan, so that a run that was killed and resumed writes
the same bytes as one that was not.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pyarrow as pa

from unimodal.pipeline.engine import choose, run_jobs
from unimodal.pipeline.errors import UnimodalError, UsageError, full_disk
from unimodal.pipeline.files import atomic
from unimodal.pipeline.lock import run_lock
from unimodal.pipeline.progress import Progress
from unimodal.pipeline.tell import Tell
from unimodal.pipeline.worker import Job, Step
from unimodal.tokenize import plan as plans
from unimodal.tokenize.corpora import Corpus, RowUnit, find_corpora, row_units
from unimodal.tokenize.device import usable
from unimodal.tokenize.plan import (
    PACKED,
    TokenizeSettings,
    Unit,
    clips_file,
    kept_clips,
    score_columns,
    units,
)
from unimodal.tokenize.shard import shard_paths
from unimodal.tokenize.shards import Shards, ShardWriter, check_ours
from unimodal.tokenize.unit import KEPT, PLAN, STAGE, Setup, VisionTokenizer
from unimodal.tokenize.vocabulary import Vocabulary

__all__ = ["TokenizeSettings", "estimate", "tokenize"]

Things = str | Path | Sequence[str | Path]
"""A run directory of curate, or files of texts or documents, or globs of such."""


def tokenize(
    things: Things,
    out: Path,
    settings: TokenizeSettings,
    *,
    tokenizer: VisionTokenizer | None = None,
    engine: str = "auto",
    workers: int | None = None,
    address: str | None = None,
    progress: Progress | None = None,
    limit: int | None = None,
    device: str = "auto",
    retry_quarantined: bool = False,
) -> Shards:
    """Tokenize the kept clips of a run, or the rows of files, into shards at `out`; open them.

    Shards that are already there for the same input and settings are not made again;
    `retry_quarantined` does those again from which something was left out that could not be read.
    `limit` takes only the first so many clips or rows. `engine` is auto, inline, local or ray, with
    `workers` processes and, for Ray, a cluster `address`; where there are GPUs and `device` is
    auto or cuda, each gets a process. Raises `UnimodalError` if there is nothing to do, if `out`
    holds shards of another tokenizer, vocabulary or settings, or if the run cannot go on.

    `tokenizer` replaces the one that the settings name, in this process: it stays on the device
    where it is.
    """
    progress = progress or Progress()
    driver = driver_of(engine, address, device) if tokenizer is None else "inline"
    out = out.absolute()
    check_ours(out)
    found = _found(things, settings)
    made_of = ""
    if isinstance(found, Path):
        with clips_file(found).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        made_of = hashlib.sha256(f"{digest} {limit}".encode()).hexdigest()
    if tokenizer is None:
        from unimodal.tokenize.vision.tokenizer import VisionTokenizer as Trained

        # Workers load the copy in `out`; here it is only looked at, unless all is done here.
        where = usable(device) if driver == "inline" else "cpu"
        tokenizer = Trained.load(settings.tokenizer, where)
    vocabulary = Vocabulary.named(settings.vocabulary, tokenizer.codebook_size)
    if driver == "local" and device == "auto":
        device = usable("auto").partition(":")[0]  # a card that torch cannot use is none
    with run_lock(out, progress):
        try:
            before = _samples(out)
            writer = ShardWriter(out, tokenizer, vocabulary, settings.recorded())
            again = retry_quarantined or not made_of
            shards = None if again else writer.complete(made_of)
            if shards is not None:
                progress.note("all shards were there already")
            else:
                plan = _Plan(out, writer, settings, device, retry_quarantined)
                if isinstance(found, Path):
                    plan.clip_units(found, vocabulary, tokenizer.spatial_factor, limit)
                else:
                    scores = sorted({name for corpus in found for name in corpus.numbers})
                    plan.make(row_units(found, settings, limit), scores)
                    made_of = plan.digest.hexdigest()
                if driver == "inline":
                    facts = settings.model_dump(mode="json")
                    KEPT[plan.run] = Setup.load(out, device, facts, tokenizer)
                del tokenizer  # a gigabyte that nobody needs beside the workers
                unit = "clips" if isinstance(found, Path) else "rows"
                seconds = _do(plan, driver, workers, address, unit, progress)
                (out / PLAN).unlink(missing_ok=True)
                shards = writer.finish(plan.count, made_of)
                if plan.jobs:
                    codes = sum(writer.codes[number] for number in plan.numbers)
                    done = sum(plan.clips.values())
                    shards.rates = {f"{unit}/s": done / seconds, "codes/s": codes / seconds}
                if resumed := plan.count - len(plan.jobs):
                    progress.note(f"{resumed} of {plan.count} shards were there already")
        except OSError as error:
            raise full_disk(error, out) or error from error
    _tell_totals(shards, before, settings, progress)
    return shards


def _tell_totals(
    shards: Shards, before: int, settings: TokenizeSettings, progress: Progress
) -> None:
    """Say what may surprise of finished shards, of which there were `before` samples."""
    totals = shards.manifest["totals"]
    if totals["samples"] < before:
        progress.note(
            f"{before:,} samples were here, now {totals['samples']:,}: shards follow their input"
        )
    if totals["quarantined"]:
        why = shards.path / "quarantine.parquet"
        progress.note(f"{totals['quarantined']} inputs were left out: {why} says why")
    if settings.val_fraction and not totals["val"]:
        progress.note(
            "no source fell into the validation split: to have one, --set val_fraction=0.1 or more"
        )


def _samples(out: Path) -> int:
    """Of finished shards; 0 where there are none."""
    try:
        return int(json.loads((out / "manifest.json").read_text())["totals"]["samples"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def estimate(
    things: Things,
    out: Path,
    settings: TokenizeSettings,
    tokenizer: VisionTokenizer,
    vocabulary: Vocabulary,
    limit: int | None = None,
) -> dict[str, int]:
    """What `tokenize` would make, as counts; `done` shards are in `out` already.

    Raises `UnimodalError` as `tokenize` does before it begins.
    """
    found = _found(things, settings)
    writer = ShardWriter(out, tokenizer, vocabulary, settings.recorded(), look_only=True)

    def there(unit: Unit | RowUnit) -> bool:
        return writer.has(unit.number, unit.digest(writer.header))

    if isinstance(found, Path):
        clips = kept_clips(found, limit)
        return plans.estimate(clips, settings, vocabulary, tokenizer.spatial_factor, there)
    total = dict.fromkeys(("shards", "done", "rows", "bytes"), 0)
    total["bytes"] = sum(Path(corpus.path).stat().st_size for corpus in found)
    for unit in row_units(found, settings, limit):
        total["shards"] += 1
        total["done"] += there(unit)
        total["rows"] += unit.clips
    return total


def _found(things: Things, settings: TokenizeSettings) -> Path | list[Corpus]:
    """The run directory, or the files, that a user means."""
    many = [things] if isinstance(things, str | Path) else list(things)
    one = Path(many[0])
    if len(many) == 1 and (one.is_dir() or not (one.suffix or one.exists())):
        return one
    return find_corpora(many, settings)


def driver_of(engine: str, address: str | None, device: str) -> str:
    """The engine that runs; raises `UsageError` for a device that is not there or not for it."""
    driver = choose(engine, address)
    if ":" in device and driver != "inline":  # one certain GPU
        if engine != "auto":
            raise UsageError(
                f"--device {device} is one GPU of this machine: with --engine {driver} say "
                "--device cuda, and each process gets its own"
            )
        driver = "inline"
    if driver != "ray" and device not in ("auto", "cpu"):
        usable(device)
    return driver


class _Plan:
    """The units of a run, and the jobs for those that are not done."""

    def __init__(
        self, out: Path, writer: ShardWriter, settings: TokenizeSettings, device: str, retry: bool
    ) -> None:
        self.out, self.writer, self.settings = out, writer, settings
        self.device, self.retry = device, retry
        self.digest = hashlib.sha256()  # of all units
        self.run = secrets.token_hex(8)
        self.count = 0  # units
        self.there = 0  # clips of units that are done
        self.jobs: list[Job] = []
        self.numbers: list[int] = []  # units of the jobs
        self.clips: dict[str, int] = {}  # of each job, by its part

    def clip_units(
        self, run_dir: Path, vocabulary: Vocabulary, factor: int, limit: int | None
    ) -> None:
        """Write the clips in order for the workers, and `make` their units."""
        clips = kept_clips(run_dir, limit)
        with (
            atomic(self.out / PLAN) as temporary,
            pa.ipc.new_file(temporary, clips.schema, options=PACKED) as file,
        ):

            def written() -> Iterator[pa.RecordBatch]:
                for batch in clips:
                    file.write_batch(batch)
                    yield batch

            found = units(written(), self.settings, vocabulary, factor)
            self.make(found, score_columns(clips.schema))

    def make(self, found: Iterable[Unit | RowUnit], scores: list[str]) -> None:
        """Find out what is to be done."""
        told = self.settings.model_dump(mode="json")
        shared = {"run": self.run, "device": self.device, "scores": scores, "settings": told}
        for unit in found:
            self.count += 1
            digest = unit.digest(self.writer.header)
            self.digest.update(digest.encode())
            if self.writer.has(unit.number, digest) and not (
                self.retry and self.writer.lost(unit.number) != unit.unfit
            ):
                self.there += unit.clips
                continue
            part = shard_paths(self.out, unit.number)[0].stem
            facts = {**shared, "number": unit.number, "digest": digest, "pictures": unit.pictures}
            entry, model = "unimodal.tokenize.unit:do_unit", unit.pictures and self.device != "cpu"
            step = Step(STAGE, str(self.out), facts | unit.facts(), model=model, entry=entry)
            self.jobs.append(Job(part, [step], [], threads=0))
            self.numbers.append(unit.number)
            self.clips[part] = unit.clips
        if self.jobs:
            self.writer.begin(self.numbers)


def _do(
    plan: _Plan,
    driver: str,
    workers: int | None,
    address: str | None,
    unit: str,
    progress: Progress,
) -> float:
    """Have the engine do the jobs, of so many of a `unit`; returns the seconds that it took."""
    patience = plan.settings.patience
    progress.begin(STAGE, plan.there + sum(plan.clips.values()), unit)
    progress.advance(STAGE, plan.there)
    told: dict[str, int] = {}  # things of each part: one that is tried again tells of them again
    seen = failed = 0

    def done(stage: str, thing: str, why: str) -> None:
        nonlocal seen, failed
        part, _, position = thing.partition("#")
        if int(position) < told.get(part, 0):
            return
        told[part] = int(position) + 1
        if told[part] <= plan.clips[part]:  # the first may have begun in the unit before
            progress.advance(STAGE)
        seen += 1
        failed += bool(why)
        patience.check(failed, seen, unit, why)

    begun = time.monotonic()
    try:
        run_jobs(plan.jobs, driver, Tell(done=done), patience, workers, address)
    finally:
        KEPT.pop(plan.run, None)
        progress.end(STAGE)
    lost = [job.part for job in plan.jobs if not job.steps[0].done(job.part)]
    if lost:
        raise UnimodalError(
            f"{plan.out}: {len(lost)} shards were made but are not to be seen here; with several "
            "machines, it must be on storage that all of them share"
        )
    return time.monotonic() - begun
