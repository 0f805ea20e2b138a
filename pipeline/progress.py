"""What a long-running stage tells the person who waits; silent unless the command line draws it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Progress:
    """Receives progress and does nothing with it. `unimodal.cli.console` draws it with Rich.

    A stage calls `begin` once per task, `advance` as work is done, `note` for a line that a
    person should read, `show` for a set of named values (a training step), `end` at the end.
    """

    def begin(self, task: str, total: float, unit: str) -> None:
        """Start a task of `total` `unit`s (sources, seconds of video, steps)."""

    def advance(self, task: str, amount: float = 1.0) -> None:
        """`amount` more units of `task` are done."""

    def note(self, message: str) -> None:
        """One line for people: a warning, a choice that was made."""

    def show(self, values: Mapping[str, Any]) -> None:
        """The latest named values of the running stage."""

    def end(self, task: str) -> None:
        """The task is done."""
