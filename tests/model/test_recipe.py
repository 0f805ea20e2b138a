"""Recipes and the learning rate."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from unimodal.model.checkpoint import to_toml
from unimodal.model.recipe import (
    RECIPES,
    OptimizerSettings,
    TrainSettings,
    learning_rate,
    settings_from,
)
from unimodal.pipeline.errors import UsageError
from unimodal.pipeline.settings import load_recipe, recipe_names


def test_every_shipped_recipe_is_valid() -> None:
    assert {"tiny", "small"} <= set(recipe_names(RECIPES))
    for name in recipe_names(RECIPES):
        settings_from(name)


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
    settings = settings_from("tiny", {"log": {"sample_prompts": prompts}})
    path = tmp_path / "config.toml"
    path.write_text(to_toml(settings.model_dump(mode="json")))
    assert settings_from(path) == settings


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
