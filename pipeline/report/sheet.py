"""A page of figures and pictures beside text: one file that makes no request."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from unimodal.pipeline.errors import UnimodalError
from unimodal.pipeline.markup import Html, Inside, h

STYLE = """
section:first-child { margin-top: 0; }
.four { display: grid; grid-template-columns: repeat(4, 1fr); gap: .9rem; margin-top: 1rem; }
.clip .picture { aspect-ratio: 4 / 3; }
.clip img { width: 100%; height: 100%; object-fit: contain; }
.columns, .panels, figure > svg { margin-top: 1.4rem; }
video { max-width: 46rem; }
figure { margin: 0; }
figure > * { display: block; width: 100%; height: auto; border-radius: 4px; }
figcaption { font-size: 13px; line-height: 1.35; color: var(--soft); margin: .35rem 0; }
figcaption b { color: var(--ink); font-weight: 620; display: block; }
@media (max-width: 55rem) { .four { grid-template-columns: 1fr 1fr; } }
"""


def document(command: str, body: Sequence[Html]) -> str:
    """The page that `unimodal COMMAND` writes."""
    style = (Path(__file__).parent / "style.css").read_text("utf-8") + STYLE
    policy = "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'"
    head = [
        h("meta", charset="utf-8"),
        h("meta", name="generator", content=f"unimodal {command}"),
        h("meta", http_equiv="Content-Security-Policy", content=policy),
        h("meta", name="viewport", content="width=device-width, initial-scale=1"),
        h("title", f"unimodal {command}"),
        h("style", Html(style)),
    ]
    top = h("header", h("p", "unimodal", h("span", command), class_="brand"))
    page = h("html", h("head", head), h("body", top, h("main", body)), lang="en")
    return f"<!doctype html>\n{page}\n"


def check_ours(out: Path, command: str) -> None:
    """Raise `UnimodalError` if writing into `out` could overwrite more than such a page."""
    page = out / "index.html"
    ours = page.is_file() and f"unimodal {command}" in page.read_text("utf-8", "replace")[:2000]
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not ours):
        raise UnimodalError(f"{out} is there and holds no page of ours: choose another -o")


def figure(name: str, about: Inside, pixels: np.ndarray) -> Html:
    """A picture, uint8 [H, W, 3], with words below it."""
    return h("figure", png(pixels, name), h("figcaption", h("b", name, dir="auto"), about))


def png(pixels: np.ndarray, alt: str) -> Html:
    """A picture, uint8 [H, W, 3]."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    height, width = pixels.shape[:2]
    source = data("image/png", file.getvalue())
    return h("img", src=source, width=width, height=height, alt=alt)


def data(kind: str, content: bytes) -> str:
    """An address that is the content itself."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
