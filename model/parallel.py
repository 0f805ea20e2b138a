"""Several processes that train one decoder: the mesh, and what each process holds and computes.

Axes of the mesh, the innermost last, so that the chattiest peers are neighbours:

  replicate  whole copies of the weights; each sees packs of its own
  shard      the weights split over processes, gathered block by block (FSDP2); packs of its own
  context    one pack split over processes; keys and values are gathered (attention.SharedPacked)
  tensor     heads, MLP channels and vocabulary split, and tokens between (sequence parallel)

The weights are also split over `context`, whose processes see different tokens just as those of
`shard` do. Everything is from torch.distributed's own parts: DeviceMesh, DTensor, `fully_shard`,
`parallelize_module`. With one process none of it is imported.

A step is the same function on every mesh but for the order of sums: initial weights are keyed by
name, packs are dealt out of one order, and the loss is a local sum over a global weighted count.
Only dropout differs: each process draws masks of its own.

NCCL and CUDA have not been run by the project (its development machines have no GPU): tests use
gloo on processors.
"""

from __future__ import annotations

import ctypes
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from unimodal.model.attention import Share
from unimodal.pipeline.errors import UnimodalError, UsageError
from unimodal.pipeline.processors import processors
from unimodal.pipeline.settings import Settings

if TYPE_CHECKING:
    from unimodal.model.data import Batch
    from unimodal.model.decoder import Decoder, Shape

WAIT = timedelta(hours=1)
"""How long processes wait for one that reads, samples or saves."""


class MeshSettings(Settings):
    """Processes along each axis; their product is the number of processes. May be changed when
    resuming."""

    replicate: int = Field(default=1, ge=1)
    """Copies of the weights."""
    shard: int = Field(default=1, ge=1)
    """Parts of the weights, gradients and moments, each with packs of its own."""
    context: int = Field(default=1, ge=1)
    """Parts of each pack; the weights are split over these too."""
    tensor: int = Field(default=1, ge=1)
    """Parts of each matrix; divides heads, kv_heads, ffn and width."""

    @property
    def size(self) -> int:
        """Processes in all."""
        return self.replicate * self.shard * self.context * self.tensor

    def __str__(self) -> str:
        return " x ".join(f"{name} {value}" for name, value in self.model_dump().items())


@dataclass(frozen=True)
class Mesh:
    """This process's place among all. Every method is called by all of them alike."""

    settings: MeshSettings
    device: torch.device
    rank: int = 0
    weights: Any = None
    """DeviceMesh (replicate, fsdp = shard x context, tensor); None for one process."""
    context: Any = None
    """DeviceMesh of those that share a pack."""

    @property
    def world(self) -> int:
        """Number of processes."""
        return self.settings.size

    @property
    def is_main(self) -> bool:
        """Whether this process writes and speaks for all."""
        return self.rank == 0

    @property
    def data_world(self) -> int:
        """How many processes or groups of them work on packs of their own."""
        return self.settings.replicate * self.settings.shard

    @property
    def data_rank(self) -> int:
        """Which of them this is."""
        return self.rank // (self.settings.context * self.settings.tensor)

    @property
    def leads(self) -> bool:
        """Whether what this process holds counts where `sum` adds up what all hold alike."""
        return self.rank < self.settings.tensor

    def check(self, shape: Shape, accumulate: int) -> None:
        """Raise `UsageError` naming every setting that this mesh cannot work with."""
        mesh, problems = self.settings, []
        for name in ("heads", "kv_heads", "ffn", "width") if mesh.tensor > 1 else ():
            if getattr(shape, name) % mesh.tensor:
                value = getattr(shape, name)
                problems.append(f"mesh.tensor {mesh.tensor} must divide decoder.{name} {value}")
        if mesh.tensor > 1 and shape.width % (mesh.shard * mesh.context):
            problems.append(f"mesh.shard x context must divide decoder.width {shape.width}")
        if accumulate % self.data_world:
            problems.append(
                f"accumulate {accumulate} (packs of a step) must be a multiple of "
                f"mesh.replicate x shard = {self.data_world}"
            )
        if problems:
            raise UsageError(f"this mesh does not fit: {'; '.join(problems)}")

    def apply(self, decoder: Decoder) -> None:
        """Split the decoder in place; `decoder.compute` is set, the optimizer not yet made.

        A decoder on the meta device is filled with the initial weights of its shape afterwards
        by `decoder.initialise`: no process ever holds all of it.
        """
        if self.world == 1:
            return
        from torch.distributed.fsdp import (
            FSDPModule,
            MixedPrecisionPolicy,
            fully_shard,
            register_fsdp_forward_method,
        )

        mesh = self.settings
        if mesh.tensor > 1:
            _split_matrices(decoder, self.weights["tensor"])
        if mesh.context > 1:
            decoder.share = Share(
                self.context.get_local_rank(),
                mesh.context,
                lambda x: _gathered(x, self.context),
            )
        if self.weights["fsdp"].size() * mesh.replicate > 1:
            axes = ("replicate", "fsdp") if mesh.replicate > 1 else ("fsdp",)
            # Nothing here changes an output in place, which is what torch warns of at every view.
            warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
            common = {"mesh": self.weights[axes], "shard_placement_fn": _placement}
            # Matrices travel in the dtype that they are used in; norms, embedding and head are
            # used in float32 and stay with the root, gathered for the whole step.
            dtype = None if decoder.compute == torch.float32 else decoder.compute
            policy = MixedPrecisionPolicy(
                param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
            )
            blocks: Any = decoder.model.layers
            for block in blocks:
                for norm in (block.self_attn.q_norm, block.self_attn.k_norm):
                    if norm is not None:
                        fully_shard(norm, **common)
                fully_shard(block.self_attn, **common, mp_policy=policy)
                fully_shard(block.mlp, **common, mp_policy=policy)
            fully_shard(decoder, **common)
            register_fsdp_forward_method(decoder, "hidden")
            for module in decoder.modules():
                if isinstance(module, FSDPModule):
                    # Sums, not means: the loss is divided by the global weight already. gloo has
                    # no pre-multiplied sum, hence the second call.
                    module.set_gradient_divide_factor(1.0)
                    module.set_force_sum_reduction_for_comms(True)

    def split(self, batch: Batch) -> Batch:
        """This process's share of a pack that its peers hold too.

        Padded behind its end by a document of weight 0, so that it can be split evenly;
        `lengths` stay those of the whole pack.
        """
        mesh = self.settings
        unit = mesh.tensor if mesh.context == 1 else mesh.context * math.lcm(2, mesh.tensor)
        more = -len(batch.ids) % unit
        share = Share(self.rank // mesh.tensor % mesh.context, mesh.context, lambda x: x)
        if unit == 1:
            return batch

        def part(x: Tensor) -> Tensor:
            x = torch.cat([x, x.new_zeros(more)])
            return share.take(x) if mesh.context > 1 else x

        changed: dict[str, Any] = {"lengths": [*batch.lengths, *([more] if more else [])]}
        for field in fields(batch):
            if isinstance(value := getattr(batch, field.name), Tensor):
                changed[field.name] = part(value)
        return replace(batch, **changed)

    def deal(self, packs: Sequence[Batch]) -> Iterator[Batch]:
        """This process's packs of those that all hold; as many to each, as gathering the weights
        takes all of them: where they run out, the last once more with weight 0."""
        for first in range(0, len(packs), self.data_world):
            mine = packs[min(first + self.data_rank, len(packs) - 1)]
            surplus = first + self.data_rank >= len(packs)
            yield replace(mine, weights=torch.zeros_like(mine.weights)) if surplus else mine

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over all that see tokens of their own; tensor peers see the same ones."""
        if self.world == 1:
            return tensor
        total = tensor.to(self.device, copy=True)
        for axis in ("replicate", "fsdp"):
            torch.distributed.all_reduce(total, group=self.weights[axis].get_group())
        return total.to(tensor.device)

    def totals(self, *values: float) -> list[float]:
        """`sum` of numbers."""
        if self.world == 1:
            return list(values)
        totals: list[float] = self.sum(torch.tensor(values, dtype=torch.float64)).tolist()
        return totals

    def most(self, value: float) -> float:
        """The highest of all processes: they agree on what a clock or a signal decides."""
        if self.world == 1:
            return value
        highest = torch.tensor(value, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(highest, torch.distributed.ReduceOp.MAX)
        return highest.item()

    @contextmanager
    def together(self) -> Iterator[None]:
        """For what may raise `UnimodalError` in some processes only: all leave, but quietly those
        behind the first that has one."""
        error = None
        try:
            yield
        except UnimodalError as problem:
            error = problem
        first = self.world - self.most(self.world - self.rank if error else 0)
        if error and first == self.rank:
            error.shared = False
            raise error
        if first < self.world:
            raise SystemExit(1)

    @contextmanager
    def machine(self) -> Iterator[tuple[Path, bool]]:
        """A temporary folder that the processes of this machine share, and whether this one is
        the first of them, which is to fill it."""
        import torch.distributed as dist

        local = int(os.environ.get("LOCAL_RANK", "0"))
        with nullcontext("") if local else tempfile.TemporaryDirectory(prefix="unimodal-") as made:
            folders: list[Any] = [""] * self.world
            dist.all_gather_object(folders, made)
            yield Path(folders[self.rank - local]), not local
            dist.barrier()

    def assembled(self, decoder: Decoder) -> Decoder | None:
        """An ordinary decoder of the same weights in the main process; None in the others."""
        if self.world == 1:
            return decoder
        from unimodal.model.decoder import Decoder
        from unimodal.model.lora import merged

        plain = None
        if self.is_main:
            with torch.device("meta"):
                plain = Decoder(decoder.config, None).to(decoder.lm_head.weight.dtype)
            plain.to_empty(device=self.device).eval().compute = decoder.compute
        with torch.no_grad():
            for name, tensor in merged(decoder).items():
                full = whole(tensor)
                if plain is not None:
                    plain.get_parameter(name).copy_(full)
        return plain

    def clip(self, parameters: Iterable[nn.Parameter], max_norm: float) -> float:
        """Norm of the whole gradient, which is scaled down to `max_norm` where it is above.

        torch's own (2.13) mixes up parameters of different meshes.
        """
        if self.world == 1:
            return float(nn.utils.clip_grad_norm_(parameters, max_norm))
        local, copies = [], []
        trained: Any = [p for p in parameters if p.grad is not None]
        for parameter in trained:
            if (grad := parameter.grad).placements != parameter.placements:  # partial sums
                grad = parameter.grad = grad.redistribute(placements=parameter.placements)
            split = [
                grad.device_mesh.size(axis)
                for axis, placement in enumerate(grad.placements)
                if placement.is_shard()
            ]
            local.append(grad.to_local())
            copies.append(self.world / math.prod(split))
        norms = torch.stack(torch._foreach_norm(local)).double()
        total = (norms.square() / norms.new_tensor(copies)).sum()
        torch.distributed.all_reduce(total)
        norm = total.sqrt()
        torch._foreach_mul_(local, (max_norm / (norm + 1e-6)).clamp(max=1.0).float())
        return float(norm)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be split over processes; all of them call this alike."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def fill(tensor: Tensor, values: Tensor) -> Tensor:
    """Copy `values` (all of them, on every process) into a tensor that may be split."""
    if (mesh := getattr(tensor, "device_mesh", None)) is None:
        return tensor.copy_(values)
    from torch.distributed.tensor import distribute_tensor

    placements: Any = tensor.placements  # type: ignore[attr-defined]
    part = distribute_tensor(values.detach(), mesh, placements, src_data_rank=None)
    tensor.to_local().copy_(part.to_local())  # type: ignore[attr-defined]
    return tensor


def _gathered(x: Tensor, mesh: Any) -> Tensor:
    """[t, ...] of each process -> [T, ...] of all; backward sums the gradients and splits them."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    split = DTensor.from_local(x, mesh, [Shard(0)], run_check=False)
    return split.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])


def _placement(parameter: Tensor) -> Any:
    """The dimension that FSDP splits: the one that `tensor` does not, so that shards stay plain."""
    from torch.distributed.tensor import Shard

    split = [p.dim for p in getattr(parameter, "placements", ()) if p.is_shard()]
    return Shard(1 if split == [0] else 0)


def _split_matrices(decoder: Decoder, mesh: Any) -> None:
    """Tensor parallel, and sequence parallel between the matrices (Korthikanti et al. 2022)."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        PrepareModuleOutput,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    whole = (Replicate(), None, None, None)
    tokens = (Shard(0), None, None, None)
    block = {
        "input_layernorm": SequenceParallel(sequence_dim=0, use_local_output=True),
        "post_attention_layernorm": SequenceParallel(sequence_dim=0, use_local_output=True),
        "self_attn": PrepareModuleInput(input_layouts=tokens, desired_input_layouts=whole),
        "self_attn.q_proj": ColwiseParallel(),
        "self_attn.k_proj": ColwiseParallel(),
        "self_attn.v_proj": ColwiseParallel(),
        "self_attn.o_proj": RowwiseParallel(output_layouts=Shard(0)),
        "mlp": PrepareModuleInput(input_layouts=tokens[:1], desired_input_layouts=whole[:1]),
        "mlp.gate_proj": ColwiseParallel(),
        "mlp.up_proj": ColwiseParallel(),
        "mlp.down_proj": RowwiseParallel(output_layouts=Shard(0)),
    }
    if decoder.config.shape.qk_norm:
        for name in ("self_attn.q_norm", "self_attn.k_norm"):
            block[name] = SequenceParallel(sequence_dim=1, use_local_output=True)  # over heads
    plan = {f"model.layers.*.{name}": style for name, style in block.items()}
    # The embedding is split by width: Emu3's 184,622 rows are not a multiple of 4. The head must
    # be split by rows, however unevenly, or whole logits would have to be summed.
    plan["model.embed_tokens"] = ColwiseParallel(output_layouts=Shard(0))
    plan["model.norm"] = SequenceParallel(sequence_dim=0, use_local_output=False)
    plan["lm_head"] = ColwiseParallel(output_layouts=Replicate())
    parallelize_module(decoder, mesh, plan, src_data_rank=None)
    ends = PrepareModuleOutput(output_layouts=Shard(0), desired_output_layouts=Replicate())
    parallelize_module(decoder.model.norm, mesh, ends)


@contextmanager
def joined(settings: MeshSettings, device: torch.device | str) -> Iterator[Mesh]:
    """This process's mesh, out of the environment that `torchrun` or `launch` made.

    `cuda` becomes this process's own GPU. Raises `UsageError` where the mesh is not of as many
    processes as there are, or where there are more of them than GPUs.
    """
    device, world = torch.device(device), int(os.environ.get("WORLD_SIZE", "1"))
    try:
        check_world(settings, world)
        with (
            _joined(settings, device) if world > 1 else nullcontext(Mesh(settings, device)) as mesh
        ):
            yield mesh
    except UnimodalError as error:
        if error.shared and not is_main():
            time.sleep(10)  # the main process says it for all, and ends them
        raise
    except SystemExit:  # of `together`: one that has the error says it
        time.sleep(10)
        os._exit(1)


def check_world(settings: MeshSettings, world: int) -> None:
    """Raise `UsageError` unless the mesh is of `world` processes."""
    if settings.size != world:
        raise UsageError(
            f"the mesh ({settings}) is of {settings.size} processes, and there are {world}: "
            f"launch {settings.size} with --nproc or torchrun, or --set mesh.shard and the others "
            "so that their product is what there is"
        )


def is_main() -> bool:
    """Whether this process is the first of its launch, or alone."""
    return os.environ.get("RANK", "0") == "0"


def leave() -> None:
    """End a process of several whose work is done.

    gloo's threads abort some that end the ordinary way: 3 of 46 with torch 2.13.
    """
    if "RANK" in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


@contextmanager
def _joined(settings: MeshSettings, device: torch.device) -> Iterator[Mesh]:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    if device.type == "cuda":
        there, wanted = torch.cuda.device_count(), int(os.environ["LOCAL_WORLD_SIZE"])
        if wanted > there:
            raise UsageError(
                f"{wanted} processes on this machine need a GPU each, and there are {there}: "
                "start fewer, on more machines, or give --device cpu"
            )
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=WAIT)
    try:
        data, fsdp = settings.replicate * settings.shard, settings.shard * settings.context
        weights = init_device_mesh(
            device.type,
            (settings.replicate, fsdp, settings.tensor),
            mesh_dim_names=("replicate", "fsdp", "tensor"),
        )
        packs = init_device_mesh(
            device.type,
            (data, settings.context, settings.tensor),
            mesh_dim_names=("data", "context", "tensor"),
        )
        yield Mesh(settings, device, dist.get_rank(), weights, packs["context"])
        dist.barrier()
    finally:
        dist.destroy_process_group()


def launch(processes: int, arguments: Sequence[str]) -> int:
    """Run `python -m unimodal.cli ARGUMENTS` as so many processes of this machine.

    SIGTERM and Ctrl-C are passed on. When one fails the others are ended. On Linux they save and
    stop also when this process is killed. Returns 0, or the exit status of the first that failed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    threads = max(1, processors() // processes)
    common = {
        "OMP_NUM_THREADS": str(threads),
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
    }
    command = [sys.executable, "-m", "unimodal.cli", *arguments]
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    running = [
        subprocess.Popen(
            command,
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C reaches them through this process alone, once
            # PR_SET_PDEATHSIG = 1: a launcher that is killed cannot pass it on.
            preexec_fn=(lambda: libc.prctl(1, signal.SIGTERM)) if libc else None,
        )
        for rank in range(processes)
    ]

    def pass_on(number: int, frame: Any) -> None:
        for one in running:
            one.send_signal(number)

    old = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        while (codes := [one.poll() for one in running]) and None in codes and not any(codes):
            time.sleep(0.05)
        failed = next((code for code in codes if code), 0)
        if failed:
            time.sleep(1)  # the others may be about to say the same
        return failed if failed >= 0 else 128 - failed
    finally:
        for one in running:
            if one.poll() is None:
                one.kill()
            one.wait()
        for number, handler in old.items():
            signal.signal(number, handler)
