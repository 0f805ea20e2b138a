"""`unimodal caption RUN --eval`: a model's captions against those that people gave."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TITLES = {"cider_d": "CIDEr-D", "bleu_4": "BLEU-4", "rouge_l": "ROUGE-L", "chrf": "chrF"}


def evaluate(run: str, references: str | None, words: Path | None, as_json: bool) -> None:
    """Compare a run's captions, and print a table for people or JSON for programs."""
    from unimodal.pipeline.captioning.scores import compared, load_words, references_in
    from unimodal.pipeline.run import Run

    clips = Run.open(run).clips
    classes = load_words(words) if words else None
    given = references_in(references, clips) if references else None
    found = compared(clips, given, classes)
    if as_json:
        print(json.dumps({"path": run, "scores": found}, ensure_ascii=False))
        return
    _tables(found)


def _tables(found: Sequence[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    names = ("model", "language", "style")
    table = Table(box=None, pad_edge=False, header_style="dim")
    for title in (*names, "n", *TITLES.values()):
        table.add_column(title, justify="left" if title in names else "right")
    exact = Table(box=None, pad_edge=False, header_style="dim")
    for title in (*names, "words", "right", "of", "share", "95 %", "by chance"):
        exact.add_column(title, justify="left" if title in (*names, "words") else "right")
    for one in found:
        who = _shown(one["model"], one["language"], one["style"])
        table.add_row(*who, f"{one['n']:,}", *(_number(one[name]) for name in TITLES))
        for name, said in one.get("words", {}).items():
            between = f"{said['low']:.3f} to {said['high']:.3f}" if said["n"] else ""
            shares = _number(said["share"]), between, _number(said["by_chance"])
            exact.add_row(*who, *_shown(name), f"{said['right']:,}", f"{said['n']:,}", *shares)
    console = Console(soft_wrap=True)
    console.print(table)
    if exact.row_count:
        console.print()
        console.print(exact)


def _shown(*texts: str) -> list[Any]:
    from rich.text import Text

    from unimodal.pipeline.errors import shown

    return [Text(shown(text)) for text in texts]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
