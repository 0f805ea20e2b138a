"""`unimodal doctor`: what works on this machine, what does not, and what mends it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from unimodal.cli import options

if TYPE_CHECKING:
    from unimodal.cli.findings import Finding

STYLES = {"works": "green", "limits": "yellow", "absent": "dim", "broken": "bold red"}


def doctor(
    deep: Annotated[
        bool, typer.Option("--deep", help="Start Ray, import vLLM and open_clip too.")
    ] = False,
    preset: options.Preset = "best",
    sets: options.Sets = None,
    seconds: Annotated[
        float, typer.Option("--seconds", help="To wait for an import; a cold disk is slow.", min=1)
    ] = 120.0,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Say what works on this machine, what does not, and the command that mends it.

    Exit code 0 if the road (curate, tokenize, train, sample) works, else 1. With --set, weights
    that `curate` would be given are looked for: --set embed.weights=clip.pt.
    """
    import json as codec
    from dataclasses import asdict

    from unimodal.cli.findings import bad, examine

    found = examine(deep, preset, sets or [], seconds)
    fine = not bad(found)
    if json:
        print(codec.dumps({"road": fine, "findings": [asdict(finding) for finding in found]}))
    else:
        _print(found)
    raise typer.Exit(0 if fine else 1)


def _print(findings: Sequence[Finding]) -> None:
    from rich.console import Console
    from rich.text import Text

    from unimodal.cli.findings import bad

    console = Console(highlight=False, soft_wrap=True)
    width = max(len(one.name) for one in findings)
    for one in findings:
        line = Text(f"{one.state:6}  ", style=STYLES[one.state])
        console.print(line + Text(f"{one.name:{width}}  {one.said}", style="default"))
        if one.mend:
            console.print(Text(f"{'':8}{'':{width}}  $ {one.mend}", style="cyan"))
    wrong = ", ".join(one.name for one in bad(findings))
    end = f"The road does not work: {wrong}." if wrong else "The road works"
    console.print(Text(end if wrong else f"{end}: curate, tokenize, train, sample."))
