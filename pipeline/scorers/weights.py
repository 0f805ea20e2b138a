"""Files of weights: read as tensors and nothing else, and told apart by what is in them."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from unimodal.pipeline.errors import UsageError, first_line

PIECE = 1 << 20  # bytes
PIECES = 16


def fingerprint(*paths: str | None) -> str:
    """Hash of what files hold, 16 hex digits: a file that is replaced under its name gives another.

    Of more than 16 MB only 16 evenly spaced pieces of 1 MB are read, the first and the last among
    them: training changes all of a file, and gigabytes take seconds. Raises `UsageError` if a file
    cannot be read.
    """
    found = hashlib.sha256()
    for path in paths:
        if path is None:
            found.update(b"none")
            continue
        try:
            with Path(path).open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                found.update(b"%d:" % size)
                if size <= PIECE * PIECES:
                    found.update(file.read())
                    continue
                for i in range(PIECES):
                    file.seek((size - PIECE) * i // (PIECES - 1))
                    found.update(file.read(PIECE))
        except OSError as error:
            raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    return found.hexdigest()[:16]


def state_dict(path: str) -> dict[str, Any]:
    """Tensors by name, on the CPU, from a safetensors file or a PyTorch checkpoint.

    A checkpoint may hold them under "state_dict" and begin their names with "module.", as training
    loops write. Code in a pickle is never run: raises `UsageError` for a file that is more than
    tensors, or no such file at all.
    """
    import torch
    from safetensors.torch import load_file

    found: Any
    try:
        if path.endswith(".safetensors"):
            found = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        why = first_line(error)[:300]
        raise UsageError(
            f"{path} cannot be read as weights ({why}): give a safetensors file, or a checkpoint "
            "of nothing but tensors"
        ) from error
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    if not isinstance(found, dict):
        raise UsageError(f"{path} holds a {type(found).__name__}, not tensors by name")
    wrong = [str(name) for name, value in found.items() if not isinstance(value, torch.Tensor)]
    if wrong or not found:
        raise UsageError(f"{path} holds {', '.join(wrong[:3]) or 'nothing'}, not tensors by name")
    return {name.removeprefix("module."): value for name, value in found.items()}
