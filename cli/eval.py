"""`unimodal eval`: how good a tokenizer or a checkpoint is, as JSON and as a page to look at."""

from __future__ import annotations

import json as codec
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unimodal.cli import options

if TYPE_CHECKING:
    from unimodal.pipeline.markup import Html

SHOWN = 48
"""Things on a page; the JSON has all."""

SHARE = ("right", "n", "share", "low", "high")

app = typer.Typer(
    help="Measure reconstruction, generation and understanding.", no_args_is_help=True
)

Out = Annotated[Path, typer.Option("--out", "-o", help="Folder for index.html and eval.json.")]
Checkpoint = Annotated[
    str, typer.Argument(metavar="CKPT", help="Checkpoint, a directory of Emu3, or '-'.")
]
Inception = Annotated[
    str | None, typer.Option("--inception", metavar="FILE", help="torch-fidelity's, for FID.")
]
WordsFile = Annotated[
    Path | None,
    typer.Option("--words", metavar="FILE", help="TOML of small classes: colour = ['red', …]"),
]


@app.callback()
def _group() -> None:
    """Measure reconstruction, generation and understanding: figures, and a page of pictures."""


@app.command("reconstruction")
def reconstruction(
    things: Annotated[
        list[str], typer.Argument(metavar="THING…", help="Pictures, videos, folders, runs, or '-'.")
    ],
    out: Out = Path("eval"),
    tokenizer: Annotated[
        str, typer.Option("--tokenizer", help="small, small-16k, a directory or a checkpoint.")
    ] = "small",
    sets: options.Sets = None,
    lpips: Annotated[
        str | None, typer.Option("--lpips", metavar="PATH", help="VGG16 and heads, for LPIPS.")
    ] = None,
    inception: Inception = None,
    limit: options.Limit = None,
    device: options.Device = "auto",
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """What a vision tokenizer keeps: PSNR, SSIM, codebook; LPIPS and rFID where weights are given.

    Against the originals at the size that is encoded; of a video one window or 48 pictures. --set
    area, fps and seconds mean what they do to unimodal tokenize.
    """
    from unimodal.cli import console
    from unimodal.pipeline.report.sheet import check_ours, figure
    from unimodal.pipeline.scorers import frechet
    from unimodal.pipeline.settings import build
    from unimodal.tokenize.device import usable
    from unimodal.tokenize.fidelity import Fidelity, remade
    from unimodal.tokenize.look import AMPLIFIED, difference
    from unimodal.tokenize.plan import TokenizeSettings
    from unimodal.tokenize.vision.perceptual import load_lpips
    from unimodal.tokenize.vision.tokenizer import VisionTokenizer

    check_ours(out, "eval")
    settings = build(TokenizeSettings, sets=sets or [])
    things, where = [console.from_stdin(thing) for thing in things], usable(device)
    inside = Path(tokenizer) / "vision_tokenizer"
    loaded = VisionTokenizer.load(inside if inside.is_dir() else tokenizer, where)
    figures = Fidelity(
        loaded,
        load_lpips(lpips).to(where) if lpips else None,
        frechet.load(inception, where) if inception else None,
    )
    shown: list[Html] = []
    for one in remade(things, settings, loaded, limit, console.progress(quiet)):
        told = figures.measure(one)
        if len(shown) < 4 * SHOWN:
            middle = len(one.originals) // 2
            a, b = one.originals[middle], one.painted[middle]
            ssim = f", SSIM {told['ssim']:.3f}" if told["ssim"] is not None else ""
            about = f"{told['psnr']:.2f} dB{ssim}"
            apart = f"times {AMPLIFIED}: black where equal"
            shown += [figure(one.name, "as it is encoded", a), figure("Reconstruction", about, b)]
            shown += [figure("Difference", apart, difference(a, b)), _gap()]
    totals = figures.totals()
    record: dict[str, Any] = {
        "what": "reconstruction",
        "tokenizer": tokenizer,
        "digest": loaded.digest,
    }
    record |= {"settings": settings.model_dump(), **totals, "each": figures.each}
    _finish(out, record, totals, shown, json, quiet)


@app.command("generation")
def generation(
    checkpoint: Checkpoint,
    prompts: Annotated[
        str, typer.Argument(metavar="FILE", help="Prompts: txt, jsonl, csv, parquet, or '-'.")
    ],
    out: Out = Path("eval"),
    real: Annotated[
        list[str] | None,
        typer.Option("--real", metavar="THING", help="Real pictures: folder or run, for FID."),
    ] = None,
    words: WordsFile = None,
    clip: Annotated[
        str | None, typer.Option("--clip", metavar="FILE", help="CLIP's weights, for its score.")
    ] = None,
    clip_model: Annotated[
        str | None,
        typer.Option("--clip-model", metavar="NAME", help="By open_clip's name, or a config.json."),
    ] = None,
    inception: Inception = None,
    number: Annotated[int, typer.Option("-n", help="Pictures of each prompt.", min=1)] = 1,
    guidance: Annotated[
        float | None, typer.Option("--guidance", help="Default: the checkpoint's.")
    ] = None,
    seed: options.Seed = 0,
    limit: options.Limit = None,
    device: options.Device = "auto",
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """What a checkpoint draws: CLIP score, FID, and how often the prompt's words are seen.

    --words takes --real RUN, whose captioned pictures, as their codes show them, teach a small
    classifier for each class; how often that is right on pictures kept back stands beside.
    """
    from unimodal.cli import console
    from unimodal.cli.prompts import alone, requests
    from unimodal.model.judge import clip_scores, prompted, real_pictures
    from unimodal.model.sample import Sampler
    from unimodal.pipeline.captioning.scores import load_words
    from unimodal.pipeline.errors import UsageError
    from unimodal.pipeline.report.sheet import check_ours, figure
    from unimodal.pipeline.scorers import frechet
    from unimodal.pipeline.scorers.embed import EmbedSettings
    from unimodal.pipeline.scorers.openclip import clip_model as load_clip
    from unimodal.tokenize.device import usable

    check_ours(out, "eval")
    if (words or inception) and not real:
        raise UsageError("--words and --inception compare with real pictures: --real RUN")
    items, bad, _ = requests([], {"n": number, "guidance": guidance}, [], prompts)
    wrong = [one.where for one in items if one.request.direction != "image"]
    if wrong or bad:
        first = f"{bad[0].where}: {bad[0].reason}" if bad else f"{wrong[0]}: asks for no picture"
        raise UsageError(first)
    for one in items:
        if own := alone(one.request, number, guidance):
            raise UsageError(
                f"{one.where}: eval draws all prompts alike: leave out {', '.join(own)}"
                " (there are -n, --guidance and --seed)"
            )
    classes, where = load_words(words) if words else {}, usable(device)
    progress = console.progress(quiet)
    clipped = None
    if clip:
        how = {"config" if str(clip_model).endswith(".json") else "model": clip_model}
        known = {name: value for name, value in how.items() if value}
        clipped = load_clip(EmbedSettings(weights=clip, device=where.split(":")[0], **known))  # type: ignore[arg-type]
    features = frechet.load(inception, where) if inception else None
    sampler = Sampler.load(console.from_stdin(checkpoint), where)
    asked = [item.request.prompt for item in items][:limit]
    drawn = sampler.images(asked, n=number, guidance=guidance, seed=seed, progress=progress)
    flat = [picture for some in drawn for picture in some]
    totals: dict[str, Any] = {"prompts": len(asked), "pictures": len(flat)}
    each: list[dict[str, Any]] = [{"prompt": prompt} for prompt in asked for _ in range(number)]
    if clipped is not None:
        scores = clip_scores(clipped, [one["prompt"] for one in each], flat)
        totals["clip_score"] = sum(scores) / len(scores)
        each = [one | {"clip_score": score} for one, score in zip(each, scores, strict=True)]
    if real:
        height, width = flat[0].shape[:2]
        theirs = real_pictures(real, height * width, sampler, progress)
        totals["real"] = len(theirs)
        if features is not None:
            originals = features(one for one, _, _ in theirs)
            totals["fid"] = frechet.distance(originals, features(flat))
        if classes:
            labelled = [(painted, texts) for _, painted, texts in theirs]
            totals["words"], seen = prompted(asked, drawn, labelled, classes, seed)
            each = [one | {"seen": words} for one, words in zip(each, seen, strict=True)]
    shown = [
        figure(one["prompt"], "; ".join(_about(one)), picture)
        for one, picture in zip(each[: 4 * SHOWN], flat, strict=False)
    ]
    record = {"what": "generation", "checkpoint": checkpoint, "weights": sampler.digest}
    _finish(out, record | {"seed": seed, **totals, "each": each}, totals, shown, json, quiet)


@app.command("understanding")
def understanding(
    checkpoint: Checkpoint,
    thing: Annotated[
        str, typer.Argument(metavar="THING", help="Shards (their val split is asked), or a run.")
    ],
    out: Out = Path("eval"),
    words: WordsFile = None,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", help="Of an answer.", min=1)
    ] = None,
    seed: options.Seed = 0,
    limit: options.Limit = None,
    device: options.Device = "auto",
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """What a checkpoint says of held-out pictures, beside what people say; answers of chats too.

    CIDEr-D, BLEU-4, ROUGE-L, chrF, and the share that is right to the letter.
    """
    from unimodal.cli import console
    from unimodal.model.judge import described, shown_in
    from unimodal.model.sample import Sampler
    from unimodal.pipeline.captioning.scores import load_words
    from unimodal.pipeline.report.sheet import check_ours, figure
    from unimodal.tokenize.device import usable

    check_ours(out, "eval")
    classes, progress = load_words(words) if words else None, console.progress(quiet)
    sampler = Sampler.load(console.from_stdin(checkpoint), usable(device))
    asked = shown_in(thing, sampler, limit)
    totals, said = described(sampler, asked, classes, max_tokens, seed, progress)
    each: list[dict[str, Any]] = []
    shown: list[Html] = []
    for one, text in zip(asked, said, strict=True):
        each.append({"key": one.key, "asked": one.asked, "said": text, "people": one.references})
        if len(shown) < SHOWN and one.media:
            codes = one.media[0]
            if codes.dtype != "uint8":
                codes = codes[None] if (image := codes.ndim == 2) else codes
                codes = sampler.canvas.pixels([codes], image)[0]
            picture = codes if codes.ndim == 3 else codes[len(codes) // 2]
            about = [f"people: {' / '.join(one.references)}", *one.asked[-1:]]
            shown.append(figure(text or "(nothing)", "; ".join(about), picture))
    record: dict[str, Any] = {
        "what": "understanding",
        "checkpoint": checkpoint,
        "weights": sampler.digest,
    }
    record |= {"of": thing, "seed": seed, **totals, "each": each}
    _finish(out, record, totals, shown, json, quiet)


def _about(one: dict[str, Any]) -> list[str]:
    told = [f"{name} {seen}" for name, seen in one.get("seen", {}).items()]
    return [*told, f"CLIP {one['clip_score']:.2f}"] if "clip_score" in one else told


def _gap() -> Html:
    from unimodal.pipeline.markup import h

    return h("span")


def _rows(figures: dict[str, Any], before: str = "") -> list[tuple[str, Any]]:
    """Nested figures, flat: ("image psnr", 24.1); how often something was right is one line."""
    found: list[tuple[str, Any]] = []
    for name, value in figures.items():
        told = f"{before}{name}".replace("_", " ")
        if isinstance(value, dict):
            if value.get("share") is not None:
                often = "{right:,} of {n:,}: {share:.3f} ({low:.3f} to {high:.3f})"
                found.append((told, often.format_map(value)))
                value = {name: value[name] for name in value if name not in SHARE}
            found += _rows(value, f"{told} ")
        elif value is not None:
            found.append((told, value))
    return found


def _finish(
    out: Path,
    record: dict[str, Any],
    totals: dict[str, Any],
    shown: Sequence[Html],
    as_json: bool,
    quiet: bool,
) -> None:
    """Write both files, and print figures for people and the page's path or JSON for programs."""
    from unimodal.cli import console
    from unimodal.pipeline.files import atomic
    from unimodal.pipeline.markup import h
    from unimodal.pipeline.report.sheet import document
    from unimodal.pipeline.report.words import table

    rows = _rows(totals)
    told = [
        (name, f"{v:.4g}" if isinstance(v, float) else f"{v:,}" if v != str(v) else v)
        for name, v in rows
    ]
    body = [
        h("h1", record["what"].capitalize()),
        h("p", record.get("checkpoint") or record.get("tokenizer"), class_="from"),
        table(("Figure", ""), told),
        h("div", shown, class_="four"),
    ]
    files = {
        "eval.json": codec.dumps(record, ensure_ascii=False, indent=1) + "\n",
        "index.html": document("eval", [h("section", body)]),
    }
    for name, text in files.items():
        with atomic(out / name) as temporary:
            temporary.write_text(text, encoding="utf-8", newline="\n")
    console.table(f"{record['what']} in {out}", rows, quiet)
    console.result(out / "index.html", record, as_json)
