"""Adapters: a start that changes nothing, small training, and a merge that computes the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from unimodal.model.checkpoint import latest_step
from unimodal.model.decoder import Decoder, DecoderConfig, Shape
from unimodal.model.lora import LoraSettings, adapt, merged, start_adapters
from unimodal.model.optim import optimizers
from unimodal.model.recipe import OptimizerSettings, TrainSettings
from unimodal.model.train import train
from unimodal.pipeline.errors import UsageError
from unimodal.tokenize.shards import Shards

CONFIG = DecoderConfig(Shape(width=32, layers=2, heads=4, kv_heads=2, ffn=48), 40, 64)
SETTINGS = LoraSettings(rank=3, targets=("q_proj", "v_proj", "down_proj"))
IDS = torch.arange(20)[None]


def _adapted() -> Decoder:
    decoder = Decoder(CONFIG)
    adapt(decoder, SETTINGS)
    start_adapters(decoder, seed=1)
    return decoder


def test_an_adapted_decoder_starts_as_it_was_and_trains_its_adapters_alone() -> None:
    plain, decoder = Decoder(CONFIG), _adapted()
    assert torch.equal(decoder(IDS), plain(IDS))
    (adamw,) = optimizers(decoder, OptimizerSettings(lr=0.1, weight_decay=0.0))
    decoder(IDS).square().sum().backward()
    adamw.step()
    state, before = decoder.state_dict(), plain.state_dict()
    changed = {n for n in state if n not in before or not torch.equal(state[n], before[n])}
    assert len(changed) == 2 * 2 * 3 and all(".lora_" in name for name in changed)
    assert sum(len(group["params"]) for group in adamw.param_groups) == 12


def test_merged_weights_compute_what_the_adapters_do() -> None:
    decoder, plain = _adapted(), Decoder(CONFIG)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if name.endswith("lora_b"):
                parameter.normal_()
    plain.load_state_dict(merged(decoder))
    assert (decoder(IDS) - Decoder(CONFIG)(IDS)).abs().max() > 0.1
    torch.testing.assert_close(plain(IDS), decoder(IDS), atol=1e-5, rtol=1e-5)


def test_a_checkpoint_holds_adapters_beside_the_merged_model_and_one_base(
    tmp_path: Path, tiny_shards: Shards, tiny_settings: Callable[..., TrainSettings]
) -> None:
    start = train([tiny_shards.path], tmp_path / "start", tiny_settings())
    sets = ("lora.rank=2", "checkpoint.every=4", "steps=8")
    out = train([tiny_shards.path], tmp_path / "tuned", tiny_settings(*sets), init=start)
    steps = sorted(out.glob("step-*"))
    assert len(steps) == 2 and steps[-1] == latest_step(out)
    first, last = (load_file(step / "trained.safetensors") for step in steps)
    assert len(first) == 2 * 2 * 4 and all(".lora_" in name for name in first)
    assert all(not torch.equal(first[name], last[name]) for name in first)
    moments = load_file(steps[-1] / "optimizer.safetensors")
    assert len(moments) == 2 * len(first) and all(".lora_" in name for name in moments)
    assert len({(step / "base.safetensors").stat().st_ino for step in steps}) == 1
    base, before = load_file(steps[-1] / "base.safetensors"), Decoder.load(start).state_dict()
    assert {name.removeprefix("base.") for name in base} == set(before)
    assert all(torch.equal(base[f"base.{name}"], before[name]) for name in before)
    tuned = Decoder.load(out).state_dict()
    moved = {name for name in tuned if not torch.equal(tuned[name], before[name])}
    assert {name.split(".")[-2] for name in moved} == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_adapters_do_not_go_with_an_average_or_split_matrices(
    tiny_settings: Callable[..., TrainSettings],
) -> None:
    with pytest.raises(UsageError, match=r"choose one"):
        tiny_settings("lora.rank=2", "ema=0.9")
    with pytest.raises(UsageError, match=r"mesh\.tensor must be 1"):
        tiny_settings("lora.rank=2", "mesh.tensor=2")
