"""The report's sections, from top to bottom. All text goes through `markup`, which escapes it."""

from __future__ import annotations

import base64
import hashlib
import json
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from unimodal.pipeline.clips import CLIPS
from unimodal.pipeline.judged import Judged, figures
from unimodal.pipeline.markup import Html, h, join
from unimodal.pipeline.report import Facts, Source
from unimodal.pipeline.report_charts import Block, Cut, bar, histogram, number, timeline
from unimodal.pipeline.settings import build
from unimodal.pipeline.why import boundary, stamp

HERE = Path(__file__).parent / "report_page"

QUARANTINED = 200
"""Rows of the quarantine table that are shown."""
LONGEST = 400
"""Characters of a caption, a name or a reason that are shown."""
MOST = 0.7
"""Share of its clips from which on a rule is worth a second look."""

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

NOT_SCORES = frozenset(
    (
        *("start_s", "end_s", "start_pts", "end_pts", "width", "height", "frames", "dup_rank"),
        *("crop_x0", "crop_y0", "crop_x1", "crop_y1"),
    )
)


def page(facts: Facts) -> str:
    """The whole document."""
    style, script = ((HERE / name).read_text() for name in ("style.css", "script.js"))
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_sha256(style)}'; "
        f"script-src '{_sha256(script)}'; base-uri 'none'; form-action 'none'"
    )
    card = Cards(facts)
    sections = [
        ("rules", "Rules", _rules(facts)),
        ("near", "Near a threshold", _near(facts, card)),
        ("kept", "Kept", _kept(facts, card)),
        ("dropped", "Dropped", _dropped(facts, card)),
        ("scores", "Scores", _scores(facts)),
        ("sources", "Videos", _sources(facts, card)),
        ("duplicates", "Duplicates", _duplicates(facts, card)),
        ("captions", "Captions", _captions(facts)),
        ("quarantine", "Quarantine", _quarantine(facts)),
        ("made", "How it was made", _made(facts)),
    ]
    sections = [(name, title, body) for name, title, body in sections if body]
    drawn = {
        name: h("section", h("h2", title), body, id=name, aria_label=title)
        for name, title, body in sections
    }
    head = h(
        "head",
        h("meta", charset="utf-8"),
        h("meta", http_equiv="Content-Security-Policy", content=policy),
        h("meta", name="viewport", content="width=device-width, initial-scale=1"),
        h("meta", name="color-scheme", content="light dark"),
        h("meta", name="generator", content="unimodal"),
        h("title", f"Curation report: {int(facts.kept.sum()):,} of {len(facts):,} clips kept"),
        h("style", Html(style)),
    )
    body = h(
        "body",
        h("a", "Skip to the report", class_="skip", href="#main"),
        _headline(facts),
        h(
            "nav",
            h("ul", (h("li", h("a", title, href=f"#{name}")) for name, title, _ in sections)),
            aria_label="Sections",
        ),
        h(
            "main",
            _attention(facts),
            drawn["rules"],
            h(
                "div",
                [drawn.pop(name, None) for name in ("near", "kept", "dropped")],
                class_="clips",
            ),
            [section for name, section in drawn.items() if name != "rules"],
            id="main",
        ),
        h("script", Html(script)),
    )
    return f"<!doctype html>\n{h('html', head, body, lang='en')}\n"


def _headline(facts: Facts) -> Html:
    kept, clips = int(facts.kept.sum()), len(facts)
    seconds = np.nan_to_num(facts.numbers("duration_s"))
    images = ~facts.video
    totals = facts.info.get("totals", {})
    tiles = [
        ("sources", f"{totals.get('sources', 0):,}", _copies(totals.get("copies", 0))),
        (
            "kept video",
            _length(float(seconds[facts.kept].sum())),
            f"{int((facts.kept & facts.video).sum()):,} of {int(facts.video.sum()):,} clips, "
            f"{_length(float(seconds.sum()))} in all",
        )
        if facts.video.any()
        else None,
        ("kept images", f"{int((facts.kept & images).sum()):,}", f"of {int(images.sum()):,}")
        if images.any()
        else None,
        ("quarantined", f"{facts.run.quarantined:,}", "could not be read"),
    ]
    dropped = clips - kept
    return h(
        "header",
        h("p", "unimodal", h("span", "curation report"), class_="brand"),
        h("h1", h("strong", f"{kept:,}"), f" of {clips:,} clips kept"),
        h("p", "from ", h("bdi", _cut(facts.folder)), class_="from") if facts.folder else None,
        bar([("keep", kept), ("drop", dropped)], clips, f"{kept} kept, {dropped} dropped"),
        h(
            "p",
            _key("keep", f"kept {_share(kept, clips)}"),
            _key("drop", f"dropped {_share(dropped, clips)}"),
            class_="key",
        ),
        h(
            "dl",
            (
                h("div", h("dt", name), h("dd", h("b", value), h("span", note)))
                for name, value, note in filter(None, tiles)
            ),
            class_="tiles",
        ),
    )


def _attention(facts: Facts) -> Html | None:
    """What a person should look at before trusting the result."""
    notes: list[Html] = []
    if len(facts) and not facts.kept.any():
        notes.append(h("li", "Nothing was kept."))
    notes += [h("li", f"{line}.") for line in facts.advice]
    for stage, why in facts.info.get("skipped", {}).items():
        notes.append(h("li", h("b", stage), f" did not run: {why}."))
    sources = facts.info.get("totals", {}).get("sources", 0)
    lost = pc.count_distinct(facts.run.quarantine.column("uri")).as_py()
    if sources and lost > 0.1 * sources:
        notes.append(h("li", f"{lost:,} of {sources:,} sources are in quarantine."))
    if not notes:
        return None
    return h(
        "section",
        h("h2", "Worth a look"),
        h("ul", notes),
        id="attention",
        aria_label="Worth a look",
    )


def _problem(rule: Judged) -> str | None:
    judged, drops = int((rule.passes | rule.drops).sum()), int(rule.drops.sum())
    if not drops:
        return "drops nothing"
    return f"drops {_share(drops, judged)}" if drops > MOST * judged else None


def _rules(facts: Facts) -> Html:
    clips = len(facts)
    times = facts.drops.sum(axis=0) if len(facts.rules) else np.zeros(clips)
    gone = np.zeros(clips, bool)
    rows, idle = [], []
    for place, rule in enumerate(facts.rules):
        if not rule.drops.any() and not rule.passes.any():
            idle.append(rule)
            continue
        first = rule.drops & ~gone
        alone = int((rule.drops & (times == 1)).sum())
        before = int(gone.sum())
        gone |= rule.drops
        left = clips - int(gone.sum())
        total = int(rule.drops.sum())
        parts = [("left", left), ("alone", alone), ("shared", int(first.sum()) - alone)]
        problem = _problem(rule)
        rows.append(
            h(
                "tr",
                h(
                    "th",
                    h("code", _signs(rule.keep)),
                    h("span", f"{rule.about} · {_settings(rule)}", class_="about"),
                    h("span", problem, class_="badge") if problem else None,
                    bar(
                        [*parts, ("gone", before)],
                        clips,
                        f"{left} left, {alone} dropped by this rule only, "
                        f"{int(first.sum()) - alone} by a later one too, {before} dropped before",
                    ),
                    scope="row",
                ),
                h(
                    "td",
                    f"{total:,}",
                    h("small", _share(total, int((rule.passes | rule.drops).sum()))),
                ),
                h("td", f"{alone:,}"),
                h("td", f"{left:,}"),
                data_rule=place if total else None,
            )
        )
    unused = None
    if idle:
        listed = join(h("li", h("code", _signs(r.keep)), f", {r.about}") for r in idle)
        title = f"{_count(len(idle), 'rule')} had nothing to judge: no such clips, or no such score"
        unused = h("details", h("summary", title), h("ul", listed))
    if not rows:
        return join([h("p", "No rule has judged anything: all is kept."), unused])
    return Html(
        h(
            "p",
            "A clip is kept if it passes every rule that speaks of it; what was not measured is "
            "never dropped. Bars run from all clips down to those that are left.",
            class_="note",
        )
        + h(
            "p",
            _key("left", "left"),
            _key("alone", "dropped by this rule only"),
            _key("shared", "by a later rule too"),
            _key("gone", "dropped before"),
            class_="key",
        )
        + h(
            "table",
            h(
                "thead",
                h(
                    "tr",
                    h("th", "keep if", scope="col"),
                    h("th", "drops", scope="col"),
                    h("th", "alone", scope="col"),
                    h("th", "left", scope="col"),
                ),
            ),
            h("tbody", rows),
            class_="rules",
        )
        + join(unused)
    )


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
        captions = clip["captions"] or []
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
                    alt=f"{what} of {_cut(name, 80)}",
                    decoding="async",
                )
                if picture
                else h("span", "no picture", class_="missing"),
                class_="picture",
            ),
            h(
                "div",
                h("p", h("bdi", _cut(name, 80)), class_="name", title=_cut(clip["uri"])),
                h("p", _span(clip), class_="span"),
                h(
                    "p",
                    h("b", figure) if figure else None,
                    h("span", _verdict(clip), class_="verdict"),
                ),
                (h("p", _reason(reason), class_="reason") for reason in clip["reasons"] or [])
                if reasons
                else None,
                h("p", _cut(captions[0]["text"], 160), class_="caption", dir="auto")
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
    rows: list[tuple[str, Any]] = [("dropped by", _reason(why)) for why in clip["reasons"] or []]
    rows += [("uid", h("code", clip["uid"])), ("source", _cut(clip["uri"]))]
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
    for column in _score_columns():
        if clip[column] is not None and column != "fps":
            rows.append((SCORES.get(column, (column,))[0], number(clip[column])))
    if clip["dup_group"]:
        best = clip["dup_rank"] == 0
        rows.append(("duplicates", "best of its group" if best else f"of {clip['dup_group']}"))
    rows += [("also at", _cut(uri)) for uri in (clip["aliases"] or [])[:5]]
    for caption in (clip["captions"] or [])[:8]:
        told = ", ".join(str(caption[k]) for k in ("style", "lang", "model") if caption[k])
        rows.append((f"caption ({told})", h("span", _cut(caption["text"]), dir="auto")))
    rows += [(_cut(str(key), 40), _cut(str(value))) for key, value in (clip["meta"] or [])[:12]]
    return h("dl", ((h("dt", name), h("dd", value)) for name, value in rows))


def _near(facts: Facts, card: Cards) -> Html | None:
    groups = []
    for i, failed, passed in facts.near:
        rule = facts.rules[i]
        sides = []
        for kind, title, rows in (
            ("drop", "just dropped", failed),
            ("keep", "just passed", passed),
        ):
            cards = [card(row, number(float(rule.values[row])), reasons=False) for row in rows]
            body = h("div", cards, class_="grid") if cards else h("p", "none", class_="note")
            sides.append(h("div", h("h4", title), body, class_=f"side {kind}"))
        groups.append(
            h(
                "div",
                h("h3", h("code", _signs(rule.keep)), h("span", rule.about, class_="about")),
                h("div", sides, class_="sides"),
                class_="sheet",
            )
        )
    if not groups:
        return None
    return Html(
        h(
            "p",
            "The clips on either side of each threshold: if the left ones look worth keeping, or "
            "the right ones worthless, move it.",
            class_="note",
        )
        + join(groups)
    )


def _kept(facts: Facts, card: Cards) -> Html | None:
    sheet = facts.kept_sheet
    if not sheet.of:
        return None
    return Html(
        h("p", f"{len(sheet.shown):,} of {sheet.of:,} shown", class_="note")
        + h("div", h("div", [card(row) for row in sheet.shown], class_="grid"), class_="sheet")
    )


def _dropped(facts: Facts, card: Cards) -> Html | None:
    sheets = []
    for i, sheet in facts.dropped_sheets:
        rule = facts.rules[i]
        sheets.append(
            h(
                "div",
                h(
                    "h3",
                    "not ",
                    h("code", _signs(rule.keep)),
                    h(
                        "span",
                        f"{rule.about} · {len(sheet.shown)} of {sheet.of:,} shown",
                        class_="about",
                    ),
                ),
                h("div", [card(row) for row in sheet.shown], class_="grid"),
                class_="sheet",
            )
        )
    return join(sheets) if sheets else None


def _scores(facts: Facts) -> Html | None:
    """Histograms of every score that has values, videos and images apart."""
    columns = _score_columns()
    asked = [rule.score for rule in facts.rules if rule.score and rule.score not in NOT_SCORES]
    found = figures(facts.clips, [*asked, *columns])
    groups = []
    for kind, title, of_kind in (
        ("video", "Videos", facts.video),
        ("image", "Images", ~facts.video),
    ):
        panels, flat = [], []
        for score, values in found.items():
            measured = of_kind & np.isfinite(values)
            if not measured.any():
                continue
            cuts = [
                Cut(rule.op, rule.threshold)
                for rule in facts.rules
                if rule.score == score and rule.rule.kind in (kind, "any")
                if rule.threshold is not None
            ]
            if not cuts and np.ptp(values[measured]) == 0:
                flat.append(
                    f"{SCORES.get(score, (score,))[0]} {number(float(values[measured][0]))}"
                )
                continue
            panels.append(_panel(facts, score, values, measured, int(of_kind.sum()), cuts))
        if panels or flat:
            groups.append(h("h3", title))
            groups.append(h("div", panels, class_="panels"))
        if flat:
            groups.append(h("p", f"The same for all: {'; '.join(flat)}.", class_="note"))
    return join(groups) if groups else None


def _panel(
    facts: Facts,
    score: str,
    values: np.ndarray,
    measured: np.ndarray,
    clips: int,
    cuts: Sequence[Cut],
) -> Html:
    name, unit = SCORES.get(score, (score, ""))
    low, middle, high = (number(float(q)) for q in np.quantile(values[measured], (0.05, 0.5, 0.95)))
    told = f"median {middle}; nine in ten from {low} to {high}"
    lacking = clips - int(measured.sum())
    kept, dropped = values[measured & facts.kept], values[measured & ~facts.kept]
    lines = ", ".join(f"keep {cut.op} {number(cut.at)}" for cut in cuts)
    label = f"{name}: {told}" + (f"; {lines}" if lines else "")
    return h(
        "figure",
        h(
            "figcaption",
            h("b", name),
            h("code", score) if score != name else None,
            h("span", unit, class_="about"),
        ),
        histogram(kept, dropped, cuts, label),
        h("p", told, f"; {lacking:,} not measured" if lacking else None, class_="note"),
        class_="panel",
    )


def _sources(facts: Facts, card: Cards) -> Html | None:
    sources, total = facts.sources
    if not sources:
        return None
    return Html(
        h("p", f"{len(sources)} of {total:,} shown, the longest", class_="note")
        + h(
            "p",
            _key("keep", "kept"),
            _key("drop", "dropped"),
            _key("ground", "trimmed"),
            _key("tick", "cut"),
            class_="key",
        )
        + join(_source(facts, source, card.seen) for source in sources)
    )


def _source(facts: Facts, source: Source, linked: set[str]) -> Html:
    blocks, cuts = [], []
    end = None
    for clip in source.clips:
        told = "; ".join([_verdict(clip), *_texts(clip)])
        title = f"{stamp(clip['start_s'])} to {stamp(clip['end_s'])}: {told}"
        link = f"#clip-{clip['uid']}" if clip["uid"] in linked else None
        blocks.append(Block(clip["start_s"], clip["end_s"], clip["verdict"], title, link))
        if clip["starts_at"] == "cut":  # half way through what was trimmed off on both sides
            cuts.append((clip["start_s"] + (clip["start_s"] if end is None else end)) / 2)
        end = clip["end_s"]
    kept = sum(clip["verdict"] == "keep" for clip in source.clips)
    strip = facts.pictures.strips.get(source.uri)
    marks = [stamp(source.seconds * i / 4) for i in range(5)]
    return h(
        "article",
        h("h3", h("bdi", _cut(facts.name(source.uri), 120)), title=_cut(source.uri)),
        h(
            "p",
            f"{_length(source.seconds)} · {_count(len(source.clips), 'clip')}, {kept:,} kept"
            f" · {_count(len(cuts), 'cut')}",
            class_="note",
        ),
        h("img", src=strip.uri, width=strip.width, height=strip.height, alt="", class_="strip")
        if strip
        else None,
        timeline(blocks, cuts, source.seconds),
        h("p", (h("span", mark) for mark in marks), class_="scale", aria_hidden="true"),
        class_="source",
    )


def _duplicates(facts: Facts, card: Cards) -> Html | None:
    groups, sizes = facts.groups
    if not groups:
        return None
    drawn = []
    for rows, size in zip(groups, sizes, strict=False):
        cards = [card(row, "best " if place == 0 else None) for place, row in enumerate(rows)]
        title = h("h3", f"{size:,} alike", h("span", f"{len(rows)} shown", class_="about"))
        drawn.append(h("div", title, h("div", cards, class_="grid"), class_="sheet"))
    return Html(
        h(
            "p",
            f"{sum(sizes):,} clips in {_count(len(sizes), 'group')}; "
            f"the {_count(len(groups), 'largest', 'largest')} shown, the best of each first",
            class_="note",
        )
        + join(drawn)
    )


def _captions(facts: Facts) -> Html | None:
    column = facts.clips.column("captions").combine_chunks()
    if not pc.any(pc.greater(pc.list_value_length(column), 0)).as_py():
        return None
    has = pc.fill_null(pc.greater(pc.list_value_length(column), 0), False)
    with_caption = has.to_numpy(zero_copy_only=False) & facts.kept
    flat = column.filter(pa.array(facts.kept)).flatten()
    groups = pa.table(
        {
            **{name: pc.fill_null(flat.field(name), "") for name in ("style", "lang", "model")},
            "status": pc.fill_null(flat.field("status"), ""),
            "length": pc.utf8_length(flat.field("text")),
        }
    ).group_by(["style", "lang", "model", "status"])
    rows = groups.aggregate([("length", "count"), ("length", "mean")]).to_pylist()
    rows.sort(key=lambda row: (-row["length_count"], row["style"], row["lang"], row["model"]))
    heads = ("style", "language", "written by", "status", "captions", "characters, mean")
    kept = int(facts.kept.sum())
    return Html(
        h(
            "p",
            f"{int(with_caption.sum()):,} of {kept:,} kept clips have a caption.",
            class_="note",
        )
        + _table(
            heads,
            (
                (
                    row["style"],
                    row["lang"] or "not said",
                    row["model"] or "people",
                    row["status"],
                    f"{row['length_count']:,}",
                    f"{row['length_mean']:.0f}",
                )
                for row in rows[:40]
            ),
        )
    )


def _quarantine(facts: Facts) -> Html | None:
    rows = facts.run.quarantine
    if not rows.num_rows:
        return None
    shown = rows.slice(0, QUARANTINED).select(["uri", "stage", "reason"]).to_pylist()
    reasons = Counter(rows.column("reason").to_pylist())
    often = [
        (reason, count) for reason, count in sorted(reasons.items(), key=lambda r: (-r[1], r[0]))
    ]
    parts = [h("p", f"{len(shown):,} of {rows.num_rows:,} shown", class_="note")]
    if rows.num_rows > 20 and len(often) < rows.num_rows:
        parts.append(_table(("reason", "sources"), ((_cut(r), f"{n:,}") for r, n in often[:12])))
    parts.append(
        _table(
            ("source", "stage", "reason"),
            ((h("bdi", _cut(facts.name(r["uri"]))), r["stage"], _cut(r["reason"])) for r in shown),
        )
    )
    return join(parts)


def _made(facts: Facts) -> Html:
    info = facts.info
    preset, changed = _changed(info["settings"])
    command = ["unimodal", "curate", *(info.get("inputs") or ["INPUT…"]), "-o", "run"]
    command += ["--preset", preset] if preset != "best" else []
    for key, value in changed.items():
        command += ["--set", f"{key}={value}"]
    text = " ".join(part if part == "INPUT…" else shlex.quote(part) for part in command)
    settings = json.dumps(info["settings"], indent=2, ensure_ascii=False)
    digest = hashlib.sha256(json.dumps(info["settings"], sort_keys=True).encode()).hexdigest()[:16]
    skipped = [(name, f"skipped: {why}") for name, why in info.get("skipped", {}).items()]
    return Html(
        h("p", "The same again:")
        + h("pre", h("code", text), tabindex=0)
        + h("p", "One clip in full: ", h("code", "unimodal why run UID"))
        + h(
            "div",
            h(
                "div",
                h("h3", "Stages"),
                _table(("stage", "folder"), [*info["stages"].items(), *skipped]),
            ),
            h(
                "div",
                h("h3", "Versions"),
                _table(("library", "version"), info.get("versions", {}).items()),
            ),
            class_="columns",
        )
        + h(
            "details",
            h("summary", f"All settings (digest {digest})"),
            h("pre", h("code", settings), tabindex=0),
        )
    )


def _changed(settings: Mapping[str, Any]) -> tuple[str, dict[str, str]]:
    """The preset that settings are nearest to, and what differs from it, as --set writes it."""
    from unimodal.pipeline.presets import PRESETS, CurateSettings

    def flat(group: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in group.items():
            found |= (
                flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
            )
        return found

    mine = flat(settings)
    best: tuple[str, dict[str, str]] | None = None
    for name, layer in PRESETS.items():
        base = flat(build(CurateSettings, layer).model_dump(mode="json"))
        differ = {k: _toml(v) for k, v in mine.items() if k not in base or base[k] != v}
        if best is None or len(differ) < len(best[1]):
            best = name, differ
    assert best is not None
    return best


def _toml(value: Any) -> str:
    return "none" if value is None else json.dumps(value)


def _score_columns() -> list[str]:
    return [
        f.name
        for f in CLIPS
        if (pa.types.is_floating(f.type) or pa.types.is_integer(f.type))
        and f.name not in NOT_SCORES
    ]


def _settings(rule: Judged) -> str:
    return ", ".join(f"decide.{name}" for name in rule.rule.settings)


def _verdict(clip: Mapping[str, Any]) -> str:
    return "kept" if clip["verdict"] == "keep" else "dropped"


def _reason(reason: str) -> Html:
    """A reason of decide's, "stage:score=value:keep", as people read it."""
    _, _, rest = reason.partition(":")
    figure, _, keep = rest.partition(":")
    score, _, value = figure.rpartition("=")
    try:
        told = f"{score} {number(float(value))}"
    except ValueError:  # a rule of the user's has no score
        return h("code", f"not {_signs(_cut(keep or reason))}")
    return join([_signs(_cut(told)), h("span", f" keep {_signs(_cut(keep.removeprefix(score)))}")])


def _texts(clip: Mapping[str, Any]) -> list[str]:
    return [_cut(reason.split(":", 2)[-1], 120) for reason in clip["reasons"] or []]


def _span(clip: Mapping[str, Any]) -> str:
    if clip["kind"] == "image":
        return f"{clip['width']} × {clip['height']}"
    return f"{stamp(clip['start_s'])} to {stamp(clip['end_s'])} · {clip['duration_s']:.1f} s"


def _table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> Html:
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


def _key(kind: str, text: str) -> Html:
    return h("span", h("i", class_=kind), text)


def _signs(expression: str) -> str:
    return expression.replace(">=", "≥").replace("<=", "≤").replace("*", "×")


def _cut(text: str, longest: int = LONGEST) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"


def _share(part: float, whole: float) -> str:
    if not whole:
        return "0 %"
    percent = 100 * part / whole
    return f"{percent:.0f} %" if percent >= 1 or not part else "under 1 %"


def _count(count: int, one: str, many: str | None = None) -> str:
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def _copies(count: int) -> str:
    return f"and {_count(count, 'copy', 'copies')} of them" if count else "no copies among them"


def _length(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60) if seconds >= 600 else None
    if minutes is None:
        return f"{int(seconds // 60)} min {int(seconds % 60)} s"
    return f"{minutes} min" if minutes < 120 else f"{seconds / 3600:,.1f} h"


def _sha256(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
