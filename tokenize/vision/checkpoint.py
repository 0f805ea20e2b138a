"""What a tokenizer in training keeps: weights to use, and a state to go on from.

OUT/
  model.safetensors  config.json   the averaged weights: a tokenizer, at every save
  state.safetensors                all that the next step depends on, in one file
  metrics.jsonl  tensorboard/  grids/
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from unimodal.pipeline.errors import UnimodalError
from unimodal.pipeline.files import atomic
from unimodal.tokenize.training import WeightAverage
from unimodal.tokenize.vision.codebook import MovingCodebook
from unimodal.tokenize.vision.discriminator import Discriminator
from unimodal.tokenize.vision.movq import MoVQ
from unimodal.tokenize.vision.optim import Optimizer
from unimodal.tokenize.vision.recipe import TokenizerSettings, changed
from unimodal.tokenize.vision.tokenizer import save_model

STATE = "state.safetensors"


@dataclass
class Learners:
    """Everything that a step changes."""

    model: MoVQ
    optimizer: Optimizer
    book: MovingCodebook
    average: WeightAverage[MoVQ]
    judge: Discriminator | None = None
    judge_optimizer: Optimizer | None = None

    def state(self) -> dict[str, Tensor]:
        """All tensors, under one name each."""
        parts: dict[str, Mapping[str, Tensor]] = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state(),
            "book": {"count": self.book.count, "total": self.book.total},
        }
        if self.average.model is not self.model:
            parts["average"] = self.average.model.state_dict()
        if self.judge is not None and self.judge_optimizer is not None:
            parts["judge"] = self.judge.state_dict()
            parts["judge_optimizer"] = self.judge_optimizer.state()
        return {f"{part}.{name}": t for part, named in parts.items() for name, t in named.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take what `state()` gave."""

        def part(name: str) -> dict[str, Tensor]:
            skip = len(name) + 1
            return {key[skip:]: t for key, t in state.items() if key.startswith(f"{name}.")}

        self.model.load_state_dict(part("model"))
        self.optimizer.load(part("optimizer"))
        self.book.count, self.book.total = state["book.count"], state["book.total"]
        if self.average.model is not self.model:
            self.average.model.load_state_dict(part("average"))
        if self.judge is not None and self.judge_optimizer is not None:
            self.judge.load_state_dict(part("judge"))
            self.judge_optimizer.load(part("judge_optimizer"))


def save(
    out: Path,
    settings: TokenizerSettings,
    data: str,
    learners: Learners,
    step: int,
    seconds: float,
) -> None:
    """Write state and weights. The step is inside the state, so that no two saves can mix."""
    kept = settings.model_dump(mode="json")
    record = {"step": step, "seconds": seconds, "settings": kept, "data": data}
    with atomic(out / STATE) as temporary:
        tensors = {n: t.detach().cpu().contiguous() for n, t in learners.state().items()}
        save_file(tensors, temporary, metadata={"train": json.dumps(record, sort_keys=True)})
    save_model(learners.average.model, out)


def find(out: Path, settings: TokenizerSettings, data: str) -> dict[str, Any] | None:
    """Step and seconds of the last save in `out`, if there is one; `data` is the spans' digest.

    Raises `UnimodalError` if it was made with other settings or data, or cannot be read.
    """
    path = out / STATE
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            record: dict[str, Any] = json.loads(file.metadata()["train"])
    except (OSError, SafetensorError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise UnimodalError(
            f"{path} cannot be read ({error}); delete it to start anew, with --init {out} from "
            "the weights beside it"
        ) from error
    other = ", ".join(changed(record["settings"], settings))
    if other or record.get("data") != data:
        otherwise = f"other settings ({other})" if other else "other pictures or clips"
        raise UnimodalError(
            f"{out}: was trained with {otherwise}; give another -o to "
            "start anew, with --init to start from these weights"
        )
    return record


def resume(out: Path, learners: Learners, device: str) -> None:
    """Load the last save of `out` into `learners`."""
    learners.load(load_file(out / STATE, device=device))
