"""Media of a request: bytes that somebody sent into pixels, and what was drawn into bytes.

What an upload is follows from its bytes; it is measured before it is decoded, and lies in a file
of our own naming only as long as that takes. What is drawn carries its origin with it: a PNG in
an iTXt chunk `unimodal`, JPEG and WebP in their EXIF description, GIF and MP4 in their comment.
"""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from unimodal.pipeline import bounds
from unimodal.pipeline.errors import MediaError

TAKEN = 40
"""Pictures that are taken of a video at most: five seconds of eight."""
GROUP = 4  # pictures of a latent frame
EXIF_DESCRIPTION = 0x010E


def read(
    data: bytes, pixels: int, clip_area: int, fps: float = 8.0
) -> tuple[np.ndarray, float | None]:
    """A picture uint8 [H, W, 3] and None; or the first pictures of a clip [F, H, W, 3], F a
    multiple of 4, `fps` a second where it has so many, scaled to about `clip_area` pixels each,
    and how many a second they are.

    Raises `MediaError` for more than `pixels` pixels, before they are decoded, and for what is
    neither picture nor video.
    """
    from unimodal.pipeline.media import open_video, probe, read_image
    from unimodal.tokenize.vision.pixels import area_size

    limits = bounds.Limits(max_image_pixels=pixels, max_video_pixels=pixels, max_frames=100_000)
    # So many seconds early is on time: time stamps are rounded, a GIF's to 10 ms.
    early = max(0.1 / fps, 0.006)
    kept: list[np.ndarray] = []
    times: list[float] = []
    with tempfile.TemporaryDirectory(prefix="unimodal-") as folder:
        path = Path(folder) / "upload"
        path.write_bytes(data)
        try:
            if probe(path, limits).kind == "image":
                return read_image(path, limits), None
            with open_video(path, limits) as video:
                height, width = area_size(video.probe.height, video.probe.width, clip_area)
                for frame in video.frames():
                    time = float(frame.pts * video.time_base)
                    if not times or time >= times[0] + len(kept) / fps - early:
                        kept.append(video.upright(frame, (width, height), "rgb24"))
                        times.append(time)
                    if len(kept) == TAKEN:
                        break
        except MediaError as error:
            raise MediaError(error.reason) from error  # its path is nobody's business
    if len(kept) < GROUP:
        raise MediaError(f"a clip of {len(kept)} pictures: at least {GROUP} are needed")
    rate = (len(times) - 1) / (times[-1] - times[0])
    near = abs(rate - fps) < 0.03 * fps
    whole = len(kept) // GROUP * GROUP
    return np.stack(kept[:whole]), fps if near else round(rate, 2)


def picture(pixels: np.ndarray, form: str, about: Mapping[str, Any] | None = None) -> bytes:
    """uint8 [H, W, 3 or 4] as png, webp (lossless) or jpeg, with `about` in it."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    file, image = io.BytesIO(), Image.fromarray(pixels)
    text = _text(about)
    if form == "png":
        info = PngInfo()
        if about:
            info.add_itxt("unimodal", text)
        image.save(file, "PNG", pnginfo=info)
    elif form == "webp":
        image.save(file, "WEBP", lossless=True, exif=_exif(about))
    else:
        image.save(file, "JPEG", quality=95, subsampling=0, exif=_exif(about))
    return file.getvalue()


def clip(pixels: np.ndarray, fps: float, form: str, about: Mapping[str, Any]) -> bytes:
    """uint8 [F, H, W, 3] as webp (lossless, endless), gif (endless) or mp4, with `about` in it."""
    from PIL import Image

    if form == "mp4":
        return _mp4(pixels, fps, _text(about))
    file = io.BytesIO()
    first, *rest = (Image.fromarray(frame) for frame in pixels)
    # Rounded as times, not as durations, so that it does not add up. A GIF counts in 10 ms.
    tick = 10 if form == "gif" else 1
    edges = [tick * round(1000 / tick * number / fps) for number in range(len(pixels) + 1)]
    given: dict[str, Any] = {
        "save_all": True,
        "append_images": rest,
        "duration": [max(tick, b - a) for a, b in pairwise(edges)],
        "loop": 0,
    }
    if form == "webp":
        first.save(file, "WEBP", lossless=True, exif=_exif(about), **given)
    else:
        first.save(file, "GIF", comment=_text(about).encode(), **given)
    return file.getvalue()


def _text(about: Mapping[str, Any] | None) -> str:
    return json.dumps(dict(about or {}), ensure_ascii=False)


def _exif(about: Mapping[str, Any] | None) -> bytes:
    from PIL import Image

    exif = Image.Exif()
    exif[EXIF_DESCRIPTION] = json.dumps(dict(about or {}))  # EXIF text is ASCII, as this JSON is
    return exif.tobytes()


def _mp4(pixels: np.ndarray, fps: float, comment: str) -> bytes:
    """H.264 (MPEG-4 part 2 where FFmpeg was built without it), sides made even by repetition."""
    from fractions import Fraction

    import av

    height, width = pixels.shape[1:3]
    pixels = np.pad(pixels, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        container.metadata["comment"] = comment
        stream: Any = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1000))
        stream.height, stream.width = pixels.shape[1:3]
        stream.pix_fmt, stream.options = "yuv420p", {"crf": "14"}
        for frame in pixels:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()
