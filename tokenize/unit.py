"""One unit of tokenizing: read ahead, encode, and write one shard.

    out/plan.arrow + (batch, row, window) -> plan.units     -> assemble.clips     -> shard
    stretches of files of documents       -> corpora.drafts -> assemble.documents ─┘

This runs in the worker processes of `unimodal.pipeline.engine`, by its name: `do_unit`. A worker
keeps the tokenizer from unit to unit, and decodes the next pictures while it encodes. A clip that
cannot be read is noted in the shard's own index; the rest goes on.
"""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
import pyarrow as pa

from unimodal.pipeline.errors import UnimodalError, full_disk, reason
from unimodal.pipeline.processors import processors
from unimodal.pipeline.tell import Tell
from unimodal.pipeline.worker import Job, Step
from unimodal.tokenize import shards
from unimodal.tokenize.assemble import STAGE, clips, documents
from unimodal.tokenize.corpora import RowUnit
from unimodal.tokenize.device import out_of_memory, usable
from unimodal.tokenize.document import TEMPORAL
from unimodal.tokenize.plan import TokenizeSettings, Unit, units
from unimodal.tokenize.shard import write_shard
from unimodal.tokenize.vocabulary import Vocabulary

if TYPE_CHECKING:
    import torch

PLAN = "plan.arrow"
"""The kept clips in the order of tokenizing; in the directory of shards while they are made."""
TICK_S = 5.0
"""How often a worker that encodes says that it is alive: a large batch takes minutes on a CPU."""

HELD = 8
"""Batches of images that may wait for others of their size."""

T = TypeVar("T")
Codes = Callable[[], np.ndarray]
"""Gives codes once they are made."""


class VisionTokenizer(shards.VisionTokenizer, Protocol):
    """What this stage needs of `unimodal.tokenize.vision.tokenizer.VisionTokenizer`."""

    def encode(self, pixels: torch.Tensor, joint: bool = False) -> torch.Tensor:
        """float32 [B, T, 3, H, W] in [-1, 1] (T = 1: images) -> codes [B, T', H/8, W/8]."""
        ...


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
        header = {name: manifest[name] for name in shards.HEADER}
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
            with _alive(tell):
                if facts["run"] not in KEPT:
                    KEPT.clear()
                    KEPT[facts["run"]] = Setup.load(out, facts["device"], facts["settings"])
                setup = KEPT[facts["run"]]
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
                    samples, lost = clips(work, unit)
            header, scores = setup.header, facts["scores"]
            write_shard(out, unit.number, header, scores, digest, samples, lost)
    except OSError as error:
        raise full_disk(error, out) or error from error
    finally:
        torch.set_num_threads(before)


@dataclass
class Work:
    """What the clips or rows of one unit share."""

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
    open: dict[tuple[int, ...], tuple[list[np.ndarray], list[Future[np.ndarray]]]] = field(
        default_factory=dict
    )
    """Images of each size that wait, and where the future of their codes will be."""

    def give_up(self, error: Exception) -> None:
        """Raise what ends the run, if `error` is such and not one file's."""
        if isinstance(error, OSError) and (full := full_disk(error, "the folder of TMPDIR")):
            raise full
        if isinstance(error, MemoryError):
            raise UnimodalError(
                "out of memory while decoding pictures: lower --workers, or batch (now "
                f"{self.setup.settings.batch})"
            ) from error

    def thing(self, k: int) -> str:
        """The name by which the supervisor knows clip or row `k` of the unit."""
        return f"{self.part}#{k}"

    def tick(self, _: int) -> None:
        """Work goes on."""
        self.tell.seconds(0.0)

    def ahead(
        self, reads: Iterable[Sequence[Callable[[], T]]], first: int, threads: int, depth: int
    ) -> Iterator[T | Exception]:
        """What each read of each thing gives, in order, or why it gives nothing.

        The things are known as numbers `first` and following. `threads` read up to `depth` ahead
        of what is asked for.
        """
        waiting: deque[tuple[int, bool, Future[T | Exception]]] = deque()
        failed: dict[int, str] = {}

        def settle() -> T | Exception:
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
            for k, parts in enumerate(reads, first):
                for number, read in enumerate(parts, 1):
                    self.tell.begin(STAGE, self.thing(k))
                    waiting.append((k, number == len(parts), pool.submit(_caught, read)))
                    if len(waiting) > (depth if threads else 0):
                        yield settle()
            while waiting:
                yield settle()

    def image(self, pixels: np.ndarray) -> Codes:
        """Codes [1, H/8, W/8] of an image, uint8 [1, H, W, 3], which waits for others of its size.

        Images of one size share a batch; none is cropped, stretched or padded to fit one.
        """
        batch = self.setup.settings.batch
        waiting, coming = self.open.setdefault(pixels.shape, ([], []))
        place = len(waiting)
        waiting.append(pixels)
        if len(waiting) == batch:
            self.close(pixels.shape)
        elif sum(len(images) for images, _ in self.open.values()) >= HELD * batch:
            self.close(max(self.open, key=lambda size: len(self.open[size][0])))
        return lambda: coming[0].result()[place]

    def close(self, *sizes: tuple[int, ...]) -> None:
        """Encode what waits, of these sizes."""
        for size in sizes:
            images, coming = self.open.pop(size)
            coming.append(self.later(np.stack(images)))

    def film(self, pixels: np.ndarray) -> Codes:
        """Codes [1 or T, T' or 1, H/8, W/8] of a window of a video, uint8 [F, H, W, 3]."""
        joint = self.setup.settings.joint
        # Groups of 4 pictures are encoded each by itself, so they share batches.
        groups = pixels.reshape(-1, len(pixels) if joint else TEMPORAL, *pixels.shape[1:])
        return self.later(groups, joint).result

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
            for start in range(0, len(pictures), settings.batch):
                pixels = to_pixels(pictures[start : start + settings.batch])
                found = tokenizer.encode(pixels, joint=True) if joint else tokenizer.encode(pixels)
                codes.append(found.int().cpu().numpy())
        return np.concatenate(codes)


def _caught(read: Callable[[], T]) -> T | Exception:
    """What a read gives or raises; `StopIteration` cannot come out of a future."""
    try:
        return read()
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
