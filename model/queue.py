"""One thread owns the sampler; requests wait in a line, and those alike are drawn together.

    submit(job) -> [waiting ... ] -> the worker takes the first, and those behind it that may share
                                     its batch -> Sampler -> events to each job, until its last one

A job is told what happens to it from the worker's thread: `Waiting`, `Drawing`, `Rows` or `Words`,
and at the end one of `Done` and `Failed`. A cancelled job is told nothing more, and when nobody
waits for a batch any longer it is left at the next row.
"""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from unimodal.pipeline.errors import UnimodalError
from unimodal.pipeline.progress import Progress

if TYPE_CHECKING:
    from unimodal.model.sample import Sampler
    from unimodal.tokenize.vocabulary import Vocabulary

WRITING = ("describe", "ask", "write")
"""Methods that make texts."""
PAINTING = 0.25
"""Time that may go into painting pictures in the making, as a share of that between two."""
TOLD = 0.1
"""Seconds between two `Drawing` events of a job."""
RATE_OVER = 5.0
"""Seconds over which the rate is a mean, so that it tells of now."""


@dataclass(frozen=True)
class Waiting:
    """So many requests are before this one."""

    before: int


@dataclass(frozen=True)
class Drawing:
    """How far the batch is: free choices made and to be made (0: not known), and how fast."""

    done: int
    total: int
    rate: float  # choices a second
    left: float | None  # seconds


@dataclass(frozen=True)
class Rows:
    """One of the job's pictures so far, RGBA uint8 [H, W, 4]; what is not drawn is transparent."""

    copy: int
    pixels: np.ndarray
    share: float  # of the picture or clip that is drawn


@dataclass(frozen=True)
class Words:
    """The job's text so far."""

    text: str


@dataclass(frozen=True)
class Done:
    """What the sampler made of this job's item: pictures, clips, or a text."""

    made: Any
    ids: Sequence[int] | None = None
    """Of a text, as far as the backend told: all that were chosen, EOS too if it came."""


@dataclass(frozen=True)
class Failed:
    """Why there is no result. `UnimodalError`: the request was at fault."""

    error: Exception


Event = Waiting | Drawing | Rows | Words | Done | Failed


class Full(Exception):
    """The line is as long as it may be; `seconds` until it is worth asking again."""

    def __init__(self, seconds: int) -> None:
        super().__init__(f"the queue is full: ask again in {seconds} s")
        self.seconds = seconds


class Closed(Exception):
    """The server is shutting down."""


class _Left(Exception):
    """Raised out of the sampler: nobody waits for this batch any longer."""


@dataclass(eq=False)
class Job:
    """One call of a method of the sampler, with lists of one item.

    `items` is this job's own value of each list argument, `settings` are the arguments that a
    batch has in common: only jobs that have them equal share one. `sequences` are drawn of the
    item, of `shape` (T, H, W) in codes where that is known beforehand.
    """

    method: str
    items: Mapping[str, Any]
    settings: Mapping[str, Any]
    tell: Callable[[Event], None]
    sequences: int = 1
    shape: tuple[int, int, int] | None = None
    previews: bool = False  # whether somebody looks on while it is made
    cancelled: bool = field(default=False, init=False)
    ended: bool = field(default=False, init=False)

    def end(self, event: Done | Failed) -> None:
        """Tell the last event, unless nobody listens."""
        self.ended = True
        if not self.cancelled:
            self.tell(event)

    def shares(self, other: Job) -> bool:
        """Whether both may be one call of the sampler."""
        return (
            self.method == other.method
            and self.items.keys() == other.items.keys()
            and dict(self.settings) == dict(other.settings)
        )


class Seat:
    """A place in the line that is kept for a job that is still being made ready."""

    def __init__(self, queue: Queue) -> None:
        self._queue = queue
        self._kept = True

    def leave(self) -> None:
        """Give the place up. Harmless when it is taken or given up already."""
        with self._queue._changed:
            self._queue._kept -= self._kept
            self._kept = False

    def __enter__(self) -> Seat:
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()


class Queue:
    """The line and the thread that works it off."""

    def __init__(self, sampler: Sampler, waiting: int = 32, batch: int = 32) -> None:
        """`waiting`: jobs that may wait; `batch`: sequences that are drawn at once."""
        self.sampler = sampler
        self.limit = waiting
        self.batch = batch
        self.counts = {"requests": 0, "batches": 0, "failed": 0, "cancelled": 0, "choices": 0}
        self._waiting: list[Job] = []
        self._drawing: list[Job] = []
        self._kept = 0  # seats
        self._changed = threading.Condition()
        self._closed = self._aborted = False
        self._seconds = 5.0  # that a batch takes, a moving average
        self._thread = threading.Thread(target=self._work, name="sampler", daemon=True)
        self._thread.start()

    # --- asked from any thread ---------------------------------------------------------------

    def seat(self) -> Seat:
        """Keep a place in the line, before something costly is done for it; raises as `submit`."""
        with self._changed:
            self._check()
            self._kept += 1
            return Seat(self)

    def submit(self, job: Job, seat: Seat | None = None) -> None:
        """Put a job in the line, in the place that was kept; raises `Full` or `Closed`."""
        with self._changed:
            if seat is not None:
                seat.leave()
            self._check()
            self.counts["requests"] += 1
            job.tell(Waiting(len(self._waiting) + len(self._drawing)))
            self._waiting.append(job)
            self._changed.notify()

    def _check(self) -> None:
        if self._closed:
            raise Closed("the server is shutting down")
        taken = len(self._waiting) + self._kept
        if taken >= self.limit:
            raise Full(max(1, round(self._seconds * taken / 2)))

    def cancel(self, job: Job) -> None:
        """Forget a job, wherever it is. Harmless when it is done."""
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)
                self._positions()
            if not (job.cancelled or job.ended):
                self.counts["cancelled"] += 1
                job.cancelled = True

    @property
    def waiting(self) -> int:
        """Jobs in the line, without those that are being drawn."""
        return len(self._waiting)

    @property
    def drawing(self) -> int:
        """Jobs that are being drawn."""
        return sum(not job.cancelled for job in self._drawing)

    @property
    def closed(self) -> bool:
        return self._closed

    def close(self, abort: bool = False) -> None:
        """Take no more jobs and send those in the line away; what is being drawn is finished,
        or left as well with `abort`."""
        with self._changed:
            self._closed = True
            self._aborted = self._aborted or abort
            for job in self._waiting:
                job.end(Failed(Closed("the server is shutting down")))
            self._waiting.clear()
            self._changed.notify()

    def join(self, seconds: float | None = None) -> bool:
        """Wait for the worker to end after `close`; false if it has not."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    # --- the worker ----------------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._closed:
                    self._changed.wait()
                if not self._waiting:
                    return
                batch = self._drawing = self._take()
                self._positions()
            began = time.monotonic()
            self._run(batch)
            self._seconds += 0.3 * (time.monotonic() - began - self._seconds)
            with self._changed:
                self._drawing = []

    def _take(self) -> list[Job]:
        """The first of the line and those behind it that go into the same batch, out of it."""
        first = self._waiting[0]
        taken, room = [first], self.batch - first.sequences
        for job in self._waiting[1:]:
            if job.sequences <= room and job.shares(first):
                taken.append(job)
                room -= job.sequences
        self._waiting = [job for job in self._waiting if job not in taken]
        return taken

    def _positions(self) -> None:
        for place, job in enumerate(self._waiting):
            job.tell(Waiting(place + len(self._drawing)))

    def _run(self, batch: list[Job]) -> None:
        """Draw jobs together; where that fails, each on its own."""
        error = self._drawn(batch)
        if error is None:
            return
        if not isinstance(error, UnimodalError):  # one request must not end the server
            traceback.print_exception(error, file=sys.stderr)
        if len(batch) == 1:
            self._fail(batch, error)
            return
        # Its traceback holds what was being computed with: of no use, and memory may be short.
        del error
        _give_back_memory()
        for job in batch:
            self._run([job])

    def _drawn(self, batch: list[Job]) -> Exception | None:
        """Draw jobs together and tell them; what went wrong, if something did."""
        first = batch[0]
        view = _View(self, batch)
        merged = {name: [job.items[name] for job in batch] for name in first.items}
        self.counts["batches"] += 1
        try:
            view.check()
            method = getattr(self.sampler, first.method)
            made = method(**merged, **first.settings, progress=view, watch=view.watch)
        except _Left:
            if self._aborted:
                self._fail(batch, Closed("the server is shutting down"))
        except Exception as error:
            return error
        else:
            for place, (job, one) in enumerate(zip(batch, made, strict=True)):
                job.end(Done(one, view.ids.get(place)))
        return None

    def _fail(self, batch: Sequence[Job], error: Exception) -> None:
        for job in batch:
            self.counts["failed"] += not job.cancelled
            job.end(Failed(error))


class _View(Progress):
    """Looks on while a batch is drawn: tells its jobs, and leaves when nobody waits."""

    def __init__(self, queue: Queue, batch: Sequence[Job]) -> None:
        self.queue = queue
        self.batch = batch
        self.done = 0
        self.total = 0
        self.marks = [(time.monotonic(), 0)]  # times and choices made by then
        self.told = 0.0
        self.painted = self.cost = 0.0
        self.ids: dict[int, list[int]] = {}  # of texts, by number of the job
        self.warm = False

    def check(self) -> None:
        """Raise where nobody waits any longer."""
        if self.queue._aborted or all(job.cancelled for job in self.batch):
            raise _Left

    def begin(self, task: str, total: float, unit: str) -> None:
        self.check()
        # Texts end when they end: their total is only what they may have.
        self.total = 0 if self.batch[0].method in WRITING else int(total)

    def advance(self, task: str, amount: float = 1.0) -> None:
        self.check()

    def watch(self, done: Mapping[int, list[int]], steps: int) -> None:
        """What `Sampler` calls at each end of a row: ids so far of each draft."""
        self.check()
        self.done += steps
        self.queue.counts["choices"] += steps
        now = time.monotonic()
        self.marks.append((now, self.done))
        while len(self.marks) > 2 and now - self.marks[1][0] > RATE_OVER:
            self.marks.pop(0)
        if now - self.told >= TOLD:
            self.told = now
            event = self._pace(now)
            for job in self.batch:
                if not job.cancelled:
                    job.tell(event)
        if self.batch[0].method in WRITING:
            self.ids.update(done)
            self._say(done)
        elif now - self.painted >= self.cost / PAINTING:
            self._paint(done)

    def _pace(self, now: float) -> Drawing:
        (then, before) = self.marks[0]
        rate = (self.done - before) / max(now - then, 1e-6)
        left = (self.total - self.done) / rate if self.total and rate else None
        return Drawing(self.done, self.total, rate, left)

    def _lookers(self, done: Mapping[int, list[int]]) -> Iterator[tuple[Job, int, list[int]]]:
        """Those who look on at what is `done`: job, number of the copy, ids so far."""
        for draft, ids in done.items():
            place, copy = divmod(draft, self.batch[0].sequences)
            job = self.batch[place]
            if job.previews and not job.cancelled:
                yield job, copy, ids

    def _paint(self, done: Mapping[int, list[int]]) -> None:
        sampler = self.queue.sampler
        found = [
            (job, copy, newest)
            for job, copy, ids in self._lookers(done)
            if (newest := newest_rows(sampler.vocabulary, ids, job.shape)) is not None
        ]
        if not found:
            return
        began = time.monotonic()
        painted = sampler.canvas.pixels([codes[None] for _, _, (codes, _, _) in found], True)
        for (job, copy, (codes, height, share)), (pixels,) in zip(found, painted, strict=True):
            canvas = np.zeros(
                (pixels.shape[0] // len(codes) * height, pixels.shape[1], 4), np.uint8
            )
            canvas[: len(pixels), :, :3] = pixels
            canvas[: len(pixels), :, 3] = 255
            job.tell(Rows(copy, canvas, share))
        self.painted = time.monotonic()
        # The first time loads what is needed, and is no measure.
        self.cost = self.painted - began if self.warm else 0.0
        self.warm = True

    def _say(self, done: Mapping[int, list[int]]) -> None:
        for job, _, ids in self._lookers(done):
            job.tell(Words(self._text(ids)))

    def _text(self, ids: Sequence[int]) -> str:
        """Text so far, without a character that is half there."""
        vocabulary = self.queue.sampler.vocabulary
        text = vocabulary.text.decode([one for one in ids if one != vocabulary.eos])
        return text.rstrip("\N{REPLACEMENT CHARACTER}")


def _give_back_memory() -> None:
    """Free what a failed batch left behind, also what the device's allocator keeps."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def newest_rows(
    vocabulary: Vocabulary, ids: Sequence[int], shape: tuple[int, int, int] | None
) -> tuple[np.ndarray, int, float] | None:
    """Of a picture in the making, or of a clip's frame: codes [h, W], the rows it will have, and
    the share that is done of `shape` (T, H, W in codes). None before the first whole row.

    Below the newest row of a clip stand those of the frame before.
    """
    row = np.asarray(ids, np.int64)
    ends = np.flatnonzero(row == vocabulary.eol)
    width = int(vocabulary.is_vision(row[: ends[0]]).sum()) if len(ends) else 0
    if not width:
        return None
    codes = row[vocabulary.is_vision(row)] - vocabulary.vision_start
    rows = len(codes) // width
    height = rows if shape is None else shape[1] if shape[0] > 1 else max(shape[1], rows)
    grid = codes[: rows * width].reshape(rows, width)
    frame = (rows - 1) // height
    newest = grid[frame * height :]
    if frame and len(newest) < height:
        newest = np.concatenate([newest, grid[(frame - 1) * height + len(newest) : frame * height]])
    whole = rows if shape is None else shape[0] * height
    return newest, height, min(1.0, rows / whole)
