"""What tokenizing a run will do, known before a pixel is decoded.

    kept clips  ->  windows (one sample each)  ->  units (one shard each)

Everything here follows from clips.parquet and the settings alone. That is what makes a run
resumable by shard and its bytes independent of engines and interruptions: sizes, windows, batches
and shard borders are all fixed before work begins. Clips come in batches, a million of them in
the memory of a few thousand, and a unit can be planned again from the place where it begins.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import IO, Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field

from unimodal.pipeline.captioning.answers import usable
from unimodal.pipeline.clips import SPAN
from unimodal.pipeline.errors import MediaError, UnimodalError, UsageError, full_disk
from unimodal.pipeline.kinds import mistaken
from unimodal.pipeline.settings import Settings
from unimodal.pipeline.supervise import Patience
from unimodal.tokenize.document import SPATIAL, TEMPORAL, block_length
from unimodal.tokenize.shard import INDEX
from unimodal.tokenize.vocabulary import Vocabulary

MAX_SHARD_CODES = 1 << 26
"""A shard is closed when it holds this many codes (128 MiB), however few its samples are."""

_UID = re.compile(r"[A-Za-z0-9_-]{1,64}")


class TokenizeSettings(Settings):
    """Settings of `unimodal tokenize`."""

    tokenizer: str = "small"
    """Vision tokenizer: `small` (ships with the package) or a directory of weights."""
    vocabulary: str = "bytes"
    """`bytes`, `emu3:FILE`, the file of a text tokenizer, or a saved vocabulary."""
    area: int | None = Field(default=256 * 256, ge=SPATIAL * SPATIAL)
    """Pixels of a picture after resizing; the aspect is kept, sides become multiples of 8. none:
    the released processor's rule, a picture keeps its size between min_area and max_area."""
    min_area: int = Field(default=512 * 512, ge=SPATIAL * SPATIAL)
    """Fewest pixels where area is none; a smaller picture is enlarged."""
    max_area: int = Field(default=1024 * 1024, ge=SPATIAL * SPATIAL)
    """Most pixels where area is none; a larger picture is reduced."""
    max_aspect: float = Field(default=5.0, ge=1)
    """Long side over short side; pictures beyond it are left out (released processor: 5)."""
    fps: float = Field(default=8.0, gt=0, le=240)
    """Pictures per second that are taken from a video, by time stamp."""
    seconds: float = Field(default=5.0, gt=0)
    """Longest window of a video that becomes one sample."""
    max_tokens: int = Field(default=131_072, ge=16)
    """Longest document, without its caption: windows are shortened to fit. Default: Emu3's."""
    joint: bool = False
    """Let later groups of 4 pictures see the earlier ones of their window: other codes, which must
    be decoded jointly too."""
    crop: bool = True
    """Cut letterbox bars off, by the box that curation measured."""
    shard_size: int = Field(default=512, ge=1)
    """Samples in a shard, which is also what an interruption costs at most."""
    batch: int = Field(default=8, ge=1)
    """Images, or groups of 4 frames, that are encoded at once."""
    val_fraction: float = Field(default=0.02, ge=0, lt=1)
    """Share of sources (not of clips) that go to the validation split."""
    text_column: str = "text"
    """Key or column of the text, in files of texts."""
    text_by: Literal["file", "paragraph", "line"] = "file"
    """What of a .txt is one document; paragraphs have a blank line between them."""
    images: str = ""
    """Folder that paths of pictures in files of documents begin at; empty: the file's own."""
    patience: Patience = Patience()
    """When to give up on a file or on the run; no part of what the shards record."""

    def recorded(self) -> dict[str, Any]:
        """What the manifest keeps: all that decides which codes there are.

        The tokenizer and the vocabulary are known by their digests; a path would say it of one
        machine. A batch's size changes no code.
        """
        left_out = {"tokenizer", "vocabulary", "patience", "images", "batch"}
        return self.model_dump(mode="json", exclude=left_out)


PRESETS: dict[str, dict[str, Any]] = {
    # Emu3 (arXiv 2409.18869): pictures of about 512x512 pixels, 5 s at 24 fps in 131,072 tokens.
    "emu3": {"area": 512 * 512, "fps": 24.0, "seconds": 5.0, "max_tokens": 131_072},
    # The image processor released with it: a picture keeps its size from 512x512 to 1024x1024.
    "emu3-chat": {"area": None, "fps": 24.0, "seconds": 5.0, "max_tokens": 131_072},
}


@dataclass(frozen=True)
class Window:
    """One sample to be: an image, or some pictures of a video."""

    key: str
    clip: Mapping[str, Any] = field(repr=False)
    """The row of clips.parquet."""
    size: tuple[int, int]
    """Height and width in pixels after resizing."""
    grid: tuple[int, int]
    """Height and width in codes."""
    box: tuple[int, int, int, int] | None
    """x0, y0, x1, y1 of what is used of the picture as shown; None for all of it."""
    first: int = 0
    """Index of its first picture among those that `fps` takes from the clip."""
    pictures: int = 1
    """Of a clip that has fewer than 4, the last is repeated to 4."""
    fps: Fraction | None = None
    """None for an image."""

    @property
    def codes(self) -> int:
        """Number of vision codes."""
        frames = 1 if self.fps is None else self.pictures // TEMPORAL
        return frames * self.grid[0] * self.grid[1]

    def block_length(self, vocabulary: Vocabulary) -> int:
        """Number of ids of its vision block."""
        if self.fps is None:
            return block_length(vocabulary, *self.grid)
        return block_length(vocabulary, *self.grid, self.pictures // TEMPORAL, float(self.fps))

    def span(self) -> tuple[float | None, float | None]:
        """First and last moment, in seconds from the source's first frame; None for an image."""
        if self.fps is None:
            return None, None
        start = Fraction(self.first) / self.fps
        # The last picture stands for 1/fps seconds, of which the clip may hold only a part.
        end = min(start + Fraction(self.pictures) / self.fps, duration(self.clip))
        offset = float(self.clip["start_s"] or 0)
        return round(offset + float(start), 6), round(offset + float(end), 6)


@dataclass(frozen=True)
class Unit:
    """The work for one shard."""

    number: int
    windows: list[Window]
    unfit: list[dict[str, str]]
    """Rows {uri, reason} of clips that cannot become samples."""
    at: tuple[int, int, int] = (0, 0, 0)
    """Where it begins: batch of clips, row in it, window of that clip."""

    pictures = True
    """There may be some to encode."""

    def facts(self) -> dict[str, Any]:
        """What a worker needs to know to plan it again."""
        return {"at": self.at}

    @property
    def clips(self) -> int:
        """Clips that begin in this unit, or are unfit."""
        return sum(window.first == 0 for window in self.windows) + len(self.unfit)

    def digest(self, header: Mapping[str, Any]) -> str:
        """Names the result: all that the shard's bytes depend on, but for the media themselves.

        `header` says which tokenizer, vocabulary and settings.
        """
        state = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
        state.update(json.dumps(self.unfit, sort_keys=True).encode())
        for window in self.windows:
            facts: list[Any] = [window.key, window.size, window.grid, window.box]
            facts += [window.first, window.pictures, str(window.fps)]
            row = {key: value for key, value in window.clip.items() if key != "uri"}
            state.update(json.dumps([*facts, row], sort_keys=True).encode())
        return state.hexdigest()


BATCH = 1024
"""Clips that are handed on at a time."""
PACKED = pa.ipc.IpcWriteOptions(compression="lz4")


@dataclass(frozen=True)
class Clips:
    """Kept rows of a run's clips.parquet in the order of tokenizing, each span once.

    They are sorted on disk, in unnamed files by the first digits of the sources' digests.
    """

    schema: pa.Schema
    crowds: Mapping[str, IO[bytes]] = field(repr=False)
    limit: int | None = None

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        left = math.inf if self.limit is None else self.limit
        for _, file in sorted(self.crowds.items()):
            file.seek(0)
            crowd = pa.ipc.open_stream(file).read_all()
            order = [(name, "ascending") for name in ("source_sha256", "start_pts", "uid")]
            crowd = crowd.sort_by(order).combine_chunks()
            uids = crowd["uid"].combine_chunks()
            if len(uids) > 1:  # the same span may be listed twice
                new = pc.not_equal(uids[1:], uids[:-1]).to_pylist()
                crowd = crowd.filter(pa.array([True, *new])).combine_chunks()
            for batch in crowd.to_batches(max_chunksize=BATCH):
                if left <= 0:
                    return
                yield batch.slice(0, min(len(batch), left))
                left -= len(batch)


def clips_file(run_dir: Path) -> Path:
    """clips.parquet of a run; raises `UnimodalError` if there is none."""
    path = run_dir / "clips.parquet"
    if not path.is_file():
        raise UsageError(
            mistaken(run_dir, "run directory")
            or f"no clips at {run_dir} (there is no clips.parquet): of media, "
            f"unimodal curate {run_dir} -o run makes them"
        )
    return path


def kept_clips(run_dir: Path, limit: int | None = None) -> Clips:
    """The kept clips of a run.

    Clips of one source stand together, so that a video is read from front to back; sources are
    in the order of their digests. `limit` takes only the first so many clips. Raises
    `UnimodalError` if there is no run, or nothing in it was kept.
    """
    path = clips_file(run_dir)
    crowds: dict[str, IO[bytes]] = {}
    sinks: dict[str, Any] = {}
    rows = 0
    try:
        with pq.ParquetFile(path) as file:
            there = file.schema_arrow
            missing = [name for name in (*SPAN.names, "verdict") if name not in there.names]
            if missing:
                raise UnimodalError(f"{path} lacks {', '.join(missing)}: run unimodal curate again")
            used = {*SPAN.names, "captions", "meta", *score_columns(there)}
            schema = pa.schema([column for column in there if column.name in used])
            for batch in file.iter_batches(1 << 16, columns=[*schema.names, "verdict"]):
                rows += len(batch)
                kept = batch.filter(pc.equal(batch["verdict"], "keep")).select(schema.names)
                kept = kept.sort_by("source_sha256")
                runs = pc.run_end_encode(pc.utf8_slice_codeunits(kept["source_sha256"], 0, 2))
                start = 0
                for end, crowd in zip(runs.run_ends.to_pylist(), runs.values, strict=True):
                    name = crowd.as_py()
                    if name not in sinks:
                        crowds[name] = tempfile.TemporaryFile()  # noqa: SIM115 - kept open
                        sinks[name] = pa.ipc.new_stream(crowds[name], schema, options=PACKED)
                    sinks[name].write_batch(kept.slice(start, end - start))
                    start = end
    except (OSError, pa.ArrowException) as error:
        raise full_disk(error, tempfile.gettempdir()) or UnimodalError(
            f"{path} cannot be read ({error}): run unimodal curate again"
        ) from error
    for sink in sinks.values():
        sink.close()
    if not crowds:
        raise UnimodalError(
            f"no clip of {run_dir} is kept ({rows} dropped): its column reasons says why; "
            "loosen a rule: unimodal curate … --set decide.RULE=none"
        )
    return Clips(schema, crowds, limit)


def score_columns(clips: pa.Schema) -> list[str]:
    """Measured columns, which ride along into the index: every float that is not the span's."""
    known = {*SPAN.names, *INDEX.names}
    return [f.name for f in clips if pa.types.is_floating(f.type) and f.name not in known]


def units(
    clips: Iterable[pa.RecordBatch],
    settings: TokenizeSettings,
    vocabulary: Vocabulary,
    factor: int = SPATIAL,
    number: int = 0,
    skip: int = 0,
) -> Iterator[Unit]:
    """The work, shard by shard; a clip's windows stay in one shard unless they alone fill it.

    `factor` is the vision tokenizer's: pixels along a side of one code. With the clips from where
    a unit begins, its number, and `skip` windows of the first clip, it comes out once more.
    """
    codes, at = 0, (0, 0, skip)
    todo: list[Window] = []
    unfit: list[dict[str, str]] = []
    for b, batch in enumerate(clips):
        for r, row in enumerate(batch.to_pylist()):
            try:
                found = windows(row, settings, vocabulary, factor)
            except MediaError as error:
                unfit.append({"uri": row["uri"], "reason": error.reason})
                continue
            for position, window in enumerate(found[skip:], skip):
                full = len(todo) >= settings.shard_size or codes >= MAX_SHARD_CODES
                whole = len(todo) + len(found) <= settings.shard_size
                if full or (position == 0 and todo and not whole):
                    yield Unit(number, todo, unfit, at)
                    number, codes, at, todo, unfit = number + 1, 0, (b, r, position), [], []
                todo.append(window)
                codes += window.codes
            skip = 0
    if todo or unfit:
        yield Unit(number, todo, unfit, at)


def estimate(
    clips: Iterable[pa.RecordBatch],
    settings: TokenizeSettings,
    vocabulary: Vocabulary,
    factor: int = SPATIAL,
    there: Callable[[Unit], bool] = lambda unit: False,
) -> dict[str, int]:
    """What tokenizing would make, as counts; `tokens` are those of vision blocks, not captions.

    `disk_bytes` counts codes and what a tar adds to them, with 1 KiB for a sample's metadata;
    `done` shards are those of which `there` says that they are made already.
    """
    names = ("shards", "done", "clips", "images", "windows", "vision_codes", "tokens", "unfit")
    total = dict.fromkeys((*names, "disk_bytes"), 0)
    size = 2 if vocabulary.codebook_size <= 1 << 16 else 4
    for unit in units(clips, settings, vocabulary, factor):
        total["shards"] += 1
        total["done"] += there(unit)
        total["clips"] += unit.clips
        total["unfit"] += len(unit.unfit)
        for window in unit.windows:
            total["images" if window.fps is None else "windows"] += 1
            total["vision_codes"] += window.codes
            total["tokens"] += window.block_length(vocabulary)
            total["disk_bytes"] += size * window.codes + 2560
    return total


def windows(
    row: Mapping[str, Any],
    settings: TokenizeSettings,
    vocabulary: Vocabulary,
    factor: int = SPATIAL,
) -> list[Window]:
    """The samples that one clip becomes.

    Raises `MediaError` if it can become none, and `UsageError` if by these settings no clip can.
    """
    from unimodal.tokenize.vision.pixels import area_size, smart_size

    fps = Fraction(str(settings.fps))
    most = math.floor(Fraction(str(settings.seconds)) * fps) // TEMPORAL
    if not most:
        raise UsageError(
            f"{settings.seconds:g} s at {settings.fps:g} fps are fewer than {TEMPORAL} pictures, "
            "which one latent frame needs: raise --fps, or --set seconds=…"
        )
    if settings.area is None and settings.min_area > settings.max_area:
        raise UsageError(f"min_area {settings.min_area} is over max_area {settings.max_area}")
    if not _UID.fullmatch(row["uid"]):
        raise MediaError(f"its uid {row['uid'][:80]!r} cannot name a sample")
    width, height = row.get("width"), row.get("height")
    if not width or not height or min(width, height) < 1:
        raise MediaError("its size is not known")
    box = _box(row, width, height) if settings.crop else None
    shown: tuple[int, int] = (box[3] - box[1], box[2] - box[0]) if box else (height, width)
    if min(shown) < factor:
        raise MediaError(f"{shown[1]}x{shown[0]} pixels: a side is under {factor}, one code's own")
    if max(shown) > settings.max_aspect * min(shown):
        raise MediaError(
            f"{shown[1]}x{shown[0]} pixels are more than {settings.max_aspect:g} times as long as "
            "wide (max_aspect)"
        )
    if settings.area is not None:
        size = area_size(*shown, settings.area, factor)
    else:
        bounds = (settings.min_area, settings.max_area)
        size = smart_size(*shown, *bounds, factor, settings.max_aspect)
    grid = (size[0] // factor, size[1] // factor)
    video = row["kind"] != "image"
    count, most = (picture_count(row, fps), most) if video else (1, 1)

    def length(frames: int) -> int:
        return 2 + block_length(vocabulary, *grid, *((frames, float(fps)) if video else ()))

    while length(most) > settings.max_tokens:
        if most == 1:
            raise MediaError(
                f"{size[1]}x{size[0]} pixels make {length(1)} tokens, over max_tokens "
                f"{settings.max_tokens}: lower --area, or raise --set max_tokens=…"
            )
        most -= 1
    if not video:
        return [Window(row["uid"], row, size, grid, box)]
    found: list[Window] = []
    for first in range(0, count, most * TEMPORAL):
        pictures = min(count - first, most * TEMPORAL) // TEMPORAL * TEMPORAL
        if pictures or not first:
            key = f"{row['uid']}-{len(found):04d}"
            found.append(Window(key, row, size, grid, box, first, pictures or TEMPORAL, fps))
    return found


def captions_of(
    captions: Iterable[Mapping[str, Any]] | None,
    start: float | None,
    end: float | None,
    vocabulary: Vocabulary,
) -> list[dict[str, Any]]:
    """Of a clip's captions those that speak of a window of it, by precedence.

    Those of the whole clip all do; of those with a time span, the one of each style and
    language that overlaps the window most. `start` and `end` are None for an image. Returns
    {style, lang, text, tokens} of each.
    """
    chosen: dict[Any, tuple[float, dict[str, Any]]] = {}
    for number, caption in enumerate(captions or []):
        if not usable(caption):
            continue
        kept = {name: caption.get(name) for name in ("style", "lang", "text")}
        since, until = caption.get("start_s"), caption.get("end_s")
        if start is None or end is None or since is None or until is None:
            chosen[number] = (math.inf, kept)
            continue
        overlap, kind = min(end, until) - max(start, since), (kept["style"], kept["lang"])
        if overlap > chosen.get(kind, (0.0, kept))[0]:
            chosen[kind] = (overlap, kept)  # in the place of the one before
    encode = vocabulary.text.encode
    return [{**kept, "tokens": len(encode(kept["text"]))} for _, kept in chosen.values()]


def split_of(source_sha256: str, val_fraction: float) -> str:
    """`train` or `val`, by the source: clips of one video never end up on both sides."""
    # Hashed once more, so that the order of tokenizing says nothing about the split.
    digest = hashlib.sha256(f"split:{source_sha256}".encode()).digest()
    return "val" if int.from_bytes(digest[:8], "big") < val_fraction * 2**64 else "train"


def _box(row: Mapping[str, Any], width: int, height: int) -> tuple[int, int, int, int] | None:
    """The letterbox-free box, if there is one that leaves something out."""
    found = [row.get(name) for name in ("crop_x0", "crop_y0", "crop_x1", "crop_y1")]
    if any(value is None for value in found):
        return None
    x0, y0, x1, y1 = (int(value) for value in found if value is not None)
    if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
        raise MediaError(f"its crop box {x0},{y0},{x1},{y1} is not inside {width}x{height}")
    return None if (x0, y0, x1, y1) == (0, 0, width, height) else (x0, y0, x1, y1)


def picture_count(row: Mapping[str, Any], fps: Fraction) -> int:
    """Pictures that `fps` takes from a video's clip: at 0, 1/fps, 2/fps, ... before the end."""
    return math.ceil(duration(row) * fps)


def duration(row: Mapping[str, Any]) -> Fraction:
    """Seconds of a video's clip, exactly; raises `MediaError`."""
    try:
        base = Fraction(row["time_base"])
        length = (row["end_pts"] - row["start_pts"]) * base
    except (TypeError, ValueError, KeyError, ZeroDivisionError) as error:
        raise MediaError("its span has no time stamps") from error
    if length <= 0 or base <= 0:
        raise MediaError("its span is empty")
    return length
