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
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from unimodal.model.decoder import Decoder
from unimodal.model.naming import WEIGHTS, config_record, read_config, read_json, read_weights
from unimodal.pipeline.errors import UnimodalError
from unimodal.pipeline.files import atomic

STEP = re.compile(r"step-\d{8}")
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
    _write_json(temporary / "config.json", config_record(decoder.config))
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
    read_weights(decoder, step)
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
    """The decoder of a checkpoint, of one step of it, or of a directory of `naming`'s."""
    _, step = find(path)
    with torch.device("meta"):  # no time for values that are about to be replaced
        decoder = Decoder(read_config(step / "config.json"), seed=None)
    decoder.to_empty(device=device)
    read_weights(decoder, step)
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


def _read(file: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise UnimodalError(f"{file} cannot be read ({error}): copy it again") from error


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
