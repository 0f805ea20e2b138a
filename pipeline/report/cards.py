"""A clip as a card: its picture, what became of it and why, and all that was measured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from unimodal.pipeline.markup import Html, h
from unimodal.pipeline.report.charts import number
from unimodal.pipeline.report.facts import Facts
from unimodal.pipeline.report.words import (
    SCORES,
    cut_off,
    score_columns,
    span,
    verdict,
    why_dropped,
)
from unimodal.pipeline.why import boundary, stamp


class Cards:
    """Draws clips as cards; the first card of a clip can be linked to."""

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self.seen: set[str] = set()

    def __call__(self, row: int, figure: str | None = None, reasons: bool = True) -> Html:
        """The card of a clip that `facts.shown` has; `figure` is what it is shown for."""
        facts, clip = self.facts, self.facts.shown[row]
        uid, name = clip["uid"], PurePosixPath(clip["uri"]).name
        fresh = uid not in self.seen
        self.seen.add(uid)
        picture = facts.pictures.clips.get(uid)
        what = "Frames" if clip["kind"] == "video" else "Picture"
        captions = [caption for caption in clip["captions"] or [] if caption["text"]]
        rules = [i for i, drops in enumerate(facts.drops) if drops[row]]
        return h(
            "article",
            h(
                "div",
                h(
                    "img",
                    src=picture.uri,
                    width=picture.width,
                    height=picture.height,
                    alt=f"{what} of {cut_off(name, 80)}",
                    decoding="async",
                )
                if picture
                else h("span", "no picture", class_="missing"),
                class_="picture",
            ),
            h(
                "div",
                h("p", h("bdi", cut_off(name, 80)), class_="name", title=cut_off(clip["uri"])),
                h("p", span(clip), class_="span"),
                h(
                    "p",
                    h("b", figure) if figure else None,
                    h("span", verdict(clip), class_="verdict"),
                ),
                (h("p", why_dropped(reason), class_="reason") for reason in clip["reasons"] or [])
                if reasons
                else None,
                h("p", cut_off(captions[0]["text"], 160), class_="caption", dir="auto")
                if captions and reasons
                else None,
                h("details", h("summary", "Details"), _details(clip)),
                class_="words",
            ),
            class_=f"clip {clip['verdict']}",
            id=f"clip-{uid}" if fresh else None,
            data_uid=uid,
            data_verdict=clip["verdict"],
            data_rules=" ".join(map(str, rules)) or None,
        )


def _details(clip: Mapping[str, Any]) -> Html:
    rows: list[tuple[str, Any]] = [
        ("dropped by", why_dropped(why)) for why in clip["reasons"] or []
    ]
    rows += [("uid", h("code", clip["uid"])), ("source", cut_off(clip["uri"]))]
    if clip["kind"] == "video":
        rows += [
            ("begins", f"{stamp(clip['start_s'])}: {boundary(clip, 'start')}"),
            ("ends", f"{stamp(clip['end_s'])}: {boundary(clip, 'end')}"),
            ("ticks", f"{clip['start_pts']} to {clip['end_pts']} of {clip['time_base']} s"),
        ]
    size = f"{clip['width']} × {clip['height']}"
    if clip["fps"]:
        size += f", {number(clip['fps'])} frames a second"
    rows.append(("picture", f"{size}, {clip['codec']}"))
    box = [clip[f"crop_{edge}"] for edge in ("x0", "y0", "x1", "y1")]
    if None not in box and box != [0, 0, clip["width"], clip["height"]]:
        rows.append(
            ("without bars", f"{box[2] - box[0]} × {box[3] - box[1]} at {box[0]}, {box[1]}")
        )
    for column in score_columns():
        if clip[column] is not None and column != "fps":
            rows.append((SCORES.get(column, (column,))[0], number(clip[column])))
    if clip["dup_group"]:
        best = clip["dup_rank"] == 0
        rows.append(("duplicates", "best of its group" if best else f"of {clip['dup_group']}"))
    rows += [("also at", cut_off(uri)) for uri in (clip["aliases"] or [])[:5]]
    for caption in (clip["captions"] or [])[:8]:
        told = ", ".join(str(caption[k]) for k in ("style", "lang", "model") if caption[k])
        words = caption["text"] or f"none: {caption['status']}"  # a model may have failed
        rows.append((f"caption ({cut_off(told, 80)})", h("span", cut_off(words), dir="auto")))
    rows += [
        (cut_off(str(key), 40), cut_off(str(value))) for key, value in (clip["meta"] or [])[:12]
    ]
    return h("dl", (h("div", h("dt", name), h("dd", value)) for name, value in rows))
