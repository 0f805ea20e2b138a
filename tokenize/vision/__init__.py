"""Pictures and clips to discrete codes and back."""

from __future__ import annotations

from typing import Any

__all__ = ["VisionTokenizer"]


def __getattr__(name: str) -> Any:
    """Load the public name on first use, so that importing the package does not import torch."""
    if name == "VisionTokenizer":
        from unimodal.tokenize.vision.tokenizer import VisionTokenizer

        return VisionTokenizer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
