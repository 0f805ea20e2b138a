"""How often a model of ours is right about pictures that it never saw, through vLLM.

    OMP_NUM_THREADS=1 python -m benchmarks.self_captioner -o DIR [--n 100] [--backend vllm]

A small decoder is trained by `unimodal.model.train` on pictures and their captions, and on nothing
else: a caption behind every picture. Then new pictures are written as files, and go the way of
every user: `unimodal curate`, and `unimodal caption --source checkpoint`. A caption is right if it
names the colour and the shape. Pictures are of two kinds:

    seen    a colour and a shape that training had together, a picture that it had not
    pair    a colour and a shape that it never had together (one in six)

A picture is four dots of a colour, and their arrangement is the shape. Dots are a code wide and
two codes apart, so that the small vision tokenizer gives all dots of a colour much the same codes:
single codes tell the colour, and only their order tells the shape.

As a control the same decoder, on the same backend, is handed codes in another order, and the codes
of another picture. DIR/figures.json holds the figures; a checkpoint that is there is kept.
"""

from __future__ import annotations

import argparse
import base64
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from unimodal.model.recipe import settings_from
from unimodal.model.sample import Sampler
from unimodal.model.train import train
from unimodal.pipeline.run import Run
from unimodal.tokenize.shards import Sample, ShardWriter
from unimodal.tokenize.vision.pixels import to_pixels
from unimodal.tokenize.vision.tokenizer import VisionTokenizer
from unimodal.tokenize.vocabulary import Vocabulary

SEED = 0
KINDS = "seen", "pair"
COLOURS = {
    **{"red": (242, 36, 36), "orange": (242, 190, 36), "lime": (139, 242, 36)},
    **{"green": (36, 242, 87), "cyan": (36, 242, 242), "blue": (36, 87, 242)},
    **{"violet": (139, 36, 242), "magenta": (242, 36, 190), "salmon": (242, 172, 157)},
    **{"cream": (242, 236, 157), "pistachio": (184, 242, 157), "mint": (157, 242, 195)},
    **{"sky": (157, 226, 242), "lavender": (157, 163, 242), "lilac": (215, 157, 242)},
    **{"rose": (242, 157, 205)},
}
"""Eight hues, and eight pale ones. With eight in all the words are not put together anew: what is
left of shapes for a colour is then learned sooner than how its dots stand."""
SHAPES = {
    "block": ("##", "##"),
    "tee": ("###", ".#."),
    "corner": ("#.", "#.", "##"),
    "zigzag": ("##.", ".##"),
    "diamond": (".#.", "#.#", ".#."),
    "frame": ("#.#", "...", "#.#"),
}
GROUNDS = tuple(range(16, 48, 4))
"""Grey levels, of which captions say nothing: on light ones single codes tell more of the shape."""
ACROSS = 4
"""Places for dots along each side of a picture."""
DOT = 8
"""Pixels along the side of a dot: a code."""
PITCH = 24
"""Pixels from dot to dot. With 16, codes tell which neighbours a dot has."""
SHADE = 12
"""Levels by which each of a colour's channels differs from picture to picture, at most."""
PICTURES = 4000
"""Those held back are among them."""
LARGER = 4
"""Times that a picture's file is larger than what the decoder sees: JPEG is kind to that."""
RECIPE: dict[str, Any] = {
    "seed": SEED,
    "steps": 1200,
    "precision": "float32",
    "device": "cpu",
    # Heads of 32, the least that vLLM's attention has on a CPU.
    "decoder": {"width": 128, "layers": 4, "heads": 4, "kv_heads": 4, "ffn": 384, "qk_norm": True},
    "data": {"context": 2048, "understanding": 1.0, "described_vision_weight": 0.0},
    "optimizer": {"kind": "muon", "lr": 6e-3, "min_lr": 2e-4, "warmup": 30, "weight_decay": 0.05},
    "checkpoint": {"every": 10_000, "keep": 1},
    "log": {"every": 20, "validate_every": 0, "tensorboard": False},
}
RECIPE["decoder"]["rope_theta"] = 1000.0  # documents have 180 tokens
CURATE = 'skip=["text", "quality", "embed", "nsfw", "dedup", "match"]', "decide.image_min_area=0"


@dataclass(frozen=True)
class Thing:
    """Four dots on a dark ground."""

    colour: str
    shape: str
    ground: int
    row: int
    column: int
    shade: tuple[int, int, int]

    @property
    def caption(self) -> str:
        return f"a {self.shape} of {self.colour} dots"

    @property
    def apart(self) -> bool:
        """Whether colour and shape are never together in training; one shape of each colour is."""
        return (list(COLOURS).index(self.colour) + list(SHAPES).index(self.shape)) % 6 == 0

    def picture(self) -> np.ndarray:
        """uint8 [96, 96, 3]"""
        pixels = np.full((ACROSS * PITCH, ACROSS * PITCH, 3), self.ground, np.uint8)
        for row, dots in enumerate(SHAPES[self.shape], self.row):
            for column, dot in enumerate(dots, self.column):
                if dot == "#":
                    y, x = (place * PITCH + (PITCH - DOT) // 2 for place in (row, column))
                    pixels[y : y + DOT, x : x + DOT] = np.add(COLOURS[self.colour], self.shade)
        return pixels


def things() -> dict[str, list[Thing]]:
    """Random pictures, all different: for `training`, and of each of KINDS."""
    rng = np.random.default_rng(SEED)
    every: dict[Thing, None] = {}
    while len(every) < PICTURES:
        shape = str(rng.choice(list(SHAPES)))
        rows, columns = len(SHAPES[shape]), len(SHAPES[shape][0])
        one = Thing(
            str(rng.choice(list(COLOURS))),
            shape,
            int(rng.choice(GROUNDS)),
            int(rng.integers(ACROSS - rows + 1)),
            int(rng.integers(ACROSS - columns + 1)),
            tuple(rng.integers(-SHADE, SHADE + 1, 3).tolist()),
        )
        every[one] = None
    known = [one for one in every if not one.apart]
    new = len(known) // 8
    return {
        "training": known[new:],
        "seen": known[:new],
        "pair": [one for one in every if one.apart],
    }


def vocabulary(folder: Path, codebook_size: int) -> Vocabulary:
    """Bytes, and an id for each word."""
    folder.mkdir(parents=True, exist_ok=True)
    words = [f" {word}".encode() for word in ("of", "dots", *COLOURS, *SHAPES)]
    ranks = [bytes([byte]) for byte in range(256)] + words
    lines = [f"{base64.b64encode(one).decode()} {rank}\n" for rank, one in enumerate(ranks)]
    (folder / "words.tiktoken").write_text("".join(lines))
    return Vocabulary.named(str(folder / "words.tiktoken"), codebook_size)


def learn(out: Path) -> Path:
    """The checkpoint in `out`, trained if it is not there."""
    if (out / "ckpt" / "latest").exists():
        return out / "ckpt"
    tokenizer = VisionTokenizer.load("small")
    words = vocabulary(out, tokenizer.codebook_size)
    writer = ShardWriter(out / "shards", tokenizer, words, {})
    samples = []
    for number, one in enumerate(things()["training"]):
        told = {"style": "plain", "lang": "en", "text": one.caption}
        samples.append(
            Sample(
                key=f"{number:05d}",
                uid=f"{number:05d}",
                kind="image",
                codes=codes(tokenizer, one.picture()),
                split="train",
                source_sha256=f"{number:064x}",
                captions=[told | {"tokens": len(words.text.encode(one.caption))}],
            )
        )
    writer.write(0, "unit", samples)
    writer.finish(1)
    return train([out / "shards"], out / "ckpt", settings_from(None, RECIPE))


def codes(tokenizer: VisionTokenizer, picture: np.ndarray) -> np.ndarray:
    """Of a picture uint8 [H, W, 3]: int64 [1, H / 8, W / 8]."""
    return tokenizer.encode(to_pixels(picture[None, None]))[0].numpy()


def described(out: Path, checkpoint: Path, asked: Sequence[Thing], *more: str) -> list[str | None]:
    """Captions of pictures, by their files, through `curate` and `caption`; None where there is
    none. `more` are arguments of `caption`."""
    (out / "pictures").mkdir(parents=True, exist_ok=True)
    for number, one in enumerate(asked):
        pixels = one.picture().repeat(LARGER, 0).repeat(LARGER, 1)
        Image.fromarray(pixels).save(out / "pictures" / f"{number:05d}.png")
    run = str(out / "run")
    sets = [f"--set={one}" for one in CURATE]
    _unimodal("curate", str(out / "pictures"), "-o", run, "--engine=inline", "-q", *sets)
    source = ["--source=checkpoint", f"--model={checkpoint}", "--engine=inline"]
    _unimodal("caption", run, *source, *more)
    found: list[str | None] = [None] * len(asked)
    for clip in Run.open(run).clips.to_pylist():
        said = next(iter(clip["captions"]), {"text": None})["text"]
        for uri in (clip["uri"], *(clip["aliases"] or ())):  # files of the same bytes
            found[int(Path(uri).stem)] = said
    return found


def _unimodal(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "unimodal.cli", *arguments], check=True)


def judged(asked: Sequence[Thing], texts: Sequence[str | None]) -> dict[str, Any]:
    """How many captions are right: in colour, in shape, in both."""
    found = {"n": len(asked), "colour": 0, "shape": 0, "both": 0}
    for one, text in zip(asked, texts, strict=True):
        words = (text or "").split()
        colour = [w for w in words if w in COLOURS] == [one.colour]
        shape = [w for w in words if w in SHAPES] == [one.shape]
        found["colour"] += colour
        found["shape"] += shape
        found["both"] += colour and shape
    return found


def controls(checkpoint: Path, asked: Sequence[Thing], backend: str) -> dict[str, dict[str, Any]]:
    """The same, where the codes are in another order, or those of another picture."""
    sampler = Sampler.load(checkpoint, "cpu", backend=backend)
    tokenizer = VisionTokenizer.load("small")
    own = [codes(tokenizer, one.picture())[0] for one in asked]
    rng = np.random.default_rng(SEED)
    ways = {
        "as they are": own,
        "in another order": [rng.permuted(one.reshape(-1)).reshape(one.shape) for one in own],
        "of another picture": own[1:] + own[:1],
    }
    return {way: judged(asked, sampler.describe(some, 32)) for way, some in ways.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("-o", "--out", type=Path, required=True, help="all that is made")
    parser.add_argument("--n", type=int, default=100, help="pictures of each kind")
    parser.add_argument("--backend", default="vllm", help="vllm or torch")
    arguments = parser.parse_args()
    out = arguments.out
    begun = time.process_time()
    checkpoint = learn(out)
    print(f"trained: {time.process_time() - begun:.0f} s of one core", flush=True)
    asked = {kind: things()[kind][: arguments.n] for kind in KINDS}
    every = [one for some in asked.values() for one in some]
    texts = iter(described(out, checkpoint, every, f"--set=caption.backend={arguments.backend}"))
    figures: dict[str, Any] = {
        kind: judged(some, [next(texts) for _ in some]) for kind, some in asked.items()
    }
    figures["codes"] = controls(checkpoint, asked["seen"], arguments.backend)
    (out / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
