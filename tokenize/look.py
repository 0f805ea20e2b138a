"""What a vision tokenizer makes of pictures, videos and shards: figures, and a page to look at.

    media   -> the pixels that `unimodal tokenize` takes -> codes -> painted back ─┐
    shards  -> index, codes ───────────────────────────────────────> painted back ─┴> index.html

The page is one file that makes no request; what it shows lies beside it as PNG and MP4 too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from unimodal.pipeline.errors import UnimodalError, reason
from unimodal.pipeline.files import atomic
from unimodal.pipeline.markup import Html, h
from unimodal.pipeline.progress import Progress
from unimodal.pipeline.report.charts import histogram
from unimodal.pipeline.report.sheet import check_ours, data, document, figure, png
from unimodal.pipeline.report.words import count, cut_off, share, table
from unimodal.tokenize.document import TEMPORAL, Text, parts_length, segment_length
from unimodal.tokenize.fidelity import TASK, Eye, Figures, clip_row, fidelity, usage
from unimodal.tokenize.pictures import mp4
from unimodal.tokenize.plan import TokenizeSettings
from unimodal.tokenize.shards import Shards
from unimodal.tokenize.stats import SIZE, Statistics
from unimodal.tokenize.vocabulary import Vocabulary

if TYPE_CHECKING:
    from unimodal.tokenize.vision.tokenizer import VisionTokenizer

AMPLIFIED = 4  # times that differences are shown
STRIP = 8  # pictures of a film strip
SHEET = 12  # samples of a contact sheet
SAMPLED = 1 << 20  # codes over which the use of a codebook is counted


def look(
    things: Sequence[str],
    out: Path,
    settings: TokenizeSettings,
    *,
    tokenizer: str | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> tuple[Path, list[Figures]]:
    """Look at pictures, videos, shard directories and samples (`shards#KEY`); the page is in `out`.

    Media are tokenized as `unimodal tokenize` would with `settings`, uncut and uncropped, a video
    from its beginning for one window or `PICTURES`; tokens are counted with the byte vocabulary.
    Shards are painted by the tokenizer beside them, or by `tokenizer` if it is the same. Returns
    the page's path, and of each thing its figures, or its `error` where another could be shown.
    Raises `UnimodalError` if none could, or if `out` holds something else.
    """
    progress = progress or Progress()
    check_ours(out, "inspect")
    places = [_place(thing) for thing in things]
    trained = None if all(places) else _load(tokenizer or settings.tokenizer, device)
    sections, records = [], []
    progress.begin(TASK, 0, "pictures")
    try:
        for number, (thing, place) in enumerate(zip(things, places, strict=True), 1):
            name = re.sub(r"[^\w.-]+", "-", re.sub(r"\.\w{1,5}$", "", _name(thing)))
            stem = out / f"{number:02d}-{name[:60]}"
            try:
                if place is not None:
                    figures, body = _stored(*place, stem, tokenizer, device, progress)
                else:
                    assert trained is not None
                    eye = Eye(trained, progress, f"--area (now {settings.area})")
                    figures, body = _media(eye, thing, stem, settings)
            except (UnimodalError, OSError) as error:
                if len(things) == 1:
                    raise
                said = f"{thing}: {reason(error)}" if isinstance(error, OSError) else str(error)
                progress.note(f"left out: {said}")
                records.append({"thing": thing, "error": said})
                continue
            records.append({"thing": thing, **figures})
            sections.append(h("section", _heading(thing, figures), body))
    finally:
        progress.end(TASK)
    if not sections:
        raise UnimodalError(f"none of {len(things)} could be shown; see above")
    lost = [h("p", f"Left out: {r['error']}", class_="reason") for r in records if "error" in r]
    with atomic(out / "index.html") as temporary:
        temporary.write_text(
            document("inspect", [*sections, *lost]), encoding="utf-8", newline="\n"
        )
    return out / "index.html", records


def code_colors(codes: np.ndarray, counts: np.ndarray, factor: int = 1) -> np.ndarray:
    """A picture of codes [H, W]: uint8 RGB [H * factor, W * factor, 3].

    The hue is a hash of the code, the same in every picture; the more often a code occurs by
    `counts` (one a code of the codebook), the more vivid it is, on a logarithmic scale.
    """
    often = np.log2(np.maximum(counts[codes], 1)) / math.log2(max(2, counts.max()))
    hue = codes.astype(np.float64) * 0.6180339887 % 1  # golden ratio: neighbors are far apart
    hsv = np.stack([255 * hue, 60 + 180 * often, 105 + 145 * often], axis=-1).astype(np.uint8)
    colors = np.asarray(Image.fromarray(hsv, "HSV").convert("RGB"))
    return colors.repeat(factor, 0).repeat(factor, 1)


def difference(original: np.ndarray, painted: np.ndarray) -> np.ndarray:
    """Absolute difference of each channel, `AMPLIFIED` times: uint8, shape of both."""
    apart = np.abs(painted.astype(np.int16) - original)
    return np.minimum(AMPLIFIED * apart, 255).astype(np.uint8)


def _media(eye: Eye, uri: str, stem: Path, settings: TokenizeSettings) -> tuple[Figures, Html]:
    """A picture, or a video from its beginning."""
    row = clip_row(uri, settings)
    size, book = [row["width"], row["height"]], eye.tokenizer.codebook_size
    found, originals, codes, painted = eye.remade(row, settings)
    figures: Figures = {"kind": row["kind"], "source_size": size}
    if found[0].fps is not None:
        fps = float(found[0].fps)
        figures |= {"windows": len(found), "fps": fps, "seconds": len(originals) / fps}
        figures["seconds_of_the_source"] = row["duration_s"]
    tokens = sum(window.block_length(Vocabulary.bytes(book)) for window in found)
    figures |= _counted(codes, book, tokens, painted) | fidelity(originals, painted)
    return figures, _show(eye, stem, codes, painted, originals, figures)


def _show(
    eye: Eye,
    stem: Path,
    codes: np.ndarray,
    painted: np.ndarray,
    originals: np.ndarray | None,
    figures: Figures,
) -> Html:
    """Draw a picture or a video, write its files, and return its part of the page."""
    counts = np.bincount(codes.reshape(-1), minlength=eye.tokenizer.codebook_size)
    maps = [code_colors(one, counts, eye.tokenizer.spatial_factor) for one in codes]
    about = "one square a code: equal colors are equal codes, the more vivid the more often"
    fps, each = figures.get("fps"), figures.get("psnr_each")
    rows = [painted] if originals is None else [originals, painted]
    if fps is None:
        panels = [("Reconstruction", "from the codes alone", painted[0])]
        if originals is not None:
            apart = difference(originals[0], painted[0])
            panels.insert(0, ("Original", "as it is tokenized", originals[0]))
            panels.append((f"Difference × {AMPLIFIED}", "black where equal", apart))
        panels.append(("Codes", about, maps[0]))
        note = None
    else:
        panels = []
        for i in _even(len(painted), STRIP):
            name = f"{i / fps:.2f} s" + (f", {each[i]:.1f} dB" if each else "")
            stack = np.concatenate([*(row[i] for row in rows), maps[i // TEMPORAL]])
            panels.append((name, "", stack))
        order = "Original, reconstruction" if originals is not None else "Reconstruction"
        note = h("p", f"{order} and codes, from top to bottom. Codes: {about}.", class_="note")
    _sheet(stem, [(name, pixels) for name, _, pixels in panels], STRIP)
    return h(
        "div",
        note,
        h("div", (figure(*panel) for panel in panels), class_="four"),
        _tiles(figures),
        h("h3", "In motion") if fps else None,
        _movie(stem, np.concatenate(rows, axis=2), fps) if fps else None,
        _bars(each) if each else None,
    )


def _stored(
    folder: Path,
    key: str | None,
    stem: Path,
    tokenizer: str | None,
    device: str,
    progress: Progress,
) -> tuple[Figures, Html]:
    """A shard directory, or one sample of it."""
    shards = Shards.open(folder)
    row = None if key is None else shards.row(key)
    try:
        trained = _load(tokenizer or shards.vision_tokenizer_dir, device)
        made = shards.manifest["vision_tokenizer"]["digest"]
        if trained.digest != made:
            raise UnimodalError(f"the weights are another tokenizer's, {trained.digest[:12]}")
    except UnimodalError as error:
        said = f"{folder} cannot be painted ({error}): name its tokenizer, --tokenizer DIR"
        if row is not None or tokenizer is not None:
            raise UnimodalError(said) from error
        progress.note(said)
        return _overview(shards, None, stem)
    joint = bool(shards.manifest["settings"].get("joint"))
    eye = Eye(trained, progress, "the area that shards are made with", joint)
    if row is None:
        return _overview(shards, eye, stem)
    told = shards.index.slice(row, 1).to_pylist()[0]
    if told["task"] != "caption":
        return _document(shards, row, told, eye, stem)
    codes = shards.codes(row).astype(np.int64)
    painted = eye.paint(codes, told["kind"] == "image")
    names = ("key", "uid", "split", "start_s", "end_s", "fps", "source_sha256", "shard")
    facts: Figures = {name: told[name] for name in names if told[name] is not None}
    figures = _counted(
        codes, trained.codebook_size, segment_length(told, shards.vocabulary), painted
    )
    figures = {"kind": "sample", **facts, **figures}
    captions = [(c["style"], c["lang"], c["text"], c["tokens"]) for c in told["captions"]]
    body = [
        _show(eye, stem, codes, painted, None, figures),
        table(("Caption", "Language", "Text", "Tokens"), captions) if captions else None,
        table(("Of the index", ""), ((name, str(value)) for name, value in facts.items())),
    ]
    return figures | {"captions": told["captions"]}, h("div", body)


def _document(
    shards: Shards, row: int, told: Figures, eye: Eye, stem: Path
) -> tuple[Figures, Html]:
    """A sample of several pieces, in their order."""
    shown: list[Html] = []
    pictures: list[tuple[str, np.ndarray]] = []
    codes: list[np.ndarray] = []
    for piece in shards.segments(row):
        name = f"{piece.role}: " if told["task"] in ("chat", "edit") else ""
        if isinstance(piece.segment, Text):
            words = cut_off(piece.segment.text, 4000)
            shown.append(h("p", h("b", name), words, class_="caption", dir="auto"))
            continue
        segment = piece.segment.codes.astype(np.int64)
        image = segment.ndim == 2
        about = f"{_by(segment.shape)} codes"
        painted = eye.paint(segment[None] if image else segment[len(segment) // 2][None], image)
        shown.append(figure(f"{name}picture {len(pictures) + 1}", about, painted[0]))
        pictures.append((str(len(pictures) + 1), painted[0]))
        codes.append(segment.reshape(-1))
    if pictures:
        _sheet(stem, pictures, STRIP)
    names = ("key", "task", "split", "source_sha256", "shard")
    facts: Figures = {name: told[name] for name in names}
    tokens = parts_length(told["task"], told["segments"], shards.vocabulary)
    flat = np.concatenate([np.zeros(0, np.int64), *codes])
    used = _used(flat, eye.tokenizer.codebook_size)
    figures = {"kind": "document", **facts, "codes": len(flat), "tokens": tokens, **used}
    figures |= {"pictures": len(pictures), "segments": told["segments"]}
    rows = ((name, str(value)) for name, value in facts.items())
    return figures, h("div", shown, _tiles(figures), table(("Of the index", ""), rows))


def _overview(shards: Shards, eye: Eye | None, stem: Path) -> tuple[Figures, Html]:
    """What a shard directory holds, from its index and a bounded number of its codes."""
    index, totals, files = shards.index, shards.manifest["totals"], shards.manifest["shards"]
    book = shards.codebook_size
    statistics = Statistics(shards)
    counted = statistics.record()
    sizes, captions = counted["sizes"], counted["captions"]
    most = max(1, SAMPLED * len(index) // max(1, totals["vision_codes"]))
    some = [one.reshape(-1) for row in _even(len(index), most) for one in _codes(shards, row)]
    codes = np.concatenate([np.zeros(0, np.uint16), *some])
    counts = np.bincount(codes, minlength=book)
    figures: Figures = {
        "kind": "shards",
        **totals,
        "images": sum(size["count_all"] for size in sizes if size["kind"] == "image"),
        "windows": sum(size["count_all"] for size in sizes if size["kind"] == "video"),
        "shards": len(files),
        "bytes": sum(shard["bytes"] for shard in files),
        "codes": totals["vision_codes"],
        **counted,
        "counted": len(codes),
        **_used(codes, book),
    }
    spoken = [
        (c["style"], c["lang"], f"{c['count_all']:,}", f"{c['tokens_sum']:,}") for c in captions
    ]
    shapes = [
        (
            size["kind"],
            _by(size[name] for name in SIZE[1 if size["fps"] else 2 : 4]),
            f"{size['fps']:g}" if size["fps"] else "",
            f"{size['count_all']:,}",
        )
        for size in sizes[:10]
    ]
    panels = [
        ("Tokens of a sample", "without its captions", statistics.tokens),
        ("Uses of a code", f"of those that occur among {len(codes):,}", counts[counts > 0]),
    ]
    drawn = []
    for name, about, values in panels:
        if not len(values):
            continue
        chart = histogram(values, values[:0], [], f"{name}: {values.min()} to {values.max()}")
        drawn.append(h("figure", h("figcaption", h("b", name), about), chart, class_="panel"))
    sheet = (
        [h("h3", "Painted from the codes"), _contact(shards, eye, stem)]
        if eye and len(codes)
        else None
    )
    made = [
        (t["task"], t["kind"], t["split"], f"{t['count_all']:,}", f"{t['tokens_sum']:,}")
        for t in counted["tasks"]
    ]
    context = [(name, f"{n:,}") for name, n in counted["lengths"].items()]
    tables = [
        table(("Task", "Kind", "Split", "Samples", "Tokens"), made),
        table(("Length of a document", "Tokens"), context),
        table(("Captions", "Language", "Number", "Tokens"), spoken),
        table(("Kind", "Codes", "Pictures a second", "Samples"), shapes),
    ]
    body = [_tiles(figures), h("div", tables, class_="columns"), h("div", drawn, class_="panels")]
    return figures, h("div", body, sheet)


def _contact(shards: Shards, eye: Eye, stem: Path) -> Html:
    """A few samples, evenly out of all; of a video the picture in its middle."""
    cards, pictures = [], []
    for row in _even(len(shards.index), SHEET):
        told = shards.index.slice(row, 1).to_pylist()[0]
        first = next(_codes(shards, row), None)
        if first is None:
            continue
        codes, image = first, told["kind"] != "video"
        picture = eye.paint(codes[len(codes) // 2][None], image)[0]
        when = "" if image else f", {told['start_s']:.1f} to {told['end_s']:.1f} s"
        about = f"{_by(codes.shape[image:])} codes{when}; {told['split']}"
        text = cut_off(told["captions"][0]["text"], 200) if told["captions"] else None
        words = [h("p", f"#{told['key']}", class_="name"), h("p", about, class_="span")]
        words += [h("p", text, class_="caption", dir="auto")] if text else []
        shown = h("div", png(picture, told["key"]), class_="picture")
        cards.append(h("article", shown, h("div", words, class_="words"), class_="clip"))
        pictures.append((told["key"], picture))
    _sheet(stem, pictures, 4)
    return h("div", cards, class_="grid")


def _codes(shards: Shards, row: int) -> Iterator[np.ndarray]:
    """Codes [T, H, W] of each picture or clip of a sample."""
    if shards.index["task"][row].as_py() == "caption":
        yield shards.codes(row)
        return
    for piece in shards.segments(row):
        if not isinstance(piece.segment, Text):
            codes = piece.segment.codes
            yield codes[None] if codes.ndim == 2 else codes


def _place(thing: str) -> tuple[Path, str | None] | None:
    """Shard directory and key of a sample, if `thing` means such; None for media."""
    folder, mark, key = thing.rpartition("#")
    if mark and not Path(thing).exists() and Path(folder).is_dir():
        return Path(folder), key
    return (Path(thing), None) if Path(thing).is_dir() else None


def _load(name: str | Path, device: str) -> VisionTokenizer:
    from unimodal.tokenize.vision.tokenizer import VisionTokenizer as Trained

    return Trained.load(name, device)


def _used(codes: np.ndarray, book: int) -> Figures:
    used, perplexity = usage(np.bincount(codes.reshape(-1), minlength=book))
    return {"codebook": book, "distinct": used, "perplexity": perplexity}


def _counted(codes: np.ndarray, book: int, tokens: int, painted: np.ndarray) -> Figures:
    """Figures of codes [T, h, w] that stand for the pictures `painted` [F, H, W, 3]."""
    bits = codes.size * math.log2(book)
    return {
        "size": [painted.shape[2], painted.shape[1]],
        "pictures": len(painted),
        "grid": list(codes.shape),
        "codes": codes.size,
        "tokens": tokens,
        "bits": bits,
        "bits_per_pixel": bits / (painted.size / 3),
        **_used(codes, book),
    }


def _heading(thing: str, figures: Figures) -> list[Html]:
    claim = about = f"{figures['codes']:,} codes"
    if figures["kind"] == "shards":
        claim = count(figures["samples"], "sample")
        about = f"{count(figures['images'], 'image')} and {count(figures['windows'], 'window')} of "
        about += f"videos in {count(figures['shards'], 'shard')}; {figures['val']:,} to validate"
    elif figures["kind"] == "document":
        about = f"task {figures['task']}: {count(figures['pictures'], 'picture')}"
    else:
        about += f" of {count(figures['pictures'], 'picture')}, {_by(figures['size'])} pixels"
    if "psnr" in figures:
        claim = f"{figures['psnr']:.2f} dB"
        about += f" (the file: {_by(figures['source_size'])})"
    if "fps" in figures:
        about += f", {figures['fps']:g} a second"
    name = h("bdi", cut_off(_name(thing), 80), title=thing)
    return [h("h1", name, " ", h("strong", claim)), h("p", about, class_="from")]


def _by(sizes: Iterable[int]) -> str:
    return " × ".join(map(str, sizes))


def _tiles(figures: Figures) -> Html:
    book, grid = figures["codebook"], figures.get("grid", [])
    tiles = [
        ("Codes", f"{figures['codes']:,}", _by(grid[0 if "fps" in figures else 1 :])),
        ("Tokens", f"{figures['tokens']:,}", "of documents, and of blocks to be captioned"),
        (
            "Codebook used",
            share(figures["distinct"], book),
            f"{figures['distinct']:,} of {book:,}; perplexity {figures['perplexity']:,.0f}",
        ),
    ]
    if "bits" in figures:
        rate = f"{figures['bits_per_pixel']:.3f} bits a pixel, {math.log2(book):.4g} a code"
        tiles.append(("Size", f"{figures['bits'] / 8192:,.2f} KiB", rate))
    if "psnr" in figures:
        ssim = f"SSIM {figures['ssim']:.3f}" if figures["ssim"] is not None else ""
        tiles.insert(0, ("PSNR", f"{figures['psnr']:.2f} dB", ssim))
    if figures["kind"] == "shards":
        said = sum(caption["count_all"] for caption in figures["captions"])
        tiles += [
            ("Captions", f"{said:,}", f"{count(figures['uncaptioned'], 'sample')} without"),
            ("Quarantined", f"{figures['quarantined']:,}", "inputs left out"),
        ]
    parts = (h("div", h("dt", k), h("dd", h("b", v), h("span", about))) for k, v, about in tiles)
    return h("dl", parts, class_="tiles")


def _bars(each: Sequence[float]) -> Html:
    """PSNR of each picture."""
    low, high = math.floor(min(each)) - 1, math.ceil(max(each))
    step, unit = 1000 / len(each), 100 / (high - low)
    path = "".join(
        f"M{i * step:.1f} 110V{110 - (value - low) * unit:.1f}h{step * 0.86:.1f}V110z"
        for i, value in enumerate(each)
    )
    label = f"PSNR of each picture, on a scale from {low} to {high} dB"
    drawn = h("svg", h("path", class_="keep", d=path), viewBox="0 0 1000 112", role="img")
    about = "; four pictures share their codes and are painted together"
    return h("figure", drawn, h("figcaption", label, about))


def _sheet(stem: Path, pictures: Sequence[tuple[str, np.ndarray]], columns: int) -> None:
    """Write named pictures side by side as `stem`.png, `columns` to a row."""
    width = max(pixels.shape[1] for _, pixels in pictures) + 8
    height = max(pixels.shape[0] for _, pixels in pictures) + 26
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (width * min(columns, len(pictures)) + 8, height * rows + 8), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for i, (name, pixels) in enumerate(pictures):
        left, top = 8 + width * (i % columns), 8 + height * (i // columns)
        draw.text((left, top), name[: width // 8], "black", font)
        sheet.paste(Image.fromarray(pixels), (left, top + 18))
    with atomic(stem.with_name(f"{stem.name}.png")) as temporary:
        sheet.save(temporary, "PNG")


def _movie(stem: Path, pictures: np.ndarray, fps: float) -> Html:
    """Write uint8 [F, H, W, 3] as `stem`.mp4; returns the element that plays it."""
    film = mp4(pictures, fps)
    with atomic(stem.with_name(f"{stem.name}.mp4")) as temporary:
        temporary.write_bytes(film)
    played = dict.fromkeys(("controls", "loop", "muted", "autoplay", "playsinline"), True)
    return h("figure", h("video", src=data("video/mp4", film), **played))


def _name(thing: str) -> str:
    return Path(thing).name or thing


def _even(total: int, most: int) -> list[int]:
    """Up to `most` of range(total), evenly out of all."""
    return sorted({round(i) for i in np.linspace(0, total - 1, min(total, most))})
