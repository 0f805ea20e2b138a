"""How long `unimodal --help` takes, against a bare Typer app with as many commands.

    .venv/bin/python benchmarks/help.py

Pairs of whole processes, one after the other; the median of the ratios is what counts.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

BARE = """
import typer
app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
for name in {names}:
    def command(path: str = typer.Argument(help="A path."), n: int = typer.Option(1, help="N.")):
        "A command."
    app.command(name)(command)
app()
"""


def cpu_seconds(command: list[str]) -> float:
    """User and system seconds of one run."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"COLUMNS": "100"})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime)


def main(pairs: int = 15) -> None:
    """Print both medians and the median ratio."""
    from unimodal.cli.app import app

    names = [command.name for command in app.registered_commands]
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "bare.py"
        script.write_text(BARE.format(names=names))
        ours_command = [sys.executable, "-m", "unimodal.cli", "--help"]
        bare_command = [sys.executable, str(script), "--help"]
        cpu_seconds(ours_command), cpu_seconds(bare_command)  # warm the file cache
        ours, bare = [], []
        for _ in range(pairs):
            ours.append(cpu_seconds(ours_command))
            bare.append(cpu_seconds(bare_command))
    ratio = statistics.median(a / b for a, b in zip(ours, bare, strict=True))
    print(f"unimodal --help {statistics.median(ours):.3f} CPU s, bare Typer app with {len(names)} ")
    print(f"commands {statistics.median(bare):.3f} CPU s, median ratio {ratio:.2f}")


if __name__ == "__main__":
    main()
