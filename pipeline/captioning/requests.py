"""From clips to questions: which pictures a model sees, and which span it speaks of.

Clips under `piece_s` are asked for once, with their keyframes; longer ones in equal pieces of half
to all of that, each with evenly spaced pictures of its own. All were stored by the shared decode.
"""

from __future__ import annotations

import queue
import tarfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from unimodal.pipeline.captioning.captioner import Ask
from unimodal.pipeline.captioning.prompt import Prompt
from unimodal.pipeline.captioning.settings import CaptionSettings
from unimodal.pipeline.clips import read_parquet
from unimodal.pipeline.errors import on_one_line
from unimodal.pipeline.frames import Clip, Sample, read_clip
from unimodal.pipeline.observers.keyframes import even
from unimodal.pipeline.stage import PartFiles


@dataclass(frozen=True)
class Request:
    """A clip, or a piece of a long one, and what a model is to see of it."""

    uid: str
    piece: int
    kind: str  # image | video
    start_s: float | None  # of a piece, from where the clip begins; None: all of the clip
    end_s: float | None
    seconds: float
    frames: tuple[bytes, ...] = ()
    times_s: tuple[float, ...] = ()  # of the frames, from where the piece begins
    problem: str = ""  # why there are no frames

    @property
    def key(self) -> tuple[str, int]:
        """Who it is."""
        return self.uid, self.piece


def spans(duration_s: float, piece_s: float) -> list[tuple[float, float]]:
    """The pieces of a clip that is described in several; none for one that is described whole.

    Those of a clip of at least `piece_s` are of equal length, from half of `piece_s` to below it.
    """
    if duration_s < piece_s:
        return []
    count = int(duration_s // piece_s) + 1
    return [(duration_s * i / count, duration_s * (i + 1) / count) for i in range(count)]


def count_of(row: Mapping[str, Any], settings: CaptionSettings) -> int:
    """Requests that a clip takes."""
    return len(spans(row.get("duration_s") or 0.0, settings.piece_s)) or 1


def requests_of(clip: Clip, settings: CaptionSettings) -> list[Request]:
    """The requests that a clip is described by."""
    row = clip.row
    begins, length = row.get("start_s") or 0.0, row.get("duration_s") or 0.0
    whole = Request(row["uid"], 0, row["kind"], None, None, length)
    found = []
    for piece, (start, end) in enumerate(spans(length, settings.piece_s)):
        inside = [s for s in clip.samples if start <= (s.time_s or 0.0) - begins < end]
        request = replace(whole, piece=piece, start_s=start, end_s=end, seconds=end - start)
        found.append(_with_frames(request, inside, begins + start, settings))
    if found:
        return found
    chosen = [s for s in clip.samples if s.keyframe] or list(clip.samples)
    return [_with_frames(whole, chosen, begins, settings)]


def without_frames(row: Mapping[str, Any], settings: CaptionSettings, why: str) -> list[Request]:
    """The requests of a clip whose pictures cannot be had."""
    found = requests_of(Clip(row, ()), settings)
    return [replace(request, frames=(), times_s=(), problem=why) for request in found]


def ask_of(request: Request, settings: CaptionSettings, prompt: Prompt, attempt: int) -> Ask:
    """The question that a model is asked at this attempt, 0 for the first."""
    json = settings.form == "json"
    return Ask(
        key=f"{request.uid}/{request.piece}/{attempt}",
        system=prompt.words["system"],
        before=prompt.before(request.kind, settings.form),
        frames=request.frames,
        after=prompt.after(request.kind, request.times_s, request.seconds),
        schema=prompt.schema(request.kind) if json and settings.guided else None,
        max_tokens=settings.max_tokens,
        temperature=settings.warmth(attempt),
        top_p=settings.top_p,
        seed=settings.seed + attempt,
    )


def requests_in(
    folder: Path,
    wanted: Mapping[str, Sequence[str]],
    done: Callable[[tuple[str, int]], bool],
    settings: CaptionSettings,
) -> Iterator[Request]:
    """Requests of the clips `wanted` (uids by part) that are not `done`, with their pictures.

    `folder` is the watch stage's. A clip whose pictures are missing is a request with a problem.
    """
    for part in sorted(wanted):
        files = PartFiles(folder, part)
        uids = set(wanted[part])
        rows = [row for row in read_parquet(files.rows).to_pylist() if row["uid"] in uids]
        rows = [
            row
            for row in sorted(rows, key=lambda row: row["uid"])
            if not all(done((row["uid"], i)) for i in range(count_of(row, settings)))
        ]
        try:
            tar = tarfile.open(files.frames) if rows else None  # noqa: SIM115 - closed below
        except (tarfile.TarError, OSError) as error:
            why = f"{files.frames.name} cannot be read ({on_one_line(error, 200)})"
            for row in rows:
                yield from (r for r in without_frames(row, settings, why) if not done(r.key))
            continue
        if tar is None:
            continue
        with tar:
            for row in rows:
                yield from (r for r in _read(tar, row, settings) if not done(r.key))


def prepared(requests: Iterable[Request], settings: CaptionSettings, ahead: int) -> Iterator[Any]:
    """The same requests, read and shrunk in threads while the model is at earlier ones."""
    waiting: queue.Queue[Any] = queue.Queue(maxsize=max(2, ahead))
    stop = threading.Event()

    def put(item: Any) -> None:
        while not stop.is_set():
            try:
                return waiting.put(item, timeout=0.2)
            except queue.Full:
                continue

    def produce() -> None:
        try:
            with ThreadPoolExecutor(4) as pool:
                for request in requests:
                    if stop.is_set():
                        return
                    put(pool.submit(_shrunk, request, settings.short_side))
            put(None)
        except BaseException as error:  # told where the requests are used
            put(error)

    threading.Thread(target=produce, daemon=True).start()
    try:
        while (item := waiting.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item.result()
    finally:
        stop.set()


def _read(tar: tarfile.TarFile, row: Mapping[str, Any], settings: CaptionSettings) -> list[Request]:
    try:
        return requests_of(read_clip(tar, row), settings)
    except (KeyError, tarfile.TarError, OSError) as error:
        why = f"a stored frame cannot be read ({on_one_line(error, 200)})"
        return without_frames(row, settings, why)


def _with_frames(
    request: Request, samples: Sequence[Sample], begins: float, settings: CaptionSettings
) -> Request:
    chosen = [samples[i] for i in even(len(samples), settings.frames)]
    if not chosen:
        return replace(request, problem="no picture of it was stored")
    if not all(s.jpeg.startswith(b"\xff\xd8") and s.jpeg.endswith(b"\xff\xd9") for s in chosen):
        return replace(request, problem="a stored frame is no whole JPEG")
    times = tuple(max(0.0, (sample.time_s or 0.0) - begins) for sample in chosen)
    return replace(request, frames=tuple(sample.jpeg for sample in chosen), times_s=times)


def _shrunk(request: Request, short_side: int | None) -> Request:
    if short_side is None or not request.frames:
        return request
    import cv2
    import numpy as np

    frames = []
    for jpeg in request.frames:
        picture = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR)
        if picture is None:
            return replace(request, frames=(), problem="a stored frame cannot be decoded")
        scale = short_side / min(picture.shape[:2])
        if scale < 1:
            size = [max(1, round(side * scale)) for side in picture.shape[1::-1]]
            small = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
            jpeg = cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()
        frames.append(jpeg)
    return replace(request, frames=tuple(frames))
