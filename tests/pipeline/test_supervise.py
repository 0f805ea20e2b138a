"""Workers that die or hang cost the file that did it, and nothing else."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from unimodal.pipeline.errors import UnimodalError
from unimodal.pipeline.inputs import list_sources
from unimodal.pipeline.stage import PartFiles
from unimodal.pipeline.supervise import Patience, Supervised
from unimodal.pipeline.tell import Tell
from unimodal.pipeline.watch import WatchSettings
from unimodal.pipeline.worker import Job, Step, do


def _job(folder: Path, *inputs: Path, stage: str = "watch") -> Job:
    sources = [
        {"uri": s.uri, "size": s.size, "mtime_ns": s.mtime_ns, "sha256": s.sha256}
        for s in list_sources(inputs)
    ]
    step = Step(stage, str(folder), WatchSettings().model_dump(mode="json"))
    return Job("p", [step], sources)


@pytest.fixture
def supervised() -> Iterator[Supervised]:
    worker = Supervised(Patience(stall_s=4))
    yield worker
    worker.close()


def _files(folder: Path) -> tuple[list[str], dict[str, str]]:
    files = PartFiles(folder, "p")
    rows = [Path(row["uri"]).name for row in pq.read_table(files.rows).to_pylist()]
    refused = pq.read_table(files.quarantine).to_pylist() if files.quarantine.exists() else []
    return sorted(set(rows)), {Path(r["uri"]).name: r["reason"] for r in refused}


def test_a_worker_that_dies_once_changes_nothing(
    tmp_path: Path, supervised: Supervised, videos: Path, photos: Path
) -> None:
    victim = videos / "bigbuckbunny.mp4"
    inputs = (victim, photos / "coins.png")
    kills: list[int] = []

    def kill_once(stage: str, uri: str) -> None:
        if uri == str(victim) and not kills:
            kills.append(supervised.pid or 0)
            os.kill(kills[0], signal.SIGKILL)

    supervised.do(_job(tmp_path / "a", *inputs), Tell(begin=kill_once))
    assert kills and supervised.pid not in kills
    do(_job(tmp_path / "b", *inputs), Tell())
    for name in ("p.parquet", "p.frames.tar"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_file_that_kills_every_worker_is_quarantined(
    tmp_path: Path, supervised: Supervised, videos: Path, photos: Path
) -> None:
    victim = videos / "bigbuckbunny.mp4"

    def kill(uri: str) -> None:
        if uri == str(victim):
            os.kill(supervised.pid or 0, signal.SIGSEGV)

    # Poisoned sources are announced like any other, so the last worker is spared by hand.
    calls: list[str] = []

    def kill_twice(stage: str, uri: str) -> None:
        calls.append(uri)
        if calls.count(str(victim)) <= 2:
            kill(uri)

    supervised.do(_job(tmp_path, victim, photos / "coins.png"), Tell(begin=kill_twice))
    rows, refused = _files(tmp_path)
    assert rows == ["coins.png"]
    assert refused == {"bigbuckbunny.mp4": "the worker that read it died (SIGSEGV)"}


def test_a_file_that_hangs_its_worker_is_quarantined(
    tmp_path: Path, supervised: Supervised, videos: Path, photos: Path
) -> None:
    victim = videos / "bigbuckbunny.mp4"
    frozen: list[int] = []

    def freeze(stage: str, uri: str) -> None:
        if uri == str(victim) and not frozen:
            frozen.append(supervised.pid or 0)
            os.kill(frozen[0], signal.SIGSTOP)

    supervised.do(_job(tmp_path, victim, photos / "coins.png"), Tell(begin=freeze))
    rows, refused = _files(tmp_path)
    assert rows == ["coins.png"] and refused == {"bigbuckbunny.mp4": "no progress for 4 s"}
    with pytest.raises(ProcessLookupError):
        os.kill(frozen[0], 0)


def test_a_job_that_cannot_be_done_says_so(tmp_path: Path, supervised: Supervised) -> None:
    with pytest.raises(UnimodalError, match="no stage is called dream"):
        supervised.do(_job(tmp_path, Path(__file__), stage="dream"), Tell())


def test_a_worker_that_cannot_start_is_an_error_and_no_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, emoji: list[Path]
) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")
    worker = Supervised(Patience())
    with pytest.raises(UnimodalError, match="outside of any source"):
        worker.do(_job(tmp_path, emoji[0]), Tell())


def test_a_worker_whose_master_is_gone_ends(tmp_path: Path, supervised: Supervised) -> None:
    with pytest.raises(UnimodalError):
        supervised.do(_job(tmp_path, Path(__file__), stage="dream"), Tell())
    process = supervised._process
    assert process is not None and process.stdin is not None
    process.stdin.close()
    assert process.wait(timeout=20) == 0
