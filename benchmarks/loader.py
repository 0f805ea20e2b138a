"""Our loader beside plain webdataset with torch's DataLoader, on the same shards.

    OMP_NUM_THREADS=1 python benchmarks/loader.py [--repeat 5] [--vocabulary emu3:qwen.tiktoken]

Both read every sample of a mix once, choose one of its two captions, tokenize it, build the
document with targets, weights and positions, and pack over the same window, with the same
function. The peer reads tars from front to back, as webdataset does, in the training process (0
workers) and in one worker. All take turns in one run, files in the page cache; ratios are medians
over the rounds, of tokens a second and of tokens a CPU second (of the busier process, where there
are two), which another job on the machine disturbs less. Ours plans each time; its index is read
before, as once in a run. First comes what the index and a plan of many rows take, last the share of
loading in a step of the `tiny` recipe.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import platform
import re
import resource
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import webdataset
from torch.utils.data import DataLoader, IterableDataset

from unimodal.model.data import DataSettings, Loader, Samples
from unimodal.model.decoder import Decoder, DecoderConfig
from unimodal.model.loss import weighted_cross_entropy
from unimodal.model.packing import pack
from unimodal.model.recipe import settings_from
from unimodal.tokenize.shards import Sample, Shards, ShardWriter
from unimodal.tokenize.vocabulary import Vocabulary

CODEBOOK = 32_768
MIXES = {
    "emoji: 8x8 codes": ([8], 8000, 2048),
    "16x16 codes": ([16], 6000, 4096),
    "8x8 to 32x32 codes": ([8, 16, 24, 32], 4000, 4096),
    "Emu3: 64x64 and 90x90 codes": ([64, 90], 800, 8704),
}
"""Sides of the pictures, how many, context."""
WORDS = "a small red house on the green hill under a cloudy sky with two birds and an old tree"


def captions(rng: np.random.Generator, vocabulary: Vocabulary) -> list[dict[str, Any]]:
    """A short and a long one."""
    texts = [" ".join(rng.choice(WORDS.split(), rng.integers(2, most))) for most in (6, 30)]
    return [
        {"style": "s", "lang": "en", "text": text, "tokens": len(vocabulary.text.encode(text))}
        for text in texts
    ]


def make(out: Path, sides: list[int], count: int, vocabulary: Vocabulary) -> Shards:
    """Shards of 500 pictures each."""
    rng = np.random.default_rng(0)
    tokenizer = SimpleNamespace(
        codebook_size=CODEBOOK, spatial_factor=8, digest="0" * 64, save=lambda path: path.mkdir()
    )
    writer = ShardWriter(out, tokenizer, vocabulary, {})
    for number in range(-(-count // 500)):
        samples = []
        for row in range(number * 500, min(count, number * 500 + 500)):
            side = int(rng.choice(sides))
            samples.append(
                Sample(
                    key=f"key{row:07d}",
                    uid=f"key{row:07d}",
                    kind="image",
                    codes=rng.integers(0, CODEBOOK, (1, side, side)),
                    split="train",
                    source_sha256="0" * 64,
                    captions=captions(rng, vocabulary),
                )
            )
        writer.write(number, "unit", samples)
    return writer.finish(number + 1)


class Plain(IterableDataset):  # type: ignore[type-arg]
    """What one would write with webdataset: a pack is a dict of tensors."""

    def __init__(self, shards: Shards, settings: DataSettings) -> None:
        names = [shard["name"] for shard in shards.manifest["shards"]]
        self.urls = [str(shards.path / name) for name in names]
        self.vocabulary = shards.vocabulary
        self.settings = settings

    def document(self, sample: dict[str, bytes]) -> tuple[np.ndarray, np.ndarray]:
        """Ids and weights."""
        v, settings, rng = self.vocabulary, self.settings, self.rng
        codes = np.load(io.BytesIO(sample["vision.npy"]))[0]
        texts = json.loads(sample["json"])["captions"]
        height, width = codes.shape
        rows = np.full((height, width + 1), v.eol)
        rows[:, :-1] = codes.astype(np.int64) + v.vision_start
        size = v.text.encode(f"{height}*{width}")
        block = np.concatenate([[v.boi, *size, v.img], rows.reshape(-1), [v.eof, v.eoi]])
        describes = rng.random() < settings.understanding
        dropped = not describes and rng.random() < settings.caption_dropout
        text = [] if dropped else v.text.encode(texts[rng.integers(len(texts))]["text"])
        parts = [block, text] if describes else [text, block]
        ids = np.concatenate([[v.bos], *parts, [v.eos]]).astype(np.int64)
        weights = np.ones(len(ids), np.float32)
        start = 1 if describes else 1 + len(text)
        weights[start : start + len(block)] = settings.vision_weight
        return ids, weights

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        self.rng = np.random.default_rng(0)
        stream = webdataset.WebDataset(self.urls, shardshuffle=False)
        window = [self.document(sample) for sample in stream]
        packs = pack([len(ids) - 1 for ids, _ in window], self.settings.context)
        for number in self.rng.permutation(len(packs)).tolist():
            chosen = [window[index] for index, _, _ in packs[number]]
            yield {
                "ids": torch.from_numpy(np.concatenate([ids[:-1] for ids, _ in chosen])),
                "targets": torch.from_numpy(np.concatenate([ids[1:] for ids, _ in chosen])),
                "weights": torch.from_numpy(np.concatenate([w[1:] for _, w in chosen])),
                "positions": torch.cat([torch.arange(len(ids) - 1) for ids, _ in chosen]),
            }


def theirs(shards: Shards, settings: DataSettings, workers: int) -> int:
    """Tokens of an epoch of webdataset and DataLoader."""
    loader = DataLoader(Plain(shards, settings), batch_size=None, num_workers=workers)
    return sum(len(batch["ids"]) for batch in loader)


def ours(samples: Samples, settings: DataSettings) -> int:
    """Tokens of an epoch of our loader, the plan included."""
    loader, tokens = Loader(samples, settings, 0), 0
    for _ in range(len(loader.plan.packs)):
        tokens += len(next(loader).ids)
    return tokens


def cpu() -> tuple[float, float]:
    """CPU seconds of this process, and of its children that are done."""
    mine, children = (
        resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return mine.ru_utime + mine.ru_stime, children.ru_utime + children.ru_stime


def rate(work: Callable[[], int]) -> tuple[float, float]:
    """Tokens in a second, and in a CPU second of the busier of both processes."""
    start, (mine, children) = time.perf_counter(), cpu()
    tokens = work()
    wall, (mine_after, children_after) = time.perf_counter() - start, cpu()
    return tokens / wall, tokens / max(mine_after - mine, children_after - children)


def compare(folder: Path, repeat: int, vocabulary: Vocabulary) -> None:
    """Print the table of all mixes."""
    columns = ["mix", "ours, M tokens/s", "0 workers", "1 worker", "ratio to 0", "to 1"]
    print("\n|", " | ".join([*columns, "to 0, CPU", "to 1, CPU"]), "|\n|" + 8 * "---|")
    for number, (name, (sides, count, context)) in enumerate(MIXES.items()):
        shards = make(folder / str(number), sides, count, vocabulary)
        settings = DataSettings(context=context)
        samples = Samples([Shards.open(shards.path)])
        kinds: list[Callable[[], int]] = [
            partial(ours, samples, settings),
            partial(theirs, shards, settings, 0),
            partial(theirs, shards, settings, 1),
        ]
        for warm in kinds[:2]:
            warm()
        rounds = np.array([[rate(kind) for kind in kinds] for _ in range(repeat)])  # [R, 3, 2]
        ratios = np.median(rounds[:, :1] / rounds[:, 1:], axis=0).T.reshape(-1)
        speeds = np.median(rounds[:, :, 0], axis=0) / 1e6
        cells = [*(f"{one:.2f}" for one in speeds), *(f"{one:.1f}" for one in ratios)]
        print("|", " | ".join([f"{name}, {context} tokens", *cells]), "|", flush=True)


def share(folder: Path, repeat: int) -> None:
    """Print what part of a `tiny` step is loading: forward and backward alone, the optimizer
    left out."""
    settings = settings_from("tiny")
    vocabulary = Vocabulary.bytes(CODEBOOK)
    loader = Loader(Samples([make(folder, [8], 2000, vocabulary)]), settings.data, 0)
    loader.plan  # noqa: B018 - once an epoch
    config = DecoderConfig(settings.decoder, vocabulary.size, settings.data.context)
    decoder = Decoder(config, 0)
    decoder.compute = torch.bfloat16
    times = []
    for _ in range(repeat + 1):
        start = time.perf_counter()
        batch = next(loader)
        loaded = time.perf_counter()
        hidden = decoder.hidden(batch.ids, batch.positions, decoder.packed(batch.lengths))
        head = decoder.lm_head.weight
        weighted_cross_entropy(hidden, head, batch.targets, batch.weights)[0].backward()
        times.append((loaded - start, time.perf_counter() - loaded))
    part = statistics.median(load / (load + step) for load, step in times[1:])
    load, step = (statistics.median(one) * 1e3 for one in zip(*times[1:], strict=True))
    print(f"\n`tiny`: a pack {load:.1f} ms, its step {step:.0f} ms: {part:.2%} of the time")


def plans(counts: list[int], folder: Path) -> None:
    """Print what opening an index takes, and a plan of its rows; memory is what is not mapped."""
    print(
        "| rows | captions, MB | index, s | columns, s | plan of 65,536 documents, s | "
        "memory, MiB | most, MiB | a row, kB |\n|" + 8 * "---|"
    )
    for count in counts:
        said = described(folder / str(count), count)
        print(f"| {count:,} | {said / 1e6:,.0f} ", end="", flush=True)
        new = multiprocessing.get_context("spawn").Process(target=opened, args=(folder, count))
        new.start()
        new.join()


def opened(folder: Path, count: int) -> None:
    """The rest of a row of `plans`, in a process that has held nothing before."""
    with Peak() as memory:
        times = [time.perf_counter()]
        shards = Shards.open(folder / str(count))
        shards.index  # noqa: B018
        times.append(time.perf_counter())
        loader = Loader(Samples([shards]), DataSettings(context=4096), 0)
        times.append(time.perf_counter())
        loader.plan  # noqa: B018
        times.append(time.perf_counter())
        held = own_memory() - memory.before
    cells = [f"{after - before:.2f}" for before, after in pairwise(times)]
    cells += [f"{held:.0f}", f"{memory.most:.0f}", f"{held * 1024 / count:.2f}"]
    print("|", " | ".join(cells), "|", flush=True)


class Peak:
    """What this process holds at most of its own, beyond what it did before; MiB."""

    def __enter__(self) -> Peak:
        self.before, self.most, self._over = own_memory(), 0.0, threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._over.wait(0.02):
            self.most = max(self.most, own_memory() - self.before)

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()


def own_memory() -> float:
    """MiB that this process holds, without files that are mapped."""
    status = Path("/proc/self/status").read_text()
    return int(re.findall(r"RssAnon:\s*(\d+) kB", status)[0]) / 1024


def described(out: Path, count: int) -> int:
    """Shards of tiny pictures, each with a dense caption of 1,500 bytes and a short one, as large
    models write them; returns the bytes of all captions."""
    rng = np.random.default_rng(0)
    tokenizer = SimpleNamespace(
        codebook_size=CODEBOOK, spatial_factor=8, digest="0" * 64, save=lambda path: path.mkdir()
    )
    writer = ShardWriter(out, tokenizer, Vocabulary.bytes(CODEBOOK), {})
    keys, codes = rng.permutation(count), np.zeros((1, 2, 2), np.int64)
    for number, start in enumerate(range(0, count, 2048)):
        samples = []
        for key in keys[start : start + 2048].tolist():
            texts = rng.bytes(750).hex(), rng.bytes(50).hex()
            said = [
                {"style": style, "lang": "en", "text": text, "tokens": len(text)}
                for style, text in zip(("dense", "short"), texts, strict=True)
            ]
            name, digest = f"{key:032x}", f"{key:064x}"
            rest = {"kind": "image", "split": "train", "source_sha256": digest}
            samples.append(Sample(key=name, uid=name, codes=codes, captions=said, **rest))
        writer.write(number, "unit", samples)
    writer.finish(number + 1)
    return count * 1600


def main() -> None:
    """Run all three."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--repeat", type=int, default=5, help="rounds of each mix")
    parser.add_argument("--vocabulary", default="bytes", help="bytes, or emu3:FILE")
    parser.add_argument("--rows", type=int, nargs="*", default=[65_536, 1_500_000])
    given = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    print(f"{platform.machine()}, {os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}\n")
    vocabulary = Vocabulary.named(given.vocabulary, CODEBOOK)
    with tempfile.TemporaryDirectory() as folder:
        plans(given.rows, Path(folder))
        compare(Path(folder), given.repeat, vocabulary)
        share(Path(folder) / "tiny", 4 * given.repeat)


if __name__ == "__main__":
    main()
