"""Settings of a tokenizer's training, and the recipes that fill them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from unimodal.pipeline.errors import UsageError
from unimodal.pipeline.settings import Settings, build, differences, load_recipe
from unimodal.tokenize.training import rate
from unimodal.tokenize.vision.movq import MoVQConfig

RECIPES = Path(__file__).parent / "recipes"


class Network(Settings):
    """Shape of the network (see `MoVQConfig`)."""

    codebook_size: int = Field(default=16384, ge=2)
    embed_dim: int = Field(default=16, ge=1)
    """Numbers of a latent (`z_channels` too)."""
    ch: int = 32
    ch_mult: tuple[int, ...] = (1, 1, 2, 4)
    num_res_blocks: int = Field(default=1, ge=1)

    @classmethod
    def of(cls, cfg: MoVQConfig) -> Network:
        """The settings of a network that is there already."""
        return cls(**{name: getattr(cfg, name) for name in cls.model_fields})

    def config(self) -> MoVQConfig:
        """The network's configuration; raises `UsageError` for impossible channel counts."""
        lowest = (len(self.ch_mult) - 1,)  # attention at the lowest resolution alone, as released
        values = self.model_dump() | {"z_channels": self.embed_dim, "attn_resolutions": lowest}
        try:
            return MoVQConfig(**values)
        except ValueError as error:
            raise UsageError(f"setting network: {error}") from error


class DataSettings(Settings):
    """What is read, and what is held out."""

    short_side: int = Field(default=512, ge=64)
    """Pixels; larger pictures are reduced to it when they are read (clips to half of it)."""
    fps: float = Field(default=12.0, gt=0)
    """Frames per second of training clips."""
    clip_frames: Literal[4, 8] = 4
    """Frames of a training clip; of 8, half the steps see all, encoded jointly, half see 4."""
    val_fraction: float = Field(default=0.05, ge=0, lt=1)
    """Share of the sources, by a hash of their name, that training never sees."""
    memory_gib: float = Field(default=6.0, gt=0)
    """Decoded pictures held in memory at most, by each process."""


class LossSettings(Settings):
    """Weights of the terms; pixels are in [-1, 1] and every term is a mean."""

    pixel: Literal["l2", "l1"] = "l2"
    """Pixel term, of weight 1."""
    perceptual: float = Field(default=0.1, ge=0)
    """Weight of LPIPS, where its weights are given."""
    lpips: str | None = None
    """File or directory with LPIPS's weights (see `perceptual.py`)."""
    sharpness: float = Field(default=0.3, ge=0)
    """Weight of the term that stands in for LPIPS where its weights are not given."""
    commitment: float = Field(default=0.05, ge=0)
    """Weight of |z - sg(e)|^2, which draws latents to their codes."""
    adversarial: float = Field(default=0.0, ge=0)
    """Constant weight of -D(painted); 0: no discriminator."""


class DiscriminatorSettings(Settings):
    """The PatchGAN that judges single frames, where `loss.adversarial` is not 0."""

    start: int = Field(default=0, ge=0)
    """Step from which it is trained and heard."""
    n_layers: int = Field(default=2, ge=1)
    """Convolutions of stride 2."""
    width: int = Field(default=64, ge=1)
    """Channels of the first."""
    lr: float = Field(default=1e-4, gt=0)
    """Constant."""


class CodebookSettings(Settings):
    """How the codebook follows the latents."""

    kind: Literal["ema", "gradient"] = "ema"
    """Moving averages of the latents that chose an entry, or the gradient of `weight` |e - sg(z)|^2
    through the optimizer, as in the published codes."""
    weight: float = Field(default=1.0, ge=0)
    """Of the codebook term (`gradient` alone)."""
    decay: float = Field(default=0.99, ge=0, lt=1)
    """Of the moving averages and of the counts of uses."""
    revive_every: int = Field(default=50, ge=0)
    """Steps between two looks for dead entries; 0: never."""
    dead: float = Field(default=0.05, ge=0)
    """Share of an even use under which an entry is dead and moves onto a random latent."""


class OptimizerSettings(Settings):
    """The optimizer, and the cosine that its learning rate follows."""

    kind: Literal["muon", "adamw"] = "muon"
    """Muon for convolutions and AdamW for the rest; or AdamW (without decay: Adam) for all."""
    lr: float = Field(default=2e-3, gt=0)
    """Highest learning rate."""
    encoder: float = Field(default=1.0, ge=0)
    """The encoder's learning rate as a share of it; 0 keeps the encoder as it begins."""
    min_lr: float = Field(default=2e-5, ge=0)
    """At the last step; equal to `lr`: constant."""
    warmup: int = Field(default=100, ge=0)
    """Steps of linear rise."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    weight_decay: float = Field(default=1e-4, ge=0)
    clip: float = Field(default=1.0, gt=0)
    """Bound of the gradient."""
    clip_by: Literal["norm", "value"] = "norm"
    """Whether `clip` bounds the gradient's norm, or each of its values."""


class TokenizerSettings(Settings):
    """Settings of `unimodal train-tokenizer`."""

    seed: int = Field(default=0, ge=0)
    steps: int = Field(default=4000, ge=1)
    batch: int = Field(default=16, ge=1)
    """Frames of a step over all processes: so many crops of pictures, or a quarter (an eighth) as
    many clips of 4 (8) frames."""
    crop: int = Field(default=64, ge=16, multiple_of=8)
    """Pixels; side of a training crop."""
    clip_share: float = Field(default=0.15, ge=0, le=1)
    """Share of the steps that see clips instead of pictures, where there are both."""
    ema: float = Field(default=0.999, ge=0, lt=1)
    """Decay of the moving average of the weights, which is what is measured and exported."""
    bf16: bool = True
    """Run the 2-D trunk in bfloat16 while training (the latents and the codebook stay float32)."""
    needs_init: bool = False
    """Refuse to start without `--init`: the recipe refines weights."""
    save_every: int = Field(default=250, ge=1)
    """Steps between two saves, each with a measurement on held-out pictures and a grid."""
    log_every: int = Field(default=10, ge=1)
    """Steps between two records."""
    tensorboard: bool = True
    """Write TensorBoard event files, where it is installed."""
    network: Network = Network()
    data: DataSettings = DataSettings()
    loss: LossSettings = LossSettings()
    discriminator: DiscriminatorSettings = DiscriminatorSettings()
    codebook: CodebookSettings = CodebookSettings()
    optimizer: OptimizerSettings = OptimizerSettings()


MAY_CHANGE = ("steps", "save_every", "log_every", "tensorboard", "needs_init")
"""Settings that a resumed training may have otherwise. Another `steps` changes the schedule."""


def settings_from(
    recipe: str, *layers: Mapping[str, Any], sets: Iterable[str] = ()
) -> TokenizerSettings:
    """Defaults, then the recipe (shipped, or a TOML file), then `layers`, then `key=value`s."""
    return build(TokenizerSettings, load_recipe(recipe, RECIPES), *layers, sets=sets)


def changed(before: Mapping[str, Any], now: TokenizerSettings) -> list[str]:
    """What a resumed training would have otherwise than before, of what may not change."""
    found = differences(before, now.model_dump(mode="json"), MAY_CHANGE)
    lpips = found.get("loss.lpips")
    if lpips and None not in lpips:  # its weights may move to another place, but not come or go
        del found["loss.lpips"]
    return list(found)


def learning_rate(step: int, total: int, settings: OptimizerSettings) -> float:
    """Of `step` (from 0) out of `total`: linear rise, then cosine to `min_lr`."""
    return rate(step, total, settings.lr, settings.min_lr, settings.warmup)
