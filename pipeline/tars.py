"""What a tar holds and where: names, offsets and sizes, from its headers alone.

A member is addressed as `/data/x.tar#name` and read as a span of the tar's bytes. Nothing is
unpacked, so a name is never a path. Python's tarfile is not used for tars that nobody vouches
for: it reads extended headers of any size into memory, stops without a word at a broken header,
and some releases loop forever on a negative size.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from unimodal.pipeline import remote
from unimodal.pipeline.errors import MediaError

BLOCK = 512
LARGEST_HEADER = 1 << 20  # bytes of a long name or of extended attributes
LARGEST_TEXT = 1 << 20  # bytes of a caption; a megabyte of it is a mistake

_MARK = re.compile(r"\.tar#", re.IGNORECASE)
_ASCII = bytes(range(128))
_KINDS = {b"1": "a link", b"2": "a link", b"3": "a device", b"4": "a device", b"6": "a pipe"}


@dataclass(frozen=True)
class Member:
    """One file in a tar."""

    name: str
    offset: int  # of its bytes
    size: int
    problem: str = ""  # why it cannot be read: it is a link, a device, …


@dataclass
class Index:
    """The files of a tar."""

    members: dict[str, Member] = field(default_factory=dict)  # of equal names, the last
    texts: dict[str, bytes] = field(default_factory=dict)  # contents of the small ones asked for
    trouble: str = ""  # why what comes after them cannot be read


@dataclass(frozen=True)
class Tar:
    """An opened tar: where its bytes are, and what tells whether it has changed."""

    read: Callable[[int, int], bytes]  # offset, number of bytes
    size: int
    mtime_ns: int
    stamp: str  # size or etag


def split(uri: str) -> tuple[str, str] | None:
    """The tar and the member's name that a uri names; None if it names no member.

    A path names one only if what stands before `.tar#` is a file.
    """
    for mark in _MARK.finditer(uri):
        tar, name = uri[: mark.end() - 1], uri[mark.end() :]
        if name and (remote.is_remote(uri) or os.path.isfile(tar)):  # noqa: PTH113
            return tar, name
    return None


def is_tar(name: str) -> bool:
    """Whether this is called a tar (and no member of one)."""
    return name.lower().endswith(".tar")


@contextmanager
def opened(uri: str) -> Iterator[Tar]:
    """Open a tar, local or remote; raises `MediaError`."""
    if remote.is_remote(uri):
        entry = remote.stat(uri)
        with remote.opened(uri) as file:

            def ahead(offset: int, count: int) -> bytes:
                def again() -> bytes:
                    file.seek(offset)
                    return file.read(count)

                return remote.patiently(again)

            yield Tar(ahead, entry.size, entry.mtime_ns, entry.etag or str(entry.size))
        return
    try:
        if not stat.S_ISREG(os.stat(uri).st_mode):  # noqa: PTH116 - opening a pipe would wait
            raise MediaError("not a regular file", uri)
        descriptor = os.open(uri, os.O_RDONLY)
    except OSError as error:
        raise MediaError(f"cannot be opened ({error.strerror})", uri) from error
    try:
        status = os.fstat(descriptor)

        def at(offset: int, count: int) -> bytes:
            return os.pread(descriptor, count, offset)

        yield Tar(at, status.st_size, status.st_mtime_ns, str(status.st_size))
    finally:
        os.close(descriptor)


def read_index(tar: Tar, texts: Collection[str] = ()) -> Index:
    """Walk the headers of a tar: ustar, GNU and pax formats.

    Contents of small members are kept whose names end in one of `texts` (".txt"). Raises
    nothing about a broken tar: the index holds what comes before, and the trouble.
    """
    index = Index()
    wanted = tuple(texts)
    offset = 0
    long_name: bytes | None = None
    attributes: dict[bytes, bytes] = {}

    def stop(why: str) -> Index:
        count = len(index.members)
        index.trouble = f"not a tar that can be read ({why} at byte {offset})"
        if count:
            index.trouble = f"a broken tar: {why} at byte {offset}, after {count} files"
        return index

    while True:
        head = tar.read(offset, BLOCK)
        if head.count(0) == BLOCK:
            return index
        if len(head) < BLOCK:
            return stop("it breaks off" if head or offset != tar.size else "it has no end mark")
        size = _number(head[124:136])
        if size is None or _number(head[148:156]) not in _checksums(head):
            return stop("no header")
        kind = head[156:157]
        if kind in (b"x", b"X", b"L", b"K", b"g"):
            if size > LARGEST_HEADER:
                return stop(f"a header of {size} bytes")
            body = tar.read(offset + BLOCK, size)
            if len(body) < size:
                return stop("it breaks off")
            if kind == b"L":
                long_name = body.split(b"\0", 1)[0]
            elif kind in (b"x", b"X"):
                attributes = _attributes(body)
            offset += BLOCK + _padded(size)
            continue
        if (given := attributes.get(b"size")) is not None:
            if not given.isdigit() or len(given) > 18:
                return stop("a size that is no number")
            size = int(given)
        name = _name(head, long_name, attributes)
        sparse = kind == b"S" or any(key.startswith(b"GNU.sparse.") for key in attributes)
        long_name, attributes = None, {}
        begins = offset + BLOCK
        more = kind == b"S" and head[482]
        while more:  # the map of an old sparse file goes on in blocks of its own
            block = tar.read(begins, BLOCK)
            begins += BLOCK
            more = len(block) == BLOCK and block[504]
        plain = kind in (b"0", b"\0", b"7") and not sparse
        # Links, devices and pipes have no bytes, whatever their header says of them.
        extent = 0 if kind in _KINDS else size
        if begins + extent > tar.size:
            return stop(f"it breaks off within {name}")
        if not name or name.endswith("/"):
            pass  # a folder, as the oldest tars have them
        elif plain:
            index.members[name] = Member(name, begins, size)
            if size <= LARGEST_TEXT and name.lower().endswith(wanted):
                index.texts[name] = tar.read(begins, size)
        elif kind != b"5":
            what = "a sparse file" if sparse else _KINDS.get(kind, "a file of an unknown kind")
            index.members[name] = Member(name, begins, 0, f"{what} in the tar, not a plain file")
        offset = begins + _padded(extent)


def _number(digits: bytes) -> int | None:
    """A header's number: octal text, or binary where its first bit is set; None if neither."""
    if digits[0] == 0x80:
        return int.from_bytes(digits[1:], "big")
    if digits[0] & 0x80:
        return None  # negative, which no size is
    text = digits.split(b"\0", 1)[0].strip() or b"0"
    try:
        return int(text, 8) if text.isdigit() else None
    except ValueError:
        return None


def _checksums(head: bytes) -> tuple[int, int]:
    """Sum of the header's bytes, unsigned as the standard has it, and signed as old tools do."""
    others = head[:148] + b" " * 8 + head[156:]
    total = sum(others)
    return total, total - 256 * len(others.translate(None, _ASCII))


def _attributes(body: bytes) -> dict[bytes, bytes]:
    """Records "<length> <key>=<value>\\n" of an extended header; what follows a bad one is lost."""
    found = {}
    while body:
        digits, space, _ = body.partition(b" ")
        if not space or not digits.isdigit() or not len(digits) < int(digits) <= len(body):
            break
        key, _, value = body[len(digits) + 1 : int(digits) - 1].partition(b"=")
        found[key] = value
        body = body[int(digits) :]
    return found


def _name(head: bytes, long_name: bytes | None, attributes: dict[bytes, bytes]) -> str:
    raw = head[:100].split(b"\0", 1)[0]
    prefix = head[345:500].split(b"\0", 1)[0]
    if head[257:263] == b"ustar\0" and prefix:
        raw = prefix + b"/" + raw
    raw = attributes.get(b"path", raw if long_name is None else long_name)
    # A name that is not UTF-8 cannot stand in a table: escaped, it can, and still is a name.
    return raw.decode("utf-8", "backslashreplace")


def _padded(size: int) -> int:
    return (size + BLOCK - 1) // BLOCK * BLOCK
