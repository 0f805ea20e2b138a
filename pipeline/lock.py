"""One writer at a time in a directory of results."""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
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
    path, mine = run / "run.lock", not run.exists()
    for last in (False, False, True):
        run.mkdir(parents=True, exist_ok=True)
        try:
            token = _take(path, progress)
            break
        except FileNotFoundError:  # another, to which nothing came, has just removed it
            if last:
                raise
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
        if mine:  # nothing came of it: leave nothing behind, unless another has just begun here
            with suppress(OSError):
                run.rmdir()


def first_rank_lock(run: Path, progress: Progress) -> AbstractContextManager[None]:
    """`run_lock`, taken by the first of the processes that torchrun started, for all of them."""
    return run_lock(run, progress) if os.environ.get("RANK", "0") == "0" else nullcontext()


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
                path.unlink(missing_ok=True)  # its holder may have ended this instant
                progress.note(f"{path.parent}: taking over from {who}, which did not finish")
            _create(path, token)
        finally:
            turn.unlink(missing_ok=True)
    except FileExistsError:
        raise _busy(path.parent, "another process") from None
    return token


def _create(path: Path, token: str) -> None:
    with path.open("x") as file:
        try:
            who = {"pid": os.getpid(), "born": _born(os.getpid()), "host": socket.gethostname()}
            json.dump({**who, "token": token}, file)
            file.flush()
        except OSError:  # a full disk: an empty lock would keep everybody out for a minute
            path.unlink()
            raise


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
    dead = holder.get("host") == socket.gethostname() and not _alive(
        holder.get("pid"), holder.get("born")
    )
    if not dead and age < STALE_S:
        raise _busy(path.parent, who)
    return who


def _busy(run: Path, who: str) -> UnimodalError:
    return UnimodalError(f"{run}: {who} is writing here; wait for it, or end it first")


def _alive(pid: object, born: object) -> bool:
    if not isinstance(pid, int):
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    # A container that is started again has the same name and gives the same numbers.
    return born is None or _born(pid) in (None, born)


def _born(pid: int) -> str | None:
    """When a process began, in the kernel's ticks; None where that cannot be known."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None
