"""Captions by real engines: vLLM on the CPU, with a small vision-language model of random weights.

What such a model says means nothing, but it hangs on the pictures: whether answers find their
clips, what becomes of those that cannot be believed, and what engines refuse can all be seen.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.looking import make
from unimodal.pipeline.captioning.store import Store
from unimodal.pipeline.presets import CurateSettings
from unimodal.pipeline.report import write_report
from unimodal.pipeline.run import Run, curate
from unimodal.pipeline.settings import build
from unimodal.pipeline.why import text, why

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]  # a machine at work may be slow

BARE = (
    *('skip=["text", "quality", "embed", "nsfw", "dedup", "match"]', "decide.image_min_area=0"),
    *("decide.video_min_s=1.5", "decide.video_min_side=none", "decide.flow_max=none"),
)
PROMPT = """version = 1
[en]
system = "You describe pictures."
image = "Look at the picture."
clip = "Look at the frames."
after_image = "Describe it."
after_clip = "The {count} frames show {seconds} seconds."
json = "Answer with one JSON object."
text = "Answer with nothing but this:"
[en.styles.short]
ask = "one sentence"
[en.styles.camera]
ask = "the camera"
only = "clip"
"""
LONGEST = 500
"""Tokens of the engines' context. The clip of eight frames, of about 60 each, does not fit."""
CACHE = 64 << 20
"""Bytes of an engine's KV cache."""
ALIKE = ("uid", "piece", "captions", "tries", "prompt_tokens", "output_tokens", "status")
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("models") / "looking")


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory, bikes: Path, emoji: list[Path]) -> Path:
    """A run of twelve pictures and three clips without captions, to be copied."""
    folder = tmp_path_factory.mktemp("media")
    for path in (bikes, *emoji[:12]):
        shutil.copy(path, folder)
    settings = build(CurateSettings, sets=BARE)
    return curate([folder], folder.parent / "run", settings, engine="inline").path


@pytest.fixture(scope="module")
def asking(tmp_path_factory: pytest.TempPathFactory, model: Path) -> list[str]:
    """How `unimodal caption` is called, but for whom it asks."""
    prompt = tmp_path_factory.mktemp("prompt") / "plain.toml"
    prompt.write_text(PROMPT)
    sets = ("in_flight=4", "max_tokens=80", "tries=1", "temperature=0", f"max_model_len={LONGEST}")
    found = [f"--model={model}", f"--prompt={prompt}", "--set=patience.failures=1", "--json", "-q"]
    return found + [f"--set=caption.{one}" for one in sets]


@pytest.fixture(scope="module")
def offline(
    tmp_path_factory: pytest.TempPathFactory, bare: Path, model: Path, asking: list[str]
) -> dict[str, Any]:
    """What an engine in the process did; see `lent_engine.py`."""
    folder = tmp_path_factory.mktemp("offline")
    runs = {form: Path(shutil.copytree(bare, folder / form)) for form in ("json", "text")}
    blind, full = text_only(folder / "llama", model), shutil.copytree(model, folder / "full")
    vllm = ["--source=vllm", *asking]
    spare = str(shutil.copytree(bare, folder / "spare"))

    def engine(cache: int = CACHE) -> str:
        more = f"kv_cache_memory_bytes = {cache}"
        return f'--set=caption.engine={{enforce_eager = true, dtype = "float32", {more}}}'

    def other(name: Path | str, cache: int = CACHE) -> list[str]:
        return ["caption", spare, *vllm, f"--model={name}", engine(cache)]

    plan = {
        "commands": [
            ["caption", str(path), *vllm, engine(), f"--set=caption.format={form}"]
            for form, path in runs.items()
        ],
        "alone": [str(path) for path in runs.values()],
        "refused": [
            other(blind),
            other(folder / "nothing"),
            other("nobody/nothing"),
            other(full, cache=200_000),
            other(full, cache=10**15),
        ],
    }
    (folder / "plan.json").write_text(json.dumps(plan))
    driver = Path(__file__).with_name("lent_engine.py")
    with (folder / "log").open("w") as log:
        subprocess.run(
            [sys.executable, str(driver), str(folder / "plan.json")],
            env={**os.environ, **ENVIRONMENT},
            stdout=log,
            stderr=subprocess.STDOUT,
            timeout=1500,
            check=False,
        )
    done = folder / "done.json"
    assert done.exists(), (folder / "log").read_text()[-3000:]
    return {**json.loads(done.read_text()), "runs": runs}


def text_only(folder: Path, model: Path) -> Path:
    """A language model that reads no pictures."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(model)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=1024,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _rows(run: Path) -> list[dict[str, Any]]:
    (folder,) = run.glob("describe-*")
    return Store(folder).rows().to_pylist()


def _alike(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = [{name: row[name] for name in ALIKE} for row in rows]
    return sorted(found, key=lambda row: (row["uid"], row["piece"]))


def _kept(run: Path) -> list[dict[str, Any]]:
    return [clip for clip in Run.open(run).clips.to_pylist() if clip["verdict"] == "keep"]


@pytest.mark.parametrize("form", ["json", "text"])
def test_answers_of_a_busy_engine_are_those_that_it_gives_alone(
    offline: dict[str, Any], form: str
) -> None:
    run = offline["runs"][form]
    rows = _rows(run)
    assert _alike(rows) == _alike(offline["alone"][str(run)])
    details = {row["uid"]: row["detail"] for row in offline["alone"][str(run)]}
    assert {row["uid"]: row["detail"] for row in rows} == details
    assert sorted(details) == sorted(clip["uid"] for clip in _kept(run))
    # Were it all the same, no mistaken pairing would be seen.
    said = [row["detail"] or row["captions"][0]["text"] for row in rows]
    assert len(set(said)) > 0.8 * len(said)


@pytest.mark.parametrize("form", ["json", "text"])
def test_a_text_is_there_if_and_only_if_it_is_believed(offline: dict[str, Any], form: str) -> None:
    command = offline["commands"][["json", "text"].index(form)]
    run = offline["runs"][form]
    rows = _rows(run)
    assert command["code"] == 0 and json.loads(command["stdout"])["path"] == str(run)
    for row in rows:
        assert row["status"] != "ok" or row["detail"] is None
        for caption in row["captions"]:
            assert (caption["status"] == "ok") == bool(caption["text"])
    statuses = {row["status"] for row in rows}
    assert "broken JSON" not in statuses  # the engine holds answers to the schema
    assert "ok" in statuses and len(statuses) > 2, statuses
    told = Run.open(run).info["captions"]
    assert told["requests"] == len(rows) and sum(told["failed"].values()) > 1
    assert json.loads(command["stdout"])["captions"] == told
    assert told["last"]["output_tokens_per_s"] > 0


def test_what_is_too_long_for_the_context_fails_by_itself_and_says_so(
    offline: dict[str, Any],
) -> None:
    failed = [row for row in _rows(offline["runs"]["json"]) if row["status"] == "request refused"]
    (row,) = failed
    assert f"maximum model length of {LONGEST}" in row["detail"] and row["tries"] == 1
    run = Run.open(offline["runs"]["json"])
    explained = text(why(run, row["uid"]))
    assert "request refused" in explained and "maximum model length" in explained
    page = write_report(run).read_text()
    assert "request refused" in page and "truncated" in page
    reasons = [one["reason"] for one in run.quarantine.to_pylist() if row["uid"] in one["reason"]]
    assert len(reasons) == 1 and "request refused" in reasons[0]


def test_questions_that_a_model_cannot_take_fail_and_the_next_is_answered(
    offline: dict[str, Any],
) -> None:
    odd = offline["odd"]
    assert "context length" in odd["long"]["detail"]
    assert "12 image" in odd["many"]["detail"]
    assert "aspect ratio" in odd["thin"]["detail"]
    assert odd["broken"]["status"] == "no frames" and "decoded" in odd["broken"]["detail"]
    assert odd["large"]["prompt_tokens"] > odd["good"]["prompt_tokens"] > 0
    assert {name for name, one in odd.items() if "status" in one} == {
        *("long", "many", "thin", "broken")
    }


def test_a_model_or_a_machine_that_cannot_is_told_in_one_line(offline: dict[str, Any]) -> None:
    told = [one["stderr"].strip() for one in offline["refused"]]
    assert [one["code"] for one in offline["refused"]] == [2, 1, 1, 1, 1], told
    blind, nothing, nobody, full, overfull = told
    assert "must be a vision-language model" in blind
    assert "no such model" in nothing and "no such model" in nobody
    assert "KV cache" in full and "caption.max_model_len (now 500)" in full
    assert "no room for the KV cache" in overfull and "caption.gpu_memory_utilization" in overfull
    assert all(one.count("\n") == 0 for one in told), told
    assert not any(one["stdout"] for one in offline["refused"])


def test_an_engine_that_is_killed_ends_the_run_in_one_line_and_what_is_done_is_kept(
    bare: Path, model: Path, asking: list[str], tmp_path: Path
) -> None:
    """As users run it: the engine and its worker are processes of their own."""
    run = Path(shutil.copytree(bare, tmp_path / "run"))
    command = [sys.executable, "-m", "unimodal.cli", "caption", str(run), "--source=vllm", *asking]
    command += ["--set=caption.in_flight=1", "--set=caption.engine={enforce_eager = true}"]
    environment = {**os.environ, **ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    environment |= {"VLLM_CPU_KVCACHE_SPACE": "1"}
    log = tmp_path / "log"
    with log.open("w") as err:
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=err, text=True
        )
        while not list(run.glob("describe-*/journal.jsonl")) and process.poll() is None:
            time.sleep(0.01)
        family = _below(process.pid)
        workers = [pid for pid, name in family.items() if name == "VLLM::Worker"]
        os.kill(workers[0], signal.SIGKILL)
        out, _ = process.communicate(timeout=200)
    told = log.read_text().strip().splitlines()
    assert process.returncode == 1 and not out
    assert "the vLLM engine died" in told[-1] and "lower caption.in_flight (now 1)" in told[-1]
    assert told[-1].endswith("run the same command again")
    journal = next(run.glob("describe-*/journal.jsonl"))
    assert 0 < len(journal.read_bytes().splitlines()) < len(_kept(run))
    for _ in range(100):  # nothing stays behind
        if not [pid for pid in family if Path(f"/proc/{pid}").exists()]:
            break
        time.sleep(0.1)
    else:
        raise AssertionError(f"still there: {family}")


def _below(pid: int) -> dict[int, str]:
    """Names of all processes that one has started, and that these have."""
    found = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            rest = file.read_text().rpartition(")")[2].split()
            if int(rest[1]) == pid:
                child = int(file.parent.name)
                found |= {child: file.with_name("comm").read_text().strip(), **_below(child)}
    return found


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # What `vllm serve` starts; vllm-cpu 0.32 has forgotten its own name there.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--host=127.0.0.1", f"--port={port}", f"--max-model-len={LONGEST}"]
    command += ["--enforce-eager", "--dtype=float32", "--max-num-seqs=4"]
    command += [f"--kv-cache-memory-bytes={CACHE}"]
    command += ['--limit-mm-per-prompt={"image": 12}']
    guided = {"backend": "xgrammar", "disable_any_whitespace": True}
    command += [f"--structured-outputs-config={json.dumps(guided)}"]
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as file:
        environment = {**os.environ, **ENVIRONMENT}
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
        url = f"http://127.0.0.1:{port}"
        try:
            for _ in range(2400):
                try:
                    with urllib.request.urlopen(f"{url}/health"):
                        break
                except OSError:
                    assert process.poll() is None, log.read_text()[-3000:]
                    time.sleep(0.5)
            yield f"{url}/v1"
        finally:
            process.terminate()
            process.wait(60)


def test_a_server_gives_the_answers_that_the_engine_gives(
    offline: dict[str, Any], server: str, bare: Path, tmp_path: Path, asking: list[str]
) -> None:
    run = Path(shutil.copytree(bare, tmp_path / "run"))
    command = [sys.executable, "-m", "unimodal.cli", "caption", str(run), "--source=endpoint"]
    command += [f"--url={server}", *asking]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    rows = _rows(run)
    assert _alike(rows) == _alike(_rows(offline["runs"]["json"]))
    (refused,) = (row for row in rows if row["status"] == "request refused")
    assert "HTTP 400" in refused["detail"] and "maximum context length" in refused["detail"]
    assert {row["repeats"] for row in rows} == {0}
