"""Keep or drop: the one place where a threshold is applied, as one readable line per rule.

Measuring stages only add columns; nothing is ever deleted. A rule says which clips it speaks of,
which score it reads and what must hold to keep. What is null (not measured, or no threshold
set) never drops. DuckDB evaluates the rules over Arrow columns, without access to anything else.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
from pydantic import field_validator

from unimodal.pipeline.errors import UsageError
from unimodal.pipeline.settings import Settings

VERSION = 1


class DecideSettings(Settings):
    """Thresholds. "none" switches a rule off."""

    image_min_area: int | None = 512 * 512
    """Pixels, width times height. Emu3 drops images under 512 x 512; 0 keeps emoji."""
    image_max_aspect: float | None = None
    """Longer side over shorter side."""
    video_min_side: int | None = 256
    """Pixels of the short side: below it, flow and keyframes would be measured on nothing."""
    video_min_s: float | None = 2.0
    """Seconds."""
    video_max_s: float | None = None
    """Seconds; longer clips are normally split already (cut.max_clip_s)."""
    flow_min: float | None = 0.003
    """Mean displacement per half second over the short side: below it nothing moves."""
    flow_max: float | None = 0.10
    """Above it the camera is thrown about."""
    luma_min: float | None = 16.0
    """Mean gray level of a video; below it there is nothing to see."""
    luma_max: float | None = 235.0
    """Above it, overexposed."""
    contrast_min: float | None = None
    """Gray levels of standard deviation within a frame."""
    blur_min: float | None = None
    """Variance of the Laplacian at short side 256; photographs in focus have 100 and more."""
    freeze_max: float | None = None
    """Share of half seconds in which nothing changes."""
    flash_max: float | None = None
    """Share of frames that jump in brightness."""
    extra: tuple[str, ...] = ()
    """More rules, as "video: colorfulness > 5", "image: …" or "any: …" over the clip columns."""

    @field_validator("*", mode="before")
    @classmethod
    def _none(cls, value: Any) -> Any:
        """On a command line, None is written "none"."""
        return None if value == "none" else value


@dataclass(frozen=True)
class Rule:
    """What a clip must satisfy to be kept; $names are fields of `DecideSettings`."""

    stage: str
    kind: Literal["image", "video", "any"]
    score: str
    keep: str


RULES = (
    Rule("source", "image", "width * height", "width * height >= $image_min_area"),
    Rule(
        "source",
        "image",
        "greatest(width, height) / least(width, height)",
        "greatest(width, height) / least(width, height) <= $image_max_aspect",
    ),
    Rule("source", "video", "least(width, height)", "least(width, height) >= $video_min_side"),
    # Two decimals: a clip of 1.9996 s is one of 2 s in a container that counts milliseconds.
    Rule("cut", "video", "duration_s", "round(duration_s, 2) >= $video_min_s"),
    Rule("cut", "video", "duration_s", "round(duration_s, 2) <= $video_max_s"),
    Rule("flow", "video", "flow_mean", "flow_mean >= $flow_min"),
    Rule("flow", "video", "flow_mean", "flow_mean <= $flow_max"),
    Rule("light", "video", "luma_mean", "luma_mean >= $luma_min"),
    Rule("light", "video", "luma_mean", "luma_mean <= $luma_max"),
    Rule("light", "any", "contrast", "contrast >= $contrast_min"),
    Rule("light", "any", "blur", "blur >= $blur_min"),
    Rule("light", "video", "freeze_ratio", "freeze_ratio <= $freeze_max"),
    Rule("light", "video", "flash_ratio", "flash_ratio <= $flash_max"),
)


def rules(settings: DecideSettings) -> list[Rule]:
    """The rules that have a threshold, the user's own at the end; raises `UsageError`."""
    active = [
        rule
        for rule in RULES
        if all(getattr(settings, name) is not None for name in _names(rule.keep))
    ]
    for text in settings.extra:
        kind, colon, keep = text.partition(":")
        kind = kind.strip()
        if not colon or kind not in ("image", "video", "any") or not keep.strip():
            raise UsageError(f'decide.extra "{text}": write it as "video: flow_p90 < 0.2"')
        active.append(Rule("extra", kind, "", keep.strip()))  # type: ignore[arg-type]
    return active


def decide(clips: pa.Table, settings: DecideSettings) -> pa.Table:
    """Verdicts of `clips`: a table of uid, verdict (keep or drop) and reasons, in the same order.

    A reason is "stage:score:threshold", as in "flow:flow_mean=0.0011:flow_mean >= 0.003".
    Raises `UsageError` for a rule of the user's that does not evaluate.
    """
    import duckdb

    values = {name: getattr(settings, name) for rule in RULES for name in _names(rule.keep)}
    active = rules(settings)
    # Rules come from settings files, which may come from strangers: no files, no extensions.
    config: dict[str, Any] = {"enable_external_access": "false", "lock_configuration": "true"}
    with duckdb.connect(":memory:", config=config) as database:
        database.register("clips", clips.append_column("row", pa.array(range(clips.num_rows))))
        for rule in active:
            if rule.stage == "extra":
                try:
                    database.execute(f"SELECT ({rule.keep})::BOOLEAN FROM clips LIMIT 0")
                except duckdb.Error as error:
                    line = str(error).splitlines()[0]
                    raise UsageError(f'decide.extra "{rule.keep}": {line}') from error
        reasons = ", ".join(_reason(rule, values) for rule in active) or "NULL"
        try:
            found = database.sql(
                f"SELECT uid, list_filter([{reasons}], lambda r: r IS NOT NULL) AS reasons "
                "FROM clips ORDER BY row"
            ).to_arrow_table()
        except duckdb.Error as error:  # a rule that parses but fails on a row
            line = str(error).splitlines()[0]
            raise UsageError(f"a rule of decide.extra cannot be evaluated: {line}") from error
    why = found.column("reasons").cast(pa.list_(pa.string())).combine_chunks()
    verdict = ["drop" if reasons else "keep" for reasons in why.to_pylist()]
    return pa.table({"uid": found.column("uid"), "verdict": verdict, "reasons": why})


def _reason(rule: Rule, values: dict[str, Any]) -> str:
    """SQL that is the rule's reason where it drops, and null elsewhere."""
    keep = re.sub(r"\$(\w+)", lambda m: str(values[m[1]]), rule.keep)
    speaks = "TRUE" if rule.kind == "any" else f"kind = '{rule.kind}'"
    score = f"'{rule.score}=' || printf('%.6g', ({rule.score})::DOUBLE)" if rule.score else "''"
    threshold = keep.replace("'", "''")
    return (
        f"CASE WHEN {speaks} AND NOT ({keep}) THEN '{rule.stage}:' || {score} || ':{threshold}' END"
    )


def _names(expression: str) -> Sequence[str]:
    return re.findall(r"\$(\w+)", expression)
