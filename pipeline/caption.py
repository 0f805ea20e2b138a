"""Captions that people wrote: given with the call, or lying beside the media as sidecar files.

Precedence, first to last; the first caption of a clip is the one to use, the others stay as
alternatives, and a text that repeats an earlier one is left out:

1. given    the `captions` mapping or table of the call
2. json     {"caption": "…"}, or "text", or "captions": ["…", {"text", "style", "lang", "start_s",
            "end_s"}]
3. txt      the whole file is one caption
4. vtt      cues of a video; a clip takes the cues that lie more than half inside it, joined

For `cat.png` the sidecar is `cat.png.txt`, else `cat.txt`. Copies of a picture bring their own
sidecars along. A caption without times speaks of the whole source and goes to each of its clips;
one with times goes to the clips that hold more than half of it, with times from the clip's start.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from unimodal.pipeline.errors import UsageError
from unimodal.pipeline.settings import Settings

VERSION = 1
LARGEST = 1 << 20  # bytes of a sidecar; a megabyte of caption is a mistake


class CaptionSettings(Settings):
    """Where captions come from."""

    sidecar: tuple[str, ...] = ("json", "txt", "vtt")
    """Kinds of files beside the media that are read, in order of precedence."""


@dataclass(frozen=True)
class Caption:
    """One caption of a source; times are seconds from the source's first frame."""

    text: str
    style: str = "sidecar"
    lang: str | None = None
    start_s: float | None = None
    end_s: float | None = None


@dataclass
class Given:
    """Captions and other columns that came with the call, by absolute path."""

    captions: dict[str, list[Caption]] = field(default_factory=dict)
    meta: dict[str, dict[str, str]] = field(default_factory=dict)

    def digest(self) -> str:
        """Hash of everything in it."""
        rows = [[path, [vars(c) for c in found]] for path, found in sorted(self.captions.items())]
        return hashlib.sha256(json.dumps([rows, sorted(self.meta.items())]).encode()).hexdigest()


def read_given(captions: Mapping[str, Any] | str | Path | None) -> Given:
    """Captions of a mapping {path: text or list of texts}, or of a .jsonl or .csv file.

    A file has the columns `path` and `caption` (and, if it likes, `style` and `lang`); relative
    paths are relative to it; other columns become `meta`. Raises `UsageError`.
    """
    given = Given()
    if captions is None:
        return given
    if isinstance(captions, Mapping):
        for path, texts in captions.items():
            for text in [texts] if isinstance(texts, str) else texts:
                _add(given, _absolute(str(path), None), str(text), {})
        return given
    table = Path(captions)
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file) if table.suffix == ".csv" else map(json.loads, file))
    except (OSError, ValueError) as error:
        raise UsageError(f"captions {table}: cannot be read ({error})") from error
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict) or "path" not in row or "caption" not in row:
            raise UsageError(f"captions {table}, row {number}: needs the columns path and caption")
        path = _absolute(str(row.pop("path")), table.parent)
        texts = row.pop("caption")
        for text in [texts] if isinstance(texts, str) else texts or []:
            _add(given, path, str(text), row)
    return given


def find_sidecars(
    uris: Iterable[str], kinds: Sequence[str]
) -> dict[str, list[tuple[str, int, int]]]:
    """Sidecar files of each source as (path, size, mtime_ns), by precedence.

    Each folder is listed once, however many sources it holds.
    """
    folders: dict[str, dict[str, tuple[str, int, int]]] = {}
    found: dict[str, list[tuple[str, int, int]]] = {}
    endings = tuple(f".{kind}" for kind in kinds)
    for uri in uris:
        folder, name = os.path.split(uri)
        if folder not in folders:
            folders[folder] = _text_files(folder, endings)
        files = folders[folder]
        stem = os.path.splitext(name)[0]  # noqa: PTH122
        beside = [
            files[candidate]
            for ending in endings
            for candidate in (name + ending, stem + ending)
            if candidate in files and candidate != name
        ]
        if beside:
            found[uri] = list(dict.fromkeys(beside))
    return found


def read_sidecar(path: Path) -> list[Caption]:
    """Captions of one sidecar file; raises `ValueError` with what is wrong with it."""
    if path.stat().st_size > LARGEST:
        raise ValueError(f"larger than {LARGEST} bytes")
    text = path.read_text(encoding="utf-8-sig", errors="replace")
    kind = path.suffix.lower()
    if kind == ".json":
        return _from_json(json.loads(text))
    if kind == ".vtt":
        return _from_vtt(text)
    return [Caption(text.strip())] if text.strip() else []


def for_clip(
    captions: Sequence[Caption], start_s: float | None, end_s: float | None
) -> list[dict[str, Any]]:
    """The rows of `clips.CAPTION` that a clip takes from its source's captions.

    `start_s` and `end_s` are the clip's, null for an image.
    """
    whole: list[Caption] = []
    cues: list[Caption] = []
    for caption in captions:
        if caption.start_s is None or caption.end_s is None or start_s is None or end_s is None:
            whole.append(replace(caption, start_s=None, end_s=None))
            continue
        inside = min(caption.end_s, end_s) - max(caption.start_s, start_s)
        if inside > 0.5 * (caption.end_s - caption.start_s):
            begin = max(0.0, caption.start_s - start_s)
            moved = replace(caption, start_s=begin, end_s=min(caption.end_s, end_s) - start_s)
            (cues if caption.style == "subtitle" else whole).append(moved)
    if cues:
        spoken = " ".join(cue.text for cue in cues)
        whole.append(replace(cues[0], text=spoken, end_s=cues[-1].end_s))
    rows = []
    seen: set[str] = set()
    for caption in whole:
        if caption.text not in seen:
            seen.add(caption.text)
            rows.append({**vars(caption), "model": None, "prompt_hash": None, "status": "ok"})
    return rows


def _from_json(value: Any) -> list[Caption]:
    if isinstance(value, str):
        return [Caption(value.strip())] if value.strip() else []
    if isinstance(value, list):
        return [caption for item in value for caption in _from_json(item)]
    if not isinstance(value, dict):
        raise ValueError("expected a text, a list or an object with captions")
    found: list[Caption] = []
    for key in ("caption", "text", "captions"):
        inner = value.get(key)
        if isinstance(inner, str) and inner.strip():
            times = [value.get("start_s"), value.get("end_s")]
            start, end = (float(t) if isinstance(t, int | float) else None for t in times)
            style, lang = value.get("style"), value.get("lang")
            found.append(
                Caption(
                    inner.strip(),
                    str(style) if style else "sidecar",
                    str(lang) if lang else None,
                    start,
                    end,
                )
            )
        elif inner is not None and not isinstance(inner, str):
            found += _from_json(inner)
    return found


_TIME = re.compile(r"(?:(\d+):)?(\d\d):(\d\d)[.,](\d\d\d)")


def _from_vtt(text: str) -> list[Caption]:
    if not text.startswith("WEBVTT"):
        raise ValueError("does not begin with WEBVTT")
    cues = []
    for block in re.split(r"\n\s*\n", text.replace("\r\n", "\n")):
        lines = block.strip().split("\n")
        at = next((i for i, line in enumerate(lines) if "-->" in line), None)
        if at is None:
            continue  # the header, a note, a style sheet
        times = _TIME.findall(lines[at])
        words = re.sub(r"<[^<>]*>", "", " ".join(lines[at + 1 :])).strip()
        if len(times) == 2 and words:
            start, end = (
                int(h or 0) * 3600 + int(m) * 60 + int(s) + int(ms) / 1000 for h, m, s, ms in times
            )
            cues.append(Caption(words, "subtitle", None, start, end))
    return cues


def _text_files(folder: str, endings: tuple[str, ...]) -> dict[str, tuple[str, int, int]]:
    files: dict[str, tuple[str, int, int]] = {}
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.endswith(endings) and entry.is_file():
                    status = entry.stat()
                    files[entry.name] = (entry.path, status.st_size, status.st_mtime_ns)
    except OSError:
        pass  # the sources in it are quarantined for the same reason
    return files


def _add(given: Given, path: str, text: str, row: Mapping[str, Any]) -> None:
    style, lang = row.get("style"), row.get("lang")
    if text.strip():
        caption = Caption(text.strip(), str(style) if style else "given", lang or None)
        given.captions.setdefault(path, []).append(caption)
    meta = {k: str(v) for k, v in row.items() if k not in ("style", "lang") and v is not None}
    if meta:
        given.meta[path] = meta


def _absolute(path: str, folder: Path | None) -> str:
    if folder is not None and (folder / path).exists():
        path = str(folder / path)
    return os.path.abspath(path)  # noqa: PTH100 - as the listing names sources, links kept
