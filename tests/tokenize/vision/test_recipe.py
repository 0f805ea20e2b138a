"""Recipes: what is published stands in them, and mistakes are told."""

from __future__ import annotations

from pathlib import Path

import pytest

from unimodal.pipeline.errors import UsageError
from unimodal.pipeline.settings import recipe_names
from unimodal.tokenize.vision.movq import MoVQConfig
from unimodal.tokenize.vision.recipe import (
    RECIPES,
    TokenizerSettings,
    changed,
    learning_rate,
    settings_from,
)


def test_shipped_recipes_say_what_was_published() -> None:
    assert recipe_names(RECIPES) == ["emu3", "llamagen", "movqgan", "small"]
    movqgan, llamagen, emu3 = (settings_from(n) for n in ("movqgan", "llamagen", "emu3"))
    assert emu3.network.config() == MoVQConfig() and emu3.needs_init
    for recipe, commitment, codebook in ((movqgan, 1.0, 0.25), (llamagen, 0.25, 1.0)):
        assert recipe.loss.commitment == commitment
        assert (recipe.codebook.kind, recipe.codebook.weight) == ("gradient", codebook)
    assert (movqgan.loss.perceptual, movqgan.loss.adversarial) == (0.1, 0.1)
    assert (llamagen.loss.perceptual, llamagen.loss.adversarial) == (1.0, 0.5)
    assert (movqgan.optimizer.beta1, movqgan.optimizer.beta2) == (0.5, 0.9)
    assert learning_rate(0, 10, movqgan.optimizer) == learning_rate(9, 10, llamagen.optimizer)
    assert settings_from("small").network.config().z_channels == 16


def test_a_file_is_a_recipe_and_mistakes_are_told(tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    path.write_text("batch = 8\n[loss]\nadversarial = 0.2\n")
    settings = settings_from(str(path), {"seed": 3}, sets=["loss.pixel=l1"])
    assert (settings.batch, settings.seed, settings.loss.pixel) == (8, 3, "l1")
    with pytest.raises(UsageError, match="did you mean movqgan"):
        settings_from("movgan")
    path.write_text("batch = = 8")
    with pytest.raises(UsageError, match="is not TOML"):
        settings_from(str(path))
    with pytest.raises(UsageError, match="unknown setting los"):
        settings_from("small", sets=["los.pixel=l1"])
    with pytest.raises(UsageError, match="multiples of 32"):
        settings_from("small", sets=["network.ch=20"]).network.config()


def test_a_resumed_training_may_run_longer_but_not_otherwise() -> None:
    before = settings_from("small").model_dump(mode="json")
    longer = ["steps=9", "save_every=7"]
    now = settings_from("small", sets=[*longer, "loss.lpips=weights"])
    assert changed(before, settings_from("small", sets=longer)) == []
    assert changed(before, now) == ["loss.lpips"]
    moved = settings_from("small", sets=["loss.lpips=elsewhere"])
    assert changed(now.model_dump(mode="json"), moved) == []


def test_the_rate_rises_and_falls_along_a_cosine() -> None:
    optimizer = TokenizerSettings().optimizer
    rates = [learning_rate(step, 1100, optimizer) for step in (0, 99, 100, 600, 1100)]
    assert rates == pytest.approx([2e-5, 2e-3, 2e-3, (2e-3 + 2e-5) / 2, 2e-5])
