"""What the sampler made becomes an answer: JSON at the end, or server-sent events as it comes."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import secrets
import sys
import time
import traceback
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from unimodal.model import media
from unimodal.model.asked import ChatAsked, Refused
from unimodal.model.guard import error_body
from unimodal.model.queue import (
    Closed,
    Done,
    Drawing,
    Event,
    Failed,
    Full,
    Job,
    Rows,
    Waiting,
    Words,
)
from unimodal.model.tasks import POLL, Task, away
from unimodal.pipeline.errors import UnimodalError
from unimodal.tokenize.document import SPATIAL, TEMPORAL

if TYPE_CHECKING:
    from fastapi import Request

BREATH = 10.0
"""Seconds of silence in a stream after which a comment is sent, so that no proxy ends it."""
BEHIND = 8
"""Events that a slow reader may be behind before pictures in the making are left out."""


class _Feed:
    """The events of a job, brought from the worker's thread into the event loop."""

    def __init__(self, task: Task, previews: bool) -> None:
        self.loop = asyncio.get_running_loop()
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        self.queue = task.service.queue
        self.job = Job(
            task.method,
            task.items,
            task.settings,
            self._tell,
            task.n,
            task.shape,
            previews,
        )
        try:
            self.queue.submit(self.job, task.seat)
        except (Full, Closed) as error:
            raise away(error) from error

    def _tell(self, event: Event) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server has ended
            self.loop.call_soon_threadsafe(self._put, event)

    def _put(self, event: Event) -> None:
        if not isinstance(event, Rows | Words | Drawing) or self.events.qsize() < BEHIND:
            self.events.put_nowait(event)

    async def next(self, seconds: float) -> Event | None:
        """The next event, None if there is none for so long."""
        try:
            return await asyncio.wait_for(self.events.get(), seconds)
        except TimeoutError:
            return None

    def cancel(self) -> None:
        self.queue.cancel(self.job)


async def drawn(task: Task, stream: bool, request: Request) -> Any:
    """Draw, and answer with pictures or clips, at the end or as they come."""
    from fastapi.responses import JSONResponse

    if stream:
        feed = _Feed(task, task.partial != 0)
        return _stream(feed, _drawing_events(task, feed))
    done = await _made(_Feed(task, False), request)
    if done is None:
        return _gone()
    made = done.made
    files = await _files(task, made)
    data = [{"b64_json": base64.b64encode(file).decode()} for file in files]
    body = {"created": int(time.time()), "data": data, **_kept(task, made)}
    return JSONResponse(body | {"seed": task.seed, "usage": _usage(task, made)})


async def _made(feed: _Feed, request: Request) -> Done | None:
    """What was made in the end, None if the client has gone; raises what it failed with."""
    try:
        while True:
            event = await feed.next(POLL)
            if isinstance(event, Done):
                return event
            if isinstance(event, Failed):
                raise _failure(event.error)
            if event is None and await request.is_disconnected():
                return None
    finally:
        feed.cancel()


def _failure(error: Exception) -> Refused:
    if isinstance(error, UnimodalError):
        return Refused(str(error))
    if isinstance(error, Closed):
        return away(error)
    message = "the server failed; its log says more"
    return Refused(message, None, 500, "server_error")


async def _drawing_events(task: Task, feed: _Feed) -> AsyncIterator[bytes]:
    """A stream of pictures in the making, then the pictures."""
    from fastapi.concurrency import run_in_threadpool

    told = [0] * task.n
    while True:
        event = await feed.next(BREATH)
        if event is None:
            yield b": still here\n\n"
        elif isinstance(event, Waiting | Drawing):
            if task.progress:
                yield _sse(_pace(event))
        elif isinstance(event, Rows):
            number = told[event.copy]
            if task.partial is None or event.share * (task.partial + 1) >= number + 1:
                if task.partial is not None and number >= task.partial:
                    continue
                told[event.copy] += 1
                form = "webp" if task.form == "webp" else "png"
                file = await run_in_threadpool(media.picture, event.pixels, form)
                yield _sse(
                    {
                        "type": f"{task.event}.partial_image",
                        "b64_json": base64.b64encode(file).decode(),
                        "partial_image_index": number,
                        "index": event.copy,
                        "created_at": int(time.time()),
                        **_kept(task, [event.pixels]),
                        "output_format": form,
                    }
                )
        elif isinstance(event, Failed):
            yield _sse_error(event.error)
            return
        elif isinstance(event, Done):
            files = await _files(task, event.made)
            for copy, file in enumerate(files):
                yield _sse(
                    {
                        "type": f"{task.event}.completed",
                        "b64_json": base64.b64encode(file).decode(),
                        "index": copy,
                        "created_at": int(time.time()),
                        **_kept(task, event.made),
                        "seed": task.seed,
                        "usage": _usage(task, event.made),
                    }
                )
            return


def _pace(event: Waiting | Drawing) -> dict[str, Any]:
    if isinstance(event, Waiting):
        return {"type": "unimodal.queued", "before": event.before}
    return {
        "type": "unimodal.progress",
        "tokens": event.done,
        "total_tokens": event.total or None,
        "tokens_per_second": round(event.rate, 1),
        "seconds_left": None if event.left is None else round(event.left, 1),
    }


def _kept(task: Task, made: Sequence[np.ndarray]) -> dict[str, Any]:
    """What OpenAI's answers say of pictures."""
    height, width = made[0].shape[-3:-1]
    return {
        "background": "opaque",
        "output_format": task.form,
        "quality": "auto",
        "size": f"{width}x{height}",
    }


def _usage(task: Task, made: Sequence[np.ndarray]) -> dict[str, Any]:
    """Codes that were drawn, and tokens of the prompt."""
    one = made[0]
    frames = 1 if one.ndim == 3 else len(one) // TEMPORAL
    codes = frames * (one.shape[-3] // SPATIAL) * (one.shape[-2] // SPATIAL) * len(made)
    if task.method == "extend" and task.shape:
        codes = int(np.prod(task.shape)) * len(made)
    text = task.input_tokens
    return {
        "input_tokens": text,
        "input_tokens_details": {"text_tokens": text, "image_tokens": 0},
        "output_tokens": codes,
        "total_tokens": text + codes,
    }


async def _files(task: Task, made: Sequence[np.ndarray]) -> list[bytes]:
    """Pictures [H, W, 3] or clips [F, H, W, 3] as files, with what they were drawn from."""
    from fastapi.concurrency import run_in_threadpool

    def encode() -> list[bytes]:
        files = []
        for copy, pixels in enumerate(made):
            about = task.about | {"size": "x".join(map(str, pixels.shape[-3:-1])), "copy": copy}
            if task.fps is None:
                files.append(media.picture(pixels, task.form, about))
            else:
                files.append(media.clip(pixels, task.fps, task.form, about | {"fps": task.fps}))
        return files

    return await run_in_threadpool(encode)


async def said(task: Task, asked: ChatAsked, request: Request) -> Any:
    """Write, and answer with a message of a chat, at the end or as it comes."""
    from fastapi.responses import JSONResponse

    head = {
        "id": f"chatcmpl-{secrets.token_hex(12)}",
        "created": int(time.time()),
        "model": task.service.name,
    }
    if asked.stream:
        usage = bool((asked.stream_options or {}).get("include_usage"))
        feed = _Feed(task, True)
        return _stream(feed, _chat_events(task, feed, head, usage))
    done = await _made(_Feed(task, False), request)
    if done is None:
        return _gone()
    message = {"role": "assistant", "content": done.made, "refusal": None}
    choice = {
        "index": 0,
        "message": message,
        "finish_reason": _finish(task, done),
        "logprobs": None,
    }
    body = head | {"object": "chat.completion", "choices": [choice]}
    return JSONResponse(body | {"usage": _chat_usage(task, done)})


async def _chat_events(
    task: Task, feed: _Feed, head: dict[str, Any], usage: bool
) -> AsyncIterator[bytes]:
    def chunk(delta: dict[str, Any], finish: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
        body = head | {"object": "chat.completion.chunk", "choices": [choice]}
        return _sse(body)

    said = ""
    yield chunk({"role": "assistant", "content": ""})
    while True:
        event = await feed.next(BREATH)
        if event is None:
            yield b": still here\n\n"
        elif isinstance(event, Waiting | Drawing):
            if task.progress:
                yield _sse(_pace(event))
        elif isinstance(event, Failed):
            yield _sse_error(event.error)
            return
        elif isinstance(event, Words):
            if event.text.startswith(said) and event.text != said:
                yield chunk({"content": event.text[len(said) :]})
                said = event.text
        elif isinstance(event, Done):
            rest = event.made[len(said) :] if event.made.startswith(said) else ""
            if rest:
                yield chunk({"content": rest})
            yield chunk({}, _finish(task, event))
            if usage:
                whole = {"object": "chat.completion.chunk", "choices": []}
                yield _sse(head | whole | {"usage": _chat_usage(task, event)})
            yield b"data: [DONE]\n\n"
            return


def _finish(task: Task, done: Done) -> str:
    ids, eos = _ids(task, done), task.service.sampler.vocabulary.eos
    if done.ids is None:
        return "length" if len(ids) >= task.settings["max_tokens"] else "stop"
    return "stop" if eos in ids[-1:] else "length"


def _ids(task: Task, done: Done) -> Sequence[int]:
    """What was chosen, EOS too if it came; a guess where the backend did not tell."""
    return task.service.sampler.vocabulary.text.encode(done.made) if done.ids is None else done.ids


def _chat_usage(task: Task, done: Done) -> dict[str, int]:
    made, given = len(_ids(task, done)), task.input_tokens
    return {"prompt_tokens": given, "completion_tokens": made, "total_tokens": given + made}


def _sse(body: Mapping[str, Any]) -> bytes:
    """A server-sent event; OpenAI's chat has no event names, its pictures have."""
    name = f"event: {body['type']}\n" if "type" in body else ""
    return f"{name}data: {json.dumps(body)}\n\n".encode()


def _sse_error(error: Exception) -> bytes:
    refused = _failure(error)
    body = error_body(str(refused), refused.kind, refused.param, refused.code)
    return f"event: error\ndata: {json.dumps(body)}\n\n".encode()


def _stream(feed: _Feed, events: AsyncIterator[bytes]) -> Any:
    from fastapi.responses import StreamingResponse

    async def whole() -> AsyncIterator[bytes]:
        try:
            async for event in events:
                yield event
        except Exception as error:  # the status was sent long ago: it is told as an event
            traceback.print_exception(error, file=sys.stderr)
            yield _sse_error(error)

    class Stream(StreamingResponse):
        """Forgets its job however it ends; starlette ends it when the client goes."""

        async def __call__(self, *given: Any) -> None:
            try:
                await super().__call__(*given)
            finally:
                feed.cancel()

    return Stream(whole(), media_type="text/event-stream", headers={"x-accel-buffering": "no"})


def _gone() -> Any:
    from fastapi.responses import Response

    return Response(status_code=499)  # nobody reads it; logs do
