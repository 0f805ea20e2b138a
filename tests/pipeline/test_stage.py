"""A stage's folder follows from what its results depend on."""

from __future__ import annotations

from pathlib import Path

import pytest

from unimodal.pipeline.clips import WATCH, table
from unimodal.pipeline.files import sweep
from unimodal.pipeline.presets import CurateSettings
from unimodal.pipeline.settings import build
from unimodal.pipeline.stage import PartFiles, Stage


def test_the_folder_covers_version_settings_and_inputs() -> None:
    base = Stage("watch", 1, "abc", ("x", "y"))
    assert base.folder == Stage("watch", 1, "abc", ("y", "x")).folder
    others = [
        Stage("watch", 2, "abc", ("x", "y")),
        Stage("watch", 1, "abd", ("x", "y")),
        Stage("watch", 1, "abc", ("x",)),
    ]
    assert len({base.folder, *(stage.folder for stage in others)}) == 4
    assert base.folder.startswith("watch-")


def test_thresholds_and_patience_repeat_no_decoding() -> None:
    def digest(*sets: str) -> str:
        return build(CurateSettings, sets=sets).watch().digest()

    assert digest("decide.flow_min=0.5", "patience.stall_s=1", "parts.max_sources=1") == digest()
    assert digest("cut.fade=13") != digest()


def test_rows_are_committed_last(tmp_path: Path) -> None:
    files = PartFiles(tmp_path / "watch-1", "p")

    def frames(path: Path) -> None:
        assert not files.done() and files.quarantine.exists()
        path.write_bytes(b"tar")

    refused = [{"uri": "/x", "stage": "watch", "reason": "r", "part": "p"}]
    files.commit(table([], WATCH), refused, frames)
    assert files.done() and files.frames.read_bytes() == b"tar"
    files.rows.unlink()

    def broken(path: Path) -> None:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        files.commit(table([], WATCH), [], broken)
    assert not files.done()
    leftover = tmp_path / "watch-1" / ".p.frames.tar.7.tmp"
    leftover.write_bytes(b"half")
    theirs = tmp_path / "watch-1" / ".notes.tmp"
    theirs.write_bytes(b"of somebody else")
    sweep(tmp_path)
    assert not leftover.exists() and theirs.exists()
