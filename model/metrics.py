"""What a training run writes down: one JSON line per record, and TensorBoard's event files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any


class Metrics:
    """Appends records to `metrics.jsonl` and scalars to `tensorboard/`.

    `resumed` is the step of the checkpoint that the run goes on from: lines of later steps,
    which a killed run wrote and this one will compute again, are removed first.
    """

    def __init__(self, out: Path, resumed: int, tensorboard: bool = True) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.path = out / "metrics.jsonl"
        if self.path.exists():
            lines = [line for line in read_metrics(self.path) if line["step"] <= resumed]
            self.path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        self._file: IO[str] = self.path.open("a")
        self._board: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(out / "tensorboard"), purge_step=resumed + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One record; the names are TensorBoard's tags as well."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()  # a killed run leaves what it did
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def image(self, step: int, name: str, pixels: Any) -> None:
        """A picture, uint8 [H, W, 3], for TensorBoard."""
        if self._board is not None:
            self._board.add_image(name, pixels, step, dataformats="HWC")

    def close(self) -> None:
        """Flush and close both."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`; a last line cut short by a crash is left out."""
    records = []
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records
