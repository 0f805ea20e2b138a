"""The command line itself: start-up, help, one-line errors, exit codes."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from unimodal.cli import console
from unimodal.cli.app import main
from unimodal.pipeline.errors import UsageError

HEAVY = ["torch", "numpy", "pydantic", "webdataset", "pyarrow", "ray", "av", "cv2", "PIL"]


def run(*arguments: str | Path, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run `unimodal ...` as a user would."""
    command = [sys.executable, "-m", "unimodal.cli", *map(str, arguments)]
    return subprocess.run(command, input=stdin or "", capture_output=True, text=True)


def test_help_imports_nothing_heavy() -> None:
    code = f"import sys, unimodal.cli.app; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_version_is_that_of_the_package() -> None:
    assert run("--version").stdout == f"unimodal {metadata.version('unimodal')}\n"


def test_help_names_every_command() -> None:
    text = run("--help").stdout
    for name in ("curate", "tokenize", "train", "sample", "train-tokenizer", "demo"):
        assert name in text


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["curate", "no/such/folder"], 2, "no/such/folder"),
        (["curate", "--preset", "bset", "."], 2, "no preset bset: there are best, emu3"),
        (["curate", ".", "--set", "flow.fsp=3"], 2, "did you mean flow.fps?"),
        (["tokenize", "no-run"], None, "no-run"),
        (["train", "no-shards"], None, "no-shards"),
        (["train", ".", "--recipe", "tinny"], 2, "did you mean tiny?"),
        (["sample", "no-checkpoint", "a kite"], None, "no-checkpoint"),
        (["sample", "x", "a kite", "--size", "12"], 2, "write height x width"),
        (["sample", "x"], 2, "give prompts to draw, or --describe FILE"),
        (["sample", "x", "--describe", "no.png"], 1, "no.png"),
        (["sample", "x", "--describe", "no.png", "-n", "2"], 2, "--describe takes no"),
        (["sample", "x", "a kite", "--device", "nonsense"], 2, "device nonsense cannot be used"),
        (["train-tokenizer", "docs", "--set", "network.ch=20"], 2, "multiples of 32"),
        (["train-tokenizer", "docs", "--set", "crop=60"], 2, "crop"),
        (["train-tokenizer", "docs", "--steps", "0"], 2, "steps"),
        (["train-tokenizer", "docs", "--init", "nowhere"], 2, "nowhere"),
    ],
)
def test_mistakes_are_one_line_that_names_the_thing(
    arguments: list[str],
    code: int | None,
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["unimodal", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    printed = capsys.readouterr()
    assert ended.value.code in ((code,) if code is not None else (1, 2))
    assert says in printed.err
    assert len(printed.err.strip().splitlines()) == 1
    assert printed.out == ""


def test_a_mistake_ends_the_process_with_its_code_and_no_traceback() -> None:
    done = run("curate", "no/such/folder")
    assert done.returncode == 2
    assert done.stderr.startswith("unimodal: ")
    assert "Traceback" not in done.stderr


def test_an_empty_pipe_is_one_line() -> None:
    done = run("tokenize", "-", stdin="")
    assert done.returncode == 1
    assert done.stderr.strip() == "unimodal: the command before produced nothing"


def test_an_empty_folder_says_so(tmp_path: Path) -> None:
    done = run("curate", tmp_path, "-o", tmp_path / "run")
    assert done.returncode == 2
    assert str(tmp_path) in done.stderr
    assert "Traceback" not in done.stderr


def test_ctrl_c_says_what_is_kept() -> None:
    code = (
        "import os, signal; from unimodal.cli import app\n"
        "app.app = lambda: os.kill(os.getpid(), signal.SIGINT)\n"
        "app.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.startswith("unimodal: interrupted; what is finished is kept")


def test_a_title_longer_than_its_table_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    console.table("clips in " + "a_long_folder/" * 12, [("kept", 5)], quiet=False)
    lines = [line.rstrip() for line in capsys.readouterr().err.splitlines()]
    assert lines == ["clips in " + "a_long_folder/" * 12, "kept  5"]


def test_a_title_with_control_characters_is_harmless(capsys: pytest.CaptureFixture[str]) -> None:
    console.table("clips in \x1b]0;title\x07\x1b[2J.png", [("kept", 5)], quiet=False)
    told = capsys.readouterr()
    assert "\x1b" not in told.out + told.err and "\\x1b[2J.png" in told.out + told.err


def test_captions_may_lie_in_a_bucket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given: list[object] = []

    def curate(*_: object, **named: object) -> None:
        given.append(named["captions"])
        raise UsageError("enough")

    monkeypatch.setattr("unimodal.pipeline.run.curate", curate)
    line = ["curate", str(tmp_path), "-o", str(tmp_path / "run"), "--captions", "s3://b/c.csv"]
    monkeypatch.setattr(sys, "argv", ["unimodal", *line])
    with pytest.raises(SystemExit):
        main()
    assert given == ["s3://b/c.csv"]


def test_what_would_steer_a_terminal_is_spelled_out_and_long_values_are_cut() -> None:
    done = run("curate", ".", "--set", "\x1b]0;evil\x07=1", "--set", "flow.fps=" + "[" * 50_000)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "\x1b" not in done.stderr and "\\x1b]0;evil\\x07" in done.stderr
    assert len(done.stderr) < 5000 and "flow.fps" in done.stderr


@pytest.mark.parametrize(
    "text",
    [
        "seed = " + "[" * 100_000,
        "seed = " + "9" * 100_000,
        "".join(f"a{i}=1\n" for i in range(999)),
    ],
    ids=["deep", "long", "many"],
)
def test_a_recipe_that_is_a_bomb_is_one_line(tmp_path: Path, text: str) -> None:
    recipe = tmp_path / "bomb.toml"
    recipe.write_text(text)
    done = run("train", "shards", "--recipe", recipe)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert len(done.stderr) < 50_000
