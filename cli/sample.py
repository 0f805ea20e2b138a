"""`unimodal sample`: a checkpoint and a prompt in; pictures, clips, words or documents out."""

from __future__ import annotations

import json as jsonlib
import sys
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unimodal.cli import options

if TYPE_CHECKING:
    from unimodal.cli.drawing import Output

ASKED, LOOKS, CHANCE = "What is asked", "What comes", "How it is chosen"


def sample(
    checkpoint: Annotated[
        str, typer.Argument(help="Checkpoint of unimodal train, a directory of Emu3, or '-'.")
    ],
    prompts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PROMPT…", help="What to draw, or to do to --edit; FILES of --describe, --ask."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Directory of results (default: samples; words: none)."),
    ] = None,
    describe: Annotated[
        list[str] | None,
        typer.Option(
            "--describe",
            metavar="FILE",
            help="Describe pictures or videos, or samples of shards: SHARDS#KEY.",
            rich_help_panel=ASKED,
        ),
    ] = None,
    ask: Annotated[
        str | None,
        typer.Option(
            "--ask",
            metavar="TEXT",
            help="A question about FILES: --ask TEXT FILE.",
            rich_help_panel=ASKED,
        ),
    ] = None,
    extend: Annotated[
        str | None,
        typer.Option(
            "--continue",
            metavar="FILE",
            help="Go on with a clip for --frames more.",
            rich_help_panel=ASKED,
        ),
    ] = None,
    edit: Annotated[
        str | None,
        typer.Option(
            "--edit",
            metavar="FILE",
            help='Change a picture as told: --edit FILE "make it red".',
            rich_help_panel=ASKED,
        ),
    ] = None,
    file: Annotated[
        str | None,
        typer.Option(
            "--prompts",
            metavar="FILE",
            help="Many at once: txt, jsonl, csv, parquet, or '-'; a document of words and "
            "pictures: json.",
            rich_help_panel=ASKED,
        ),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            "--size",
            metavar="HxW|free",
            help="Pixels (default: as trained); free: as the model writes it.",
            rich_help_panel=LOOKS,
        ),
    ] = None,
    ratio: Annotated[
        str | None,
        typer.Option(
            "--ratio", metavar="W:H", help="Width to height, of --area.", rich_help_panel=LOOKS
        ),
    ] = None,
    area: Annotated[
        int | None,
        typer.Option(
            "--area",
            metavar="PIXELS",
            help="Of a picture (default: as trained).",
            rich_help_panel=LOOKS,
        ),
    ] = None,
    frames: Annotated[
        int | None,
        typer.Option("--frames", help="A clip of so many, by fours.", rich_help_panel=LOOKS),
    ] = None,
    number: Annotated[
        int | None, typer.Option("-n", help="Copies of each.", rich_help_panel=LOOKS)
    ] = None,
    form: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="png, webp; of a clip mp4, gif, webp; text: words that follow the prompt.",
            rich_help_panel=LOOKS,
        ),
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(
            "--guidance", help="Classifier-free guidance; 1 is none.", rich_help_panel=CHANCE
        ),
    ] = None,
    negative: Annotated[
        str | None,
        typer.Option("--negative", help="What to lead away from.", rich_help_panel=CHANCE),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option("--temperature", help="Below 1 is bolder.", rich_help_panel=CHANCE),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option("--top-k", help="Only so many likeliest.", rich_help_panel=CHANCE),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option("--top-p", help="Only the likeliest of this share.", rich_help_panel=CHANCE),
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", help="Of every random choice.", rich_help_panel=CHANCE)
    ] = None,
    sets: options.Sets = None,
    stream: Annotated[
        bool, typer.Option("--stream", help="Pictures and words are seen as they grow.")
    ] = False,
    backend: Annotated[
        str, typer.Option("--backend", help="torch, vllm, or URL of a vllm serve.")
    ] = "torch",
    device: options.Device = "auto",
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Draw pictures and clips, go on with clips, edit, describe, answer, write.

    The same seed gives the same pictures, whatever else is drawn with them. Paths are printed as
    files are written, words as they are; results.jsonl in -o has a line for each. The same
    command again makes only what is missing. --set knows more: fps, image_guidance, max_tokens,
    overlap, images, plausible, text.*, load.weights, load.tokenizer, load.kind,
    load.batch, load.compile.
    """
    from unimodal.cli import console, drawing
    from unimodal.cli.live import Show
    from unimodal.cli.outputs import Folder
    from unimodal.cli.prompts import requests
    from unimodal.model.checkpoint import find
    from unimodal.model.sample import Sampler, check_backend, is_address
    from unimodal.pipeline.errors import UnimodalError, UsageError, harmless, shown
    from unimodal.tokenize.device import usable

    flags = {
        **{"describe": describe, "ask": ask, "continue": extend, "edit": edit},
        **{"size": size, "ratio": ratio, "area": area, "frames": frames, "n": number},
        **{"format": form, "guidance": guidance, "negative": negative, "seed": seed},
        **{"temperature": temperature, "top_k": top_k, "top_p": top_p},
    }
    if checkpoint == "-" and file == "-":
        raise UsageError("checkpoint and prompts cannot both come from stdin: name one of them")
    items, bad, load = requests(prompts or [], flags, sets or [], file)
    check_backend(backend, load.weights, load.compile)
    if file is None:
        drawing.check_inputs(items)
    source = Path(console.from_stdin(checkpoint))
    where = usable(device)
    find(source)
    words = all(item.request.writes_text for item in items)
    folder = Folder(out or Path("samples")) if out or not words else None
    for one in bad:
        print(shown(f"{one.where}: {one.reason}"), file=sys.stderr)
    with folder.held(console.progress(quiet)) if folder else nullcontext():
        told: dict[str, Any] = {"weights": load.weights, "tokenizer": load.tokenizer}
        told |= {"compile": load.compile, "kind": load.kind, "backend": backend}
        sampler = Sampler.load(source, where, load.batch, **told)
        voice = None
        if stream and words:
            voice = sys.stdout if sys.stdout.isatty() and not json else sys.stderr

        def report(output: Output, record: dict[str, Any], made: bool) -> None:
            path = {} if folder is None else {"path": str(folder.out / output.name)}
            if json:
                print(jsonlib.dumps({**path, **record}), flush=True)
            elif "text" in record:
                text = harmless(record["text"], "\n\t") if sys.stdout.isatty() else record["text"]
                print("" if made and voice is sys.stdout else text, flush=True)
            else:
                print(path["path"], flush=True)

        count = sum(item.request.n for item in items)
        with Show(count, quiet, stream, folder.out if folder else None, voice) as show:
            if (warned := drawing.warning(source, items)) is not None:
                show.note(warned)
            made_by: dict[str, Any] = {"backend": "vllm" if is_address(backend) else backend}
            made_by |= {"weights": load.weights, "kind": sampler.kind}
            studio = drawing.Studio(
                *(sampler, folder, show, report, made_by),
                together=1 if voice else drawing.sequences(load.batch, backend),
                alone=len(items) == 1 and file is None,
            )
            try:
                studio.run(items)
            except BaseException:
                with suppress(OSError, UnimodalError):  # what is there is put in order
                    drawing.finish(studio, bad, file is not None, columns=0)
                raise
            columns = number if number and number > 1 else 8
            sheet = drawing.finish(studio, bad, file is not None, columns)
    if sheet:
        print(jsonlib.dumps(sheet) if json else sheet["path"])
    if code := drawing.conclude(studio, items, bad, file is not None):
        raise typer.Exit(code)
