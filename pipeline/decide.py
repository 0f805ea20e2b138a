"""Keep or drop: the one place where a threshold is applied, as one readable line per rule.

Measuring stages only add columns; nothing is ever deleted. A rule says which clips it speaks of,
which score it reads and what must hold to keep. What is null (not measured, or no threshold
set) never drops. DuckDB evaluates the rules over Arrow columns, without access to anything else.

Near-duplicates come last: of a group, the best clip that passes all other rules is kept. So a
change of threshold can bring a copy back in the place of the original.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from unimodal.pipeline.clips import CLIPS
from unimodal.pipeline.errors import UsageError, first_line
from unimodal.pipeline.settings import Settings
from unimodal.pipeline.where import locked

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

VERSION = 2

EXAMPLES = 20
"""Clips that `what_if` names for each rule."""


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
    text_area_max: float | None = 0.05
    """Share of a video's picture that text covers, on average over its samples."""
    text_area_p90_max: float | None = 0.15
    """The same in the tenth of samples with the most text: a title that comes and goes."""
    text_track_max_s: float | None = 1.0
    """Seconds that one line of text may stand still in a video, as subtitles do."""
    text_corner_max: float | None = 0.5
    """Share of a video's samples with a mark in one same corner, as of a TV station."""
    quality_min: float | None = None
    """Technical quality, 0 to 1."""
    image_aesthetic_min: float | None = 5.5
    """LAION's aesthetic score of an image, 1 to 10. Emu3 keeps 5.5 and more, and rescues some."""
    rescue_colorfulness: float | None = 15.0
    """An image below image_aesthetic_min is kept if it is this colorful (15: "slightly", Hasler
    and Süsstrunk 2003) and has little text; "none" rescues nothing."""
    rescue_text: float | None = 0.05
    """Share of the picture that text may cover in an image that is rescued; not measured is no
    evidence, and does not rescue. "none" rescues nothing."""
    video_aesthetic_min: float | None = 5.0
    """Aesthetic score of a video's worst sample of three."""
    nsfw_max: float | None = 0.5
    """Probability that something is not safe for work."""
    match_min: float | None = None
    """Cosine of CLIP between the first caption and the pictures. NeMo Curator has 0.15."""
    dedup: bool = True
    """Drop a clip when a better one of its group of near-duplicates is kept."""
    extra: tuple[str, ...] = ()
    """More rules, as "video: colorfulness > 5", "image: …" or "any: …" over the clip columns."""


@dataclass(frozen=True)
class Rule:
    """What a clip must satisfy to be kept; $names are fields of `DecideSettings`."""

    stage: str
    kind: Literal["image", "video", "any"]
    score: str
    keep: str

    @property
    def settings(self) -> tuple[str, ...]:
        """Names of the fields of `DecideSettings` that it depends on."""
        if self.stage in ("extra", "dedup"):
            return (self.stage,)
        return tuple(_names(self.keep))


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
    Rule("text", "video", "text_area_mean", "text_area_mean <= $text_area_max"),
    Rule("text", "video", "text_area_p90", "text_area_p90 <= $text_area_p90_max"),
    Rule("text", "video", "text_track_s", "text_track_s < $text_track_max_s"),
    Rule("text", "video", "text_corner", "text_corner <= $text_corner_max"),
    Rule("quality", "any", "quality", "quality >= $quality_min"),
    # Emu3 (arXiv 2409.18869, §2.1) takes rejected images back that are neither monochrome nor
    # full of text, for the sake of the open world's variety.
    Rule(
        "embed",
        "image",
        "aesthetic",
        "aesthetic >= $image_aesthetic_min OR (aesthetic IS NOT NULL AND coalesce("
        "colorfulness >= $rescue_colorfulness AND text_area_mean <= $rescue_text, false))",
    ),
    Rule("embed", "image", "aesthetic", "aesthetic >= $image_aesthetic_min"),
    Rule("embed", "video", "aesthetic", "aesthetic >= $video_aesthetic_min"),
    Rule("nsfw", "any", "nsfw", "nsfw <= $nsfw_max"),
    Rule("match", "any", "text_match", "text_match >= $match_min"),
)

DEDUP = Rule("dedup", "any", "dup_rank", "dup_rank <= best_kept_rank")
"""The last rule; best_kept_rank is the least dup_rank in the group that all others keep."""


@dataclass(frozen=True)
class Turn:
    """Clips whose verdict turns because of one rule."""

    rule: str  # "flow: flow_mean >= 0.003"
    clips: int
    examples: tuple[str, ...]  # uids, the smallest `EXAMPLES`


@dataclass(frozen=True)
class WhatIf:
    """What other verdicts would change; a clip counts with each rule that it is dropped by."""

    dropped: int  # clips that were kept
    dropped_by: tuple[Turn, ...]  # new rules, the most important first
    kept: int  # clips that were dropped
    formerly_by: tuple[Turn, ...]  # rules that used to drop them
    same: int


def rules(settings: DecideSettings) -> list[Rule]:
    """The rules that have a threshold, the user's own at the end; raises `UsageError`.

    `DEDUP` is not among them: it looks at more than one clip.
    """
    active = [
        rule
        for rule in RULES
        if all(getattr(settings, name) is not None for name in _names(rule.keep))
    ]
    rescues = [rule for rule in active if "rescue_text" in rule.settings]
    active = [r for r in active if not rescues or r.settings != ("image_aesthetic_min",)]
    for text in settings.extra:
        kind, colon, keep = text.partition(":")
        kind = kind.strip()
        if not colon or kind not in ("image", "video", "any") or not keep.strip():
            raise UsageError(f'decide.extra "{text}": write it as "video: flow_p90 < 0.2"')
        active.append(Rule("extra", kind, "", keep.strip()))  # type: ignore[arg-type]
    return active


def decide(clips: pa.Table, settings: DecideSettings) -> pa.Table:
    """Verdicts of `clips`: a table of uid, verdict (keep or drop) and reasons, in the same order.

    `clips` has uid, kind and any columns of `CLIPS`; a score that it lacks is null. A reason is
    "stage:score:threshold", as in "flow:flow_mean=0.0011:flow_mean >= 0.003".
    Raises `UsageError` for a rule of the user's that does not evaluate.
    """
    with opened(clips) as database:
        # Text is made for what is dropped alone, a rule at a time.
        texts, rows = [pa.array([], pa.string())], [np.zeros(0, np.int64)]
        for rule, keep, _, holds in held(clips, settings, database):
            dropped = np.flatnonzero(holds == 0)
            if len(dropped):
                rows.append(dropped)
                texts.append(_reasons(rule, keep, dropped, database))
    row = np.concatenate(rows)
    order = np.argsort(row, kind="stable")
    counts = np.bincount(row, minlength=clips.num_rows)
    offsets = pa.array(np.concatenate([[0], np.cumsum(counts)]), pa.int32())
    reasons = pa.ListArray.from_arrays(offsets, pa.concat_arrays(texts).take(pa.array(order)))
    verdict = pc.if_else(pa.array(counts > 0), "drop", "keep")
    uid = clips.column("uid").combine_chunks()
    return pa.table({"uid": uid, "verdict": verdict, "reasons": reasons})


def what_if(old: pa.Table, new: pa.Table) -> WhatIf:
    """What changes from `old` to `new` verdicts, both as `decide` returns them; joined by uid."""
    with locked(old=old, new=new) as database:
        database.execute(
            "CREATE TEMP TABLE pairs AS SELECT uid, old.verdict AS was, new.verdict AS becomes, "
            "old.reasons AS formerly, new.reasons AS now FROM old JOIN new USING (uid)"
        )
        same = database.sql("SELECT count(*) FROM pairs WHERE was = becomes").fetchall()[0][0]
        dropped, dropped_by = _turns("drop", "now", database)
        kept, formerly_by = _turns("keep", "formerly", database)
    return WhatIf(dropped, dropped_by, kept, formerly_by, same)


def _turns(
    verdict: str, reasons: str, database: DuckDBPyConnection
) -> tuple[int, tuple[Turn, ...]]:
    """How many pairs turn to `verdict`, and the rules that one column of reasons names."""
    turned = f"FROM pairs WHERE was != becomes AND becomes = '{verdict}'"
    # A reason is stage:score=value:expression; no score has a colon.
    found = database.sql(
        "SELECT regexp_replace(reason, '^([^:]*):[^:]*:(.*)$', '\\1: \\2', 's') AS rule, "
        f"count(*) AS clips, list(uid ORDER BY uid)[1:{EXAMPLES}] "
        f"FROM (SELECT uid, unnest({reasons}) AS reason {turned}) "
        "GROUP BY rule ORDER BY clips DESC, rule"
    ).fetchall()
    count = database.sql(f"SELECT count(*) {turned}").fetchall()[0][0]
    return count, tuple(Turn(rule, clips, tuple(uids)) for rule, clips, uids in found)


@contextmanager
def opened(clips: pa.Table) -> Iterator[DuckDBPyConnection]:
    """A locked database that holds `clips` with all columns of `CLIPS` and their row."""
    for field in CLIPS:
        if field.name not in clips.column_names:
            clips = clips.append_column(field.name, pa.nulls(clips.num_rows, field.type))
    row = pa.array(np.arange(clips.num_rows))
    with locked(clips=clips.append_column("row", row)) as database:
        yield database


def held(
    clips: pa.Table, settings: DecideSettings, database: DuckDBPyConnection
) -> list[tuple[Rule, str, np.ndarray, np.ndarray]]:
    """The active rules held against N clips, which `database` was `opened` for.

    Each with its expression, thresholds filled in; bool [N], whether it is about clips of this
    kind; and int8 [N]: 1 keeps, 0 drops, -1 was not measured or not spoken of. Raises `UsageError`
    for a rule of the user's that does not evaluate.
    """
    import duckdb

    kinds = {kind: _flags(pc.equal(clips.column("kind"), kind)) for kind in ("image", "video")}
    kept = kinds["any"] = np.ones(clips.num_rows, bool)
    found = []
    for rule in rules(settings):
        keep = rule.keep
        if rule.stage != "extra":  # its dollars are its own
            keep = re.sub(r"\$(\w+)", lambda m: str(getattr(settings, m[1])), keep)
        try:
            holds = evaluate(f"coalesce(({keep})::BOOLEAN::TINYINT, -1)", database)
        except duckdb.Error as error:
            whose = "decide.extra" if rule.stage == "extra" else "the rule"
            raise UsageError(f'{whose} "{rule.keep}": {first_line(error)}') from error
        holds[~kinds[rule.kind]] = -1
        kept = kept & (holds != 0)
        found.append((rule, keep, kinds[rule.kind], holds))
    if settings.dedup and clips.num_rows and "dup_group" in clips.column_names:
        found.append((DEDUP, DEDUP.keep, kinds["any"], _best_of_group(clips, kept)))
    return found


def _best_of_group(clips: pa.Table, kept: np.ndarray) -> np.ndarray:
    """What `DEDUP` says, int8 [N], when all other rules keep `kept`."""
    groups = clips.column("dup_group").combine_chunks()
    grouped = _flags(pc.is_valid(groups))
    if not grouped.any():
        return np.full(len(groups), -1, np.int8)
    number = groups.filter(pa.array(grouped)).dictionary_encode().indices.to_numpy()
    rank = clips.column("dup_rank").combine_chunks().filter(pa.array(grouped)).to_numpy()
    best = np.full(number.max() + 1, np.iinfo(rank.dtype).max, rank.dtype)
    standing = kept[grouped]
    np.minimum.at(best, number[standing], rank[standing])
    holds = np.ones(len(groups), np.int8)
    holds[grouped] = rank <= best[number]
    return holds


def evaluate(expression: str, database: DuckDBPyConnection) -> np.ndarray:
    """An expression over the N clips that `database` was `opened` for, [N]."""
    found = database.sql(f"SELECT row, {expression} AS value FROM clips").fetchnumpy()
    values = np.empty_like(found["value"])
    values[found["row"]] = found["value"]  # sorting in the database would take twice as long
    return values


def as_number(score: str) -> str:
    """A column or expression as a number, NaN where it is null."""
    return f"coalesce(({score})::DOUBLE, 'nan')"


def _reasons(rule: Rule, keep: str, rows: np.ndarray, database: DuckDBPyConnection) -> pa.Array:
    """Why `rule` drops these rows."""
    if not rule.score:
        return pa.array([f"{rule.stage}::{keep}"]).take(pa.array(np.zeros(len(rows), np.int8)))
    values = evaluate(as_number(rule.score), database)[rows]
    database.register("dropped", pa.table({"value": values}))
    found = database.sql(
        f"SELECT '{rule.stage}:{rule.score}=' || printf('%.6g', value) || ':{keep}' AS reason "
        "FROM dropped"
    )
    return found.to_arrow_table().column("reason").combine_chunks().cast(pa.string())


def _flags(values: pa.Array | pa.ChunkedArray) -> np.ndarray:
    return np.asarray(pc.fill_null(values, False))


def _names(expression: str) -> Sequence[str]:
    return re.findall(r"\$(\w+)", expression)
