"""A checkpoint as other programs take it.

OUT/
  config.json  model.safetensors            or model-0000i-of-0000n.safetensors with their index
  tokenizer.json  tokenizer_config.json     for transformers: text, control and vision tokens
  emu3.tiktoken  emu3_vision_tokens.txt     for Emu3's own code, where the ids are Emu3's
  vocabulary/  vision_tokenizer/  data.json  config.toml     ours: `unimodal sample OUT` works
"""

from __future__ import annotations

import base64
import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from unimodal.model.checkpoint import find, load_decoder
from unimodal.model.naming import WEIGHTS, config_record
from unimodal.model.records import read_about
from unimodal.pipeline.errors import UsageError
from unimodal.tokenize.text import QWEN_PATTERN
from unimodal.tokenize.vision.tokenizer import VisionTokenizer
from unimodal.tokenize.vision.weights import config_dict, to_transformers
from unimodal.tokenize.vocabulary import EMU3_IDS, EMU3_TEXT_IDS, Vocabulary

SHARD_BYTES = 5 * 10**9
"""No file of weights is larger: Emu3-8B in float32 takes seven, as it was released."""
KEPT = ("vocabulary", "vision_tokenizer", "data.json", "config.toml")
# Emu3's strings for the control tokens; transformers' Emu3 looks for EOL's and the codes'.
STRINGS = {
    "pad": "<|endoftext|>",
    "bos": "<|extra_203|>",
    "eos": "<|extra_204|>",
    "img": "<|image token|>",
    "boi": "<|image start|>",
    "eoi": "<|image end|>",
    "eol": "<|extra_200|>",
    "eof": "<|extra_201|>",
}
DTYPES = ("float32", "bfloat16")


def export_model(
    checkpoint: Path, out: Path, naming: str = "llama", dtype: str = "float32"
) -> dict[str, Any]:
    """Write the newest step of `checkpoint`, or the step or model directory that it is, to `out`.

    `naming` is one of `naming.NAMINGS`, `dtype` float32 or bfloat16 (of the decoder's tensors
    alone: a vision tokenizer that is rounded gives other codes). Returns what was written. Needs
    memory for the decoder in `dtype`. Raises `UsageError` for a naming that cannot say this
    decoder, or an `out` that holds something.
    """
    top, step = find(checkpoint)
    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype}: give one of {', '.join(DTYPES)}")
    if out.exists() and any(out.iterdir()):
        raise UsageError(f"{out} is not empty: choose another directory")
    decoder = load_decoder(step, dtype=getattr(torch, dtype))
    kept = [name for name in KEPT if (top / name).exists()]
    vocabulary = Vocabulary.load(top / "vocabulary") if "vocabulary" in kept else None
    record = config_record(decoder.config, naming, dtype, vocabulary)
    tensors = {
        name: tensor.to(getattr(torch, dtype)) for name, tensor in decoder.state_dict().items()
    }
    if naming == "emu3" and vocabulary is not None and (top / "data.json").is_file():
        grids = read_about(top).get("grids") or [{"size": [1, 90, 90]}]
        record["image_area"] = 64 * grids[0]["size"][1] * grids[0]["size"][2]
    if naming == "transformers-emu3" and vocabulary is not None and "vision_tokenizer" in kept:
        vision = VisionTokenizer.load(top / "vision_tokenizer")
        record = {
            "architectures": ["Emu3ForConditionalGeneration"],
            "model_type": "emu3",
            "text_config": record,
            "vq_config": config_dict(vision.model.cfg, "transformers"),
            "vocabulary_map": strings(vocabulary),
            "tie_word_embeddings": False,
            "dtype": dtype,
        }
        tensors = {f"text_model.{name}": tensor for name, tensor in tensors.items()}
        theirs = to_transformers(vision.model.state_dict())
        tensors |= {f"vqmodel.{name}": tensor for name, tensor in theirs.items()}
    out.mkdir(parents=True, exist_ok=True)
    files = write_weights(tensors, out)
    for name in kept:
        copy = shutil.copytree if (top / name).is_dir() else shutil.copy2
        copy(top / name, out / name)
    if vocabulary is not None:
        write = _emu3_tokenizer if naming == "emu3" else _transformers_tokenizer
        files += write(vocabulary, out)
    (out / "config.json").write_text(json.dumps(record, indent=2) + "\n")  # the last: now it loads
    return {
        "naming": naming,
        "class": record["architectures"][0],
        "parameters": sum(p.numel() for p in decoder.parameters()),
        "dtype": dtype,
        "files": ["config.json", *files, *kept],
    }


def write_weights(tensors: dict[str, Tensor], out: Path, limit: int = SHARD_BYTES) -> list[str]:
    """Write `model.safetensors`, or shards of at most `limit` bytes with an index; their names."""
    groups: list[dict[str, Tensor]] = [{}]
    room = limit
    for name, tensor in tensors.items():
        if groups[-1] and tensor.nbytes > room:
            groups.append({})
            room = limit
        groups[-1][name] = tensor.contiguous()
        room -= tensor.nbytes
    count = len(groups)
    files = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    if count == 1:
        files = [WEIGHTS]
    for file, group in zip(files, groups, strict=True):
        save_file(group, out / file, {"format": "pt"})
    if count == 1:
        return files
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
        "weight_map": {n: file for file, group in zip(files, groups, strict=True) for n in group},
    }
    (out / f"{WEIGHTS}.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return [*files, f"{WEIGHTS}.index.json"]


def strings(vocabulary: Vocabulary) -> dict[str, int]:
    """Emu3's strings for control and vision tokens, and transformers' `<image>`, with our ids.

    `<image>` stands where codes are to come. Emu3's ids have a spare one for it; elsewhere it is
    the padding.
    """
    found = {STRINGS[name]: number for name, number in vocabulary.specials.items()}
    spare = EMU3_TEXT_IDS + 3 if vocabulary.specials == EMU3_IDS else vocabulary.pad
    codes = range(vocabulary.codebook_size)
    visual = {f"<|visual token {code:06d}|>": vocabulary.vision_start + code for code in codes}
    return {**found, "<image>": spare, **visual}


def _emu3_tokenizer(vocabulary: Vocabulary, out: Path) -> list[str]:
    """The two files that Emu3's own tokenizer class reads; none if the ids are not Emu3's."""
    if vocabulary.specials != EMU3_IDS:
        return []
    shutil.copy2(out / "vocabulary" / "text.tiktoken", out / "emu3.tiktoken")
    ids = {number: name for name, number in strings(vocabulary).items()}
    names = [ids[number] for number in range(EMU3_IDS["img"], vocabulary.size)]
    (out / "emu3_vision_tokens.txt").write_text("\n".join(names) + "\n")
    return ["emu3.tiktoken", "emu3_vision_tokens.txt"]


def _transformers_tokenizer(vocabulary: Vocabulary, out: Path) -> list[str]:
    """tokenizer.json with our text ids, Emu3's strings, NFC and Qwen's pre-split."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
    from tokenizers import pre_tokenizers as before

    added, image = strings(vocabulary), "<image>"
    if added[image] == vocabulary.pad:
        del added[image]
        image = STRINGS["pad"]
    if vocabulary.text.name == "tokenizer.json":
        tokenizer = Tokenizer.from_file(str(out / "vocabulary" / "tokenizer.json"))
    else:
        ranks = {bytes([byte]): byte for byte in range(256)}
        if vocabulary.text.name == "tiktoken":
            lines = (out / "vocabulary" / "text.tiktoken").read_bytes().splitlines()
            pairs = (line.split() for line in lines if line)
            ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
        merges = [(_printable(a), _printable(b)) for a, b in _merges(ranks)]
        vocab = {_printable(token): rank for token, rank in ranks.items()}
        tokenizer = Tokenizer(models.BPE(vocab | added, merges))
        tokenizer.normalizer = normalizers.NFC()
        split = before.Split(Regex(QWEN_PATTERN), "isolated")
        level = before.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = before.Sequence([split, level])
        tokenizer.decoder = decoders.ByteLevel()
    by_id = sorted(added, key=added.__getitem__)
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in by_id])
    wrong = [name for name in by_id if tokenizer.token_to_id(name) != added[name]]
    if wrong:  # a tokenizer.json whose own ids have gaps
        raise UsageError(
            f"transformers' tokenizer would give {wrong[0]} the id "
            f"{tokenizer.token_to_id(wrong[0])}, not {added[wrong[0]]}: export as emu3"
        )
    tokenizer.save(str(out / "tokenizer.json"))
    named = {f"{name}_token": STRINGS[name] for name in ("pad", "bos", "eos")}
    extra = {f"{name}_token": STRINGS[name] for name in ("boi", "eoi", "eol", "eof")}
    extra |= {"image_token": image, "image_wrapper_token": STRINGS["img"]}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **named,
        "extra_special_tokens": extra,
        "clean_up_tokenization_spaces": False,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return ["tokenizer.json", "tokenizer_config.json"]


def _printable(token: bytes) -> str:
    """GPT-2's spelling of bytes, which `tokenizers` works on: each byte one visible letter."""
    return "".join(_LETTERS[byte] for byte in token)


_PLAIN = [*range(33, 127), *range(161, 173), *range(174, 256)]
_OTHERS = [byte for byte in range(256) if byte not in _PLAIN]
_LETTERS = {byte: chr(byte) for byte in _PLAIN} | {b: chr(256 + i) for i, b in enumerate(_OTHERS)}


def _merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The merges that a rank file stands for: how each token arises from those of lower rank."""
    found = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            joined = [ranks.get(a + b, rank) for a, b in pairwise(parts)]
            i = min(range(len(joined)), key=joined.__getitem__)
            if joined[i] >= rank:
                break
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            found.append((parts[0], parts[1]))
    return found
