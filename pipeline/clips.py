"""A clip is a row, never bytes: a still image, or a span of a video, and all that is known of it.

    uri, start_pts, end_pts   where it is          flow_mean, luma_mean, …   what was measured
    uid                       who it is            captions, verdict         what follows from it

`uid` follows from the bytes of the source and the span, not from the path: a moved file keeps
its ids, and every join in the pipeline is by uid. For an image the video-only columns are null.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from unimodal.pipeline.files import atomic

Kind = Literal["image", "video"]

SAMPLE = pa.struct(
    [
        pa.field("member", pa.string()),  # name in the part's frames tar
        pa.field("time_s", pa.float64()),  # from the source's first frame; null for an image
        pa.field("keyframe", pa.bool_()),  # one of the (at most) 12 that captioners see
        pa.field("scoring", pa.bool_()),  # one of the (at most) 3 keyframes that scorers see
        pa.field("hash", pa.uint64()),  # 64-bit perceptual hash
    ]
)

EVIDENCE = pa.struct(
    [
        pa.field("detector", pa.string()),  # adaptive | content | fade | dissolve
        pa.field("score", pa.float64()),  # what the detector measured at the cut, in its own unit
        pa.field("threshold", pa.float64()),
    ]
)

CAPTION = pa.struct(
    [
        pa.field("style", pa.string()),  # "sidecar", "given", "subtitle", later "short", "dense", …
        pa.field("lang", pa.string()),
        pa.field("text", pa.string()),
        pa.field("start_s", pa.float64()),  # null: it speaks of the whole clip
        pa.field("end_s", pa.float64()),
        pa.field("model", pa.string()),  # null: written by people
        pa.field("prompt_hash", pa.string()),
        pa.field("status", pa.string()),
    ]
)

SPAN = pa.schema(
    [
        pa.field("uid", pa.string(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("source_sha256", pa.string(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        # Seconds from the source's first frame; the end is exclusive.
        pa.field("start_s", pa.float64()),
        pa.field("end_s", pa.float64()),
        pa.field("duration_s", pa.float64()),
        # Presentation time stamps in ticks of time_base, as the container has them.
        pa.field("start_pts", pa.int64()),
        pa.field("end_pts", pa.int64()),
        pa.field("time_base", pa.string()),  # "1/12800"
        pa.field("starts_at", pa.string()),  # why it starts there: source | cut | split
        pa.field("ends_at", pa.string()),
        pa.field("start_cut", EVIDENCE),  # why the cut was seen; null where it is no cut
        pa.field("end_cut", EVIDENCE),
        # As shown: rotation metadata, EXIF orientation and pixel aspect are applied.
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("fps", pa.float64()),
        pa.field("frames", pa.int64()),
        pa.field("codec", pa.string()),
        # Box without letterbox bars, in shown pixels, half open; the whole frame if it has none.
        pa.field("crop_x0", pa.int32()),
        pa.field("crop_y0", pa.int32()),
        pa.field("crop_x1", pa.int32()),
        pa.field("crop_y1", pa.int32()),
    ]
)

SCORES = pa.schema(
    [
        # Optical flow: mean displacement between samples, as a fraction of the short side.
        pa.field("flow_mean", pa.float64()),
        pa.field("flow_median", pa.float64()),
        pa.field("flow_p90", pa.float64()),
        # Light, in gray levels 0..255 where a unit applies.
        pa.field("luma_mean", pa.float64()),
        pa.field("contrast", pa.float64()),  # standard deviation of luma within a frame
        pa.field("blur", pa.float64()),  # variance of the Laplacian at short side 256
        pa.field("colorfulness", pa.float64()),  # Hasler and Süsstrunk 2003; 0 = gray
        pa.field("black_ratio", pa.float64()),  # share of frames that are black
        pa.field("freeze_ratio", pa.float64()),  # share of sampled pairs without any change
        pa.field("flash_ratio", pa.float64()),  # share of frames that jump in brightness
    ]
)

WATCH = pa.schema([*SPAN, *SCORES, pa.field("samples", pa.list_(SAMPLE))])
"""What the watch stage writes for a part."""

TEXT = pa.schema(
    [
        # Area that text boxes cover, as a share of the picture, over the samples of a clip.
        pa.field("text_area_mean", pa.float64()),
        pa.field("text_area_p90", pa.float64()),
        pa.field("text_track_s", pa.float64()),  # longest time that one box stands still
        pa.field("text_corner", pa.float64()),  # share of samples with a mark in one same corner
    ]
)

QUALITY = pa.schema([pa.field("quality", pa.float64())])  # technical, 0 (wrecked) to 1 (pristine)

EMBED = pa.schema(
    [
        pa.field("aesthetic", pa.float64()),  # LAION's scale of 1 to 10; a video's worst sample
        pa.field("embedding", pa.list_(pa.float32())),  # unit length, mean of the samples
    ]
)

NSFW = pa.schema([pa.field("nsfw", pa.float64())])  # probability, a video's worst sample

MATCH = pa.schema([pa.field("text_match", pa.float64())])  # CLIP cosine of first caption

DEDUP = pa.schema(
    [
        pa.field("dup_group", pa.string()),  # uid of the group's best; null where nothing is near
        pa.field("dup_rank", pa.int32()),  # 0 for the best of the group
    ]
)

CLIPS = pa.schema(
    [
        pa.field("part", pa.string(), nullable=False),
        *SPAN,
        *SCORES,
        *(field for field in (*TEXT, *QUALITY, *EMBED, *NSFW, *MATCH) if field.name != "embedding"),
        *DEDUP,
        pa.field("aliases", pa.list_(pa.string())),  # other paths with the same bytes
        pa.field("captions", pa.list_(CAPTION)),  # by precedence: the first is the one to use
        pa.field("meta", pa.map_(pa.string(), pa.string())),  # columns that came along
        pa.field("verdict", pa.string(), nullable=False),  # keep | drop
        pa.field("reasons", pa.list_(pa.string())),  # stage:score:threshold, empty when kept
    ]
)
"""The joined view, clips.parquet: sorted by uri, then start_pts.

The list of stored pictures stays with the part: it is longer than all the rest together, and a
million clips are decided anew in seconds without it.
"""

BATCH = 1 << 16
"""Rows that are read or made at a time, where all might be too many for one array."""

QUARANTINE = pa.schema(
    [
        pa.field("uri", pa.string(), nullable=False),
        pa.field("stage", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("part", pa.string()),
    ]
)
"""What could not be read, and why."""


def clip_uid(source_sha256: str, start_pts: int, end_pts: int, time_base: Fraction) -> str:
    """Name of a span of a video, 32 hex digits: equal bytes and equal ticks give equal names."""
    span = f"{start_pts}:{end_pts}:{time_base.numerator}/{time_base.denominator}"
    return hashlib.sha256(f"{source_sha256}:{span}".encode()).hexdigest()[:32]


def image_uid(source_sha256: str) -> str:
    """Name of a still image, 32 hex digits."""
    return hashlib.sha256(f"{source_sha256}:image".encode()).hexdigest()[:32]


def first_text(row: Mapping[str, Any]) -> str | None:
    """The caption to use of a clip with the column captions; None if it has none with words."""
    return next((said["text"] for said in row["captions"] or [] if said["text"]), None)


def table(rows: Iterable[Mapping[str, Any]], schema: pa.Schema) -> pa.Table:
    """Rows to a table of exactly `schema`; keys that a row lacks are null."""
    return pa.Table.from_pylist([dict(row) for row in rows], schema=schema)


def write_parquet(
    rows: pa.Table,
    path: Path,
    metadata: Mapping[str, str] | None = None,
    group: int | None = None,
) -> None:
    """Write a table so that it appears whole or not at all; equal tables give equal bytes.

    `group` rows can be read without the others; by default, so many as Parquet's writer takes.
    """
    if metadata:
        rows = rows.replace_schema_metadata(dict(metadata))
    with atomic(path) as temporary:
        pq.write_table(
            rows, temporary, compression="zstd", use_dictionary=True, row_group_size=group
        )


def read_parquet(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a file that `write_parquet` wrote, or some columns of it.

    Without the dataset machinery of `pyarrow.parquet.read_table`, which costs more than most of
    our files.
    """
    names = None if columns is None else list(columns)
    with pq.ParquetFile(path) as file:
        if file.metadata.num_rows <= BATCH:
            return file.read(columns=names)
        # At once, a column of lists with more than 2 GiB of text would be refused.
        batches = [*file.iter_batches(BATCH, columns=names)]
        return pa.Table.from_batches(batches).replace_schema_metadata(file.schema_arrow.metadata)
