"""The decoder, its loader, trainer and sampler."""

from __future__ import annotations

from typing import Any

__all__ = ["Decoder"]


def __getattr__(name: str) -> Any:
    """Load the public names on first use, so that importing the package does not import torch."""
    if name == "Decoder":
        from unimodal.model.decoder import Decoder

        return Decoder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
