"""Every stage as a command: on a run directory, and between the pipes of a shell."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory, bikes: Path, emoji: list[Path]) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    (folder / "bikes.mp4").symlink_to(bikes)
    for path in emoji[:3]:
        shutil.copy(path, folder)
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    patch = pytest.MonkeyPatch()
    folder = tmp_path_factory.mktemp("cache")
    patch.setenv("UNIMODAL_CACHE", str(folder))
    yield folder
    patch.undo()


def _sh(line: str, ok: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", line.replace("unimodal", str(BIN / "unimodal"))],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert (done.returncode == 0) == ok, done.stderr
    return done


def _rows(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def _longer_than(seconds: float) -> str:
    """What a user would type; where jq is not installed, Python stands in for it."""
    if shutil.which("jq"):
        return f"jq -c 'select(.duration_s > {seconds})'"
    test = f"(json.loads(l)['duration_s'] or 0) > {seconds}"
    code = f"import json,sys; [sys.stdout.write(l) for l in sys.stdin if {test}]"
    return f'"{sys.executable}" -c "{code}"'


def test_filters_chain_and_jq_fits_between_them(media: Path, cache: Path) -> None:
    line = (
        f"unimodal cut {media} --quiet | unimodal flow | {_longer_than(1.2)} "
        "| unimodal text | unimodal score"
    )
    rows = _rows(_sh(line).stdout)
    assert rows and all(row["duration_s"] > 1.2 for row in rows)
    assert {row["kind"] for row in rows} == {"video"}
    for row in rows:
        assert row["flow_mean"] > 0 and row["text_area_mean"] >= 0 and 0 <= row["quality"] <= 1
        assert Path(row["frames_tar"]).is_relative_to(cache)


def test_rows_of_all_filters_end_in_verdicts(media: Path, cache: Path) -> None:
    line = (
        f"unimodal cut {media} -q | unimodal flow | unimodal dedup | unimodal caption "
        "| unimodal decide --set decide.image_min_area=0"
    )
    rows = _rows(_sh(line).stdout)
    kept = {row["kind"]: row["verdict"] for row in rows if row["verdict"] == "keep"}
    assert kept["image"] == "keep" and all(row["captions"] == [] for row in rows)
    short = [row for row in rows if row["kind"] == "video" and row["duration_s"] < 1.9]
    assert short and all("cut:duration_s" in " ".join(row["reasons"]) for row in short)


def test_stages_bring_a_run_directory_up_to_date(tmp_path: Path, media: Path) -> None:
    run = tmp_path / "run"
    bare = """--set 'skip=["text","quality","dedup"]' --set decide.image_min_area=0"""
    _sh(f"unimodal curate {media} -o {run} -q {bare}")
    before = json.loads((run / "run.json").read_text())
    made = json.loads(_sh(f"unimodal score {run} --json -q").stdout)
    after = json.loads((run / "run.json").read_text())
    assert made["path"] == str(run.absolute())
    assert "quality" in after["stages"] and "quality" not in before["stages"]
    assert after["stages"]["watch"] == before["stages"]["watch"]
    assert "text" not in after["stages"]  # what was not asked for stays out
    printed = _sh(f"echo {run} | unimodal decide - -q --set decide.image_min_area=90000").stdout
    assert printed.strip() == str(run.absolute())
    assert json.loads((run / "run.json").read_text())["totals"]["kept"] < before["totals"]["kept"]


def test_what_if_says_what_would_change_and_changes_nothing(tmp_path: Path, media: Path) -> None:
    run = tmp_path / "run"
    skip = """--set 'skip=["text","quality"]'"""
    _sh(f"unimodal curate {media} -o {run} -q --set decide.image_min_area=0 {skip}")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    shown = _sh(f"unimodal decide {run} --what-if --set decide.image_min_area=90000")
    assert "now has to hold source: width" in shown.stdout and "3 -> 0" in shown.stdout
    found = json.loads(
        _sh(f"unimodal decide {run} --what-if --json --set decide.image_min_area=90000").stdout
    )
    assert (found["dropped"], found["kept"]) == (3, 0)
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_what_a_second_call_undoes_and_captions_that_fit_nothing_are_told(
    tmp_path: Path, emoji: list[Path]
) -> None:
    media, run = tmp_path / "media", tmp_path / "run"
    media.mkdir()
    first, second = (Path(shutil.copy(path, media)) for path in emoji[:2])
    curate = f"""unimodal curate -o {run} --engine inline --set 'skip=["text","quality"]'"""
    told = _sh(f"{curate} {media}").stderr
    assert "by decide.image_min_area  2  width * height < 262144" in " ".join(told.split(" "))
    _sh(f"unimodal decide {run} -q --set decide.image_min_area=0")
    table = tmp_path / "captions.csv"
    table.write_text(f"path,caption\n{first},a face\n{media / 'typo.png'},nothing\n")
    told = _sh(f"{curate} {first} --captions {table}").stderr
    assert f"{second} of before is not among the inputs" in told
    assert f"of the captions, {media / 'typo.png'} is not among the inputs" in told
    assert "decide.image_min_area=262144 (was 0)" in told
    again = _sh(f"{curate} {first}").stderr
    assert "other thresholds" not in again and "of before" not in again


def test_mistakes_are_one_line(tmp_path: Path, media: Path) -> None:
    for line, told in (
        ("unimodal flow < /dev/null", ""),
        ("echo oops | unimodal flow", "standard input, line 1: not JSON"),
        (f"unimodal text {tmp_path}", "not a finished run directory"),
        ("unimodal decide --what-if < /dev/null", "--what-if compares with a run directory"),
        (f"unimodal cut {media} --set cut.adaptve=3", "did you mean cut.adaptive?"),
        ("true | unimodal text -", "the command before produced nothing"),
    ):
        done = _sh(line, ok=not told)
        assert told in done.stderr and len(done.stderr.splitlines()) <= 1, done.stderr
