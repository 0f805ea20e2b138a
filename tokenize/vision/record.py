"""What a training writes down: one JSON line a record, and TensorBoard's event files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any


class Record:
    """Appends to `metrics.jsonl` and, if asked and installed, to `tensorboard/`.

    Lines of steps after `resumed`, which a killed run wrote and this one computes again, go first.
    """

    def __init__(self, out: Path, resumed: int, tensorboard: bool) -> None:
        out.mkdir(parents=True, exist_ok=True)
        path = out / "metrics.jsonl"
        kept = [row for row in read_record(path) if row["step"] <= resumed]
        path.write_text("".join(json.dumps(row) + "\n" for row in kept))
        self._file: IO[str] = path.open("a")
        self._board: Any = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                return
            self._board = SummaryWriter(str(out / "tensorboard"), purge_step=resumed + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One record; the names are TensorBoard's tags as well."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()  # a killed run leaves what it did
        for name, value in values.items() if self._board else ():
            self._board.add_scalar(name, value, step)

    def image(self, step: int, name: str, pixels: Any) -> None:
        """A picture, uint8 [H, W, 3], for TensorBoard."""
        if self._board:
            self._board.add_image(name, pixels, step, dataformats="HWC")

    def close(self) -> None:
        """Flush and close both."""
        self._file.close()
        if self._board:
            self._board.close()


def read_record(path: Path) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl`, if there is one; a last line cut short is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows
