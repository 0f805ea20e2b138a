"""Emu3's own layouts, written by transformers, against what transformers makes of them."""

from __future__ import annotations

import base64
import importlib.util
import json
import math
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    Emu3ForCausalLM,
    Emu3ForConditionalGeneration,
    Emu3ImageProcessor,
    Emu3Processor,
    Emu3VQVAE,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.models.emu3 import Emu3Config, Emu3TextConfig, Emu3VQVAEConfig

from unimodal.model import emu3
from unimodal.model.choice import Choice
from unimodal.model.emu3 import is_emu3, load
from unimodal.model.grammar import BlockGrammar
from unimodal.model.naming import read_config
from unimodal.model.sample import Sampler
from unimodal.pipeline.errors import MediaError, UnimodalError, UsageError
from unimodal.tokenize.vision.movq import MoVQ, MoVQConfig
from unimodal.tokenize.vision.tokenizer import VisionTokenizer
from unimodal.tokenize.vocabulary import Vocabulary

MERGED = [b"th", b"the", b" a", b" th", b" the", b"in", b"an", b"is", b"?.", b"12", b"er", b"\n\n"]
TOKENS = [bytes([byte]) for byte in range(256)] + MERGED
CODES = 64
NEGATIVE = (
    "lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, fewer digits, "
    "cropped, worst quality, low quality, normal quality, jpeg artifacts, signature, watermark, "
    "username, blurry."
)
"""Of the release's script."""
PROMPTS = ["a red kite", "the sea in the rain.", ""]
QUESTION = "what is this?"
AREA = (1024, 4096)
"""Bounds of a picture's area that fit the small models."""
H, W = 3, 4
"""The grid that is drawn, in codes."""


def names() -> list[str]:
    """Of all ids behind the text, in the order of the release."""
    listed = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    listed += [f"<|extra_{i}|>" for i in range(205)]
    listed += ["<|image token|>", "<|image start|>", "<|image end|>"]
    return listed + [f"<|visual token {code:06d}|>" for code in range(CODES)]


IDS = {name: len(TOKENS) + place for place, name in enumerate(names())}
BOS, EOS, PAD = IDS["<|extra_203|>"], IDS["<|extra_204|>"], IDS["<|endoftext|>"]
IMG, BOI, EOI = (IDS[f"<|image {name}|>"] for name in ("token", "start", "end"))
EOL, EOF = IDS["<|extra_200|>"], IDS["<|extra_201|>"]
START = IDS["<|visual token 000000|>"]
TEXT = Emu3TextConfig(
    vocab_size=len(TOKENS) + len(IDS),
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    pad_token_id=PAD,
    bos_token_id=BOS,
    eos_token_id=EOS,
)
VQ = Emu3VQVAEConfig(
    codebook_size=CODES,
    base_channels=32,
    channel_multiplier=[1, 2, 2, 4],
    attn_resolutions=[3],
    hidden_size=128,
    num_res_blocks=1,
)


def shaken(model: torch.nn.Module) -> None:
    """Random values everywhere, also where a new network has zeros and ones."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif "vqmodel" not in name and "coder" not in name and "quant" not in name:
                parameter.normal_(0, 0.2)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.uniform_(-0.2, 0.2)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)


# --- the two layouts -----------------------------------------------------------------------


def original_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A vision tokenizer's tensors as BAAI names them, from transformers' names (EMU3.md, 2.9)."""
    renamed = {}
    for name, tensor in state.items():
        name = re.sub(r"\.(down_block|up_block)\.", ".", name)
        name = name.replace(".middle_block.", ".mid.").replace(".attn_norm.", ".attn_1.norm.")
        name = re.sub(r"\.attn_norms\.(\d)\.", r".attn.\1.norm.", name)
        if found := re.search(r"\.(q|k|v|out)_proj\.", name):
            name = name.replace(found[0], f".{'proj_out' if found[1] == 'out' else found[1]}.")
            tensor = tensor[:, :, None, None] if tensor.dim() == 2 else tensor
        renamed[name] = tensor.contiguous()
    return renamed


@pytest.fixture(scope="module")
def models() -> tuple[Emu3ForCausalLM, Emu3VQVAE, Emu3ForConditionalGeneration]:
    """The same networks as two classes of transformers and as one."""
    torch.manual_seed(3)
    config = Emu3Config(
        vq_config=VQ, text_config=TEXT, vocabulary_map=IDS | {"<image>": IDS["<|extra_0|>"]}
    )
    whole = Emu3ForConditionalGeneration(config).eval()
    shaken(whole)
    text, vision = Emu3ForCausalLM(TEXT).eval(), Emu3VQVAE(VQ).eval()
    text.model.load_state_dict(whole.model.text_model.state_dict())
    text.lm_head.load_state_dict(whole.lm_head.state_dict())
    vision.load_state_dict(whole.model.vqmodel.state_dict())
    return text, vision, whole


@pytest.fixture(scope="module")
def released(models: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A directory in the layout of BAAI/Emu3-Gen, -Chat or -Stage1, its vision tokenizer beside."""
    text, vision, _ = models
    root = tmp_path_factory.mktemp("BAAI")
    seeing = root / "Emu3-VisionTokenizer"
    seeing.mkdir()
    save_file(original_names(vision.state_dict()), seeing / "model.safetensors", {"format": "pt"})
    record = {
        **{"model_type": "Emu3VisionVQ", "architectures": ["Emu3VisionVQModel"]},
        **{"codebook_size": CODES, "embed_dim": 4, "z_channels": 4, "double_z": False},
        **{"in_channels": 3, "out_channels": 3, "ch": 32, "ch_mult": [1, 2, 2, 4]},
        **{"num_res_blocks": 1, "attn_resolutions": [3], "temporal_downsample_factor": 4},
        **{"dropout": 0.0, "auto_map": {"AutoModel": "modeling_emu3visionvq.Emu3VisionVQModel"}},
    }
    (seeing / "config.json").write_text(json.dumps(record))
    pixels = {"min_pixels": AREA[0], "max_pixels": AREA[1], "spatial_factor": 8, "resample": 3}
    pixels |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_resize": True}
    (seeing / "preprocessor_config.json").write_text(json.dumps(pixels))

    def make(name: str) -> Path:
        path = root / name
        if path.exists():
            return path
        text.save_pretrained(path, max_shard_size="100KB")
        assert len(list(path.glob("model-*-of-*.safetensors"))) > 3
        record = {
            **{"architectures": ["Emu3ForCausalLM"], "model_type": "Emu3"},
            "auto_map": {"AutoModelForCausalLM": "modeling_emu3.Emu3ForCausalLM"},
            **{"attention_dropout": 0.1, "hidden_act": "silu", "hidden_size": 64},
            **{"initializer_range": 0.02, "intermediate_size": 96, "num_hidden_layers": 2},
            **{"num_attention_heads": 4, "num_key_value_heads": 2, "pretraining_tp": 1},
            **{"max_position_embeddings": 512, "rms_norm_eps": 1e-05, "rope_scaling": None},
            **{"rope_theta": 1000000.0, "tie_word_embeddings": False, "use_cache": True},
            **{"vocab_size": TEXT.vocab_size, "image_area": H * H * 64, "torch_dtype": "float32"},
            **{"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS},
            **{"img_token_id": IMG, "boi_token_id": BOI, "eoi_token_id": EOI},
            **{"eol_token_id": EOL, "eof_token_id": EOF},
        }
        (path / "config.json").write_text(json.dumps(record))
        lines = [f"{base64.b64encode(t).decode()} {i}" for i, t in enumerate(TOKENS)]
        (path / "emu3.tiktoken").write_text("\n".join(lines) + "\n")
        (path / "emu3_vision_tokens.txt").write_text("\n".join(names()[208:]) + "\n")
        record = {"tokenizer_class": "Emu3Tokenizer", "bos_token": "<|extra_203|>"}
        record |= {"eos_token": "<|extra_204|>", "pad_token": "<|endoftext|>"}
        (path / "tokenizer_config.json").write_text(json.dumps(record))
        generation = {"_from_model_config": True, "bos_token_id": BOS, "eos_token_id": EOS}
        (path / "generation_config.json").write_text(json.dumps(generation))
        for file in ("modeling_emu3.py", "tokenization_emu3.py", "processing_emu3.py"):
            (path / file).write_text("raise SystemExit('code of a checkpoint was executed')\n")
        return path

    return make


@pytest.fixture(scope="module")
def converted(models: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One directory as transformers saves it, with its processor."""
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers import models as kinds
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = bytes_to_unicode()
    printed = ["".join(letters[byte] for byte in token) for token in TOKENS]
    parts = {b"the": (b"th", b"e"), b" th": (b" ", b"th"), b" the": (b" ", b"the")}
    merges = []
    for token in MERGED:
        one, two = parts.get(token, (token[:1], token[1:]))
        merges.append(tuple("".join(letters[byte] for byte in part) for part in (one, two)))
    listed = [name if name != "<|extra_0|>" else "<image>" for name in names()]
    vocab = {token: i for i, token in enumerate([*printed, *listed])}
    inner = Tokenizer(kinds.BPE(vocab, merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in listed])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<|extra_203|>",
        eos_token="<|extra_204|>",
        pad_token="<|endoftext|>",
        extra_special_tokens={
            "image_token": "<image>",
            "boi_token": "<|image start|>",
            "eoi_token": "<|image end|>",
            "image_wrapper_token": "<|image token|>",
            "eof_token": "<|extra_201|>",
        },
    )
    images = Emu3ImageProcessor(
        min_pixels=AREA[0], max_pixels=AREA[1], image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    path = tmp_path_factory.mktemp("converted") / "Emu3-Chat-hf"
    models[2].save_pretrained(path, max_shard_size="4MB")
    Emu3Processor(images, tokenizer).save_pretrained(path)
    return path


# --- what transformers, and the release's own text, make of them -----------------------------


def literal(text: str) -> list[int]:
    """Ids as the release's tokenizer gives them: one line of text, control tokens and all."""
    import tiktoken

    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    ranks = {token: rank for rank, token in enumerate(TOKENS)}
    bpe = tiktoken.Encoding("Emu3", pat_str=pattern, mergeable_ranks=ranks, special_tokens=IDS)
    return bpe.encode(text, allowed_special="all")


def allowed_in_a_picture(prompt: Sequence[int]) -> Callable[[int, torch.Tensor], list[int]]:
    """The release's constraint, by how far a sequence is behind its image token."""
    first, codes = len(prompt), list(range(START, START + CODES))

    def allowed(_: int, ids: torch.Tensor) -> list[int]:
        off = len(ids) - first + 1
        if off % (W + 1) == 0:
            return [EOL]
        tail = {H * (W + 1) + 1: EOF, H * (W + 1) + 2: EOI, H * (W + 1) + 3: EOS}
        return [tail[off]] if off in tail else codes

    return allowed


@torch.no_grad()
def drawn_by_transformers(
    model: Any, context: list[int], empty: list[int], guidance: float
) -> np.ndarray:
    """The codes [H, W] of greedy, guided generation."""
    guide = UnbatchedClassifierFreeGuidanceLogitsProcessor(
        guidance, model, unconditional_ids=torch.tensor([empty])
    )
    ids = model.generate(
        torch.tensor([context]),
        do_sample=False,
        max_new_tokens=H * (W + 1) + 3,
        prefix_allowed_tokens_fn=allowed_in_a_picture(context),
        logits_processor=LogitsProcessorList([guide] if guidance != 1 else []),
    )[0, len(context) :].tolist()
    assert ids[-3:] == [EOF, EOI, EOS] and ids[W] == EOL
    return np.array(ids[:-3]).reshape(H, W + 1)[:, :W] - START


@torch.no_grad()
def written_by_transformers(model: Any, inputs: dict[str, Any], count: int) -> list[int]:
    """Greedy text behind a prompt, its EOS left out."""
    text = [*range(len(TOKENS)), EOS]
    start = inputs["input_ids"].shape[1]
    ids = model.generate(
        **inputs,
        do_sample=False,
        max_new_tokens=count,
        prefix_allowed_tokens_fn=lambda *_: text,
    )[0, start:].tolist()
    return ids[: ids.index(EOS)] if EOS in ids else ids


def drawn(sampler: Sampler, guidance: float) -> list[np.ndarray]:
    """Our greedy codes of `PROMPTS`."""
    greedy, grammar = Choice(temperature=None), sampler.canvas.grammar(H, W)
    rows = sampler.codes(PROMPTS, grammar, guidance=guidance, choice=greedy)
    return [codes for (codes,) in rows]


def picture(height: int, width: int) -> np.ndarray:
    """Something with edges, so that codes differ from place to place."""
    rng = np.random.default_rng(height * 1000 + width)
    small = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.NEAREST))


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("name", ["Emu3-Gen", "Emu3-Stage1"])
def test_the_original_layout_draws_what_transformers_generates_token_for_token(
    released: Callable[[str], Path], models: Any, name: str, guidance: float
) -> None:
    sampler = Sampler.load(released(name), device="cpu")
    suffix, negative = "", ""
    if name == "Emu3-Gen":
        suffix, negative = " masterpiece, film grained, best quality.", NEGATIVE
    ours = drawn(sampler, guidance)
    opening = f"<|image start|>{H}*{W}<|image token|>"
    for prompt, codes in zip(PROMPTS, ours, strict=True):
        context = literal(f"<|extra_203|>{prompt}{suffix}{opening}")
        empty = literal(f"<|extra_203|>{negative}{opening}")
        theirs = drawn_by_transformers(models[0], context, empty, guidance)
        assert codes.tolist() == theirs.tolist()
    assert len({codes.tobytes() for codes in ours}) == len(PROMPTS)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_layout_of_transformers_draws_the_same_tokens_and_pictures(
    converted: Path, guidance: float
) -> None:
    theirs = Emu3ForConditionalGeneration.from_pretrained(converted).eval()
    processor = Emu3Processor.from_pretrained(converted)
    sampler = Sampler.load(converted, device="cpu")
    ours = drawn(sampler, guidance)
    shown = sampler.images(PROMPTS, size=(8 * H, 8 * W), guidance=guidance, top_k=1)
    for prompt, codes, (image,) in zip(PROMPTS, ours, shown, strict=True):
        given = [
            processor(
                text=text, return_for_image_generation=True, ratio=f"{W}:{H}", image_area=H * W * 64
            )
            for text in (prompt, "")
        ]
        assert given[0]["image_sizes"] == [[H, W]]
        context, empty = (one["input_ids"][0] for one in given)
        found = drawn_by_transformers(theirs, context, empty, guidance)
        assert codes.tolist() == found.tolist()
        rows = np.pad(found + START, ((0, 0), (0, 1)), constant_values=EOL).reshape(-1)
        ids = torch.from_numpy(np.concatenate([rows, [EOF, EOI, EOS]]))[None]
        with torch.no_grad():
            pixels = theirs.decode_image_tokens(image_tokens=ids, height=H, width=W)
        (painted,) = processor.postprocess(list(pixels.float()))["pixel_values"]
        assert np.abs(np.asarray(painted).astype(int) - image).max() <= 1
        assert image.std() > 3


@pytest.mark.parametrize("size", [(40, 48), (61, 83), (300, 200), (16, 24), (33, 160)])
def test_pictures_have_the_codes_of_transformers_at_the_size_of_its_processor(
    released: Callable[[str], Path], converted: Path, models: Any, size: tuple[int, int]
) -> None:
    pixels = picture(*size)
    processor = Emu3Processor.from_pretrained(converted).image_processor
    given = processor(Image.fromarray(pixels), return_tensors="pt")
    with torch.no_grad():
        (expected,) = models[1].encode(given["pixel_values"], given["image_sizes"]).image_tokens
    assert len(expected.unique()) > 5
    for path in (released("Emu3-Chat"), converted):
        codes = Sampler.load(path, device="cpu").canvas.encode(pixels)
        assert codes.tolist() == expected.tolist()


def test_bounds_of_a_picture_are_the_processors_and_else_the_releases(
    released: Callable[[str], Path], converted: Path, tmp_path: Path
) -> None:
    chat = Sampler.load(released("Emu3-Chat"), device="cpu")
    with pytest.raises(MediaError, match="more than 5 times"):
        chat.describe([picture(16, 100)])
    assert Sampler.load(converted, device="cpu").canvas.encode(picture(16, 100)).shape == (2, 12)
    seeing = shutil.copytree(released("Emu3-Chat").parent / "Emu3-VisionTokenizer", tmp_path / "v")
    (seeing / "preprocessor_config.json").unlink()
    manner = load(released("Emu3-Chat"), tokenizer=seeing).manner
    # EMU3.md, 2.7: small pictures grow to 512 x 512, large ones shrink to 1024 x 1024.
    assert manner.size(600, 700) == (600, 704)
    assert manner.size(100, 200) == (368, 728)
    assert manner.size(2000, 1000) == (1448, 720)


def test_stage_1_describes_by_going_on_behind_the_picture(
    released: Callable[[str], Path], models: Any
) -> None:
    sampler = Sampler.load(released("Emu3-Stage1"), device="cpu")
    pixels = picture(40, 48)
    context = literal(f"<|extra_203|>{block(sampler.canvas.encode(pixels))}")
    theirs = written_by_transformers(models[0], {"input_ids": torch.tensor([context])}, 24)
    assert sampler.describe([pixels], max_tokens=24) == [sampler.vocabulary.text.decode(theirs)]


def block(codes: np.ndarray) -> str:
    """A vision block as the release's processor writes it."""
    rows = ["".join(f"<|visual token {code:06d}|>" for code in row) for row in codes]
    inside = "<|extra_200|>".join(rows) + "<|extra_200|><|extra_201|>"
    height, width = codes.shape
    return f"<|image start|>{height}*{width}<|image token|>{inside}<|image end|>"


def test_chat_answers_to_the_releases_literal_template(
    released: Callable[[str], Path], models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = Sampler.load(released("Emu3-Chat"), device="cpu")
    assert sampler.defaults.max_tokens == 1024 and sampler.defaults.text_temperature is None
    pixels, asked = picture(40, 48), []
    seen = block(sampler.canvas.encode(pixels))
    answers = [
        sampler.describe([pixels], max_tokens=24)[0],
        sampler.ask([[pixels]], [QUESTION], max_tokens=24)[0],
        sampler.ask([[]], [QUESTION], max_tokens=24)[0],
    ]
    head = "<|extra_203|>You are a helpful assistant. USER: "
    for image, question, answer in zip(
        [seen, seen, ""], ["Please describe the image", QUESTION, QUESTION], answers, strict=True
    ):
        context = literal(f"{head}{image}{question}. ASSISTANT:")
        theirs = written_by_transformers(models[0], {"input_ids": torch.tensor([context])}, 24)
        assert answer == sampler.vocabulary.text.decode(theirs)
        asked.append(context)
    # "?." is one id of this vocabulary: encoded apart, the prompt would be another one.
    assert TOKENS.index(b"?.") in asked[1]
    assert len(set(answers)) == 3


def test_the_layout_of_transformers_answers_to_its_own_template(converted: Path) -> None:
    theirs = Emu3ForConditionalGeneration.from_pretrained(converted).eval()
    processor = Emu3Processor.from_pretrained(converted)
    sampler = Sampler.load(converted, device="cpu")
    pixels = picture(40, 48)
    answers = [
        sampler.describe([pixels], max_tokens=24)[0],
        sampler.ask([[pixels]], [QUESTION], max_tokens=24)[0],
    ]
    for question, answer in zip(["Please describe the image.", QUESTION], answers, strict=True):
        text = f"You are a helpful assistant. USER: <image>{question} ASSISTANT:"
        given = processor(text=text, images=[Image.fromarray(pixels)], return_tensors="pt")
        wanted = ("input_ids", "pixel_values", "image_sizes")
        ids = written_by_transformers(theirs, {key: given[key] for key in wanted}, 24)
        assert answer == sampler.vocabulary.text.decode(ids)
    assert answers[0] != answers[1]


def test_further_turns_follow_the_first(released: Callable[[str], Path]) -> None:
    parts = load(released("Emu3-Chat"))
    ids = parts.manner.prompt(parts.vocabulary, [[BOI, IMG, EOI]], ["one?", "two", "three"])
    whole = "<|extra_203|>You are a helpful assistant. USER: <|image start|><|image token|>"
    whole += "<|image end|>one?. ASSISTANT:two<|extra_204|>USER: three. ASSISTANT:"
    assert ids == literal(whole)


# --- what the files say ----------------------------------------------------------------------


def test_ids_are_where_the_files_say_in_both_layouts(
    released: Callable[[str], Path], converted: Path, tmp_path: Path
) -> None:
    original, theirs = (load(path).vocabulary for path in (released("Emu3-Gen"), converted))
    for vocabulary in (original, theirs):
        assert vocabulary.text.size == len(TOKENS)
        assert vocabulary.specials == {
            **{"pad": PAD, "bos": BOS, "eos": EOS, "img": IMG, "boi": BOI, "eoi": EOI},
            **{"eol": EOL, "eof": EOF},
        }
        assert (vocabulary.vision_start, vocabulary.codebook_size) == (START, CODES)
        assert vocabulary.text.encode("the <|image start|>") == [
            *literal("the "),
            *vocabulary.text.encode("<|image start|>"),
        ]
        assert max(vocabulary.text.encode("<|image start|><image>")) < vocabulary.text.size
        vocabulary.save(tmp_path / vocabulary.text.name)
        again = Vocabulary.load(tmp_path / vocabulary.text.name)
        assert again == vocabulary and again.digest() == vocabulary.digest()
    # transformers' tokenizer takes runs of newlines otherwise (EMU3.md, 3.3).
    assert original.text.encode("a\n\nb") == literal("a\n\nb")


@pytest.fixture(scope="module")
def full_size(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The release's own files as far as they are known, a vision tokenizer with all its codes
    beside them; of the weights there is the index alone."""
    spec = importlib.util.find_spec("dashscope")
    ranks = [
        Path(p) / "resources/qwen.tiktoken" for p in getattr(spec, "submodule_search_locations", [])
    ]
    if not ranks or not ranks[0].is_file():
        pytest.skip("the package dashscope, which carries Qwen's ranks, is not installed")
    path = tmp_path_factory.mktemp("full") / "model"
    path.mkdir()
    record = {
        **{"architectures": ["Emu3ForCausalLM"], "model_type": "Emu3", "attention_dropout": 0.1},
        **{"hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336},
        **{"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8},
        **{"rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 1000000.0},
        **{"tie_word_embeddings": False, "vocab_size": 184622, "max_position_embeddings": 9216},
        **{"pad_token_id": 151643, "bos_token_id": 151849, "eos_token_id": 151850},
        **{"img_token_id": 151851, "boi_token_id": 151852, "eoi_token_id": 151853},
        **{"eol_token_id": 151846, "eof_token_id": 151847, "image_area": 518400},
    }
    (path / "config.json").write_text(json.dumps(record))
    shutil.copy2(ranks[0], path / "emu3.tiktoken")
    lines = ["<|image token|>", "<|image start|>", "<|image end|>"]
    lines += [f"<|visual token {code:06d}|>" for code in range(32768)]
    (path / "emu3_vision_tokens.txt").write_text("\n".join(lines) + "\n")
    (path / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    VisionTokenizer(MoVQ(MoVQConfig(ch=32, num_res_blocks=1))).save(path / "vision_tokenizer")
    return path


@pytest.mark.slow
def test_the_release_at_full_size_has_its_published_ids_and_prompts(
    full_size: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gen = load(full_size)
    ids, text = gen.vocabulary, gen.vocabulary.text
    assert gen.kind == "gen" and gen.grids[0]["size"] == [1, 90, 90]
    assert ids == Vocabulary.emu3(full_size / "emu3.tiktoken") and ids.size == 184_622
    # What follows are ids of EMU3.md, 3.3.
    prompt = "a portrait of young girl." + gen.defaults.suffix
    golden = "64 33033 315 3908 3743 13 58731 11 4531 1081 2627 11 1850 4271 13"
    assert text.encode(prompt) == [int(i) for i in golden.split()]
    rewrite(full_size / "config.json", max_position_embeddings=131072, image_area=262144)
    chat = load(full_size)
    assert chat.kind == "chat" and chat.grids[0]["size"] == [1, 64, 64]
    opening = BlockGrammar(ids, 64, 64).opening
    asked = chat.manner.prompt(ids, [opening], [chat.defaults.describe])
    golden = "151849 2610 525 264 10950 17847 13 13872 25 220 151852 21 19 9 21 19 151851"
    golden += " 5501 7512 279 2168 13 35560 3846 2821 25"
    assert asked == [int(i) for i in golden.split()]
    monkeypatch.setattr(emu3, "_free", lambda _: 20e9)
    with pytest.raises(UnimodalError, match="takes 34 GB as float32, 20 GB of memory are free"):
        emu3.check_room(full_size, "cpu", torch.float32)
    emu3.check_room(full_size, "cpu", torch.bfloat16)  # 17 GB


def test_what_older_versions_of_transformers_left_out_is_the_release(tmp_path: Path) -> None:
    """They wrote of a nested config only what differs from the class, which is the release's."""
    nested = {"max_position_embeddings": 131072, "rope_scaling": {"rope_type": "default"}}
    record = {"model_type": "emu3", "text_config": nested, "vq_config": {}}
    (tmp_path / "config.json").write_text(json.dumps(record))
    found, theirs = read_config(tmp_path / "config.json"), Emu3TextConfig()
    assert (found.vocabulary_size, found.context) == (theirs.vocab_size, 131072)
    shape = found.shape
    assert (shape.width, shape.layers, shape.ffn) == (
        *(theirs.hidden_size, theirs.num_hidden_layers, theirs.intermediate_size),
    )
    assert (shape.heads, shape.kv_heads) == (32, 8)
    assert (shape.norm_eps, shape.rope_theta) == (theirs.rms_norm_eps, 1e6)


@pytest.mark.parametrize(
    ("changed", "name", "kind"),
    [
        ({"max_position_embeddings": 9216, "image_area": 518400}, "mine", "gen"),
        ({"max_position_embeddings": 5120}, "mine", "stage1"),
        ({"max_position_embeddings": 131072}, "mine", "chat"),
        ({"image_area": 518400}, "mine", "gen"),
        ({}, "Emu3-Gen-mine", "gen"),
        ({}, "my-emu3-chat", "chat"),
        ({}, "Emu3-Stage-1", "stage1"),
        ({}, "generic", "stage1"),
    ],
)
def test_which_checkpoint_it_is_follows_from_its_config_or_its_name(
    released: Callable[[str], Path],
    tmp_path: Path,
    changed: dict[str, int],
    name: str,
    kind: str,
) -> None:
    path = shutil.copytree(released("Emu3-Gen"), tmp_path / name)
    rewrite(path / "config.json", **changed)
    seeing = path.parent / "elsewhere"
    shutil.copytree(released("Emu3-Gen").parent / "Emu3-VisionTokenizer", seeing)
    parts = load(path, tokenizer=seeing)
    assert parts.kind == kind
    area = changed.get("image_area", H * H * 64)
    side = round(math.sqrt(area) / 8)
    assert parts.grids[0]["size"] == [1, side, side]
    assert parts.defaults.guidance == 3.0 and parts.defaults.top_k == 2048
    assert bool(parts.defaults.suffix) == bool(parts.defaults.negative) == (kind == "gen")
    assert bool(parts.defaults.describe) == (kind == "chat")
    assert load(path, tokenizer=seeing, kind="gen").kind == "gen"
    with pytest.raises(UsageError, match="kind base: give one of gen, stage1, chat"):
        load(path, tokenizer=seeing, kind="base")


def rewrite(file: Path, **changed: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))


def test_without_a_word_on_area_it_is_that_of_the_release(converted: Path, tmp_path: Path) -> None:
    assert load(converted).grids[0]["size"] == [1, 64, 64]  # 512 x 512
    assert load(converted, kind="gen").grids[0]["size"] == [1, 90, 90]  # 720 x 720


def test_generation_config_says_how_it_is_sampled(
    released: Callable[[str], Path], tmp_path: Path
) -> None:
    shutil.copytree(released("Emu3-Gen").parent, tmp_path / "both")
    told = {"do_sample": True, "temperature": 0.7, "top_k": 16384, "top_p": 0.9}
    for name in ("Emu3-Gen", "Emu3-Chat"):
        path = tmp_path / "both" / name
        if not path.exists():
            shutil.copytree(released(name), path)
        rewrite(path / "generation_config.json", **told, guidance_scale=5.0, max_new_tokens=320)
    gen, chat = (load(tmp_path / "both" / name).defaults for name in ("Emu3-Gen", "Emu3-Chat"))
    assert (gen.temperature, gen.top_k, gen.top_p, gen.guidance) == (0.7, 16384, 0.9, 5.0)
    assert gen.text_temperature is None and gen.max_tokens == 256
    assert (chat.text_temperature, chat.text_top_k, chat.text_top_p) == (0.7, 16384, 0.9)
    assert (chat.temperature, chat.top_k, chat.max_tokens) == (1.0, 2048, 320)
    rewrite(tmp_path / "both" / "Emu3-Gen" / "generation_config.json", temperature="warm")
    with pytest.raises(UnimodalError, match=r"generation_config.json: .*temperature.*remove the f"):
        load(tmp_path / "both" / "Emu3-Gen")


def test_the_vision_tokenizer_is_found_inside_beside_or_where_it_is_said(
    released: Callable[[str], Path], tmp_path: Path
) -> None:
    path = shutil.copytree(released("Emu3-Gen"), tmp_path / "Emu3-Gen")
    seeing = released("Emu3-Gen").parent / "Emu3-VisionTokenizer"
    with pytest.raises(UnimodalError, match=r"has no vision tokenizer: download BAAI/Emu3-Vision"):
        load(path)
    digest = load(path, tokenizer=seeing).tokenizer.digest
    shutil.copytree(seeing, path / "vision_tokenizer")
    assert load(path).tokenizer.digest == digest


def test_weights_are_read_once_in_the_dtype_that_is_wanted(
    released: Callable[[str], Path], models: Any
) -> None:
    sampler = Sampler.load(released("Emu3-Gen"), device="cpu", weights="bfloat16")
    decoder = sampler.decoder
    assert decoder.compute == torch.bfloat16
    state = models[0].state_dict()
    for name, tensor in decoder.state_dict().items():
        kept = state[name].bfloat16() if tensor.dim() > 1 else state[name]
        assert tensor.dtype == kept.dtype and torch.equal(tensor, kept)
    assert sampler.images(["a red kite"])[0][0].shape == (8 * H, 8 * H, 3)


def test_a_machine_that_is_too_small_is_told_before_anything_is_read(
    released: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(emu3, "_free", lambda _: 300_000)
    monkeypatch.setattr("unimodal.model.sample.load_decoder", None)
    with pytest.raises(UnimodalError, match=r"as float32, 0 GB of memory.*load.weights=bfloat16"):
        Sampler.load(released("Emu3-Gen"), device="cpu")


def test_only_directories_of_emu3_are_taken_for_it(
    released: Callable[[str], Path], converted: Path, tmp_path: Path
) -> None:
    path = released("Emu3-Gen")
    assert is_emu3(path) and is_emu3(converted) and is_emu3(str(path))
    assert not is_emu3(path.parent) and not is_emu3(path / "config.json")
    assert not is_emu3(path.parent / "Emu3-VisionTokenizer")
    copy = shutil.copytree(path, tmp_path / "copy")
    (copy / "vocabulary").mkdir()  # of an export of ours, which `train` reads, too
    assert not is_emu3(copy)
    (copy / "config.json").write_text("{")
    shutil.rmtree(copy / "vocabulary")
    assert not is_emu3(copy)


def remove(*names: str) -> Callable[[Path], None]:
    return lambda path: [(path / name).unlink() for name in names] and None


def swap_codes(path: Path) -> None:
    file = path / "emu3_vision_tokens.txt"
    lines = file.read_text().splitlines()
    lines[9], lines[10] = lines[10], lines[9]
    file.write_text("\n".join(lines))


def add_codes(path: Path) -> None:
    with (path / "emu3_vision_tokens.txt").open("a") as file:
        file.write("<|visual token 000064|>\n")
    rewrite(path / "config.json", vocab_size=len(TOKENS) + len(IDS) + 1)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            remove("emu3.tiktoken", "emu3_vision_tokens.txt", "model.safetensors.index.json"),
            r"lacks model.safetensors.index.json and the files it names, emu3.tiktoken, "
            r"emu3_vision_tokens.txt: download all of BAAI/Emu3-Gen into it",
        ),
        (swap_codes, r"visual token 000006\|> has id 486, not 485: its vision tokens are not in"),
        (add_codes, r"has 64 codes, .* was trained with 65: give the vision tokenizer that"),
        (
            lambda path: rewrite(path / "config.json", eol_token_id=3),
            r"eol_token_id is 3, emu3_vision_tokens.txt has 471 for <.extra_200.>",
        ),
        (
            lambda path: rewrite(path / "tokenizer_config.json", boi_token="<|begin|>"),
            r"emu3_vision_tokens.txt does not list <.begin.>",
        ),
        (
            lambda path: rewrite(path / "config.json", vocab_size=540),
            r"has vocab_size 540, its tokenizer's files 543 ids",
        ),
        (
            lambda path: rewrite(
                path.parent / "Emu3-VisionTokenizer" / "preprocessor_config.json",
                image_mean=[0.48, 0.45, 0.4],
            ),
            r"image_mean is .0.48, 0.45, 0.4., and Emu3's tokenizer knows 0.5 alone",
        ),
        (
            lambda path: rewrite(
                path.parent / "Emu3-VisionTokenizer" / "preprocessor_config.json", min_pixels=1e9
            ),
            r"are no bounds of an area",
        ),
    ],
)
def test_what_is_missing_or_does_not_fit_is_one_line(
    released: Callable[[str], Path],
    tmp_path: Path,
    spoil: Callable[[Path], None],
    message: str,
) -> None:
    path = shutil.copytree(released("Emu3-Gen"), tmp_path / "Emu3-Gen")
    shutil.copytree(
        released("Emu3-Gen").parent / "Emu3-VisionTokenizer", tmp_path / "Emu3-VisionTokenizer"
    )
    spoil(path)
    with pytest.raises(UnimodalError, match=message) as caught:
        Sampler.load(path, device="cpu")
    assert "\n" not in str(caught.value)


def test_a_config_and_a_tokenizer_of_two_checkpoints_are_refused(
    converted: Path, tmp_path: Path
) -> None:
    path = shutil.copytree(converted, tmp_path / "mixed")
    record = json.loads((path / "config.json").read_text())
    record["vocabulary_map"]["<|visual token 000003|>"] += 1
    (path / "config.json").write_text(json.dumps(record))
    with pytest.raises(UnimodalError, match=r"has id 483 for <.visual token 000003.>, .* has 482"):
        load(path)
    (path / "tokenizer.json").write_text("{}")
    with pytest.raises(UnimodalError, match=r"is not a tokenizer\.json"):
        load(path)
