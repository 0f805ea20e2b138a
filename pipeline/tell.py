"""What a worker tells while it works; the engine listens, and takes silence for a stuck worker."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Tell:
    """Where a stage reports to. A thing is a source in the watch stage, else a clip."""

    begin: Callable[[str, str], None] = lambda stage, thing: None
    """Work on this thing begins."""
    seconds: Callable[[float], None] = lambda seconds: None
    """So many seconds of video went by; 0 says only that work goes on."""
    done: Callable[[str, str, str], None] = lambda stage, thing, reason: None
    """The thing is finished: "" where it was read, else the reason why it was quarantined."""


SILENT = Tell()
