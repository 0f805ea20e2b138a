"""The tokenizer's tensors and configuration in files, under either public naming.

The original naming is that of BAAI/Emu3-VisionTokenizer, and ours; the other is that of
transformers' `Emu3VQVAE` (alone, or below `vqmodel.` in a multimodal checkpoint). They map one to
one.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from unimodal.pipeline.errors import UnimodalError, UsageError
from unimodal.tokenize.vision.movq import MoVQConfig

# (transformers, original), applied in order; each pattern matches whole name parts.
_RENAMES = [
    ("down_block.down", "down"),
    ("up_block.up", "up"),
    ("middle_block", "mid"),
    ("attn_norm", "attn_1.norm"),
    ("q_proj", "q"),
    ("k_proj", "k"),
    ("v_proj", "v"),
    ("out_proj", "proj_out"),
]
_PREFIX = re.compile(r"^(model\.)?vqmodel\.")
_CONFIG = {  # transformers' names in config.json
    "base_channels": "ch",
    "channel_multiplier": "ch_mult",
    "latent_channels": "z_channels",
    "double_latent": "double_z",
}
# What both configurations can say and this network cannot be.
_FIXED = {"in_channels": 3, "out_channels": 3, "double_z": False, "num_attention_heads": 1}
NAMINGS = ("original", "transformers")


def from_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename transformers' tensors to the original names; Linear weights become 1x1 convolutions.

    Tensors of other parts of a multimodal checkpoint are left out.
    """
    renamed: dict[str, Tensor] = {}
    for name in _ours(state):
        tensor = state[name]
        new = "." + _PREFIX.sub("", name)
        new = re.sub(r"\.attn_norms\.(\d+)\.", r".attn.\1.norm.", new)
        for theirs, ours in _RENAMES:
            new = new.replace(f".{theirs}.", f".{ours}.")
        projection = re.search(r"\.(q|k|v|proj_out)\.weight$", new)
        renamed[new[1:]] = tensor[:, :, None, None] if projection and tensor.ndim == 2 else tensor
    return renamed


def to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `from_transformers`, without a prefix."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        new = "." + name
        new = re.sub(r"\.attn\.(\d+)\.norm\.", r".attn_norms.\1.", new)
        for theirs, ours in _RENAMES:
            new = new.replace(f".{ours}.", f".{theirs}.")
        if re.search(r"\.(q|k|v|out)_proj\.weight$", new):
            tensor = tensor.flatten(1)
        renamed[new[1:]] = tensor
    return renamed


def _ours(names: Iterable[str]) -> list[str]:
    """The tokenizer's names: those below the prefix if any is, else all."""
    names = list(names)
    return [name for name in names if _PREFIX.match(name)] or names


def read_state(directory: Path) -> dict[str, Tensor]:
    """The tokenizer's tensors of `directory`, under the original names.

    Reads model.safetensors, or the shards that its index names, or any other *.safetensors; of a
    multimodal checkpoint only the tokenizer. Raises `UnimodalError` for files that are not there,
    cannot be read, or could run code when loaded.
    """
    state: dict[str, Tensor] = {}
    for file in _files(directory):
        try:
            # Names first: of a language model beside it nothing is read.
            with safe_open(file, "pt") as weights:
                state |= {name: weights.get_tensor(name) for name in _ours(weights.keys())}
        except (OSError, SafetensorError) as error:
            raise UnimodalError(f"{file} cannot be read ({error}): copy it again") from error
    transformers = any(".down_block." in name or ".middle_block." in name for name in state)
    return from_transformers(state) if transformers else state


def _files(directory: Path) -> list[Path]:
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.exists():
        return [single]
    if index.exists():
        try:
            shards: dict[str, str] = json.loads(index.read_text())["weight_map"]
            inside = {directory / Path(shards[name]).name for name in _ours(shards)}
        except Exception as error:  # of every kind, for JSON of every kind
            raise UnimodalError(
                f"{index}: no index of shards ({error!r}): copy it again"
            ) from error
        return sorted(inside)
    # state.safetensors is a trainer's, not weights.
    found = sorted(f for f in directory.glob("*.safetensors") if f.name != "state.safetensors")
    if found:
        return found
    pickles = [
        f for f in sorted(directory.iterdir()) if f.suffix in (".bin", ".pt", ".pth", ".ckpt")
    ]
    if pickles:
        raise UnimodalError(
            f"{pickles[0]}: a pickle, which can run code when it is loaded; convert it once, where "
            "you trust it: safetensors.torch.save_file(torch.load(..., weights_only=True), "
            "'model.safetensors')"
        )
    raise UnimodalError(f"{directory}: no *.safetensors with the tokenizer's weights")


def check(directory: Path, wanted: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Raise `UnimodalError` that names what is missing, left over, misshapen or not finite."""
    problems = _summary("missing", wanted.keys() - state.keys())
    problems += _summary("unknown", state.keys() - wanted.keys())
    wrong = []
    for name in sorted(wanted.keys() & state.keys()):
        tensor = state[name]
        if wanted[name].shape != tensor.shape:
            wrong.append(f"{name} is {list(tensor.shape)}, not {list(wanted[name].shape)}")
        elif wanted[name].is_floating_point() and not tensor.is_floating_point():
            wrong.append(f"{name} holds {tensor.dtype}, not floating-point numbers")
        elif not torch.isfinite(tensor.float()).all():
            wrong.append(f"{name} has values that are not finite")
    problems += wrong[:5] + ([f"and {len(wrong) - 5} more like these"] if len(wrong) > 5 else [])
    if problems:
        listed = "; ".join(problems)
        raise UnimodalError(
            f"{directory}: not the weights of its config.json: {listed}; copy both files again"
        )


def _summary(what: str, names: Iterable[str]) -> list[str]:
    """The names, or if they are many, how many there are under each prefix."""
    names = sorted(names)
    if len(names) <= 5:
        return [f"{what} {name}" for name in names]
    counts = Counter(".".join(name.split(".")[:2]) for name in names).most_common()
    more = f" and {len(counts) - 5} more places" if len(counts) > 5 else ""
    under = ", ".join(f"{n} under {prefix}" for prefix, n in counts[:5])
    return [f"{what} {len(names)} tensors ({under}{more})"]


def read_config(path: Path) -> MoVQConfig:
    """The network's shape from config.json of either naming; raises `UnimodalError`."""
    try:
        raw: Any = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UnimodalError(f"{path}: not a tokenizer configuration: {error}") from error
    # A multimodal checkpoint of transformers has it one level down.
    raw = raw.get("vq_config", raw) if isinstance(raw, dict) else raw
    if not isinstance(raw, dict):
        raise UnimodalError(f"{path}: not a tokenizer configuration: no JSON object")
    named = {_CONFIG.get(key, key): value for key, value in raw.items()}
    for key, only in _FIXED.items():
        if named.get(key, only) != only:
            raise UnimodalError(f"{path}: {key} is {named[key]!r}; only {only!r} is supported")
    try:
        known = MoVQConfig.__dataclass_fields__
        return MoVQConfig(**{key: value for key, value in named.items() if key in known})
    except ValueError as error:
        raise UnimodalError(f"{path}: {error}") from error


def config_dict(cfg: MoVQConfig, naming: str = "original") -> dict[str, Any]:
    """What config.json holds under a naming; `UsageError` where it has no words for `cfg`."""
    if naming == "original":
        fixed = {"double_z": False, "in_channels": 3, "out_channels": 3, "dropout": 0.0}
        names = {"model_type": "Emu3VisionVQ", "architectures": ["Emu3VisionVQModel"]}
        return {**names, **cfg.to_dict(), **fixed}
    if naming != "transformers":
        raise UsageError(f"naming {naming}: give one of {', '.join(NAMINGS)}")
    hidden = cfg.ch * cfg.ch_mult[-1]  # of all attention there
    if any(cfg.ch * m != hidden for i, m in enumerate(cfg.ch_mult) if i in cfg.attn_resolutions):
        raise UsageError(
            "transformers has attention of one width only, and this network's levels "
            f"{list(cfg.attn_resolutions)} differ: export it with --naming original"
        )
    theirs = {ours: name for name, ours in _CONFIG.items()}
    return {
        "model_type": "emu3_vqgan",
        "architectures": ["Emu3VQVAE"],
        **{theirs.get(key, key): value for key, value in cfg.to_dict().items()},
        **{theirs.get(key, key): value for key, value in _FIXED.items()},
        "hidden_size": hidden,
        "attention_dropout": 0.0,
        "dtype": "float32",
    }
