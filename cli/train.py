"""`unimodal train`: shards in, a checkpoint out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unimodal.cli import options

if TYPE_CHECKING:
    from unimodal.model.recipe import TrainSettings

PLANNED = "With --plan"


def train(
    shards: Annotated[
        list[str] | None, typer.Argument(help="Directories of shards, or '-'; --plan needs none.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Checkpoint directory.")] = Path("ckpt"),
    recipe: Annotated[
        str, typer.Option("--recipe", help="A shipped recipe, or a TOML file.", metavar="NAME|FILE")
    ] = "tiny",
    init: Annotated[
        Path | None,
        typer.Option("--init", help="Weights to start from: a checkpoint, or released ones."),
    ] = None,
    sets: options.Sets = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Optimizer steps.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Of every random choice.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Go on with what the directory holds.")
    ] = True,
    device: options.Device = "auto",
    nproc: Annotated[
        int, typer.Option("--nproc", help="Processes on this machine, as mesh.* says.", min=1)
    ] = 1,
    plan: options.Plan = False,
    gpus: Annotated[
        int | None, typer.Option("--gpus", help="GPUs in all.", min=1, rich_help_panel=PLANNED)
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option("--gpu", help="a100, h100, h200, b200, l40s.", rich_help_panel=PLANNED),
    ] = None,
    mfu: Annotated[
        float,
        typer.Option("--mfu", help="Share of their peak that is assumed.", rich_help_panel=PLANNED),
    ] = 0.4,
    tokens: Annotated[
        float | None,
        typer.Option("--tokens", help="To be seen, such as 1e12.", rich_help_panel=PLANNED),
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(
            "--length",
            help="Tokens of a document where no shards tell (default: the context).",
            min=1,
            rich_help_panel=PLANNED,
        ),
    ] = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Train a decoder-only transformer on text and vision tokens.

    With --init it has the shape of those weights, unless the recipe says another. SIGTERM and
    Ctrl-C save first; the same command then goes on, with the same losses as if it had not been
    interrupted.
    """
    from unimodal.cli import console
    from unimodal.model import parallel
    from unimodal.model import train as trainer
    from unimodal.model.checkpoint import latest_step
    from unimodal.model.recipe import settings_from
    from unimodal.model.records import read_saved

    given = {"steps": steps, "seed": seed, "device": device}
    layer = {key: value for key, value in given.items() if value is not None}
    settings = settings_from(recipe, layer, sets=sets or [], init=init)
    sources = [Path(console.from_stdin(item)) for item in shards or []]
    if plan:
        for_gpus = {"gpus": gpus, "gpu": gpu, "mfu": mfu, "tokens": tokens}
        _plan(sources, settings, length, for_gpus, json)
        return
    if nproc > 1:
        piped = [str(path) for item, path in zip(shards or [], sources, strict=True) if item == "-"]
        raise typer.Exit(_several(nproc, piped, settings))
    drawn = console.progress(quiet)
    made = trainer.train(sources, out, settings, init=init, progress=drawn, resume=resume)
    step = latest_step(made)
    record = {}
    if step is not None:
        state = read_saved(step)
        record = {"step": state["step"], "tokens": state["tokens"]}
    if parallel.is_main():
        console.table(f"checkpoint in {out}", list(record.items()), quiet)
        console.result(out, record, json)
    parallel.leave()


def _several(processes: int, piped: list[str], settings: TrainSettings) -> int:
    """Run this command as so many processes, '-' replaced by what came; its exit status."""
    import sys

    from unimodal.model import parallel

    parallel.check_world(settings.mesh, processes)
    given = iter(sys.argv[1:])
    arguments = []
    for argument in given:
        if argument == "--nproc":
            next(given)
        elif argument == "-":
            arguments.append(piped.pop(0))
        elif not argument.startswith("--nproc="):
            arguments.append(argument)
    return parallel.launch(processes, arguments)


def _plan(
    shards: list[Path],
    settings: TrainSettings,
    length: int | None,
    for_gpus: dict[str, Any],
    as_json: bool,
) -> None:
    from unimodal.cli import console
    from unimodal.model.data import Loader, Samples, open_shards
    from unimodal.model.plan import EMU3_VOCABULARY, plan
    from unimodal.pipeline.errors import UsageError

    if shards and settings.objective == "dpo":
        raise UsageError("--plan does not read triplets: leave them out and give --length")
    record: dict[str, Any] = {}
    vocabulary, context = EMU3_VOCABULARY, settings.data.context
    if length and length > context:
        raise UsageError(f"--length {length} must be at most data.context = {context}")
    packs = [[length] * max(1, context // length)] if length else None
    if shards:
        samples = Samples(open_shards(shards), settings.data.styles)
        first = Loader(samples, settings.data, settings.seed).plan
        packs = [[document.length for document in pack] for pack in first.packs]
        vocabulary = samples.vocabulary.size
        record = {f"{name} samples": len(samples.rows[name]) for name in ("train", "val")}
        record["packs filled"] = f"{first.fill(context):.1%}"
        if first.skipped:
            record["left out"] = first.left_out(context)
    record |= plan(settings, vocabulary, packs, **for_gpus)
    console.plan("would train", record, as_json)
