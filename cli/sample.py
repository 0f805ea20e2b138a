"""`unimodal sample`: a checkpoint and a prompt in; pictures, clips or descriptions out."""

from __future__ import annotations

import json as jsonlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unimodal.cli import options

if TYPE_CHECKING:
    import numpy as np


def sample(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint of unimodal train, or '-'.")],
    prompts: Annotated[list[str] | None, typer.Argument(help="What to draw.")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory of results.")] = Path(
        "samples"
    ),
    describe: Annotated[
        list[Path] | None, typer.Option("--describe", help="Describe this image or video instead.")
    ] = None,
    size: Annotated[
        str | None, typer.Option("--size", help="Pixels (default: as trained).", metavar="HxW")
    ] = None,
    number: Annotated[int, typer.Option("-n", help="Pictures for each prompt.", min=1)] = 1,
    frames: Annotated[
        int | None, typer.Option("--frames", help="Make a clip of so many frames.", min=1)
    ] = None,
    fps: Annotated[float | None, typer.Option("--fps", help="Frames a second of a clip.")] = None,
    form: Annotated[str, typer.Option("--format", help="Of a clip: mp4 or gif.")] = "mp4",
    guidance: Annotated[
        float | None, typer.Option("--guidance", help="Classifier-free guidance; 1 is none.")
    ] = None,
    negative: Annotated[str, typer.Option("--negative", help="What to lead away from.")] = "",
    temperature: Annotated[float | None, typer.Option("--temperature")] = None,
    top_k: Annotated[int | None, typer.Option("--top-k")] = None,
    top_p: Annotated[float | None, typer.Option("--top-p")] = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Draw a picture or a short clip of each prompt, or describe a picture in words.

    The same seed gives the same pictures. Paths are printed as the files are written;
    descriptions are printed as they are.
    """
    from unimodal.cli import console
    from unimodal.model.sample import Sampler, contact_sheet
    from unimodal.pipeline.errors import UsageError
    from unimodal.tokenize.device import usable

    pixels = _size(size)
    if form not in ("mp4", "gif"):
        raise UsageError(f"format {form}: mp4 or gif")
    if bool(prompts) == bool(describe):
        raise UsageError("give prompts to draw, or --describe FILE, one of the two")
    if describe and (size or frames or negative or guidance is not None or number != 1):
        raise UsageError("--describe takes no --size, --frames, --negative, --guidance or -n")
    source = console.from_stdin(checkpoint)
    given = [_media(path) for path in describe or []]
    sampler = Sampler.load(source, usable(device))
    progress = console.progress(quiet)
    if describe:
        writing: dict[str, Any] = {"temperature": temperature, "seed": seed, "progress": progress}
        writing |= {k: v for k, v in (("top_k", top_k), ("top_p", top_p)) if v is not None}
        for path, (shown, rate) in zip(describe, given, strict=True):
            text = sampler.describe([shown], fps=rate, **writing)[0]
            print(jsonlib.dumps({"path": str(path), "text": text}) if json else text)
        return
    drawing: dict[str, Any] = {
        "size": pixels,
        "n": number,
        "guidance": guidance,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "seed": seed,
        "negative": negative,
        "progress": progress,
    }
    asked = prompts or []
    if frames is not None:
        made = sampler.videos(asked, frames=frames, fps=fps, **drawing)
        rate = fps or next((g["fps"] for g in sampler.grids if g["kind"] == "video"), 8.0)
    else:
        made, rate = sampler.images(asked, **drawing), None
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{out} cannot be written: {error.strerror}; name another -o") from error
    about = {k: v for k, v in drawing.items() if k != "progress" and v is not None}
    about |= {"checkpoint": str(source)}
    for place, (prompt, group) in enumerate(zip(asked, made, strict=True)):
        for copy, drawn in enumerate(group):
            name = f"{place:03d}-{_slug(prompt)}-s{seed}-{copy}"
            path = _write(out, name, drawn, rate, form, {"prompt": prompt, "copy": copy, **about})
            print(jsonlib.dumps({"path": str(path), "prompt": prompt}) if json else path)
    flat = [drawn for group in made for drawn in group]
    if len(flat) > 1 and rate is None:
        sheet = contact_sheet(flat, number if number > 1 else 8)
        path = _write(out, f"sheet-s{seed}", sheet, None, form, {"prompts": asked, **about})
        print(jsonlib.dumps({"path": str(path), "prompts": asked}) if json else path)


def _size(text: str | None) -> tuple[int, int] | None:
    from unimodal.pipeline.errors import UsageError

    if text is None:
        return None
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if not match:
        raise UsageError(f"size {text}: write height x width in pixels, for example 256x256")
    return int(match[1]), int(match[2])


def _media(path: Path) -> tuple[np.ndarray, float | None]:
    """A picture uint8 [H, W, 3], or up to five seconds of a video [T, H, W, 3] and their rate."""
    import numpy as np

    from unimodal.pipeline.errors import MediaError
    from unimodal.pipeline.media import iter_frames, probe, read_image

    if not path.is_file():
        raise MediaError("no such file; give an image or a video to describe", path)
    found = probe(path)
    if found.kind == "image":
        return read_image(path), None
    rate = found.fps or 25.0
    step = max(1, round(rate / 8))  # about eight pictures a second, as tokenizing takes by default
    kept: list[np.ndarray] = []
    for index, (_, pixels) in enumerate(iter_frames(path)):
        if index % step == 0:
            kept.append(pixels)
        if len(kept) == 40:
            break
    if len(kept) < 4:
        raise MediaError("too short to describe: under four frames at 8 a second", path)
    return np.stack(kept[: len(kept) // 4 * 4]), rate / step


def _slug(prompt: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:48] or "empty"


def _write(
    out: Path,
    name: str,
    pixels: np.ndarray,
    rate: float | None,
    form: str,
    about: dict[str, Any],
) -> Path:
    """Write a picture [H, W, 3] or a clip [T, H, W, 3] with its origin in the file."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    from unimodal.pipeline.files import atomic

    text = jsonlib.dumps(about, ensure_ascii=False)
    if rate is None:
        info = PngInfo()
        info.add_itxt("unimodal", text)
        path = out / f"{name}.png"
        with atomic(path) as temporary:
            Image.fromarray(pixels).save(temporary, format="PNG", pnginfo=info)
        return path
    path = out / f"{name}.{form}"
    with atomic(path) as temporary:
        if form == "gif":
            first, *rest = (Image.fromarray(frame) for frame in pixels)
            first.save(
                temporary,
                format="GIF",
                save_all=True,
                append_images=rest,
                duration=round(1000 / rate),
                loop=0,
                comment=text.encode(),
            )
        else:
            _mp4(temporary, pixels, rate, text)
    return path


def _mp4(path: Path, pixels: np.ndarray, rate: float, comment: str) -> None:
    """H.264 (MPEG-4 part 2 where FFmpeg was built without it), sides made even by repetition."""
    from fractions import Fraction

    import av
    import numpy as np

    height, width = pixels.shape[1:3]
    pixels = np.pad(pixels, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    with av.open(str(path), "w", format="mp4") as container:
        container.metadata["comment"] = comment
        stream: Any = container.add_stream(codec, rate=Fraction(rate).limit_denominator(1000))
        stream.height, stream.width = pixels.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in pixels:
            for packet in stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
