"""Media in, scored and captioned clips out."""

from __future__ import annotations

from typing import Any

__all__ = ["Run", "curate"]


def __getattr__(name: str) -> Any:
    """Load the public names on first use, so that importing the package stays instant."""
    if name in __all__:
        from unimodal.pipeline import run

        return getattr(run, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
