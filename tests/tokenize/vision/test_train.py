"""Training a tokenizer: it learns, it resumes to the same weights, it refuses other settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from skimage.data import astronaut, coffee

from unimodal.pipeline.errors import UnimodalError, UsageError
from unimodal.tokenize.vision.bank import held_out, list_spans
from unimodal.tokenize.vision.init import start_from_colour
from unimodal.tokenize.vision.movq import MoVQ, MoVQConfig
from unimodal.tokenize.vision.pixels import to_pixels, to_uint8
from unimodal.tokenize.vision.train import Network, TokenizerSettings, train_tokenizer

NETWORK = {"codebook_size": 32, "ch_mult": (1, 1, 1, 4), "num_res_blocks": 1}


def _settings(**changes: Any) -> TokenizerSettings:
    values: dict[str, Any] = {
        "network": Network(**NETWORK),
        "steps": 6,
        "batch": 2,
        "crop": 32,
        "warmup": 2,
        "lr_warmup": 1,
        "save_every": 3,
        "val_fraction": 0.3,
    }
    return TokenizerSettings(**(values | changes))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(8):
        cut = (astronaut() if i % 2 else coffee())[i * 20 : i * 20 + 96, 100:220]
        Image.fromarray(np.ascontiguousarray(cut)).save(folder / f"{i}.png")
    return folder


def test_an_interrupted_training_ends_with_the_weights_of_an_uninterrupted_one(
    pictures: Path, tmp_path: Path
) -> None:
    whole = train_tokenizer([pictures], tmp_path / "whole", _settings())
    # The schedule knows the total: the stop after three steps is a kill, not another total.
    with pytest.MonkeyPatch.context() as patch:
        import unimodal.tokenize.vision.train as module

        save = module._save

        def save_and_die(*arguments: Any) -> None:
            save(*arguments)
            raise KeyboardInterrupt

        patch.setattr(module, "_save", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            train_tokenizer([pictures], tmp_path / "cut", _settings())
    cut = train_tokenizer([pictures], tmp_path / "cut", _settings())
    ours, theirs = load_file(whole / "model.safetensors"), load_file(cut / "model.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    rows = [json.loads(line) for line in (cut / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [3, 6]
    assert {"val_psnr", "val_ssim", "val_usage"} <= rows[0].keys()


def test_other_settings_are_refused_by_name(pictures: Path, tmp_path: Path) -> None:
    train_tokenizer([pictures], tmp_path, _settings(steps=3))
    with pytest.raises(UnimodalError, match=r"other settings \(lr\).*--init"):
        train_tokenizer([pictures], tmp_path, _settings(lr=5e-4))


def test_the_start_paints_every_patch_in_its_mean_colour() -> None:
    torch.manual_seed(0)
    model = MoVQ(MoVQConfig(codebook_size=16, ch=32, ch_mult=(1, 1, 2, 4), num_res_blocks=1)).eval()
    image = Image.fromarray(astronaut()).resize((128, 128), Image.Resampling.BICUBIC)
    pixels = np.asarray(image)
    means = np.asarray(image.resize((16, 16), Image.Resampling.BOX))
    blocks = means.repeat(8, axis=0).repeat(8, axis=1)

    @torch.no_grad()
    def distance() -> float:
        painted = to_uint8(model.paint(model.latents(to_pixels(pixels)[None, None]), True)[0, 0])
        return float(np.abs(painted.astype(float) - blocks).mean())

    drawn_at_random = distance()
    start_from_colour(model)
    # Without quantization, untrained: within a few grey levels of the block means.
    assert distance() < 10 < 40 < drawn_at_random


def test_holding_out_goes_by_name_and_share() -> None:
    names = [f"/somewhere/{i:04x}.png" for i in range(2000)]
    share = np.mean([held_out(name, 0.1) for name in names])
    assert 0.07 < share < 0.13
    assert [held_out(n, 0.1) for n in names] == [held_out("/other" + n, 0.1) for n in names]


def test_nothing_to_train_on_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        list_spans([tmp_path / "missing"])
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(UnimodalError, match="no picture or video found"):
        list_spans([tmp_path])
