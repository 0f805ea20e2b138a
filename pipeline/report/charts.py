"""Drawings of the report, as inline SVG that takes its colors from the page's style.

Nothing here needs a script: a drawing's numbers stand in its label, its marks carry titles.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from unimodal.pipeline.markup import Html, h

BINS = 44
WIDTH, HEIGHT, TOP, BASE = 336, 128, 22, 104  # of a histogram, in user units


@dataclass(frozen=True)
class Cut:
    """A threshold on a score: values for which `value op at` holds are kept."""

    op: str  # ">=", ">", "<=" or "<"
    at: float


@dataclass(frozen=True)
class Block:
    """A clip on its source's timeline."""

    start: float
    end: float
    verdict: str
    title: str
    link: str | None


def number(value: float) -> str:
    """A number as people write it: 1,234; 0.0123; 1.2e-07."""
    if not math.isfinite(value):
        return "none" if math.isnan(value) else "infinite"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.4g}" if abs(value) < 1e5 else f"{value:,.0f}"


def short(value: float) -> str:
    """A number for an axis: 250k, 1.5M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e4)):
        if abs(value) >= size:
            size = 1e3 if unit == "k" else size
            return f"{value / size:.3g}{unit}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def bar(parts: Sequence[tuple[str, float]], whole: float, label: str) -> Html:
    """One bar of colored parts (class, amount), as wide as its place; `whole` is all of it."""
    at = 0.0
    drawn = []
    for kind, amount in parts:
        width = 100 * amount / whole if whole else 0.0
        if width > 0:
            drawn.append(
                h("rect", class_=kind, x=f"{at:.3f}", y=0, width=f"{width:.3f}", height=10)
            )
        at += width
    return h(
        "svg",
        drawn,
        class_="bar",
        viewBox="0 0 100 10",
        preserveAspectRatio="none",
        role="img",
        aria_label=label,
    )


def histogram(kept: np.ndarray, dropped: np.ndarray, cuts: Sequence[Cut], label: str) -> Html:
    """Values of a score, kept clips below dropped ones, with the cut lines.

    The axis is logarithmic where the values span more than two decades. The outermost half
    percent is counted in the outermost bars.
    """
    values = np.concatenate([kept, dropped])
    scale = _Scale.around(values, [cut.at for cut in cuts])
    counts = [scale.count(part) for part in (kept, dropped)]
    tallest = max(1, int((counts[0] + counts[1]).max()))
    drawn = [_shade(cut, scale) for cut in cuts]
    step = WIDTH / BINS
    for i in range(BINS):
        at = BASE
        for kind, count in zip(("keep", "drop"), (counts[0][i], counts[1][i]), strict=True):
            if count:
                tall = max(2.0, (BASE - TOP) * count / tallest)  # one clip is to be seen
                at -= tall
                drawn.append(
                    h(
                        "rect",
                        class_=kind,
                        x=f"{i * step + 0.5:.2f}",
                        y=f"{at:.2f}",
                        width=f"{step - 1:.2f}",
                        height=f"{tall:.2f}",
                    )
                )
    drawn.append(h("line", class_="axis", x1=0, x2=WIDTH, y1=BASE, y2=BASE))
    for tick in scale.ticks():
        x = scale.x(tick)
        anchor = "start" if x < 16 else "end" if x > WIDTH - 16 else "middle"
        drawn.append(h("line", class_="axis", x1=f"{x:.1f}", x2=f"{x:.1f}", y1=BASE, y2=BASE + 4))
        drawn.append(h("text", short(tick), x=f"{x:.1f}", y=BASE + 17, text_anchor=anchor))
    drawn += [_line(cut, scale) for cut in cuts]
    return h("svg", drawn, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=label)


def timeline(blocks: Sequence[Block], cuts: Sequence[float], seconds: float) -> Html:
    """Clips of a source in their places, and ticks where cuts were detected.

    A source of very many clips is drawn without titles and links, as one path a verdict.
    """
    wide = 1000 / max(seconds, 1e-9)
    drawn: list[Html] = [h("rect", class_="ground", x=0, y=4, width=1000, height=20)]
    if len(blocks) <= 200:
        for block in blocks:
            rect = h(
                "rect",
                h("title", block.title),
                class_=block.verdict,
                x=f"{block.start * wide:.2f}",
                y=4 if block.verdict == "keep" else 9,
                width=f"{max(0.6, (block.end - block.start) * wide):.2f}",
                height=20 if block.verdict == "keep" else 10,
            )
            drawn.append(h("a", rect, href=block.link, tabindex=-1) if block.link else rect)
    else:
        for verdict, top, tall in (("keep", 4, 20), ("drop", 9, 10)):
            path = "".join(
                f"M{b.start * wide:.1f} {top}h{max(0.3, (b.end - b.start) * wide):.1f}v{tall}"
                f"H{b.start * wide:.1f}z"
                for b in blocks
                if b.verdict == verdict
            )
            drawn.append(h("path", class_=verdict, d=path))
    ticks = "".join(f"M{cut * wide:.1f} 0v28" for cut in cuts)
    drawn.append(h("path", class_="tick", d=ticks))
    kept = sum(block.verdict == "keep" for block in blocks)
    return h(
        "svg",
        drawn,
        class_="timeline",
        viewBox="0 0 1000 28",
        preserveAspectRatio="none",
        role="img",
        aria_label=f"{len(blocks)} clips in {seconds:.0f} s, {kept} kept, {len(cuts)} cuts",
    )


@dataclass(frozen=True)
class _Scale:
    """From a score's values to the axis of a histogram."""

    low: float
    high: float
    log: bool

    @classmethod
    def around(cls, values: np.ndarray, cuts: Sequence[float]) -> _Scale:
        low, five, high = (float(q) for q in np.quantile(values, (0.005, 0.05, 0.995)))
        low, high = min([low, *cuts]), max([high, *cuts])
        # A cut of 0 or below has no place on a logarithmic axis.
        log = 1e-9 < five < high / 100 and high < 1e15 and all(cut > 0 for cut in cuts)
        if log:
            low = min([five / 2, *cuts])
        if high <= low:
            low, high = low - max(0.5, abs(low) / 2), high + max(0.5, abs(high) / 2)
        room = 0.03 * (high - low)
        if log:
            return cls(low * 0.8, high * 1.25, True)
        # What cannot be negative keeps its axis at 0.
        return cls(max(0.0, low - room) if values.min() >= 0 else low - room, high + room, False)

    def place(self, values: np.ndarray) -> np.ndarray:
        """From values to 0..1 along the axis."""
        values = np.clip(values, self.low, self.high)
        if self.log:
            return np.log(values / self.low) / math.log(self.high / self.low)
        return (values - self.low) / (self.high - self.low)

    def x(self, value: float) -> float:
        return float(self.place(np.array([value]))[0]) * WIDTH

    def count(self, values: np.ndarray) -> np.ndarray:
        bins = np.minimum((self.place(values) * BINS).astype(int), BINS - 1)
        return np.bincount(bins, minlength=BINS)

    def ticks(self) -> list[float]:
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            steps = (1,) if self.high / self.low > 1e4 else (1, 3)
            ticks = [step * 10.0**decade for decade in decades for step in steps]
        else:
            rough = (self.high - self.low) / 5
            size = 10.0 ** math.floor(math.log10(rough))
            step = next(n * size for n in (1, 2, 5, 10) if n * size >= rough)
            first = math.ceil(self.low / step - 1e-9)
            ticks = [n * step for n in range(first, first + 8)]
        return [tick for tick in ticks if self.low <= tick <= self.high * (1 + 1e-9)]


def _shade(cut: Cut, scale: _Scale) -> Html:
    """The side of a cut line on which clips are dropped."""
    x = scale.x(cut.at)
    left, right = (0.0, x) if cut.op.startswith(">") else (x, float(WIDTH))
    return h(
        "rect",
        class_="beyond",
        x=f"{left:.2f}",
        y=TOP - 6,
        width=f"{max(0.0, right - left):.2f}",
        height=BASE - TOP + 6,
    )


def _line(cut: Cut, scale: _Scale) -> Html:
    x = scale.x(cut.at)
    sign = {">=": "≥", "<=": "≤"}.get(cut.op, cut.op)
    anchor = "start" if x < 40 else "end" if x > WIDTH - 40 else "middle"
    return Html(
        h("line", class_="cut", x1=f"{x:.2f}", x2=f"{x:.2f}", y1=TOP - 6, y2=BASE + 4)
        + h(
            "text",
            f"keep {sign} {number(cut.at)}",
            class_="cut",
            x=f"{x:.2f}",
            y=TOP - 10,
            text_anchor=anchor,
        )
    )
