"""How probably a picture is not safe for work, by any ONNX image classifier.

    scoring samples ──> stretched, middle cut out, scaled ──> classifier ──> probability of a class

The defaults are those of Yahoo's OpenNSFW (2016): a picture stretched to 256x256, its middle
224x224 in BGR minus Caffe's mean, channels last, the second of two probabilities.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from unimodal.pipeline.clips import NSFW as COLUMNS
from unimodal.pipeline.errors import UsageError
from unimodal.pipeline.frames import Clip
from unimodal.pipeline.scorers.weights import fingerprint
from unimodal.pipeline.settings import Settings

VERSION = 1
BATCH = 8

CAFFE_MEAN = np.array([104, 117, 123], np.float32)  # BGR, 0..255
MEAN = np.array([0.485, 0.456, 0.406], np.float32)  # ImageNet's, RGB, 0..1
STD = np.array([0.229, 0.224, 0.225], np.float32)


class NsfwSettings(Settings):
    """Which classifier, and what it wants to see."""

    weights: str | None = None
    """Path of an ONNX image classifier; without, no such score."""
    size: int = 224
    """Pixels of both sides of what the classifier sees."""
    stretch: int = 256
    """Pixels that both sides are stretched to before the middle is cut out; `size`: all is seen."""
    layout: Literal["nchw", "nhwc"] = "nhwc"
    """Channels first, as PyTorch has them, or last, as TensorFlow does."""
    scale: Literal["caffe", "imagenet", "unit", "signed"] = "caffe"
    """Values: BGR minus Caffe's mean; RGB with ImageNet's mean and deviation; RGB of 0..1; -1..1"""
    output: int = 1
    """Which number of the classifier's first output is that of the unsafe class, from 0."""
    softmax: bool = False
    """Whether the outputs are logits, which a softmax makes probabilities."""


def absent(settings: NsfwSettings) -> str | None:
    """Why nothing can be classified; None if it can."""
    if settings.weights is None:
        return "no weights: set nsfw.weights=PATH of an ONNX image classifier"
    if importlib.util.find_spec("onnxruntime") is None:
        return "no onnxruntime: install it"
    if not Path(settings.weights).is_file():
        return f"no file at nsfw.weights={settings.weights}"
    return None


def identity(settings: NsfwSettings) -> str:
    """What tells the contents of the weights apart, 16 hex digits."""
    return fingerprint(settings.weights)


def load(settings: NsfwSettings) -> Callable[[Sequence[Clip]], list[dict[str, Any]]]:
    """A function from clips to their columns; raises `UsageError` for a model that does not fit."""
    classify = classifier(settings)

    def score(clips: Sequence[Clip]) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        for clip in clips:
            found = [classify(prepare(sample.bgr(), settings)) for sample in clip.scoring]
            rows.append(dict.fromkeys(COLUMNS.names, max(found, default=None)))
        return rows

    return score


def prepare(bgr: np.ndarray, settings: NsfwSettings) -> np.ndarray:
    """A picture, BGR uint8 [H, W, 3], as the classifier wants it: float32, one of a batch."""
    from PIL import Image

    sides = (settings.stretch, settings.stretch)
    # Pillow's filter widens when it shrinks, as in the code that these models were trained with.
    image = Image.fromarray(np.ascontiguousarray(bgr[..., ::-1]))
    seen: np.ndarray = np.asarray(image.resize(sides, Image.Resampling.BILINEAR), np.float32)
    edge = (settings.stretch - settings.size) // 2
    seen = seen[edge : edge + settings.size, edge : edge + settings.size]
    if settings.scale == "caffe":
        seen = seen[..., ::-1] - CAFFE_MEAN
    elif settings.scale == "imagenet":
        seen = (seen / 255 - MEAN) / STD
    else:
        seen = seen / 255 if settings.scale == "unit" else seen / 127.5 - 1
    if settings.layout == "nchw":
        seen = seen.transpose(2, 0, 1)
    return np.ascontiguousarray(seen[None], np.float32)


def classifier(settings: NsfwSettings) -> Callable[[np.ndarray], float]:
    """Load the model: a function from one prepared picture to its probability."""
    import onnxruntime

    if settings.stretch < settings.size:
        raise UsageError(f"nsfw.stretch={settings.stretch} is less than nsfw.size={settings.size}")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1  # engines run a part per core
    options.log_severity_level = 3
    path, providers = settings.weights, ["CPUExecutionProvider"]
    gray = np.full((settings.stretch, settings.stretch, 3), 128, np.uint8)
    try:
        session = onnxruntime.InferenceSession(path, options, providers=providers)
        name = session.get_inputs()[0].name
        outputs = session.run(None, {name: prepare(gray, settings)})[0].size
    except Exception as error:
        why = " ".join(str(error).split())[:300]
        raise UsageError(
            f"{path} cannot be run as an image classifier with nsfw.size={settings.size} and "
            f"nsfw.layout={settings.layout}: {why}"
        ) from error
    if not 0 <= settings.output < outputs or (settings.softmax and outputs < 2):
        raise UsageError(f"nsfw.output={settings.output}, but {path} gives {outputs} numbers")

    def classify(picture: np.ndarray) -> float:
        values = session.run(None, {name: picture})[0].astype(np.float64).ravel()
        if settings.softmax:
            values = np.exp(values - values.max())
            values /= values.sum()
        found = float(values[settings.output])
        if not -1e-3 <= found <= 1 + 1e-3:  # nor NaN
            raise UsageError(
                f"{path} gives {found:.3g}, which is no probability: set nsfw.softmax=true for "
                "logits, and check nsfw.output"
            )
        return found

    return classify
