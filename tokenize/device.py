"""Which device to compute on, checked before anything is loaded, and what to do when it is full."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from unimodal.pipeline.errors import UnimodalError, UsageError, first_line

# How torch's allocators (CPU, CUDA) and the libraries below them say it; only CUDA has a class.
_FULL = re.compile(
    r"out of memory|not enough memory|can't allocate memory|cannot allocate memory|ALLOC_FAILED"
    r"|bad_alloc",
    re.IGNORECASE,
)


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
        reason = first_line(error)
        raise UsageError(f"device {name} cannot be used ({reason}): give --device cpu") from error
    return name


@contextmanager
def out_of_memory(setting: str) -> Iterator[None]:
    """Turn an out-of-memory error of torch or Python into `UnimodalError` that names `setting`.

    `setting` is what to lower, with its value: "batch (now 8) or area (now 262144)". Other errors
    pass through.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not _FULL.search(str(error)):
            raise
        asked = re.search(r"tried to allocate ([\d.]+ ?\w+)", str(error), re.IGNORECASE)
        more = f" ({asked[1]} more were asked for)" if asked else ""
        raise UnimodalError(f"out of memory{more}: lower {setting}") from error
