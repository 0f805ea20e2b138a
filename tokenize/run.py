"""From a curated run to shards: decode, crop, resize, encode, write; one unit after another.

    run/clips.parquet -> plan.units -> pixels -> vision tokenizer -> shards/

A unit is one shard. Its batches are fixed by the plan, so that a run that was killed and resumed
writes the same bytes as one that was not. A clip that cannot be read is noted in the shard's own
index and collected in quarantine.parquet; the rest goes on.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from unimodal.pipeline.errors import MediaError
from unimodal.pipeline.lock import run_lock
from unimodal.pipeline.progress import Progress
from unimodal.tokenize.plan import (
    TEMPORAL,
    TokenizeSettings,
    Unit,
    Window,
    kept_clips,
    score_columns,
    split_of,
    units,
    window_captions,
)
from unimodal.tokenize.shards import Sample, Shards, ShardWriter, check_ours
from unimodal.tokenize.vocabulary import Vocabulary

if TYPE_CHECKING:
    import torch

__all__ = ["TokenizeSettings", "tokenize"]


class VisionTokenizer(Protocol):
    """What this stage needs of `unimodal.tokenize.vision.tokenizer.VisionTokenizer`."""

    @property
    def codebook_size(self) -> int: ...

    @property
    def spatial_factor(self) -> int: ...

    @property
    def digest(self) -> str: ...

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """float32 [B, T, 3, H, W] in [-1, 1] (T = 1: images) -> codes [B, T', H/8, W/8]."""
        ...

    def save(self, directory: Path) -> None: ...


def tokenize(
    run_dir: Path,
    out: Path,
    settings: TokenizeSettings,
    *,
    tokenizer: VisionTokenizer | None = None,
    progress: Progress | None = None,
    limit: int | None = None,
    device: str = "cpu",
) -> Shards:
    """Tokenize the kept clips of `run_dir` into shards at `out`, and open them.

    Shards that are already there for the same clips and settings are not made again, except to
    pick up clips that could not be read then and can be now. `limit` takes only the first so
    many clips. Raises `UnimodalError` if there is nothing to do, or `out` holds shards of
    another tokenizer, vocabulary or settings.

    `tokenizer` replaces the one that the settings name, and stays on the device where it is;
    `device` is where a named one is loaded.
    """
    progress = progress or Progress()
    check_ours(out)
    clips = kept_clips(run_dir, limit)
    if tokenizer is None:
        from unimodal.tokenize.vision.tokenizer import VisionTokenizer as Trained

        tokenizer = Trained.load(settings.tokenizer, device)
    vocabulary = Vocabulary.named(settings.vocabulary, tokenizer.codebook_size)
    # Which tokenizer and vocabulary is said by their digests; a path would say it of one machine.
    recorded = settings.model_dump(mode="json", exclude={"tokenizer", "vocabulary"})
    scores = score_columns(clips)
    with run_lock(out, progress), _exact_arithmetic():
        writer = ShardWriter(out, tokenizer, vocabulary, recorded, scores)
        work = _Work(tokenizer, vocabulary, settings, scores, progress)
        progress.begin("tokenize", len(clips), "clips")
        count = resumed = 0
        for unit in units(clips, settings, vocabulary, tokenizer.spatial_factor):
            count += 1
            digest = unit.digest(writer.header)
            if writer.has(unit.number, digest) and not _mended(unit, writer.lost(unit.number)):
                resumed += 1
                progress.advance("tokenize", len({w.clip["uid"] for w in unit.windows}))
            else:
                samples, lost = work.samples(unit)
                writer.write(unit.number, digest, samples, lost)
            progress.advance("tokenize", len(unit.unfit))
        shards = writer.finish(count)
        progress.end("tokenize")
    totals = shards.manifest["totals"]
    if resumed:
        progress.note(f"{resumed} of {count} shards were there already")
    if totals["quarantined"]:
        why = out / "quarantine.parquet"
        progress.note(f"{totals['quarantined']} clips were left out: {why} says why")
    if settings.val_fraction and not totals["val"]:
        progress.note("no source fell into the validation split: raise val_fraction to have one")
    return shards


@dataclass
class _Work:
    """What every unit of one run shares."""

    tokenizer: VisionTokenizer
    vocabulary: Vocabulary
    settings: TokenizeSettings
    scores: Sequence[str]
    progress: Progress

    def samples(self, unit: Unit) -> tuple[list[Sample], list[dict[str, str]]]:
        """Samples of a unit, and rows {uri, reason} of the clips that gave none."""
        samples: list[Sample] = []
        lost = list(unit.unfit)
        # Images of one size share a batch; none is cropped, stretched or padded to fit one.
        images = sorted((w for w in unit.windows if w.fps is None), key=lambda w: (w.size, w.key))
        for _, same in groupby(images, key=lambda w: w.size):
            for batch in _batches(list(same), self.settings.batch):
                read: list[tuple[Window, np.ndarray]] = []
                for window in batch:
                    try:
                        read.append((window, image_pixels(window)))
                    except (MediaError, OSError) as error:
                        lost.append(_lost(window, error))
                if read:
                    codes = self.encode(np.stack([pixels for _, pixels in read])[:, None])
                    samples += [self.sample(w, c) for (w, _), c in zip(read, codes, strict=True)]
                self.progress.advance("tokenize", len(batch))

        videos = [w for w in unit.windows if w.fps is not None]
        for _, same in groupby(videos, key=lambda w: w.clip["uid"]):
            clip = list(same)
            whole: list[Sample] = []
            try:
                for window, pixels in zip(clip, video_pixels(clip), strict=True):
                    # Groups of 4 pictures are encoded each by itself, so they share batches too.
                    groups = pixels.reshape(-1, TEMPORAL, *pixels.shape[1:])
                    whole.append(self.sample(window, self.encode(groups)[:, 0]))
                samples += whole
            except (MediaError, OSError) as error:
                lost.append(_lost(clip[0], error))
            self.progress.advance("tokenize")
        return samples, lost

    def encode(self, pictures: np.ndarray) -> np.ndarray:
        """uint8 [N, T, H, W, 3] with T = 1 (image) or 4 -> codes int64 [N, 1, H/8, W/8].

        In float32 and contiguous: channels-last pixels flip about one code in 4096.
        """
        import torch

        from unimodal.tokenize.vision.pixels import to_pixels

        with torch.inference_mode():
            batches = _batches(pictures, self.settings.batch)
            codes = [self.tokenizer.encode(to_pixels(batch)).cpu().numpy() for batch in batches]
        return np.concatenate(codes)

    def sample(self, window: Window, codes: np.ndarray) -> Sample:
        """The window with its codes [T, H/8, W/8] and everything that is known of its clip."""
        clip = window.clip
        start, end = window.span()
        captions = [
            {**caption, "tokens": len(self.vocabulary.text.encode(caption["text"]))}
            for caption in window_captions(window)
        ]
        return Sample(
            key=window.key,
            uid=clip["uid"],
            kind=clip["kind"],
            codes=codes,
            split=split_of(clip["source_sha256"], self.settings.val_fraction),
            source_sha256=clip["source_sha256"],
            fps=None if window.fps is None else float(window.fps),
            start_s=start,
            end_s=end,
            captions=captions,
            scores={name: _finite(clip[name]) for name in self.scores},
            meta=dict(clip.get("meta") or []),
        )


def image_pixels(window: Window) -> np.ndarray:
    """The image of a window, cropped and resized: uint8 RGB [H, W, 3]. Raises `MediaError`."""
    from unimodal.pipeline.media import read_image

    return _fit(read_image(window.clip["uri"]), window)


def video_pixels(windows: Sequence[Window]) -> Iterator[np.ndarray]:
    """Pictures of the windows of one clip, one window after another: uint8 RGB [F, H, W, 3].

    The clip is decoded once, front to back. Raises `MediaError`.
    """
    from unimodal.pipeline.media import iter_frames

    clip = windows[0].clip
    tick = Fraction(clip["time_base"])
    times = [
        clip["start_pts"] + Fraction(window.first + i) / window.fps / tick
        for window in windows
        if window.fps is not None
        for i in range(window.pictures)
    ]
    frames = iter_frames(clip["uri"], clip["start_pts"], clip["end_pts"])
    shown = resample(frames, times, clip.get("frames"))
    for window in windows:
        pictures = np.empty((window.pictures, *window.size, 3), np.uint8)
        last: np.ndarray | None = None
        for i in range(window.pictures):
            frame = next(shown)
            # A slow video shows a frame more than once; it is resized once.
            pictures[i] = pictures[i - 1] if frame is last and i else _fit(frame, window)
            last = frame
        yield pictures


def resample(
    frames: Iterable[tuple[int, np.ndarray]],
    times: Sequence[Fraction],
    expected: int | None = None,
) -> Iterator[np.ndarray]:
    """What is on screen at each of `times` (rising, in ticks): the last frame not after it.

    `frames` are (pts, picture) in order; before the first, the first shows. Raises `MediaError`
    if frames end early: less than 90 % of the `expected` number came although more were due.
    """
    shown: np.ndarray | None = None
    done = came = 0
    for pts, picture in frames:
        came += 1
        while shown is not None and done < len(times) and times[done] < pts:
            yield shown
            done += 1
        if done == len(times):
            return
        shown = picture
    if shown is None:
        raise MediaError("no frame of its span can be decoded")
    if expected is not None and came < 0.9 * expected:
        raise MediaError(f"only {came} of its {expected} frames can be decoded")
    for _ in range(done, len(times)):
        yield shown


def _fit(picture: np.ndarray, window: Window) -> np.ndarray:
    """Crop and resize one picture [H, W, 3] as its window says."""
    from unimodal.tokenize.vision.pixels import resize

    height, width = picture.shape[:2]
    if (width, height) != (window.clip["width"], window.clip["height"]):
        raise MediaError(
            f"it is {width}x{height} pixels now and was {window.clip['width']}x"
            f"{window.clip['height']}: it changed since unimodal curate, run that again"
        )
    if window.box is not None:
        x0, y0, x1, y1 = window.box
        picture = np.ascontiguousarray(picture[y0:y1, x0:x1])
    return resize(picture, window.size)


def _mended(unit: Unit, lost: Sequence[dict[str, str]]) -> bool:
    """Whether a clip that a finished unit had to leave out can be read now."""
    uris = {row["uri"] for row in lost} - {row["uri"] for row in unit.unfit}
    for uri in sorted(uris):
        clip = [window for window in unit.windows if window.clip["uri"] == uri]
        try:
            for _, same in groupby(clip, key=lambda w: w.clip["uid"]):
                todo = list(same)
                if todo[0].fps is None:
                    image_pixels(todo[0])
                else:
                    for _ in video_pixels(todo):
                        pass
            return True
        except (MediaError, OSError):
            continue
    return False


@contextmanager
def _exact_arithmetic() -> Iterator[None]:
    """fp32 as it is, the same way every time: no TF32 and no autotuning, which flip codes."""
    import torch

    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(
            enabled=True, benchmark=False, deterministic=True, allow_tf32=False
        ):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


def _batches(items: Any, size: int) -> Iterator[Any]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _lost(window: Window, error: Exception) -> dict[str, str]:
    reason = error.reason if isinstance(error, MediaError) else str(error)
    return {"uri": window.clip["uri"], "reason": reason}


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)
