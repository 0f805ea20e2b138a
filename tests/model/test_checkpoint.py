"""Checkpoints: exact, whole or absent, and never a pickle."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from unimodal.model import checkpoint
from unimodal.model.checkpoint import Learners, Saver, find, latest_step, load_step
from unimodal.model.decoder import Decoder, DecoderConfig, Shape
from unimodal.model.lora import LoraSettings, adapt, start_adapters
from unimodal.model.naming import config_record, read_json
from unimodal.model.optim import optimizers
from unimodal.model.recipe import OptimizerSettings
from unimodal.pipeline.errors import UnimodalError
from unimodal.tokenize.shards import Shards
from unimodal.tokenize.training import WeightAverage, read_record

SHAPE = Shape(width=16, layers=1, heads=2, kv_heads=1, head_dim=8, ffn=24)
CONFIG = DecoderConfig(SHAPE, 40, 64)


def _trained(seed: int = 0, ema: float = 0.0, rank: int = 0) -> Learners:
    decoder = Decoder(CONFIG, seed)
    if rank:
        adapt(decoder, LoraSettings(rank=rank))
        start_adapters(decoder, seed)
    average = WeightAverage(decoder, ema)
    optimizers_ = optimizers(decoder, OptimizerSettings(lr=1e-2))
    for step in range(2):
        decoder(torch.arange(12)[None]).square().sum().backward()
        for optimizer in optimizers_:
            optimizer.step()
            optimizer.zero_grad()
        average.update(step)
    return Learners(decoder, optimizers_, average)


def _save(
    out: Path, step: int, learners: Learners, keep: int = 2, background: bool = False
) -> Path:
    with Saver(out, keep, background) as saver:
        saver.save(step, learners, {"step": step})
    return out / f"step-{step:08d}"


@pytest.mark.parametrize(("background", "ema"), [(False, 0.0), (True, 0.5)])
def test_weights_and_moments_come_back_bit_for_bit(
    tmp_path: Path, background: bool, ema: float
) -> None:
    learners, again = _trained(ema=ema), _trained(seed=9, ema=ema)
    step = _save(tmp_path, 2, learners, background=background)
    assert load_step(step, again) == {"step": 2}
    pairs = [(learners.decoder, again.decoder), (learners.average.model, again.average.model)]
    for one, other in pairs:
        for name, tensor in one.state_dict().items():
            assert torch.equal(other.state_dict()[name], tensor)
    mine, theirs = (x.optimizers[0].state_dict()["state"] for x in (learners, again))
    assert mine.keys() == theirs.keys() and len(mine) == 12
    for index, moments in mine.items():
        for moment in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(moments[moment], theirs[index][moment])
    shown = learners.average.model.lm_head.weight
    assert torch.equal(Decoder.load(tmp_path).lm_head.weight, shown)
    assert torch.equal(shown, learners.decoder.lm_head.weight) == (ema == 0)
    assert Decoder.load(step).config == CONFIG


def test_what_is_saved_is_of_the_moment_that_save_was_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learners, gate = _trained(), threading.Event()
    before = learners.decoder.lm_head.weight.clone()
    write = Saver._write

    def late(*arguments: Any) -> None:
        assert gate.wait(20)
        write(*arguments)

    monkeypatch.setattr(Saver, "_write", late)
    with Saver(tmp_path, keep=1) as saver:
        saver.save(2, learners, {"step": 2})
        saver.check()  # at work: nothing to tell
        with torch.no_grad():
            learners.decoder.lm_head.weight.add_(1)
        assert latest_step(tmp_path) is None
        gate.set()
        saver.wait()
        assert torch.equal(Decoder.load(tmp_path).lm_head.weight, before)


def test_a_writer_that_fails_is_heard(tmp_path: Path) -> None:
    learners = _trained()
    _save(tmp_path, 1, learners)
    (tmp_path / ".step-00000002.tmp").write_text("in the way")
    with Saver(tmp_path, keep=1) as saver:
        saver.save(2, learners, {"step": 2})
        with pytest.raises(UnimodalError, match=r"step 2 could not be saved in .*make room there"):
            while True:
                saver.check()
        saver.save(3, learners, {"step": 3})
        with pytest.raises(UnimodalError, match="step 3 could not be saved"):
            saver.save(4, learners, {"step": 4})
    assert latest_step(tmp_path) == tmp_path / "step-00000001"


def test_a_step_directory_loads_in_transformers_with_the_same_logits(tmp_path: Path) -> None:
    decoder = (learners := _trained()).decoder
    step = _save(tmp_path, 2, learners)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(step).eval()
    assert type(theirs).__name__ == "LlamaForCausalLM"
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(decoder(ids), theirs(ids).logits, atol=1e-5, rtol=1e-5)


def test_only_the_newest_steps_are_kept(tmp_path: Path) -> None:
    learners = _trained()
    for step in (1, 2, 3):
        _save(tmp_path, step, learners)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["latest", "step-00000002", "step-00000003"]
    assert latest_step(tmp_path) == tmp_path / "step-00000003"


@pytest.mark.parametrize("dies_in", ["_write_json", "_sync", "atomic"])
def test_dying_in_a_save_keeps_the_previous_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies_in: str
) -> None:
    learners = _trained()
    _save(tmp_path, 1, learners, keep=1)

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, dies_in, die)
        with pytest.raises(KeyboardInterrupt):
            _save(tmp_path, 2, learners, keep=1)
    assert latest_step(tmp_path) == tmp_path / "step-00000001"
    Decoder.load(tmp_path)
    _save(tmp_path, 2, learners, keep=1)
    assert latest_step(tmp_path) == tmp_path / "step-00000002"
    assert {p.name for p in tmp_path.iterdir()} == {"latest", "step-00000002"}


def test_what_is_no_checkpoint_is_named_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(UnimodalError, match=r"no checkpoint at .*nowhere: make one with"):
        find(tmp_path / "nowhere")
    with pytest.raises(UnimodalError, match="no finished checkpoint"):
        find(tmp_path)
    (tmp_path / "latest").write_text("../../etc\n")
    with pytest.raises(UnimodalError, match="no complete step"):
        find(tmp_path)


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    config = config_record(CONFIG)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04never read")
    with pytest.raises(UnimodalError, match=r"pytorch_model\.bin is a pickle"):
        Decoder.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not one of llama"),
        ({"attention_bias": True}, "attention_bias is not supported"),
        ({"hidden_size": "wide"}, "describes no decoder"),
        ({"hidden_size": 2**40}, "describes no decoder"),
        ({"num_hidden_layers": 10**400}, "describes no decoder"),
        ({"vocab_size": 10**9}, "vocab_size is not within 1 and 16777216"),
        ({"max_position_embeddings": 10**400}, "max_position_embeddings is not within"),
        ({"rms_norm_eps": 10**400}, "describes no decoder"),
        ({"intermediate_size": 25}, r"config\.json asks for \[16, 25\]"),
    ],
)
def test_a_model_of_another_kind_is_refused(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    step = _save(tmp_path, 1, _trained())
    config = json.loads((step / "config.json").read_text())
    (step / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UnimodalError, match=message):
        Decoder.load(step)


@pytest.mark.parametrize("damaged", ["[]", '{"weight_map": {"a": 5}}', '{"weight_map": ["a"]}'])
def test_a_damaged_index_is_named(tmp_path: Path, damaged: str) -> None:
    step = _save(tmp_path, 1, _trained())
    (step / "model.safetensors").rename(step / "a.safetensors")
    (step / "model.safetensors.index.json").write_text(damaged)
    with pytest.raises(UnimodalError, match=r"model\.safetensors\.index\.json (is|holds) no"):
        Decoder.load(step)


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    step = _save(tmp_path, 1, _trained())
    file = step / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(UnimodalError, match=r"model\.safetensors cannot be read"):
        Decoder.load(step)


def _command(shards: Shards, out: Path, *sets: str, processes: int = 1) -> list[str]:
    command = [sys.executable, "-m", "unimodal.cli", "train", str(shards.path), "-o", str(out)]
    common = ["precision=float32", "accumulate=4", "data.context=128", "log.tensorboard=false"]
    common += ["decoder.width=32", "decoder.layers=2", "decoder.heads=4", "decoder.ffn=64"]
    common += ["log.every=1", "optimizer.kind=adamw", "minutes=none", "log.validate_every=0"]
    if processes > 1:
        command += ["--nproc", str(processes)]
    for item in [*common, *sets]:
        command += ["--set", item]
    return [*command, "--device", "cpu", "--quiet"]


def _losses(out: Path) -> list[float]:
    return [row["loss"] for row in read_record(out / "metrics.jsonl") if "loss" in row]


@pytest.mark.slow
@pytest.mark.parametrize("sets", [("ema=0.9",), ("lora.rank=2",)], ids=["average", "lora"])
def test_a_step_of_any_mesh_goes_on_in_any_other(
    tmp_path: Path, tiny_shards: Shards, sets: tuple[str, ...]
) -> None:
    """Only the order of sums differs; the files are the same and load as they are."""
    sets = (*sets, "steps=6", "checkpoint.every=3", "checkpoint.keep=9")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def run(name: str, *mesh: str) -> Path:
        command = _command(tiny_shards, tmp_path / name, *sets, *mesh, processes=1 + bool(mesh))
        subprocess.run(command, check=True, env=environment, timeout=250)
        return tmp_path / name

    alone, split = run("alone"), run("split", "mesh.shard=2")
    for start in (alone, split):
        shutil.rmtree(start / "step-00000006")
        (start / "latest").write_text("step-00000003\n")
        shutil.copytree(start, tmp_path / f"{start.name}-onward")
    expected = _losses(alone)
    run("alone-onward", "mesh.context=2")
    run("split-onward")
    run("split", "mesh.context=2")
    for name in ("alone-onward", "split-onward", "split"):
        assert _losses(tmp_path / name) == pytest.approx(expected, rel=1e-5), name
        last = tmp_path / name / "step-00000006"
        files = {path.name for path in (alone / "step-00000003").iterdir()}
        assert {path.name for path in last.iterdir()} == files
        transformers.AutoModelForCausalLM.from_pretrained(last)
        assert Decoder.load(last).config.shape.width == 32


@pytest.mark.slow
def test_killed_at_any_moment_of_a_save_there_is_a_whole_checkpoint(
    tmp_path: Path, tiny_shards: Shards
) -> None:
    """Real kill -9, the delay drawn within a save's; and no loss differs from an unkilled run's."""
    sets = ("steps=400", "checkpoint.every=1", "checkpoint.keep=1", "decoder.width=256")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    rng, inside, reached = random.Random(0), 0, 0
    for again in range(7):
        with subprocess.Popen(_command(tiny_shards, killed, *sets), env=environment) as process:
            at_least = rng.randrange(3)  # saves of this process
            while process.poll() is None and _latest(killed) < reached + at_least:
                time.sleep(0.001)
            while process.poll() is None and not list(killed.glob(".step-*.tmp")):
                pass
            if again % 2:  # else at once: within a save that a fast disk ends in no time
                time.sleep(rng.uniform(0, 0.03))
            process.kill()
        inside += bool(list(killed.glob(".step-*.tmp")))
        step = latest_step(killed)
        if step is not None:  # else killed within the very first
            Decoder.load(step)
            load_file(step / "optimizer.safetensors")
            done = read_json(step / "train.json")["step"]
            assert reached <= done == _latest(killed)
            reached = done
    assert inside >= 3 and reached >= 3
    with subprocess.Popen(_command(tiny_shards, whole, *sets), env=environment) as process:
        while process.poll() is None and _latest(whole) < reached:
            time.sleep(0.05)
        process.terminate()
    assert _losses(whole)[:reached] == _losses(killed)[:reached]


def _latest(out: Path) -> int:
    pointer = out / "latest"
    return int(pointer.read_text().strip()[5:]) if pointer.exists() else 0
