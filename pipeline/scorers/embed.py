"""CLIP embeddings of a clip's pictures, and LAION's aesthetic score of them.

    scoring samples ──> open_clip ──> unit vectors ──> mean, unit length: `embedding`
                                            └──> LAION's head ──> the worst sample's: `aesthetic`

No weights come with this package, and none are fetched unless a hub is named. LAION's heads were
trained on the embeddings of OpenAI's ViT-L/14, which needs QuickGELU:

    embed.model=ViT-L-14 embed.weights=hub:openai embed.aesthetic=sac+logos+ava1-l14-linearMSE.pth

Files are read as tensors (safetensors, or torch.load with weights_only=True): nothing in them runs.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from unimodal.pipeline.clips import EMBED as COLUMNS
from unimodal.pipeline.errors import UsageError
from unimodal.pipeline.frames import Clip
from unimodal.pipeline.settings import Settings

if TYPE_CHECKING:
    import torch
    from torch import Tensor

VERSION = 1
# 12 pictures: 27 s of one core with ViT-L/14, well within what the supervisor takes for a stall.
BATCH = 4

MLP = (1024, 128, 64, 16, 1)
"""Outputs of the layers of LAION's improved predictor; no activation stands between them."""


class EmbedSettings(Settings):
    """CLIP embeddings and aesthetics."""

    model: str = "ViT-L-14"
    """Name of the architecture in open_clip."""
    weights: str | None = None
    """A checkpoint file, a folder with open_clip_config.json and a checkpoint (then `model` is not
    read), "hub:TAG" with a tag that open_clip knows, or "hf-hub:OWNER/NAME"."""
    quick_gelu: bool | None = None
    """OpenAI's weights need it; left out, a tag says so itself, and other weights do not."""
    aesthetic: str | None = None
    """Weights of LAION's linear head or improved predictor; without them the score is null."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where it runs; auto takes a GPU if there is one."""
    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Of the weights and activations. The others save memory on a GPU."""
    batch: int = 64
    """Pictures that a GPU is given at once."""
    threads: int = 1
    """Of torch on the CPU; engines run a part per core."""


def absent(settings: EmbedSettings) -> str | None:
    """Which file or package is missing; None if nothing is."""
    if settings.weights is None:
        return "no weights: set embed.weights=PATH or hub:TAG"
    if importlib.util.find_spec("open_clip") is None:
        return "no open_clip: install open-clip-torch"
    if not settings.weights.startswith(("hub:", "hf-hub:")) and not Path(settings.weights).exists():
        return f"no weights at embed.weights={settings.weights}"
    if settings.aesthetic is not None and not Path(settings.aesthetic).is_file():
        return f"no head at embed.aesthetic={settings.aesthetic}"
    return None


def load(settings: EmbedSettings) -> Callable[[Sequence[Clip]], list[dict[str, Any]]]:
    """A function from clips to their columns; raises `UsageError` if the weights do not fit."""
    clip = Clip_.load(settings)
    head = aesthetic_head(Path(settings.aesthetic), clip.size) if settings.aesthetic else None

    def score(clips: Sequence[Clip]) -> list[dict[str, Any]]:
        counts = [len(one.scoring) for one in clips]
        pictures = (sample.bgr() for one in clips for sample in one.scoring)
        vectors = np.split(clip.pictures(pictures), np.cumsum(counts)[:-1])
        return [_columns(own, head) for own in vectors]

    return score


def _columns(
    vectors: np.ndarray, head: list[tuple[np.ndarray, np.ndarray]] | None
) -> dict[str, Any]:
    """Columns from the unit vectors [N, D] of one clip's samples."""
    if not len(vectors):
        return dict.fromkeys(COLUMNS.names)
    mean = vectors.mean(axis=0, dtype=np.float64)
    worst = None
    if head is not None:
        values = vectors.astype(np.float64)
        for weight, bias in head:
            values = values @ weight.T + bias
        worst = float(values.min())
    return {"aesthetic": worst, "embedding": (mean / np.linalg.norm(mean)).astype(np.float32)}


@dataclass(frozen=True)
class Clip_:
    """A loaded CLIP model."""

    model: Any
    preprocess: Callable[[Any], Tensor]
    tokenize: Callable[[list[str]], Tensor]
    settings: EmbedSettings
    device: str
