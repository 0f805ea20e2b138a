"""`unimodal train`: shards in, a checkpoint out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unimodal.cli import options

if TYPE_CHECKING:
    from unimodal.model.recipe import TrainSettings


def train(
    shards: Annotated[list[str], typer.Argument(help="Directories of shards, or '-'.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Checkpoint directory.")] = Path("ckpt"),
    recipe: Annotated[
        str, typer.Option("--recipe", help="A shipped recipe, or a TOML file.", metavar="NAME|FILE")
    ] = "tiny",
    sets: options.Sets = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Optimizer steps.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Of every random choice.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Go on with what the directory holds.")
    ] = True,
    device: options.Device = "auto",
    plan: options.Plan = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Train a decoder-only transformer on text and vision tokens.

    SIGTERM and Ctrl-C save first; the same command then goes on, with the same losses as if it
    had not been interrupted.
    """
    from unimodal.cli import console
    from unimodal.model import train as trainer
    from unimodal.model.checkpoint import latest_step, read_json
    from unimodal.model.recipe import settings_from

    given = {"steps": steps, "seed": seed, "device": device}
    layer = {key: value for key, value in given.items() if value is not None}
    settings = settings_from(recipe, layer, sets=sets or [])
    sources = [Path(console.from_stdin(item)) for item in shards]
    if plan:
        _plan(sources, settings, json)
        return
    made = trainer.train(sources, out, settings, progress=console.progress(quiet), resume=resume)
    step = latest_step(made)
    record = {}
    if step is not None:
        state = read_json(step / "train.json")
        record = {"step": state["step"], "tokens": state["tokens"]}
    console.table(f"checkpoint in {out}", list(record.items()), quiet)
    console.result(out, record, json)


def _plan(shards: list[Path], settings: TrainSettings, as_json: bool) -> None:
    import torch

    from unimodal.cli import console
    from unimodal.model.data import Samples, open_shards
    from unimodal.model.decoder import Decoder, DecoderConfig, parameter_count

    samples = Samples(open_shards(shards), settings.data.styles)
    config = DecoderConfig(settings.decoder, samples.vocabulary.size, settings.data.context)
    with torch.device("meta"):
        counts = parameter_count(Decoder(config, 0))
    tokens = settings.data.context * settings.accumulate
    record = {
        **{f"parameters {name}": number for name, number in counts.items()},
        "training samples": len(samples.rows["train"]),
        "validation samples": len(samples.rows["val"]),
        "steps": settings.steps,
        "tokens a step": tokens,
        "tokens": tokens * settings.steps,
    }
    console.plan("would train", record, as_json)
