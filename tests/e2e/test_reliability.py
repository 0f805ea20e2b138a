"""The harness of docs/reliability.md stays runnable, and loses nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

HARNESS = Path(__file__).parents[2] / "benchmarks" / "reliability.py"


@pytest.mark.slow
def test_two_kills_of_a_command_and_sixty_broken_files_lose_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.reliability", "--kills", "2", "--broken", "60"]
    command += [
        "--commands",
        "curate,tokenize",
        "--only",
        "kills,broken",
        "-o",
        str(tmp_path / "made.json"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=HARNESS.parents[1])
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "made.json").read_text())["rows"]
    tried = {row["what"]: row["tried"] for row in rows}
    assert tried["kill -9 of curate"] == tried["kill -9 of tokenize"] == 2
    assert tried["broken media: curate"] == 70
    assert all(row["survived"] == row["tried"] for row in rows)


@pytest.mark.slow
def test_hostile_shards_and_tars_lose_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.reliability", "--only", "hostile", "--every", "8"]
    command += ["--hostile", "tars of media,shards", "-o", str(tmp_path / "made.json")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=HARNESS.parents[1])
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "made.json").read_text())["rows"]
    assert len(rows) == 2 and all(row["survived"] == row["tried"] > 2 for row in rows)
