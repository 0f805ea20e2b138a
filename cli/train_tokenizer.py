"""`unimodal train-tokenizer`: pictures and clips in, a vision tokenizer out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from unimodal.cli import options


def train_tokenizer(
    inputs: Annotated[
        list[str], typer.Argument(help="Run directories, or files, folders and globs of media.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Tokenizer directory.")] = Path(
        "tokenizer"
    ),
    init: Annotated[
        str | None, typer.Option("--init", help="Weights to start from: small, or a directory.")
    ] = None,
    sets: options.Sets = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Optimizer steps.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Of every random choice.")] = None,
    device: options.Device = "auto",
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Train a vision tokenizer of Emu3's architecture; resumes where it was interrupted."""
    from unimodal.cli import console
    from unimodal.pipeline.settings import build
    from unimodal.tokenize.device import usable
    from unimodal.tokenize.vision import train as trainer
    from unimodal.tokenize.vision.tokenizer import SHIPPED

    given = {"steps": steps, "seed": seed}
    layer = {key: value for key, value in given.items() if value is not None}
    settings = build(trainer.TokenizerSettings, layer, sets=sets or [])
    made = trainer.train_tokenizer(
        [console.from_stdin(item) for item in inputs],
        out,
        settings,
        init=None if init is None else SHIPPED.get(init, Path(init)),
        device=usable(device),
        progress=console.progress(quiet),
    )
    console.result(made, {"steps": settings.steps}, json)
