"""A decoder's files under the public namings: reading them all, and writing any of them.

    emu3                model_type "Emu3": BAAI/Emu3-Stage1, -Gen and -Chat as released
    transformers-emu3   Emu3ForConditionalGeneration, with the vision tokenizer in the same file
                        (Emu3ForCausalLM where there is none)
    llama               LlamaForCausalLM (Qwen3ForCausalLM with qk_norm); our own checkpoints

The tensors are named alike in all of them (model.*, lm_head.weight), but for the multimodal
class of transformers, which puts them below text_model. on disk, beside vqmodel.*. Safetensors
only: one file, or shards with an index.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from unimodal.model.decoder import Decoder, DecoderConfig, Shape
from unimodal.model.parallel import fill
from unimodal.pipeline.errors import UnimodalError, UsageError
from unimodal.pipeline.settings import build
from unimodal.tokenize.vocabulary import Vocabulary

NAMINGS = ("emu3", "transformers-emu3", "llama")
WEIGHTS = "model.safetensors"
MOST = {"vocab_size": 1 << 24, "max_position_embeddings": 1 << 31}
"""Far over any real decoder, as the bounds of `Shape` are."""
# model_type in config.json: same graph in each, apart from qwen3's norm of q and k.
TYPES = ("llama", "Emu3", "emu3", "emu3_text_model", "qwen3")
# What transformers leaves out of the text_config of a released Emu3, as it is its default.
_EMU3 = {
    "vocab_size": 184_622,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 9216,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
}
# On disk (text_model.model.*, text_model.lm_head) and in memory (model.text_model.*, lm_head).
_NESTED = re.compile(r"^(?:text_model\.(?=model\.|lm_head\.)|(model\.)text_model\.)")
_NOT_OURS = re.compile(r"^(?:model\.)?vqmodel\.|\.rotary_emb\.inv_freq$")

# --- reading -------------------------------------------------------------------------------


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; raises `UnimodalError` naming the file if there is none."""
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UnimodalError(f"{path} cannot be read ({error}): copy it again") from error
    if not isinstance(record, dict):
        raise UnimodalError(f"{path} holds no JSON object: copy it again")
    return record


def read_config(source: Path) -> DecoderConfig:
    """The decoder that a `config.json` describes; raises `UnimodalError` if it is another kind."""
    record = read_json(source)
    kind = record.get("model_type")
    if isinstance(record.get("text_config"), dict):  # Emu3ForConditionalGeneration
        record = _EMU3 | record["text_config"]
    rope = record.get("rope_parameters") or record.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UnimodalError(f"{source}: its rope parameters are {rope!r}, no object: copy it again")
    problems = []
    if kind not in TYPES:
        problems.append(f"model_type {kind!r} is not one of {', '.join(TYPES)}")
    if (scaling := rope.get("rope_type", rope.get("type", "default"))) != "default":
        problems.append(f"rope_type {scaling!r} is not supported")
    if (act := record.get("hidden_act", "silu")) != "silu":
        problems.append(f"hidden_act {act!r} is not supported, only silu")
    for flag in ("attention_bias", "mlp_bias", "tie_word_embeddings"):
        if record.get(flag):
            problems.append(f"{flag} is not supported")
    if problems:
        raise UnimodalError(f"{source}: {'; '.join(problems)}")
    try:
        heads = record["num_attention_heads"]
        told = {
            "width": record["hidden_size"],
            "layers": record["num_hidden_layers"],
            "heads": heads,
            "kv_heads": record.get("num_key_value_heads") or heads,
            "head_dim": record.get("head_dim") or 0,
            "ffn": record["intermediate_size"],
            "rope_theta": rope.get("rope_theta") or record.get("rope_theta") or 10_000.0,
            "norm_eps": record.get("rms_norm_eps", 1e-6),
            "qk_norm": kind == "qwen3",
            "dropout": record.get("attention_dropout") or 0.0,
            "init_std": record.get("initializer_range", 0.02),
        }
        shape = build(Shape, told)
        sizes = {"vocab_size": record["vocab_size"]}
        sizes["max_position_embeddings"] = record.get("max_position_embeddings", 4096)
        for name, size in sizes.items():
            if not 0 < int(size) <= MOST[name]:
                raise ValueError(f"{name} is not within 1 and {MOST[name]}")
        return DecoderConfig(shape, *map(int, sizes.values()))
    except (KeyError, TypeError, ValueError, OverflowError, UsageError) as error:
        raise UnimodalError(f"{source} describes no decoder ({error}): copy it again") from error


def read_weights(decoder: Decoder, directory: Path) -> None:
    """Fill `decoder` from the safetensors of `directory`, one tensor at a time, in its dtypes.

    Raises `UnimodalError` naming what is missing, left over, misshapen or unreadable.
    """
    own = {name: x for name, x in decoder.state_dict().items() if ".lora_" not in name}
    seen: set[str] = set()
    for file in weight_files(directory):
        try:
            with safe_open(file, "pt") as weights:
                for stored in weights.keys():  # noqa: SIM118, it is no dictionary
                    if _NOT_OURS.search(stored):
                        continue
                    name = _NESTED.sub(lambda found: found[1] or "", stored)
                    shape = list(weights.get_slice(stored).get_shape())
                    if name not in own or list(own[name].shape) != shape:
                        want = list(own[name].shape) if name in own else "no such tensor"
                        raise UnimodalError(
                            f"{file}: {stored} is {shape}, config.json asks for {want}"
                        )
                    with torch.no_grad():
                        fill(own[name], weights.get_tensor(stored))
                    seen.add(name)
        except (OSError, SafetensorError) as error:
            raise UnimodalError(f"{file} cannot be read ({error}): copy it again") from error
    missing = sorted(set(own) - seen)
    if missing:
        raise UnimodalError(
            f"{directory} lacks {len(missing)} tensors, first {missing[0]}: copy it again"
        )


def weight_files(directory: Path) -> list[Path]:
    """`model.safetensors`, or the files that its index names: what a decoder is made of, and
    nothing that only training needs. Raises `UnimodalError` if one is missing."""
    files = [directory / WEIGHTS]
    index = directory / f"{WEIGHTS}.index.json"
    if not files[0].is_file() and index.is_file():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(n, str) for n in shards.values()):
            raise UnimodalError(f"{index} is no index of shards: copy it again")
        names = sorted(set(shards.values()))
        if any(Path(name).name != name for name in names):
            raise UnimodalError(f"{index} names a file outside its directory: do not use it")
        files = [directory / name for name in names]
    lacking = [file.name for file in files if not file.is_file()]
    if lacking or not files:
        pickled = sorted(path.name for path in directory.glob("*.bin"))
        pickled += sorted(path.name for path in directory.glob("*.pt*"))
        hint = f"; {pickled[0]} is a pickle, which is never opened" if pickled else ""
        what = lacking[0] if lacking else WEIGHTS
        raise UnimodalError(f"{directory} has no {what}{hint}: convert or copy it again")
    return files


# --- writing -------------------------------------------------------------------------------


def config_record(
    config: DecoderConfig,
    naming: str = "llama",
    dtype: str = "float32",
    vocabulary: Vocabulary | None = None,
) -> dict[str, Any]:
    """What `config.json` holds of the decoder; `UsageError` where a naming has no words for it.

    For `transformers-emu3` it is that of `Emu3ForCausalLM`.
    """
    shape = config.shape
    if naming not in NAMINGS:
        raise UsageError(f"naming {naming}: give one of {', '.join(NAMINGS)}")
    if naming != "llama" and shape.qk_norm:
        raise UsageError(f"{naming} has no norm of q and k: export this decoder as llama")
    if naming == "emu3" and shape.channels * shape.heads != shape.width:
        raise UsageError("emu3 has heads of width / heads channels only: export this as llama")
    kind, architecture = {
        "emu3": ("Emu3", "Emu3ForCausalLM"),
        "transformers-emu3": ("emu3_text_model", "Emu3ForCausalLM"),
        "llama": ("llama", "LlamaForCausalLM"),
    }[naming]
    if shape.qk_norm:
        kind, architecture = "qwen3", "Qwen3ForCausalLM"
    record = {
        "architectures": [architecture],
        "model_type": kind,
        "vocab_size": config.vocabulary_size,
        "hidden_size": shape.width,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "hidden_act": "silu",
        "rms_norm_eps": shape.norm_eps,
        "max_position_embeddings": config.context,
        "tie_word_embeddings": False,
        "attention_dropout": shape.dropout,
        "initializer_range": shape.init_std,
    }
    if naming == "emu3":
        record |= {"rope_theta": shape.rope_theta, "rope_scaling": None, "torch_dtype": dtype}
        record |= {"pretraining_tp": 1, "use_cache": True}
    else:
        rope = {"rope_type": "default", "rope_theta": shape.rope_theta}
        record |= {"head_dim": shape.channels, "rope_parameters": rope, "dtype": dtype}
        record |= {"attention_bias": False, "mlp_bias": False}
    if naming == "llama":
        record["rope_theta"] = shape.rope_theta
    if vocabulary is not None:
        named = vocabulary.specials if naming == "emu3" else ("pad", "bos", "eos")
        record |= {f"{name}_token_id": vocabulary.specials[name] for name in named}
    return record
