"""The pictures of docs/proof.md and docs/gallery.md, from what benchmarks/proof.py has kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SCALE = 2
"""Screen pixels for each of a picture's."""
GAP = 6
LINE = 15
"""Height of a line of text."""


def write(kept: Path, out: Path, scales: Sequence[float], editing: str) -> list[Path]:
    """Write every picture whose material is there; returns their paths."""
    out.mkdir(parents=True, exist_ok=True)
    makers = {
        "shapes-sweep.png": lambda: sweep(kept, scales),
        "shapes-video.png": lambda: strips(kept),
        "shapes-continuation.png": lambda: continuation(kept),
        "shapes-edits.png": lambda: edits(kept, editing),
        "shapes-descriptions.png": lambda: descriptions(kept),
    }
    made = []
    for name, make in makers.items():
        try:
            sheet = make()
        except FileNotFoundError:
            continue
        # Few colours: a palette halves the file and nobody sees it.
        sheet.quantize(255, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(
            out / name, optimize=True
        )
        made.append(out / name)
    if (kept / "videos-seen.npz").exists():
        frames = animation(kept)
        path = out / "shapes-video.webp"
        more = {"save_all": True, "append_images": frames[1:], "duration": 125, "loop": 0}
        frames[0].save(path, quality=60, method=6, **more)
        made.append(path)
    return made


def grid(
    rows: Sequence[Sequence[np.ndarray | str]], heads: Sequence[str] = (), width: int = 64
) -> Image.Image:
    """Pictures uint8 [64, 64, 3] and words in rows, all columns alike, under their heads."""
    cell = width * SCALE
    columns = max(map(len, rows))
    top = LINE + GAP if heads else GAP
    sheet = Image.new(
        "RGB", (columns * (cell + GAP) + GAP, top + len(rows) * (cell + GAP)), "white"
    )
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for column, head in enumerate(heads):
        draw.text((GAP + column * (cell + GAP), 4), head, "black", font)
    for number, row in enumerate(rows):
        for column, what in enumerate(row):
            place = GAP + column * (cell + GAP), top + number * (cell + GAP)
            if isinstance(what, str):
                lines = wrapped(what, cell - 4, font)
                draw.multiline_text((place[0] + 2, place[1] + 8), lines, "black", font, spacing=3)
            else:
                sheet.paste(enlarged(what), place)
    return sheet


def wrapped(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """The text in lines of at most `width` pixels; line breaks stay."""
    lines: list[str] = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split(" "):
            longer = f"{line} {word}".strip()
            if line and font.getlength(longer) > width:
                lines.append(line)
                longer = word
            line = longer
        lines.append(line)
    return "\n".join(lines)


def enlarged(pixels: np.ndarray) -> Image.Image:
    """`SCALE` times as large, pixel by pixel."""
    return Image.fromarray(np.kron(pixels, np.ones((SCALE, SCALE, 1), np.uint8)))


def sweep(kept: Path, scales: Sequence[float]) -> Image.Image:
    """Captions in rows, scales of guidance in columns."""
    with np.load(kept / "sweep.npz") as data:
        drawn, captions = data["drawn"], data["captions"]  # [scales, captions, 64, 64, 3]
    heads = ["", *(f"guidance {scale:g}" for scale in scales)]
    rows = [[str(caption), *drawn[:, i]] for i, caption in enumerate(captions)]
    return grid(rows, heads)


def strips(kept: Path) -> Image.Image:
    """A clip of each motion, one frame of each four: of seen combinations, and of unseen ones."""
    places = [1, 5, 9, 13]
    halves = []
    for name in ("seen", "unseen"):
        with np.load(kept / f"videos-{name}.npz") as data:
            drawn, captions = data["drawn"], data["captions"]
        halves.append([[f"{captions[i]}\n\n({name})", *drawn[i][places]] for i in range(6)])
    rows = [[*left, *right] for left, right in zip(*halves, strict=True)]
    return grid(rows, ["", *(f"frame {place}" for place in places)] * 2)


def animation(kept: Path) -> list[Image.Image]:
    """Twelve clips of seen combinations side by side with their captions, frame by frame."""
    with np.load(kept / "videos-seen.npz") as data:
        drawn, captions = data["drawn"][:12], data["captions"][:12]
    font = ImageFont.load_default(11)
    cell, high = 64 * SCALE, 64 * SCALE + 2 * LINE + 4
    sheets = []
    for frame in range(drawn.shape[1]):
        sheet = Image.new("RGB", (6 * (cell + GAP) + GAP, 2 * (high + GAP) + GAP), "white")
        draw = ImageDraw.Draw(sheet)
        for i in range(len(drawn)):
            x, y = GAP + i % 6 * (cell + GAP), GAP + i // 6 * (high + GAP)
            sheet.paste(enlarged(drawn[i, frame]), (x, y))
            told = wrapped(str(captions[i]), cell, font)
            draw.multiline_text((x, y + cell + 2), told, "black", font, spacing=2)
        sheets.append(sheet)
    return sheets


def continuation(kept: Path) -> Image.Image:
    """Frames that were given, frames that the model added, and what was there."""
    with np.load(kept / "continuation-seen.npz") as data:
        drawn, real, captions = data["drawn"], data["real"], data["captions"]
    given, new = [1, 5], [9, 13]
    heads = ["(was not told)", *(f"given {i}" for i in given), *(f"new {i}" for i in new)]
    rows = [[str(captions[i]), *real[i][given], *drawn[i][new], *real[i][new]] for i in range(6)]
    return grid(rows, [*heads, *(f"real {i}" for i in new)])


def edits(kept: Path, editing: str) -> Image.Image:
    """Sources, what was told, results: of seen combinations, and of unseen ones."""
    halves = []
    for name in ("seen", "unseen"):
        with np.load(kept / f"edits-{name}-{editing}.npz") as data:
            sources, drawn, told = data["sources"], data["drawn"], data["told"]
        halves.append([[sources[i], f"{told[i]}\n\n({name})", drawn[i]] for i in range(8)])
    rows = [[*left, *right] for left, right in zip(*halves, strict=True)]
    return grid(rows, ["source", "told", "result"] * 2)


def descriptions(kept: Path) -> Image.Image:
    """Pictures, and what the model says of them; what is wrong is marked, with the truth."""
    with np.load(kept / "described-pictures-unseen.npz") as data:
        media, texts, captions = data["media"], data["texts"], data["captions"]
    every = []
    for picture, text, caption in zip(media, texts, captions, strict=True):
        said = str(text) if text == caption else f"{text}\n\nWRONG: it is\n{caption}"
        every += [picture, said]
    return grid([every[start : start + 6] for start in range(0, 24, 6)])
