"""How many processors this process may use."""

from __future__ import annotations

import os
from pathlib import Path


def usable_processors(root: Path = Path("/sys/fs/cgroup")) -> float:
    """Processors that the affinity mask and the control group at `root` leave; a container may
    have half of one, which `os.cpu_count` does not know of."""
    if hasattr(os, "sched_getaffinity"):
        usable = float(len(os.sched_getaffinity(0)))
    else:
        usable = float(os.cpu_count() or 1)
    for quota, period in (
        (_words(root / "cpu.max")[:1], _words(root / "cpu.max")[1:2]),
        (_words(root / "cpu/cpu.cfs_quota_us"), _words(root / "cpu/cpu.cfs_period_us")),
    ):
        if quota and period and quota[0].isdigit() and period[0].isdigit():
            usable = min(usable, int(quota[0]) / int(period[0]))
    return usable


def processors() -> int:
    """Whole processors that this process may use, at least one."""
    return max(1, int(usable_processors()))


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []
