"""Which device to compute on, checked before anything is loaded."""

from __future__ import annotations

from unimodal.pipeline.errors import UsageError


def usable(name: str) -> str:
    """`name` (cpu, cuda, cuda:1), or for `auto` a GPU where torch sees one, else cpu.

    Raises `UsageError` for a device that is not there.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=torch.device(name))
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"device {name} cannot be used ({reason}): give --device cpu") from error
    return name
