"""`unimodal tokenize`: the plan, and options that do not fit together."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from unimodal.cli.app import app
from unimodal.pipeline.errors import UnimodalError, UsageError
from unimodal.pipeline.presets import CurateSettings
from unimodal.pipeline.run import curate
from unimodal.pipeline.settings import build
from unimodal.tokenize.run import driver_of


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, emoji: list[Path]) -> Path:
    out = tmp_path_factory.mktemp("run")
    rules = ["decide.image_min_area=none", 'skip=["text", "quality", "dedup"]', "report=false"]
    curate(emoji[:5], out, build(CurateSettings, sets=rules), engine="inline")
    return out


def test_the_plan_tells_units_engine_and_size_and_makes_nothing(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    command = ["tokenize", str(run), "--area", "4096", "--set", "shard_size=2", "--plan", "--json"]
    app(command, standalone_mode=False)
    told = json.loads(capsys.readouterr().out)
    assert (told["shards"], told["clips"], told["vision_codes"]) == (3, 5, 5 * 64)
    assert told["engine"] == "local" and told["disk_bytes"] > 2 * told["vision_codes"]
    assert not list(tmp_path.iterdir())


def test_the_plan_says_what_is_done_in_the_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\nthree\n")
    texts = [str(tmp_path / "a.txt"), "-o", str(tmp_path / "s"), "--json", "--quiet"]
    texts += ["--engine", "inline", "--set", "text_by=line"]

    def planned(*more: str) -> tuple[int, int, int]:
        app(["tokenize", *texts, *more, "--plan"], standalone_mode=False)
        told = json.loads(capsys.readouterr().out)
        return told["done"], told["shards"], told["rows"]

    assert planned() == (0, 1, 3) and not (tmp_path / "s").exists()
    app(["tokenize", *texts], standalone_mode=False)
    assert json.loads(capsys.readouterr().out)["samples"] == 3
    before = {path: path.read_bytes() for path in (tmp_path / "s").glob("*.*")}
    assert planned() == (1, 1, 3)
    assert planned("--set", "batch=1") == (1, 1, 3)  # less memory, the same codes
    with pytest.raises(UnimodalError, match="text_by was 'line', now 'file'"):
        planned("--set", "text_by=file")
    assert {path: path.read_bytes() for path in (tmp_path / "s").glob("*.*")} == before


def test_captions_are_taken_over_by_the_command(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = [str(run), "-o", str(tmp_path / "s"), "--json", "--quiet"]
    app(["tokenize", *out, "--area", "1024", "--engine", "inline"], standalone_mode=False)
    capsys.readouterr()
    app(["tokenize", *out, "--captions"], standalone_mode=False)
    told = json.loads(capsys.readouterr().out)
    assert (told["samples"], told["changed"], told["unknown"]) == (5, 0, 0)
    with pytest.raises(UsageError, match="--captions takes one run"):
        app(["tokenize", *out, "--captions", "--plan"], standalone_mode=False)


def test_one_certain_gpu_is_for_one_process() -> None:
    with pytest.raises(UsageError, match="--device cuda, and each process gets its own"):
        driver_of("local", None, "cuda:1")
    assert driver_of("auto", None, "cpu") == "local"
    assert driver_of("ray", "ray://head:10001", "cuda") == "ray"


@pytest.mark.slow
def test_the_command_makes_what_the_plan_said(run: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "unimodal.cli", "tokenize", str(run), "-o", "shards", "--json"]
    command += ["--engine", "local", "--workers", "1", "--area", "4096", "--set", "shard_size=2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["vision_codes"] == 5 * 64
    assert "clips/s" in done.stderr and "codes/s" in done.stderr
