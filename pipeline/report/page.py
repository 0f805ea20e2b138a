"""The page, from top to bottom. All text goes through `markup`, which escapes it."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.compute as pc

from unimodal.pipeline.judged import Judged, figures
from unimodal.pipeline.markup import Html, h, join
from unimodal.pipeline.report.cards import Cards
from unimodal.pipeline.report.charts import Block, Cut, bar, histogram, number, timeline
from unimodal.pipeline.report.facts import Facts, Source
from unimodal.pipeline.report.tables import captions, made, quarantine
from unimodal.pipeline.report.words import (
    NOT_SCORES,
    SCORES,
    count,
    cut_off,
    keeps,
    key,
    length,
    reasons,
    score_columns,
    share,
    verdict,
)
from unimodal.pipeline.why import stamp

MOST = 0.7
"""Share of its clips from which on a rule is worth a second look."""


def page(facts: Facts) -> str:
    """The whole document."""
    style, script = (
        (Path(__file__).parent / name).read_text("utf-8") for name in ("style.css", "script.js")
    )
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
        ("captions", "Captions", captions(facts)),
        ("quarantine", "Quarantine", quarantine(facts)),
        ("made", "How it was made", made(facts)),
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
            length(float(seconds[facts.kept].sum())),
            f"{int((facts.kept & facts.video).sum()):,} of {int(facts.video.sum()):,} clips, "
            f"{length(float(seconds.sum()))} in all",
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
        h("p", "from ", h("bdi", cut_off(facts.folder)), class_="from") if facts.folder else None,
        bar([("keep", kept), ("drop", dropped)], clips, f"{kept} kept, {dropped} dropped"),
        h(
            "p",
            key("keep", f"kept {share(kept, clips)}"),
            key("drop", f"dropped {share(dropped, clips)}"),
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
    skipped = facts.info.get("skipped", {})
    for why in dict.fromkeys(skipped.values()):
        stages = ", ".join(stage for stage, given in skipped.items() if given == why)
        notes.append(h("li", h("b", stages), f" did not run: {why}."))
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
    judged, drops = rule.judged, rule.dropped
    if not drops:
        return "drops nothing"
    return f"drops {share(drops, judged)}" if drops > MOST * judged else None


def _measured(rule: Judged) -> bool:
    """Whether the rule had a figure to go by for any clip."""
    return bool((rule.passes & np.isfinite(rule.values)).any() if rule.score else rule.passes.any())


def _rules(facts: Facts) -> Html:
    clips = len(facts)
    times = facts.drops.sum(axis=0) if len(facts.rules) else np.zeros(clips)
    gone = np.zeros(clips, bool)
    rows, idle = [], []
    for place, rule in enumerate(facts.rules):
        if not rule.drops.any() and not _measured(rule):
            idle.append(rule)
            continue
        before = gone
        gone = gone | rule.drops
        alone = int((rule.drops & (times == 1)).sum())
        rows.append(_rule(rule, place, before, gone, alone))
    unused = None
    if idle:
        listed = join(h("li", h("code", keeps(r)), f", {r.about}") for r in idle)
        title = f"{count(len(idle), 'rule')} had nothing to judge: no such clips, or no such score"
        unused = h("details", h("summary", title), h("ul", listed))
    if not rows:
        return join([h("p", "No rule has judged anything: all is kept."), unused])
    heads = (h("th", head, scope="col") for head in ("keep if", "drops", "alone", "left"))
    return Html(
        h(
            "p",
            "A clip is kept if it passes every rule that speaks of it; what was not measured is "
            "never dropped. Bars run from all clips down to those that are left.",
            class_="note",
        )
        + h(
            "p",
            key("left", "left"),
            key("alone", "dropped by this rule only"),
            key("shared", "by a later rule too"),
            key("gone", "dropped before"),
            class_="key",
        )
        + h("table", h("thead", h("tr", *heads)), h("tbody", rows), class_="rules")
        + join(unused)
    )


def _rule(rule: Judged, place: int, before: np.ndarray, gone: np.ndarray, alone: int) -> Html:
    """A row of the table of rules; bool [N]: the clips that are dropped before it, and with it."""
    clips, shared = len(gone), int((rule.drops & ~before).sum()) - alone
    left, earlier = clips - int(gone.sum()), int(before.sum())
    parts = [("left", left), ("alone", alone), ("shared", shared), ("gone", earlier)]
    said = f"{left} left, {alone} dropped by this rule only, {shared} by a later one too, "
    problem = _problem(rule)
    return h(
        "tr",
        h(
            "th",
            h("code", keeps(rule)),
            h("span", f"{rule.about} · {rule.named}", class_="about"),
            h("span", problem, class_="badge") if problem else None,
            bar(parts, clips, f"{said}{earlier} dropped before"),
            scope="row",
        ),
        h("td", f"{rule.dropped:,}", h("small", share(rule.dropped, rule.judged))),
        h("td", f"{alone:,}"),
        h("td", f"{left:,}"),
        data_rule=place if rule.dropped else None,
    )


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
                h("h3", h("code", keeps(rule)), h("span", rule.about, class_="about")),
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
                    h("code", keeps(rule)),
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
    columns = score_columns()
    asked = [rule.score for rule in facts.rules if rule.score and rule.score not in NOT_SCORES]
    found = figures(facts.clips, [*asked, *columns])
    groups = []
    for kind, title, of_kind in (
        ("video", "Videos", facts.video),
        ("image", "Images", ~facts.video),
    ):
        panels: list[tuple[bool, Html]] = []
        flat = []
        for score, values in found.items():
            measured = of_kind & np.isfinite(values)
            cuts = [
                Cut(rule.op, rule.threshold)
                for rule in facts.rules
                if rule.score == score and rule.rule.kind in (kind, "any")
                if rule.threshold is not None
            ]
            if not measured.any() or not (cuts or score in columns):
                continue
            if not cuts and np.ptp(values[measured]) == 0:
                same = number(float(values[measured][0]))
                flat.append(f"{SCORES.get(score, (score,))[0]} {same}")
                continue
            panel = _panel(facts, score, values, measured, int(of_kind.sum()), cuts)
            panels.append((not cuts, panel))
        if panels or flat:
            groups.append(h("h3", title))
            panels.sort(key=lambda panel: panel[0])  # what has a threshold comes first
            groups.append(h("div", [panel for _, panel in panels], class_="panels"))
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
            key("keep", "kept"),
            key("drop", "dropped"),
            key("ground", "trimmed"),
            key("tick", "cut"),
            class_="key",
        )
        + join(_source(facts, source, card.seen) for source in sources)
    )


def _source(facts: Facts, source: Source, linked: set[str]) -> Html:
    blocks, cuts = [], []
    end = None
    for clip in source.clips:
        told = "; ".join([verdict(clip), *reasons(clip)])
        title = f"{stamp(clip['start_s'])} to {stamp(clip['end_s'])}: {told}"
        link = f"#clip-{clip['uid']}" if clip["uid"] in linked else None
        blocks.append(Block(clip["start_s"], clip["end_s"], clip["verdict"], title, link))
        if clip["starts_at"] == "cut":  # half way through what was trimmed off on both sides
            cuts.append((clip["start_s"] + (clip["start_s"] if end is None else end)) / 2)
        end = clip["end_s"]
    kept = sum(clip["verdict"] == "keep" for clip in source.clips)
    strip = facts.pictures.strips.get(source.uri)
    whole = source.seconds >= 60  # hundredths of a second say nothing there
    marks = [source.seconds * i / 4 for i in range(5)]
    scale = [stamp(round(mark) if whole else mark) for mark in marks]
    return h(
        "article",
        h("h3", h("bdi", cut_off(facts.name(source.uri), 120)), title=cut_off(source.uri)),
        h(
            "p",
            f"{length(source.seconds)} · {count(len(source.clips), 'clip')}, {kept:,} kept"
            f" · {count(len(cuts), 'cut')}",
            class_="note",
        ),
        h("img", src=strip.uri, width=strip.width, height=strip.height, alt="", class_="strip")
        if strip
        else None,
        timeline(blocks, cuts, source.seconds),
        h("p", (h("span", mark) for mark in scale), class_="scale", aria_hidden="true"),
        class_="source",
    )


def _duplicates(facts: Facts, card: Cards) -> Html | None:
    groups, sizes = facts.groups
    if not groups:
        return None
    drawn = []
    for rows, size in zip(groups, sizes, strict=False):
        cards = [card(row, "best" if place == 0 else None) for place, row in enumerate(rows)]
        some = h("span", f"{len(rows)} shown", class_="about") if len(rows) < size else None
        title = h("h3", f"{size:,} alike", some)
        drawn.append(h("div", title, h("div", cards, class_="grid"), class_="sheet"))
    return Html(
        h(
            "p",
            f"{sum(sizes):,} clips in {count(len(sizes), 'group')}; "
            f"the {count(len(groups), 'largest', 'largest')} shown, the best of each first",
            class_="note",
        )
        + h("div", drawn, class_="pairs")
    )


def _copies(copies: int) -> str:
    return f"and {count(copies, 'copy', 'copies')} of them" if copies else "no copies among them"


def _sha256(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
