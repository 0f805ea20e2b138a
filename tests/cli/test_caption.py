"""`unimodal caption` as people call it: a server, a run directory, and pipes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.pipeline.answering import answering, digest_of, saying
from unimodal.pipeline.presets import CurateSettings
from unimodal.pipeline.run import Run, curate
from unimodal.pipeline.settings import build

UNIMODAL = [sys.executable, "-m", "unimodal.cli"]
BARE = (
    *('skip=["text", "quality", "embed", "nsfw", "dedup", "match"]', "decide.image_min_area=0"),
    *("decide.video_min_s=1.5", "decide.video_min_side=none", "decide.flow_max=none"),
)


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory, bikes: Path, emoji: list[Path]) -> Path:
    """A run without captions, to be copied."""
    folder = tmp_path_factory.mktemp("media")
    for path in (bikes, *emoji[:12]):
        shutil.copy(path, folder)
    settings = build(CurateSettings, sets=BARE)
    return curate([folder], folder.parent / "run", settings, engine="inline").path


@pytest.fixture
def run_dir(tmp_path: Path, bare: Path) -> Path:
    return Path(shutil.copytree(bare, tmp_path / "run"))


def _call(*arguments: str, stdin: str = "", code: int = 0) -> subprocess.CompletedProcess[str]:
    command = [*UNIMODAL, *arguments]
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=200)
    assert done.returncode == code, done.stderr
    return done


def _frames(run: Run, clip: dict[str, Any]) -> list[bytes]:
    import tarfile

    samples = run.samples(clip["part"])[clip["uid"]]
    with tarfile.open(run.frames_tar(clip["part"])) as tar:
        files = [tar.extractfile(s["member"]) for s in samples if s["keyframe"]]
        return [file.read() for file in files if file]


def _right(run: Run) -> int:
    """Kept clips, each of which has its own captions."""
    kept = [clip for clip in run.clips.to_pylist() if clip["verdict"] == "keep"]
    for clip in kept:
        digest = digest_of(_frames(run, clip))
        said = {c["style"]: c["text"] for c in clip["captions"]}
        assert len(said) == (5 if clip["kind"] == "video" else 3)
        assert said == {style: saying(digest, style) for style in said}
    return len(kept)


def test_a_run_is_described_by_one_command_and_explained(run_dir: Path) -> None:
    with answering(lambda digest, before: None if before else "500") as server:
        asked = ["caption", str(run_dir), "--source=endpoint", "--model=a-model"]
        asked += [f"--url={server.url}", "--set=caption.backoff_s=0.01"]
        plan = json.loads(_call(*asked, "--plan", "--json").stdout)
        assert not server.seen and plan["clips"] == plan["requests"] > 12
        assert plan["pictures"] > plan["clips"] and plan["prompt"].startswith("dense 1 (en")
        made = json.loads(_call(*asked, "--json").stdout)
    run = Run.open(run_dir)
    assert made["path"] == str(run_dir) and _right(run) == made["kept"] == plan["clips"]
    assert f"{plan['clips']} of {plan['clips']} kept clips" in (run_dir / "report.html").read_text()
    uid = next(clip["uid"] for clip in run.clips.to_pylist() if clip["captions"])
    told = _call("why", str(run_dir), uid).stdout
    assert "The dense words are" in told and "a-model" in told and "prompt dense 1" in told


def test_a_killed_command_goes_on_with_what_was_not_answered(run_dir: Path) -> None:
    with answering(delay_s=lambda digest: 0.3) as server:
        asked = ["caption", str(run_dir), "--source=endpoint", "--model=m", f"--url={server.url}"]
        asked += ["--set=caption.in_flight=2", "-q"]
        process = subprocess.Popen([*UNIMODAL, *asked], stdout=subprocess.DEVNULL)
        while process.poll() is None and sum(server.seen.values()) < 6:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        (journal,) = run_dir.glob("describe-*/journal.jsonl")
        written = [json.loads(line) for line in journal.read_bytes().splitlines()]
        assert 3 <= len(written) <= 6
        with journal.open("ab") as file:
            file.write(b'{"uid": "torn')
        server.seen.clear()
        server.delay_s = lambda digest: 0.0
        _call(*asked)
        run = Run.open(run_dir)
        kept = _right(run)
        answered = {row["uid"] for row in written}
        clips = [clip for clip in run.clips.to_pylist() if clip["uid"] in answered]
        assert not {digest_of(_frames(run, clip)) for clip in clips} & server.asked
        assert len(server.seen) == kept - len(written)
        server.seen.clear()
        before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*.parquet")}
        _call(*asked)
        assert not server.seen  # written once, and never again
        assert before == {path: path.stat().st_mtime_ns for path in run_dir.rglob("*.parquet")}


def test_rows_are_described_between_pipes(bikes: Path, tmp_path: Path) -> None:
    cache = {**os.environ, "UNIMODAL_CACHE": str(tmp_path / "cache")}
    cut = subprocess.run(
        [*UNIMODAL, "cut", str(bikes), "-q"], capture_output=True, text=True, env=cache, check=True
    )
    rows = [json.loads(line) for line in cut.stdout.splitlines()]
    rows[0]["verdict"] = "drop"
    rows.append(rows[1])  # the same clip twice
    text = "".join(json.dumps(row) + "\n" for row in rows)
    with answering(delay_s=lambda digest: int(digest[:2], 16) / 1000) as server:
        asked = ["--source=endpoint", "--model=m", f"--url={server.url}", "-q"]
        found = [
            json.loads(line) for line in _call("caption", *asked, stdin=text).stdout.splitlines()
        ]
    assert [row["uid"] for row in found] == [row["uid"] for row in rows]
    assert found[0]["captions"] == [] and found[-1]["captions"] == found[1]["captions"]
    shown = {row["uid"] for row in found[1:] if row["samples"]}
    texts = {row["uid"]: row["captions"][0]["text"] for row in found[1:]}
    assert {uid for uid, text in texts.items() if text} == shown and len(shown) > 2
    assert len(set(texts.values()) - {None}) == len(shown) == len(server.seen)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--source=endpoint", "--model=m"], "needs caption.url"),
        (["--source=vllm"], "needs caption.model"),
        (["--source=parrot"], "'sidecar', 'endpoint', 'vllm' or 'checkpoint'"),
        (["--source=endpoint", "--model=m", "--url=nonsense"], "http://host:port/v1"),
        (["--source=endpoint", "--model=m", "--url=http://a/v1", "--prompt=desne"], "dense"),
        (["--source=endpoint", "--model=m", "--url=http://a/v1", "--language=fr"], "en, zh"),
        (["--plan"], "no model is named"),
    ],
)
def test_mistakes_are_told_before_anything_is_asked(
    bare: Path,
    arguments: list[str],
    says: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from unimodal.cli.app import main

    monkeypatch.setattr(sys, "argv", ["unimodal", "caption", str(bare), *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    told = capsys.readouterr().err
    assert stopped.value.code == 2 and says in told and told.count("\n") == 1
