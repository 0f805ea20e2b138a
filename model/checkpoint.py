"""Checkpoints: whole or absent, self-contained, and never a pickle.

CHECKPOINT/
  config.toml         every setting of the run; a recipe for `train` itself
  data.json           which vision tokenizer and vocabulary, which grids were trained on
  vocabulary/  vision_tokenizer/     copies, so that sampling works after a move
  metrics.jsonl  tensorboard/  samples/
  step-00001000/
    model.safetensors  config.json   loads in transformers as LlamaForCausalLM
    optimizer.safetensors            first and second moments, by parameter name
    train.json                       step, position in the data, schedule
  latest              name of the newest complete step, written last
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from unimodal.model.decoder import Decoder, DecoderConfig, Shape
from unimodal.pipeline.errors import UnimodalError
from unimodal.pipeline.files import atomic

STEP = re.compile(r"step-\d{8}")
WEIGHTS = "model.safetensors"
# model_type in config.json: same graph in each, apart from qwen3's norm of q and k.
LLAMA_TYPES = ("llama", "emu3_text_model", "qwen3")
# What each optimizer remembers of a parameter, apart from the number of steps.
MOMENTS: dict[type[torch.optim.Optimizer], tuple[str, ...]] = {
    torch.optim.AdamW: ("exp_avg", "exp_avg_sq"),
    torch.optim.Muon: ("momentum_buffer",),
}


def step_name(step: int) -> str:
    """Directory name of a step."""
    return f"step-{step:08d}"


def save_step(
    out: Path,
    step: int,
    decoder: Decoder,
    optimizers: Sequence[torch.optim.Optimizer],
    state: Mapping[str, Any],
    keep: int,
) -> Path:
    """Write `out/step-NNNNNNNN`, point `latest` at it, and drop all but the newest `keep`.

    Killed at any moment, the previous checkpoint stays valid: the directory is renamed into place
    when whole, and `latest` is replaced after that.
    """
    final = out / step_name(step)
    temporary = out / f".{final.name}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    weights = {name: tensor.detach().cpu() for name, tensor in decoder.state_dict().items()}
    save_file(weights, temporary / WEIGHTS, {"format": "pt"})
    _write_json(temporary / "config.json", to_transformers(decoder.config))
    save_file(_moments(decoder, optimizers), temporary / "optimizer.safetensors")
    _write_json(temporary / "train.json", dict(state))
    for path in temporary.iterdir():
        _sync(path)
    if final.exists():  # of an earlier run that was resumed from before this step
        shutil.rmtree(final)
    temporary.rename(final)
    with atomic(out / "latest") as file:
        file.write_text(final.name + "\n")
    steps = sorted(path for path in out.glob("step-*") if STEP.fullmatch(path.name))
    for old in steps[: -max(1, keep)]:
        if old != final:
            shutil.rmtree(old)
    return final


def load_step(
    step: Path, decoder: Decoder, optimizers: Sequence[torch.optim.Optimizer]
) -> dict[str, Any]:
    """Restore weights and moments from a step directory; returns its `train.json`."""
    _restore(decoder, step, next(decoder.parameters()).device)
    saved = _read(step / "optimizer.safetensors")
    state = read_json(step / "train.json")
    for name, parameter, optimizer in _owned(decoder, optimizers):
        kept: dict[str, torch.Tensor] = {}
        for moment in MOMENTS[type(optimizer)]:
            value = saved.get(f"{moment}.{name}")
            if value is None or value.shape != parameter.shape:
                raise UnimodalError(
                    f"{step / 'optimizer.safetensors'} lacks {moment} of {name}: "
                    "resume from another step, or start anew in another directory"
                )
            kept[moment] = value.to(parameter.device)
        if isinstance(optimizer, torch.optim.AdamW):
            kept["step"] = torch.tensor(float(state["step"]), device=parameter.device)
        optimizer.state[parameter] = kept
    return state


def latest_step(out: Path) -> Path | None:
    """The step directory that `latest` names, or None where there is no checkpoint."""
    pointer = out / "latest"
    if not pointer.is_file():
        return None
    name = pointer.read_text().strip()
    if not STEP.fullmatch(name) or not (out / name / WEIGHTS).is_file():
        raise UnimodalError(
            f"{pointer} names {name[:40]!r}, which is no complete step of {out}: "
            "write the name of an existing step-NNNNNNNN into it"
        )
    return out / name


def find(path: Path) -> tuple[Path, Path]:
    """(checkpoint directory, step directory) for a path to either, or to a bare model twice."""
    if not path.is_dir():
        raise UnimodalError(f"no checkpoint at {path}: make one with unimodal train SHARDS -o DIR")
    step = latest_step(path)
    if step is not None:
        return path, step
    if (path / "config.json").is_file():
        return (path.parent if STEP.fullmatch(path.name) else path), path
    raise UnimodalError(
        f"{path} holds no finished checkpoint (no file named latest): training has not saved yet, "
        "or this is another directory"
    )


def load_decoder(path: Path, device: str | torch.device = "cpu") -> Decoder:
    """The decoder of a checkpoint, of one step of it, or of a transformers Llama directory."""
    _, step = find(path)
    config = from_transformers(read_json(step / "config.json"), step / "config.json")
    decoder = Decoder(config, seed=None).to(device)
    _restore(decoder, step, device)
    return decoder.eval()


def keep_inputs(out: Path, shards: Any) -> None:
    """Put the vocabulary and the vision tokenizer of `shards` into the checkpoint directory."""
    for name in ("vocabulary", "vision_tokenizer"):
        source, target = Path(shards.path) / name, out / name
        if target.exists() or not source.is_dir():
            continue
        temporary = out / f".{name}.{os.getpid()}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        # A hard link where the file system can: the bytes stay when the shards are deleted.
        shutil.copytree(source, temporary, copy_function=_link_or_copy)
        temporary.rename(target)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def to_transformers(config: DecoderConfig) -> dict[str, Any]:
    """`config.json` of the same decoder in transformers' Llama (Qwen3 with `qk_norm`)."""
    shape = config.shape
    return {
        "architectures": ["Qwen3ForCausalLM" if shape.qk_norm else "LlamaForCausalLM"],
        "model_type": "qwen3" if shape.qk_norm else "llama",
        "vocab_size": config.vocabulary_size,
        "hidden_size": shape.width,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.channels,
        "hidden_act": "silu",
        "rms_norm_eps": shape.norm_eps,
        "rope_theta": shape.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "max_position_embeddings": config.context,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "attention_dropout": shape.dropout,
        "initializer_range": shape.init_std,
        "dtype": "float32",
    }


def from_transformers(record: Mapping[str, Any], source: Path) -> DecoderConfig:
    """The decoder that a `config.json` describes; raises `UnimodalError` if it is another kind."""
    kind = record.get("model_type")
    rope = record.get("rope_parameters") or record.get("rope_scaling") or {}
    problems = []
    if kind not in LLAMA_TYPES:
        problems.append(f"model_type {kind!r} is not one of {', '.join(LLAMA_TYPES)}")
    if rope.get("rope_type", "default") != "default":
        problems.append(f"rope_type {rope['rope_type']!r} is not supported")
    for flag in ("attention_bias", "mlp_bias", "tie_word_embeddings"):
        if record.get(flag):
            problems.append(f"{flag} is not supported")
    if problems:
        raise UnimodalError(f"{source}: {'; '.join(problems)}")
    try:
        heads = record["num_attention_heads"]
        shape = Shape(
            width=record["hidden_size"],
            layers=record["num_hidden_layers"],
            heads=heads,
            kv_heads=record.get("num_key_value_heads") or heads,
            head_dim=record.get("head_dim") or 0,
            ffn=record["intermediate_size"],
            rope_theta=rope.get("rope_theta") or record.get("rope_theta") or 10_000.0,
            norm_eps=record.get("rms_norm_eps", 1e-6),
            qk_norm=kind == "qwen3",
            dropout=record.get("attention_dropout") or 0.0,
            init_std=record.get("initializer_range", 0.02),
        )
        context = int(record.get("max_position_embeddings", 4096))
        return DecoderConfig(shape, int(record["vocab_size"]), context)
    except (KeyError, TypeError, ValueError, ValidationError) as error:
        raise UnimodalError(f"{source} describes no decoder ({error}): copy it again") from error


def to_toml(values: Mapping[str, Any], prefix: str = "") -> str:
    """Nested settings as TOML; None is left out, which TOML cannot say."""
    lines, tables = [], []
    for key, value in values.items():
        if isinstance(value, Mapping):
            tables.append(f"\n[{prefix}{key}]\n{to_toml(value, f'{prefix}{key}.')}")
        elif value is not None:
            # JSON writes strings, numbers, booleans and lists of them as TOML does, except for
            # two things that TOML refuses: escaped surrogate pairs, and DEL unescaped.
            text = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
            lines.append(f"{key} = {text}\n")
    return "".join(lines + tables)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; raises `UnimodalError` naming the file if there is none."""
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UnimodalError(f"{path} cannot be read ({error}): copy it again") from error
    if not isinstance(record, dict):
        raise UnimodalError(f"{path} holds no JSON object: copy it again")
    return record


def _write_json(path: Path, record: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(record, indent=2) + "\n")


def _owned(
    decoder: Decoder, optimizers: Sequence[torch.optim.Optimizer]
) -> Iterator[tuple[str, torch.nn.Parameter, torch.optim.Optimizer]]:
    """Every parameter with its name and the optimizer that moves it."""
    names = {parameter: name for name, parameter in decoder.named_parameters()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                yield names[parameter], parameter, optimizer


def _moments(
    decoder: Decoder, optimizers: Sequence[torch.optim.Optimizer]
) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, parameter, optimizer in _owned(decoder, optimizers):
        for moment in MOMENTS[type(optimizer)]:
            value = optimizer.state[parameter].get(moment)
            value = torch.zeros_like(parameter) if value is None else value
            tensors[f"{moment}.{name}"] = value.detach().cpu().contiguous()
    return tensors


def _restore(decoder: Decoder, step: Path, device: str | torch.device) -> None:
    """Fill the decoder from `model.safetensors`, or the files that its index names."""
    own = decoder.state_dict()
    files = [step / WEIGHTS]
    index = step / f"{WEIGHTS}.index.json"
    if not files[0].is_file() and index.is_file():
        names = sorted(set(read_json(index).get("weight_map", {}).values()))
        if any(Path(name).name != name for name in names):
            raise UnimodalError(f"{index} names a file outside its directory: do not use it")
        files = [step / name for name in names]
    if not all(file.is_file() for file in files):
        pickled = sorted(p.name for p in step.glob("*.bin")) + sorted(
            p.name for p in step.glob("*.pt*")
        )
        hint = f"; {pickled[0]} is a pickle, which is never opened" if pickled else ""
        raise UnimodalError(f"{step} has no {WEIGHTS}{hint}: convert or copy it again")
    seen: set[str] = set()
    for file in files:
        for name, tensor in _read(file).items():
            if name not in own or own[name].shape != tensor.shape:
                want = list(own[name].shape) if name in own else "no such tensor"
                raise UnimodalError(
                    f"{file}: {name} is {list(tensor.shape)}, config.json asks for {want}"
                )
            with torch.no_grad():
                own[name].copy_(tensor)
            seen.add(name)
    missing = sorted(set(own) - seen)
    if missing:
        raise UnimodalError(f"{step} lacks {len(missing)} tensors, first {missing[0]}: copy again")


def _read(file: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise UnimodalError(f"{file} cannot be read ({error}): copy it again") from error


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
