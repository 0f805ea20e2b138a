"""`unimodal inspect` as a command: paths and JSON on stdout, words on stderr, exit codes."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from unimodal.cli.app import main

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Function that runs the command in this process: exit code, stdout, stderr."""

    def run(*arguments: str | Path, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["unimodal", "inspect", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out, printed.err

    return run


def test_the_page_is_printed_and_the_figures_are_told(
    call: Call, tmp_path: Path, emoji: list[Path]
) -> None:
    code, out, err = call(emoji[0], "-o", tmp_path / "o", "--area", 1024)
    assert (code, out) == (0, f"{tmp_path / 'o' / 'index.html'}\n")
    assert "psnr" in err and emoji[0].name in err
    again = call("-", "-o", tmp_path / "o", "--area", 1024, "--quiet", stdin=f"{emoji[0]}\n")
    assert again == (0, out, "")


def test_json_has_a_record_a_thing(call: Call, tmp_path: Path, emoji: list[Path]) -> None:
    arguments = (emoji[0], "no.png", "-o", tmp_path / "o", "--area", 1024, "--json")
    code, out, err = call(*arguments)
    found = json.loads(out)
    assert code == 0 and Path(found["path"]).is_file()
    assert found["things"][0]["grid"] == [1, 4, 4]
    assert found["things"][1] == {"thing": "no.png", "error": "no.png: no such file"}
    assert "no.png" in err


def test_shards_are_counted_filtered_and_merged(call: Call, tmp_path: Path) -> None:
    from unimodal.tokenize.run import TokenizeSettings, tokenize

    texts = [json.dumps({"text": f"text {n}", "score": n}) for n in range(6)]
    for name, some in (("a", texts[:4]), ("b", texts[3:])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(some))
        tokenize(tmp_path / f"{name}.jsonl", tmp_path / name, TokenizeSettings(), engine="inline")
    both = (tmp_path / "a", tmp_path / "b")
    code, out, err = call(*both, "--where", "score >= 2", "-o", tmp_path / "c", "--json")
    assert code == 0 and json.loads(out)["samples"] == 5
    assert "copied: 5 of 5 samples" in err
    code, out, err = call(tmp_path / "c", "-o", tmp_path / "page")
    assert (code, out) == (0, f"{tmp_path / 'page' / 'index.html'}\n")
    assert "text document train" in err and "5 samples, 40 tokens" in err and "p50 8" in err
    code, out, err = call(*both, "--where", "scorr >= 2", "-o", tmp_path / "d")
    assert (code, out) == (2, "") and "nearest column is score" in err
    code, _, err = call(*both, "--where", "true")
    assert code == 2 and "-o NEW" in err and not (tmp_path / "d").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["no.png"], 1, "no.png: no such file"),
        (["pyproject.toml"], 1, "pyproject.toml: not a video"),
        (["docs"], 2, "no shards at docs"),
        (["no.png", "--area", "3"], 2, "area"),
        (["no.png", "--tokenizer", "nowhere"], 2, "nowhere: no vision tokenizer"),
        (["no.png", "--device", "nonsense"], 2, "device nonsense cannot be used"),
        (["no.png", "-o", "docs"], 1, "choose another -o"),
        (["-"], 1, "the command before produced nothing"),
    ],
)
def test_mistakes_are_one_line(call: Call, arguments: list[str], code: int, says: str) -> None:
    ended, out, err = call(*arguments)
    assert (ended, out) == (code, "")
    assert says in err and len(err.strip().splitlines()) == 1
