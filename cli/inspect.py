"""`unimodal inspect`: what the tokenizer makes of pictures, videos and shards, as a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from unimodal.cli import options


def inspect(
    things: Annotated[
        list[str],
        typer.Argument(
            metavar="THING…",
            help="Pictures, videos, shard directories, samples of them (SHARDS#KEY), or '-'.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the page.")] = Path(
        "inspected"
    ),
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", help="Vision tokenizer: small, or a directory.")
    ] = None,
    area: Annotated[int | None, typer.Option("--area", help="Pixels of a picture.")] = None,
    fps: Annotated[float | None, typer.Option("--fps", help="Pictures a second of video.")] = None,
    seconds: Annotated[
        float | None, typer.Option("--seconds", help="Of a video, from its beginning.")
    ] = None,
    device: options.Device = "auto",
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Show media beside what their codes give back, with code maps and figures; or shards."""
    from unimodal.cli import console
    from unimodal.pipeline.settings import build
    from unimodal.tokenize.device import usable
    from unimodal.tokenize.look import look
    from unimodal.tokenize.plan import TokenizeSettings

    given = {"area": area, "fps": fps, "seconds": seconds}
    settings = build(TokenizeSettings, {k: v for k, v in given.items() if v is not None})
    page, records = look(
        [console.from_stdin(thing) for thing in things],
        out,
        settings,
        tokenizer=tokenizer,
        device=usable(device),
        progress=console.progress(quiet),
    )
    for record in records:
        shown = {
            name.replace("_", " "): value
            for name, value in record.items()
            if name != "thing" and isinstance(value, int | float | str)
        }
        console.table(Path(record["thing"]).name, list(shown.items()), quiet)
    console.result(page, {"things": records}, json)
