"""`unimodal prefer`: a checkpoint and prompts in, triplets for `train --recipe dpo` out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from unimodal.cli import options


def prefer(
    checkpoint: options.Checkpoint,
    prompts: Annotated[Path, typer.Argument(help="Text file, a prompt a line.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory of triplets.")] = Path(
        "triplets"
    ),
    score: Annotated[
        list[str] | None,
        typer.Option(
            "--score",
            help="brightness, color, clip or aesthetic; may be repeated. None: write votes.csv.",
        ),
    ] = None,
    votes: Annotated[
        list[Path] | None,
        typer.Option("--votes", help="A filled-in votes.csv, one a voter; may be repeated."),
    ] = None,
    number: Annotated[int, typer.Option("-n", help="Samples of each prompt.", min=2)] = 8,
    seed: options.Seed = 0,
    sets: options.Sets = None,
    device: options.Device = "auto",
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Draw samples of each prompt, rank them, and keep the best against the worst.

    Without --score and --votes, pictures and a votes.csv are written: fill in its column `vote`
    (higher is better) and run the same command with --votes. A run that was stopped goes on.
    Settings: size, guidance, temperature, top_k, top_p, plausible, embed.weights, embed.aesthetic.
    """
    from unimodal.cli import console
    from unimodal.model import prefer as maker
    from unimodal.model.sample import Sampler
    from unimodal.pipeline.files import sweep
    from unimodal.pipeline.lock import run_lock
    from unimodal.pipeline.settings import build
    from unimodal.tokenize.device import usable

    settings = build(maker.PreferSettings, {"n": number, "seed": seed}, sets=sets or [])
    scorers = dict(maker.scorer(name, settings) for name in score or [])
    texts = maker.read_prompts(prompts)
    source = Path(console.from_stdin(checkpoint))
    progress = console.progress(quiet)
    with run_lock(out, progress):
        sweep(out)
        sampler = Sampler.load(source, usable(device))
        made = maker.prefer(sampler, source, texts, out, settings, scorers, votes or (), progress)
    console.table(f"preferences in {out}", list(made.counts.items()), quiet)
    console.result(made.path, made.counts, json)
