"""One writer at a time in a run directory."""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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
    token = _take(path, progress)
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(HEARTBEAT_S) and _holds(path, token):
            os.utime(path)

    heart = threading.Thread(target=beat, daemon=True)
    heart.start()
    try:
        yield
    finally:
        stop.set()
        heart.join()
        if _holds(path, token):  # after a long sleep it may be somebody else's
            path.unlink(missing_ok=True)
        if mine and not any(run.iterdir()):  # nothing came of it: leave nothing behind
            run.rmdir()


def _holds(path: Path, token: str) -> bool:
    try:
        return json.loads(path.read_text()).get("token") == token
    except (OSError, ValueError):
        return False


def _take(path: Path, progress: Progress) -> str:
    token = secrets.token_hex(8)
    try:
        _create(path, token)
        return token
    except FileExistsError:
        _stale(path)  # raises if it is not
    # Two may have found the same stale lock: one at a time looks again, and replaces it.
    turn = path.with_name(f"{path.name}.turn")
    with suppress(FileNotFoundError):
        if time.time() - turn.stat().st_mtime > STALE_S:
            turn.unlink()  # whoever had it was killed in that instant
    try:
        _create(turn, token)
        try:
            if path.exists():
                who = _stale(path)
                path.unlink()
                progress.note(f"{path.parent}: taking over from {who}, which did not finish")
            _create(path, token)
        finally:
            turn.unlink(missing_ok=True)
    except FileExistsError:
        raise _busy(path.parent, "another process") from None
    return token


def _create(path: Path, token: str) -> None:
    with path.open("x") as file:
        json.dump({"host": socket.gethostname(), "pid": os.getpid(), "token": token}, file)


def _stale(path: Path) -> str:
    """Who left this lock; raises `UnimodalError` if its holder may still be at work."""
    try:
        age = time.time() - path.stat().st_mtime
        holder = json.loads(path.read_text() or "{}")
    except FileNotFoundError:
        return "a process"  # released this instant
    except ValueError:
        holder, age = {}, STALE_S + 1
    who = f"process {holder.get('pid')} on {holder.get('host')}"
    dead = holder.get("host") == socket.gethostname() and not _alive(holder.get("pid"))
    if not dead and age < STALE_S:
        raise _busy(path.parent, who)
    return who


def _busy(run: Path, who: str) -> UnimodalError:
    return UnimodalError(f"{run}: {who} is writing this run; wait for it, or end it first")


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
