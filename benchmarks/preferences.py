"""How much more often a sample is the better one after learning from preferences.

    OMP_NUM_THREADS=1 python benchmarks/preferences.py [--out DIR] [--seed N]
    OMP_NUM_THREADS=1 python benchmarks/preferences.py --demo demo    # what `make demo` made

Prints Markdown. The win rate is the share of unseen prompts' samples that score higher than the
reference's sample of the same prompt, number and seed; ties count half, so that the reference
itself has 50 %.

Without a demo a decoder is trained for the purpose, on pictures of plain colors with spots of
noise, named after a color and a thing: "a red kite". Three names in ten tell the true color, the
others any, so that the decoder mostly draws another color than it was asked for; the scorer is
`color`. The shipped small vision tokenizer makes the codes. With a demo the scorer is `brightness`,
and the prompts are names of emoji that the demo was not trained on.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unimodal.model.how import How
from unimodal.model.prefer import COLORS, PreferSettings, Scorer, brightness, color, prefer
from unimodal.model.recipe import settings_from
from unimodal.model.sample import Sampler
from unimodal.model.train import train
from unimodal.tokenize.shards import Sample, ShardWriter
from unimodal.tokenize.vision.pixels import to_pixels
from unimodal.tokenize.vision.tokenizer import VisionTokenizer
from unimodal.tokenize.vocabulary import Vocabulary

SIDE = 32  # pixels: 4x4 codes
TRUE = 0.3  # share of pictures whose name tells their color
NAMES = ["red", "green", "blue", "yellow", "cyan", "magenta", "black", "white"]
# fmt: off
THINGS = [
    "kite", "boat", "house", "tree", "cup", "hat", "door", "lamp", "road", "hill",
    "bird", "fish", "star", "moon", "coat", "shoe", "cart", "bell", "drum", "leaf",
    "rose", "wall", "gate", "pond", "ring", "rope", "sail", "tent", "vase", "wheel",
]
# fmt: on

BASE: dict[str, Any] = {
    "precision": "float32",
    "device": "cpu",
    "decoder": {"width": 96, "layers": 3, "heads": 4, "kv_heads": 2, "ffn": 256},
    "data": {"context": 1024, "understanding": 0.0},
    "optimizer": {"kind": "muon", "lr": 8e-3, "warmup": 20, "weight_decay": 0.0},
    "checkpoint": {"every": 10_000, "keep": 1},
    "log": {"every": 20, "validate_every": 0, "tensorboard": False},
    "sampling": {"guidance": 1.0},
}
DPO: dict[str, Any] = {
    "precision": "float32",
    "device": "cpu",
    "accumulate": 1,
    "data": {"context": 2048},
    "optimizer": {"lr": 3e-4, "warmup": 5},
    "recompute": "none",
    "log": {"every": 10, "tensorboard": False},
}


def prompts(unseen: bool) -> list[str]:
    """Names of pictures: a fifth of all pairs of a color and a thing is kept for the end."""
    pairs = [
        (c, t)
        for i, c in enumerate(NAMES)
        for j, t in enumerate(THINGS)
        if ((i + j) % 5 == 0) == unseen
    ]
    return [f"a {c} {t}" for c, t in pairs]


def make_base(out: Path, steps: int, seed: int) -> Path:
    """Train a decoder that often draws another color than it is asked for."""
    tokenizer = VisionTokenizer.load("small")
    vocabulary = Vocabulary.bytes(tokenizer.codebook_size)
    rng = np.random.default_rng(seed)
    names = [name for name in prompts(unseen=False) for _ in range(8)]
    pictures = []
    for name in names:
        told = name.split()[1]
        real = told if rng.random() < TRUE else rng.choice(NAMES)
        shade = np.array(COLORS[real]) * 0.75 + 32 + rng.normal(0, 24, 3)
        spots = np.kron(rng.normal(0, 24, (8, 8, 3)), np.ones((SIDE // 8, SIDE // 8, 1)))
        pictures.append(np.clip(shade + spots, 0, 255).astype(np.uint8))
    writer = ShardWriter(out / "shards", tokenizer, vocabulary, {})
    samples = []
    for start in range(0, len(pictures), 64):
        with torch.inference_mode():
            codes = tokenizer.encode(to_pixels(np.stack(pictures[start : start + 64]))[:, None])
        for number, one in enumerate(codes.numpy(), start):
            tokens = len(vocabulary.text.encode(names[number]))
            caption = {"style": "name", "lang": "en", "text": names[number], "tokens": tokens}
            samples.append(
                Sample(
                    key=f"{number:06d}",
                    uid=f"{number:06d}",
                    kind="image",
                    codes=one.reshape(1, SIDE // 8, SIDE // 8),
                    split="train",
                    source_sha256=f"{number:064x}",
                    fps=None,
                    captions=[caption],
                )
            )
    writer.write(0, "unit", samples)
    writer.finish(1)
    settings = settings_from(None, BASE, {"steps": steps, "seed": seed})
    return train([out / "shards"], out / "base", settings)


def improve(
    base: Path,
    out: Path,
    seen: Sequence[str],
    scorer: Scorer,
    n: int,
    steps: int,
    seed: int,
    **sampling: float,
) -> tuple[Path, dict[str, int]]:
    """Sample, rank, and learn from the triplets; returns the checkpoint and prefer's counts."""
    asked = PreferSettings(n=n, seed=seed, **sampling)
    made = prefer(Sampler.load(base, "cpu"), base, seen, out / "triplets", asked, {"score": scorer})
    settings = settings_from("dpo", DPO, {"steps": steps, "seed": seed}, init=base)
    return train([made.path], out / "dpo", settings, init=base), made.counts


def win_rate(
    ours: Path,
    reference: Path,
    unseen: Sequence[str],
    scorer: Scorer,
    n: int,
    seed: int,
    **sampling: float,
) -> tuple[float, float, float]:
    """Win rate of `ours`, and the mean scores of the reference and of ours, drawn alike."""
    samplers = [Sampler.load(checkpoint, "cpu") for checkpoint in (reference, ours)]
    alike = {**samplers[0].defaults.model_dump(include=set(How.__annotations__)), **sampling}
    scores = []
    for sampler in samplers:
        drawn = sampler.images(unseen, n=n, seed=seed, **alike)
        found = scorer([p for p in unseen for _ in range(n)], [p for row in drawn for p in row])
        scores.append(np.array(found, np.float64))
    before, after = scores
    wins = ((after > before) + 0.5 * (after == before)).mean()
    return float(wins), float(before.mean()), float(after.mean())


def demo_names(demo: Path) -> tuple[list[str], list[str]]:
    """Names of emoji that a demo was trained on, and of others."""
    from unimodal.cli.demo import _emoji
    from unimodal.tokenize.shards import Shards

    rows = Shards.open(demo / "shards-pictures").index.select(["split", "captions"]).to_pylist()
    seen = [row["captions"][0]["text"] for row in rows if row["split"] == "train"]
    known = {row["captions"][0]["text"] for row in rows}
    return seen, [name for name in _emoji(10_000).values() if name not in known]


def proof(
    out: Path,
    base: Path,
    seen: Sequence[str],
    unseen: Sequence[str],
    scorer: Scorer,
    seed: int,
    steps: int,
    n: int = 4,
    **sampling: float,
) -> dict[str, Any]:
    """Learn from preferences on `seen` and count wins in `n` samples of each of `unseen`."""
    ours, counts = improve(base, out, seen, scorer, 8, steps, seed, **sampling)
    rate, before, after = win_rate(ours, base, unseen, scorer, n, seed + 1, **sampling)
    return {**counts, "judged": n * len(unseen), "before": before, "after": after, "wins": rate}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--demo", type=Path, help="directory of unimodal demo")
    parser.add_argument("--out", type=Path, help="keep what is made here")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="of DPO: 40, with a demo 50")
    parser.add_argument("--lr", type=float, help="of DPO: 3e-4, with a demo 1e-4")
    arguments = parser.parse_args()
    DPO["optimizer"]["lr"] = arguments.lr or (1e-4 if arguments.demo else 3e-4)
    steps = arguments.steps or (50 if arguments.demo else 40)
    out = arguments.out or Path(tempfile.mkdtemp())
    sampling = {}
    begun = time.process_time()
    if arguments.demo:
        base, scorer = arguments.demo / "ckpt", brightness
        seen, unseen = demo_names(arguments.demo)
        seen, unseen = seen[:200], unseen[200:]  # by the first 200 the rate of DPO was chosen
        sampling = {"guidance": 1.0, "plausible": 0.0}  # it knows its pictures by heart
    else:
        base, scorer = make_base(out, 200, arguments.seed), color
        seen, unseen = prompts(unseen=False), prompts(unseen=True)
    trained = time.process_time()
    found = proof(out, base, seen, unseen, scorer, arguments.seed, steps, **sampling)
    shown = [f"{v:.3f}" if isinstance(v, float) else str(v) for v in found.values()]
    print(f"| {' | '.join(found)} |\n{'|---' * len(found)}|\n| {' | '.join(shown)} |")
    now = time.process_time()
    print(f"\nCPU seconds: {trained - begun:.0f} for the base, {now - trained:.0f} for the rest")


if __name__ == "__main__":
    main()
