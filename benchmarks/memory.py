"""What `train --plan` says of memory, beside what training steps hold.

    OMP_NUM_THREADS=1 python benchmarks/memory.py [--small]

Measured are the bytes of all tensors that live at once (their storages, seen by a
TorchDispatchMode at every operation), in the second step of the trainer's own loss, clipping and
optimizer: without what Python, its libraries and the inside of a kernel take.
"""

from __future__ import annotations

import argparse
import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from unimodal.model.blocks import prepare
from unimodal.model.decoder import Decoder, DecoderConfig
from unimodal.model.loss import weighted_cross_entropy
from unimodal.model.optim import optimizers
from unimodal.model.plan import memory
from unimodal.model.recipe import TrainSettings
from unimodal.pipeline.settings import build


class Live(TorchDispatchMode):
    """Bytes of the storages that operations returned and that are still held, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def see(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage until it is freed."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.see(leaf)
        return result


def measured(settings: TrainSettings, vocabulary: int, lengths: list[int]) -> int:
    """Peak bytes of live tensors in a step on packs of documents of `lengths`, on the CPU."""
    torch.manual_seed(0)
    with Live() as live:
        decoder = Decoder(DecoderConfig(settings.decoder, vocabulary, sum(lengths)), seed=0)
        decoder.compute = getattr(torch, settings.precision)
        prepare(decoder, settings.recompute)
        decoder.train()
        moving = optimizers(decoder, settings.optimizer)
        ids = torch.randint(vocabulary, (sum(lengths),))
        positions = torch.cat([torch.arange(length) for length in lengths])
        weights = torch.ones(len(ids))
        for _ in range(2):  # the moments are made by the first
            live.peak = live.now
            for _ in range(settings.accumulate):
                hidden = decoder.hidden(ids, positions, decoder.packed(lengths))
                total, _ = weighted_cross_entropy(hidden, decoder.lm_head.weight, ids, weights)
                del hidden
                (total / len(ids)).backward()
                del total
            torch.nn.utils.clip_grad_norm_(decoder.parameters(), settings.optimizer.clip)
            for optimizer in moving:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
    return live.peak


WIDE = {"width": 512, "layers": 4, "heads": 8, "kv_heads": 2, "ffn": 1408}
DEEP = {"width": 384, "layers": 10, "heads": 6, "kv_heads": 6, "ffn": 1024}
CASES: dict[str, tuple[dict[str, Any], int, list[int]]] = {
    "large vocabulary": ({"decoder": WIDE}, 60_000, [1024, 512, 300, 212]),
    "many tokens": ({"decoder": DEEP}, 2_000, [4096]),
    "the same in bfloat16": ({"decoder": DEEP, "precision": "bfloat16"}, 2_000, [4096] * 2),
    "selective": ({"decoder": DEEP, "recompute": "selective"}, 2_000, [4096] * 2),
    "full": ({"decoder": DEEP, "recompute": "full"}, 16_000, [4096] * 3),
    "two packs a step, Muon": (
        {"decoder": WIDE, "accumulate": 2, "optimizer": {"kind": "muon"}},
        60_000,
        [512] * 4,
    ),
    "dropout": ({"decoder": {**WIDE, "dropout": 0.1}}, 8_000, [500] * 6),
}
"""Settings, vocabulary and document lengths of runs of at least 1 GB each."""


def case(name: str, small: bool = False) -> tuple[float, float]:
    """(planned, measured) bytes of a case."""
    values, vocabulary, lengths = CASES[name]
    if small:
        values = {**values, "decoder": {**values["decoder"], "layers": 3}}
        vocabulary, lengths = vocabulary // 10, [length // 16 for length in lengths]
    base: dict[str, Any] = {"precision": "float32", "device": "cpu"}
    settings = build(TrainSettings, {**base, **values, "data": {"context": sum(lengths)}})
    return memory(settings, vocabulary, lengths).peak, measured(settings, vocabulary, lengths)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--small", action="store_true", help="a tenth, in seconds")
    arguments = parser.parse_args()
    print("| run | planned | measured | planned / measured |\n|---|---:|---:|---:|")
    for name in CASES:
        planned, found = case(name, arguments.small)
        cells = f"{planned / 1e9:.3f} GB | {found / 1e9:.3f} GB | {planned / found:.3f}"
        print(f"| {name} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
