"""Media of a request: bytes that somebody sent into pixels, and what was drawn into bytes.

What an upload is follows from its bytes; it is measured before it is decoded, and lies in a file
of our own naming only as long as that takes. What is drawn carries its origin with it: a PNG in
an iTXt chunk `unimodal`, JPEG and WebP in their EXIF description, GIF and MP4 in their comment.
"""

from __future__ import annotations

import io
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from unimodal.pipeline import bounds
from unimodal.pipeline.errors import MediaError

if TYPE_CHECKING:
    from unimodal.pipeline.media import Video

TAKEN = 40
"""Pictures that are taken of a video that is shown in a chat: five seconds of eight."""
GROUP = 4  # pictures of a latent frame
DECODED = 240
"""Pictures a second that may be decoded for those that are taken."""
EXIF_DESCRIPTION = 0x010E
EXIF_BYTES = 60_000
"""A JPEG has room for 65,533 in all."""


@dataclass(frozen=True)
class Take:
    """What is taken of an upload, and what that may cost."""

    kind: str | None = None
    """image or video, where only one will do."""
    size: Callable[[int, int, str], tuple[int, int]] | None = None
    """(height, width) that the sampler gives a picture of (height, width, kind); None: as it is."""
    fps: float = 8.0
    """Pictures a second, of a video that has so many."""
    steady: bool = False
    """At exactly `fps`, also of a video that has fewer: its pictures come again."""
    frames: int = TAKEN
    """Pictures of a video."""
    whole: bool = False
    """Whether a video of more is refused; else its beginning is taken."""
    pixels: int = 1 << 25
    """Of an upload as it is sent: width times height."""
    volume: int = 1 << 25
    """Of all pictures that are taken of a video."""
    seconds: float = 20.0
    """Until decoding is given up."""


class Stopped(Exception):
    """Nobody waits for what is being read."""


def read(
    data: bytes, take: Take, stopped: Callable[[], bool] = lambda: False
) -> tuple[np.ndarray, float | None]:
    """A picture uint8 [H, W, 3] and None; or pictures of a clip [F, H, W, 3], F a multiple of 4,
    and how many a second they are.

    Raises `MediaError` for what is over a bound of `take`, before it is decoded where that can be
    known, and for what is neither picture nor video; `Stopped` where `stopped` says so.
    """
    from unimodal.pipeline.images import decode_image, is_image, probe_image
    from unimodal.pipeline.media import open_video
    from unimodal.tokenize.vision.pixels import resize

    limits = bounds.Limits(
        max_image_pixels=take.pixels,
        max_video_pixels=take.pixels,
        max_frames=int(DECODED * take.frames / take.fps) + 1,
    )
    end = time.monotonic() + take.seconds

    def tick(_: int = 0) -> None:
        if stopped():
            raise Stopped
        if time.monotonic() > end:
            raise MediaError(f"takes more than {take.seconds:g} seconds to decode: send less")

    with tempfile.TemporaryDirectory(prefix="unimodal-") as folder:
        path = Path(folder) / "upload"
        path.write_bytes(data)
        try:
            tick()
            found = probe_image(path, limits) if is_image(path) else None
            if found is not None and found.kind == "image":
                if take.kind == "video":
                    raise MediaError("a video is needed, not a still image")
                pixels = decode_image(path)
                return resize(pixels, _still_size(pixels.shape[:2], take)), None
            with open_video(path, limits, tick=tick) as video:
                if take.kind == "image":
                    raise MediaError("a still image is needed, not a video")
                shown = video.probe.height, video.probe.width
                size = shown if take.size is None else take.size(*shown, "video")
                return _clip(_timed(video, size, tick), take)
        except MediaError as error:
            raise MediaError(error.reason) from error  # its path is nobody's business


def _still_size(shown: tuple[int, ...], take: Take) -> tuple[int, int]:
    """What a picture is scaled to: what the sampler would make of it, or, where it would not know
    that again for its own (sides are rounded), about four times as much."""
    height, width = shown
    if take.size is None:
        return height, width
    size = take.size(height, width, "image")
    try:
        if take.size(*size, "image") == size:
            return size
    except MediaError:  # rounded, it is too long for its width
        pass
    scale = min(1.0, (4 * size[0] * size[1] / (height * width)) ** 0.5)
    return max(8, round(height * scale)), max(8, round(width * scale))


def _timed(
    video: Video, size: tuple[int, int], tick: Callable[[], None]
) -> Iterator[tuple[float, float, Callable[[], np.ndarray]]]:
    """Seconds at which each picture begins and ends, and what scales it."""
    for frame in video.frames():
        tick()
        begin, long = (float(one * video.time_base) for one in (frame.pts, frame.duration))
        yield begin, begin + long, partial(video.upright, frame, size[::-1], "rgb24")


def _due(
    pictures: Iterable[tuple[float, float, Callable[[], np.ndarray]]], fps: float, steady: bool
) -> Iterator[tuple[float, Callable[[], np.ndarray] | None]]:
    """Pictures at `fps` a second: when each begins and what scales it, None: the last again."""
    # So many seconds early is on time: time stamps are rounded, a GIF's to 10 ms.
    early = max(0.1 / fps, 0.006)
    first, count, ended = 0.0, 0, 0.0
    for begin, end, scale in pictures:
        first = first if count else begin
        while steady and begin > first + count / fps + early:
            yield first + count / fps, None
            count += 1
        if begin >= first + count / fps - early:
            yield begin, scale
            count += 1
        ended = end
    while steady and ended > first + count / fps + early:
        yield first + count / fps, None
        count += 1


def _clip(
    pictures: Iterable[tuple[float, float, Callable[[], np.ndarray]]], take: Take
) -> tuple[np.ndarray, float]:
    """Pictures of a clip uint8 [F, H, W, 3], and their rate; see `read`."""
    kept: list[np.ndarray] = []
    times: list[float] = []
    for begin, scale in _due(pictures, take.fps, take.steady):
        if kept and len(kept) >= (most := min(take.frames, take.volume // kept[0][..., 0].size)):
            if not take.whole:
                break
            height, width = kept[0].shape[:2]
            raise MediaError(
                f"has more than {most} pictures of {width}x{height} pixels at {take.fps:g} a "
                "second: send a shorter one"
            )
        kept.append(kept[-1] if scale is None else scale())
        times.append(begin)
    if len(kept) < GROUP:
        raise MediaError(f"a clip of {len(kept)} pictures: at least {GROUP} are needed")
    rate = (len(times) - 1) / (times[-1] - times[0])
    near = take.steady or abs(rate - take.fps) < 0.03 * take.fps
    whole = len(kept) // GROUP * GROUP
    return np.stack(kept[:whole]), take.fps if near else round(rate, 2)


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
        from unimodal.tokenize.pictures import mp4

        return mp4(pixels, fps, _text(about))
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
    """EXIF text is ASCII, as this JSON is. A field that is too long is cut, and says so."""
    from PIL import Image

    told = dict(about or {})
    lengths = {name: len(one) for name, one in told.items() if isinstance(one, str)}
    kept = dict(lengths)
    while len(text := json.dumps(told)) > EXIF_BYTES and any(kept.values()):
        name = max(kept, key=lambda one: len(json.dumps(told[one])) if kept[one] else 0)
        kept[name] = kept[name] * 9 // 10
        begun = str((about or {})[name])[: kept[name]]
        told[name] = f"{begun}… (cut: it has {lengths[name]} characters)"
    exif = Image.Exif()
    exif[EXIF_DESCRIPTION] = text
    return exif.tobytes()
