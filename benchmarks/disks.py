"""Disks that are full, disks that may not be written, and two commands on one directory.

A full disk is a tmpfs that holds a part of what a command makes; one that may not be written is a
bind mount, which also binds root. Both are mounted in a mount namespace of this process alone;
where that is not allowed, they are not tried, and the table lacks them.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.forked import Road, answers, complaint, contents, media, once, run, start, told

NEW_MOUNTS, NEW_USER = 0x20000, 0x10000000
SHARES = (0.05, 0.25, 0.5)
"""Of what a command writes, so much finds room the first time."""
ROOM = "it had room enough"


def apart() -> bool:
    """Give this process mounts of its own; False where that is not allowed."""
    libc = ctypes.CDLL(None, use_errno=True)
    user, team = os.geteuid(), os.getegid()
    if libc.unshare(NEW_MOUNTS if user == 0 else NEW_MOUNTS | NEW_USER):
        return False
    if user:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {team} 1")
    return not _mount("--make-rprivate", "/").returncode


def _mount(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["mount", *arguments], capture_output=True)


@contextmanager
def mounted(at: Path, *arguments: str) -> Iterator[Path]:
    """Something mounted while the block runs."""
    at.mkdir(parents=True, exist_ok=True)
    done = _mount(*arguments, str(at))
    if done.returncode:
        raise SystemExit(f"mount {' '.join(arguments)} {at}: {done.stderr.decode()}")
    try:
        yield at
    finally:
        subprocess.run(["umount", "-l", str(at)], check=True)


def disks(folder: Path, only: list[str], own_mounts: bool) -> list[dict[str, Any]]:
    """Rows of each command: on full disks, where it may not write, and twice at once."""
    media(folder / "in", pictures=12, films=2)
    prompts = "".join(f"the picture called {i}\n" for i in range(8))
    (folder / "prompts.txt").write_text(prompts)
    rows: dict[str, dict[str, Any]] = {}
    for what in ("a full disk", "an output that may not be written", "two runs at once"):
        rows[what] = {"what": what, "tried": 0, "survived": 0, "notes": []}
    with answers().answering(delay_s=lambda digest: 0.05) as server:
        commands = Road(folder, server.url).commands()
        last = max(list(commands).index(name) for name in only)
        for name, given in list(commands.items())[: last + 1]:
            whole = folder / name
            took = once(given, whole)
            if took.code:
                raise SystemExit(f"{name} ended with {took.code}:\n{took.stderr[-3000:]}")
            if name not in only:
                continue
            expected = contents(whole)
            if own_mounts:
                for share in SHARES:
                    wrong = _full(folder / "full", given, whole, expected, share)
                    _note(rows["a full disk"], f"{name}, {share:.0%} of its space", wrong)
                for ready in (False, True):
                    wrong = _kept(folder / "kept", given, whole if ready else None)
                    what = "finished" if ready else "new"
                    _note(rows["an output that may not be written"], f"{name}, {what}", wrong)
            for late in (0.0, 0.3):
                wrong = _twice(folder / "twice", given, expected, late * took.seconds)
                _note(rows["two runs at once"], f"{name}, {late:.0%} of the way", wrong)
    if own_mounts:
        rows["inputs"] = _inputs(folder, commands)
    return [told(row) for row in rows.values() if row["tried"]]


def _note(row: dict[str, Any], what: str, wrong: str | None) -> None:
    if wrong == ROOM:
        row["room"] = row.get("room", 0) + 1  # nothing was tried
        return
    row["tried"] += 1
    row["survived"] += wrong is None
    if wrong:
        row["notes"].append(f"{what}: {wrong}")
        print("   ", row["notes"][-1], file=sys.stderr, flush=True)


def _differing(expected: dict[str, bytes], found: dict[str, bytes]) -> str | None:
    wrong = [k for k in expected | found if expected.get(k) != found.get(k)]
    return f"other bytes: {wrong[:6]}" if wrong else None


def _full(
    at: Path,
    given: tuple[list[str], Path | None],
    whole: Path,
    expected: dict[str, bytes],
    share: float,
) -> str | None:
    """A disk that holds a part of it; then there is room, and the same command goes on."""
    before = 0 if given[1] is None else _pages(given[1])
    pages = before + max(8, round(share * (_pages(whole) - before)))
    with mounted(at, "-t", "tmpfs", "-o", f"size={pages * 4096}", "none"):
        first = once(given, at / "out")
        wrong = complaint(first)
        if wrong:
            return wrong
        if first.code == 0:
            return ROOM
        if "space" not in first.stderr and "full" not in first.stderr:
            return f"it does not say why: {first.stderr!r}"
        _mount("-o", "remount,size=4g", str(at))
        again = once(given, at / "out")
        if again.code:
            return f"the second time exit {again.code}: {again.stderr[-400:]}"
        return _differing(expected, contents(at / "out"))


def _pages(folder: Path) -> int:
    return sum(-(-path.lstat().st_size // 4096) + 1 for path in folder.rglob("*"))


def _kept(at: Path, given: tuple[list[str], Path | None], ready: Path | None) -> str | None:
    """An output that may not be written: told in a line, and left as it is."""
    shutil.rmtree(at, ignore_errors=True)
    (at / "below").mkdir(parents=True)
    if source := ready or given[1]:
        shutil.copytree(source, at / "below" / "out", symlinks=True)
    with mounted(at / "below", "--bind", str(at / "below")):
        _mount("-o", "remount,bind,ro", str(at / "below"))
        out = at / "below" / "out"
        before = contents(out) if out.exists() else {}
        ended = run([item.replace("{out}", str(out)) for item in given[0]])
        after = contents(out) if out.exists() else {}
    if wrong := complaint(ended):
        return wrong
    if ended.code == 0 and ready is None:
        return "it ended well"
    if ended.code and "ead-only" not in ended.stderr:
        return f"it does not say why: {ended.stderr!r}"
    return _differing(before, after)


def _twice(
    at: Path, given: tuple[list[str], Path | None], expected: dict[str, bytes], late: float
) -> str | None:
    """A second command while one is at work: refused by the name of the first, which ends well."""
    shutil.rmtree(at, ignore_errors=True)
    if given[1] is not None:
        shutil.copytree(given[1], at)
    arguments = [item.replace("{out}", str(at)) for item in given[0]]
    with tempfile.NamedTemporaryFile() as log:
        first = start(arguments, Path(log.name))
        until = time.monotonic() + 30
        while not (at / "run.lock").exists() and time.monotonic() < until:
            time.sleep(0.002)
        time.sleep(late)
        second = run(arguments)
        code = os.waitstatus_to_exitcode(os.waitpid(first, 0)[1])
        said = Path(log.name).read_text()
    if code:
        return f"the first ended with {code}: {said[-400:]}"
    if wrong := complaint(second):
        return wrong
    if second.code != 1 or f"process {first}" not in second.stderr:
        return f"the second ended with {second.code}: {second.stderr[-400:]}"
    return _differing(expected, contents(at))


def _inputs(folder: Path, commands: dict[str, tuple[list[str], Path | None]]) -> dict[str, Any]:
    """Inputs that may not be written are read all the same."""
    row: dict[str, Any] = {"what": "inputs that may not be written", "tried": 0, "survived": 0}
    row["notes"] = []
    for name in ("curate", "tokenize", "train", "train-tokenizer", "sample"):
        source = {"tokenize": "curate", "train": "tokenize", "sample": "train"}.get(name, "in")
        if not (folder / source).exists():
            continue
        with mounted(folder / source, "--bind", str(folder / source)):
            _mount("-o", "remount,bind,ro", str(folder / source))
            out = folder / "from-kept" / name
            out.parent.mkdir(exist_ok=True)
            ended = once(commands[name], out)
        wrong = complaint(ended) or (ended.stderr[-400:] if ended.code else None)
        if not wrong and (folder / name).exists():
            wrong = _differing(contents(folder / name), contents(out))
        _note(row, name, wrong)
    return row
