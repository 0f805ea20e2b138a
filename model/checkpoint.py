"""Checkpoints: whole or absent, self-contained, and never a pickle.

CHECKPOINT/
  config.toml         every setting of the run; a recipe for `train` itself
  data.json           which vision tokenizer and vocabulary, which grids were trained on
  vocabulary/  vision_tokenizer/     copies, so that sampling works after a move
  metrics.jsonl  tensorboard/  samples/
  step-00001000/
    model.safetensors  config.json   loads in transformers as LlamaForCausalLM; with an average of
                                     the weights that average, with LoRA the merged weights
    trained.safetensors              then also what is trained: the weights themselves, the adapters
    base.safetensors                 with LoRA: the frozen weights, linked from step to step
    optimizer.safetensors            first and second moments, by parameter name
    train.json                       step, position in the data, schedule
  latest              name of the newest complete step, written last

The files are the same whatever the number of processes, so that any can go on with them. Several
write their own parts through torch.distributed.checkpoint, which are then joined; each reads what
it needs. By default all this happens while training goes on, from a copy in main memory.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from unimodal.model.decoder import Decoder, DecoderConfig, initialise
from unimodal.model.lora import is_adapted, merged, start_adapters
from unimodal.model.naming import WEIGHTS, config_record, read_config, read_json, read_weights
from unimodal.model.records import read_about
from unimodal.pipeline.errors import UnimodalError, UsageError, first_line
from unimodal.pipeline.files import atomic
from unimodal.pipeline.kinds import mistaken
from unimodal.pipeline.settings import differences
from unimodal.tokenize.training import WeightAverage

STEP = re.compile(r"step-\d{8}")
# What each optimizer remembers of a parameter, apart from the number of steps.
MOMENTS: dict[type[torch.optim.Optimizer], tuple[str, ...]] = {
    torch.optim.AdamW: ("exp_avg", "exp_avg_sq"),
    torch.optim.Muon: ("momentum_buffer",),
}


def step_name(step: int) -> str:
    """Directory name of a step."""
    return f"step-{step:08d}"


@dataclass
class Learners:
    """Everything that a step of training changes."""

    decoder: Decoder
    optimizers: Sequence[torch.optim.Optimizer]
    average: WeightAverage[Decoder]
    """With decay 0 the decoder itself."""

    def files(self) -> dict[str, dict[str, Tensor]]:
        """The tensors of a checkpoint by file and name; parameters are not copied."""
        decoder = self.decoder
        files = {"model": merged(self.average.model), "optimizer": self._moments()}
        if self.average.model is not decoder or is_adapted(decoder):
            for name, parameter in decoder.named_parameters():
                stem = "trained" if parameter.requires_grad else "base"
                files.setdefault(stem, {})[f"{stem}.{name}"] = parameter.detach()
        return files

    def _moments(self) -> dict[str, Tensor]:
        """Moments of all optimizers; zeros are made where no step has been taken yet."""
        names = {parameter: name for name, parameter in self.decoder.named_parameters()}
        moments: dict[str, Tensor] = {}
        for optimizer in self.optimizers:
            for parameter in (p for group in optimizer.param_groups for p in group["params"]):
                state = optimizer.state[parameter]
                for moment in MOMENTS[type(optimizer)]:
                    if moment not in state:
                        state[moment] = torch.zeros_like(parameter)
                    moments[f"{moment}.{names[parameter]}"] = state[moment].detach()
        return moments

    def stepped(self, step: int) -> None:
        """Let the optimizers believe that so many steps are done."""
        self._moments()  # before the first one there is nothing that could count
        for optimizer in self.optimizers:
            if isinstance(optimizer, torch.optim.AdamW):
                for parameter, state in optimizer.state.items():
                    state["step"] = torch.tensor(float(step), device=parameter.device)


class Saver:
    """Writes the steps of `out`, one at a time, by default while training goes on.

    A context: leaving it waits for what is being written. Errors of the writer (`UnimodalError`)
    surface at the next call, or on leaving. With several processes all call it alike.
    """

    def __init__(self, out: Path, keep: int, background: bool = True, world: int = 1) -> None:
        self.out, self.keep = out, keep
        self._pool = ThreadPoolExecutor(1, "checkpoint") if background else None
        self._writing: Future[None] | None = None
        self._base: Path | None = None
        self._group: Any = None
        self._stager: Any = None
        if world > 1:
            from torch.distributed import new_group
            from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

            self._group = new_group(backend="gloo")  # its own: it works beside the training's
            self._stager = DefaultStager(StagingOptions(False, False, False, False))

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.wait()
        except UnimodalError:
            if kind is None:  # else the first error is the one to tell
                raise
        finally:
            if self._pool is not None:
                self._pool.shutdown()

    def save(self, step: int, learners: Learners, record: Mapping[str, Any]) -> None:
        """Write `out/step-NNNNNNNN`, point `latest` at it, and drop all but the newest `keep`.

        Killed at any moment, the previous checkpoint stays valid: the directory is renamed into
        place when whole, and `latest` is replaced after that.
        """
        self.wait()
        files = learners.files()
        dtype = str(learners.decoder.lm_head.weight.dtype).removeprefix("torch.")
        config = config_record(learners.decoder.config, dtype=dtype)
        base = self._base
        if "base" in files:
            self._base = self.out / step_name(step) / "base.safetensors"
        if base is not None:
            del files["base"]  # it does not change: linked from the step before
        if self._stager is not None:
            files = {stem: self._stager.stage(named) for stem, named in files.items()}
        elif self._pool is not None:
            files = {
                stem: {name: tensor.to("cpu", copy=True) for name, tensor in named.items()}
                for stem, named in files.items()
            }
        write = partial(self._write, step, files, base, config, dict(record))
        if self._pool is None:
            write()
        else:
            self._writing = self._pool.submit(write)

    def check(self) -> None:
        """Raise the error of a writer that has failed, without waiting for one at work."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Until all is written."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _write(
        self,
        step: int,
        files: Mapping[str, Mapping[str, Tensor]],
        base: Path | None,
        config: Mapping[str, Any],
        record: Mapping[str, Any],
    ) -> None:
        final = self.out / step_name(step)
        temporary = self.out / f".{final.name}.tmp"
        try:
            if self._group is None:
                self._clear(temporary)
                for stem, named in files.items():
                    plain = {name: tensor.cpu().contiguous() for name, tensor in named.items()}
                    save_file(plain, temporary / f"{stem}.safetensors", {"format": "pt"})
                self._publish(temporary, final, base, config, record)
                return
            import torch.distributed as dist

            first = self._write_together(temporary, files)
            try:
                if first:
                    self._publish(temporary, final, base, config, record)
            finally:  # nobody ends, and with it all, before `latest` is written
                dist.barrier(self._group)
        except (OSError, SafetensorError) as error:
            raise UnimodalError(
                f"step {step} could not be saved in {self.out} ({error}): make room there and run "
                "the same command again"
            ) from error

    def _publish(
        self,
        temporary: Path,
        final: Path,
        base: Path | None,
        config: Mapping[str, Any],
        record: Mapping[str, Any],
    ) -> None:
        """Make a directory of tensors a step, point `latest` at it, and drop old ones."""
        if base is not None:
            _link_or_copy(str(base), str(temporary / base.name))
        _write_json(temporary / "config.json", config)
        _write_json(temporary / "train.json", record)
        for path in temporary.iterdir():
            _sync(path)
        if final.exists():  # of an earlier run that was resumed from before this step
            shutil.rmtree(final)
        temporary.rename(final)
        with atomic(self.out / "latest") as file:
            file.write_text(final.name + "\n")
        steps = sorted(path for path in self.out.glob("step-*") if STEP.fullmatch(path.name))
        for old in steps[: -self.keep]:
            if old != final:
                shutil.rmtree(old)

    def _clear(self, temporary: Path) -> None:
        for left in self.out.glob(".step-*.tmp"):  # of a process that was killed
            shutil.rmtree(left)
        temporary.mkdir(parents=True)

    def _write_together(self, temporary: Path, files: Mapping[str, Mapping[str, Tensor]]) -> bool:
        """Every process writes its parts, the first joins them; True in the first."""
        import torch.distributed as dist
        from torch.distributed.checkpoint import HuggingFaceStorageWriter, save

        first = dist.get_rank(self._group) == 0
        if first:
            self._clear(temporary)
        dist.barrier(self._group)
        for stem, named in files.items():
            writer = HuggingFaceStorageWriter(
                str(temporary / stem), save_distributed=True, enable_consolidation=True
            )
            save(dict(named), storage_writer=writer, process_group=self._group)
            if first:
                (joined,) = (temporary / stem).glob("*.safetensors")
                joined.rename(temporary / f"{stem}.safetensors")
                shutil.rmtree(temporary / stem)
        return first


def load_step(step: Path, learners: Learners) -> dict[str, Any]:
    """Restore all that a step directory holds, on any number of processes; returns `train.json`."""
    record = read_json(step / "train.json")
    for stem, named in learners.files().items():
        if stem != "model" or not is_adapted(learners.decoder):  # else: what is merged, is
            _fill(step / f"{stem}.safetensors", named)
    learners.stepped(record["step"])
    return record


def _fill(file: Path, wanted: dict[str, Tensor]) -> None:
    """Copy the tensors of a file into these; raises `UnimodalError` if one is not there."""
    try:
        with safe_open(file, "pt") as stored:
            names = set(stored.keys())
            for name, tensor in wanted.items():
                if name not in names or stored.get_slice(name).get_shape() != list(tensor.shape):
                    raise UnimodalError(
                        f"{file} lacks {name} of shape {list(tensor.shape)}: "
                        "resume from another step, or start anew in another directory"
                    )
                if not hasattr(tensor, "device_mesh"):
                    tensor.copy_(stored.get_tensor(name))
    except (OSError, SafetensorError) as error:
        raise UnimodalError(f"{file} cannot be read ({error}): copy it again") from error
    split = {name: tensor for name, tensor in wanted.items() if hasattr(tensor, "device_mesh")}
    if split:
        from torch.distributed.checkpoint import HuggingFaceStorageReader, load

        load(split, storage_reader=HuggingFaceStorageReader(str(file.parent)))


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
        if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) and not path.parent.exists():
            raise UsageError(
                f"no checkpoint at {path}: if it is one of a hub, get it first, for instance with "
                f"hf download {path} --local-dir {path}"
            )
        raise UsageError(f"no checkpoint at {path}: make one with unimodal train SHARDS -o DIR")
    step = latest_step(path)
    if step is not None:
        return path, step
    if (path / "config.json").is_file():
        return (path.parent if STEP.fullmatch(path.name) else path), path
    raise UsageError(
        mistaken(path, "checkpoint")
        or f"{path} holds no finished checkpoint (no file named latest): training has not saved "
        "yet, or this is another directory"
    )


def weights_config(path: Path) -> DecoderConfig:
    """What kind of decoder there is at a path that `load_decoder` reads."""
    return read_config(find(path)[1] / "config.json")


def load_decoder(
    path: Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> Decoder:
    """The decoder of a checkpoint, of one step of it, or of a directory of `naming`'s.

    Its matrices are kept in `dtype`, its norms in float32. Memory is taken once: each tensor is
    read by itself into its place.
    """
    with torch.device("meta"):  # no time for values that are about to be replaced
        decoder = Decoder(weights_config(path), seed=None)
    for parameter in decoder.parameters():
        if parameter.dim() > 1:
            parameter.data = parameter.data.to(dtype)
    decoder.to_empty(device=device)
    read_weights(decoder, find(path)[1])
    return decoder.eval()


def start(learners: Learners, seed: int, init: Path | None, data: Mapping[str, Any]) -> None:
    """First values: the weights at `init`, else random ones; adapters and average follow.

    Raises `UsageError` if `init` is of another shape, vocabulary or vision tokenizer than the
    decoder, to be trained on what `data` (`data.json`) says, needs.
    """
    decoder = learners.decoder
    if init is None:
        initialise(decoder, decoder.config.shape.init_std, seed)
    else:
        _inherit(decoder, init, data)
    start_adapters(decoder, seed)
    if (average := learners.average.model) is not decoder:
        with torch.no_grad():
            for ours, theirs in zip(average.parameters(), decoder.parameters(), strict=True):
                ours.copy_(theirs)


def _inherit(decoder: Decoder, path: Path, data: Mapping[str, Any]) -> None:
    top, step = find(path)
    theirs, ours = weights_config(path), decoder.config
    before, now = (
        {**config.shape.model_dump(), "head_dim": config.shape.channels}
        for config in (theirs, ours)
    )
    other = differences(before, now, free=("dropout", "init_std"))
    if other:
        listed = ", ".join(f"{key} {was}, not {now}" for key, (was, now) in other.items())
        raise UsageError(f"{path} is of another shape ({listed}); set decoder.… to its values")
    if theirs.vocabulary_size != ours.vocabulary_size:
        raise UsageError(
            f"{path} has {theirs.vocabulary_size} ids, the vocabulary of the shards "
            f"{ours.vocabulary_size}: tokenize with the vocabulary of the weights"
        )
    about = read_about(top) or data
    for key in ("vocabulary", "vision_tokenizer"):
        if about.get(key) != data[key]:
            raise UsageError(
                f"{path} was trained with another {key.replace('_', ' ')} than that of the "
                f"shards: tokenize with {top / key}"
            )
    read_weights(decoder, step)


def keep_inputs(out: Path, shards: Any, resumed: bool = False) -> None:
    """Put the vocabulary and the vision tokenizer of `shards` into the checkpoint directory.

    Those of an earlier start that never saved a step are replaced; a resumed run keeps its own.
    """
    for name in ("vocabulary", "vision_tokenizer"):
        source, target = Path(shards.path) / name, out / name
        if not source.is_dir() or (target.exists() and (resumed or target.samefile(source))):
            continue
        temporary = out / f".{name}.{os.getpid()}.tmp"
        for left in out.glob(f".{name}.*.tmp"):  # of a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        # A hard link where the file system can: the bytes stay when the shards are deleted.
        try:
            shutil.copytree(source, temporary, copy_function=_link_or_copy)
            shutil.rmtree(target, ignore_errors=True)
            temporary.rename(target)
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            # A `shutil.Error` is of all files, each with its reason in words.
            reason = error.args[0][0][-1] if isinstance(error, shutil.Error) else first_line(error)
            raise UnimodalError(
                f"{source} could not be copied to {out} ({reason}): make room there "
                "and run the same command again"
            ) from error


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
            lines.append(f"{key} = {_toml_value(value)}\n")
    return "".join(lines + tables)


def _toml_value(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_toml_value, value))}]"
    if isinstance(value, float):
        return repr(value)  # also inf and nan, which JSON does not know
    # JSON writes strings, whole numbers and booleans as TOML does, except for two things that
    # TOML refuses: escaped surrogate pairs, and DEL unescaped.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _write_json(path: Path, record: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(record, indent=2) + "\n")


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
