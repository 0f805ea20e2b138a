"""One unit of tokenizing: decode, crop, resize, encode, and write one shard.

    out/plan.arrow + (batch, row, window) -> plan.units -> pixels -> vision tokenizer -> shard
    stretches of files of documents       -> corpora.drafts -> assemble.documents ─┘

This runs in the worker processes of `unimodal.pipeline.engine`, by its name: `do_unit`. A worker
keeps the tokenizer from unit to unit, and decodes the next pictures while it encodes. A clip that
cannot be read is noted in the shard's own index; the rest goes on.
"""

from __future__ import annotations

import json
import math
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from itertools import chain, groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow as pa

from unimodal.pipeline.errors import MediaError, UnimodalError, full_disk, reason
from unimodal.pipeline.processors import processors
from unimodal.pipeline.tell import Tell
from unimodal.pipeline.worker import Job, Step
from unimodal.tokenize.assemble import STAGE, documents
from unimodal.tokenize.corpora import RowUnit
from unimodal.tokenize.device import out_of_memory, usable
from unimodal.tokenize.plan import (
    TEMPORAL,
    TokenizeSettings,
    Unit,
    Window,
    picture_count,
    score_columns,
    split_of,
    units,
    window_captions,
)
from unimodal.tokenize.shards import Sample, write_shard
from unimodal.tokenize.vocabulary import Vocabulary

if TYPE_CHECKING:
    import torch

PLAN = "plan.arrow"
"""The kept clips in the order of tokenizing; in the directory of shards while they are made."""
TICK_S = 5.0
"""How often a worker that encodes says that it is alive: a large batch takes minutes on a CPU."""

Picture = np.ndarray | Exception


class VisionTokenizer(Protocol):
    """What this stage needs of `unimodal.tokenize.vision.tokenizer.VisionTokenizer`."""

    @property
    def codebook_size(self) -> int: ...

    @property
    def spatial_factor(self) -> int: ...

    @property
    def digest(self) -> str: ...

    def encode(self, pixels: torch.Tensor, joint: bool = False) -> torch.Tensor:
        """float32 [B, T, 3, H, W] in [-1, 1] (T = 1: images) -> codes [B, T', H/8, W/8]."""
        ...

    def save(self, directory: Path) -> None: ...


@dataclass
class Setup:
    """What every unit of one run shares."""

    out: Path
    device: str
    header: dict[str, Any]
    settings: TokenizeSettings
    vocabulary: Vocabulary
    given: VisionTokenizer | None
    """Replaces the tokenizer's copy in `out`."""

    @classmethod
    def load(
        cls,
        out: Path,
        device: str,
        settings: Mapping[str, Any],
        tokenizer: VisionTokenizer | None = None,
    ) -> Setup:
        """Open the directory that is being written; the tokenizer is its own copy by default."""
        manifest = json.loads((out / "manifest.json").read_text())
        header = {k: manifest[k] for k in ("format", "vision_tokenizer", "vocabulary", "settings")}
        vocabulary = Vocabulary.load(out / "vocabulary")
        return cls(out, device, header, TokenizeSettings(**settings), vocabulary, tokenizer)

    @cached_property
    def tokenizer(self) -> VisionTokenizer:
        """Loaded when the first picture wants it: texts do without."""
        from unimodal.tokenize.vision.tokenizer import VisionTokenizer as Trained

        copy = self.out / "vision_tokenizer"
        tokenizer = self.given or Trained.load(copy, usable(self.device))
        if tokenizer.digest != self.header["vision_tokenizer"]["digest"]:
            raise UnimodalError(
                f"{copy} is not the one of the manifest: delete {self.out} and run the same "
                "command again"
            )
        return tokenizer

    @cached_property
    def clips(self) -> Any:  # pa.ipc.RecordBatchFileReader
        """The kept clips of a run, in order."""
        return pa.ipc.open_file(pa.OSFile(str(self.out / PLAN)))

    def unit(self, number: int, at: Sequence[int]) -> Unit:
        """Unit `number`, which begins at (batch of clips, row, window)."""
        batch, row, skip = at
        rest = (self.clips.get_batch(i) for i in range(batch + 1, self.clips.num_record_batches))
        clips = chain([self.clips.get_batch(batch).slice(row)], rest)
        factor = self.tokenizer.spatial_factor
        return next(units(clips, self.settings, self.vocabulary, factor, number, skip))


KEPT: dict[str, Setup] = {}
"""The setup of the latest run in this process, by a name that no other run has."""


def do_unit(job: Job, step: Step, poison: Mapping[str, str], tell: Tell) -> None:
    """Tokenize one unit and commit its shard; called by `unimodal.pipeline.worker`.

    Things that are told of are `<part>#<number of the clip in the unit>`. Raises `UnimodalError`
    if the run cannot go on (memory, disk); a clip that cannot be read raises nothing.
    """
    out, facts = Path(step.folder), step.settings
    with _alive(tell):
        import torch

    threads = job.threads or processors()
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # of each that encodes: see `Work.encode`
    try:
        with exact_arithmetic():
            if facts["run"] not in KEPT:
                KEPT.clear()
                with _alive(tell):
                    settings = facts["settings"]
                    KEPT[facts["run"]] = Setup.load(out, facts["device"], settings)
            setup = KEPT[facts["run"]]
            with _alive(tell):
                _ = facts["pictures"] and setup.tokenizer
            rows = "spans" in facts
            unit = RowUnit.of(facts) if rows else setup.unit(facts["number"], facts["at"])
            digest = unit.digest(setup.header)
            if digest != facts["digest"]:
                raise UnimodalError(
                    f"{out} is not planned as this run did: is another run at work in it? If not, "
                    "run the same command again"
                )
            ahead = 0 if job.one_by_one else min(threads, 8)
            encoders = 1 if facts["device"].startswith("cuda") else threads
            with ThreadPoolExecutor(encoders) as pool:
                work = Work(setup, job.part, poison, tell, ahead, pool, encoders)
                if isinstance(unit, RowUnit):
                    samples, lost = documents(work, unit)
                else:
                    samples, lost = work.samples(unit)
            header, scores = setup.header, facts["scores"]
            write_shard(out, unit.number, header, scores, digest, samples, lost)
    except OSError as error:
        raise full_disk(error, out) or error from error
    finally:
        torch.set_num_threads(before)


@dataclass
class Work:
    """What the clips of one unit share."""

    setup: Setup
    part: str
    poison: Mapping[str, str]
    tell: Tell
    threads: int
    """That decode ahead; 0: one clip after another, so that a culprit is known."""
    encoders: ThreadPoolExecutor
    most: int
    """Batches that are encoded at a time."""
    running: deque[Future[np.ndarray]] = field(default_factory=deque)

    def samples(self, unit: Unit) -> tuple[list[Sample], list[dict[str, str]]]:
        """Samples of a unit, and rows {uri, reason} of the clips that gave none."""
        samples: list[tuple[Window, Future[np.ndarray], int | slice]] = []
        lost = list(unit.unfit)
        # Images of one size share a batch; none is cropped, stretched or padded to fit one.
        images = sorted((w for w in unit.windows if w.fps is None), key=lambda w: (w.size, w.key))
        videos = [w for w in unit.windows if w.fps is not None]
        clips = [[window] for window in images]
        clips += [list(same) for _, same in groupby(videos, key=lambda w: w.clip["uid"])]
        # A file that killed a worker is not touched again, whichever clip of it did so.
        killers = {
            clips[k][0].clip["uri"]: self.poison[self.thing(k)]
            for k in range(len(clips))
            if self.thing(k) in self.poison
        }
        batch = self.setup.settings.batch
        pictures = self.pictures(clips[: len(images)], 0, killers, self.threads, 2 * batch)
        for _, same in groupby(images, key=lambda w: w.size):
            for some in _batches(list(same), batch):
                read: list[tuple[Window, np.ndarray]] = []
                for window in some:
                    got = next(pictures)
                    if isinstance(got, Exception):
                        lost.append({"uri": window.clip["uri"], "reason": reason(got)})
                    else:
                        read.append((window, got))
                if read:
                    codes = self.later(np.stack([pixels for _, pixels in read]))
                    samples += [(window, codes, i) for i, (window, _) in enumerate(read)]

        # The windows of a clip come out of one decoder, one after another.
        ahead = min(self.threads, 1)
        pictures = self.pictures(clips[len(images) :], len(images), killers, ahead, 2)
        for clip in clips[len(images) :]:
            whole: list[tuple[Window, Future[np.ndarray], int | slice]] = []
            failed: Exception | None = None
            for window in clip:
                got = next(pictures)
                if isinstance(got, Exception):
                    failed = failed or got
                elif failed is None:
                    # Groups of 4 pictures are encoded each by itself, so they share batches too.
                    joint = self.setup.settings.joint
                    step = len(got) if joint else TEMPORAL
                    codes = self.later(got.reshape(-1, step, *got.shape[1:]), joint)
                    whole.append((window, codes, slice(None)))
            if failed is None:
                samples += whole
            else:
                lost.append({"uri": clip[0].clip["uri"], "reason": reason(failed)})
        for k in range(len(clips), len(clips) + len(unit.unfit)):
            self.tell.done(STAGE, self.thing(k), "")
        done = [(w, codes.result()[i].reshape(-1, *w.grid)) for w, codes, i in samples]
        return [self.sample(window, codes) for window, codes in done], lost

    def give_up(self, error: BaseException) -> None:
        """Raise what ends the run, if `error` is such and not one file's."""
        if isinstance(error, OSError) and (full := full_disk(error, "the folder of TMPDIR")):
            raise full
        if isinstance(error, MemoryError):
            raise UnimodalError(
                "out of memory while decoding pictures: lower --workers, or batch (now "
                f"{self.setup.settings.batch})"
            ) from error
        if not isinstance(error, Exception):
            raise error

    def thing(self, k: int) -> str:
        """The name by which the supervisor knows clip `k` of the unit."""
        return f"{self.part}#{k}"

    def pictures(
        self,
        clips: Sequence[list[Window]],
        first: int,
        killers: Mapping[str, str],
        threads: int,
        depth: int,
    ) -> Iterator[Picture]:
        """Pictures of each window of each clip in order, or why there are none.

        `threads` decode up to `depth` windows ahead of the one that is asked for.
        """
        waiting: deque[tuple[int, bool, Future[Picture]]] = deque()
        failed: dict[int, str] = {}

        def settle() -> Picture:
            k, last, future = waiting.popleft()
            self.tell.begin(STAGE, self.thing(k))
            got = future.result()
            if isinstance(got, Exception):
                self.give_up(got)
                failed.setdefault(k, reason(got))
            if last or k in failed:
                self.tell.done(STAGE, self.thing(k), failed.get(k, ""))
            return got

        with ThreadPoolExecutor(max(1, threads)) as pool:
            for k, clip in enumerate(clips, first):
                stream = self.stream(clip, killers.get(clip[0].clip["uri"], ""))
                for window in clip:
                    self.tell.begin(STAGE, self.thing(k))
                    waiting.append((k, window is clip[-1], pool.submit(_next, stream)))
                    if len(waiting) > (depth if threads else 0):
                        yield settle()
            while waiting:
                yield settle()

    def stream(self, clip: Sequence[Window], killer: str) -> Iterator[np.ndarray]:
        """uint8 [1, H, W, 3] of an image, or [F, H, W, 3] of each window of a video."""
        if killer:
            raise MediaError(killer)

        def tick(count: int) -> None:
            self.tell.seconds(0.0)

        if clip[0].fps is None:
            yield image_pixels(clip[0], tick)[None]
        else:
            yield from video_pixels(clip, tick)

    def later(self, pictures: np.ndarray, joint: bool = False) -> Future[np.ndarray]:
        """`encode`, by the next processor that is free; waits while all are at work."""
        while len(self.running) >= self.most:
            self.running.popleft().result()
        self.running.append(self.encoders.submit(self.encode, pictures, joint))
        return self.running[-1]

    def encode(self, pictures: np.ndarray, joint: bool = False) -> np.ndarray:
        """uint8 [N, T, H, W, 3] -> codes int32 [N, T', H/8, W/8]; T = 1 is an image.

        In float32 and contiguous: channels-last pixels flip about one code in 4096. On one
        processor: sums in another number of parts differ in the last bits, which may be another
        code, and a worker's share of processors is no part of what a shard is made of.
        """
        import torch

        from unimodal.tokenize.vision.pixels import to_pixels

        settings, tokenizer = self.setup.settings, self.setup.tokenizer
        size = "max_area" if settings.area is None else "area"
        size += f" (now {pictures.shape[2] * pictures.shape[3]} pixels)"
        codes = []
        with (
            _alive(self.tell),
            out_of_memory(f"batch (now {settings.batch}) or {size}"),
            torch.inference_mode(),
        ):
            for batch in _batches(pictures, settings.batch):
                pixels = to_pixels(batch)
                found = tokenizer.encode(pixels, joint=True) if joint else tokenizer.encode(pixels)
                codes.append(found.int().cpu().numpy())
        return np.concatenate(codes)

    def sample(self, window: Window, codes: np.ndarray) -> Sample:
        """The window with its codes [T, H/8, W/8] and everything that is known of its clip."""
        clip, setup = window.clip, self.setup
        start, end = window.span()
        captions = [
            {**caption, "tokens": len(setup.vocabulary.text.encode(caption["text"]))}
            for caption in window_captions(window)
        ]
        return Sample(
            key=window.key,
            uid=clip["uid"],
            kind=clip["kind"],
            codes=codes,
            split=split_of(clip["source_sha256"], setup.settings.val_fraction),
            source_sha256=clip["source_sha256"],
            fps=None if window.fps is None else float(window.fps),
            start_s=start,
            end_s=end,
            captions=captions,
            scores={name: _finite(clip[name]) for name in score_columns(setup.clips.schema)},
            meta=dict(clip.get("meta") or []),
        )


def image_pixels(window: Window, tick: Any = None) -> np.ndarray:
    """The image of a window, cropped and resized: uint8 RGB [H, W, 3]. Raises `MediaError`.

    `tick` is told of the bytes of what has to be fetched first.
    """
    from unimodal.pipeline import fetch
    from unimodal.pipeline.media import read_image

    with fetch.local(window.clip["uri"], keep=True, tick=tick) as path:
        return fit(read_image(path), window)


def video_pixels(windows: Sequence[Window], tick: Any = None) -> Iterator[np.ndarray]:
    """Pictures of the windows of one clip, one window after another: uint8 RGB [F, H, W, 3].

    The clip is decoded once, front to back. Raises `MediaError`. `tick` is told of progress that
    gives no picture.
    """
    from unimodal.pipeline.media import iter_frames

    clip, fps = windows[0].clip, windows[0].fps
    assert fps is not None
    ticks = 1 / Fraction(clip["time_base"]) / fps
    last_one = picture_count(clip, fps) - 1  # a clip of fewer than four pictures repeats it
    times = [
        clip["start_pts"] + min(window.first + i, last_one) * ticks
        for window in windows
        for i in range(window.pictures)
    ]
    frames = iter_frames(clip["uri"], clip["start_pts"], clip["end_pts"], tick=tick)

    def watched() -> Iterator[tuple[int, np.ndarray]]:
        for frame in frames:
            if tick is not None:  # most may lie between the pictures that are wanted
                tick(1)
            yield frame

    shown = resample(watched(), times, clip.get("frames"))
    for window in windows:
        pictures = np.empty((window.pictures, *window.size, 3), np.uint8)
        last: np.ndarray | None = None
        for i in range(window.pictures):
            frame = next(shown)
            # A slow video shows a frame more than once; it is resized once.
            pictures[i] = pictures[i - 1] if frame is last and i else fit(frame, window)
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


def fit(picture: np.ndarray, window: Window) -> np.ndarray:
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


def _next(stream: Iterator[np.ndarray]) -> Picture:
    """The next of a stream; what it raises comes out as a value, as it does between threads."""
    try:
        return next(stream)
    except Exception as error:
        return error


@contextmanager
def _alive(tell: Tell) -> Iterator[None]:
    """Say now and then that work goes on, in which no file has a part."""
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(TICK_S):
            tell.seconds(0.0)

    heart = threading.Thread(target=beat, daemon=True)
    heart.start()
    try:
        yield
    finally:
        stop.set()
        heart.join()


@contextmanager
def exact_arithmetic() -> Iterator[None]:
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


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)
