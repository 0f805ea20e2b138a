"""Pages of docs/commands: each ends in the help of its command, at 100 columns.

`python tests/cli/command_pages.py` writes the help anew; test_commands_docs.py compares.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from typer.core import TyperGroup
from typer.main import get_command
from typer.testing import CliRunner

from unimodal.cli.app import app

PAGES = Path(__file__).parents[2] / "docs" / "commands"
COLUMNS = "100"
# The help is all that stands behind this line.
HEADING = "## Help\n"


def commands() -> Iterator[tuple[str, list[list[str]]]]:
    """Name of each command, and the arguments whose help its page shows: its own, its commands'."""
    whole = get_command(app)
    assert isinstance(whole, TyperGroup)
    for name, command in whole.commands.items():
        below = list(command.commands) if isinstance(command, TyperGroup) else []
        yield name, [[name], *([name, one] for one in below)]


def help_text(arguments: list[str]) -> str:
    """What `unimodal ARGUMENTS --help` prints, without colours and blanks at the ends of lines."""
    shown = {"COLUMNS": COLUMNS, "TERMINAL_WIDTH": COLUMNS, "NO_COLOR": "1", "FORCE_COLOR": None}
    result = CliRunner().invoke(app, [*arguments, "--help"], env=shown)
    assert result.exit_code == 0, result.output
    return "\n".join(line.rstrip() for line in result.output.strip("\n ").splitlines()).strip()


def help_block(shown: list[list[str]]) -> str:
    """The end of a page, from its heading on."""
    texts = (f"```text\n{help_text(arguments)}\n```\n" for arguments in shown)
    return "\n".join([HEADING, *texts])


def parts(page: str) -> tuple[str, str]:
    """What is written by hand, and the help behind it."""
    found = re.search(rf"^{HEADING}", page, re.MULTILINE)
    return (page[: found.start()], page[found.start() :]) if found else (page.rstrip() + "\n\n", "")


if __name__ == "__main__":
    for name, shown in commands():
        path = PAGES / f"{name}.md"
        by_hand, _ = parts(path.read_text())
        path.write_text(by_hand + help_block(shown))
