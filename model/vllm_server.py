"""A vLLM server, or several, as the sampler's backend.

    unimodal export model CHECKPOINT -o EXPORTED
    VLLM_USE_V2_MODEL_RUNNER=0 vllm serve EXPORTED --no-enable-chunked-prefill \\
        --logits-processors unimodal.model.vllm_processor:GuidedProcessor

    Sampler.load(CHECKPOINT, backend="http://localhost:8000")

All requests of a stretch go in one call of /v1/completions, as token ids, yet the server hands
them to its engine one after the other, and an idle engine begins with the first. So a stretch of
several rows is led by a request that is none of them: it ends at once, and while it is computed the
rows arrive and start together. Where they did not (PAD at once, see `unimodal.model.paired`), or
one was preempted, the draft goes on from the ids that it has: with the same noise, to the same
picture.
"""

from __future__ import annotations

import json
import secrets
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any
from urllib.parse import urlsplit

from unimodal.model.generate import Draft, Drawing, Watch
from unimodal.model.paired import ARGUMENT, OutOfStep, Writing
from unimodal.model.vllm import follow, uncalled
from unimodal.pipeline.errors import UnimodalError, UsageError
from unimodal.tokenize.vocabulary import Vocabulary


class VllmServer:
    """`unimodal.model.generate.Backend` by servers that hold the same model."""

    def __init__(
        self,
        urls: str | Sequence[str],
        vocabulary: Vocabulary,
        rows: int = 128,
        tries: int = 20,
        key: str | None = None,
        timeout: float = 3600.0,
    ) -> None:
        """`urls` such as http://localhost:8000, one for each server; drafts take turns.

        `rows`: requests that run at once in each, at most its --max-num-seqs. `tries`: how often
        a draft is sent that does not get on. `key`: the server's --api-key. `timeout`: seconds
        that a server may be silent.
        Raises `UsageError` for what is no address, and `UnimodalError` where no vLLM answers.
        """
        self.vocabulary = vocabulary
        self.rows, self.tries, self.timeout = rows, tries, timeout
        self.headers = {"Content-Type": "application/json"}
        if key is not None:
            self.headers["Authorization"] = f"Bearer {key}"
        self.servers = [_Server(self, url) for url in ([urls] if isinstance(urls, str) else urls)]

    def generate(
        self, drafts: Sequence[Draft], drawing: Drawing, watch: Watch | None = None
    ) -> list[list[int]]:
        """See `Backend`. Without `watch` ids come only when a stretch is whole, which spares the
        server the most."""
        writings = [Writing(draft, drawing, self.vocabulary) for draft in drafts]
        if not drafts:
            return []
        lock, over = threading.Lock(), threading.Event()

        def told(number: int, steps: int) -> None:
            if watch is not None:
                with lock:
                    if not over.is_set():
                        watch({number: writings[number].ids}, steps)

        def write(number: int) -> None:
            server = self.servers[number % len(self.servers)]
            try:
                server.write(number, writings[number], watch is not None, told, over)
            except BaseException:
                over.set()
                raise

        # Three rows at most, and the one that leads them.
        workers = max(1, self.rows // 4) * len(self.servers)
        with ThreadPoolExecutor(min(workers, len(drafts))) as pool:
            for future in [pool.submit(write, number) for number in range(len(drafts))]:
                future.result()
        return [writing.ids for writing in writings]


class _Server:
    """One of them."""

    def __init__(self, owner: VllmServer, url: str) -> None:
        self.owner, self.url = owner, url.rstrip("/")
        try:
            parts = urlsplit(self.url)
            host, port = parts.hostname, parts.port
        except ValueError:  # a port that is no number
            host = None
        if not host or parts.scheme not in ("http", "https"):
            raise UsageError(f"{url} is no address of a server: give http://HOST:PORT")
        self.secure, self.host, self.port = parts.scheme == "https", host, port
        self.path = parts.path
        with closing(self._connect()) as connection:
            answer = self._ask(connection, "GET", "/v1/models")
            try:
                model = json.loads(answer.read())["data"][0]
                self.model, self.context = str(model["id"]), int(model["max_model_len"])
            except (OSError, HTTPException, LookupError, TypeError, ValueError) as error:
                raise UnimodalError(
                    f"{self.url} is no vllm serve: its /v1/models names no model with a context"
                ) from error

    def write(
        self, number: int, writing: Writing, stream: bool, told: Any, over: threading.Event
    ) -> None:
        """One draft, stretch by stretch."""
        failed = 0
        while writing.rows and not over.is_set():
            before = len(writing.ids)
            try:
                self._stretch(number, writing, stream, told, over)
            except UnimodalError as error:
                failed = failed + 1 if len(writing.ids) == before else 0
                if not isinstance(error.__cause__, OutOfStep) or failed >= self.owner.tries:
                    raise

    def _stretch(
        self, number: int, writing: Writing, stream: bool, told: Any, over: threading.Event
    ) -> None:
        rows, prompts = writing.rows, writing.prompts()
        longest = max(map(len, prompts))
        if longest >= self.context:
            raise UsageError(
                f"draft {number} takes {longest} ids, {self.url} holds {self.context}: shorten it"
            )
        asked: dict[str, Any] = {
            "model": self.model,
            "prompt": prompts if rows == 1 else [[self.owner.vocabulary.bos], *prompts],
            "max_tokens": min(writing.most, self.context - longest),
            "temperature": 0,
            "stop_token_ids": [self.owner.vocabulary.pad],
            "ignore_eos": True,
            "add_special_tokens": False,
            "return_token_ids": True,
            "stream": stream,
            "vllm_xargs": {ARGUMENT: writing.stretch(secrets.token_hex(8)).json()},
        }
        first = len(asked["prompt"]) - rows
        ended = False
        with closing(self._connect()) as connection:
            answer = self._ask(connection, "POST", "/v1/completions", asked)
            for index, ids in _events(answer, stream):
                if over.is_set():
                    return
                if index != first:
                    continue
                known, choices = len(writing.ids), writing.course.choices
                for token in ids:
                    ended = follow(number, writing, token, rows)
                steps = writing.course.choices - choices
                writing.untold += steps
                # An id of text, or given ids too, as at the end of a row of codes.
                if steps and (len(writing.ids) > known + steps or not writing.course.walk.blind):
                    told(number, writing.untold)
                    writing.untold = 0
        if not ended and writing.rows:
            raise UnimodalError(uncalled(number))

    def _connect(self) -> HTTPConnection:
        kind = HTTPSConnection if self.secure else HTTPConnection
        return kind(self.host, self.port, timeout=self.owner.timeout)

    def _ask(
        self, connection: HTTPConnection, method: str, path: str, body: Any = None
    ) -> HTTPResponse:
        """The server's answer; raises `UnimodalError` with what it says otherwise."""
        try:
            sent = None if body is None else json.dumps(body)
            connection.request(method, self.path + path, sent, self.owner.headers)
            answer = connection.getresponse()
        except (OSError, HTTPException) as error:
            raise UnimodalError(
                f"{self.url} does not answer ({error}): start vllm serve there"
            ) from error
        if answer.status != 200:
            said = answer.read(4096).decode("utf-8", "replace")
            raise UnimodalError(f"{self.url}{path} answers {answer.status}: {said.strip()}")
        return answer


def _events(answer: HTTPResponse, stream: bool) -> Iterator[tuple[int, list[int]]]:
    """Number of a prompt, and ids that it has more."""
    try:
        if not stream:
            for choice in json.loads(answer.read())["choices"]:
                yield choice["index"], choice["token_ids"]
            return
        for line in answer:
            text = line.removeprefix(b"data:").strip()
            if not text or text == b"[DONE]" or not line.startswith(b"data:"):
                continue
            event = json.loads(text)
            if "error" in event:
                raise UnimodalError(f"the server ended with {event['error']}")
            for choice in event["choices"]:
                yield choice["index"], choice.get("token_ids") or []
    except (OSError, HTTPException, ValueError, KeyError, TypeError) as error:
        raise UnimodalError(f"the server's answer broke off ({error}): try again") from error
