"""`unimodal train-tokenizer`: pictures and clips in, a vision tokenizer out."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from unimodal.cli import options


def train_tokenizer(
    inputs: Annotated[
        list[str], typer.Argument(help="Run directories, or files, folders and globs of media.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Tokenizer directory.")] = Path(
        "tokenizer"
    ),
    recipe: Annotated[
        str, typer.Option("--recipe", help="A shipped recipe, or a TOML file.", metavar="NAME|FILE")
    ] = "small",
    init: Annotated[
        str | None,
        typer.Option("--init", help="Weights to start from: small, small-16k or a directory."),
    ] = None,
    lpips: Annotated[
        str | None, typer.Option("--lpips", help="Weights of LPIPS: a file, or a directory.")
    ] = None,
    sets: options.Sets = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Optimizer steps.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Of every random choice.")] = None,
    device: options.Device = "auto",
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Train a vision tokenizer of Emu3's architecture; resumes where it was interrupted.

    The network has the shape of --init's where that is given, else the recipe's. SIGTERM and Ctrl-C
    save first. Several GPUs: torchrun --nproc-per-node 8 -m unimodal.cli train-tokenizer ...
    """
    from unimodal.cli import console
    from unimodal.tokenize.device import usable
    from unimodal.tokenize.vision import train as trainer
    from unimodal.tokenize.vision.recipe import Network, settings_from
    from unimodal.tokenize.vision.tokenizer import SHIPPED, VisionTokenizer

    start = None if init is None else SHIPPED.get(init, Path(init))
    given: dict[str, Any] = {"steps": steps, "seed": seed}
    layer = {key: value for key, value in given.items() if value is not None}
    if lpips is not None:
        layer["loss"] = {"lpips": lpips}
    if start is not None:
        layer["network"] = Network.of(VisionTokenizer.load(start).model.cfg).model_dump()
    settings = settings_from(recipe, layer, sets=sets or [])
    made = trainer.train_tokenizer(
        [console.from_stdin(item) for item in inputs],
        out,
        settings,
        init=start,
        device=usable(device),
        progress=console.progress(quiet),
    )
    if os.environ.get("RANK", "0") == "0":
        console.result(made, {"steps": settings.steps}, json)
