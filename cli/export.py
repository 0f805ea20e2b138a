"""`unimodal export`: what other tools take, as files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unimodal.cli import options

if TYPE_CHECKING:
    from unimodal.pipeline.export import Exported

Where = Annotated[str, typer.Option(help="Which clips: SQL over the columns of clips.parquet.")]

app = typer.Typer(
    help="Write clips, a data set, a model or a tokenizer as files.", no_args_is_help=True
)


@app.callback()
def _group() -> None:
    """Write clips, a data set, a model or a tokenizer as files."""


@app.command("clips")
def clips(
    run: options.Run,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the files.")] = Path("clips"),
    mode: Annotated[
        str,
        typer.Option(
            help="copy: packets from the key frame before the clip; keyframe: from the first one "
            "inside it; exact: encoded anew, to the frame."
        ),
    ] = "copy",
    where: Where = "verdict = 'keep'",
    crop: Annotated[bool, typer.Option("--crop", help="Cut letterbox bars off (exact).")] = False,
    crf: Annotated[int, typer.Option(help="H.264 quality of exact; lower is better.")] = 18,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Write the kept clips of a run as files, with captions beside them; without sound."""
    from unimodal.cli import console
    from unimodal.pipeline.export import export_clips
    from unimodal.pipeline.run import Run

    done = export_clips(
        Run.open(console.from_stdin(run)),
        out,
        mode=mode,  # type: ignore[arg-type]
        where=where,
        crop=crop,
        crf=crf,
        progress=console.progress(quiet),
    )
    _told(done, json, quiet)


def _told(done: Exported, json: bool, quiet: bool) -> None:
    from unimodal.cli import console
    from unimodal.pipeline.errors import UnimodalError

    if done.failed and not done.written and not done.kept:
        raise UnimodalError(
            f"none of {len(done.failed)} clips could be written: see {done.out / 'failed.jsonl'}"
        )
    record = {"written": done.written, "kept": done.kept, "failed": len(done.failed)}
    console.table(f"files in {done.out}", list(record.items()), quiet)
    console.result(done.out, record, json)


@app.command("dataset")
def dataset(
    run: options.Run,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder.")] = Path("dataset"),
    layout: Annotated[
        str,
        typer.Option(
            help="huggingface: for datasets, finetrainers, video-dataset-scripts; open-sora; "
            "webdataset: for webdataset, Megatron-Energon."
        ),
    ] = "huggingface",
    where: Where = "verdict = 'keep'",
    crop: Annotated[bool, typer.Option("--crop", help="Cut letterbox bars off.")] = False,
    crf: Annotated[int, typer.Option(help="H.264 quality; lower is better.")] = 18,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Write the kept clips of a run, cut to the frame, as a data set for other tools."""
    from unimodal.cli import console
    from unimodal.pipeline.layouts import export_dataset
    from unimodal.pipeline.run import Run

    done = export_dataset(
        Run.open(console.from_stdin(run)),
        out,
        layout,  # type: ignore[arg-type]
        where=where,
        crop=crop,
        crf=crf,
        progress=console.progress(quiet),
    )
    _told(done, json, quiet)


@app.command("tokenizer")
def tokenizer(
    name: Annotated[
        str, typer.Argument(metavar="NAME|DIR", help="A shipped tokenizer, or its directory.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the two files.")],
    naming: Annotated[
        str,
        typer.Option(help="original: as released; transformers: for Emu3VQVAE.from_pretrained."),
    ] = "original",
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Write a vision tokenizer as config.json and model.safetensors, under either naming."""
    from unimodal.cli import console
    from unimodal.tokenize.vision.tokenizer import VisionTokenizer

    loaded = VisionTokenizer.load(console.from_stdin(name))
    loaded.save(out, naming)
    record = {"naming": naming, "codes": loaded.codebook_size, "digest": loaded.digest}
    console.table(f"tokenizer in {out}", list(record.items()), quiet)
    console.result(out, record, json)


@app.command("model")
def model(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CKPT", help="Checkpoint, a step of it, or a model directory.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Empty or new folder.")],
    naming: Annotated[
        str,
        typer.Option(
            help="emu3: as released; transformers-emu3: for Emu3ForConditionalGeneration, the "
            "vision tokenizer inside; llama: for LlamaForCausalLM."
        ),
    ] = "llama",
    dtype: Annotated[str, typer.Option(help="Of the decoder: float32, bfloat16.")] = "float32",
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Write a trained decoder for other programs, under any of the public namings.

    The folder is itself a checkpoint: `unimodal sample` and `train --init` take it.
    """
    from unimodal.cli import console
    from unimodal.model.export import export_model

    record = export_model(Path(console.from_stdin(checkpoint)), out, naming, dtype)
    rows = [(key, value) for key, value in record.items() if key != "files"]
    console.table(f"model in {out}", rows, quiet)
    console.result(out, record, json)
