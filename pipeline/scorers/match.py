"""How well a caption agrees with the pictures: the cosine of their CLIP embeddings."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from unimodal.pipeline.clips import MATCH as COLUMNS
from unimodal.pipeline.errors import UsageError
from unimodal.pipeline.scorers.embed import EmbedSettings, absent
from unimodal.pipeline.scorers.openclip import clip_model

__all__ = ["COLUMNS", "VERSION", "absent", "load"]

VERSION = 2


def load(settings: EmbedSettings) -> Callable[[Sequence[str], np.ndarray], list[float]]:
    """A function from N texts and the unit embeddings float32 [N, D] of their clips to cosines.

    The text goes through the model that the embeddings come from; raises `UsageError` where it
    cannot be loaded, or gives vectors of another length.
    """
    model = clip_model(settings)

    def match(texts: Sequence[str], embeddings: np.ndarray) -> list[float]:
        if len(texts) and embeddings.shape != (len(texts), model.width):
            raise UsageError(
                f"embeddings {list(embeddings.shape)} do not go with {len(texts)} texts of "
                f"{model.width} numbers: they were made by another model"
            )
        pairs = zip(model.texts(texts), embeddings.astype(np.float64), strict=True)
        return [float(text @ embedding) for text, embedding in pairs]

    return match
