"""The sampler as a local server: a page to draw on, and endpoints that OpenAI's clients know.

    page, clients -> Guard (who, from where, how much) -> endpoints -> Queue -> Sampler
                                                              events <-/

GET  /                        the page
GET  /v1/models               what is served, and (ours) what it can do and within which limits
POST /v1/images/generations   prompt -> pictures
POST /v1/images/edits         picture and instruction -> pictures
POST /v1/videos/generations   prompt -> clips (ours)
POST /v1/videos/extensions    clip -> the clip and what follows (ours)
POST /v1/chat/completions     text, pictures, clips -> text
GET  /health, /metrics        for whoever looks after it

With `stream` an answer is server-sent events. FastAPI and uvicorn are imported when a server is
made; they belong to the extra `serve`.
"""

# Annotations are values here, not strings: FastAPI reads them, and `Request` is imported late.

import ipaddress
import socket
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from unimodal.model import answers, tasks
from unimodal.model.asked import (
    ChatAsked,
    EditAsked,
    ExtendAsked,
    ImageAsked,
    Limits,
    Refused,
    VideoAsked,
    refusal,
)
from unimodal.model.guard import LOOPBACK, Guard, error_body
from unimodal.model.queue import Queue
from unimodal.pipeline.errors import UnimodalError, UsageError

if TYPE_CHECKING:
    from fastapi import FastAPI

    from unimodal.model.sample import Sampler

PAGE = Path(__file__).parent / "page"
FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
}


def application(
    sampler: "Sampler",
    limits: Limits = Limits(),
    name: str = "unimodal",
    key: str | None = None,
    hosts: Collection[str] | None = LOOPBACK,
    learned: Mapping[str, int] | None = None,
) -> "FastAPI":
    """The server's application (ASGI). Its queue is `application.state.queue`.

    `key` is what requests must bring (None: nothing); `hosts` are the names that it answers to
    (None: any). `learned` is what `records.learned` tells of the checkpoint.
    """
    from fastapi import FastAPI, Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse, PlainTextResponse, Response
    from starlette.exceptions import HTTPException

    queue = Queue(sampler, limits.waiting, sampler.batch)
    service = tasks.Service(sampler, limits, name, queue, learned)
    # FastAPI's own pages of documentation load their scripts from elsewhere.
    app = FastAPI(title="unimodal", docs_url=None, redoc_url=None)
    app.state.queue = queue
    app.add_middleware(Guard, upload=limits.upload, key=key, hosts=hosts)  # type: ignore[arg-type]

    for path, (file, kind) in FILES.items():
        app.get(path, include_in_schema=False)(_file((PAGE / file).read_bytes(), kind))

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> Response:
        body = error_body(str(error), error.kind, error.param, error.code)
        headers = {"retry-after": str(error.retry)} if error.retry else None
        return JSONResponse(body, error.status, headers)

    @app.exception_handler(UnimodalError)
    async def unusable(request: Request, error: UnimodalError) -> Response:
        return JSONResponse(error_body(str(error)), 400)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return await refused(request, refusal(error.errors()))

    @app.exception_handler(HTTPException)
    async def failed(request: Request, error: HTTPException) -> Response:
        said = {404: f"there is no {request.url.path} here", 405: "another method is needed"}
        message = said.get(error.status_code, str(error.detail))
        return JSONResponse(error_body(message), error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> Response:
        message = "the server failed; its log says more"
        return JSONResponse(error_body(message, "server_error"), 500)

    @app.get("/health")
    async def health() -> Response:
        body = {"status": "shutting down" if queue.closed else "ok"}
        return JSONResponse(body, 503 if queue.closed else 200)

    @app.get("/metrics")
    async def metrics() -> Response:
        values = {f"{name}_total": value for name, value in queue.counts.items()}
        values |= {"waiting": queue.waiting, "drawing": queue.drawing}
        lines = (f"unimodal_{name} {value}\n" for name, value in values.items())
        return PlainTextResponse("".join(lines), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [service.card()]}

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> dict[str, Any]:
        tasks.check_name(service, model)
        return service.card()

    @app.post("/v1/images/generations")
    async def images(asked: ImageAsked, request: Request) -> Response:
        return await answers.drawn(tasks.image_task(service, asked), asked.stream, request)

    @app.post("/v1/images/edits")
    async def edits(request: Request) -> Response:
        asked, files = await tasks.form_of(request, EditAsked, "image", limits)
        with service.seat() as seat:
            task = await tasks.edit_task(service, asked, files, seat, request)
            del files  # they may be large, and the task may wait
            return await answers.drawn(task, asked.stream, request)

    @app.post("/v1/videos/generations")
    async def videos(asked: VideoAsked, request: Request) -> Response:
        return await answers.drawn(tasks.video_task(service, asked), asked.stream, request)

    @app.post("/v1/videos/extensions")
    async def extensions(request: Request) -> Response:
        asked, files = await tasks.form_of(request, ExtendAsked, "video", limits)
        with service.seat() as seat:
            task = await tasks.extend_task(service, asked, files, seat, request)
            del files  # they may be large, and the task may wait
            return await answers.drawn(task, asked.stream, request)

    @app.post("/v1/chat/completions")
    async def chat(asked: ChatAsked, request: Request) -> Response:
        with service.seat() as seat:
            task = await tasks.chat_task(service, asked, seat, request)
            return await answers.said(task, asked, request)

    return app


def _file(data: bytes, kind: str) -> Callable[[], Any]:
    from fastapi.responses import Response

    async def file() -> Response:
        return Response(data, media_type=kind, headers={"cache-control": "no-cache"})

    return file


def check_installed() -> None:
    """Raise `UsageError` where the extra `serve` is missing."""
    from importlib.util import find_spec

    missing = [n for n in ("fastapi", "uvicorn", "python_multipart") if find_spec(n) is None]
    if missing:
        raise UsageError(
            f"unimodal serve needs {', '.join(missing)}: pip install 'unimodal[serve]'"
        )


def is_local(host: str) -> bool:
    """Whether only this machine reaches a server that listens on `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def name_of(checkpoint: str) -> str:
    """What a checkpoint is called: its directory, without the folder of a step in it."""
    from unimodal.model.checkpoint import find

    return find(Path(checkpoint))[0].resolve().name


def address(host: str, listener: socket.socket) -> str:
    """The URL of the page; that of a server on all addresses is this machine's own."""
    port = listener.getsockname()[1]
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{shown}:{port}/"


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens; raises `UsageError` where it cannot."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=128)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(
            f"{host}:{port} cannot be listened on ({reason}): choose another --port, or --port 0"
        ) from error


def run(app: "FastAPI", listener: socket.socket, say: Callable[[str], None]) -> None:
    """Serve until Ctrl-C or SIGTERM: the first lets finish what is being drawn and sends away
    what waits, the second leaves that as well, the third does not wait for clients."""
    import uvicorn

    queue: Queue = app.state.queue

    class Server(uvicorn.Server):
        asked_to_end = 0

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            self.asked_to_end += 1
            self.should_exit = True
            self.force_exit = self.asked_to_end > 2
            queue.close(abort=self.asked_to_end > 1)
            if queue.drawing:
                again = (
                    "" if self.asked_to_end > 1 else "; finishing what is drawn (again: at once)"
                )
                say(f"shutting down{again}")

    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=30,
        limit_concurrency=1000,
        lifespan="off",
    )
    try:
        Server(config).run(sockets=[listener])
    finally:
        queue.close(abort=True)
        queue.join(10)
