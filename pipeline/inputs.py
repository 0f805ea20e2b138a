"""From what the user typed to a sorted list of sources: files, folders and globs.

A folder is searched for names that look like media; a file that is named outright is taken
whatever it is called, and whether it can be read is found out later. Nothing is opened here
except files of equal size, which are hashed to find copies: copies collapse to one source with
`copies`, so that no picture is curated twice.
"""

from __future__ import annotations

import glob
import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from unimodal.pipeline.errors import UsageError

MEDIA_SUFFIXES = frozenset(
    f".{suffix}"
    for suffix in (
        *("mp4", "m4v", "mov", "mkv", "webm", "avi", "mpg", "mpeg", "m2v", "vob", "ts", "m2ts"),
        *("mts", "flv", "wmv", "asf", "ogv", "ogg", "3gp", "mxf", "y4m", "ivf", "h264", "h265"),
        *("hevc", "dv", "rm", "rmvb"),
        *("png", "apng", "jpg", "jpeg", "jpe", "jfif", "webp", "gif", "bmp", "tif", "tiff"),
        *("ppm", "pgm", "pbm", "pnm", "jp2", "avif"),
    )
)
"""Names that a search through a folder picks up."""


@dataclass(frozen=True, order=True)
class Source:
    """One file, as it was when it was listed."""

    uri: str
    size: int
    mtime_ns: int
    sha256: str | None = None  # known only where another file has the same size
    copies: tuple[Source, ...] = ()  # other paths with the same bytes

    @property
    def aliases(self) -> tuple[str, ...]:
        """The other paths with the same bytes."""
        return tuple(copy.uri for copy in self.copies)

    @property
    def identity(self) -> tuple[str, int, int]:
        """What must be unchanged for earlier work to count: path, size, modification time."""
        return (self.uri, self.size, self.mtime_ns)


def list_sources(
    inputs: Sequence[str | Path],
    limit: int | None = None,
    known: Sequence[Source] = (),
) -> list[Source]:
    """The sources that `inputs` name, sorted by path, copies collapsed into the first of them.

    A path that exists is taken literally; otherwise it is a glob (`**` crosses folders). With
    `limit`, the first so many. Of copies, one that is in `known` (an earlier run's sources) stays
    the first, and digests in `known` are not computed again. Raises `UsageError` for a path that
    does not exist, a glob without matches, and a folder without media.
    """
    if not inputs:
        raise UsageError("no input: name a file, a folder or a glob")
    paths: set[str] = set()
    for item in inputs:
        # Not resolve(): a link keeps the name that the user knows, and its sidecar captions.
        paths.update(os.path.abspath(found) for found in _expand(str(item)))  # noqa: PTH100
    sources = [_stat(path) for path in sorted(paths)[:limit]]
    return _collapse(sources, known)


def sha256_of(path: str | Path, tick: Callable[[int], None] | None = None) -> str:
    """Hex digest of a file's bytes; `tick` is told how many bytes were read at each step."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            if tick is not None:
                tick(len(block))
    return digest.hexdigest()


def _expand(item: str) -> Iterator[str]:
    path = Path(item)
    if path.is_dir():
        found = list(_walk(path))
        if not found:
            raise UsageError(f"{item}: no images or videos in this folder")
        yield from found
    elif os.path.lexists(item):
        yield item
    elif glob.has_magic(item):
        matches = glob.glob(item, recursive=True)  # noqa: PTH207 - the pattern may be absolute
        files = [m for m in matches if not Path(m).is_dir()]
        # A pattern that names folders only ("videos/*/") means what is in them.
        for folder in [] if files else matches:
            files += _walk(Path(folder))
        if not files:
            raise UsageError(f"{item}: nothing matches this pattern")
        yield from files
    else:
        raise UsageError(f"{item}: no such file or folder")


def _walk(folder: Path) -> Iterator[str]:
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for name in names:
            if not name.startswith(".") and Path(name).suffix.lower() in MEDIA_SUFFIXES:
                yield os.path.join(root, name)  # noqa: PTH118 - a million times cheaper as text


def _stat(path: str) -> Source:
    # A name that is not UTF-8 cannot stand in a table; escaped, it is quarantined when it is read.
    path = path.encode("utf-8", "backslashreplace").decode()
    try:
        status = Path(path).stat()
    except OSError:
        return Source(path, 0, 0)  # a dangling link: quarantined too
    return Source(path, status.st_size, status.st_mtime_ns)


def _collapse(sources: list[Source], known: Sequence[Source]) -> list[Source]:
    firsts = {source.identity: source.sha256 for source in known}
    seen = firsts | {copy.identity: copy.sha256 for source in known for copy in source.copies}
    by_size: dict[int, list[Source]] = defaultdict(list)
    for source in sources:
        by_size[source.size].append(source)
    kept: list[Source] = []
    for size, group in by_size.items():
        if len(group) == 1 or size == 0:
            kept += group
            continue
        copies: dict[str, list[Source]] = defaultdict(list)
        for source in group:
            try:
                digest = seen.get(source.identity) or sha256_of(source.uri)
            except OSError:
                kept.append(source)
                continue
            copies[digest].append(replace(source, sha256=digest))
        for same in copies.values():
            first = next((s for s in same if s.identity in firsts), same[0])
            kept.append(replace(first, copies=tuple(s for s in same if s is not first)))
    return sorted(kept)
