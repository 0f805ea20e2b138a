"""Loss curves of a training left alone and of one that is stopped and killed on its way, overlaid.

    python benchmarks/resumed.py SHARDS --steps 80 -o docs/pictures/loss-resumed.png

Trains the recipe `tiny` twice on the processor: once in one go; once with SIGTERM after a third
of the steps and kill -9 after two thirds, each time resumed by the same command. Exits 1 unless
every loss is equal, bit for bit.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from unimodal.tokenize.training import read_record

SIZE, LEFT, TOP, RIGHT, BOTTOM = (1000, 420), 60, 40, 980, 380
GREY, BLUE, ORANGE = (190, 190, 190), (20, 80, 190), (220, 110, 20)


def losses(out: Path) -> dict[int, float]:
    """Loss by step."""
    return {row["step"]: row["loss"] for row in read_record(out / "metrics.jsonl") if "loss" in row}


def train(shards: Path, out: Path, steps: int, stop: tuple[int, int] | None = None) -> int:
    """Train; with `stop` = (step, signal) until that signal. Returns the last step written."""
    command = [sys.executable, "-m", "unimodal.cli", "train", str(shards), "-o", str(out)]
    command += ["--steps", str(steps), "--device", "cpu", "--quiet"]
    for item in ("minutes=none", "log.every=1", "log.validate_every=0", "checkpoint.every=10"):
        command += ["--set", item]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as process:
        while stop and process.poll() is None:
            if max(losses(out), default=0) >= stop[0]:
                process.send_signal(stop[1])
                break
            time.sleep(0.05)
    return max(losses(out))


def draw(whole: dict[int, float], parts: dict[int, float], marks: dict[str, int]) -> Image.Image:
    """Both curves over one another, and where the second was interrupted."""
    picture = Image.new("RGB", SIZE, "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(14)
    low, high, last = min(whole.values()), max(whole.values()), max(whole)

    def place(step: int, loss: float) -> tuple[float, float]:
        x = LEFT + (RIGHT - LEFT) * (step - 1) / (last - 1)
        return x, BOTTOM - (BOTTOM - TOP) * (loss - low) / (high - low)

    for tick in range(5):
        loss = low + (high - low) * tick / 4
        y = place(1, loss)[1]
        pen.line([(LEFT, y), (RIGHT, y)], (235, 235, 235))
        pen.text((8, y - 8), f"{loss:.2f}", "black", font)
        step = 1 + round((last - 1) * tick / 4)
        pen.text((place(step, low)[0] - 8, BOTTOM + 10), str(step), "black", font)
    for name, step in marks.items():
        x = place(step, low)[0]
        pen.line([(x, TOP), (x, BOTTOM)], ORANGE, 2)
        pen.text((x + 6, TOP), f"{name} at step {step}", ORANGE, font)
    pen.line([place(*point) for point in sorted(whole.items())], GREY, 9, "curve")
    pen.line([place(*point) for point in sorted(parts.items())], BLUE, 2)
    pen.text((LEFT, 10), "loss by step:  grey, left alone;  blue, interrupted twice", "black", font)
    return picture


def main() -> int:
    """Run both, compare, draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shards", type=Path)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("-o", "--out", type=Path, default=Path("loss-resumed.png"))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        whole, parts = Path(folder) / "whole", Path(folder) / "parts"
        train(given.shards, whole, given.steps)
        marks = {
            name: train(given.shards, parts, given.steps, (given.steps * third // 3, number))
            for third, (name, number) in enumerate(
                {"SIGTERM": signal.SIGTERM, "kill -9": signal.SIGKILL}.items(), 1
            )
        }
        train(given.shards, parts, given.steps)
        one, other = losses(whole), losses(parts)
    draw(one, other, marks).save(given.out)
    equal = sum(one[step] == other.get(step) for step in one)
    stopped = ", ".join(f"{name} at step {step}" for name, step in marks.items())
    print(f"{equal} of {len(one)} losses equal bit for bit ({stopped}); drawn in {given.out}")
    return 0 if equal == len(one) == len(other) else 1


if __name__ == "__main__":
    raise SystemExit(main())
