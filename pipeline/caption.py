"""Captions that people wrote: given with the call, or lying beside the media as sidecar files.

Precedence, first to last; the first caption of a clip is the one to use, the others stay as
alternatives, and a text that repeats an earlier one is left out:

1. given    the `captions` mapping or table of the call
2. inputs   what tables, then tars, among the inputs say of their own media
3. json     {"caption": "…"}, or "text", or "captions": ["…", {"text", "style", "lang", "start_s",
            "end_s"}]
4. txt      the whole file is one caption
5. vtt      cues of a video; a clip takes the cues that lie more than half inside it, joined

For `cat.png` the sidecar is `cat.png.txt`, else `cat.txt`, on disk and in a bucket; in a tar, the
members of the same key, which count as inputs. Copies of a picture bring their own sidecars
along. Columns that ride along (`meta`) follow the same order, each by its name. A caption without
times speaks of the whole source and goes to each of its clips;
one with times goes to the clips that hold more than half of it, with times from the clip's start.
"""

from __future__ import annotations

import hashlib
import html
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from unimodal.pipeline import fetch, remote, tables, tars
from unimodal.pipeline.clips import CAPTION, CLIPS, read_parquet, table, write_parquet
from unimodal.pipeline.errors import MediaError

VERSION = 3
LARGEST = tars.LARGEST_TEXT  # bytes of a sidecar

NOT_META = frozenset({"caption", "text", "captions", "style", "lang", "start_s", "end_s"})


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
    """Captions and other columns that came with the call or the inputs, by uri."""

    captions: dict[str, list[Caption]] = field(default_factory=dict)
    meta: dict[str, dict[str, str]] = field(default_factory=dict)
    sick: dict[str, str] = field(default_factory=dict)  # members of tars that cannot be read: why

    def digest(self) -> str:
        """Hash of everything in it."""
        rows = [[path, [vars(c) for c in found]] for path, found in sorted(self.captions.items())]
        others = [sorted(self.meta.items()), sorted(self.sick.items())]
        return hashlib.sha256(json.dumps([rows, others]).encode()).hexdigest()

    def add(
        self, uri: str, captions: Iterable[Caption] = (), meta: Mapping[str, str] | None = None
    ) -> None:
        """Add what is known of a source; what is there already comes first."""
        if captions := list(captions):
            self.captions.setdefault(uri, []).extend(captions)
        if meta:
            self.meta[uri] = {**meta, **self.meta.get(uri, {})}

    def over(self, other: Given) -> Given:
        """Both: this one's captions come first, and its columns count where both have one."""
        both = Given({uri: list(said) for uri, said in self.captions.items()}, dict(self.meta))
        for uri in {**other.captions, **other.meta}:
            both.add(uri, other.captions.get(uri, ()), other.meta.get(uri))
        both.sick = {**other.sick, **self.sick}
        return both

    def write(self, path: Path) -> None:
        """Keep all of it in a Parquet file, so that a run can be updated without its inputs."""
        if not self.captions and not self.meta and not self.sick:
            path.unlink(missing_ok=True)
            return
        rows = [
            {
                "uri": uri,
                "captions": [vars(found) for found in self.captions.get(uri, ())],
                "meta": list(self.meta.get(uri, {}).items()),
                "sick": self.sick.get(uri),
            }
            for uri in sorted({*self.captions, *self.meta, *self.sick})
        ]
        write_parquet(table(rows, GIVEN), path)

    @classmethod
    def read(cls, path: Path) -> Given:
        """What `write` kept; nothing if there is no such file."""
        given = cls()
        if path.exists():
            names = ("text", "style", "lang", "start_s", "end_s")
            for row in read_parquet(path).to_pylist():
                found = [Caption(*(said[name] for name in names)) for said in row["captions"]]
                given.add(row["uri"], found, dict(row["meta"]))
                if row["sick"]:
                    given.sick[row["uri"]] = row["sick"]
        return given


GIVEN = pa.schema(
    [
        pa.field("uri", pa.string(), nullable=False),
        pa.field("captions", pa.list_(CAPTION)),
        pa.field("meta", CLIPS.field("meta").type),
        pa.field("sick", pa.string()),
    ]
)


def read_given(captions: Mapping[str, Any] | str | Path | None) -> Given:
    """Captions of a mapping {path: text or list of texts}, or of a table as in `tables`.

    A table, local or in a bucket, has a column of paths and one of captions (and, if it likes,
    `style` and `lang`); its other columns become `meta`. Raises `UsageError`.
    """
    given = Given()
    if captions is None:
        return given
    if isinstance(captions, Mapping):
        for key, texts in captions.items():
            found = [texts] if isinstance(texts, str) else texts
            said = [Caption(tables.clean(str(text).strip()), "given") for text in found]
            given.add(tables.absolute(str(key), None), [c for c in said if c.text])
        return given
    table = str(captions)
    with fetch.local(table) as path:
        for row in tables.read_rows(path, table, captions=True):
            uri = tables.absolute(row.path, os.path.dirname(table))  # noqa: PTH120
            given.add(uri, from_row(row), row.meta)
    return given


def from_row(row: tables.Row) -> list[Caption]:
    """Captions of a table's row."""
    return [Caption(text, row.style or "given", row.lang) for text in row.texts]


def find_sidecars(
    uris: Iterable[str], kinds: Sequence[str]
) -> dict[str, list[tuple[str, int, int | str]]]:
    """Sidecar files of each source as (uri, size, mtime_ns or etag), by precedence.

    Each folder is listed once, however many sources it holds; one in a bucket too. Members of
    tars have none: what lies beside them came with the listing.
    """
    found: dict[str, list[tuple[str, int, int | str]]] = {}
    endings = tuple(f".{kind}" for kind in kinds)
    places = {uri: os.path.split(uri) for uri in uris if endings and tars.split(uri) is None}
    names = {folder for folder, _ in places.values()}
    buckets = sorted(filter(remote.is_remote, names))
    with ThreadPoolExecutor(remote.AT_ONCE) as pool:  # a store answers late, but many at once
        answers = pool.map(lambda folder: _text_files(folder, endings), buckets)
        folders = dict(zip(buckets, answers, strict=True))
    folders |= {name: _text_files(name, endings) for name in names if name not in folders}
    for uri, (folder, name) in places.items():
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


def read_sidecar(uri: str | Path) -> list[Caption]:
    """Captions of one sidecar file; raises `ValueError` with what is wrong with it."""
    try:
        with fetch.local(str(uri), max_bytes=LARGEST) as path, path.open("rb") as file:
            data = file.read(LARGEST + 1)
    except MediaError as error:
        raise ValueError(error.reason) from error
    return read_text(os.path.splitext(uri)[1].lower(), data)[0]  # noqa: PTH122


def read_text(kind: str, data: bytes) -> tuple[list[Caption], dict[str, str]]:
    """Captions of a sidecar of this suffix, and what else a JSON object says, as text.

    Raises `ValueError` with what is wrong with it.
    """
    if len(data) > LARGEST:
        raise ValueError(f"larger than {LARGEST} bytes")
    text = data.decode("utf-8-sig")
    if kind == ".json":
        try:
            value = json.loads(text)
            captions = _from_json(value)
        except RecursionError as error:
            raise ValueError("nested too deeply") from error
        others = value.items() if isinstance(value, dict) else ()
        found = {tables.clean(key): tables.as_text(v) for key, v in others if key not in NOT_META}
        return captions, {key: text for key, text in found.items() if text}
    if kind == ".vtt":
        return _from_vtt(text), {}
    return [Caption(text.strip())] if text.strip() else [], {}


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
        return [Caption(tables.clean(value.strip()))] if value.strip() else []
    if isinstance(value, list):
        return [caption for item in value for caption in _from_json(item)]
    if not isinstance(value, dict):
        raise ValueError("expected a text, a list or an object with captions")
    found: list[Caption] = []
    for key in ("caption", "text", "captions"):
        inner = value.get(key)
        if isinstance(inner, str) and inner.strip():
            start, end = _seconds(value.get("start_s")), _seconds(value.get("end_s"))
            style, lang = value.get("style"), value.get("lang")
            found.append(
                Caption(
                    tables.clean(inner.strip()),
                    (tables.as_text(style) if style else None) or "sidecar",
                    tables.as_text(lang) if lang else None,
                    start,
                    end,
                )
            )
        elif inner is not None and not isinstance(inner, str):
            found += _from_json(inner)
    return found


def _seconds(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # a whole number of some hundred digits
        return None


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
        words = html.unescape(re.sub(r"<[^<>]*>", "", " ".join(lines[at + 1 :]))).strip()
        if len(times) == 2 and words:
            start, end = (
                int(h or 0) * 3600 + int(m) * 60 + int(s) + int(ms) / 1000 for h, m, s, ms in times
            )
            cues.append(Caption(words, "subtitle", None, start, end))
    return cues


def _text_files(folder: str, endings: tuple[str, ...]) -> dict[str, tuple[str, int, int | str]]:
    files: dict[str, tuple[str, int, int | str]] = {}
    if remote.is_remote(folder):
        for found in remote.folder(folder):
            if found.uri.endswith(endings):
                name = found.uri.rpartition("/")[2]
                files[name] = (found.uri, found.size, found.etag or found.mtime_ns)
        return files
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.endswith(endings) and entry.is_file():
                    status = entry.stat()
                    files[entry.name] = (entry.path, status.st_size, status.st_mtime_ns)
    except OSError:
        pass  # the sources in it are quarantined for the same reason
    return files
