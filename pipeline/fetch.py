"""Any source as a file that can be opened: a path stays, the rest comes into a temporary file.

    with local("s3://bucket/a.mp4") as path: …        with local("/data/x.tar#a.jpg") as path: …

The temporary file has no name in any folder where the system allows it, so it is gone when the
process is, however that ends. It lies where Python's tempfile puts it: set TMPDIR to move it.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

from unimodal.pipeline import remote, tars
from unimodal.pipeline.errors import MediaError
from unimodal.pipeline.source import Source

LARGEST = 64 << 30
"""Bytes of a temporary copy: an hour of camera footage, and no disk full of one object."""

CHANGED = "it has changed since it was listed: run curate again"

STEP = 8 << 20  # bytes that are asked for at a time

Tick = Callable[[int], None]


@contextmanager
def local(
    uri: str,
    *,
    max_bytes: int = LARGEST,
    tick: Tick | None = None,
    listed: Source | None = None,
    keep: bool = False,
) -> Iterator[Path]:
    """A path at which the bytes of `uri` can be read while the block lasts.

    A local file is its own path. A tar's member or a remote object is copied, its name trusted
    for nothing; `tick` is told of every step's bytes. `listed` is the source as it was listed:
    it must not have changed since. With `keep`, the last copy stays until another is kept, so
    that the clips of one video fetch it once. Raises `MediaError` with the reason.
    """
    where = tars.split(uri)
    if where is None and not remote.is_remote(uri):
        if listed is not None:
            _check_path(listed)
        if tars.is_tar(uri):
            raise MediaError(_tar_trouble(uri), uri)
        yield Path(uri)
        return
    try:
        if where is None and tars.is_tar(uri):
            raise MediaError(_tar_trouble(uri))
        span = _object(uri, listed, tick) if where is None else _member(*where, listed)
        if span.size > max_bytes:
            raise MediaError(f"{span.size} bytes are over the limit of {max_bytes}")
        copy = _KEPT.take(span, tick, keep)
        try:
            yield copy.path
        finally:
            _KEPT.give(copy)
    except MediaError as error:  # its path, if it has one, would be the copy's
        raise MediaError(error.reason, uri) from error


def sha256(source: Source) -> str:
    """Hex digest of a source's bytes, which are not copied for it.

    Raises `MediaError` if it is gone or changed since it was listed, `OSError` if it cannot be
    read.
    """
    where = tars.split(source.uri)
    if where is not None:
        span = _member(*where, source)
    elif remote.is_remote(source.uri):
        span = _object(source.uri, source, None)
    else:
        _check_path(source)
        span = _Span(source.uri, 0, source.size, ())
    digest = hashlib.sha256()
    for block in _blocks(span, None):
        digest.update(block)
    return digest.hexdigest()


def member_etag(member: tars.Member, stamp: str) -> str:
    """A tar member's tag: where it lies in its tar, and the tar's own stamp."""
    return f"{'' if member.problem else member.offset}@{stamp}"


@dataclass(frozen=True)
class _Span:
    """Bytes start <= i < start + size of a file or object."""

    base: str
    start: int
    size: int
    stamp: tuple[object, ...]  # changes when the base does


@dataclass
class _Copy:
    span: _Span
    file: IO[bytes]
    path: Path
    users: int = 1


class _Kept:
    """The last copy that was kept, and how many read it."""

    def __init__(self) -> None:
        self._last: _Copy | None = None
        self._lock = threading.Lock()

    def take(self, span: _Span, tick: Tick | None, keep: bool) -> _Copy:
        with self._lock:
            if self._last is not None and self._last.span == span:
                self._last.users += 1
                return self._last
        copy = _copy(span, tick)
        if keep:
            with self._lock:
                previous, self._last = self._last, copy
                if previous is not None and not previous.users:
                    previous.file.close()
        return copy

    def give(self, copy: _Copy) -> None:
        with self._lock:
            copy.users -= 1
            if not copy.users and copy is not self._last:
                copy.file.close()


_KEPT = _Kept()


def _copy(span: _Span, tick: Tick | None) -> _Copy:
    file: Any = tempfile.TemporaryFile()  # noqa: SIM115 - closed by the last who reads it
    try:
        path = Path(f"/proc/self/fd/{file.fileno()}")
        if not path.exists():  # no Linux: the file needs a name to be opened by
            file.close()
            file = tempfile.NamedTemporaryFile()  # noqa: SIM115
            path = Path(file.name)
        for block in _blocks(span, tick):
            file.write(block)
            if tick is not None:
                tick(len(block))
        file.flush()
    except BaseException:
        file.close()
        raise
    return _Copy(span, file, path)


def _blocks(span: _Span, tick: Tick | None) -> Iterator[bytes]:
    steps = range(span.start, span.start + span.size, STEP)
    end = span.start + span.size
    if not remote.is_remote(span.base):
        with Path(span.base).open("rb") as file:
            file.seek(span.start)
            for start in steps:
                block = file.read(min(STEP, end - start))
                if len(block) < min(STEP, end - start):
                    raise MediaError(CHANGED)
                yield block
        return
    for start in steps:
        yield remote.read(span.base, start, min(start + STEP, end), tick)
    # A large object may be written anew while its parts are read: they must be of one piece.
    if len(steps) > 1 and _stamp(span.base) != span.stamp:
        raise MediaError("it changed while it was read: run the same command again")


def _object(uri: str, listed: Source | None, tick: Tick | None) -> _Span:
    entry = remote.stat(uri, tick)
    if listed is not None and entry.identity != listed.identity:
        raise MediaError(CHANGED)
    return _Span(uri, 0, entry.size, (entry.mtime_ns, entry.etag or str(entry.size)))


def _member(tar: str, name: str, listed: Source | None) -> _Span:
    stamp = _stamp(tar)
    if listed is not None:
        # A member is as old as its tar, and its tag says where it lies in it.
        place, _, tag = (listed.etag or "").partition("@")
        if stamp != (listed.mtime_ns, tag):
            raise MediaError(CHANGED)
        if place:
            return _Span(tar, int(place), listed.size, stamp)
    index = _index(tar, stamp)
    member = index.members.get(name)
    if member is None:
        raise MediaError(index.trouble or "the tar has no member of this name")
    if member.problem:
        raise MediaError(member.problem)
    return _Span(tar, member.offset, member.size, stamp)


def _check_path(listed: Source) -> None:
    try:
        status = os.stat(listed.uri)  # noqa: PTH116
    except FileNotFoundError as error:
        raise MediaError("no such file") from error
    if (status.st_size, status.st_mtime_ns) != (listed.size, listed.mtime_ns):
        raise MediaError(CHANGED)


def _stamp(base: str) -> tuple[int, str]:
    """Modification time and size or etag of a tar or object; raises `MediaError`."""
    if remote.is_remote(base):
        entry = remote.stat(base)
        return entry.mtime_ns, entry.etag or str(entry.size)
    try:
        status = os.stat(base)  # noqa: PTH116
    except OSError as error:
        raise MediaError(f"its tar cannot be opened ({error.strerror})") from error
    return status.st_mtime_ns, str(status.st_size)


@lru_cache(maxsize=4)
def _index(tar: str, stamp: tuple[int, str]) -> tars.Index:
    with tars.opened(tar) as file:
        return tars.read_index(file)


def _tar_trouble(tar: str) -> str:
    """Why a tar itself, not a member of it, is among the sources."""
    trouble = _index(tar, _stamp(tar)).trouble
    return trouble or "a tar that could not be opened before: run the same command again"
