"""Captions from a server that speaks OpenAI's protocol, as `vllm serve` and most others do.

Many requests are under way at a time on one thread. What may pass (429, 5xx, a connection that
breaks, an answer that is no answer) is repeated with growing waits; what will not (a wrong key, a
model that is not there) ends the run with one line; what speaks of one request (400) fails that.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import email.utils
import json
import os
import queue
import random
import threading
import time
from collections.abc import Coroutine
from typing import Any
from urllib.parse import urlsplit

from unimodal.pipeline.captioning.captioner import REFUSED, Answer, Ask, Failure
from unimodal.pipeline.captioning.settings import CaptionSettings
from unimodal.pipeline.errors import UnimodalError, UsageError, on_one_line

LARGEST = 8 << 20
"""Bytes of a response that are read."""
LONGEST_WAIT_S = 60.0
SERVER, NONSENSE = "server error", "no answer"
NO_COMPLETION = "the server's answer is no chat completion"


class _Passing(Exception):
    """What may be gone when the request is repeated."""

    def __init__(self, why: str, status: str, away: bool, wait_s: float | None = None) -> None:
        super().__init__(why)
        self.status = status  # of the request, if it is not gone
        self.away = away  # the server is not there, rather than at odds with this request
        self.wait_s = wait_s  # as the server says


class Endpoint:
    """A server; see `Captioner`."""

    def __init__(self, settings: CaptionSettings) -> None:
        self.in_flight = settings.in_flight
        self._settings = settings
        self._url = settings.url.rstrip("/") + "/chat/completions"
        named = settings.api_key_env
        self._key = os.environ.get(named, "").strip() if named else ""
        if not self._key.isprintable():
            raise UsageError(f"${settings.api_key_env} holds control characters: set it again")
        self._found: queue.Queue[tuple[str, Answer | Failure] | BaseException] = queue.Queue()
        self._failed: dict[str, float] = {}
        """When each request that is under way failed last."""
        self._heard = time.monotonic()  # of the last sign of life
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._session: Any = None
        self._run(self._open()).result()

    def submit(self, ask: Ask) -> None:
        """Send it."""
        self._run(self._answer(ask))

    def collect(self) -> list[tuple[str, Answer | Failure]]:
        """Wait for answers; raises `UnimodalError` if the server is gone, or will have none."""
        found = [self._found.get()]
        with contextlib.suppress(queue.Empty):
            while True:
                found.append(self._found.get_nowait())
        told = [item for item in found if not isinstance(item, BaseException)]
        for item in found:
            if isinstance(item, BaseException):
                if told:  # first what came before
                    self._found.put(item)
                    return told
                raise item
        return told

    def close(self) -> None:
        """End what is under way."""
        with contextlib.suppress(Exception):
            self._run(self._end()).result(timeout=10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)
        if not self._thread.is_alive():
            self._loop.close()

    def _run(self, work: Coroutine[Any, Any, None]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def _open(self) -> None:
        import aiohttp

        host = urlsplit(self._url).hostname or ""
        self._session = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=self._settings.timeout_s, sock_connect=30),
            connector=aiohttp.TCPConnector(limit=self.in_flight),
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            trust_env=host not in ("localhost", "127.0.0.1", "::1"),  # a proxy for others
        )

    async def _end(self) -> None:
        mine = asyncio.current_task()
        others = [task for task in asyncio.all_tasks() if task is not mine]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._session.close()

    async def _answer(self, ask: Ask) -> None:
        try:
            self._found.put((ask.key, await self._tried(ask)))
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            self._found.put(error)
        finally:
            self._failed.pop(ask.key, None)

    async def _tried(self, ask: Ask) -> Answer | Failure:
        """An answer, however often it takes; raises `UnimodalError` if the server is gone."""
        body = json.dumps(chat(ask, self._settings.model)).encode()
        repeats, since = 0, time.monotonic()
        while True:
            try:
                return await self._post(body, repeats)
            except _Passing as error:
                why, status, away, wait = str(error), error.status, error.away, error.wait_s
            # Others are answered, so it is this request; if nobody is, it is the server. What was
            # under way when a server went away fails beside others, and is not held against it.
            self._failed[ask.key] = time.monotonic()
            others = (at for key, at in self._failed.items() if key != ask.key)
            alone = self._heard > since and not any(at > self._heard for at in others)
            if repeats >= self._settings.retries and (alone or not away):
                return Failure(status, why, repeats)
            if time.monotonic() - max(since, self._heard) > self._settings.patience_s and away:
                raise UnimodalError(
                    f"{self._settings.url}: the server has given no answer for "
                    f"{self._settings.patience_s:g} s ({why}); what is done is kept: start it and "
                    "run the same command again"
                )
            if wait is None:
                growing = self._settings.backoff_s * 2 ** min(repeats, 16)
                # Some chance in it, or all that failed together would come back together.
                wait = min(LONGEST_WAIT_S, growing) * random.uniform(0.5, 1.0)
            repeats += 1
            await asyncio.sleep(wait)

    async def _post(self, body: bytes, repeats: int) -> Answer | Failure:
        import aiohttp

        headers = {"Content-Type": "application/json"}
        try:
            async with self._session.post(
                self._url, data=body, headers=headers, allow_redirects=False
            ) as response:
                data = await _read(response)
                status, after = response.status, response.headers.get("Retry-After")
        except TimeoutError as error:
            why = f"no answer within {self._settings.timeout_s:g} s"
            raise _Passing(why, SERVER, away=True) from error
        except (aiohttp.ClientError, OSError) as error:
            raise _Passing(on_one_line(error), SERVER, away=True) from error
        if status == 200:
            found = _parsed(data, repeats)
            self._heard = time.monotonic()
            return found
        told = f"HTTP {status}: {self._message(data)}"
        if status in (408, 425, 429) or status >= 500:
            raise _Passing(told, SERVER, status != 500, _seconds(after))
        if status in (400, 413, 422):
            self._heard = time.monotonic()
            return Failure(REFUSED, told, repeats)
        hint = {
            401: f"put a valid key into ${self._settings.api_key_env}",
            403: f"put a valid key into ${self._settings.api_key_env}",
            404: f"is it the right address, with /v1, and does it have {self._settings.model}?",
        }.get(status, "is it the right address?")
        raise UnimodalError(f"{self._settings.url}: {told}; {hint}")

    def _message(self, data: bytes) -> str:
        """What the server says is wrong, on one line and without our key."""
        text = data.decode("utf-8", "replace")
        try:
            found = json.loads(text)
            found = found.get("error", found)
            text = str(found.get("message", found) if isinstance(found, dict) else found)
        except (ValueError, AttributeError, RecursionError):
            pass
        if self._key:
            text = text.replace(self._key, "(key)")
        return " ".join(text.split())[:300] or "no reason given"


def chat(ask: Ask, model: str) -> dict[str, Any]:
    """The body of a chat completion with pictures."""
    pictures = [
        {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{_base64(jpeg)}"}}
        for jpeg in ask.frames
    ]
    content = [{"type": "text", "text": ask.before}, *pictures, {"type": "text", "text": ask.after}]
    body: dict[str, Any] = {
        "model": model,
        "messages": [
            {"role": "system", "content": ask.system},
            {"role": "user", "content": content},
        ],
        "max_tokens": ask.max_tokens,
        "temperature": ask.temperature,
        "top_p": ask.top_p,
        "seed": ask.seed,
    }
    if ask.schema is not None:
        schema = {"name": "captions", "schema": dict(ask.schema), "strict": True}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    return body


def _parsed(data: bytes, repeats: int) -> Answer:
    """The answer in a response; raises `_Passing` if there is none in it."""
    try:
        found = json.loads(data)
        choice = found["choices"][0]
        text = choice["message"]["content"]
        usage = found.get("usage") or {}
        if isinstance(text, list):
            text = "".join(part.get("text") or "" for part in text)
        read, written = (int(usage.get(k) or 0) for k in ("prompt_tokens", "completion_tokens"))
        finish = str(choice.get("finish_reason") or "stop")
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise _Passing(NO_COMPLETION, NONSENSE, away=False) from error
    if text is not None and not isinstance(text, str):
        raise _Passing(NO_COMPLETION, NONSENSE, away=False)
    return Answer(text or "", finish, read, written, repeats)


async def _read(response: Any) -> bytes:
    data = bytearray()
    async for chunk in response.content.iter_any():
        data += chunk
        if len(data) > LARGEST:
            raise _Passing(f"a response of more than {LARGEST} bytes", NONSENSE, away=False)
    return bytes(data)


def _seconds(after: str | None) -> float | None:
    """What a Retry-After header asks for: seconds, or a date."""
    if not after:
        return None
    try:
        wait = float(after)
    except ValueError:
        try:
            wait = email.utils.parsedate_to_datetime(after).timestamp() - time.time()
        except (ValueError, TypeError):
            return None
    return min(max(wait, 0.0), 300.0) if wait == wait else None


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
