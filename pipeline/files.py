"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


_TEMPORARY = re.compile(r"\..+\.[0-9]+\.tmp")


def sweep(folder: Path) -> None:
    """Remove what killed writers left in a folder of ours; call it with the folder's lock held.

    Only names that `atomic` gives: any other .tmp is somebody else's.
    """
    for left in [*folder.glob(".*.tmp"), *folder.glob("*/.*.tmp")]:
        if _TEMPORARY.fullmatch(left.name) and left.is_file():
            left.unlink(missing_ok=True)


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it into place if the block succeeds.

    The temporary name carries the process id, so that two writers never share it. On an error
    the temporary file is removed and `path` is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())  # some writers, safetensors' among them, say 0600
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except Exception as error:
        # Writers in Rust, safetensors' among them, tell of a full disk in words alone.
        said = re.search(r"\(os error (\d+)\)", str(error))
        if said is None or isinstance(error, OSError):
            raise
        raise OSError(int(said[1]), os.strerror(int(said[1])), str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)
