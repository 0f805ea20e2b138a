"""One writer at a time."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from unimodal.pipeline import lock
from unimodal.pipeline.errors import UnimodalError
from unimodal.pipeline.lock import STALE_S, first_rank_lock, run_lock
from unimodal.pipeline.progress import Progress


class Notes(Progress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, message: str) -> None:
        self.lines.append(message)

    def show(self, values: Mapping[str, Any]) -> None:
        raise AssertionError("not here")


def test_a_second_writer_is_refused_by_name_and_let_in_afterwards(tmp_path: Path) -> None:
    with run_lock(tmp_path, Progress()):
        with (
            pytest.raises(UnimodalError, match=f"process {os.getpid()}"),
            run_lock(tmp_path, Notes()),
        ):
            pass
        assert (tmp_path / "run.lock").exists()
    assert not (tmp_path / "run.lock").exists()
    with run_lock(tmp_path, Progress()):
        pass


def _leave(run: Path, host: str, pid: int, age: float, born: str | None = None) -> None:
    lock = run / "run.lock"
    lock.write_text(json.dumps({"host": host, "pid": pid, "born": born}))
    os.utime(lock, (time.time() - age, time.time() - age))


def test_a_lock_of_the_dead_is_taken_over_with_a_message(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    for host, pid, age in [
        (socket.gethostname(), child.pid, 0.0),
        ("elsewhere", 1, STALE_S + 5),
    ]:
        _leave(tmp_path, host, pid, age)
        notes = Notes()
        with run_lock(tmp_path, notes):
            pass
        assert len(notes.lines) == 1 and "taking over" in notes.lines[0]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="tells when processes began")
def test_a_lock_of_the_dead_whose_number_another_process_has_is_taken_over(tmp_path: Path) -> None:
    _leave(tmp_path, socket.gethostname(), os.getpid(), 0.0, born="1")
    notes = Notes()
    with run_lock(tmp_path, notes):
        pass
    assert len(notes.lines) == 1


def test_a_lock_of_another_machine_that_still_beats_is_respected(tmp_path: Path) -> None:
    _leave(tmp_path, "elsewhere", 1, 5)
    with pytest.raises(UnimodalError, match="elsewhere"), run_lock(tmp_path, Notes()):
        pass


def _enter_together(run: Path, count: int) -> tuple[list[int], list[str]]:
    """How many were inside at each entry, and why others were not let in."""
    inside, most, refused = set[int](), list[int](), list[str]()
    together = threading.Barrier(count)

    def enter(number: int) -> None:
        together.wait()
        try:
            with run_lock(run, Progress()):
                inside.add(number)
                most.append(len(inside))
                time.sleep(0.02)
                inside.remove(number)
        except UnimodalError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=enter, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return most, refused


def test_of_several_that_find_the_same_stale_lock_one_at_a_time_gets_it(tmp_path: Path) -> None:
    for _ in range(20):
        _leave(tmp_path, "elsewhere", 1, STALE_S + 5)
        most, refused = _enter_together(tmp_path, 4)
        assert most and set(most) == {1} and len(most) + len(refused) == 4
        assert not (tmp_path / "run.lock").exists()


def test_a_lock_that_a_full_disk_cut_short_keeps_nobody_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(record: object, file: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("unimodal.pipeline.lock.json.dump", full)
    with pytest.raises(OSError, match="No space"), run_lock(tmp_path / "new", Progress()):
        pass
    monkeypatch.undo()
    with run_lock(tmp_path / "new", Progress()):
        pass


def test_of_the_processes_of_torchrun_the_first_holds_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with first_rank_lock(tmp_path, Progress()):
        with pytest.raises(UnimodalError), first_rank_lock(tmp_path, Progress()):
            pass
        monkeypatch.setenv("RANK", "1")
        with first_rank_lock(tmp_path, Progress()):
            pass
        assert (tmp_path / "run.lock").exists()


def test_a_stale_lock_that_is_released_while_it_is_looked_at_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _leave(tmp_path, "elsewhere", 1, STALE_S + 5)
    stale, looks = lock._stale, []

    def released(path: Path) -> str:
        who = stale(path)
        looks.append(who)
        if len(looks) == 2:
            path.unlink()
        return who

    monkeypatch.setattr(lock, "_stale", released)
    with run_lock(tmp_path, Notes()):
        assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()
    assert len(looks) == 2 and not list(tmp_path.iterdir())


def test_a_directory_that_its_maker_removes_before_it_is_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, create, removed = tmp_path / "run", lock._create, []

    def race(path: Path, token: str) -> None:
        if not removed:
            path.parent.rmdir()
            removed.append(path)
        create(path, token)

    monkeypatch.setattr(lock, "_create", race)
    with run_lock(run, Progress()):
        assert (run / "run.lock").is_file()
    assert removed and not (run / "run.lock").exists()
