"""How the report writes things: names, figures, reasons, small repeated elements."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from unimodal.pipeline.clips import CLIPS
from unimodal.pipeline.decide import DEDUP
from unimodal.pipeline.judged import BETTER, Judged, in_words
from unimodal.pipeline.markup import Html, h, join
from unimodal.pipeline.report.charts import number
from unimodal.pipeline.why import stamp

LONGEST = 400
"""Characters of a caption, a name or a reason that are shown."""

SCORES = {
    "duration_s": ("Duration", "seconds"),
    "width * height": ("Picture area", "pixels"),
    "least(width, height)": ("Short side", "pixels"),
    "greatest(width, height) / least(width, height)": ("Aspect", "longer side over shorter side"),
    "fps": ("Frame rate", "frames a second"),
    "flow_mean": ("Motion, mean", "share of the short side per half second"),
    "flow_median": ("Motion, median", "share of the short side per half second"),
    "flow_p90": ("Motion, 90th percentile", "share of the short side per half second"),
    "luma_mean": ("Brightness", "gray levels, 0 to 255"),
    "contrast": ("Contrast", "gray levels, standard deviation within a frame"),
    "blur": ("Sharpness", "variance of the Laplacian at short side 256"),
    "colorfulness": ("Colorfulness", "Hasler and Süsstrunk; 0 is gray"),
    "black_ratio": ("Black", "share of frames"),
    "freeze_ratio": ("Frozen", "share of half seconds without change"),
    "flash_ratio": ("Flashes", "share of frames that jump in brightness"),
    "text_area_mean": ("Text area, mean", "share of the picture"),
    "text_area_p90": ("Text area, 90th percentile", "share of the picture"),
    "text_track_s": ("Standing text", "seconds that one box stands still"),
    "text_corner": ("Corner mark", "share of samples"),
    "quality": ("Technical quality", "0 wrecked to 1 pristine"),
    "aesthetic": ("Aesthetic", "LAION's scale, 1 to 10"),
    "nsfw": ("Unsafe", "probability"),
    "text_match": ("Caption match", "cosine of picture and first caption"),
}
"""What a score is called, and its unit; others go by the name of their column."""

BEST = "the best kept of its near-duplicates"
"""What decide's last rule asks for."""

NOT_SCORES = frozenset(
    (
        *("start_s", "end_s", "start_pts", "end_pts", "width", "height", "frames", "dup_rank"),
        *("crop_x0", "crop_y0", "crop_x1", "crop_y1"),
    )
)
"""Numbers of a clip that say where it is."""


def score_columns() -> list[str]:
    """Columns of the joined view that are measured, in its order."""
    return [
        f.name
        for f in CLIPS
        if (pa.types.is_floating(f.type) or pa.types.is_integer(f.type))
        and f.name not in NOT_SCORES
    ]


def keeps(rule: Judged) -> str:
    """What must hold to be kept, as people read it."""
    return BEST if rule.rule == DEDUP else signs(rule.keep)


def verdict(clip: Mapping[str, Any]) -> str:
    """What became of a clip, in a word."""
    return "kept" if clip["verdict"] == "keep" else "dropped"


def why_dropped(reason: str) -> Html:
    """A reason of decide's, "stage:score=value:keep", as people read it."""
    if reason.startswith(f"{DEDUP.stage}:"):
        return h("span", BETTER)
    _, _, rest = reason.partition(":")
    figure, _, keep = rest.partition(":")
    score, _, value = figure.rpartition("=")
    try:
        told = f"{score} {number(float(value))}"
    except ValueError:  # a rule of the user's has no score
        return h("code", f"not {signs(cut_off(keep or reason))}")
    return join(
        [signs(cut_off(told)), h("span", f" keep {signs(cut_off(keep.removeprefix(score)))}")]
    )


def reasons(clip: Mapping[str, Any]) -> list[str]:
    """Why a clip is dropped, as plain text."""
    return [cut_off(in_words(reason), 120) for reason in clip["reasons"] or []]


def span(clip: Mapping[str, Any]) -> str:
    """When a clip of a video is, or how large an image is."""
    if clip["kind"] == "image":
        return f"{clip['width']} × {clip['height']}"
    return f"{stamp(clip['start_s'])} to {stamp(clip['end_s'])} · {clip['duration_s']:.1f}\u00a0s"


def table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> Html:
    """A table that scrolls within itself where it is wider than the page."""
    return h(
        "div",
        h(
            "table",
            h("thead", h("tr", (h("th", head, scope="col") for head in heads))),
            h("tbody", (h("tr", (h("td", cell) for cell in row)) for row in rows)),
        ),
        class_="scroll",
        tabindex=0,
    )


def key(kind: str, text: str) -> Html:
    """An entry of a legend: a swatch of a style class, and what it stands for."""
    return h("span", h("i", class_=kind), text)


def signs(expression: str) -> str:
    """An expression of SQL with the signs that people write."""
    return expression.replace(">=", "≥").replace("<=", "≤").replace("*", "×")


def cut_off(text: str, longest: int = LONGEST) -> str:
    """Text, or the beginning of it."""
    return text if len(text) <= longest else text[: longest - 1] + "…"


def share(part: float, whole: float) -> str:
    """A part of a whole in percent."""
    if not whole:
        return "0 %"
    percent = 100 * part / whole
    return f"{percent:.0f} %" if percent >= 1 or not part else "< 1 %"


def count(number_of: int, one: str, many: str | None = None) -> str:
    """A number of things, in the singular or plural."""
    return f"{number_of:,} {one if number_of == 1 else many or one + 's'}"


def length(seconds: float) -> str:
    """A duration, to the precision that is of use."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 600:
        return f"{int(seconds // 60)} min {int(seconds % 60)} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"
