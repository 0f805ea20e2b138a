"""The report's tables: captions, quarantine, and how the run was made."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from unimodal.pipeline.captioning.answers import captioned
from unimodal.pipeline.markup import Html, h, join
from unimodal.pipeline.report.facts import Facts
from unimodal.pipeline.report.words import cut_off, table
from unimodal.pipeline.settings import build

QUARANTINED = 200
"""Rows of the quarantine table that are shown."""


def captions(facts: Facts) -> Html | None:
    column = facts.clips.column("captions")
    if not pc.any(pc.greater(pc.list_value_length(column), 0)).as_py():
        return None
    with_caption = captioned(column) & facts.kept
    said = pc.list_flatten(column.filter(pa.array(facts.kept)))
    told = pa.Table.from_struct_array(said)
    names = ["style", "lang", "model", "status"]
    groups = pa.table(
        {
            **{name: pc.fill_null(told.column(name), "") for name in names},
            "length": pc.fill_null(pc.utf8_length(told.column("text")), 0),
        }
    ).group_by(names)
    rows = groups.aggregate([("length", "count"), ("length", "mean")]).to_pylist()
    rows.sort(key=lambda row: (-row["length_count"], row["style"], row["lang"], row["model"]))
    heads = ("style", "language", "written by", "status", "captions", "characters, mean")
    kept = int(facts.kept.sum())
    return Html(
        h(
            "p",
            f"{int(with_caption.sum()):,} of {kept:,} kept clips have a caption.",
            _asked(facts.run.info.get("captions")),
            class_="note",
        )
        + table(
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


def _asked(told: Mapping[str, Any] | None) -> str:
    """What it took to have a model write them."""
    if not told:
        return ""
    failed = sum(told["failed"].values())
    rate = (told["last"] or {}).get("output_tokens_per_s")
    return (
        f" A model was asked {told['tries']:,} times for {told['requests']:,} descriptions, and "
        f"{failed:,} failed; it read {told['prompt_tokens']:,} tokens and wrote "
        f"{told['output_tokens']:,}" + (f", at last {rate:,.0f} a second." if rate else ".")
    )


def quarantine(facts: Facts) -> Html | None:
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
        parts.append(table(("reason", "sources"), ((cut_off(r), f"{n:,}") for r, n in often[:12])))
    parts.append(
        table(
            ("source", "stage", "reason"),
            (
                (h("bdi", cut_off(facts.name(r["uri"]))), r["stage"], cut_off(r["reason"]))
                for r in shown
            ),
        )
    )
    return join(parts)


def made(facts: Facts) -> Html:
    info = facts.info
    preset, changed = _changed(info["settings"])
    command = ["unimodal", "curate", "-o", "run"]
    command += ["--preset", preset] if preset != "best" else []
    for key, value in changed.items():
        command += ["--set", f"{key}={value}"]
    text = " ".join([*command[:2], "INPUT…", *map(shlex.quote, command[2:])])
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
                table(("stage", "folder"), [*info["stages"].items(), *skipped]),
            ),
            h(
                "div",
                h("h3", "Versions"),
                table(("library", "version"), info.get("versions", {}).items()),
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
