"""Pictures and short clips in memory, from which a tokenizer in training takes random crops.

Everything is a pure function of the seed and the step, so that a resumed training sees what an
uninterrupted one would have seen.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np

from unimodal.pipeline.errors import MediaError, UnimodalError
from unimodal.pipeline.progress import Progress
from unimodal.tokenize.vision.pixels import resize
from unimodal.tokenize.vision.recipe import DataSettings

GROUP = 4  # frames of one latent frame
WINDOW_SECONDS = 2.0  # one clip is taken from every two seconds of a video
MAX_WINDOWS = 400  # clips taken from one video at most


@dataclass(frozen=True)
class Span:
    """A still image, or a part of a video."""

    uri: str
    video: bool
    start_pts: int | None = None
    end_pts: int | None = None
    fps: float | None = None
    box: tuple[int, ...] | None = None  # x0, y0, x1, y1: the picture without letterbox bars


@dataclass
class Bank:
    """Decoded training material."""

    pictures: list[np.ndarray] = field(default_factory=list)  # uint8 [H,W,3]
    clips: list[np.ndarray] = field(default_factory=list)  # uint8 [T,H,W,3]
    held_pictures: list[np.ndarray] = field(default_factory=list)
    held_clips: list[np.ndarray] = field(default_factory=list)

    @cached_property
    def chances(self) -> np.ndarray:
        """Cumulative chance of each picture, which grows with its area to the power of 3/4.

        By area alone a few wallpapers would crowd out thousands of icons, by count the reverse.
        """
        shares = np.power([float(p.shape[0] * p.shape[1]) for p in self.pictures], 0.75)
        chances = np.cumsum(shares) / shares.sum()
        chances[-1] = 1.0
        return chances


def held_out(uri: str, fraction: float) -> bool:
    """Whether a source is kept out of training, by a hash of its file name alone."""
    digest = hashlib.sha256(Path(uri).name.encode()).digest()
    return int.from_bytes(digest[:4], "big") < fraction * 2**32


def list_spans(inputs: Sequence[str | Path]) -> list[Span]:
    """Kept clips of run directories, or media files, folders and globs, sorted.

    Raises `UsageError` for a path that does not exist and `UnimodalError` if nothing is found.
    """
    found: list[Span] = []
    for item in inputs:
        table = Path(item) / "clips.parquet"
        found += _from_run(table) if table.exists() else _from_files(str(item))
    if not found:
        raise UnimodalError(
            f"{', '.join(map(str, inputs))}: no picture or video found; give a run directory made "
            "by `unimodal curate`, or files and folders of media"
        )
    return sorted(set(found), key=lambda s: (s.uri, s.start_pts or 0))


def _from_run(table: Path) -> list[Span]:
    import pyarrow.parquet as pq

    corners = ["crop_x0", "crop_y0", "crop_x1", "crop_y1"]
    columns = ["uri", "kind", "start_pts", "end_pts", "fps", *corners]
    spans = []
    for row in pq.read_table(
        table, columns=columns, filters=[("verdict", "==", "keep")]
    ).to_pylist():
        box = tuple(row[name] for name in corners)
        place = (row["start_pts"], row["end_pts"], row["fps"])
        spans.append(Span(row["uri"], row["kind"] == "video", *place, None if None in box else box))
    return spans


def _from_files(item: str) -> list[Span]:
    from unimodal.pipeline.inputs import list_sources
    from unimodal.pipeline.media import probe

    spans = []
    for source in list_sources([item]):
        try:
            found = probe(source.uri)
        except MediaError:
            continue  # told again, with its reason, by `unimodal curate`
        spans.append(Span(source.uri, found.kind == "video", fps=found.fps))
    return spans


def load_bank(spans: Sequence[Span], settings: DataSettings, progress: Progress) -> Bank:
    """Decode `spans` into memory until `settings.memory_gib` are held.

    What cannot be read is noted.
    """
    bank = Bank()
    held = 0
    progress.begin("read", len(spans), "sources")
    # A hash order, so that a memory limit takes a sample of everything and not the first folder.
    for span in sorted(spans, key=lambda s: hashlib.sha256(repr(s).encode()).digest()):
        try:
            found = list(_clips(span, settings)) if span.video else [_picture(span, settings)]
        except MediaError as error:
            progress.note(f"left out: {error}")
            found = []
        if held_out(span.uri, settings.val_fraction):
            (bank.held_clips if span.video else bank.held_pictures).extend(found)
        else:
            (bank.clips if span.video else bank.pictures).extend(found)
        held += sum(pixels.nbytes for pixels in found)
        progress.advance("read")
        if held > settings.memory_gib * 2**30:
            progress.note(f"training on a sample: {held / 2**30:.1f} GiB of pictures are in memory")
            break
    progress.end("read")
    if not bank.pictures and not bank.clips:
        raise UnimodalError("nothing to train on: every source was left out or held out")
    return bank


def _target(height: int, width: int, short_side: int) -> tuple[int, int]:
    scale = min(1.0, short_side / min(height, width))
    return max(8, round(height * scale)), max(8, round(width * scale))


def _picture(span: Span, settings: DataSettings) -> np.ndarray:
    from unimodal.pipeline.media import read_image

    pixels = read_image(span.uri)
    if span.box:
        pixels = pixels[span.box[1] : span.box[3], span.box[0] : span.box[2]]
    return resize(pixels, _target(pixels.shape[0], pixels.shape[1], settings.short_side))


def _clips(span: Span, settings: DataSettings) -> Iterator[np.ndarray]:
    """Frames of a clip, `1 / fps` apart, from the start of every two seconds of the span."""
    from unimodal.pipeline.media import iter_frames, probe

    shown, frames = probe(span.uri), settings.clip_frames
    size = _target(shown.height, shown.width, settings.short_side // 2)
    x0, y0, x1, y1 = span.box or (0, 0, shown.width, shown.height)
    rows = slice(y0 * size[0] // shown.height, y1 * size[0] // shown.height)
    columns = slice(x0 * size[1] // shown.width, x1 * size[1] // shown.width)
    rate = span.fps or shown.fps or 25.0
    step = max(1, round(rate / settings.fps))
    every = max(frames * step, round(rate * WINDOW_SECONDS))
    shots = iter_frames(span.uri, span.start_pts, span.end_pts, size=size)
    group: list[np.ndarray] = []
    for index, (_, pixels) in enumerate(islice(shots, MAX_WINDOWS * every)):
        offset = index % every
        if offset % step == 0 and offset < frames * step:
            group.append(pixels[rows, columns])
            if len(group) == frames:
                yield np.stack(group)
                group = []


def batch(
    bank: Bank,
    seed: int,
    step: int,
    *,
    frames: int,
    crop: int,
    clip_share: float = 0.0,
    part: tuple[int, int] = (0, 1),
) -> np.ndarray:
    """The crops of a step, of pictures or of clips: uint8 [N, T, crop, crop, 3], N x T = `frames`.

    Process i of n (`part`) gets the i-th n-th of the crops, each of which depends on the seed, the
    step and its place in the whole batch alone.
    """
    rng = np.random.default_rng([seed, step])
    shots = 1
    if bank.clips and (rng.random() < clip_share or not bank.pictures):
        shots = len(bank.clips[0])
        if shots > GROUP and rng.random() < 0.5:
            shots = GROUP
    share = max(1, frames // shots) // part[1]
    crops = []
    for place in range(part[0] * share, (part[0] + 1) * share):
        rng = np.random.default_rng([seed, step, place + 1])
        if shots > 1:
            source = bank.clips[rng.integers(len(bank.clips))][:shots]
        else:
            source = bank.pictures[np.searchsorted(bank.chances, rng.random())][None]
        crops.append(_crop(source, rng, crop))
    return np.stack(crops)


def _crop(frames: np.ndarray, rng: np.random.Generator, crop: int) -> np.ndarray:
    """frames [T,H,W,3] -> [T,crop,crop,3]: at scale 1, 1/2 or 1/4, flipped half the time."""
    height, width = frames.shape[1:3]
    factor = int(rng.choice([1, 2, 4], p=[0.35, 0.45, 0.2]))
    while factor > 1 and min(height, width) < crop * factor:
        factor //= 2
    if min(height, width) < crop or (min(height, width) < 1.5 * crop and rng.random() < 0.5):
        # Small pictures are mostly seen whole, as they will be when they are tokenized.
        frames = np.stack([resize(frame, (crop, crop)) for frame in frames])
        height = width = crop
    side = crop * factor
    top, left = rng.integers(height - side + 1), rng.integers(width - side + 1)
    cut = frames[:, top : top + side, left : left + side]
    if factor > 1:  # box filter: a smaller copy of the place
        blocks = cut.reshape(len(cut), crop, factor, crop, factor, 3)
        cut = np.rint(blocks.mean(axis=(2, 4))).astype(np.uint8)
    return cut[:, :, ::-1] if rng.random() < 0.5 else cut
