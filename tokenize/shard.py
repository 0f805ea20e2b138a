"""One shard: a tar of samples, and the Parquet index beside it.

    {key}.json  {key}.vision.npy  {key}.N.txt  {key}.vision.N.npy     members of a sample, in order

Equal samples give equal bytes: members carry no time and no owner. A reader never walks a tar: the
index says at which byte the codes of a sample lie. Nothing is unpickled.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import tarfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from unimodal.pipeline.clips import write_parquet
from unimodal.pipeline.files import atomic
from unimodal.tokenize.document import Image, Piece, Text, Video

CAPTION = pa.struct(
    [
        pa.field("style", pa.string()),
        pa.field("lang", pa.string()),
        pa.field("text", pa.string()),
        pa.field("tokens", pa.int32()),  # ids of `text` in the vocabulary of the manifest
    ]
)

SEGMENT = pa.struct(
    [
        pa.field("kind", pa.string()),  # text | image | video
        pa.field("role", pa.string()),  # see unimodal.tokenize.document.ROLES
        pa.field("tokens", pa.int32()),  # ids of a text; null for codes, as sizes are for a text
        pa.field("frames", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("width", pa.int32()),
        pa.field("fps", pa.float64()),
        pa.field("offset", pa.int64()),  # inside the tar, bytes
        pa.field("nbytes", pa.int64()),
    ]
)

INDEX = pa.schema(
    [
        pa.field("shard", pa.string(), nullable=False),
        pa.field("key", pa.string(), nullable=False),  # uid, and -NNNN for a window of a video
        pa.field("uid", pa.string(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),  # of the npy file inside the tar, bytes
        pa.field("nbytes", pa.int64(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),  # image | video | document
        pa.field("frames", pa.int32(), nullable=False),  # T, latent frames; 1 for an image
        pa.field("height", pa.int32(), nullable=False),  # H and W, in codes
        pa.field("width", pa.int32(), nullable=False),
        pa.field("fps", pa.float64()),  # pictures per second; null for an image
        pa.field("start_s", pa.float64()),  # the window, seconds from the source's first frame
        pa.field("end_s", pa.float64()),
        pa.field("split", pa.string(), nullable=False),  # train | val
        pa.field("source_sha256", pa.string(), nullable=False),
        pa.field("captions", pa.list_(CAPTION)),  # by precedence
        pa.field("task", pa.string(), nullable=False),  # caption | text | chat | interleaved | edit
        pa.field("segments", pa.list_(SEGMENT)),  # null for caption: the columns before say it all
    ]
)
"""Columns of the index; the scores of the run ride along behind them, one float64 each."""

GRID = ("frames", "height", "width")
"""Columns of the size in codes."""
_KEY = re.compile(r"[A-Za-z0-9_-]{1,80}")
MAX_CODES = 1 << 28
"""Codes in one picture or clip; far over any real one, it bounds what a hostile index asks for."""
MAX_TEXT_BYTES = 1 << 28
"""Bytes of one text, likewise."""


@dataclass(frozen=True)
class Sample:
    """What goes into a shard: codes [T, H, W], or the pieces of a document, and what is known."""

    key: str
    uid: str
    kind: str
    codes: np.ndarray | None
    """None for a document."""
    split: str
    source_sha256: str
    fps: float | None = None
    start_s: float | None = None
    end_s: float | None = None
    captions: Sequence[Mapping[str, Any]] = ()
    """Each with style, lang, text, tokens."""
    scores: Mapping[str, float | None] = field(default_factory=dict)
    meta: Mapping[str, str] = field(default_factory=dict)
    task: str = "caption"
    pieces: Sequence[Piece] = ()
    tokens: Sequence[int | None] = ()
    """Ids of each piece that is a text."""


def shard_paths(out: Path, number: int) -> tuple[Path, Path]:
    """Tar and index of a shard."""
    tar = out / f"shard-{number:05d}.tar"
    return tar, tar.with_suffix(".parquet")


def write_shard(
    out: Path,
    number: int,
    header: Mapping[str, Any],
    scores: Sequence[str],
    digest: str,
    samples: Iterable[Sample],
    quarantine: Sequence[Mapping[str, str]] = (),
) -> None:
    """Write one shard of samples.

    `header` is the manifest's, `scores` name the columns behind those of `INDEX`, `digest` is the
    unit's; `quarantine` are rows {uri, reason} of what it could not tokenize.
    """
    codebook, name = header["vision_tokenizer"]["codebook_size"], shard_paths(out, number)[0].name
    ordered = sorted(samples, key=lambda sample: sample.key)
    adds = (partial(_add, sample=sample, shard=name, codebook=codebook) for sample in ordered)
    commit_shard(out, number, scores, digest, adds, quarantine)


def commit_shard(
    out: Path,
    number: int,
    scores: Sequence[str],
    digest: str,
    adds: Iterable[Callable[[io.BufferedWriter], dict[str, Any]]],
    quarantine: Sequence[Mapping[str, str]] = (),
) -> None:
    """Write a tar, then its index, which is the commit mark.

    Each of `adds` appends the members of one sample to the tar and returns its row of the index.
    """
    tar, index = shard_paths(out, number)
    index.unlink(missing_ok=True)  # an index never stands beside another tar than its own
    with atomic(tar) as temporary, temporary.open("wb") as file:
        rows = [add(file) for add in adds]
        file.write(bytes(2 * tarfile.BLOCKSIZE))
        size = file.tell()
    unit = {"digest": digest, "tar_bytes": size, "quarantine": [dict(q) for q in quarantine]}
    schema = pa.schema([*INDEX, *(pa.field(name, pa.float64()) for name in scores)])
    table = pa.Table.from_pylist(rows, schema=schema)
    write_parquet(table, index, {"unimodal": json.dumps(unit, sort_keys=True)})


def _add(file: io.BufferedWriter, sample: Sample, shard: str, codebook: int) -> dict[str, Any]:
    """Append the members of a sample; returns its index row."""
    if not _KEY.fullmatch(sample.key):
        raise ValueError(f"{sample.key!r} cannot be a sample key")
    data = None if sample.codes is None else _npy(sample.codes, codebook, sample.key)
    frames, height, width = (0, 0, 0) if sample.codes is None else sample.codes.shape
    row = {
        "key": sample.key,
        "uid": sample.uid,
        "kind": sample.kind,
        "frames": frames,
        "height": height,
        "width": width,
        "fps": sample.fps,
        "start_s": sample.start_s,
        "end_s": sample.end_s,
        "split": sample.split,
        "source_sha256": sample.source_sha256,
        "captions": [dict(caption) for caption in sample.captions],
        "task": sample.task,
    }
    segments, members = _segments(sample, codebook)
    told: dict[str, Any] = {"segments": segments} if data is None else {}
    record = row | told | {"scores": dict(sample.scores), "meta": dict(sample.meta)}
    text = json.dumps(record, sort_keys=True, ensure_ascii=False, allow_nan=False)
    _member(file, f"{sample.key}.json", text.encode())
    offset = 0 if data is None else _member(file, f"{sample.key}.vision.npy", data)
    for segment, member in zip(segments, members, strict=True):
        name = segment.pop("member")
        segment |= {"offset": _member(file, f"{sample.key}.{name}", member), "nbytes": len(member)}
    place = {"shard": shard, "offset": offset, "nbytes": len(data or b"")}
    return row | told | dict(sample.scores) | place


def _segments(sample: Sample, codebook: int) -> tuple[list[dict[str, Any]], list[bytes]]:
    """What the index tells of the pieces of a document, with the name of each, and their bytes."""
    segments: list[dict[str, Any]] = []
    members: list[bytes] = []
    seen = 0  # pictures and videos
    for number, (piece, tokens) in enumerate(zip(sample.pieces, sample.tokens, strict=True)):
        thing = piece.segment
        told: dict[str, Any] = {"role": piece.role}
        if isinstance(thing, Text):
            members.append(thing.text.encode())
            told |= {"kind": "text", "tokens": tokens, "member": f"{number}.txt"}
        else:
            codes = thing.codes[None] if isinstance(thing, Image) else thing.codes
            members.append(_npy(codes, codebook, sample.key))
            told |= dict(zip(GRID, codes.shape, strict=True))
            told["member"] = f"vision.{seen}.npy" if seen else "vision.npy"
            told["kind"] = "image" if isinstance(thing, Image) else "video"
            if isinstance(thing, Video):
                told["fps"] = thing.fps
            seen += 1
        segments.append(told)
    return segments, members


def _npy(codes: np.ndarray, codebook: int, key: str) -> bytes:
    """Codes [T, H, W] as an npy file."""
    if codes.ndim != 3 or codes.dtype.kind not in "iu" or not codes.size:
        raise ValueError(f"codes of {key} are {codes.dtype} {codes.shape}")
    if codes.min() < 0 or codes.max() >= codebook:
        raise ValueError(f"codes of {key} are outside the codebook")
    npy, dtype = io.BytesIO(), np.dtype("<u2" if codebook <= 1 << 16 else "<u4")
    np.lib.format.write_array(npy, codes.astype(dtype), (1, 0), allow_pickle=False)
    return npy.getvalue()


def unit_of(index: Path) -> dict[str, Any]:
    """What the writer noted in an index file: digest, tar_bytes, quarantine."""
    return unit_in(pq.read_schema(index))


def unit_in(schema: pa.Schema) -> dict[str, Any]:
    """`unit_of` a file that is open; raises `ValueError` if that was written by something else."""
    note = (schema.metadata or {}).get(b"unimodal")
    if note is None:
        raise ValueError("unimodal tokenize did not write it")
    return json.loads(note)


def read_text(tar: int, offset: int, nbytes: int) -> str:
    """A text in an open tar; raises `ValueError` if it is not there."""
    data = os.pread(tar, nbytes, offset) if nbytes <= MAX_TEXT_BYTES else b""
    if len(data) != nbytes:
        raise ValueError(f"{len(data)} bytes of text where {nbytes} should be")
    return data.decode()


def read_codes(
    tar: int, offset: int, nbytes: int, shape: tuple[int, ...], codebook: int
) -> np.ndarray:
    """Codes of `shape` in an open tar: uint16 or uint32; raises `ValueError` and numpy's errors."""
    count = math.prod(shape)
    if not (min(shape) > 0 and count <= MAX_CODES and 0 < nbytes <= 4 * count + 4096):
        raise ValueError(f"{nbytes} bytes for codes {shape}")
    codes = _read_npy(os.pread(tar, nbytes, offset), shape)
    if codes.max() >= codebook:
        raise ValueError(f"code {codes.max()} is outside the codebook")
    return codes


def _member(file: io.BufferedWriter, name: str, data: bytes) -> int:
    """Append a member without time or owner; returns the offset of its data."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    info.mode = 0o644
    file.write(info.tobuf(tarfile.USTAR_FORMAT))
    offset = file.tell()
    file.write(data + bytes(-len(data) % tarfile.BLOCKSIZE))
    return offset


def _read_npy(data: bytes, shape: tuple[int, ...]) -> np.ndarray:
    """The array in an npy file, if its header says codes of `shape`; nothing is unpickled.

    The header is believed only after it was compared: numpy would first make room for whatever
    size it names.
    """
    for descr, width in (("<u2", 2), ("<u4", 4)):
        known = _npy_header(shape, descr)  # as we write it: parsing takes ten times as long
        if data.startswith(known) and len(data) == len(known) + width * math.prod(shape):
            return np.frombuffer(data, descr, offset=len(known)).reshape(shape)
    stream = io.BytesIO(data)
    if np.lib.format.read_magic(stream) != (1, 0):
        raise ValueError("not an npy file of version 1.0")
    found, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    if found != shape or fortran or dtype not in (np.dtype("<u2"), np.dtype("<u4")):
        raise ValueError(f"{dtype} {found} instead of codes {shape}")
    body = data[stream.tell() :]
    if len(body) != dtype.itemsize * int(np.prod(shape)):
        raise ValueError(f"{len(body)} bytes of codes for {shape}")
    return np.frombuffer(body, dtype).reshape(shape)


@lru_cache(maxsize=1024)
def _npy_header(shape: tuple[int, ...], descr: str) -> bytes:
    stream = io.BytesIO()
    told = {"descr": descr, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, told)
    return stream.getvalue()
