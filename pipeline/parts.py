"""Parts: the unit of work, of resume and of distribution.

A part is a handful of sources, and its name is the hash of them (uri, size, modification time or
etag). A run that is repeated keeps the parts it has; new and changed files go into new ones. So
adding a video tomorrow costs one part, and finished work is found by name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa

from unimodal.pipeline.clips import read_parquet, table, write_parquet
from unimodal.pipeline.settings import Settings
from unimodal.pipeline.source import Source

SCHEMA = pa.schema(
    [
        pa.field("part", pa.string(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("size", pa.int64(), nullable=False),
        pa.field("mtime_ns", pa.int64(), nullable=False),
        pa.field("etag", pa.string()),
        pa.field("sha256", pa.string()),
        pa.field("alias_of", pa.string()),  # the source with the same bytes that is curated
        pa.field("members", pa.int32(), nullable=False),  # sources when the part was made
    ]
)


class PartSettings(Settings):
    """How sources are grouped. A smaller part is lost sooner and found later."""

    max_bytes: int = 32 << 20
    """Bytes of sources in a part, a few minutes of video; a larger source is a part of its own."""
    max_sources: int = 128
    """Sources in a part."""


@dataclass(frozen=True)
class Part:
    """A group of sources that is worked on together."""

    name: str
    sources: tuple[Source, ...]  # sorted; those of its members that are still among the inputs
    members: int  # sources it was made of, and named after


def group(sources: Sequence[Source], settings: PartSettings) -> list[Part]:
    """Group sorted sources by bytes and number; the same sources always give the same parts."""
    parts: list[Part] = []
    crowd: list[Source] = []
    held = 0
    for source in sorted(sources):
        if source.size >= settings.max_bytes:
            parts.append(_part([source]))  # one long video does not hide in a crowd
            continue
        if crowd and (
            held + source.size > settings.max_bytes or len(crowd) >= settings.max_sources
        ):
            parts.append(_part(crowd))
            crowd, held = [], 0
        crowd.append(source)
        held += source.size
    if crowd:
        parts.append(_part(crowd))
    return sorted(parts, key=lambda part: part.sources[0].uri)


def plan(
    sources: Sequence[Source],
    previous: Sequence[Part],
    committed: Callable[[str], bool],
    settings: PartSettings,
) -> list[Part]:
    """Parts for `sources`, keeping those of `previous` that still serve.

    A part whose sources are all unchanged is kept. One that has lost some is kept only if its
    work is done (`committed`): its rows are then filtered, not made again. Everything else is
    grouped anew, where parts that were done once and left out since are found again by name.
    """
    current = {source.identity: source for source in sources}
    kept = [part for part in group(sources, settings) if committed(part.name)]
    again = {source.identity for part in kept for source in part.sources}
    previous = [p for p in previous if not again & {source.identity for source in p.sources}]
    for part in previous:
        live = tuple(current[s.identity] for s in part.sources if s.identity in current)
        if live and (len(live) == part.members or committed(part.name)):
            kept.append(replace(part, sources=live))
    placed = {source.identity for part in kept for source in part.sources}
    fresh = [source for source in sources if source.identity not in placed]
    return sorted([*kept, *group(fresh, settings)], key=lambda part: part.sources[0].uri)


def digest(parts: Sequence[Part]) -> str:
    """Hash of the parts and of what lives in them, 16 hex digits."""
    lines = [
        [part.name, source.uri, *sorted(source.aliases)]
        for part in parts
        for source in part.sources
    ]
    return hashlib.sha256(json.dumps(sorted(lines)).encode()).hexdigest()[:16]


def write_parts(parts: Sequence[Part], path: Path) -> None:
    """Write parts.parquet: a row per source, copies included."""
    rows = [
        {
            **{name: getattr(item, name) for name in ("uri", "size", "mtime_ns", "etag", "sha256")},
            "part": part.name,
            "alias_of": None if item is source else source.uri,
            "members": part.members,
        }
        for part in parts
        for source in part.sources
        for item in (source, *source.copies)
    ]
    write_parquet(table(rows, SCHEMA), path)


def read_parts(path: Path) -> list[Part]:
    """What `write_parts` wrote; nothing if there is no such file."""
    if not path.exists():
        return []
    sources: dict[str, dict[str, Source]] = {}
    members: dict[str, int] = {}
    rows = read_parquet(path).to_pylist()
    for row in rows:
        source = Source(row["uri"], row["size"], row["mtime_ns"], row["sha256"], etag=row["etag"])
        mine = sources.setdefault(row["part"], {})
        members[row["part"]] = row["members"]
        if row["alias_of"] is None:
            mine[source.uri] = source
        else:
            first = mine[row["alias_of"]]
            mine[first.uri] = replace(first, copies=(*first.copies, source))
    return [Part(name, tuple(mine.values()), members[name]) for name, mine in sources.items()]


def _part(sources: Sequence[Source]) -> Part:
    text = json.dumps([source.identity for source in sources])
    name = hashlib.sha256(text.encode()).hexdigest()[:16]
    return Part(name, tuple(sources), len(sources))
