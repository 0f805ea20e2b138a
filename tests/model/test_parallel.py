"""Every mesh computes what one process does. `parallel_ranks` holds what the processes run."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from unimodal.model.attention import Packed, Share, SharedPacked
from unimodal.model.checkpoint import latest_step, to_toml
from unimodal.model.data import Loader, Samples
from unimodal.model.decoder import Shape
from unimodal.model.parallel import Mesh, MeshSettings, joined
from unimodal.model.train import train
from unimodal.pipeline.errors import UsageError
from unimodal.tokenize.shards import Shards
from unimodal.tokenize.training import read_record

sys.path.append(str(Path(__file__).parent))  # the fork server imports it by its plain name
import parallel_ranks as ranks  # type: ignore[import-not-found]

R, S, C, T = "replicate", "shard", "context", "tensor"
FOUR = [{R: 4}, {R: 2, S: 2}, {S: 2, C: 2}, {S: 2, T: 2}, {R: 2, T: 2}, {C: 4}]
EIGHT = [
    {S: 2, C: 2, T: 2},
    {R: 2, C: 2, T: 2},
    {R: 2, S: 2, T: 2},
    {R: 2, S: 2, C: 2},
    {S: 4, C: 2},
]


def _name(mesh: dict[str, int]) -> str:
    return "-".join(f"{axis}{size}" for axis, size in mesh.items())


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process computes."""
    folder = tmp_path_factory.mktemp("ranks")
    ranks.steps({}, folder, "alone")
    return folder


def _agrees(alone: Path, folder: Path, mesh: dict[str, int]) -> None:
    one, many = (
        json.loads(p.read_text()) for p in (alone / "alone.json", folder / f"{_name(mesh)}.json")
    )
    assert many["losses"][0] == pytest.approx(one["losses"][0], abs=2e-6)
    assert many["norms"][0] == pytest.approx(one["norms"][0], rel=1e-5)
    # Adam divides by the gradient's size, so that of a tiny gradient it magnifies the rounding.
    assert many["losses"] == pytest.approx(one["losses"], abs=1e-4)
    expected = load_file(alone / "alone.grads.safetensors")
    grads = load_file(folder / f"{_name(mesh)}.grads.safetensors")
    assert set(grads) == set(expected)
    for name, grad in grads.items():
        assert (grad - expected[name]).norm() <= 1e-5 * expected[name].norm(), name


@pytest.mark.parametrize(
    ("world", "meshes"),
    [
        (2, [{S: 2}, {C: 2}, {T: 2}]),
        (4, [{C: 2, T: 2}]),
        pytest.param(4, FOUR, marks=pytest.mark.slow),
        pytest.param(8, EIGHT, marks=pytest.mark.slow),
    ],
)
def test_every_mesh_computes_loss_and_gradients_of_one_process(
    alone: Path, tmp_path: Path, world: int, meshes: list[dict[str, int]]
) -> None:
    for mesh in meshes:
        ranks.run(world, ranks.steps, mesh, tmp_path, _name(mesh))
        _agrees(alone, tmp_path, mesh)


@pytest.mark.slow
@pytest.mark.parametrize("also", ["ema=0", "ema=0.9", "lora.rank=2", "optimizer.kind=muon"])
def test_any_mesh_goes_on_with_any_others_checkpoint(
    tmp_path: Path, tiny_shards: Shards, tiny_settings: Callable[..., Any], also: str
) -> None:
    # A rising learning rate is the same whatever the number of steps, so that runs can be cut.
    common = ["optimizer.warmup=50", "accumulate=2", "log.validate_every=3", also]
    other = "mesh.context=2" if "lora" in also else "mesh.tensor=2"

    def settings(steps: int, *more: str) -> Any:
        return tiny_settings(f"steps={steps}", *common, *more)

    def records(out: Path) -> list[dict[str, float]]:
        times, kept = ("tokens_per_s", "elapsed_s"), read_record(out / "metrics.jsonl")
        return [{k: v for k, v in r.items() if k not in times} for r in kept]

    one, *parts = (tmp_path / name for name in ("one", "shard-one", "one-other", "shard-other"))
    train([tiny_shards.path], one, settings(6))
    train([tiny_shards.path], parts[1], settings(3))
    path = tiny_shards.path
    for i in (0, 2):
        ranks.run(2, ranks.trained, parts[i], path, settings(3, "mesh.shard=2"))
    for i in (1, 2):
        ranks.run(2, ranks.trained, parts[i], path, settings(6, other))
    train([tiny_shards.path], parts[0], settings(6))
    for out in parts:
        assert len(records(out)) == len(records(one)) == 8
        for ours, theirs in zip(records(out), records(one), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4)


def test_one_process_of_a_machine_reads_a_large_index_for_all(
    tmp_path: Path, tiny_shards: Shards, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    ranks.run(2, ranks.shared, tmp_path, tiny_shards.path)
    samples = Samples([tiny_shards] * 2)
    alone = [tiny_shards.index.to_pylist(), samples.digests(), int(samples.lengths.sum())]
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == alone
    assert not any((tmp_path / "tmp").glob("unimodal-*"))  # nothing is left


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("lengths", [[24], [1, 22, 1], [5, 7, 12], [12, 12], [3] * 8, [2, 1] * 8])
def test_a_shared_sequence_attends_as_a_whole_one(lengths: list[int], count: int) -> None:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(24, heads, 8, generator=g) for heads in (4, 2, 2))

    def gather(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([share.take(torch.cat([k, v], 1)) for share in shares])

    shares = [Share(rank, count, gather) for rank in range(count)]
    whole = Packed(lengths).attend(0, q, k, v)
    for share in shares:
        mine = SharedPacked(lengths, share).attend(0, *(share.take(one) for one in (q, k, v)))
        torch.testing.assert_close(mine, share.take(whole))
        torch.testing.assert_close(share.whole(q[:0]), torch.cat([k, v], 1))


def test_a_share_is_padded_behind_the_pack_and_its_padding_weighs_nothing() -> None:
    pack = ranks.packs()[0]  # 62 tokens
    shares = []
    for rank in (0, 2):
        mesh = Mesh(MeshSettings(context=2, tensor=2), torch.device("cpu"), rank)
        part = mesh.split(pack)
        assert part.lengths == [*pack.lengths, 2]
        assert len(part.ids) == 32
        shares.append(part)
    assert sum(float(part.weights.sum()) for part in shares) == float(pack.weights.sum())
    whole = Share(0, 2, lambda x: torch.cat([part.ids for part in shares])).whole(shares[0].ids)
    assert torch.equal(whole[:62], pack.ids)
    assert Mesh(MeshSettings(shard=8), torch.device("cpu"), 3).split(pack) is pack


def test_a_mesh_that_does_not_fit_is_refused_in_one_line(monkeypatch: Any) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with (
        pytest.raises(UsageError, match=r"shard 8 .* is of 16 processes, and there are 2: launch"),
        joined(MeshSettings(shard=8, tensor=2), "cpu"),
    ):
        pass
    if torch.cuda.device_count() < 2:
        there = torch.cuda.device_count()
        with (
            pytest.raises(UsageError, match=f"need a GPU each, and there are {there}"),
            joined(MeshSettings(shard=2), "cuda"),
        ):
            pass
    mesh = Mesh(MeshSettings(shard=2, tensor=3), torch.device("cpu"))
    shape = Shape(width=32, heads=4, kv_heads=2, ffn=48)
    with pytest.raises(
        UsageError,
        match=r"3 must divide decoder.heads 4; .*\.kv_heads 2; .*\.width 32; accumulate 3 ",
    ):
        mesh.check(shape, accumulate=3)
    mesh.check(Shape(width=48, heads=6, kv_heads=3, ffn=48), accumulate=4)


@pytest.mark.slow
def test_torchrun_and_nproc_launch_what_stops_and_goes_on_as_one(
    tmp_path: Path, tiny_shards: Shards, tiny_settings: Callable[..., Any]
) -> None:
    settings = tiny_settings("optimizer.warmup=200", "accumulate=2", "log.sample_every=4")
    (tmp_path / "recipe.toml").write_text(to_toml(settings.model_dump(mode="json")))
    python = [sys.executable, "-m"]
    torchrun = [*python, "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    common = ["unimodal.cli", "train", "-", "--recipe", "recipe.toml", "--quiet", "-o"]

    def start(*command: str) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            command, cwd=tmp_path, stdin=pipe, stdout=pipe, stderr=pipe, text=True
        )
        assert process.stdin is not None
        process.stdin.write(f"{tiny_shards.path}\n")
        process.stdin.close()
        process.stdin = None
        return process

    plain = [str(tiny_shards.path) if word == "-" else word for word in common]
    ways = {
        "alone": [*python, *common, "alone", "--steps", "4"],
        "torchrun": [*torchrun, *plain, "torchrun", "--steps", "4", "--set", "mesh.shard=2"],
        "nproc": [*python, *common, "nproc", "--steps", "4", "--nproc=2", "--set=mesh.tensor=2"],
    }
    last = {}
    for name, command in ways.items():
        out, errors = start(*command).communicate()
        assert out == f"{name}\n", errors
        assert (tmp_path / name / "samples" / "step-00000004.png").is_file()
        last[name] = read_record(tmp_path / name / "metrics.jsonl")[-1]["loss"]
    assert list(last.values()) == pytest.approx([last["alone"]] * 3, rel=1e-5)

    sets = ["--nproc", "2", "--set", "mesh.context=2", "--set", "log.sample_every=0"]
    long = start(*python, *common, "nproc", "--steps", "100000", *sets)
    while read_record(tmp_path / "nproc" / "metrics.jsonl")[-1]["step"] < 6:
        assert long.poll() is None
        time.sleep(0.1)
    long.terminate()
    out, errors = long.communicate(timeout=60)
    assert (long.returncode, out) == (128 + signal.SIGTERM, "")
    assert errors.startswith("unimodal: stopped by SIGTERM at step ") and errors.count("\n") == 1
    stopped = latest_step(tmp_path / "nproc")
    assert stopped != tmp_path / "nproc" / "step-00000004"

    if sys.platform == "linux":  # a launcher that is killed leaves none that trains on
        orphans = start(*python, *common, "nproc", "--steps", "100000", *sets)
        last_step = read_record(tmp_path / "nproc" / "metrics.jsonl")[-1]["step"]
        while read_record(tmp_path / "nproc" / "metrics.jsonl")[-1]["step"] <= last_step:
            assert orphans.poll() is None
            time.sleep(0.1)
        orphans.kill()
        _, errors = orphans.communicate(timeout=60)  # ends when no process holds its pipes
        assert errors.startswith("unimodal: stopped by SIGTERM at step ")
        assert latest_step(tmp_path / "nproc") != stopped


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_shard_damaged_for_one_process_is_one_clear_line(
    tmp_path: Path, tiny_shards: Shards, tiny_settings: Callable[..., Any], rank: int
) -> None:
    settings = tiny_settings("accumulate=2", "mesh.shard=2")
    (tmp_path / "recipe.toml").write_text(to_toml(settings.model_dump(mode="json")))
    loader = Loader(Samples([tiny_shards]), settings.data, settings.seed)
    (key, *_) = loader.step(2, rank, 2)[0].keys
    (row,) = (one for one in tiny_shards.index.to_pylist() if one["key"] == key)
    shards = shutil.copytree(tiny_shards.path, tmp_path / "shards")
    with (shards / row["shard"]).open("r+b") as tar:
        tar.seek(row["offset"])
        tar.write(b"damaged")
    command = [sys.executable, "-m", "unimodal.cli", "train", "shards", "--recipe", "recipe.toml"]
    done = subprocess.run(
        [*command, "--quiet", "--nproc", "2"], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"unimodal: shards/{row['shard']} does not hold the codes of")
    assert key in done.stderr and done.stderr.count("\n") == 1
