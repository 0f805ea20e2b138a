"""docs/commands has a page for each command, with the help that the command prints."""

from __future__ import annotations

import pytest

from tests.cli.command_pages import PAGES, commands, help_block, parts

AGAIN = "python tests/cli/command_pages.py"


@pytest.mark.parametrize(("name", "shown"), commands(), ids=lambda value: str(value))
def test_page_shows_the_help_of_its_command(name: str, shown: list[list[str]]) -> None:
    page = PAGES / f"{name}.md"
    assert page.exists(), f"unimodal {name} has no page in docs/commands: write one, then {AGAIN}"
    by_hand, shown_there = parts(page.read_text())
    assert by_hand.startswith(f"# unimodal {name}\n")
    assert f"    unimodal {name}" in by_hand or f"    $ unimodal {name}" in by_hand, "no example"
    assert shown_there == help_block(shown), f"the help of unimodal {name} has changed: {AGAIN}"


def test_every_page_is_of_a_command_and_in_the_index() -> None:
    names = {name for name, _ in commands()}
    assert {path.stem for path in PAGES.glob("*.md")} == names | {"README"}
    index = (PAGES / "README.md").read_text()
    assert not [name for name in names if f"({name}.md)" not in index]
