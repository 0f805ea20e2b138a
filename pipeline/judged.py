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


BETTER = "a better near-duplicate is kept"
_OPPOSITE = {"<=": ">", ">=": "<", "<": ">=", ">": "<="}


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

    @property
    def fails(self) -> str:
        """What is true of the clips that it drops: the contrary of `keep`."""
        if self.rule == decide.DEDUP:
            return BETTER
        if found := _THRESHOLD.fullmatch(self.keep):
            return f"{found[1]} {_OPPOSITE[found[2]]} {found[3]}"
        return f"not ({self.keep})"

    @property
    def named(self) -> str:
        """What to change it by: decide.flow_min."""
        return ", ".join(f"decide.{name}" for name in self.rule.settings)

    @property
    def dropped(self) -> int:
        """Clips that it drops."""
        return int(self.drops.sum())

    @property
    def judged(self) -> int:
        """Clips that it could judge."""
        return int((self.drops | self.passes).sum())


def judge(clips: pa.Table, settings: decide.DecideSettings) -> list[Judged]:
    """Hold the active rules against `clips`, which has uid, kind and any columns of `clips.CLIPS`.

    Raises `UsageError` for a rule of the user's that does not evaluate.
    """
    with decide.opened(clips) as database:
        held = decide.held(clips, settings, database)
    judged = []
    for rule, keep, speaks, holds in held:
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


def in_words(reason: str) -> str:
    """A reason of `decide`, stage:score=value:rule, for people."""
    stage, _, rest = reason.partition(":")
    figure, _, rule = rest.partition(":")
    if stage == "dedup":
        return BETTER
    score, _, value = figure.rpartition("=")
    return f"{score} is {value}; kept if {rule}" if score else f"kept if {rule}"


def advice(judged: Sequence[Judged], settings: decide.DecideSettings) -> list[str]:
    """Sentences about rules that drop over 70 % of the clips they judge, or none at all."""
    lines: list[str] = []
    idle: list[str] = []
    for one in judged:
        rule = one.rule
        if not one.judged:
            continue
        noun = "clip" if rule.kind == "any" else rule.kind
        clips_judged = f"{one.judged:,} {noun}{'s' if one.judged > 1 else ''}"
        # As on a command line.
        named = ", ".join(f"decide.{name}={getattr(settings, name)}" for name in rule.settings)
        if rule.stage == "extra":
            named = f'decide.extra "{rule.kind}: {rule.keep}"'
        if one.dropped > 0.7 * one.judged:
            line = f"{named} drops {100 * one.dropped / one.judged:.0f} % of {clips_judged}"
            if rule.score and rule != decide.DEDUP:
                line += f": their median of {rule.score} is {np.nanmedian(one.values):.3g}"
            lines.append(line)
        elif not one.dropped and rule != decide.DEDUP:  # no near-duplicates are good news
            idle += rule.settings
    if idle:
        lines.append(f"no clip is dropped by {', '.join(dict.fromkeys(idle))}")
    return lines


def figures(clips: pa.Table, scores: Sequence[str]) -> dict[str, np.ndarray]:
    """Columns, and expressions over columns, as float64 [N]; NaN where they are null."""
    found = {}
    with decide.opened(clips) as database:
        for score in dict.fromkeys(scores):
            if score in clips.column_names:
                column = clips.column(score).cast(pa.float64())
                found[score] = pc.fill_null(column, math.nan).to_numpy()
            else:
                found[score] = decide.evaluate(decide.as_number(score), database)
    return found
