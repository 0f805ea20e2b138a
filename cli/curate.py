"""`unimodal curate`: media in, a run directory out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unimodal.cli import options
from unimodal.cli.options import Engine

if TYPE_CHECKING:
    from unimodal.pipeline.presets import CurateSettings
    from unimodal.pipeline.run import Run


def curate(
    inputs: Annotated[list[str], typer.Argument(help="Files, folders and globs of media.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Run directory.")] = Path("run"),
    preset: options.Preset = "best",
    sets: options.Sets = None,
    captions: Annotated[
        Path | None,
        typer.Option("--captions", help="JSONL or CSV with the columns path and caption."),
    ] = None,
    engine: Annotated[Engine, typer.Option("--engine", help="Where the work runs.")] = Engine.auto,
    address: options.Address = None,
    workers: options.Workers = None,
    limit: options.Limit = None,
    plan: options.Plan = False,
    strict: options.Strict = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Cut videos into clips, measure clips and images, and decide which to keep.

    Finished work is kept: after an interruption, with new files or with other thresholds, the
    same command does only what is missing.
    """
    from unimodal.cli import console
    from unimodal.pipeline import presets, run
    from unimodal.pipeline.errors import UnimodalError, UsageError
    from unimodal.pipeline.settings import build

    if preset not in presets.PRESETS:
        raise UsageError(f"no preset {preset}: there are {', '.join(presets.PRESETS)}")
    settings = build(presets.CurateSettings, presets.PRESETS[preset], sets=sets or [])
    sources = [console.from_stdin(item) for item in inputs]
    if plan:
        _plan(sources, settings, limit, engine.value, address, json)
        return
    made = run.curate(
        sources,
        out,
        settings,
        engine=engine.value,
        workers=workers,
        address=address,
        progress=console.progress(quiet),
        limit=limit,
        captions=captions,
    )
    record = {"kept": made.kept, "dropped": made.dropped, "quarantined": made.quarantined}
    reasons = _reasons(made)
    if not made.clips.num_rows:
        raise UnimodalError(
            f"no input could be read ({made.quarantined} quarantined): see "
            f"{out / 'quarantine.parquet'} for the reason of each"
        )
    console.table(f"clips in {out}", [*record.items(), *reasons], quiet)
    if not made.kept:
        console.progress(quiet).note(
            "nothing was kept; loosen a rule, for example --set decide.flow_min=none"
        )
    console.result(out, {**record, "dropped_by": dict(reasons)}, json)
    if strict and made.quarantined:
        raise typer.Exit(3)


def _reasons(made: Run) -> list[tuple[str, int]]:
    """How many clips are dropped by rules on each column."""
    from collections import Counter

    reasons = made.clips.column("reasons").to_pylist()
    rules = [{r.split(":")[1].split("=")[0] for r in row or []} for row in reasons]
    counts = Counter(f"dropped by {rule}" for row in rules for rule in row)
    return counts.most_common()


def _plan(
    inputs: list[str],
    settings: CurateSettings,
    limit: int | None,
    engine: str,
    address: str | None,
    as_json: bool,
) -> None:
    from unimodal.cli import console
    from unimodal.pipeline.engine import choose
    from unimodal.pipeline.inputs import list_sources
    from unimodal.pipeline.parts import group

    sources = list_sources(inputs, limit)
    record = {
        "sources": len(sources),
        "bytes": sum(source.size for source in sources),
        "parts": len(group(sources, settings.parts)),
        "engine": choose(engine, address),
        "stages": "watch, caption, decide",
    }
    console.plan("would curate", record, as_json)
