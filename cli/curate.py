"""`unimodal curate`: media in, a run directory out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unimodal.cli import options
from unimodal.cli.options import Engine

if TYPE_CHECKING:
    from unimodal.pipeline.presets import CurateSettings
    from unimodal.pipeline.run import Run


def curate(
    inputs: Annotated[
        list[str],
        typer.Argument(help="Files, folders, globs, tables of paths, WebDataset tars, s3://…"),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Run directory.")] = Path("run"),
    preset: options.Preset = "best",
    sets: options.Sets = None,
    captions: Annotated[
        str | None,
        typer.Option(
            "--captions", metavar="TABLE", help="Table (csv, jsonl, parquet) of path and caption."
        ),
    ] = None,
    engine: options.On = Engine.auto,
    address: options.Address = None,
    workers: options.Workers = None,
    limit: options.Limit = None,
    sample: Annotated[
        str | None, typer.Option("--sample", help="Only this share of the inputs, as 1%.")
    ] = None,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Compare contents, not only size and modification time."),
    ] = False,
    retry: Annotated[
        bool,
        typer.Option("--retry-quarantined", help="Do parts with unreadable files again."),
    ] = False,
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
    from unimodal.cli.stages import captioner
    from unimodal.pipeline import presets, run
    from unimodal.pipeline.settings import build

    settings = build(presets.CurateSettings, presets.preset_layer(preset), sets=sets or [])
    sources = [console.from_stdin(item) for item in inputs]
    fraction = _fraction(sample)
    if plan:
        _plan(sources, out, settings, limit, fraction, engine.value, address, workers, json)
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
        fraction=fraction,
        captions=captions,
        verify=verify,
        retry_quarantined=retry,
        captioner=captioner(settings, engine.value, address),
    )
    tell_result(made, json, quiet)
    if strict and made.quarantined:
        raise typer.Exit(3)


def tell_result(made: Run, as_json: bool, quiet: bool) -> None:
    """Print a run's totals and warnings for people, its path for programs."""
    from unimodal.cli import console
    from unimodal.pipeline.captioning.answers import captioned
    from unimodal.pipeline.errors import UnimodalError
    from unimodal.pipeline.judged import advice, judge

    totals, where = made.info["totals"], console.nearby(made.path)
    record = {name: totals[name] for name in ("kept", "dropped", "quarantined")}
    if not totals["clips"]:
        if as_json:
            console.result(where, record, as_json)
        raise UnimodalError(
            f"no input could be read ({totals['quarantined']} quarantined): see "
            f"{where / 'quarantine.parquet'} for the reason of each"
        )
    if quiet and not as_json:  # a million rows are not read again for nobody
        console.result(where, record, as_json)
        return
    thresholds = made.settings.decide
    judged = judge(made.clips, thresholds)
    dropping = sorted((one for one in judged if one.dropped), key=lambda one: -one.dropped)
    reasons = {one.keep: one.dropped for one in dropping}
    rows: list[tuple[str, Any]] = [
        (f"  by {one.named}", f"{one.dropped:,}  {one.fails}") for one in dropping
    ]
    rows.insert(0, ("dropped", totals["dropped"]))
    said = captioned(made.clips.column("captions"))
    rows.append(("with a caption", int(said.sum())))
    rows.append(("quarantined", totals["quarantined"]))
    described = made.info.get("captions") or {}
    if described:
        rows.append(("described", f"{described['answered']:,} of {described['requests']:,}"))
        rows += [(f"  {status}", count) for status, count in described["failed"].items()]
    if last := described.get("last"):
        rows.append(("  output tokens/s", last["output_tokens_per_s"]))
    console.table(f"clips in {where}", [("kept", totals["kept"]), *rows], quiet)
    tell = console.progress(quiet)
    for name, why in made.info["skipped"].items():
        if "switched off" not in why:
            tell.note(f"{name} was skipped: {why}")
    for line in advice(judged, thresholds):
        tell.note(line)
    if not totals["kept"]:
        tell.note("nothing was kept; loosen a rule, for example --set decide.flow_min=none")
    more = {"captions": described} if described else {}
    console.result(where, {**record, "dropped_by": reasons, **more}, as_json)


def _fraction(text: str | None) -> float | None:
    from unimodal.pipeline.errors import UsageError

    if text is None:
        return None
    try:
        number = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        number = 0.0
    if not 0 < number <= 1:
        raise UsageError(f"--sample {text}: write a share, as 1% or 0.01")
    return number


def _plan(
    inputs: list[str],
    out: Path,
    settings: CurateSettings,
    limit: int | None,
    fraction: float | None,
    engine: str,
    address: str | None,
    workers: int | None,
    as_json: bool,
) -> None:
    import json as codec
    from dataclasses import asdict

    from unimodal.cli import console
    from unimodal.pipeline import run
    from unimodal.pipeline.engine import choose
    from unimodal.pipeline.forecast import forecast, wall_s
    from unimodal.pipeline.inputs import list_inputs
    from unimodal.pipeline.parts import read_parts

    run.check(settings)
    known = [source for part in read_parts(out / "parts.parquet") for source in part.sources]
    listing = list_inputs(inputs, limit=limit, fraction=fraction, known=known)
    found = forecast(listing.sources, out, settings)
    driver, wall = choose(engine, address), wall_s(found, workers)
    if as_json:
        print(codec.dumps({**asdict(found), "engine": driver, "wall_s": round(wall, 1)}))
        return
    rows = [
        ("sources", f"{found.sources:,}, {found.bytes / 1e6:,.1f} MB; parts: {found.parts:,}"),
        ("of them", f"{found.images:,} images, {found.video_s / 60:,.1f} minutes of video"),
        *found.stages,
        ("engine", driver),
        ("time", f"{found.cpu_s / 60:,.1f} CPU minutes, {wall / 60:,.1f} here"),
        ("disk", f"{found.disk_bytes / 1e6:,.0f} MB of sampled frames"),
    ]
    if found.unknown:
        rows.insert(2, ("not looked into", f"{found.unknown:,} in buckets: they count for nothing"))
    if found.unreadable:
        rows.insert(2, ("unreadable", f"about {found.unreadable:,}"))
    console.plan("would curate (lengths and times are estimates)", dict(rows), False)
