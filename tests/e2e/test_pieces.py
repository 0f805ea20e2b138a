"""Whole suites once more, with every table cut into pieces, as those of millions of clips are."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent.parent
SUITES = (
    *("tokenize/test_gather.py", "tokenize/test_look.py", "tokenize/test_plan.py"),
    *("tokenize/test_refresh.py", "tokenize/test_run.py", "tokenize/test_shards.py"),
    *("pipeline/scorers", "pipeline/test_captioning.py", "pipeline/test_dedup.py"),
    *("pipeline/test_layouts.py", "pipeline/test_report.py", "pipeline/test_run.py"),
    *("pipeline/test_why.py", "cli/test_caption.py"),
)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_tables_in_pieces_give_what_whole_ones_do() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "pieces", "-p", "no:cacheprovider"]
    command += ["-p", "no:xdist", "-m", "not slow", *(str(TESTS / suite) for suite in SUITES)]
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command,
        cwd=TESTS.parent,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-4000:]
