"""Recipes and the learning rate."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from transformers import Emu3TextConfig

from unimodal.model.checkpoint import to_toml
from unimodal.model.recipe import (
    RECIPES,
    OptimizerSettings,
    TrainSettings,
    learning_rate,
    settings_from,
)
from unimodal.model.train import train
from unimodal.pipeline.errors import UsageError
from unimodal.pipeline.settings import load_recipe, recipe_names
from unimodal.tokenize.document import Image, Piece, Text
from unimodal.tokenize.shards import Sample, Shards, ShardWriter
from unimodal.tokenize.training import read_record
from unimodal.tokenize.vision.tokenizer import VisionTokenizer
from unimodal.tokenize.vocabulary import Vocabulary


def test_every_shipped_recipe_is_valid() -> None:
    assert {"tiny", "small"} <= set(recipe_names(RECIPES))
    for name in recipe_names(RECIPES):
        settings_from(name)


@pytest.fixture(scope="module")
def chats(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: VisionTokenizer, vocabulary: Vocabulary
) -> Shards:
    """Questions about pictures, two turns each."""
    rng = np.random.default_rng(3)
    writer = ShardWriter(tmp_path_factory.mktemp("chats"), tokenizer, vocabulary, {})
    samples = []
    for number in range(6):
        told = [Text(f"what is {number}"), Text("a cat"), Text("sure?"), Text("yes")]
        texts = [Piece(t, role) for t, role in zip(told, ("user", "assistant") * 2, strict=True)]
        pieces = [Piece(Image(rng.integers(0, 64, (3, 4))), "user"), *texts]
        tokens = [None, *(len(vocabulary.text.encode(text.text)) for text in told)]
        key = f"chat{number:04d}"
        split = "val" if number == 5 else "train"
        about = {"task": "chat", "pieces": pieces, "tokens": tokens}
        samples.append(Sample(key, key, "document", None, split, f"{number:064x}", **about))
    writer.write(0, "unit", samples)
    return writer.finish(1)


SMALL = {
    "steps": 2,
    "minutes": None,
    "device": "cpu",
    "accumulate": 2,
    "mesh": {"replicate": 1, "shard": 1, "context": 1, "tensor": 1},
    "decoder": {"width": 32, "layers": 2, "heads": 4, "kv_heads": 2, "ffn": 64},
    "data": {"context": 256},
    "log": {"every": 1, "validate_every": 2, "sample_every": 0, "tensorboard": False},
}
LEARNED = {
    "qft": {"generation/vision", "structure"},
    "understand": {"understanding/text"},
    "instruct": {"chat/text"},
}


@pytest.fixture(scope="module")
def begun(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_shards: Shards,
    tiny_settings: Callable[..., TrainSettings],
) -> Path:
    """Weights of one step."""
    return train([tiny_shards.path], tmp_path_factory.mktemp("begun"), tiny_settings("steps=1"))


@pytest.mark.parametrize("name", sorted({*recipe_names(RECIPES)} - {"dpo"}))
def test_every_recipe_trains_what_it_says_with_a_decoder_that_is_small_enough(
    tmp_path: Path,
    tiny_shards: Shards,
    chats: Shards,
    begun: Path,
    name: str,
) -> None:
    settings = settings_from(name, SMALL)
    init = begun if settings.needs_init else None
    shards = [(chats if name == "instruct" else tiny_shards).path]
    out = train(shards, tmp_path / "out", settings, init=init)
    rows = read_record(out / "metrics.jsonl")
    losses = [row for row in rows if "loss" in row]
    assert [row["step"] for row in losses] == [1, 2]
    assert all(np.isfinite(row["loss"]) and row["fill"] > 0.2 for row in losses)
    seen = {key.removeprefix("loss/") for row in losses for key in row if key.startswith("loss/")}
    assert seen == LEARNED.get(name, seen)
    assert any(key.startswith("validation/") for row in rows for key in row)


def test_recipes_hold_what_emu3_publishes() -> None:
    one, two, qft, understand = (
        settings_from(name) for name in ("emu3-8b-stage1", "emu3-8b-stage2", "qft", "understand")
    )
    emu3 = Emu3TextConfig()
    for stage in (one, two):
        shape = stage.decoder
        assert (shape.width, shape.layers) == (emu3.hidden_size, emu3.num_hidden_layers)
        assert (shape.heads, shape.kv_heads, shape.ffn) == (32, 8, emu3.intermediate_size)
        assert (shape.channels, shape.rope_theta, shape.norm_eps) == (128, 1e6, 1e-5)
        assert (stage.optimizer.lr, stage.optimizer.min_lr) == (5e-5, 0.0)
        assert (stage.optimizer.schedule, shape.dropout) == ("cosine", 0.1)
        assert stage.data.vision_weight == 0.5
        assert stage.mesh.size == 64
    assert (one.data.context, two.data.context) == (5120, 131072)
    assert (qft.optimizer.schedule, qft.optimizer.min_lr) == ("linear", 0.0)
    assert qft.needs_init and qft.data.caption_weight == qft.data.understanding == 0
    assert understand.data.vision_weight == understand.data.described_vision_weight == 0


def test_weights_give_the_shape_and_the_recipe_the_rest(begun: Path) -> None:
    settings = settings_from("qft", init=begun)
    assert (settings.decoder.width, settings.decoder.layers) == (32, 2)
    assert settings.decoder.dropout == 0.1
    assert settings_from("tiny", init=begun).decoder.width == 192  # it says so itself


def test_later_layers_win_over_the_recipe() -> None:
    settings = settings_from("tiny", {"seed": 7}, sets=["decoder.layers=2", "seed=8"])
    assert settings.seed == 8
    assert settings.decoder.layers == 2
    assert settings.decoder.width == settings_from("tiny").decoder.width


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="no recipe tinny: did you mean tiny"):
        load_recipe("tinny", RECIPES)
    with pytest.raises(UsageError, match="cannot be read"):
        load_recipe("nowhere.toml", RECIPES)


def test_an_unknown_setting_names_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"optimizer\.lrr: did you mean optimizer\.lr"):
        settings_from("tiny", sets=["optimizer.lrr=1"])


def test_settings_written_as_toml_read_back_equal(tmp_path: Path) -> None:
    prompts = ['a "quoted" cat\n', "é 😀", "\x7f\x00"]
    data, sets = {"weights": [1e-7, 2.5]}, ["optimizer.clip=inf"]
    settings = settings_from("tiny", {"log": {"sample_prompts": prompts}, "data": data}, sets=sets)
    path = tmp_path / "config.toml"
    path.write_text(to_toml(settings.model_dump(mode="json")))
    assert settings_from(path) == settings
    assert tomllib.loads(to_toml({"a": [float("-inf"), True, 3]})) == {"a": [-math.inf, True, 3]}


def test_learning_rate_warms_up_then_falls_to_its_minimum() -> None:
    chosen = OptimizerSettings(lr=1.0, min_lr=0.1, warmup=10)
    rates = [learning_rate(step, 100, chosen) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.1)
    assert all(a >= b for a, b in pairwise(rates[10:]))
    # The warm-up does not depend on the schedule's end, which `minutes` may still move.
    assert rates[:10] == [learning_rate(step, 1000, chosen) for step in range(10)]


def test_a_linear_schedule_falls_evenly_to_nothing_at_the_last_step() -> None:
    chosen = OptimizerSettings(lr=1.0, warmup=0, schedule="linear")
    rates = [learning_rate(step, 5, chosen) for step in range(5)]
    assert rates == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.0])


def test_defaults_are_complete() -> None:
    assert TrainSettings().decoder.channels == 32
