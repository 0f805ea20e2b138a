"""The `unimodal` command. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import Annotated, NoReturn

import typer

from unimodal.cli import (
    curate,
    demo,
    doctor,
    export,
    inspect,
    prefer,
    sample,
    serve,
    stages,
    tokenize,
    train,
    train_tokenizer,
    why,
)
from unimodal.cli import eval as evaluation

app = typer.Typer(
    name="unimodal",
    epilog="The road: curate, tokenize, train, sample. "
    "Each command prints the path of what it made, and reads such a path from '-'.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"unimodal {version('unimodal')}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", callback=_version, is_eager=True),
    ] = False,
) -> None:
    """From a folder of images and videos to one model that generates and describes them."""


app.command("curate")(curate.curate)
app.command("tokenize")(tokenize.tokenize)
app.command("train")(train.train)
app.command("sample")(sample.sample)
app.command("serve")(serve.serve)
for stage in ("cut", "flow", "text", "score", "dedup", "decide", "caption", "report"):
    app.command(stage, rich_help_panel="Stages of curate")(getattr(stages, stage))
app.command("prefer")(prefer.prefer)
app.command("why")(why.why)
app.command("inspect")(inspect.inspect)
app.add_typer(evaluation.app, name="eval")
app.add_typer(export.app, name="export")
app.command("train-tokenizer")(train_tokenizer.train_tokenizer)
app.command("demo")(demo.demo)
app.command("doctor")(doctor.doctor)


def main() -> None:
    """Run the command line; problems of the user's are one line on stderr, not a traceback."""
    from unimodal.pipeline.errors import UnimodalError, shown

    signal.signal(signal.SIGINT, _interrupted)
    # A pipe that is closed early (`| head`) is no error of ours, and no traceback.
    try:
        app()
    except UnimodalError as error:
        if "--debug" in sys.argv:
            raise
        print(f"unimodal: {shown(error)}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        if isinstance(error, BrokenPipeError) or error.filename is None or "--debug" in sys.argv:
            _closed(error)
        print(f"unimodal: {shown(error.filename)}: {error.strerror}", file=sys.stderr)
        sys.exit(1)


def _interrupted(number: int, frame: FrameType | None) -> NoReturn:
    """Ctrl-C unwinds, so that nothing is left half written; a second one does not wait for that."""
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(130))
    print("unimodal: interrupted; what is finished is kept (twice: at once)", file=sys.stderr)
    raise KeyboardInterrupt


def _closed(error: OSError) -> None:
    """A pipe that the reader has closed ends the command quietly; anything else is raised."""
    if not isinstance(error, BrokenPipeError):
        raise error
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(1)


if __name__ == "__main__":
    main()
