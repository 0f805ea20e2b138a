"""Options that mean the same on every command."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

Run = Annotated[str, typer.Argument(metavar="RUN", help="Run directory, or '-'.")]
Checkpoint = Annotated[str, typer.Argument(help="Checkpoint of unimodal train, or '-'.")]
Preset = Annotated[str, typer.Option("--preset", help="Named set of settings.", metavar="NAME")]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", help="A setting, as key=value; may be repeated.", metavar="KEY=VALUE"),
]
Plan = Annotated[bool, typer.Option("--plan", help="Say what would be done, and do nothing.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no tables.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]
Strict = Annotated[bool, typer.Option("--strict", help="Exit 3 if anything was quarantined.")]
Seed = Annotated[int, typer.Option("--seed", help="Of every random choice.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1.")]
Workers = Annotated[
    int | None, typer.Option("--workers", help="Processes (default: one a processor).", min=1)
]
Address = Annotated[
    str | None,
    typer.Option("--address", help="A Ray cluster (default: RAY_ADDRESS).", envvar="RAY_ADDRESS"),
]
Limit = Annotated[int | None, typer.Option("--limit", help="Only the first N inputs.", min=1)]


class Engine(StrEnum):
    """Where the work runs."""

    auto = "auto"
    inline = "inline"
    local = "local"
    ray = "ray"


On = Annotated[Engine, typer.Option("--engine", help="Where the work runs.")]
