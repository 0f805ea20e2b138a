"""From what the user typed to a sorted list of sources, and what came along with them.

    clips/            a folder: searched for names that look like media, and for tars
    "shots/**/*.mp4"  a glob; a file that is named outright is taken whatever it is called
    list.txt t.csv …  a table of media (see `tables`), by its suffix, when it is named outright
    x.tar             a WebDataset tar: a member is a source, called x.tar#name, and members of
                      the same key ending in .json, .txt, .cap, .caption or .vtt speak of it
    s3://bucket/key   an object, a prefix or a glob of an allowed scheme (see `remote`)

Whether a source can be read is found out later, and told in the quarantine table; so is a tar
that breaks off, or a row whose file is missing. Nothing is opened here but tables, tars (their
headers and captions) and local bytes of equal size, which are hashed to find copies: copies
collapse to one source with `copies`, so that no picture is curated twice. Objects of a bucket
are not fetched for that; of two with equal bytes, the clips are found to be the same later.
"""

from __future__ import annotations

import glob
import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

from unimodal.pipeline import fetch, remote, tables, tars
from unimodal.pipeline.caption import Given, from_row, read_text
from unimodal.pipeline.errors import MediaError, UsageError
from unimodal.pipeline.processors import processors
from unimodal.pipeline.source import Source

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
"""Names that a search through a folder, a bucket or a tar picks up."""

OURS = ".frames.tar"
"""Pictures of a run of ours; a search does not mistake them for inputs."""

TEXTS = (".json", ".txt", ".cap", ".caption", ".vtt")
"""Members of a tar that speak of the media with the same key, by precedence."""


@dataclass(frozen=True)
class Listing:
    """What the inputs name."""

    sources: list[Source]  # sorted by uri
    given: Given  # captions and columns that tables and tars brought along


def list_inputs(
    inputs: Sequence[str | Path],
    *,
    limit: int | None = None,
    fraction: float | None = None,
    known: Sequence[Source] = (),
    verify: bool = False,
) -> Listing:
    """The sources that `inputs` name, sorted by uri, copies collapsed into the first of them.

    A path that exists is taken literally; otherwise it is a glob (`**` crosses folders).
    `fraction` (0 to 1) takes that share of the sources: which ones follows from their uris alone,
    so a larger share holds the smaller one. `limit` then takes the first so many. Of copies, one
    that is in `known` (an earlier run's sources) stays the first, and digests in `known` are not
    computed again, unless `verify` asks for the digest of every source's bytes as they are now
    (None for one that cannot be read).

    Raises `UsageError` for a path that does not exist, a glob without matches, a folder or tar
    without media, an address of another scheme, and a table that is not in order.
    """
    if not inputs:
        raise UsageError("no input: name a file, a folder, a glob, a table, a tar or s3://…")
    if fraction is not None and not 0 < fraction <= 1:
        raise UsageError(f"a sample of {fraction:%}: take more than 0% and at most 100%")
    found = _Found(fraction)
    for item in inputs:
        _expand(str(item), found)
    sources = list(islice(found.sources(), limit))
    if not sources and found.passed_over:
        raise UsageError(f"a sample of {fraction:%} holds no source: take a larger one")
    if not sources:
        raise UsageError(f"{', '.join(map(str, inputs))}: no images or videos in any tar of it")
    if verify:
        with ThreadPoolExecutor(processors()) as pool:
            digests = pool.map(_digest, sources)
            sources = [replace(s, sha256=d) for s, d in zip(sources, digests, strict=True)]
    sources = _collapse(sources, known)
    given = found.given
    if limit is not None:
        names = {uri for source in sources for uri in (source.uri, *source.aliases)}
        given = Given(
            {uri: said for uri, said in given.captions.items() if uri in names},
            {uri: columns for uri, columns in given.meta.items() if uri in names},
            given.sick,
        )
    return Listing(sources, given)


def list_sources(
    inputs: Sequence[str | Path],
    limit: int | None = None,
    known: Sequence[Source] = (),
) -> list[Source]:
    """The sources alone; arguments and errors are those of `list_inputs`."""
    return list_inputs(inputs, limit=limit, known=known).sources


def sha256_of(path: str | Path, tick: Callable[[int], None] | None = None) -> str:
    """Hex digest of a file's bytes; `tick` is told how many bytes were read at each step."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            if tick is not None:
                tick(len(block))
    return digest.hexdigest()


@dataclass
class _Found:
    """What the inputs have named so far."""

    fraction: float | None
    entries: dict[str, Source | None] = field(default_factory=dict)  # files and objects
    tars: dict[str, set[str] | None] = field(default_factory=dict)  # members asked for; None: all
    given: Given = field(default_factory=Given)
    passed_over: bool = False  # the sample left something out

    def add(self, uri: str, entry: Source | None = None) -> None:
        """Note a file, an object, a tar or a member of one."""
        if (member := tars.split(uri)) is not None:
            names = self.tars.setdefault(member[0], set())
            if names is not None:
                names.add(member[1])
        elif tars.is_tar(uri):
            self.tars[uri] = None
        elif self.chosen(uri):
            self.entries[uri] = entry or self.entries.get(uri)

    def chosen(self, uri: str) -> bool:
        """Whether the sample holds this source."""
        if self.fraction is None:
            return True
        digest = hashlib.blake2b(uri.encode("utf-8", "backslashreplace"), digest_size=8).digest()
        inside = int.from_bytes(digest, "big") < self.fraction * 2**64
        self.passed_over |= not inside
        return inside

    def sources(self) -> Iterator[Source]:
        """All sources, by uri (a tar's where the tar stands); tars are opened as they come."""
        uris = sorted([*self.entries, *self.tars])
        for start in range(0, len(uris), 1024):
            some = uris[start : start + 1024]
            # Objects that a table names were not listed: they are asked after, many at a time.
            asked = [u for u in some if self.entries.get(u, 0) is None and remote.is_remote(u)]
            answers = dict(zip(asked, remote.stat_many(asked), strict=True)) if asked else {}
            for uri in some:
                if uri in self.tars:
                    yield from self._members(uri, self.tars[uri])
                elif remote.is_remote(uri):
                    yield self.entries[uri] or answers[uri] or Source(uri, 0, 0)
                else:
                    yield _stat(uri)

    def _members(self, tar: str, names: set[str] | None) -> Iterator[Source]:
        """Media in a tar; and the tar itself if not all of it can be read."""
        try:
            with tars.opened(tar) as file:
                index = tars.read_index(file, TEXTS)
        except (MediaError, OSError):  # the reason is found again when it is read
            yield Source(tar, 0, 0) if remote.is_remote(tar) else _stat(tar)
            return
        members = index.members
        texts: dict[str, list[str]] = defaultdict(list)
        for name in members:
            if name.lower().endswith(TEXTS):
                texts[_stem(name)].append(name)
        for name in sorted(filter(_is_media, members) if names is None else names):
            uri = f"{tar}#{name}"
            if not self.chosen(uri):
                continue
            beside = {t for key in (name, _stem(name), _key(name)) for t in texts.get(key, ())}
            for text in sorted(beside, key=lambda text: (TEXTS.index(_suffix(text)), text)):
                self._hear(uri, f"{tar}#{text}", index.texts.get(text))
            member = members.get(name) or tars.Member(name, 0, 0, "it is not in the tar")
            yield Source(
                uri, member.size, file.mtime_ns, etag=fetch.member_etag(member, file.stamp)
            )
        if index.trouble:
            etag = file.stamp if remote.is_remote(tar) else None
            yield Source(tar, file.size, file.mtime_ns, etag=etag)

    def _hear(self, uri: str, text: str, data: bytes | None) -> None:
        """Take captions and columns of `uri` from the member `text` that speaks of it."""
        try:
            if data is None:
                raise ValueError(f"larger than {tars.LARGEST_TEXT} bytes, or no plain file")
            self.given.add(uri, *read_text(_suffix(text), data))
        except ValueError as error:
            self.given.sick[text] = str(error)


def _expand(item: str, found: _Found) -> None:
    """Note all that one input names."""
    named: list[tuple[str, Source | None]] = []  # taken whatever it is called
    below: list[tuple[str, Source | None]] = []  # what lies in a folder, by its name
    nothing = "no such file or folder"
    if remote.is_remote(item):
        nothing = "no such object or bucket, or no images or videos in it"
        if tars.split(item) is not None:
            named = [(remote.canonical(item), None)]
        else:
            hits, inside = remote.look(item)
            named = [(entry.uri, entry) for entry in hits]
            below = [(entry.uri, entry) for path, entry in inside if _is_wanted(path)]
    elif os.path.isdir(item):  # noqa: PTH112
        nothing = "no images or videos in this folder"
        below = [(path, None) for path in _walk(item)]
    elif os.path.lexists(item) or tars.split(item) is not None:
        named = [(tables.absolute(item, None), None)]
    elif glob.has_magic(item):
        nothing = "nothing matches this pattern"
        matches = glob.glob(item, recursive=True)  # noqa: PTH207 - the pattern may be absolute
        files = [match for match in matches if not os.path.isdir(match)]  # noqa: PTH112
        named = [(os.path.abspath(file), None) for file in files]  # noqa: PTH100
        # A pattern that names folders only ("videos/*/") means what is in them.
        below = [(path, None) for folder in ([] if files else matches) for path in _walk(folder)]
    if not named and not below:
        remote.refuse_other_schemes(item)
        raise UsageError(f"{item}: {nothing}")
    for uri, entry in named:
        # "data/*" names a.txt beside a.png too: only a pattern of tables names tables.
        if tables.is_table(item):
            _read_table(uri, found)
        else:
            found.add(uri, entry)
    for uri, entry in below:
        found.add(uri, entry)


def _read_table(table: str, found: _Found) -> None:
    rows = lost = 0
    first = None
    with fetch.local(table) as path:
        for row in tables.read_rows(path, table):
            rows += 1
            first = first or row
            uri = tables.absolute(row.path, os.path.dirname(table))  # noqa: PTH120
            gone = not remote.is_remote(uri) and tars.split(uri) is None
            gone = gone and not os.path.lexists(uri)
            if gone or "://" in row.path:
                remote.refuse_other_schemes(row.path, f"{row.where}: ")
            lost += gone
            found.add(uri)
            if (row.texts or row.meta) and found.chosen(uri):
                found.given.add(uri, from_row(row), row.meta)
    if first is None:
        raise UsageError(f"{table}: no path in this table")
    if lost == rows:  # a few are quarantined; all are a mistake
        raise UsageError(
            f"{first.where}: no such file: {first.path!r:.200}, nor any other path in this table. "
            "Paths are looked for in the table's folder, then in the working directory"
        )


def _walk(folder: str) -> Iterator[str]:
    """Paths of media and tars in a folder; links to folders are not followed.

    Names come from scandir and are not looked at here: 100,000 files are listed and stat'd in
    1.4 s of processor time.
    """
    waiting = [os.path.abspath(folder)]  # noqa: PTH100 - not resolve(): a link keeps its name
    while waiting:
        here = waiting.pop()
        try:
            with os.scandir(here) as listed:
                for entry in listed:
                    name = entry.name
                    if name.startswith("."):
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
                    elif _is_wanted(name) and not (
                        entry.is_symlink() and os.path.isdir(entry.path)  # noqa: PTH112
                    ):
                        yield entry.path
        except OSError:
            yield here  # quarantined: "not a regular file"


def _stat(path: str) -> Source:
    # A name that is not UTF-8 cannot stand in a table; escaped, it is quarantined when it is read.
    path = path.encode("utf-8", "backslashreplace").decode()
    try:
        status = os.stat(path)  # noqa: PTH116 - a million times
    except OSError:
        return Source(path, 0, 0)  # a dangling link: quarantined too
    return Source(path, status.st_size, status.st_mtime_ns)


def _digest(source: Source) -> str | None:
    try:
        # What has no bytes may be a pipe, which would wait for some.
        return fetch.sha256(source) if source.size else None
    except (MediaError, OSError):
        return None  # quarantined when it is read


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
            digest = source.sha256 or seen.get(source.identity)
            if digest is None and not remote.is_remote(source.uri):
                digest = _digest(source)
            if digest is None:
                kept.append(source)
            else:
                copies[digest].append(replace(source, sha256=digest))
        for same in copies.values():
            first = next((s for s in same if s.identity in firsts), same[0])
            kept.append(replace(first, copies=tuple(s for s in same if s is not first)))
    return sorted(kept)


def _is_wanted(name: str) -> bool:
    """Whether a search picks up this name (a path below the folder searched)."""
    if any(part.startswith(".") for part in name.split("/")):
        return False
    return _is_media(name) or (tars.is_tar(name) and not name.endswith(OURS))


def _is_media(name: str) -> bool:
    base = name.rpartition("/")[2]
    return not base.startswith(".") and _suffix(base) in MEDIA_SUFFIXES


def _suffix(name: str) -> str:
    return name[dot:].lower() if (dot := name.rfind(".")) >= 0 else ""


def _stem(name: str) -> str:
    return os.path.splitext(name)[0]  # noqa: PTH122


def _key(name: str) -> str:
    """A member's key as WebDataset has it: up to the first dot of its last part."""
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]
