"""A tokenizer for other programs: `unimodal export tokenizer`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers.models.emu3 import Emu3VQVAE
from typer.testing import CliRunner

from unimodal.cli.app import app
from unimodal.pipeline.errors import UsageError
from unimodal.tokenize.vision.movq import MoVQ, MoVQConfig
from unimodal.tokenize.vision.tokenizer import VisionTokenizer


def _export(*arguments: object) -> str:
    command = ["export", "tokenizer", *map(str, arguments)]
    return CliRunner().invoke(app, command, catch_exceptions=False).stdout


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    cfg = MoVQConfig(codebook_size=64, ch=32, ch_mult=(1, 1, 1, 2), num_res_blocks=1)
    VisionTokenizer(MoVQ(cfg)).save(tmp_path / "tiny")
    return tmp_path / "tiny"


@torch.no_grad()
@pytest.mark.parametrize("name", ["tiny", "small"])
def test_transformers_loads_the_export_and_gives_the_same_codes(
    name: str, tiny: Path, tmp_path: Path
) -> None:
    source = tiny if name == "tiny" else name
    out = tmp_path / "out"
    record = json.loads(_export(source, "-o", out, "--naming", "transformers", "--json"))
    ours = VisionTokenizer.load(source)
    assert record["digest"] == ours.digest == VisionTokenizer.load(out).digest
    peer, info = Emu3VQVAE.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    image = torch.rand(1, 3, 40, 48) * 2 - 1
    theirs = peer.encode(image, torch.tensor([[40, 48]])).image_tokens[0]
    codes = ours.encode(image[:, None])
    assert torch.equal(codes[0, 0], theirs)
    painted = ours.decode(codes, image=True)[:, 0]
    torch.testing.assert_close(painted, peer.decode(codes[:, 0]), atol=1e-4, rtol=0)


def test_the_original_naming_comes_back_as_it_was(tiny: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    _export(tiny, "-o", first, "--naming", "transformers", "--quiet")
    assert _export(first, "-o", second, "--quiet").strip() == str(second)
    for file in ("config.json", "model.safetensors"):
        assert (second / file).read_bytes() == (tiny / file).read_bytes()


def test_unknown_namings_and_networks_without_one_are_refused(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="naming hf: give one of original, transformers"):
        _export(tiny, "-o", tmp_path / "out", "--naming", "hf")
    wide = MoVQConfig(64, ch=32, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(0, 1))
    VisionTokenizer(MoVQ(wide)).save(tmp_path / "wide")
    with pytest.raises(UsageError, match="attention of one width only"):
        _export(tmp_path / "wide", "-o", tmp_path / "out", "--naming", "transformers")
    assert not (tmp_path / "out").exists()
