"""The tables of docs/proof.md, in Markdown, from DIR/figures.json of benchmarks/proof.py.

python -m benchmarks.proof_tables DIR
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import shapes

Figures = Mapping[str, Any]
CHANCE = {
    "colour": 1 / len(shapes.COLOURS),
    "shape": 1 / len(shapes.SHAPES),
    "size": 1 / len(shapes.SIZES),
    "place": 1 / len(shapes.PLACES),
    "ground": 1 / len(shapes.GROUNDS),
    "motion": 1 / len(shapes.MOTIONS),
}
"""Of a guess among what there is."""


def shown(told: Mapping[str, Any]) -> str:
    """A share with its interval, in per cent."""
    low, high = told["interval"]
    return f"{told['share']:.1%} ({low:.0%} to {high:.0%})"


def table(heads: Sequence[str], rows: Iterator[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def judged(found: Figures) -> str:
    names = ["colour", "shape", "size", "place", "ground", "motion"]

    def rows() -> Iterator[Sequence[str]]:
        for kind in ("pictures", "clips"):
            for way, told in found[kind].items():
                cells = [f"{told[n]['share']:.1%}" if n in told else "" for n in names]
                yield [f"{kind}, {way}", str(told["all"]["n"]), *cells]
        yield ["chance", "", *(f"{CHANCE[name]:.1%}" for name in names)]

    return table(["", "n", *names], rows())


def edits_judged(found: Figures) -> str:
    return _edits(found["edits"])


def drawn(found: Figures) -> str:
    names = ["colour", "shape", "size", "place", "ground"]

    def rows() -> Iterator[Sequence[str]]:
        for name in ("seen", "unseen"):
            for scale, told in found[name].items():
                cells = [f"{told[n]['share']:.1%}" for n in names]
                other = f"{told['another caption']['share']:.1%}"
                yield [name, f"{float(scale):g}", *cells, shown(told["all"]), other]

    heads = ["combinations", "guidance", *names, "all five", "all five, of another caption"]
    return table(heads, rows())


def moved(found: Figures) -> str:
    def rows() -> Iterator[Sequence[str]]:
        for name in ("seen", "unseen"):
            for scale, told in found[name].items():
                change = told["change"]
                yield [
                    name,
                    f"{float(scale):g}",
                    str(told["motion"]["n"]),
                    shown(told["motion"]),
                    *(f"{told[n]['share']:.1%}" for n in ("colour", "shape", "ground")),
                    f"{change['mean']:.1f} ({change['least']:.1f})",
                ]

    heads = ["combinations", "guidance", "n", "motion", "colour", "shape", "ground", "change"]
    return table(heads, rows())


def by_motion(found: Figures) -> str:
    def rows() -> Iterator[Sequence[str]]:
        for name in ("seen", "unseen"):
            for scale, told in found[name].items():
                each = [f"{told['motions'][m]['share']:.0%}" for m in shapes.MOTIONS]
                yield [f"{name}, guidance {float(scale):g}", *each]

    return table(["", *shapes.MOTIONS], rows())


def went_on(found: Figures) -> str:
    def rows() -> Iterator[Sequence[str]]:
        for name in ("seen", "unseen"):
            for way, told in found[name].items():
                apart = told["pixels from the real end"]
                yield [
                    name,
                    {"silent": "no caption", "told": "caption", "kept still": "(a still)"}[way],
                    str(told["motion"]["n"]),
                    shown(told["motion"]),
                    *(f"{told[n]['share']:.1%}" for n in ("colour", "shape")),
                    f"{told['change']['mean']:.1f}",
                    "" if apart is None else f"{apart:.1f}",
                ]

    heads = ["combinations", "given", "n", "motion", "colour", "shape", "change", "pixels off"]
    return table(heads, rows())


def described(found: Figures) -> str:
    names = ["colour", "shape", "size", "place", "ground", "motion"]

    def rows() -> Iterator[Sequence[str]]:
        for kind in ("pictures", "clips"):
            for name in ("seen", "unseen"):
                for way, told in found[name][kind].items():
                    cells = [f"{told[n]['share']:.1%}" if n in told else "" for n in names]
                    yield [f"{kind}, {name}", way, shown(told["exact"]), *cells]

    return table(["", "of", "exact", *names], rows())


def edited(found: Figures) -> str:
    return "\n\n".join(
        f"{name} combinations:\n\n{_edits(found[name])}" for name in ("seen", "unseen")
    )


def _edits(found: Figures) -> str:
    kept = ["shape", "size", "colour", "place", "ground"]

    def rows() -> Iterator[Sequence[str]]:
        for way, told in found.items():
            yield [
                way,
                shown(told["done"]),
                *(f"{told[n]['share']:.1%}" for n in ("recolour", "move")),
                *(f"{told['kept'][n]['share']:.1%}" for n in kept),
                shown(told["done and all kept"]),
            ]

    heads = ["image guidance, guidance", "done", "recolour", "move"]
    return table([*heads, *(f"{n} kept" for n in kept), "done, all kept"], rows())


TABLES: tuple[tuple[str, str, Callable[[Figures], str]], ...] = (
    ("judge", "The judge", judged),
    ("judge", "The judge of edits", edits_judged),
    ("images", "Pictures from captions", drawn),
    ("videos", "Clips from captions", moved),
    ("videos", "By motion", by_motion),
    ("continuation", "Continuations", went_on),
    ("describe", "Descriptions", described),
    ("edits", "Edits", edited),
)


def write(figures: Mapping[str, Figures]) -> str:
    """All tables whose figures are there."""
    parts = [f"## {title}\n\n{make(figures[n])}" for n, title, make in TABLES if n in figures]
    times = ", ".join(f"{name} {told['seconds']:.0f}" for name, told in figures.items())
    return "\n\n".join([*parts, f"Seconds: {times}"])


if __name__ == "__main__":
    print(write(json.loads((Path(sys.argv[1]) / "figures.json").read_text())))
