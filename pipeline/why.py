"""`why`: all that a run knows of one clip, or why a file is not among its clips.

    why(run, "3f1c")         a clip, by the beginning of its uid
    why(run, "cat.mp4")      a source, by its path or the end of it

Both give a dictionary for programs; `text` makes lines of it for people.
"""

from __future__ import annotations

import bisect
import difflib
import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from unimodal.pipeline.clips import CLIPS
from unimodal.pipeline.decide import DecideSettings
from unimodal.pipeline.errors import UsageError
from unimodal.pipeline.inputs import MEDIA_SUFFIXES
from unimodal.pipeline.judged import in_words, judge
from unimodal.pipeline.parts import read_parts
from unimodal.pipeline.settings import build

if TYPE_CHECKING:
    from unimodal.pipeline.run import Run

PLACE = (
    *("uid", "uri", "aliases", "part", "source_sha256", "kind", "start_s", "end_s", "duration_s"),
    *("start_pts", "end_pts", "time_base", "width", "height", "fps", "frames", "codec"),
    *("crop_x0", "crop_y0", "crop_x1", "crop_y1"),
)
"""Columns that say where a clip is."""

READS = {
    "watch": ("cut", "flow", "light", "keyframes", "limits"),
    "match": ("embed",),
    "describe": ("caption", "keyframes"),
}
"""Groups of settings that a stage depends on, where they are not called like the stage."""

_HEX = re.compile(r"[0-9a-f]{1,32}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def why(run: Run, what: str) -> dict[str, Any]:
    """Explain a clip (`what` is the beginning of its uid) or a source (a path, or the end of one).

    Of a clip: place, why it begins and ends there, rules, scores, duplicates, captions, stages,
    and what of its source was quarantined. Of a source: its clips, and what was quarantined.
    Raises `UsageError` if `what` is nothing in the run or more than one thing.
    """
    uids = run.clips.column("uid")
    if _HEX.fullmatch(what):
        rows = pc.indices_nonzero(pc.starts_with(uids, what)).to_pylist()
        if len(rows) == 1:
            return _clip(run, rows[0])
        if rows:
            some = ", ".join(uids.take(pa.array(rows[:4])).to_pylist())
            more = ", …" if len(rows) > 4 else ""
            raise UsageError(
                f"{what}: {len(rows)} uids begin with it ({some}{more}); give more of the one"
            )
    found = _source(run, what)
    if found is not None:
        return found
    known = sorted(uids.to_pylist())
    if _HEX.fullmatch(what):
        at = bisect.bisect(known, what)
        raise UsageError(
            f"{what}: no clip of {run.path} has a uid that begins with it; the nearest are "
            f"{', '.join(known[max(0, at - 2) : at + 2]) or 'none'}"
        )
    names = {PurePosixPath(uri).name: uri for uri in _uris(run)}
    near = difflib.get_close_matches(PurePosixPath(what).name, list(names)[:20_000], 3, 0.5)
    hint = f"; did you mean {' or '.join(names[name] for name in near)}?" if near else ""
    raise UsageError(f"{what}: neither a uid nor a source of {run.path}{hint}")


def text(found: Mapping[str, Any]) -> str:
    """What `why` found, as lines for a terminal; control characters of strangers are taken out."""
    lines = _clip_lines(found) if "clip" in found else _source_lines(found)
    return "\n".join(_CONTROL.sub("\ufffd", " ".join(line.splitlines())) for line in lines)


def stamp(seconds: float) -> str:
    """A time as people write it: 0:03.25, 1:02:03.5."""
    whole, tail = divmod(round(seconds * 100), 100)
    minutes, second = divmod(whole, 60)
    hours = f"{minutes // 60}:{minutes % 60:02d}" if minutes >= 60 else f"{minutes}"
    return f"{hours}:{second:02d}" + (f".{tail:02d}".rstrip("0") if tail else "")


def boundary(clip: Mapping[str, Any], side: str) -> str:
    """Why a clip of a video begins ("start") or ends ("end") where it does."""
    at = clip["starts_at" if side == "start" else "ends_at"]
    if at == "source":
        return "the video begins" if side == "start" else "the video ends"
    if at == "split":
        return "a long shot was split evenly"
    cut = clip[f"{side}_cut"]
    if not cut or cut["score"] is None:
        return "a cut"
    return f"a cut ({cut['detector']} {cut['score']:.4g}, threshold {cut['threshold']:.4g})"


def _clip(run: Run, row: int) -> dict[str, Any]:
    clip = run.clips.slice(row, 1).to_pylist()[0]
    video = clip["kind"] == "video"
    # The joined view has no embedding; all its other numbers that say no place are scores.
    scores = {
        field.name: clip[field.name]
        for field in CLIPS
        if pa.types.is_floating(field.type) and field.name not in PLACE
    }
    return {
        "clip": {name: clip[name] for name in PLACE},
        "begins": boundary(clip, "start") if video else None,
        "ends": boundary(clip, "end") if video else None,
        "start_cut": clip["start_cut"],
        "end_cut": clip["end_cut"],
        "verdict": clip["verdict"],
        "reasons": clip["reasons"],
        "rules": _rules(run, clip),
        "scores": scores,
        "duplicates": _duplicates(run, clip["dup_group"]),
        "captions": clip["captions"] or [],
        "described": _described(run, clip["uid"]),
        "meta": dict(clip["meta"] or []),
        "frames": {
            "tar": str(run.frames_tar(clip["part"])),
            "members": [sample["member"] for sample in run.samples(clip["part"])[clip["uid"]]],
        },
        "stages": _stages(run, clip["part"]),
        "versions": run.info.get("versions", {}),
        "quarantine": _quarantine(run, [clip["uri"], *(clip["aliases"] or [])]),
    }


def _rules(run: Run, clip: Mapping[str, Any]) -> list[dict[str, Any]]:
    # The last rule compares near-duplicates: the group is judged as a whole.
    column = "uid" if clip["dup_group"] is None else "dup_group"
    together = run.clips.filter(pc.equal(run.clips.column(column), clip[column]))
    row = together.column("uid").to_pylist().index(clip["uid"])
    settings = build(DecideSettings, run.info["settings"]["decide"])
    rows = []
    for judged in judge(together, settings):
        result = "fail" if judged.drops[row] else "pass" if judged.passes[row] else "not measured"
        if not judged.speaks[row]:
            result = f"speaks of {judged.about} only"
        value = float(judged.values[row])
        rows.append(
            {
                "keep": judged.keep,
                "settings": [f"decide.{name}" for name in judged.rule.settings],
                "score": judged.score,
                "value": None if math.isnan(value) else value,
                "threshold": judged.threshold,
                "result": result,
            }
        )
    return rows


def _described(run: Run, uid: str) -> dict[str, Any] | None:
    """How a model came to describe a clip: prompt, tries, tokens; None if none was asked."""
    folder = run.info["stages"].get("describe")
    if folder is None:
        return None
    from unimodal.pipeline.captioning.store import Store

    store = Store(run.path / folder)
    rows = store.rows()
    mine = rows.filter(pc.equal(rows.column("uid"), uid)).drop_columns(["captions"]).to_pylist()
    return {"prompt": store.asked(), "requests": mine} if mine else None


def _duplicates(run: Run, group: str | None) -> list[dict[str, Any]]:
    """The group of near-duplicates that a clip is in, the best first; empty if it is in none."""
    if group is None:
        return []
    members = run.clips.filter(pc.equal(run.clips.column("dup_group"), group))
    columns = ["uid", "uri", "start_s", "end_s", "dup_rank", "verdict", "reasons"]
    rows = members.select(columns).to_pylist()
    return sorted(rows, key=lambda row: (row["dup_rank"] or 0, row["uid"]))


def _stages(run: Run, part: str) -> list[dict[str, Any]]:
    """The stages that the part went through, each with its file and the settings it ran with."""
    settings = run.info["settings"]
    rows = []
    for stage, folder in run.info["stages"].items():
        # Its own file where the stage works part by part, else the one of all parts.
        files = [f"{part}.parquet", *sorted(p.name for p in (run.path / folder).glob("*.parquet"))]
        files = [f"{folder}/{name}" for name in files if (run.path / folder / name).exists()]
        rows.append(
            {
                "stage": stage,
                "folder": folder,
                "file": files[0] if files else None,
                "settings": {k: settings[k] for k in READS.get(stage, (stage,)) if k in settings},
            }
        )
    for stage, why_not in run.info.get("skipped", {}).items():
        rows.append({"stage": stage, "skipped": why_not})
    return rows


def _source(run: Run, what: str) -> dict[str, Any] | None:
    """What is known of a source, by path; None if nothing is."""
    full = os.path.abspath(what)  # noqa: PTH100 - as the listing names sources, links kept
    parts = read_parts(run.path / "parts.parquet")
    first = {s.uri: s.uri for p in parts for s in p.sources}
    first |= {alias: s.uri for p in parts for s in p.sources for alias in s.aliases}
    quarantined = run.quarantine.column("uri").to_pylist()
    first |= {uri: uri for uri in quarantined if uri not in first}
    names = [uri for uri in (what, full) if uri in first]
    names = names or sorted(uri for uri in first if uri.endswith("/" + what.lstrip("./")))
    sources = sorted({first[name] for name in names})
    if len(sources) > 1:
        more = ", …" if len(sources) > 4 else ""
        raise UsageError(
            f"{what}: {len(sources)} sources end with it ({', '.join(sources[:4])}{more}); "
            "give more of the one"
        )
    if not sources:
        if not os.path.lexists(what):
            return None
        return {"source": full, "clips": [], "quarantine": [], "note": _not_listed(full)}
    mine = run.clips.filter(pc.equal(run.clips.column("uri"), sources[0]))
    columns = ["uid", "kind", "start_s", "end_s", "verdict", "reasons"]
    clips = mine.select(columns).to_pylist()
    sick = _quarantine(run, {sources[0], *names})
    same = names[0] != sources[0]
    note = f"the bytes of {names[0]} are those of {sources[0]}, which stands for it" if same else ""
    if not clips and not sick:
        note = "it was among the inputs, but has neither clips nor a reason: run curate again"
    return {"source": sources[0], "clips": clips, "quarantine": sick, "note": note}


def _not_listed(path: str) -> str:
    name = PurePosixPath(path).name
    if Path(path).is_dir():
        return "a folder: name a file in it"
    if any(part.startswith(".") for part in PurePosixPath(path).parts):
        return (
            "it is not in the run: what is hidden is not searched; name it or its folder outright"
        )
    if PurePosixPath(name).suffix.lower() not in MEDIA_SUFFIXES:
        return "it is not in the run: its name is not that of media; name it outright"
    return "it is not in the run: it was not among the inputs when curate last ran"


def _quarantine(run: Run, uris: Iterable[str]) -> list[dict[str, Any]]:
    rows = run.quarantine
    return rows.filter(
        pc.is_in(rows.column("uri"), pa.array(sorted(uris), pa.string()))
    ).to_pylist()


def _uris(run: Run) -> list[str]:
    uris = {*pc.unique(run.clips.column("uri")).to_pylist()}
    return sorted(uris | {*run.quarantine.column("uri").to_pylist()})


def _clip_lines(found: Mapping[str, Any]) -> Iterable[str]:
    clip = found["clip"]
    yield f"{found['verdict'].upper()}  {_span(clip)} of {clip['uri']}"
    yield from (f"  {in_words(reason)}" for reason in found["reasons"] or [])
    yield ""
    yield from _place_lines(found)
    yield from _score_lines(found)
    if found["duplicates"]:
        yield from ("", "near-duplicates, the best first")
        for row in found["duplicates"]:
            here = "  (this one)" if row["uid"] == clip["uid"] else ""
            yield f"  {row['verdict']:<5} {row['uid']}  {_span(row)} of {row['uri']}{here}"
    yield from _caption_lines(found)
    if found["meta"]:
        yield from ("", "came along")
        yield from (f"  {key}: {value}" for key, value in found["meta"].items())
    yield from ("", "stages")
    for stage in found["stages"]:
        yield f"  {stage['stage']:<8} {stage.get('file') or 'skipped: ' + stage.get('skipped', '')}"
    yield f"  {len(found['frames']['members'])} frames in {found['frames']['tar']}"
    yield f"  {', '.join(f'{name} {version}' for name, version in found['versions'].items())}"
    yield from _sick_lines(found["quarantine"])


def _place_lines(found: Mapping[str, Any]) -> Iterable[str]:
    clip = found["clip"]
    yield f"  uid        {clip['uid']}"
    yield f"  source     sha256 {clip['source_sha256']}, part {clip['part']}"
    yield from (f"  also at    {uri}" for uri in clip["aliases"] or [])
    rate = f", {clip['fps']:.6g} frames a second, {clip['frames']} frames" if clip["fps"] else ""
    yield f"  picture    {clip['width']}x{clip['height']}, {clip['codec']}{rate}"
    if found["begins"]:
        yield f"  span       {clip['start_pts']} to {clip['end_pts']} of {clip['time_base']} s"
        yield f"  begins     at {stamp(clip['start_s'])}: {found['begins']}"
        yield f"  ends       at {stamp(clip['end_s'])}: {found['ends']}"


def _score_lines(found: Mapping[str, Any]) -> Iterable[str]:
    yield from ("", "rules")
    rules = [
        ({"pass": "pass", "fail": "FAIL"}.get(rule["result"], "-"), rule["keep"], _told(rule))
        for rule in found["rules"]
        if not rule["result"].startswith("speaks")
    ]
    wide = max((len(keep) for _, keep, _ in rules), default=0)
    yield from (f"  {mark:<4}  {keep:<{wide}}  {told}".rstrip() for mark, keep, told in rules)
    yield from ("", "scores")
    measured = {name: value for name, value in found["scores"].items() if value is not None}
    yield from (f"  {name:<16} {value:.6g}" for name, value in measured.items())
    lacking = [name for name in found["scores"] if name not in measured]
    if lacking:
        yield f"  not measured: {', '.join(lacking)}"


def _caption_lines(found: Mapping[str, Any]) -> Iterable[str]:
    yield from ("", "captions" if found["captions"] else "no captions")
    for caption in found["captions"]:
        told = [str(caption[k]) for k in ("style", "lang", "model", "status") if caption[k]]
        when = ""
        if caption["start_s"] is not None:
            when = f"{stamp(caption['start_s'])} to {stamp(caption['end_s'])}: "
        yield f"  {when}{caption['text'] or 'none'}  ({', '.join(told)})"
    if found["described"]:
        asked = found["described"]["prompt"]
        yield (
            f"  asked with prompt {asked.get('prompt')} {asked.get('version')} "
            f"({asked.get('language')}, {asked.get('hash')}) of {asked.get('model')}"
        )
        for row in found["described"]["requests"]:
            yield (
                f"  piece {row['piece']}: {row['status']}, {row['tries']} tries, "
                f"{row['prompt_tokens']} tokens read, {row['output_tokens']} written"
                + (f"; {row['detail']}" if row["detail"] else "")
            )


def _source_lines(found: Mapping[str, Any]) -> Iterable[str]:
    clips = found["clips"]
    kept = sum(clip["verdict"] == "keep" for clip in clips)
    yield f"{found['source']}: {len(clips)} clip{'s' * (len(clips) != 1)}, {kept} kept"
    if found["note"]:
        yield f"  {found['note']}"
    for clip in clips:
        reasons = "".join(f"  {in_words(reason)}" for reason in clip["reasons"] or [])
        yield f"  {clip['verdict']:<5} {clip['uid']}  {_span(clip)}{reasons}"
    yield from _sick_lines(found["quarantine"])


def _sick_lines(rows: Iterable[Mapping[str, Any]]) -> Iterable[str]:
    for row in rows:
        yield f"quarantined by {row['stage']}: {row['uri']}: {row['reason']}"


def _told(rule: Mapping[str, Any]) -> str:
    if rule["result"] == "not measured":
        return "not measured"
    return "" if rule["value"] is None else f"{rule['score']} is {rule['value']:.6g}"


def _span(clip: Mapping[str, Any]) -> str:
    if clip["start_s"] is None:
        return "the image"
    return f"{stamp(clip['start_s'])} to {stamp(clip['end_s'])}"
