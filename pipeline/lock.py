"""One writer at a time in a run directory."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from unimodal.pipeline.errors import UnimodalError
from unimodal.pipeline.progress import Progress

HEARTBEAT_S = 10.0
STALE_S = 60.0
"""A lock whose holder has not been heard of for so long is taken over (clocks may differ a little
between machines that share the directory)."""


@contextmanager
def run_lock(run: Path, progress: Progress) -> Iterator[None]:
    """Hold `run`/run.lock while the block runs; raises `UnimodalError` if somebody else does."""
    mine = not run.exists()
    run.mkdir(parents=True, exist_ok=True)
    path = run / "run.lock"
    _take(path, progress)
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(HEARTBEAT_S):
            try:
                os.utime(path)
            except OSError:
                return

    heart = threading.Thread(target=beat, daemon=True)
    heart.start()
    try:
        yield
    finally:
        stop.set()
        heart.join()
        path.unlink(missing_ok=True)
        if mine and not any(run.iterdir()):  # nothing came of it: leave nothing behind
            run.rmdir()


def _take(path: Path, progress: Progress) -> None:
    me = {"host": socket.gethostname(), "pid": os.getpid()}
    for _ in range(3):
        try:
            with path.open("x") as file:
                json.dump(me, file)
            return
        except FileExistsError:
            pass
        try:
            age = time.time() - path.stat().st_mtime
            holder = json.loads(path.read_text() or "{}")
        except FileNotFoundError:
            continue  # released this instant
        except ValueError:
            holder, age = {}, STALE_S + 1
        who = f"process {holder.get('pid')} on {holder.get('host')}"
        dead = holder.get("host") == me["host"] and not _alive(holder.get("pid"))
        if not dead and age < STALE_S:
            raise UnimodalError(
                f"{path.parent}: {who} is writing this run; wait for it, or end it first"
            )
        progress.note(f"{path.parent}: taking over from {who}, which did not finish")
        path.unlink(missing_ok=True)
    raise UnimodalError(f"{path}: cannot be taken; another run is starting at the same time")


def _alive(pid: object) -> bool:
    if not isinstance(pid, int):
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
