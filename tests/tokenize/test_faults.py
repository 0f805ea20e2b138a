"""Tokenizing on every engine, and what is left when workers, files or the process itself break."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from unimodal.pipeline.presets import CurateSettings
from unimodal.pipeline.progress import Progress
from unimodal.pipeline.run import curate
from unimodal.pipeline.settings import build
from unimodal.pipeline.supervise import Patience
from unimodal.pipeline.tell import Tell
from unimodal.pipeline.worker import do
from unimodal.tokenize import run as module
from unimodal.tokenize.plan import TokenizeSettings
from unimodal.tokenize.run import tokenize
from unimodal.tokenize.vision.movq import MoVQ, MoVQConfig
from unimodal.tokenize.vision.tokenizer import VisionTokenizer

Tree = Callable[[Path], dict[str, bytes]]


@pytest.fixture(scope="module")
def network() -> MoVQ:
    """A small network with a codebook of latents that occur."""
    torch.manual_seed(0)
    shape = MoVQConfig(64, ch=32, ch_mult=(1, 1, 1, 1), num_res_blocks=1, attn_resolutions=())
    made = MoVQ(shape).eval()
    flat = torch.linspace(-1, 1, 16).reshape(16, 1, 1, 1, 1) + torch.randn(16, 1, 3, 16, 16) / 4
    with torch.no_grad():
        latents = made.latents(flat).permute(0, 2, 3, 4, 1).reshape(64, 4)
        made.quantize.embedding.weight.copy_(latents)
    return made


@pytest.fixture(scope="module")
def settings(network: MoVQ, tmp_path_factory: pytest.TempPathFactory) -> TokenizeSettings:
    folder = tmp_path_factory.mktemp("weights")
    VisionTokenizer(network).save(folder)
    small = {"area": 40 * 40, "fps": 4.0, "seconds": 1.0, "batch": 3, "shard_size": 4}
    return TokenizeSettings(tokenizer=str(folder), **small)


def _curated(folder: Path, pictures: list[Path], out: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for path in pictures:
        (folder / path.name).symlink_to(path)
    rules = ["decide.image_min_area=none", "decide.video_min_side=none", "decide.flow_min=none"]
    rules += ["decide.flow_max=none", 'skip=["text", "quality", "dedup"]', "report=false"]
    curate([folder], out, build(CurateSettings, sets=rules), engine="inline")
    return out


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, bikes: Path, emoji: list[Path]) -> Path:
    """A run of sixteen pictures and the clips of a video with cuts."""
    folder = tmp_path_factory.mktemp("media")
    return _curated(folder / "in", [*emoji[:16], bikes], folder / "run")


@pytest.fixture(scope="module")
def expected(
    tmp_path_factory: pytest.TempPathFactory, run: Path, settings: TokenizeSettings, tree: Tree
) -> dict[str, bytes]:
    """What is written in this process."""
    shards = tokenize(run, tmp_path_factory.mktemp("inline") / "out", settings, engine="inline")
    assert len(shards.manifest["shards"]) > 4 and len(np.unique(shards.codes(0))) > 1
    assert {"image", "video"} == set(shards.index["kind"].to_pylist())
    return tree(shards.path)


def test_the_pool_writes_the_same_bytes(
    tmp_path: Path, run: Path, settings: TokenizeSettings, expected: dict[str, bytes], tree: Tree
) -> None:
    shards = tokenize(run, tmp_path / "out", settings, engine="local", workers=2)
    assert tree(tmp_path / "out") == expected
    assert shards.rates["clips/s"] > 0 and shards.rates["codes/s"] > 0


def test_every_batch_is_encoded_on_one_processor(
    tmp_path: Path, run: Path, settings: TokenizeSettings, network: MoVQ
) -> None:
    """Sums of another number of threads differ in the last bits, which may be another code."""
    tokenizer, threads = VisionTokenizer(network), set()
    right = tokenizer.encode

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        threads.add(torch.get_num_threads())
        return right(pixels)

    tokenizer.encode = encode  # type: ignore[method-assign]
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        tokenize(run, tmp_path / "out", settings, tokenizer=tokenizer)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert threads == {1}


def test_a_file_that_killed_a_worker_is_not_touched_again(
    tmp_path: Path, run: Path, settings: TokenizeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the supervisor asks for it: one clip after another, the culprit named and left alone."""
    events: list[tuple[str, ...]] = []
    opened: list[str] = []

    def once(jobs: list[module.Job], *others: object) -> None:
        for number, job in enumerate(jobs):
            job.one_by_one = True
            if number == 1:
                job.poison = {f"tokenize:{job.part}#2": "the worker that read it died (SIGSEGV)"}
            tell = Tell(
                begin=lambda stage, thing: events.append(("begin", thing)),
                done=lambda stage, thing, why: events.append(("done", thing, why)),
            )
            do(job, tell)

    from unimodal.pipeline import fetch

    local = fetch.local
    monkeypatch.setattr(fetch, "local", lambda uri, **k: (opened.append(uri), local(uri, **k))[1])
    monkeypatch.setattr(module, "run_jobs", once)
    shards = tokenize(run, tmp_path / "out", settings, engine="inline")
    (lost,) = pq.read_table(tmp_path / "out" / "quarantine.parquet").to_pylist()
    assert lost["reason"] == "the worker that read it died (SIGSEGV)"
    assert lost["uri"] not in opened and len(set(opened)) > 10
    assert shards.manifest["totals"]["quarantined"] == 1
    # Whatever happens, what was begun last and is not done is the clip in hand.
    hand: set[str] = set()
    for event in events:
        if event[0] == "begin":
            hand.add(event[1])
            assert len(hand) == 1
        else:
            hand.discard(event[1])


HOOK = """if True:
    import os, signal, sys, time
    def watch(event, args):
        if event == "open" and str(args[0]).endswith(("crash.png", "hang.png")):
            if str(args[0]).endswith("crash.png"):
                os.kill(os.getpid(), signal.SIGSEGV)
            time.sleep(1000)
    sys.addaudithook(watch)
"""


@pytest.mark.slow
def test_files_that_crash_or_hang_a_worker_are_quarantined_and_the_rest_is_done(
    tmp_path: Path,
    settings: TokenizeSettings,
    emoji: list[Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "in"
    run = _curated(folder, emoji[:8], tmp_path / "run")
    names = sorted(path.name for path in folder.iterdir())
    table = pq.read_table(run / "clips.parquet")
    uris = [
        u.replace(names[2], "crash.png").replace(names[5], "hang.png")
        for u in table["uri"].to_pylist()
    ]
    for old, new in ((2, "crash.png"), (5, "hang.png")):
        (folder / names[old]).rename(folder / new)
    place = table.column_names.index("uri")
    pq.write_table(table.set_column(place, table.field("uri"), [uris]), run / "clips.parquet")
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(HOOK)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "hook"))
    few = settings.model_copy(update={"patience": Patience(stall_s=20)})
    shards = tokenize(run, tmp_path / "out", few, engine="local", workers=2)
    lost = pq.read_table(tmp_path / "out" / "quarantine.parquet").to_pylist()
    assert {Path(row["uri"]).name: row["reason"] for row in lost} == {
        "crash.png": "the worker that read it died (SIGSEGV)",
        "hang.png": "no progress for 20 s",
    }
    assert len(shards) == 6
    monkeypatch.delenv("PYTHONPATH")
    again = tokenize(run, tmp_path / "out", few, engine="local", retry_quarantined=True)
    assert len(again) == 8 and not again.manifest["totals"]["quarantined"]


def _children() -> list[int]:
    """Worker processes that this process has started."""
    found = []
    for task in Path("/proc/self/task").iterdir():
        for pid in (task / "children").read_text().split():
            if b"unimodal.pipeline.worker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(int(pid))
    return found


@pytest.mark.slow
def test_the_pool_survives_workers_that_are_killed(
    tmp_path: Path, run: Path, settings: TokenizeSettings, expected: dict[str, bytes], tree: Tree
) -> None:
    killed: set[int] = set()

    class Reaper(Progress):
        done = 0.0

        def begin(self, task: str, total: float, unit: str) -> None:
            self.total = total

        def advance(self, task: str, amount: float = 1.0) -> None:
            self.done += amount
            if amount and len(killed) < 2:
                for pid in _children():
                    os.kill(pid, signal.SIGKILL)
                    killed.add(pid)

    reaper = Reaper()
    tokenize(run, tmp_path / "out", settings, engine="local", workers=2, progress=reaper)
    assert killed and tree(tmp_path / "out") == expected
    assert reaper.done == reaper.total  # what is done again is not counted again


CODE = """if True:
    import sys
    from pathlib import Path
    from unimodal.tokenize.plan import TokenizeSettings
    from unimodal.tokenize.run import tokenize
    settings = TokenizeSettings.model_validate_json(sys.argv[3])
    tokenize(Path(sys.argv[1]), Path(sys.argv[2]), settings, engine="local", workers=2)
"""


def _start(run: Path, out: Path, settings: TokenizeSettings) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", CODE, str(run), str(out), settings.model_dump_json()]
    return subprocess.Popen(command, stderr=subprocess.PIPE)


@pytest.mark.slow
def test_kills_at_random_moments_lose_at_most_what_is_in_flight(
    tmp_path: Path, run: Path, settings: TokenizeSettings, expected: dict[str, bytes], tree: Tree
) -> None:
    begun = time.monotonic()
    assert _start(run, tmp_path / "whole", settings).wait() == 0
    took = time.monotonic() - begun
    rng = random.Random(10)
    committed: list[int] = []

    def shards() -> int:
        return len(list((tmp_path / "out").glob("shard-*.parquet")))

    for again in range(6):
        before = shards()
        process = _start(run, tmp_path / "out", settings)
        moment = time.monotonic() + took * rng.uniform(0.2, 0.95)
        # Every other time with a shard just committed, however slow the machine has become.
        while (shards() == before) if again % 2 else (time.monotonic() < moment):
            time.sleep(0.005)
            if process.poll() is not None:
                break
        process.kill()
        process.wait()
        committed.append(shards())
    process = _start(run, tmp_path / "out", settings)
    _, errors = process.communicate()
    assert process.returncode == 0, errors.decode()
    assert committed == sorted(committed) and committed[-1] > 0  # nothing is ever taken back
    assert tree(tmp_path / "out") == expected == tree(tmp_path / "whole")


@pytest.fixture
def ray_apart() -> Iterator[None]:
    """Ray must not be running before, and does not afterwards."""
    import ray

    assert not ray.is_initialized()
    yield
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.usefixtures("ray_apart")
def test_a_ray_of_our_own_writes_the_same_bytes(
    tmp_path: Path, run: Path, settings: TokenizeSettings, expected: dict[str, bytes], tree: Tree
) -> None:
    tokenize(run, tmp_path / "out", settings, engine="ray", workers=2)
    assert tree(tmp_path / "out") == expected
