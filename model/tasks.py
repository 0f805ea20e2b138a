"""Requests become tasks: which method of the sampler, on what, and what is told of it.

ImageAsked, EditAsked, VideoAsked, ExtendAsked, ChatAsked  ->  Task  ->  `unimodal.model.answers`
"""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from pydantic import BaseModel, ValidationError

from unimodal.model import media
from unimodal.model.asked import (
    ChatAsked,
    EditAsked,
    ExtendAsked,
    ImageAsked,
    Limits,
    Refused,
    VideoAsked,
    conversation,
    data_url,
    refusal,
    size_of,
    within,
)
from unimodal.model.canvas import Canvas
from unimodal.model.queue import Closed, Full, Queue, Seat
from unimodal.pipeline.errors import MediaError, UnimodalError
from unimodal.tokenize.document import SPATIAL, TEMPORAL, block_length

if TYPE_CHECKING:
    from fastapi import Request

    from unimodal.model.sample import Sampler

SILENT = {
    *("model", "user", "stream", "progress", "partial_images", "response_format"),
    *("background", "moderation", "quality", "output_format", "size", "n"),
}
"""Fields that a file does not tell of: they change nothing in it, or are told otherwise."""

POLL = 0.25
"""Seconds between two looks whether the client is still there."""
DECODING = 2
"""Uploads that are decoded at once: each may take hundreds of megabytes for a moment."""

A = TypeVar("A", bound=BaseModel)


@dataclass
class Service:
    """What the endpoints share."""

    sampler: Sampler
    limits: Limits
    name: str
    queue: Queue
    learned: Mapping[str, int] | None = None
    """See `learned`."""
    began: int = field(default_factory=lambda: int(time.time()))
    decoding: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(DECODING))

    def seat(self) -> Seat:
        """A place in the queue, to be kept while uploads are read; raises `Refused`."""
        try:
            return self.queue.seat()
        except (Full, Closed) as error:
            raise away(error) from error

    @property
    def canvas(self) -> Canvas:
        return self.sampler.canvas

    def held(self, pixels: np.ndarray) -> tuple[int, int]:
        """(H, W) in codes of pixels [..., H, W, 3], as the sampler scales them."""
        kind = "video" if pixels.ndim == 4 else "image"
        height, width = self.canvas.scaled(pixels.shape[-3], pixels.shape[-2], kind)
        return height // SPATIAL, width // SPATIAL

    def abilities(self) -> dict[str, bool]:
        """What the checkpoint may have learned, by the media and tasks it was trained on."""
        still, moving = (bool(self.canvas.commonest(kind)) for kind in ("image", "video"))
        told = {} if self.learned is None else self.learned
        return {
            "images": still,
            "videos": moving,
            "extend": moving,
            "edit": still and bool(self.learned is None or told.get("edit")),
            "describe": still or moving,
            "ask": bool(self.learned is None or told.get("chat")),
        }

    def card(self) -> dict[str, Any]:
        """The model as /v1/models tells of it; what is ours stands under `unimodal`."""
        own = {
            "can": self.abilities(),
            "sizes": self._sizes("image"),
            "video_sizes": self._sizes("video"),
            "frames": self.canvas.seen,
            "fps": self.canvas.fps(None),
            "context": self.sampler.decoder.config.context,
            "defaults": self.sampler.defaults.model_dump(mode="json"),
            "limits": self.limits.model_dump(mode="json"),
            "checkpoint": getattr(self.sampler, "digest", None),
        }
        return {
            "id": self.name,
            "object": "model",
            "created": self.began,
            "owned_by": "unimodal",
            "unimodal": own,
        }

    def _sizes(self, kind: str) -> list[str]:
        """Sizes that were trained on, width x height, the most frequent first."""
        sizes = [g["size"] for g in self.canvas.grids if g["kind"] == kind]
        named = [f"{w * SPATIAL}x{h * SPATIAL}" for _, h, w in sizes if h and w]
        return list(dict.fromkeys(named))[:24]


def away(error: Full | Closed) -> Refused:
    """The answer to whom the queue does not take."""
    if isinstance(error, Full):
        return Refused(str(error), None, 429, "rate_limit_error", "queue_full", error.seconds)
    return Refused(str(error), None, 503, "server_error", "shutting_down")


@dataclass
class Task:
    """A request on its way: how it is drawn, told of, and what it is drawn from."""

    service: Service
    method: str
    items: dict[str, Any]
    settings: dict[str, Any]
    about: dict[str, Any]  # goes into every file
    event: str = ""  # OpenAI's name of a stream's events
    form: str = "png"
    fps: float | None = None  # of a clip
    shape: tuple[int, int, int] | None = None
    n: int = 1
    partial: int | None = None  # pictures in the making at most
    progress: bool = False
    seed: int = 0
    input_tokens: int = 0
    seat: Seat | None = None


def image_task(service: Service, asked: ImageAsked) -> Task:
    task = _drawn(service, asked, "images", "image_generation")
    size = size_of(asked.size, service.limits)
    task.items |= {"prompts": asked.prompt}
    task.settings |= {"size": size}
    task.shape = _held(service, size, "image")
    return task


async def edit_task(
    service: Service, asked: EditAsked, files: Sequence[bytes], seat: Seat, request: Request
) -> Task:
    if asked.negative is not None:
        raise Refused("an edit leads away from nothing: leave negative out", "negative")
    task = _drawn(service, asked, "edit", "image_edit")
    size = size_of(asked.size, service.limits)
    if len(files) != 1:
        raise Refused(f"one image is edited at a time, not {len(files)}", "image")
    held = _held(service, size, "image")
    take = media.Take(kind="image")
    picture, _ = await _read(service, files[0], "image", take, request)
    task.items.pop("negative")
    task.seat = seat
    task.items |= {"images": picture, "instructions": asked.prompt}
    task.settings |= {"size": size, "image_guidance": asked.image_guidance}
    if size is None:
        held = 1, *service.held(picture)
    task.shape = held
    return task


def video_task(service: Service, asked: VideoAsked) -> Task:
    task = _drawn(service, asked, "videos", "video_generation")
    size = size_of(asked.size, service.limits)
    task.fps = service.canvas.fps(asked.fps)
    task.items |= {"prompts": asked.prompt}
    task.settings |= {"size": size, "frames": asked.frames, "fps": task.fps}
    task.shape = _held(service, size, "video", asked.frames, task.fps)
    return task


async def extend_task(
    service: Service, asked: ExtendAsked, files: Sequence[bytes], seat: Seat, request: Request
) -> Task:
    task = _drawn(service, asked, "extend", "video_generation")
    if asked.size != "auto":
        raise Refused("a clip keeps its size", "size")
    if len(files) != 1:
        raise Refused(f"one video is continued at a time, not {len(files)}", "video")
    limits = service.limits
    take = media.Take(kind="video", whole=True, frames=limits.given, volume=limits.volume)
    given, task.fps = await _read(service, files[0], "video", take, request)
    task.seat = seat
    frames = asked.frames or service.canvas.grid(None, "video")[0] * TEMPORAL
    task.items |= {"clips": given, "prompts": asked.prompt}
    task.settings |= {"frames": frames, "fps": task.fps}
    task.shape = (frames // TEMPORAL, *service.held(given))
    return task


def _drawn(service: Service, asked: Any, method: str, event: str) -> Task:
    """A task with what all drawing has in common; raises `Refused`."""
    check_name(service, asked.model)
    _able(service, method)
    within(service.limits, asked)
    seed = secrets.randbits(31) if asked.seed is None else asked.seed
    settings = {"n": asked.n} | _chosen(asked)
    guidance = asked.guidance or service.sampler.defaults.guidance
    items = {"seed": seed, "guidance": guidance, "negative": asked.negative}
    told = asked.model_dump(exclude_none=True, exclude=SILENT)
    about = {"prompt": asked.prompt, "guidance": guidance} | told
    about |= {"seed": seed, "model": service.name}
    if digest := getattr(service.sampler, "digest", None):
        about["checkpoint"] = digest
    tokens = len(service.sampler.vocabulary.text.encode(asked.prompt))
    return Task(
        service,
        method,
        items,
        settings,
        about,
        event,
        asked.output_format,
        n=asked.n,
        partial=asked.partial_images,
        progress=asked.progress,
        seed=seed,
        input_tokens=tokens,
    )


def _chosen(asked: Any) -> dict[str, Any]:
    """How ids are to be chosen, as far as the request says."""
    return asked.model_dump(include={"temperature", "top_k", "top_p"}, exclude_none=True)


def check_name(service: Service, model: str | None) -> None:
    if model is not None and model != service.name:
        raise Refused(
            f"the model {model[:80]!r} is not served here: it is called {service.name!r}",
            "model",
            404,
            code="model_not_found",
        )


def _able(service: Service, ability: str) -> None:
    if not service.abilities()[ability]:
        doing = {
            "images": "draw pictures",
            "videos": "draw videos",
            "extend": "continue videos",
            "ask": "answer questions; a picture without text is described",
        }
        what = doing.get(ability, f"{ability} pictures")
        raise Refused(f"this checkpoint was not trained to {what}", code="not_supported")


def _held(
    service: Service,
    size: tuple[int, int] | None,
    kind: str,
    frames: int | None = None,
    fps: float | None = None,
) -> tuple[int, int, int]:
    """(T, H, W) in codes of what is asked for; raises `Refused` if the context cannot hold it."""
    sampler = service.sampler
    try:
        latent, height, width = service.canvas.grid(size, kind)
        latent = latent if frames is None else frames // TEMPORAL
        moving = (latent, fps) if kind == "video" else ()
        block = block_length(sampler.vocabulary, height, width, *moving)
    except UnimodalError as error:
        raise Refused(str(error), "size") from error
    shown = f"{width * SPATIAL}x{height * SPATIAL} pixels"
    if kind == "video":
        shown = f"{latent * TEMPORAL} frames of {shown}"
    if 1 + block > (held := sampler.decoder.config.context):
        raise Refused(
            f"{shown} take {block:,} tokens, the context of this checkpoint holds {held:,}: "
            "ask for a smaller size",
            "size" if frames is None else "frames",
        )
    return latent if kind == "video" else 1, height, width


async def _read(
    service: Service, data: bytes, param: str, take: media.Take, request: Request
) -> tuple[np.ndarray, float | None]:
    """A picture or clip that was sent, as the sampler scales it, and the rate of a clip.

    Few are read at once. Raises `Refused`, also if the client goes meanwhile.
    """
    from fastapi.concurrency import run_in_threadpool

    limits = service.limits
    take = replace(
        take,
        size=service.canvas.scaled,
        fps=service.canvas.fps(None),
        pixels=limits.decoded,
        seconds=limits.seconds,
    )
    stop = threading.Event()
    gone = Refused("the client has gone", param, 499)
    while True:  # for a turn
        try:
            await asyncio.wait_for(service.decoding.acquire(), POLL)
            break
        except TimeoutError:
            if await request.is_disconnected():
                raise gone from None
    work = asyncio.ensure_future(run_in_threadpool(media.read, data, take, stop.is_set))
    # The turn is over when the thread is, however this ends.
    work.add_done_callback(lambda _: service.decoding.release())
    try:
        while not (await asyncio.wait({work}, timeout=POLL))[0]:
            if await request.is_disconnected():
                stop.set()
        return work.result()
    except media.Stopped:
        raise gone from None
    except MediaError as error:
        reason = error.reason.replace("not a video that", "neither a picture nor a video that")
        raise Refused(f"{param}: {reason}", param) from error
    finally:
        stop.set()


async def form_of(
    request: Request, asked: type[A], field: str, limits: Limits
) -> tuple[A, list[bytes]]:
    """Fields and files of a multipart body; raises `Refused`."""
    from starlette.datastructures import UploadFile

    kind = request.headers.get("content-type", "")
    if not kind.startswith("multipart/form-data"):
        raise Refused("send a multipart/form-data body", status=415)
    async with request.form(max_files=limits.media, max_fields=64) as form:
        files: list[bytes] = []
        values: dict[str, Any] = {}
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                if name not in (field, f"{field}[]"):
                    raise Refused(f"a file {name[:40]} is not taken here: only {field}", name[:40])
                files.append(await value.read())
            else:
                values[name] = value
    if not files:
        raise Refused(f"{field} is missing: send it as a file", field)
    try:
        return asked.model_validate(values), files
    except ValidationError as error:
        raise refusal(error.errors()) from error


async def chat_task(service: Service, asked: ChatAsked, seat: Seat, request: Request) -> Task:
    """One picture and no word: a description; else an answer. Raises `Refused`."""
    check_name(service, asked.model)
    limits = service.limits
    limit = asked.max_completion_tokens or asked.max_tokens or min(256, limits.tokens)
    if limit > limits.tokens:
        raise Refused(f"max_tokens {limit} is over the limit of {limits.tokens}", "max_tokens")
    turns, urls = conversation(asked.messages, limits)
    describes = len(urls) == 1 and turns == [""]
    method = "describe" if describes else "ask"
    _able(service, method)
    # As many pictures of a clip as are looked at, and all at one rate: there is one for a chat.
    frames = service.canvas.seen or media.TAKEN
    take = media.Take(frames=frames, volume=limits.volume, steady=True)
    seen = [await _read(service, data_url(url), "messages", take, request) for url in urls]
    shown = [one for one, _ in seen]
    settings = {"max_tokens": limit} | _chosen(asked)
    if any(fps is not None for _, fps in seen):
        settings["fps"] = service.canvas.fps(None)
    items: dict[str, Any] = {"seed": asked.seed or 0}
    items |= {"images": shown[0]} if describes else {"media": shown, "questions": turns}
    return Task(
        service,
        method,
        items,
        settings,
        about={},
        progress=asked.progress,
        input_tokens=_asked_tokens(service, turns, shown),
        seat=seat,
    )


def _asked_tokens(service: Service, turns: Sequence[str], shown: Sequence[np.ndarray]) -> int:
    """Tokens of texts and media, without the chat's template."""
    vocabulary = service.sampler.vocabulary
    count = sum(len(vocabulary.text.encode(turn)) for turn in turns)
    for pixels in shown:
        span = (len(pixels) // TEMPORAL, service.canvas.fps(None)) if pixels.ndim == 4 else ()
        count += block_length(vocabulary, *service.held(pixels), *span)
    return count
