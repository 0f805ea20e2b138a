"""CLIP embeddings of the stored pictures, and how pleasing LAION's predictors find them.

    scoring samples ──> open_clip's own preprocessing ──> unit vectors ─┬─> mean ──> embedding
                                                                        └─> head ──> aesthetic

The heads were trained on OpenAI's ViT-L/14: other weights give other numbers, and thresholds of
their own.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from unimodal.pipeline.clips import EMBED as COLUMNS
from unimodal.pipeline.errors import MediaError, UsageError
from unimodal.pipeline.frames import Clip
from unimodal.pipeline.scorers.openclip import HUB, clip_model
from unimodal.pipeline.scorers.weights import fingerprint, state_dict
from unimodal.pipeline.settings import Settings

VERSION = 1
# 12 pictures: 27 s of one core with ViT-L/14, well within what the supervisor takes for a stall.
BATCH = 4

MLP = ["layers.0", "layers.2", "layers.4", "layers.6", "layers.7"]  # dropout in between, no more


class EmbedSettings(Settings):
    """Which CLIP, with which weights."""

    model: str = "ViT-L-14-quickgelu"
    """Architecture, by open_clip's name. This is OpenAI's ViT-L/14; LAION's own is ViT-L-14."""
    weights: str | None = None
    """Path of a checkpoint, or "hub:TAG" for one that open_clip downloads; none: skip."""
    config: str | None = None
    """Path of an open_clip model config in place of `model`. One named open_clip_config.json, as
    model repositories have it, also says how pictures are prepared."""
    aesthetic: str | None = None
    """Path of LAION's aesthetic head, the linear or the improved one; without, no such score."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs; "auto" takes a GPU if there is one."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of the model on a GPU; a CPU always computes in fp32."""
    threads: int = 1
    """Of the model on a CPU; engines run a part per core."""


def absent(settings: EmbedSettings) -> str | None:
    """Why nothing can be embedded; None if it can."""
    if settings.weights is None:
        return "no weights: set embed.weights=PATH, or hub:openai to download"
    if importlib.util.find_spec("open_clip") is None:
        return "no open_clip: install open-clip-torch"
    for name, path in zip(("weights", "config", "aesthetic"), _files(settings), strict=True):
        if path is not None and not Path(path).is_file():
            return f"no file at embed.{name}={path}"
    return None


def identity(settings: EmbedSettings) -> str:
    """What tells the contents of the given files apart, 16 hex digits."""
    return fingerprint(*_files(settings))


def _files(settings: EmbedSettings) -> tuple[str | None, str | None, str | None]:
    local = settings.weights if not (settings.weights or "").startswith(HUB) else None
    return local, settings.config, settings.aesthetic


def load(settings: EmbedSettings) -> Callable[[Sequence[Clip]], list[dict[str, Any]]]:
    """A function from clips to their columns; raises `UsageError` for weights that do not fit."""
    from PIL import Image

    model = clip_model(settings)
    aesthetic = head(settings.aesthetic, model.width) if settings.aesthetic else None

    def score(clips: Sequence[Clip]) -> list[dict[str, Any]]:
        units = model.pictures(
            [
                Image.fromarray(np.ascontiguousarray(sample.bgr()[..., ::-1]))
                for clip in clips
                for sample in clip.scoring
            ]
        )
        rows: list[dict[str, Any]] = []
        for clip in clips:
            own, units = np.split(units, [len(clip.scoring)])
            rows.append(_columns(own, aesthetic))
        return rows

    return score


def _columns(units: np.ndarray, aesthetic: tuple[np.ndarray, float] | None) -> dict[str, Any]:
    """The columns of a clip from its samples' unit vectors, float64 [N, D]."""
    if not len(units):
        return dict.fromkeys(COLUMNS.names)
    mean = units.mean(axis=0)
    embedding = (mean / np.linalg.norm(mean)).astype(np.float32)
    if not np.isfinite(embedding).all():
        raise MediaError("its embedding is not finite: try embed.precision=fp32")
    scores = [float(unit @ aesthetic[0]) + aesthetic[1] for unit in units] if aesthetic else []
    return {"aesthetic": min(scores, default=None), "embedding": embedding.tolist()}


def head(path: str, width: int) -> tuple[np.ndarray, float]:
    """LAION's head for embeddings of `width`: weights, float64 [D], and offset.

    Known are the linear one (LAION-Aesthetics_Predictor V1) and the improved one (sac+logos+ava1).
    The latter's five layers have nothing nonlinear in between, so they too are one linear map.
    Raises `UsageError` for any other file.
    """
    tensors = {name: value.double().numpy() for name, value in state_dict(path).items()}
    layers = [""] if "weight" in tensors else [f"{name}." for name in MLP]
    if set(tensors) != {f"{layer}{kind}" for layer in layers for kind in ("weight", "bias")}:
        names = ", ".join(sorted(tensors)[:6])
        raise UsageError(f"{path} is no aesthetic head of LAION's: it has {names}")
    weight, offset = np.eye(width), np.zeros(width)
    for layer in layers:
        own, bias = tensors[f"{layer}weight"], tensors[f"{layer}bias"]
        if own.ndim != 2 or own.shape[1] != len(weight) or bias.shape != own.shape[:1]:
            raise UsageError(
                f"{path}: {layer}weight {list(own.shape)} does not take the {len(weight)} numbers "
                f"that come in; embed.model gives {width}: the head was trained on another CLIP"
            )
        weight, offset = own @ weight, own @ offset + bias
    if len(weight) != 1:
        raise UsageError(f"{path} is no aesthetic head: it gives {len(weight)} numbers, not one")
    return weight[0], float(offset[0])
