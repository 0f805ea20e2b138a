"""The tokenizer as a user meets it: files, digests, shapes, errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from unimodal.pipeline.errors import UnimodalError, UsageError
from unimodal.tokenize.vision.movq import MoVQ, MoVQConfig
from unimodal.tokenize.vision.tokenizer import VisionTokenizer

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


@pytest.fixture
def theirs(saved: Path, tmp_path: Path) -> Path:
    """The same tokenizer under the other naming."""
    VisionTokenizer.load(saved).save(tmp_path / "theirs", naming="transformers")
    return tmp_path / "theirs"


def test_either_public_naming_loads_to_the_same_tokenizer(saved: Path, theirs: Path) -> None:
    first, second = load_file(saved / "model.safetensors"), load_file(theirs / "model.safetensors")
    assert first.keys() != second.keys()
    assert VisionTokenizer.load(theirs).digest == VisionTokenizer.load(saved).digest


def test_the_original_naming_has_the_keys_of_the_released_configuration(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    assert config["model_type"] == "Emu3VisionVQ"
    released = "codebook_size embed_dim z_channels double_z in_channels out_channels ch ch_mult "
    released += "num_res_blocks attn_resolutions temporal_downsample_factor dropout"
    assert config.keys() >= set(released.split())


@pytest.mark.parametrize("naming", ["original", "transformers"])
def test_shards_with_an_index_load_and_a_missing_one_is_named(
    saved: Path, theirs: Path, naming: str
) -> None:
    folder = saved if naming == "original" else theirs
    digest = VisionTokenizer.load(folder).digest
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(state)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: state[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert VisionTokenizer.load(folder).digest == digest
    (folder / "b.safetensors").unlink()
    with pytest.raises(UnimodalError, match=r"b\.safetensors cannot be read"):
        VisionTokenizer.load(folder)
    for damaged in ("[]", '{"weight_map": {"a": 5}}', '{"weight_map": ["a"]}'):
        (folder / "model.safetensors.index.json").write_text(damaged)
        with pytest.raises(UnimodalError, match=r"index\.json: no index of shards"):
            VisionTokenizer.load(folder)


def test_of_a_multimodal_checkpoint_only_the_tokenizer_is_read(saved: Path, theirs: Path) -> None:
    state = load_file(theirs / "model.safetensors")
    config = json.loads((theirs / "config.json").read_text())
    (theirs / "config.json").write_text(json.dumps({"model_type": "emu3", "vq_config": config}))
    (theirs / "model.safetensors").unlink()
    inside = {f"vqmodel.{name}": tensor for name, tensor in state.items()}
    inside["lm_head.weight"] = torch.zeros(2, 2)
    save_file(inside, theirs / "model-1.safetensors")
    weight_map = dict.fromkeys(inside, "model-1.safetensors")
    weight_map["text_model.model.norm.weight"] = "model-2.safetensors"  # a file that is not there
    index = theirs / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert VisionTokenizer.load(theirs).digest == VisionTokenizer.load(saved).digest


def test_shapes_of_images_and_clips(saved: Path) -> None:
    tokenizer = VisionTokenizer.load(saved)
    codes = tokenizer.encode(torch.zeros(2, 1, 3, 16, 24))
    assert codes.shape == (2, 1, 2, 3)
    assert codes.dtype == torch.int64
    assert tokenizer.decode(codes, image=True).shape == (2, 1, 3, 16, 24)
    clip = tokenizer.encode(torch.zeros(2, 8, 3, 16, 24))
    assert clip.shape == (2, 2, 2, 3)
    assert tokenizer.decode(clip).shape == (2, 8, 3, 16, 24)
    # Sides that are no multiples of 8 lose the rest, also in several groups.
    assert tokenizer.encode(torch.zeros(1, 8, 3, 36, 47)).shape == (1, 2, 4, 5)


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("frames", [2, 3, 6])
def test_a_last_frame_is_repeated_to_fill_its_group(saved: Path, frames: int, joint: bool) -> None:
    tokenizer = VisionTokenizer.load(saved)
    clip = torch.rand(2, frames, 3, 16, 24) * 2 - 1
    filled = torch.cat([clip] + [clip[:, -1:]] * (-frames % 4), 1)
    assert torch.equal(tokenizer.encode(clip, joint), tokenizer.encode(filled, joint))


def test_a_code_is_the_same_in_the_other_memory_layout_but_for_near_ties(saved: Path) -> None:
    pixels = torch.rand(1, 4, 3, 64, 64) * 2 - 1
    codes = VisionTokenizer.load(saved).encode(pixels)
    other = VisionTokenizer.load(saved, channels_last=True)
    assert (
        other.model.encoder.down[1]
        .block[0]
        .conv1.weight.is_contiguous(memory_format=torch.channels_last)
    )
    assert (other.encode(pixels) == codes).float().mean() > 0.95
    assert other.digest == VisionTokenizer.load(saved).digest
    painted = VisionTokenizer.load(saved).decode(codes)
    torch.testing.assert_close(other.decode(codes), painted, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (torch.zeros(1, 3, 16, 16), r"pixels are \[1, 3, 16, 16\], not \[B, T, 3, H, W\]"),
        (torch.zeros(1, 1, 1, 16, 16), r"not \[B, T, 3, H, W\]"),
        (torch.zeros(1, 0, 3, 16, 16), r"not \[B, T, 3, H, W\]"),
        (torch.zeros(1, 1, 3, 16, 16, dtype=torch.uint8), "torch.uint8, not floating point"),
        (torch.zeros(1, 1, 3, 7, 16), r"sides \[7, 16\]: under 8 pixels"),
        (torch.full((1, 1, 3, 16, 16), torch.nan), "not all finite"),
    ],
)
def test_pixels_that_are_none_are_refused(saved: Path, pixels: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VisionTokenizer.load(saved).encode(pixels)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.tensor([[[[64]]]]), "codes 64 to 64: the codebook has 0 to 63"),
        (torch.tensor([[[[-1, 3]]]]), "codes -1 to 3"),
        (torch.zeros(1, 1, 2, 2), "torch.float32, not whole numbers"),
        (torch.zeros(2, 2, dtype=torch.int64), r"codes are \[2, 2\], not \[B, T', h, w\]"),
    ],
)
def test_codes_that_are_none_are_refused(saved: Path, codes: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VisionTokenizer.load(saved).decode(codes)


def test_an_image_has_one_latent_frame(saved: Path) -> None:
    with pytest.raises(ValueError, match=r"codes are \[1, 2, 2, 2\], not \[B, 1, h, w\]"):
        VisionTokenizer.load(saved).decode(torch.zeros(1, 2, 2, 2, dtype=torch.int64), image=True)


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


def test_many_missing_tensors_are_counted_by_place(saved: Path) -> None:
    state = load_file(saved / "model.safetensors")
    encoder = {name: t for name, t in state.items() if name.startswith("encoder.")}
    save_file(encoder, saved / "model.safetensors")
    with pytest.raises(UnimodalError) as error:
        VisionTokenizer.load(saved)
    count = len(state) - len(encoder)
    assert f"missing {count} tensors (" in str(error.value)
    assert "under decoder.up" in str(error.value) and len(str(error.value)) < 500


def test_whole_numbers_are_no_weights(saved: Path) -> None:
    state = load_file(saved / "model.safetensors")
    state["encoder.conv_in.bias"] = torch.zeros(32, dtype=torch.int8)
    save_file(state, saved / "model.safetensors")
    with pytest.raises(UnimodalError, match=r"encoder\.conv_in\.bias holds torch\.int8"):
        VisionTokenizer.load(saved)


def test_damaged_weights_are_named(saved: Path) -> None:
    whole = (saved / "model.safetensors").read_bytes()
    (saved / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UnimodalError, match=r"model\.safetensors cannot be read .*copy it again"):
        VisionTokenizer.load(saved)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "last.pt"])
def test_pickles_are_not_loaded(saved: Path, name: str) -> None:
    (saved / "model.safetensors").rename(saved / name)
    with pytest.raises(UnimodalError, match=f"{name}: a pickle, which can run code"):
        VisionTokenizer.load(saved)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ch": 4096}, "decoder.conv_in.bias is .32., not .4096."),  # 69 billion weights
        ({"ch": 10**12}, "config.json: ch is 1000000000000, not a whole number"),
        ({"ch": "32"}, "config.json: ch is '32'"),
        ({"codebook_size": 128}, "quantize.embedding.weight is .64, 4., not .128, 4."),
        ({"embed_dim": 8}, "config.json: z_channels 4 is not embed_dim 8"),
        ({"double_z": True}, "config.json: double_z is True; only False is supported"),
        ({"num_attention_heads": 8}, "num_attention_heads is 8; only 1"),
    ],
)
def test_a_hostile_configuration_is_refused_before_it_takes_memory(
    saved: Path, values: dict[str, object], message: str
) -> None:
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | values))
    with pytest.raises(UnimodalError, match=message):
        VisionTokenizer.load(saved)


@pytest.mark.parametrize("text", ["[]", "{", '{"vq_config": 3}', "[" * 100_000])
def test_a_configuration_that_is_no_object_is_refused(saved: Path, text: str) -> None:
    (saved / "config.json").write_text(text)
    with pytest.raises(UnimodalError, match=r"config\.json: not a tokenizer configuration"):
        VisionTokenizer.load(saved)
