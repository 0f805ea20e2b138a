"""Every public naming of a decoder: written by us, read by transformers, and the other way."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from transformers import Emu3ForCausalLM, Emu3ForConditionalGeneration
from transformers.models.emu3 import Emu3Config, Emu3TextConfig
from typer.testing import CliRunner

from unimodal.cli.app import app
from unimodal.model.decoder import Decoder, DecoderConfig, Shape
from unimodal.model.export import _emu3_tokenizer, export_model, strings, write_weights
from unimodal.model.naming import config_record, read_config
from unimodal.model.sample import Sampler
from unimodal.pipeline.errors import UnimodalError, UsageError
from unimodal.tokenize.text import TextTokenizer
from unimodal.tokenize.vision.tokenizer import VisionTokenizer
from unimodal.tokenize.vocabulary import (
    EMU3_IDS,
    EMU3_TEXT_IDS,
    EMU3_VISION_START,
    Vocabulary,
)

SHAPE = Shape(width=32, layers=2, heads=4, kv_heads=2, head_dim=8, ffn=48, init_std=0.2)


def _checkpoint(
    out: Path, vocabulary: Vocabulary, tokenizer: VisionTokenizer, shape: Shape = SHAPE
) -> Decoder:
    """A training checkpoint with random weights, as `train` leaves it."""
    decoder = Decoder(DecoderConfig(shape, vocabulary.size, 256), seed=4).eval()
    torch.manual_seed(2)
    for parameter in decoder.parameters():  # with all ones a lost norm would stay unseen
        if parameter.dim() == 1:
            parameter.data.uniform_(0.5, 1.5)
    step = out / "step-00000003"
    step.mkdir(parents=True)
    write_weights(decoder.state_dict(), step)
    (step / "config.json").write_text(json.dumps(config_record(decoder.config)))
    (out / "latest").write_text(step.name)
    vocabulary.save(out / "vocabulary")
    tokenizer.save(out / "vision_tokenizer")
    about = {
        "vocabulary": {"digest": vocabulary.digest()},
        "vision_tokenizer": {"digest": tokenizer.digest},
        "grids": [{"kind": "image", "size": [1, 4, 5], "fps": None, "samples": 9}],
    }
    (out / "data.json").write_text(json.dumps(about))
    return decoder


@pytest.fixture(scope="module")
def checkpoint(
    tmp_path_factory: pytest.TempPathFactory, vocabulary: Vocabulary, tokenizer: VisionTokenizer
) -> tuple[Path, Decoder]:
    path = tmp_path_factory.mktemp("checkpoint")
    return path, _checkpoint(path, vocabulary, tokenizer)


def _ids(size: int) -> torch.Tensor:
    return torch.randint(size, (2, 30), generator=torch.Generator().manual_seed(1))


def _names(directory: Path) -> set[str]:
    found: set[str] = set()
    for file in directory.glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            found |= set(weights.keys())
    return found


@torch.no_grad()
@pytest.mark.parametrize("naming", ["transformers-emu3", "llama"])
def test_transformers_gives_the_same_logits_on_an_export(
    naming: str, checkpoint: tuple[Path, Decoder], tmp_path: Path
) -> None:
    path, decoder = checkpoint
    command = ["export", "model", str(path), "-o", str(tmp_path / "out"), "--naming", naming]
    record = json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)
    name = "Emu3ForConditionalGeneration" if naming == "transformers-emu3" else "LlamaForCausalLM"
    assert record["class"] == name
    theirs, info = getattr(transformers, name).from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids = _ids(decoder.config.vocabulary_size)
    torch.testing.assert_close(decoder(ids), theirs.eval()(ids).logits, atol=1e-5, rtol=1e-5)
    again = Decoder.load(tmp_path / "out")
    assert again.config == decoder.config
    assert all(torch.equal(again.state_dict()[n], t) for n, t in decoder.state_dict().items())


@torch.no_grad()
def test_pixels_go_through_the_exported_vision_tokenizer_to_our_ids(
    checkpoint: tuple[Path, Decoder],
    vocabulary: Vocabulary,
    tokenizer: VisionTokenizer,
    tmp_path: Path,
) -> None:
    path, decoder = checkpoint
    export_model(path, tmp_path / "out", "transformers-emu3")
    theirs = Emu3ForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    pixels = torch.rand(1, 3, 32, 40, generator=torch.Generator().manual_seed(0)) * 2 - 1
    codes = tokenizer.encode(pixels[:, None])[0, 0]
    rows = torch.cat([codes + vocabulary.vision_start, torch.full((4, 1), vocabulary.eol)], dim=1)
    head = torch.tensor([vocabulary.bos, vocabulary.boi, 52, 42, 53, vocabulary.img])
    tail = torch.tensor([vocabulary.eof, vocabulary.eoi, 97])
    places = torch.full((20 + 4,), strings(vocabulary)["<image>"])
    seen = theirs(
        torch.cat([head, places, tail])[None],
        pixel_values=pixels,
        image_sizes=torch.tensor([[32, 40]]),
    ).logits
    ours = decoder(torch.cat([head, rows.flatten(), tail])[None])
    torch.testing.assert_close(ours, seen, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_what_transformers_saved_as_emu3_loads(
    checkpoint: tuple[Path, Decoder], tmp_path: Path
) -> None:
    export_model(checkpoint[0], tmp_path / "out", "transformers-emu3")
    record = json.loads((tmp_path / "out" / "config.json").read_text())
    whole = Emu3ForConditionalGeneration(Emu3Config(**record)).eval()
    whole.save_pretrained(tmp_path / "whole", max_shard_size="1MB")
    assert (tmp_path / "whole" / "model.safetensors.index.json").is_file()
    part = Emu3ForCausalLM(Emu3TextConfig(**record["text_config"])).eval()
    part.save_pretrained(tmp_path / "part")
    for theirs, path in [(whole, tmp_path / "whole"), (part, tmp_path / "part")]:
        ids = _ids(theirs.get_input_embeddings().num_embeddings)
        ours = Decoder.load(path)
        torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-5, rtol=1e-5)
    assert (
        VisionTokenizer.load(tmp_path / "whole").codebook_size
        == record["vq_config"]["codebook_size"]
    )


def test_the_original_naming_has_the_names_and_words_of_the_release(
    checkpoint: tuple[Path, Decoder], tmp_path: Path
) -> None:
    path, decoder = checkpoint
    export_model(path, tmp_path, "emu3")
    record = json.loads((tmp_path / "config.json").read_text())
    assert record["model_type"] == "Emu3" and record["rope_theta"] == 1e6
    assert record["image_area"] == 4 * 5 * 64 and record["boi_token_id"] == 260
    layer = {
        f"model.layers.{n}.{part}.weight"
        for n in range(2)
        for part in (
            *(f"self_attn.{x}_proj" for x in "qkvo"),
            *(f"mlp.{x}_proj" for x in ("gate", "up", "down")),
            "input_layernorm",
            "post_attention_layernorm",
        )
    }
    ends = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert _names(tmp_path) == layer | ends
    again = Decoder.load(tmp_path)
    same = SHAPE.model_copy(update={"head_dim": 0})  # the release has no word for it
    assert again.config.shape == same and again.config.context == 256
    assert torch.equal(again.lm_head.weight, decoder.lm_head.weight)


def test_an_export_is_a_checkpoint_that_draws_the_same_picture(
    checkpoint: tuple[Path, Decoder], tmp_path: Path
) -> None:
    export_model(checkpoint[0], tmp_path, "emu3")
    settings = {"size": (16, 24), "seed": 1, "top_k": 5}
    mine = Sampler.load(checkpoint[0]).images(["a"], **settings)
    theirs = Sampler.load(tmp_path).images(["a"], **settings)
    assert (mine[0][0] == theirs[0][0]).all()


def test_bfloat16_rounds_the_decoder_and_leaves_the_vision_tokenizer_exact(
    checkpoint: tuple[Path, Decoder], tokenizer: VisionTokenizer, tmp_path: Path
) -> None:
    export_model(checkpoint[0], tmp_path, "transformers-emu3", "bfloat16")
    rounded = checkpoint[1].lm_head.weight.bfloat16().float()
    assert torch.equal(Decoder.load(tmp_path).lm_head.weight, rounded)
    assert VisionTokenizer.load(tmp_path).digest == tokenizer.digest


def test_large_models_are_written_in_shards_that_both_read(
    checkpoint: tuple[Path, Decoder], tmp_path: Path
) -> None:
    decoder = checkpoint[1]
    export_model(checkpoint[0], tmp_path)
    (tmp_path / "model.safetensors").unlink()
    files = write_weights(decoder.state_dict(), tmp_path, limit=50_000)
    assert len(files) > 3 and all((tmp_path / f).stat().st_size < 60_000 for f in files)
    ids = _ids(decoder.config.vocabulary_size)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected = theirs(ids).logits
        torch.testing.assert_close(Decoder.load(tmp_path)(ids), expected, atol=1e-5, rtol=1e-5)
    (tmp_path / files[1]).unlink()
    with pytest.raises(UnimodalError, match=f"has no {files[1]}"):
        Decoder.load(tmp_path)


def test_an_index_that_points_outside_its_directory_is_refused(
    checkpoint: tuple[Path, Decoder], tmp_path: Path
) -> None:
    export_model(checkpoint[0], tmp_path)
    (tmp_path / "model.safetensors").unlink()
    index = {"weight_map": {"lm_head.weight": "../other.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UnimodalError, match="outside its directory"):
        Decoder.load(tmp_path)


@pytest.mark.parametrize("kind", ["bytes", "tiktoken", "tokenizer.json"])
def test_the_exported_text_tokenizer_gives_our_ids(
    kind: str, tokenizer: VisionTokenizer, tmp_path: Path
) -> None:
    if kind == "tiktoken":
        merged = [b"th", b"the", b" the", b"in", b"12", b"ing", b"\n\n", b"\xc3\xa9"]
        tokens = [bytes([byte]) for byte in range(256)] + merged
        lines = [f"{base64.b64encode(t).decode()} {i}" for i, t in enumerate(tokens)]
        (tmp_path / "some.tiktoken").write_text("\n".join(lines))
        text = TextTokenizer.load(tmp_path / "some.tiktoken")
    elif kind == "tokenizer.json":
        from tokenizers import Tokenizer, models, pre_tokenizers

        words = Tokenizer(models.WordLevel({"the": 0, "thing": 1, "?": 2}, unk_token="?"))
        words.pre_tokenizer = pre_tokenizers.Whitespace()
        words.save(str(tmp_path / "tokenizer.json"))
        text = TextTokenizer.load(tmp_path / "tokenizer.json")
    else:
        text = TextTokenizer.load("bytes")
    vocabulary = Vocabulary.build(text, 64)
    _checkpoint(tmp_path / "checkpoint", vocabulary, tokenizer)
    export_model(tmp_path / "checkpoint", tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for line in ["the thing  in\n\n\nthe end 1234", "e\u0301tude \t\t", "it's 12*34"]:
        assert theirs(line, add_special_tokens=False).input_ids == text.encode(line)
    ids = [vocabulary.bos, vocabulary.img, vocabulary.vision_start + 63, vocabulary.eol]
    written = "<|extra_203|><|image token|><|visual token 000063|><|extra_200|>"
    assert theirs(written, add_special_tokens=False).input_ids == ids
    assert theirs.eos_token_id == vocabulary.eos and theirs.boi_token == "<|image start|>"


def test_emu3s_own_tokenizer_finds_its_two_files(tmp_path: Path) -> None:
    ranks = [f"{base64.b64encode(bytes([i])).decode()} {i}" for i in range(256)]
    (tmp_path / "few.tiktoken").write_text("\n".join(ranks))
    text = TextTokenizer.load(tmp_path / "few.tiktoken")  # only the ids behind it matter here
    vocabulary = Vocabulary(text, **EMU3_IDS, vision_start=EMU3_VISION_START, codebook_size=5)
    vocabulary.save(tmp_path / "vocabulary")
    files = _emu3_tokenizer(vocabulary, tmp_path)
    assert files == ["emu3.tiktoken", "emu3_vision_tokens.txt"]
    assert (tmp_path / files[0]).read_bytes() == (tmp_path / "few.tiktoken").read_bytes()
    # Its class counts ids from 151,643: three, then <|extra_0|> to <|extra_204|>, then this file.
    names = (tmp_path / files[1]).read_text().splitlines()
    assert len(names) == 3 + 5
    found = {name: EMU3_TEXT_IDS + 3 + 205 + line for line, name in enumerate(names)}
    assert found.items() <= strings(vocabulary).items()
    assert found["<|visual token 000004|>"] == EMU3_VISION_START + 4
    assert strings(vocabulary)["<image>"] == 151_646  # transformers' name of <|extra_0|>


def test_what_a_naming_cannot_say_and_full_folders_are_refused(
    checkpoint: tuple[Path, Decoder],
    vocabulary: Vocabulary,
    tokenizer: VisionTokenizer,
    tmp_path: Path,
) -> None:
    with pytest.raises(UsageError, match="naming hf: give one of emu3, transformers-emu3, llama"):
        export_model(checkpoint[0], tmp_path / "out", "hf")
    with pytest.raises(UsageError, match="dtype int8: give one of float32, bfloat16"):
        export_model(checkpoint[0], tmp_path / "out", "llama", "int8")
    normed = SHAPE.model_copy(update={"qk_norm": True})
    _checkpoint(tmp_path / "normed", vocabulary, tokenizer, normed)
    with pytest.raises(UsageError, match="emu3 has no norm of q and k"):
        export_model(tmp_path / "normed", tmp_path / "out", "emu3")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="is not empty"):
        export_model(checkpoint[0], tmp_path / "normed")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_type 'linear' is not supp"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_type 'yarn' is not supported"),
        ({"rope_scaling": "x"}, "its rope parameters are 'x', no object"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
    ],
)
def test_a_config_of_another_graph_is_refused(
    tmp_path: Path, changed: dict[str, object], message: str
) -> None:
    file = tmp_path / "config.json"
    record = config_record(DecoderConfig(SHAPE, 301, 64))
    record.pop("rope_parameters", None)
    file.write_text(json.dumps(record | {"rope_scaling": {"type": "default"}}))
    assert read_config(file).shape.width == SHAPE.width
    file.write_text(json.dumps(record | changed))
    with pytest.raises(UnimodalError, match=f"config.json: .*{message}"):
        read_config(file)
