"""The demo's page: one self-contained HTML file. Names and captions are text, and escaped."""

from __future__ import annotations

import base64
import io
import json
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unimodal.pipeline.files import atomic
from unimodal.pipeline.judged import in_words

if TYPE_CHECKING:
    import numpy as np

    from unimodal.cli.demo import Story

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1180px; margin: 2rem auto; padding: 0 1rem;
       color: #1c2330; background: #fff }
h1 { margin-bottom: 0 } h2 { margin-top: 2.2rem; border-bottom: 1px solid #dde; }
table { border-collapse: collapse } td, th { padding: .15rem .8rem .15rem 0; text-align: left }
th { font-weight: 500; color: #667 }
td.why { overflow-wrap: anywhere; min-width: 9rem }
td.n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums }
.grid { display: flex; flex-wrap: wrap; gap: .6rem } figure { margin: 0; width: 8.5rem }
figure.wide { width: 16.6rem } figcaption { font-size: 12px; color: #445; line-height: 1.25 }
img { image-rendering: pixelated; vertical-align: top; border: 1px solid #e4e6ee }
.pair img { width: 4rem; height: 4rem } .wide img { width: 8rem }
.strip { white-space: nowrap } .strip img { height: 56px }
.drop { opacity: .45 } .note { color: #667 }
"""


def write(story: Story, runs: dict[str, Path]) -> Path:
    """Write index.html into the demo's directory and return its path."""
    body = [
        "<h1>unimodal demo</h1>",
        "<p class=note>Real media from ordinary packages, through the four commands, on this "
        "machine.</p>",
        _summary(story),
        _clips(runs["footage"]),
        "<h2>Tokenize: originals and what their tokens give back</h2>",
        "<p class=note>Left the picture, right its reconstruction from one code per 8×8 pixels."
        "</p>",
        _pairs(story.pairs, wide=True),
        "<h2>Train: loss</h2>",
        _curve(story.out / "ckpt"),
        "<h2>Sample: names that were learned</h2>",
        "<p class=note>Left the training picture (from its tokens), right the drawing. Nearest "
        "training picture is the prompted one for "
        f"{escape(str(story.figures['nearest training picture is the prompted one']))} of "
        f"{story.figures['held-in prompts drawn']} prompts.</p>",
        _pairs(story.drawn),
        "<h2>Sample: names that were never seen</h2>",
        "<p class=note>A model this small learns by heart: a new name gives no more than "
        "colours and textures.</p>",
        _pictures(story.new),
        "<h2>Describe</h2>",
        _described(story.described),
    ]
    if story.clip is not None:
        body += ["<h2>Sample: a clip</h2>", f"<img width=288 src='{_gif(story.clip)}'>"]
    page = (
        "<!doctype html><html lang=en><meta charset=utf-8><title>unimodal demo</title>"
        f"<meta name=viewport content='width=device-width'><style>{STYLE}</style>"
        + "\n".join(body)
        + "</html>\n"
    )
    path = story.out / "index.html"
    with atomic(path) as temporary:
        temporary.write_text(page)
    return path


def _summary(story: Story) -> str:
    rows = [(f"{stage}, seconds", f"{seconds:.0f}") for stage, seconds in story.times.items()]
    rows += [(k, str(v)) for k, v in story.figures.items() if k != "held_in_accuracy"]
    cells = "".join(f"<tr><th>{escape(k)}</th><td>{escape(v)}</td></tr>" for k, v in rows)
    return f"<table>{cells}</table>"


def _clips(run_dir: Path) -> str:
    """A row a clip: keyframes, span, what began and ended it, scores, verdict."""
    from unimodal.pipeline.run import Run

    run = Run.open(run_dir)
    frames = _keyframes(run)
    head = "<tr><th>clip<th>keyframes<th>from<th>to<th>cut by<th>motion<th>light<th>verdict</tr>"
    rows = []
    for row in run.clips.to_pylist():
        strip = "".join(f"<img src='{uri}'>" for uri in frames.get(row["uid"], []))
        span = [f"{row[k]:.2f} s" if row[k] is not None else "" for k in ("start_s", "end_s")]
        cut = f"{row['starts_at']} – {row['ends_at']}" if row["kind"] == "video" else ""
        flow = "" if row["flow_mean"] is None else f"{row['flow_mean']:.4f}"
        luma = "" if row["luma_mean"] is None else f"{row['luma_mean']:.0f}"
        verdict = row["verdict"] + (
            "".join(f"<br>{escape(in_words(r))}" for r in row["reasons"] or [])
        )
        rows.append(
            f"<tr class={row['verdict']}><td>{escape(Path(row['uri']).name)}"
            f"<td class=strip>{strip}<td class=n>{span[0]}<td class=n>{span[1]}<td>{escape(cut)}"
            f"<td class=n>{flow}<td class=n>{luma}<td class=why>{verdict}</tr>"
        )
    return (
        "<h2>Curate: clips, cuts and scores</h2><p class=note>Motion is mean optical flow over the "
        "short side, at 2 frames a second; light is mean luma, 0 to 255.</p>"
        f"<table>{head}{''.join(rows)}</table>"
    )


def _keyframes(run: Any) -> dict[str, list[str]]:
    """Small data URIs of four keyframes of each clip, in order."""
    from PIL import Image

    from unimodal.pipeline.report.pictures import places

    wanted: dict[str, dict[str, list[str]]] = {}  # part, uid, members
    for row in run.clips.select(["part", "uid"]).to_pylist():
        members = [
            sample["member"]
            for sample in run.samples(row["part"])[row["uid"]]
            if sample["keyframe"]
        ]
        shown = [members[i] for i in _even(len(members), 4)]
        wanted.setdefault(row["part"], {})[row["uid"]] = shown
    found: dict[str, list[str]] = {}
    for part, clips in wanted.items():
        tar = run.frames_tar(part)
        at = places(tar, [member for members in clips.values() for member in members])
        with tar.open("rb") as file:
            for uid, members in clips.items():
                for member in members:
                    offset, size = at[member]
                    file.seek(offset)
                    image = Image.open(io.BytesIO(file.read(size)))
                    image.thumbnail((132, 56))
                    found.setdefault(uid, []).append(_encoded(image, "JPEG"))
    return found


def _even(total: int, count: int) -> list[int]:
    if total <= count:
        return list(range(total))
    return [round(i * (total - 1) / (count - 1)) for i in range(count)]


def _pairs(pairs: list[tuple[str, np.ndarray, np.ndarray]], wide: bool = False) -> str:
    cells = [
        f"<figure class='{'wide' if wide else 'pair'}'><img src='{_png(left)}'>"
        f"<img src='{_png(right)}'><figcaption>{escape(text)}</figcaption></figure>"
        for text, left, right in pairs
    ]
    return f"<div class=grid>{''.join(cells)}</div>"


def _pictures(pictures: list[tuple[str, np.ndarray]]) -> str:
    cells = [
        f"<figure class=pair><img src='{_png(one)}'>"
        f"<figcaption>{escape(text)}</figcaption></figure>"
        for text, one in pictures
    ]
    return f"<div class=grid>{''.join(cells)}</div>"


def _described(rows: list[tuple[np.ndarray, str, str]]) -> str:
    cells = "".join(
        f"<tr><td class=pair><img width=48 src='{_png(picture)}'><td>{escape(text)}"
        f"<td class=note>{escape(name)}</tr>"
        for picture, name, text in rows
    )
    return f"<table><tr><th>picture<th>the model says<th>its name</tr>{cells}</table>"


def _curve(checkpoint: Path) -> str:
    """Training loss by modality as an inline SVG, logarithmic in the loss."""
    import math

    lines = (checkpoint / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    width, height = 900, 240
    series = {
        name: [(r["step"], r[name]) for r in rows if r.get(name)]
        for name in ("loss/generation/text", "loss/generation/vision", "loss/understanding/text")
    }
    series = {name: points for name, points in series.items() if len(points) > 1}
    if not series:
        return "<p class=note>Too few steps for a curve.</p>"
    steps = max(p[0] for points in series.values() for p in points)
    values = [math.log10(p[1]) for points in series.values() for p in points]
    low, high = min(values), max(values) + 1e-9
    parts = []
    for (name, points), colour in zip(
        series.items(), ("#c2410c", "#1d4ed8", "#15803d"), strict=False
    ):
        path = " ".join(
            f"{60 + (width - 70) * s / steps:.1f},"
            f"{10 + (height - 40) * (high - math.log10(v)) / (high - low):.1f}"
            for s, v in points
        )
        parts.append(f"<polyline fill=none stroke='{colour}' points='{path}'/>")
        parts.append(
            f"<text x={width - 8} y={30 + 18 * len(parts) // 2} text-anchor=end fill='{colour}'>"
            f"{escape(name)}</text>"
        )
    marks = (
        f"<text x=4 y=18>{10**high:.3g}</text><text x=4 y={height - 32}>{10**low:.2g}</text>"
        f"<text x={width - 8} y={height - 8} text-anchor=end>step {steps}</text>"
    )
    return (
        f"<svg viewBox='0 0 {width} {height}' width=100% font-size=13 fill='#667'>"
        f"{''.join(parts)}{marks}</svg>"
    )


def _png(pixels: np.ndarray) -> str:
    from PIL import Image

    return _encoded(Image.fromarray(pixels), "PNG")


def _gif(frames: np.ndarray) -> str:
    from PIL import Image

    first, *rest = (Image.fromarray(frame) for frame in frames)
    return _encoded(first, "GIF", save_all=True, append_images=rest, duration=125, loop=0)


def _encoded(image: Any, form: str, **options: Any) -> str:
    file = io.BytesIO()
    image.convert("RGB").save(file, format=form, **options)
    data = base64.b64encode(file.getvalue()).decode()
    return f"data:image/{form.lower()};base64,{data}"
