"""What people see: progress and tables on stderr; results, paths, JSON and plans, on stdout."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from unimodal.pipeline.errors import UnimodalError, UsageError, shown
from unimodal.pipeline.progress import Progress


def from_stdin(argument: str) -> str:
    """`argument`, or the path that the command before in a pipe has printed, if it is `-`."""
    if argument != "-":
        return argument
    if sys.stdin.isatty():
        raise UsageError(
            "'-' reads a path from a pipe: unimodal curate videos | unimodal tokenize -"
        )
    lines = sys.stdin.read().split("\n")
    paths = [line for line in lines if line.strip()]
    if not paths:
        raise UnimodalError("the command before produced nothing")
    return paths[-1]


def nearby(path: Path) -> Path:
    """`path`, from the working directory where it is in there: as a person would write it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def result(path: Path, record: Mapping[str, Any], as_json: bool) -> None:
    """Print what was made: its path, or a JSON object with the path and the record."""
    print(json.dumps({"path": str(path), **record}) if as_json else path)


def plan(title: str, record: Mapping[str, Any], as_json: bool) -> None:
    """Print what `--plan` found, a table for people or JSON: on stdout, for it is the result."""
    if as_json:
        print(json.dumps(dict(record)))
    else:
        draw(title, list(record.items()), sys.stdout)


def progress(quiet: bool) -> Progress:
    """Drawn with Rich on a terminal, lines now and then in a log, nothing if quiet."""
    if quiet:
        return Progress()
    return Drawn() if sys.stderr.isatty() else Lines()


class Lines(Progress):
    """Plain lines for logs: each note, and each task at its end or every half minute."""

    EVERY = 30.0

    def __init__(self) -> None:
        self.tasks: dict[str, list[Any]] = {}  # done, total, unit, time of the last line
        self.shown = 0.0

    def begin(self, task: str, total: float, unit: str) -> None:
        self.tasks[task] = [0.0, total, unit, time.monotonic()]

    def advance(self, task: str, amount: float = 1.0) -> None:
        state = self.tasks[task]
        state[0] += amount
        if time.monotonic() - state[3] > self.EVERY:
            self._line(task)

    def note(self, message: str) -> None:
        print(shown(message), file=sys.stderr)

    def show(self, values: Mapping[str, Any]) -> None:
        if time.monotonic() - self.shown > self.EVERY:
            self.shown = time.monotonic()
            print(_values(values), file=sys.stderr)

    def end(self, task: str) -> None:
        if self.tasks[task][0]:
            self._line(task)

    def _line(self, task: str) -> None:
        done, total, unit, _ = state = self.tasks[task]
        state[3] = time.monotonic()
        of = f" of {total:g}" if total else ""
        print(f"{task}: {done:.0f}{of} {unit}", file=sys.stderr)


class Drawn(Progress):
    """A live display: one bar a task, and below them the latest values of the running stage."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.progress import Progress as Bars

        self.console = Console(stderr=True)
        self.bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
        )
        self.live = Live(self.bars, console=self.console, refresh_per_second=5, transient=True)
        self.tasks: dict[str, Any] = {}

    def begin(self, task: str, total: float, unit: str) -> None:
        if task in self.tasks:  # a new total for a task that is under way
            self.bars.update(self.tasks[task], total=total or None, completed=0)
            return
        if not self.live.is_started:
            self.live.start()
        self.tasks[task] = self.bars.add_task(task, total=total or None, unit=unit)

    def advance(self, task: str, amount: float = 1.0) -> None:
        self.bars.advance(self.tasks[task], amount)

    def note(self, message: str) -> None:
        self.console.print(shown(message), style="dim", markup=False, highlight=False)

    def show(self, values: Mapping[str, Any]) -> None:
        from rich.console import Group
        from rich.panel import Panel
        from rich.table import Table

        table = Table.grid(padding=(0, 2))
        items = [(name, _number(value)) for name, value in values.items()]
        for start in range(0, len(items), 4):
            table.add_row(*(f"[dim]{k}[/] {v}" for k, v in items[start : start + 4]))
        self.live.update(Group(self.bars, Panel(table, expand=False)))

    def end(self, task: str) -> None:
        if task in self.tasks:
            number = self.tasks.pop(task)
            done = self.bars.tasks[self.bars.task_ids.index(number)]
            self.bars.stop_task(number)
            if done.completed:
                taken = done.elapsed or 0.0
                self.console.print(
                    f"{task}: {done.completed:.0f} {done.fields['unit']} in {taken:.1f} s",
                    highlight=False,
                )
            self.bars.remove_task(number)
        if not self.tasks:
            self.live.update(self.bars)
            self.live.stop()


def table(title: str, rows: Sequence[tuple[str, Any]], quiet: bool) -> None:
    """A small table of names and values for people, on stderr."""
    if not quiet:
        draw(title, rows, sys.stderr)


def draw(title: str, rows: Sequence[tuple[str, Any]], to: TextIO) -> None:
    """A table of names and values."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(show_header=False, box=None, pad_edge=False)
    drawn.add_column(style="dim")
    drawn.add_column()
    for name, value in rows:
        drawn.add_row(Text(shown(name)), Text(shown(_number(value))))
    console = Console(file=to)
    # Not as the table's own title, which a narrow table breaks in the middle of a path.
    console.print(Text(shown(title), style="table.title"), soft_wrap=True)
    console.print(drawn)


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _values(values: Mapping[str, Any]) -> str:
    return "  ".join(f"{name} {_number(value)}" for name, value in values.items())
