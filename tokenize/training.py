"""What both trainings, of the vision tokenizer and of the decoder, do alike."""

from __future__ import annotations

import copy
import json
import math
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from unimodal.pipeline.errors import UnimodalError, UsageError
from unimodal.pipeline.files import atomic

M = TypeVar("M", bound=nn.Module)


class Interrupted(UnimodalError):
    """A signal ended the training after its state was saved."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal  # as a shell says it


@contextmanager
def signals() -> Iterator[list[int]]:
    """Collect SIGTERM and SIGINT instead of dying; a second SIGINT interrupts at once.

    Outside the main thread signals cannot be taken over: there the list stays empty.
    """
    received: list[int] = []

    def take(number: int, frame: object) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    try:
        old = {number: signal.signal(number, take) for number in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:
        yield received
        return
    try:
        yield received
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def rate(
    step: int, end: int, lr: float, min_lr: float, warmup: int, schedule: str = "cosine"
) -> float:
    """Learning rate of `step`: linear rise over `warmup` steps, then a cosine (or a line, where
    `schedule` is "linear") from `lr` to `min_lr` at step `end`."""
    if step < warmup:
        return lr * (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, end - warmup))
    left = 1 - done if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return min_lr + (lr - min_lr) * left


class WeightAverage(Generic[M]):
    """A copy of a network whose weights are moving averages; with decay 0, the network itself.

    The first steps average over fewer, so that the start is soon forgotten (MoVQGAN's form).
    """

    def __init__(self, model: M, decay: float) -> None:
        self.decay, self.source = decay, model
        self.model = copy.deepcopy(model).requires_grad_(False).eval() if decay else model

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After optimizer step `step`, from 0."""
        if self.decay:
            ours: list[Tensor] = list(self.model.parameters())
            theirs: list[Tensor] = list(self.source.parameters())
            torch._foreach_lerp_(ours, theirs, 1 - min(self.decay, (1 + step) / (10 + step)))


def not_finite(model: nn.Module) -> list[str]:
    """Names of the parameters that, or whose gradients, are not finite."""
    return [
        name
        for name, p in model.named_parameters()
        if not p.isfinite().all() or (p.grad is not None and not p.grad.isfinite().all())
    ]


class Record:
    """Appends to `metrics.jsonl` and, if asked and installed, to `tensorboard/`; if asked to a
    project of Weights & Biases.

    `resumed` is the step of the save that the run goes on from: rows of later steps, which a killed
    run wrote and this one computes again, go first. Raises `UsageError` if `wandb` is asked for
    and not installed.
    """

    def __init__(
        self,
        out: Path,
        resumed: int,
        tensorboard: bool,
        wandb: str | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self._board: Any = None
        self._online: Any = None
        if wandb is not None:
            self._online = _wandb(out, wandb, settings or {})
        path = out / "metrics.jsonl"
        kept = [row for row in read_record(path) if row["step"] <= resumed]
        with atomic(path) as file:
            file.write_text("".join(json.dumps(row) + "\n" for row in kept))
        self._file: IO[str] = path.open("a")
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
        if self._online:
            self._online.log({**values, "step": step})

    def image(self, step: int, name: str, pixels: Any) -> None:
        """A picture, uint8 [H, W, 3], for TensorBoard."""
        if self._board:
            self._board.add_image(name, pixels, step, dataformats="HWC")

    def close(self) -> None:
        """Flush and close them."""
        self._file.close()
        if self._board:
            self._board.close()
        if self._online:
            self._online.finish()


def _wandb(out: Path, project: str, settings: Mapping[str, Any]) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise UsageError(
            f"setting log.wandb = {project!r}: the package is not here; pip install wandb, or "
            "leave it out (metrics.jsonl and TensorBoard hold the same)"
        ) from error
    # One id per directory: a resumed training goes on in the run that it began.
    named = {"name": out.name, "id": f"{out.name}-{out.stat().st_ino}", "resume": "allow"}
    online = wandb.init(project=project, dir=str(out), config=dict(settings), **named)
    # Their own step must only grow, and a resumed run repeats some: ours is the axis.
    online.define_metric("*", step_metric="step")
    return online


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
