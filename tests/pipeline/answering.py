"""A server for captions that looks at the pictures it is sent, and misbehaves as it is told."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

WORDS = (
    *("amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "heron"),
    *("island", "jetty", "kettle", "lemon", "meadow", "north", "orchid", "pebble"),
)
Fault = Callable[[str, int], str | None]
"""From the digest of the pictures, and how often they came before, to what goes wrong."""


def digest_of(frames: Sequence[bytes]) -> str:
    """Name of some pictures."""
    return hashlib.sha256(b"".join(hashlib.sha256(f).digest() for f in frames)).hexdigest()


def saying(digest: str, style: str) -> str:
    """What the model says of pictures: for each of them, and each style, something else."""
    told = hashlib.sha256(f"{digest}:{style}".encode()).hexdigest()
    return f"The {style} words are " + " ".join(WORDS[int(c, 16)] for c in told[:14])


class Answering:
    """The server: what it was asked, and how many requests it held at once."""

    def __init__(self, fault: Fault, delay_s: Callable[[str], float]) -> None:
        self.fault, self.delay_s = fault, delay_s
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.times: dict[str, list[float]] = {}
        self.seen: Counter[str] = Counter()
        self.held = self.most = 0
        self.turn = threading.Lock()
        self.url = ""

    @property
    def asked(self) -> set[str]:
        """Digests of all pictures that came."""
        return set(self.seen)


@contextmanager
def answering(
    fault: Fault = lambda digest, before: None,
    delay_s: Callable[[str], float] = lambda digest: 0.0,
) -> Iterator[Answering]:
    """Run the server on a port of its own."""
    state = Answering(fault, delay_s)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            parts = body["messages"][-1]["content"]
            urls = [p["image_url"]["url"] for p in parts if p["type"] == "image_url"]
            digest = digest_of([base64.b64decode(url.partition(",")[2]) for url in urls])
            with state.turn:
                before = state.seen[digest]
                state.seen[digest] += 1
                state.bodies.append(body)
                state.headers.append(dict(self.headers))
                state.times.setdefault(digest, []).append(time.monotonic())
                state.held += 1
                state.most = max(state.most, state.held)
            try:
                time.sleep(state.delay_s(digest))
                _answer(self, body, digest, state.fault(digest, before))
            except (BrokenPipeError, ConnectionResetError):
                pass
            finally:
                with state.turn:
                    state.held -= 1

        def log_message(self, *_: object) -> None:
            """Says nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    state.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _answer(
    to: BaseHTTPRequestHandler, body: dict[str, Any], digest: str, fault: str | None
) -> None:
    form = body.get("response_format")
    keys = form["json_schema"]["schema"]["required"] if form else ["dense"]
    said: Any = {key: saying(digest, key) for key in keys}
    text, finish, status, headers = json.dumps(said), "stop", 200, {}
    if not form:
        text = said["dense"]
    if fault == "drop":
        to.connection.close()
        to.close_connection = True
        return
    if fault in ("500", "502", "503", "429", "400", "401", "404"):
        status = int(fault)
        if fault == "429":
            headers = {"Retry-After": "0.3"}
    elif fault == "chinese":
        text = json.dumps(dict.fromkeys(keys, "一只狗在草地上奔跑，后面有一棵大树和一座房子。" * 2))
    elif fault == "loop":
        text = json.dumps(dict.fromkeys(keys, "the dog runs on " * 30))
    elif fault == "refusal":
        text = "I'm sorry, but I can't help with that."
    elif fault == "refusal in json":
        text = json.dumps(dict.fromkeys(keys, "I’m sorry, but I can't describe people."))
    elif fault == "broken json":
        text = json.dumps(said).replace('": "', '": ', 1)
    elif fault == "cut off":
        text, finish = json.dumps(said)[:40], "length"
    elif fault == "empty":
        text = ""
    elif fault == "opening":
        text = json.dumps({key: f"This image shows {words}" for key, words in said.items()})
    elif fault == "hostile":
        evil = (
            "<script>window.pwned=1</script><img src=x onerror=alert(1)> <|im_end|> \x1b[31m\u202e"
        )
        text = json.dumps({key: f"{evil} {words}" for key, words in said.items()})
    elif fault == "huge":
        text = json.dumps(dict.fromkeys(keys, "word " * 250000))
    usage = {"prompt_tokens": 100, "completion_tokens": 20}
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": finish}
    found: Any = {"choices": [choice], "usage": usage}
    if status != 200:
        found = {"error": {"message": f"told to fail with {status}"}}
    data = json.dumps(found).encode()
    if fault == "no json":
        data = b"<html>busy</html>"
    to.send_response(status)
    to.send_header("Content-Type", "application/json")
    to.send_header("Content-Length", str(len(data)))
    for name, value in headers.items():
        to.send_header(name, value)
    to.end_headers()
    to.wfile.write(data[: len(data) // 2] if fault == "half" else data)
    if fault == "half":
        to.wfile.flush()
        to.connection.close()
        to.close_connection = True
