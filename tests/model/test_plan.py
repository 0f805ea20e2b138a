"""What `train --plan` says: against the full-size network, measured memory, and known figures."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import Emu3ForCausalLM
from transformers.models.emu3 import Emu3TextConfig
from typer.testing import CliRunner

from benchmarks.memory import CASES, case
from unimodal.cli.app import app
from unimodal.model.decoder import Decoder, DecoderConfig
from unimodal.model.plan import EMU3_VOCABULARY, flops_per_token, memory, plan
from unimodal.model.recipe import settings_from
from unimodal.pipeline.errors import UsageError
from unimodal.tokenize.shards import Shards

STAGES = ("emu3-8b-stage1", "emu3-8b-stage2")


@pytest.mark.parametrize("recipe", STAGES)
def test_the_full_size_decoder_has_the_names_shapes_and_parameters_of_emu3(recipe: str) -> None:
    settings = settings_from(recipe)
    config = DecoderConfig(settings.decoder, EMU3_VOCABULARY, settings.data.context)
    with torch.device("meta"):
        ours = Decoder(config, seed=None)
        theirs = Emu3ForCausalLM(Emu3TextConfig())  # its defaults are the released 8B
    shapes = [
        {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        for model in (ours, theirs)
    ]
    assert shapes[0] == shapes[1]
    assert len(shapes[0]) == 32 * 9 + 3
    assert sum(p.numel() for p in ours.parameters()) == 8_492_011_520
    assert settings.decoder.rope_theta == 1e6 and settings.decoder.dropout == 0.1


@pytest.mark.parametrize("name", ["large vocabulary", "full"])
def test_planned_memory_is_that_of_a_small_run(name: str) -> None:
    planned, measured = case(name, small=True)
    assert planned == pytest.approx(measured, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(CASES))
def test_planned_memory_is_that_of_a_run_of_a_gigabyte(name: str) -> None:
    planned, measured = case(name)
    assert measured >= 1e9
    assert planned == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize(("length", "attention"), [(8704, 6.8e9), (131_072, 103e9)])
def test_operations_of_the_full_size_are_the_known_ones(length: int, attention: float) -> None:
    found = flops_per_token(settings_from(STAGES[0]), EMU3_VOCABULARY, [length])
    # 6 N of 7.74 B in blocks and head; 6 layers width length of causal attention.
    assert found[0] == pytest.approx(46.4e9, rel=0.01)
    assert found[1] == pytest.approx(attention, rel=0.01)


def test_matrix_operations_are_those_that_torch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    settings = settings_from("tiny")
    decoder = Decoder(DecoderConfig(settings.decoder, 500), seed=0)
    with FlopCounterMode(display=False) as counter:
        decoder(torch.arange(64)[None]).sum().backward()
    counted = counter.get_flop_counts()["Global"]
    products = sum(n for name, n in counted.items() if "mm" in str(name))
    assert flops_per_token(settings, 500, [64])[0] * 64 == products


def test_a_mesh_splits_what_its_axes_say() -> None:
    sets = ["mesh.shard=8", "mesh.tensor=2", "mesh.context=2"]
    settings = settings_from(STAGES[0], sets=[*sets, "accumulate=8", 'recompute="none"'])
    alone = settings_from(STAGES[0], sets=["mesh.shard=1", "accumulate=1", 'recompute="none"'])
    split, whole = (memory(one, EMU3_VOCABULARY, [5120], "cuda") for one in (settings, alone))
    assert whole.weights == 4 * 8_492_011_520 and whole.moments == 2 * whole.weights
    assert split.weights == whole.weights // 32 and split.gradients == whole.gradients // 32
    assert whole.unsharded == whole.gathered_kv == 0
    # Every layer keeps k and v of the whole pack, one of two tensor ranks' half of the heads.
    assert split.gathered_kv == 32 * 5120 * 2 * (8 * 128 // 2) * 2
    assert split.activations < whole.activations / 3
    lora = memory(settings_from(STAGES[0], sets=["lora.rank=16", "mesh.shard=1"]), EMU3_VOCABULARY)
    assert lora.moments < 0.01 * whole.moments and lora.weights > whole.weights


def test_gpus_take_copies_of_the_mesh_and_days_follow() -> None:
    settings = settings_from(STAGES[1])
    few, many = (
        plan(settings, gpus=n, gpu="h100", mfu=0.4, tokens=1e12, packs=[[8192] * 16])
        for n in (64, 1024)
    )
    assert few["processes"] == 64 and many["mesh"].startswith("replicate 16 x shard 16")
    assert many["packs a step"] == "256 (the recipe: 16)"
    days = 1e12 * float(few["FLOPs a token"]) / (64 * 989e12 * 0.4) / 86_400
    assert few["days for 1e+12 tokens"] == pytest.approx(days, rel=1e-3)
    assert many["days for 1e+12 tokens"] == pytest.approx(days / 16, rel=1e-2)
    with pytest.raises(UsageError, match="100 GPUs are no multiple of the mesh's 64"):
        plan(settings, gpus=100)
    with pytest.raises(UsageError, match="no GPU h900 is known"):
        plan(settings, gpu="h900")


@pytest.mark.parametrize(
    ("option", "values", "message"),
    [
        ("--mfu", ("0", "-0.4", "1.1", "nan"), "must be above 0 and at most 1"),
        ("--tokens", ("0", "-1e12", "nan", "inf"), "must be a number above 0"),
        ("--length", ("129",), r"129 must be at most data.context = 128"),
    ],
)
def test_figures_that_cannot_be_are_one_clear_line(
    option: str, values: tuple[str, ...], message: str
) -> None:
    base = ["train", "--plan", "--device", "cpu", "--gpus", "8", "--set", "data.context=128"]
    for value in values:
        error = CliRunner().invoke(app, [*base, option, value]).exception
        assert isinstance(error, UsageError), value
        assert re.match(f"{option} .*{message}", str(error))


def test_the_command_plans_by_the_lengths_of_the_shards_and_makes_nothing(
    tiny_shards: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base = ["train", "--plan", "--json", "--device", "cpu", "--set", "data.context=128"]
    ours = json.loads(CliRunner().invoke(app, [*base, str(tiny_shards.path)]).stdout)
    assert ours["train samples"] + ours["val samples"] == 11
    assert ours["vocabulary"] == tiny_shards.vocabulary.size
    assert ours["documents, mean tokens"] < 60  # 4 x 5 codes and a name each
    # No shards at all: Emu3's vocabulary, and a document as long as the context.
    bare = json.loads(CliRunner().invoke(app, base).stdout)
    assert bare["vocabulary"] == 184_622 and bare["documents, mean tokens"] == 128
    assert "GPU" not in bare and not list(tmp_path.iterdir())
