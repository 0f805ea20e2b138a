"""Settings of a training run, and the recipes that fill them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from unimodal.model.blocks import Recompute
from unimodal.model.checkpoint import find, weights_config
from unimodal.model.data import DataSettings
from unimodal.model.decoder import Shape
from unimodal.model.dpo import DPOSettings
from unimodal.model.lora import LoraSettings
from unimodal.model.parallel import MeshSettings
from unimodal.model.records import read_saved
from unimodal.pipeline.errors import UnimodalError, UsageError
from unimodal.pipeline.settings import Settings, build, differences, load_recipe
from unimodal.tokenize.training import rate

RECIPES = Path(__file__).parent / "recipes"


class OptimizerSettings(Settings):
    """The optimizer, and the line that its learning rate follows."""

    kind: Literal["adamw", "muon"] = "adamw"
    """AdamW for all; or Muon (momentum made orthogonal) for the matrices of the blocks, its steps
    scaled to AdamW's size so that one `lr` serves both, and AdamW for embedding, head and norms."""
    lr: float = Field(default=3e-4, gt=0)
    """Highest learning rate, reached at the end of the warm-up."""
    min_lr: float = Field(default=0.0, ge=0)
    """Learning rate at the last step."""
    warmup: int = Field(default=100, ge=0)
    """Steps of linear warm-up."""
    schedule: Literal["cosine", "linear"] = "cosine"
    """How the learning rate falls from `lr` to `min_lr`."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the first moment."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """Decay of the second moment."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the second moment; Emu3's fine-tuning script uses 1e-6."""
    fused: bool = True
    """AdamW in one kernel; else a few over lists of tensors (foreach)."""
    momentum: float = Field(default=0.95, ge=0, lt=1)
    """Of Muon."""
    weight_decay: float = Field(default=0.1, ge=0)
    """On matrices; norms have none."""
    clip: float = Field(default=1.0, gt=0)
    """Highest norm of the gradient."""


class CheckpointSettings(Settings):
    """When the run is saved. May be changed when resuming."""

    every: int = Field(default=1000, ge=1)
    """Steps between checkpoints; the last step is always saved."""
    keep: int = Field(default=2, ge=1)
    """Newest checkpoints that are kept."""
    background: bool = True
    """Write while training goes on, from a copy of weights and moments in main memory."""


class LogSettings(Settings):
    """What the run reports. May be changed when resuming."""

    every: int = Field(default=10, ge=1)
    """Steps between records."""
    validate_every: int = Field(default=500, ge=0)
    """Steps between validations; 0: none."""
    validate_samples: int = Field(default=64, ge=1)
    """Validation samples that are looked at, each drawn and described."""
    sample_every: int = Field(default=0, ge=0)
    """Steps between grids of sampled pictures; 0: none."""
    sample_prompts: list[str] = Field(default_factory=list)
    """Prompts of the grid; empty: captions of the first training and validation samples."""
    tensorboard: bool = True
    """Write TensorBoard event files."""
    wandb: str | None = None
    """Project of Weights & Biases that records go to as well, where `wandb` is installed."""


class SamplingSettings(Settings):
    """How `sample` draws from this checkpoint unless it is told otherwise. May be changed when
    resuming."""

    guidance: float = Field(default=3.0, gt=0)
    """Scale of classifier-free guidance; 1 is none."""
    temperature: float = Field(default=1.0, gt=0)
    """Divides the logits; below 1 is bolder."""
    top_k: int = Field(default=2048, ge=1)
    """Only the so many likeliest codes."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Only the likeliest codes that together have this probability."""
    plausible: float = Field(default=0.0, ge=0, lt=1)
    """Only codes that have at least this share of the likeliest one's probability before
    guidance."""
    image_guidance: float = Field(default=1.0, gt=0)
    """Scale of guidance towards the picture that is edited; 1 is none."""
    negative: str = ""
    """What guidance leads away from."""
    suffix: str = ""
    """Put behind every prompt that is drawn."""
    describe: str = ""
    """Question that pictures are described by, in the chat template; empty: by continuation."""
    text_temperature: float | None = Field(default=None, gt=0)
    """Of words; none: the likeliest, always."""
    text_top_k: int = Field(default=2048, ge=1)
    """Only the so many likeliest text ids."""
    text_top_p: float = Field(default=1.0, gt=0, le=1)
    """Only the likeliest text ids that together have this probability."""
    max_tokens: int = Field(default=256, ge=1)
    """Of a description, an answer or a text."""


class TrainSettings(Settings):
    """Everything that a training run depends on, besides its shards."""

    seed: int = Field(default=0, ge=0)
    """Of initial weights, order, choices and dropout."""
    steps: int = Field(default=1000, ge=1)
    """Optimizer steps."""
    minutes: float | None = Field(default=None, gt=0)
    """Shorten `steps` to what this machine does in so many minutes, by the pace measured as it
    goes. The schedule then depends on the machine; a resumed run keeps the one it had, unless it
    is asked for other `steps` or `minutes`."""
    accumulate: int = Field(default=1, ge=1)
    """Packs of `data.context` tokens whose gradients make one step."""
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    """Of matrix products; norms, softmax and loss are float32 either way."""
    parameters: Literal["float32", "bfloat16"] = "float32"
    """Of weights, gradients and moments. bfloat16 takes half the memory, and loses updates of less
    than a 256th of a weight: with a small learning rate it learns less."""
    recompute: Recompute = "none"
    """What backward computes again instead of keeping it: full (all of each block), selective (all
    but matrix products and attention), none. Changes memory and time alone."""
    compile: bool = False
    """Run each block through `torch.compile`."""
    ema: float = Field(default=0.0, ge=0, lt=1)
    """Decay of a moving average of the weights, which then is what is validated, sampled from and
    saved as the model; 0: none."""
    needs_init: bool = False
    """Refuse to start without `--init`: the recipe goes on from trained weights."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`; auto takes a GPU where there is one."""
    objective: Literal["next-token", "dpo"] = "next-token"
    """What is learned: documents of shards, or preferences of triplets that `prefer` made."""
    dpo: DPOSettings = DPOSettings()
    mesh: MeshSettings = MeshSettings()
    decoder: Shape = Shape()
    lora: LoraSettings = LoraSettings()
    data: DataSettings = DataSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    log: LogSettings = LogSettings()
    sampling: SamplingSettings = SamplingSettings()

    @model_validator(mode="after")
    def _consistent(self) -> TrainSettings:
        if self.lora.rank and self.ema:
            raise ValueError("ema averages all weights, lora.rank trains adapters: choose one")
        if self.lora.rank and self.mesh.tensor > 1:
            raise ValueError("adapters cannot be split: mesh.tensor must be 1 with lora.rank")
        if self.compile and self.mesh.tensor > 1:  # torch 2.13 fails in backward
            raise ValueError("split matrices do not compile: mesh.tensor must be 1 with compile")
        return self


MAY_CHANGE = (
    *("steps", "minutes", "device", "mesh", "recompute", "compile", "needs_init"),
    *("checkpoint", "log", "sampling"),
)
"""Settings that a resumed run may have otherwise. Another `steps` changes the schedule."""


def settings_from(
    recipe: str | Path | None = None,
    *layers: Mapping[str, Any],
    sets: Iterable[str] = (),
    init: Path | None = None,
) -> TrainSettings:
    """Defaults, then the shape of the weights `init` and how they are sampled from, then the
    recipe, then `layers`, then `key=value` strings."""
    base = load_recipe(recipe, RECIPES) if recipe is not None else {}
    start: dict[str, Any] = {}
    if init is not None:
        start["decoder"] = weights_config(init).shape.model_dump()
        if (config := find(init)[0] / "config.toml").is_file():
            start["sampling"] = load_recipe(config, RECIPES).get("sampling", {})
    return build(TrainSettings, start, base, *layers, sets=sets)


def check_resumed(out: Path, step: Path, settings: TrainSettings) -> None:
    """Refuse to go on from a step of `out` with settings that the steps so far depend on."""
    done = read_saved(step)["step"]
    if done > settings.steps:
        raise UsageError(
            f"{out} has done {done} steps already, and steps = {settings.steps} asks for fewer: "
            "give --steps a higher number, or choose another directory"
        )
    old = build(TrainSettings, load_recipe(out / "config.toml", RECIPES)).model_dump(mode="json")
    changed = differences(old, settings.model_dump(mode="json"), MAY_CHANGE)
    if changed:
        listed = "; ".join(f"{key} was {a!r}, now {b!r}" for key, (a, b) in changed.items())
        raise UnimodalError(
            f"{out} was trained with other settings ({listed}): "
            "set them back, or choose another directory"
        )


def learning_rate(step: int, total: int, settings: OptimizerSettings) -> float:
    """Learning rate of `step` (from 0) out of `total`, `min_lr` at the last."""
    warmup, schedule = settings.warmup, settings.schedule
    return rate(step, total - 1, settings.lr, settings.min_lr, warmup, schedule)
