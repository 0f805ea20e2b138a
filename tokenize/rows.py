"""Rows of files of texts and documents: where each begins, and its bytes.

    txt      a file, a paragraph or a line
    lines    an object a line
    array    the objects of one array of JSON

Files are read as streams: what is held is a row and a step.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from typing import IO

MAX_TEXT_BYTES = 1 << 20
"""A file or paragraph of .txt is cut behind this, at a line's end if there is one."""
MAX_ROW_BYTES = 64 << 20
STEP = 1 << 20  # bytes that are read at a time

_TOKENS = re.compile(rb'"(?:[^"\\]++|\\.)*+"|[\[\]{}"]', re.DOTALL)


def records(file: IO[bytes], form: str, by: str, depth: int) -> Iterator[tuple[int, int, bytes]]:
    """Where each row begins (byte; row or line from 1), and its bytes.

    `depth` is 1 in the middle of an array. Raises `ValueError` for an array that breaks off.
    """
    if form == "array":
        yield from _elements(file, depth)
    elif form == "lines":
        at, line = file.tell(), 0
        while data := file.readline(MAX_ROW_BYTES):
            line += 1
            begin, rest = at, data
            at += len(data)
            while len(rest) == MAX_ROW_BYTES and not rest.endswith(b"\n"):
                data = b"{\n"  # too long: it is told of as a row that is no JSON
                rest = file.readline(MAX_ROW_BYTES)
                at += len(rest)
            if data.strip():
                yield begin, line, data
    else:
        yield from _texts(file, by)


def _texts(file: IO[bytes], by: str) -> Iterator[tuple[int, int, bytes]]:
    """Documents of a .txt, of at most `MAX_TEXT_BYTES`."""
    at = begin = file.tell()
    number, held = 1, b""
    while data := file.readline(MAX_TEXT_BYTES):
        if len(data) == MAX_TEXT_BYTES and not data.endswith(b"\n"):
            data = data[: data.rfind(b" ") + 1 or _whole(data) or None]
            file.seek(at + len(data))
        blank = not data.strip() and by != "file"
        if held and (by == "line" or blank or len(held) + len(data) > MAX_TEXT_BYTES):
            yield begin, number, held
            number, held = number + 1, b""
        if not blank:
            begin, held = begin if held else at, held + data
        at += len(data)
    if held.strip():
        yield begin, number, held


def _whole(data: bytes) -> int:
    """Bytes of `data` without a character of UTF-8 that is cut at its end."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(data[-4:])
    return len(data) - len(decoder.getstate()[0])


def _elements(file: IO[bytes], depth: int) -> Iterator[tuple[int, int, bytes]]:
    """Objects of an array of JSON, found by their brackets alone."""
    buffer, base, at, number, whole = b"", file.tell(), 0, 0, not depth
    begin: int | None = None
    while chunk := file.read(STEP):
        buffer += chunk
        for match in _TOKENS.finditer(buffer, at):
            token, at = match[0], match.end()
            if token == b'"':  # a string that goes on in the next chunk
                at = match.start()
                break
            if token in b"[{":
                if depth == 0 and token == b"{":
                    raise ValueError("its outermost value is no array")
                depth += 1
                if depth == 2:
                    begin = match.start()
            elif token in b"]}":
                depth -= 1
                if depth == 1 and begin is not None:
                    number += 1
                    yield base + begin, number, buffer[begin:at]
                    begin = None
        else:
            at = len(buffer)
        keep = at if begin is None else begin
        buffer, base, at = buffer[keep:], base + keep, at - keep
        begin = None if begin is None else 0
        if len(buffer) > MAX_ROW_BYTES:
            raise ValueError(f"row {number + 1} is over {MAX_ROW_BYTES >> 20} MiB")
    if begin is not None or (whole and depth):
        raise ValueError(f"its array breaks off in row {number + 1}: is the file whole?")
