"""The tokenizer as a user meets it: files, digests, shapes, errors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from unimodal.pipeline.errors import UnimodalError, UsageError
from unimodal.tokenize.vision import VisionTokenizer
from unimodal.tokenize.vision.movq import MoVQ, MoVQConfig
from unimodal.tokenize.vision.weights import to_transformers

TINY = MoVQConfig(codebook_size=64, ch=32, ch_mult=(1, 1, 1, 1), num_res_blocks=1)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    VisionTokenizer(MoVQ(TINY)).save(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def test_saving_and_loading_keeps_codes_and_digest(saved: Path, tmp_path: Path) -> None:
    first = VisionTokenizer.load(saved)
    first.save(tmp_path / "again")
    second = VisionTokenizer.load(tmp_path / "again")
    assert first.digest == second.digest
    pixels = torch.rand(1, 4, 3, 16, 24) * 2 - 1
    assert torch.equal(first.encode(pixels), second.encode(pixels))


def test_either_public_naming_loads_to_the_same_tokenizer(saved: Path, tmp_path: Path) -> None:
    other = tmp_path / "theirs"
    other.mkdir()
    (other / "config.json").write_text((saved / "config.json").read_text())
    state = to_transformers(load_file(saved / "model.safetensors"))
    save_file({name: t.contiguous() for name, t in state.items()}, other / "model.safetensors")
    assert VisionTokenizer.load(other).digest == VisionTokenizer.load(saved).digest


def test_shapes_of_images_and_clips(saved: Path) -> None:
    tokenizer = VisionTokenizer.load(saved)
    codes = tokenizer.encode(torch.zeros(2, 1, 3, 16, 24))
    assert codes.shape == (2, 1, 2, 3)
    assert codes.dtype == torch.int64
    assert tokenizer.decode(codes, image=True).shape == (2, 1, 3, 16, 24)
    clip = tokenizer.encode(torch.zeros(2, 8, 3, 16, 24))
    assert clip.shape == (2, 2, 2, 3)
    assert tokenizer.decode(clip).shape == (2, 8, 3, 16, 24)
    with pytest.raises(ValueError, match="multiple of 4"):
        tokenizer.encode(torch.zeros(1, 6, 3, 16, 16))


def test_groups_of_a_clip_are_encoded_each_by_itself(saved: Path) -> None:
    tokenizer = VisionTokenizer.load(saved)
    clip = torch.rand(1, 8, 3, 16, 24) * 2 - 1
    parts = [tokenizer.encode(part) for part in clip.split(4, dim=1)]
    assert torch.equal(tokenizer.encode(clip), torch.cat(parts, dim=1))


def test_a_missing_directory_names_what_there_is() -> None:
    with pytest.raises(UsageError, match="nowhere: no vision tokenizer; give one of small"):
        VisionTokenizer.load("nowhere")


def test_wrong_weights_are_named_all_at_once(saved: Path) -> None:
    state = load_file(saved / "model.safetensors")
    state["encoder.conv_in.weight"] = state["encoder.conv_in.weight"][:, :2].contiguous()
    state["decoder.conv_in.bias"] = torch.full_like(state["decoder.conv_in.bias"], torch.nan)
    del state["quantize.embedding.weight"]
    save_file(state, saved / "model.safetensors")
    with pytest.raises(UnimodalError) as error:
        VisionTokenizer.load(saved)
    message = str(error.value)
    assert "missing quantize.embedding.weight" in message
    assert "encoder.conv_in.weight is [32, 2, 3, 3], not [32, 3, 3, 3]" in message
    assert "decoder.conv_in.bias has values that are not finite" in message
