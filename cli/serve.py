"""`unimodal serve`: a checkpoint as a page in the browser and as OpenAI-style endpoints."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from unimodal.cli import options


def serve(
    checkpoint: options.Checkpoint,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", help="0 takes a free one.", min=0, max=65535)
    ] = 8000,
    opened: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
    name: Annotated[
        str | None, typer.Option("--name", help="Of the model (default: the checkpoint's).")
    ] = None,
    key: Annotated[
        str | None,
        typer.Option(
            "--api-key",
            help="What requests must bring as a bearer token.",
            envvar="UNIMODAL_API_KEY",
            show_envvar=True,
        ),
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Listen beyond this machine without a key.")
    ] = False,
    names: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-host",
            help="Answer to this name, beside addresses and this machine's own; may be repeated.",
        ),
    ] = None,
    batch: Annotated[
        int | None, typer.Option("--batch", help="Pictures that are drawn at once.", min=1)
    ] = None,
    max_pixels: Annotated[int | None, typer.Option("--max-pixels", help="Of a picture.")] = None,
    max_frames: Annotated[int | None, typer.Option("--max-frames", help="Of a clip.")] = None,
    max_n: Annotated[int | None, typer.Option("--max-n", help="Pictures of one request.")] = None,
    max_prompt: Annotated[
        int | None, typer.Option("--max-prompt", help="Characters of a prompt.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", help="Of an answer.")] = None,
    max_upload: Annotated[
        int | None, typer.Option("--max-upload", help="Bytes of a request.")
    ] = None,
    max_decoded: Annotated[
        int | None, typer.Option("--max-decoded", help="Pixels of an uploaded picture.")
    ] = None,
    max_waiting: Annotated[
        int | None, typer.Option("--max-waiting", help="Requests in the queue.")
    ] = None,
    sets: options.Sets = None,
    device: options.Device = "auto",
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Offer a checkpoint as a page to draw on, and as OpenAI-style endpoints under /v1.

    Listens on this machine alone unless --host says otherwise. The address is printed when the
    server is ready; Ctrl-C ends it when what is being drawn is finished, twice at once. --set
    knows more: load.weights, load.tokenizer, load.kind, load.batch, load.compile as sample does,
    limits.media, limits.given, limits.volume, limits.seconds.
    """
    from unimodal.cli import console
    from unimodal.cli.prompts import LoadSettings
    from unimodal.model import serve as server
    from unimodal.model.asked import Limits
    from unimodal.model.guard import LOOPBACK
    from unimodal.pipeline.errors import UsageError
    from unimodal.pipeline.settings import Settings, build

    class ServeSettings(Settings):
        load: LoadSettings = LoadSettings()
        limits: Limits = Limits()

    given = {
        "pixels": max_pixels,
        "frames": max_frames,
        "pictures": max_n,
        "prompt": max_prompt,
        "tokens": max_tokens,
        "upload": max_upload,
        "decoded": max_decoded,
        "waiting": max_waiting,
    }
    given = {name: value for name, value in given.items() if value is not None}
    loaded = {} if batch is None else {"batch": batch}
    asked = build(ServeSettings, {"limits": given, "load": loaded}, sets=sets or [])
    load, limits = asked.load, asked.limits
    local = server.is_local(host)
    if not (local or key or insecure):
        raise UsageError(
            f"--host {host} lets others in: give --api-key KEY (or set UNIMODAL_API_KEY), "
            "or --insecure to serve whoever asks"
        )
    server.check_installed()
    source = console.from_stdin(checkpoint)
    listener = server.listening(host, port)  # before the weights are loaded: it may be taken
    from unimodal.model.checkpoint import find
    from unimodal.model.records import learned
    from unimodal.model.sample import Sampler
    from unimodal.tokenize.device import usable

    sampler = Sampler.load(
        *(source, usable(device), load.batch),
        weights=load.weights,
        compile=load.compile,
        tokenizer=load.tokenizer,
        kind=load.kind,
    )
    known = learned(find(Path(source))[0])
    hosts = [*LOOPBACK, host, *(names or [])] if local or names else None
    app = server.application(sampler, limits, name or server.name_of(source), key, hosts, known)
    url = server.address(host, listener)
    print(url, flush=True)

    def say(line: str) -> None:
        if not quiet:
            print(f"unimodal: {line}", file=sys.stderr, flush=True)

    say(f"open {url} in a browser; Ctrl-C ends")
    if opened:
        import webbrowser

        webbrowser.open(url + (f"#key={key}" if key else ""))
    server.run(app, listener, say)
