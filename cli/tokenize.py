"""`unimodal tokenize`: a run directory in, shards of tokens out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unimodal.cli import options
from unimodal.cli.options import Engine

if TYPE_CHECKING:
    from unimodal.tokenize.plan import TokenizeSettings


def tokenize(
    things: Annotated[
        list[str],
        typer.Argument(
            metavar="THING…",
            help="Run directory of unimodal curate, or '-'; or files of texts, questions and "
            "answers, interleaved documents or edits (.txt, .jsonl, .json, .parquet).",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory of shards.")] = Path("shards"),
    tokenizer: Annotated[
        str | None,
        typer.Option("--tokenizer", help="Vision tokenizer: small, small-16k or a directory."),
    ] = None,
    vocabulary: Annotated[
        str | None, typer.Option("--vocabulary", help="bytes, emu3:FILE, or a tokenizer file.")
    ] = None,
    area: Annotated[int | None, typer.Option("--area", help="Pixels of a picture.")] = None,
    fps: Annotated[float | None, typer.Option("--fps", help="Pictures a second of video.")] = None,
    preset: Annotated[str | None, typer.Option("--preset", help="emu3, or emu3-chat.")] = None,
    sets: options.Sets = None,
    engine: options.On = Engine.auto,
    address: options.Address = None,
    workers: options.Workers = None,
    limit: options.Limit = None,
    device: options.Device = "auto",
    retry: Annotated[
        bool,
        typer.Option("--retry-quarantined", help="Do shards with unreadable files again."),
    ] = False,
    captions: Annotated[
        bool,
        typer.Option("--captions", help="Only take the run's captions over into these shards."),
    ] = False,
    plan: options.Plan = False,
    strict: options.Strict = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Turn clips, images and documents into tokens, as WebDataset shards with an index.

    Finished shards are kept: after an interruption, the same command makes only what is missing.
    """
    from unimodal.cli import console
    from unimodal.pipeline.errors import UsageError
    from unimodal.pipeline.settings import build
    from unimodal.tokenize import plan as plans
    from unimodal.tokenize import run as stage

    if preset is not None and preset not in plans.PRESETS:
        raise UsageError(f"no preset {preset}: there are {', '.join(plans.PRESETS)}")
    given = {"tokenizer": tokenizer, "vocabulary": vocabulary, "area": area, "fps": fps}
    settings = build(
        plans.TokenizeSettings,
        plans.PRESETS.get(preset or "", {}),
        {key: value for key, value in given.items() if value is not None},
        sets=sets or [],
    )
    things = [console.from_stdin(thing) for thing in things]
    if captions:
        from unimodal.tokenize.refresh import refresh

        if plan or len(things) != 1:
            raise UsageError("--captions takes one run, and no --plan")
        changed = refresh(Path(things[0]), out, console.progress(quiet))
        console.table(f"captions in {out}", list(changed.items()), quiet)
        console.result(out, changed, json)
        return
    if plan:
        driver = stage.driver_of(engine.value, address, device)
        _plan(things, out, settings, limit, driver, json)
        return
    shards = stage.tokenize(
        things,
        out,
        settings,
        engine=engine.value,
        workers=workers,
        address=address,
        progress=console.progress(quiet),
        limit=limit,
        device=device,
        retry_quarantined=retry,
    )
    totals = dict(shards.manifest["totals"])
    console.table(f"shards in {out}", [*totals.items(), *shards.rates.items()], quiet)
    console.result(out, totals, json)
    if strict and totals.get("quarantined"):
        raise typer.Exit(3)


def _plan(
    things: list[str],
    out: Path,
    settings: TokenizeSettings,
    limit: int | None,
    driver: str,
    as_json: bool,
) -> None:
    from unimodal.cli import console
    from unimodal.tokenize.run import estimate
    from unimodal.tokenize.vision.tokenizer import VisionTokenizer
    from unimodal.tokenize.vocabulary import Vocabulary

    tokenizer = VisionTokenizer.load(settings.tokenizer)
    vocabulary = Vocabulary.named(settings.vocabulary, tokenizer.codebook_size)
    found = estimate(things, out, settings, tokenizer, vocabulary, limit)
    console.plan("would tokenize", {**found, "engine": driver}, as_json)
