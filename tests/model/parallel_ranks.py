"""What each process of the parallel tests does; importable, so that a fork server can run it."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from unimodal.model.data import Batch, Samples, share
from unimodal.model.decoder import Decoder, DecoderConfig, Shape, initialise
from unimodal.model.loss import weighted_cross_entropy
from unimodal.model.parallel import MeshSettings, joined, whole
from unimodal.model.recipe import TrainSettings
from unimodal.model.train import train
from unimodal.tokenize import shards

# 301 ids: no mesh splits the head evenly. Tensor 2 leaves one key head to each process.
SHAPE = Shape(width=32, layers=2, heads=4, kv_heads=2, ffn=48, init_std=0.2, qk_norm=True)
IDS = 301
DOCUMENTS = ([37, 5, 20], [51], [1, 1, 60, 3], [9, 44])
STEPS = 2
# What takes long to import, so that it happens once and not in each process.
PRELOAD = [
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "unimodal.model.train",
]


def packs() -> list[Batch]:
    """Four packs of unequal length, some targets without weight."""
    g = torch.Generator().manual_seed(1)
    made = []
    for lengths in DOCUMENTS:
        total = sum(lengths)
        made.append(
            Batch(
                ids=torch.randint(IDS, (total,), generator=g),
                targets=torch.randint(IDS, (total,), generator=g),
                weights=torch.tensor([1.0, 0.5, 0.0])[torch.randint(3, (total,), generator=g)],
                kinds=torch.zeros(total, dtype=torch.int64),
                positions=torch.cat([torch.arange(length) for length in lengths]),
                lengths=list(lengths),
                keys=[],
            )
        )
    return made


def steps(mesh_settings: dict[str, int], folder: Path, name: str) -> None:
    """Train for a few steps; rank 0 writes losses, norms and the first gradients."""
    settings = MeshSettings(**mesh_settings)
    with joined(settings, "cpu") as mesh:
        mesh.check(SHAPE, len(DOCUMENTS))
        with torch.device("meta"):
            decoder = Decoder(DecoderConfig(SHAPE, IDS, 64), None)
        mesh.apply(decoder)
        decoder.to_empty(device="cpu")
        initialise(decoder, SHAPE.init_std, seed=5)
        optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-2, fused=True)
        record: dict[str, Any] = {"losses": [], "norms": []}
        for step in range(STEPS):
            mine = [mesh.split(one) for one in packs()[mesh.data_rank :: mesh.data_world]]
            weight = float(mesh.sum(sum(one.weights.double().sum() for one in mine)))
            total = torch.zeros(())
            for one in mine:
                hidden = decoder.hidden(one.ids, one.positions, decoder.packed(one.lengths))
                loss, _ = weighted_cross_entropy(
                    hidden, decoder.lm_head.weight, one.targets, one.weights, 16
                )
                (loss / weight).backward()
                total += loss.detach() / weight
            record["losses"].append(float(mesh.sum(total)))
            if step == 0:
                grads = {
                    n: whole(p.grad).clone().contiguous() for n, p in decoder.named_parameters()
                }
            record["norms"].append(mesh.clip(decoder.parameters(), 1.0))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if mesh.is_main:
            save_file(grads, folder / f"{name}.grads.safetensors")
            (folder / f"{name}.json").write_text(json.dumps(record))


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def _process(rank: int, world: int, port: str, function: Callable[..., None], *given: Any) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=port,
    )
    function(*given)
    os._exit(0)  # gloo's threads abort some processes that end normally


def run(world: int, function: Callable[..., None], *given: Any) -> None:
    """Run a function in `world` new processes that are one group.

    One mesh to a process, as in use: DTensor (torch 2.13) remembers the groups of a mesh of the
    same shape that has been destroyed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    common = (world, free_port(), function, *given)
    processes = [context.Process(target=_process, args=(rank, *common)) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(280)
    assert [process.exitcode for process in processes] == [0] * world


def shared(out: Path, path: Path) -> None:
    """Open shards whose index counts as large, of which the first process alone may read files."""
    shards.HELD = 0
    with joined(MeshSettings(replicate=2), "cpu") as mesh:
        opened = [shards.Shards.open(path)] * 2
        if mesh.rank:
            opened[0].part = None  # type: ignore[assignment]
        share(opened, mesh)
        samples = Samples(opened)
        found = [opened[0].index.to_pylist(), samples.digests(), int(samples.lengths.sum())]
        (out / f"{mesh.rank}.json").write_text(json.dumps(found))


def trained(out: Path, path: Path, settings: TrainSettings) -> None:
    """A run of the trainer, as `unimodal train` makes it."""
    train([path], out, settings)
