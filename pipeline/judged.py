"""Every rule of `decide` held against every clip, with the figures that it looked at.

What the report and `why` explain verdicts by.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from unimodal.pipeline import decide

_THRESHOLD = re.compile(r"([^<>=]+?)\s*(<=|>=|<|>)\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)")


@dataclass(frozen=True)
class Judged:
    """One rule, and N clips before it."""

    rule: decide.Rule
    keep: str  # what must hold, with the thresholds filled in
    score: str  # the column or expression that is compared; "" where it is not a single one
    op: str
    threshold: float | None
    speaks: np.ndarray  # bool [N]: the rule is about clips of this kind
    values: np.ndarray  # float64 [N]: the score, NaN where it was not measured
    drops: np.ndarray  # bool [N]
    passes: np.ndarray  # bool [N]; what neither passes nor is dropped was not measured

    @property
    def about(self) -> str:
        """The clips that it speaks of."""
        return "all clips" if self.rule.kind == "any" else f"{self.rule.kind}s"


def judge(clips: pa.Table, settings: decide.DecideSettings) -> list[Judged]:
    """Hold the active rules against `clips` (columns of `clips.CLIPS`)."""
    judgment = decide.judge(clips, settings)
    judged = []
    for rule, keep, speaks, holds in zip(
        judgment.rules, judgment.keeps, judgment.speaks, judgment.holds, strict=True
    ):
        # A rule of our own begins with the comparison, a user's must be no more than that.
        match = _THRESHOLD.fullmatch if rule.stage == "extra" else _THRESHOLD.match
        found = match(keep)
        judged.append(
            Judged(
                rule=rule,
                keep=keep,
                score=rule.score or (found[1] if found else ""),
                op=found[2] if found else "",
                threshold=float(found[3]) if found else None,
                speaks=speaks,
                values=np.full(clips.num_rows, math.nan),
                drops=holds == 0,
                passes=holds == 1,
            )
        )
    scores = figures(clips, [one.score for one in judged if one.score])
    for one in judged:
        if one.score:
            np.copyto(one.values, scores[one.score], where=one.speaks)
    return judged


def figures(clips: pa.Table, scores: Sequence[str]) -> dict[str, np.ndarray]:
    """Columns, and expressions over columns, as float64 [N]; NaN where they are null."""
    found = {}
    expressions = []
    for score in dict.fromkeys(scores):
        if score in clips.column_names:
            column = clips.column(score).cast(pa.float64())
            found[score] = pc.fill_null(column, math.nan).to_numpy()
        else:
            expressions.append(score)
    if expressions:
        with decide.opened(clips) as database:
            select = ", ".join(
                f"coalesce(({score})::DOUBLE, 'nan') AS c{i}" for i, score in enumerate(expressions)
            )
            table = database.sql(f"SELECT row, {select} FROM clips").fetchnumpy()
            for i, score in enumerate(expressions):
                found[score] = np.full(clips.num_rows, math.nan)
                found[score][table["row"]] = table[f"c{i}"]
    return found
