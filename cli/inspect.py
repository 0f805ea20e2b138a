"""`unimodal inspect`: what the tokenizer makes of media, and what shards hold, as a page.

With `--where` it writes shards: those samples of the given ones for which a condition holds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

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
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder for the page (default: inspected), or shards."),
    ] = None,
    where: Annotated[
        str | None,
        typer.Option(
            "--where",
            metavar="SQL",
            help="Write shards to -o of the samples for which this holds, over the columns of "
            'the index, such as "aesthetic >= 6"; true takes all, which merges directories.',
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option("--tokenizer", help="Vision tokenizer: small, small-16k or a directory."),
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
    """Show media beside what their codes give back, and what shards hold; filter and merge them."""
    from unimodal.cli import console
    from unimodal.pipeline.errors import UsageError
    from unimodal.pipeline.settings import build
    from unimodal.tokenize.device import usable
    from unimodal.tokenize.look import look
    from unimodal.tokenize.plan import TokenizeSettings

    things = [console.from_stdin(thing) for thing in things]
    if where is not None:
        from unimodal.tokenize.gather import gather

        if out is None:
            raise UsageError("--where writes shards: name a folder for them, -o NEW")
        totals = dict(gather(things, where, out, console.progress(quiet)).manifest["totals"])
        console.table(f"shards in {out}", list(totals.items()), quiet)
        console.result(out, totals, json)
        return
    given = {"area": area, "fps": fps, "seconds": seconds}
    settings = build(TokenizeSettings, {k: v for k, v in given.items() if v is not None})
    page, records = look(
        things,
        out or Path("inspected"),
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
        console.table(Path(record["thing"]).name, [*shown.items(), *_statistics(record)], quiet)
    console.result(page, {"things": records}, json)


def _statistics(record: dict[str, Any]) -> list[tuple[str, str]]:
    """Lines for the lists that the record of a shard directory has."""
    if record.get("kind") != "shards":
        return []
    found = [
        (
            " ".join((one["task"], one["kind"], one["split"])),
            f"{one['count_all']:,} samples, {one['tokens_sum']:,} tokens",
        )
        for one in record["tasks"]
    ]
    lengths = ", ".join(f"{name} {n:,}" for name, n in record["lengths"].items())
    found.append(("length of a document", lengths))
    for size in record["sizes"][:10]:
        frames = f"{size['frames']} frames of " if size["kind"] == "video" else ""
        grid = f"{frames}{size['height']} × {size['width']} codes"
        found.append((f"{size['kind']} grid", f"{grid}: {size['count_all']:,}"))
    for one in record["captions"][:10]:
        who = " ".join(filter(None, (one["style"], one["lang"])))
        found.append((f"captions {who}", f"{one['count_all']:,}, {one['tokens_sum']:,} tokens"))
    return found
