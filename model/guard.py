"""What stands before the server: who may ask, from where, and how much may be sent.

A page of any site can send requests to a server on the visitor's own machine, and a name that is
made to point at 127.0.0.1 (DNS rebinding) even reads the answers. So on loopback only known names
are answered, and addresses, which nobody can point elsewhere; and what changes something must come
from our own page or from no page at all.
"""

from __future__ import annotations

import hmac
import ipaddress
import json
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any
from urllib.parse import urlsplit

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
"""Names of a server that only this machine reaches."""
DRAINED = 4
"""Times the limit that is read and thrown away of a body that is too large, so that whoever sends
it reads our answer and not a broken connection."""

SAFE = {"GET", "HEAD"}
OPEN = {"/", "/page.css", "/page.js", "/health"}
"""Paths that need no key: they tell nothing and do nothing."""

HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' blob: data:; media-src blob:; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}


def error_body(
    message: str, kind: str = "invalid_request_error", param: str | None = None, code: str = ""
) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code or None}}


class TooLarge(Exception):
    """A body went over the limit while it was read."""


class Guard:
    """The outermost layer of the application."""

    def __init__(
        self, app: App, upload: int, key: str | None = None, hosts: Collection[str] | None = None
    ) -> None:
        """`upload`: bytes of a body; `key`: what `Authorization: Bearer` must hold; `hosts`:
        names that are answered beside addresses, None for all."""
        self.app = app
        self.upload = upload
        self.key = key
        self.hosts = None if hosts is None else {name.lower() for name in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # life cycle; there are no websockets
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value for name, value in reversed(scope["headers"])}
        texts = {name: value.decode("latin-1") for name, value in headers.items()}
        refused = self._refused(scope["method"], scope["path"], texts)
        started = over = False
        seen, more = 0, True

        async def answer(message: MutableMapping[str, Any]) -> None:
            nonlocal started
            if over and not started:
                return  # what the application makes of half a body is not the answer
            if message["type"] == "http.response.start":
                started = True
                own = [(k.encode(), v.encode()) for k, v in HEADERS.items()]
                if not scope["path"].startswith("/page."):
                    own.append((b"cache-control", b"no-store"))
                message["headers"] = [*message.get("headers", ()), *own]
            await send(message)

        async def bounded() -> MutableMapping[str, Any]:
            nonlocal seen, over, more
            message = await receive()
            seen += len(message.get("body", b""))
            more = message.get("more_body", False)
            if seen > self.upload and not over:
                over = True
                raise TooLarge
            return message

        if refused is not None:
            await _refuse(answer, *refused)
            return
        size = texts.get("content-length", "")
        over = size.isdecimal() and int(size) > self.upload
        if not over:
            try:
                await self.app(scope, bounded, answer)
            except Exception:
                if not over or started:
                    raise
        if over and not started:
            while more and seen <= DRAINED * self.upload:
                await bounded()
            over = False
            body = error_body(f"the request is over {self.upload:,} bytes: send less")
            await _refuse(answer, 413, body)

    def _refused(
        self, method: str, path: str, headers: dict[str, str]
    ) -> tuple[int, dict[str, Any]] | None:
        """Status and body for a request that is not answered, else None."""
        host = headers.get("host", "").lower()
        name = _name(host)
        if not (self.hosts is None or name in self.hosts or _is_address(name)):
            shown = ", ".join(sorted(self.hosts or ()))
            return 403, error_body(f"this server answers to {shown}, not to {host or 'no name'}")
        if method not in SAFE:
            origin = headers.get("origin")
            if origin is not None and _place(origin) != host:
                return 403, error_body(f"requests of pages of {origin} are not answered")
            if headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
                return 403, error_body("requests of other sites' pages are not answered")
        if self.key is not None and path not in OPEN:
            scheme, _, given = headers.get("authorization", "").partition(" ")
            right = hmac.compare_digest(given.strip().encode("latin-1"), self.key.encode())
            if scheme.lower() != "bearer" or not right:
                message = "a key is needed: send it as Authorization: Bearer KEY"
                return 401, error_body(message, "authentication_error", code="invalid_api_key")
        return None


def _name(host: str) -> str:
    """A Host header without its port."""
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.partition(":")[0]


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    return True


def _place(origin: str) -> str | None:
    """Name and port of an Origin header, None if it has none that can be read."""
    try:
        return urlsplit(origin).netloc.lower() or None
    except ValueError:
        return None


async def _refuse(send: Send, status: int, body: dict[str, Any]) -> None:
    data = json.dumps(body).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(data))]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if status == 413:
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": data})
