"""Pictures of windows: decode, crop, resize.

image              -> one picture
windows of a video -> frames by time stamp, one decoder for all
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from unimodal.pipeline.errors import MediaError
from unimodal.tokenize.plan import Window, picture_count
from unimodal.tokenize.vision.pixels import resize


def image_pixels(window: Window, tick: Any = None) -> np.ndarray:
    """The image of a window, cropped and resized: uint8 RGB [H, W, 3]. Raises `MediaError`.

    `tick` is told of the bytes of what has to be fetched first.
    """
    from unimodal.pipeline import fetch
    from unimodal.pipeline.media import read_image

    with fetch.local(window.clip["uri"], keep=True, tick=tick) as path:
        return fit(read_image(path), window)


def video_pixels(windows: Sequence[Window], tick: Any = None) -> Iterator[np.ndarray]:
    """Pictures of the windows of one clip, one window after another: uint8 RGB [F, H, W, 3].

    The clip is decoded once, front to back. Raises `MediaError`. `tick` is told of progress that
    gives no picture.
    """
    from unimodal.pipeline.media import iter_frames

    clip, fps = windows[0].clip, windows[0].fps
    assert fps is not None
    ticks = 1 / Fraction(clip["time_base"]) / fps
    last_one = picture_count(clip, fps) - 1  # a clip of fewer than four pictures repeats it
    times = [
        clip["start_pts"] + min(window.first + i, last_one) * ticks
        for window in windows
        for i in range(window.pictures)
    ]
    frames = iter_frames(clip["uri"], clip["start_pts"], clip["end_pts"], tick=tick)

    def watched() -> Iterator[tuple[int, np.ndarray]]:
        for frame in frames:
            if tick is not None:  # most may lie between the pictures that are wanted
                tick(1)
            yield frame

    shown = resample(watched(), times, clip.get("frames"))
    for window in windows:
        pictures = np.empty((window.pictures, *window.size, 3), np.uint8)
        last: np.ndarray | None = None
        for i in range(window.pictures):
            frame = next(shown)
            # A slow video shows a frame more than once; it is resized once.
            pictures[i] = pictures[i - 1] if frame is last and i else fit(frame, window)
            last = frame
        yield pictures


def resample(
    frames: Iterable[tuple[int, np.ndarray]],
    times: Sequence[Fraction],
    expected: int | None = None,
) -> Iterator[np.ndarray]:
    """What is on screen at each of `times` (rising, in ticks): the last frame not after it.

    `frames` are (pts, picture) in order; before the first, the first shows. Raises `MediaError`
    if frames end early: less than 90 % of the `expected` number came although more were due.
    """
    shown: np.ndarray | None = None
    done = came = 0
    for pts, picture in frames:
        came += 1
        while shown is not None and done < len(times) and times[done] < pts:
            yield shown
            done += 1
        if done == len(times):
            return
        shown = picture
    if shown is None:
        raise MediaError("no frame of its span can be decoded")
    if expected is not None and came < 0.9 * expected:
        raise MediaError(f"only {came} of its {expected} frames can be decoded")
    for _ in range(done, len(times)):
        yield shown


def fit(picture: np.ndarray, window: Window) -> np.ndarray:
    """Crop and resize one picture [H, W, 3] as its window says."""
    height, width = picture.shape[:2]
    if (width, height) != (window.clip["width"], window.clip["height"]):
        raise MediaError(
            f"it is {width}x{height} pixels now and was {window.clip['width']}x"
            f"{window.clip['height']}: it changed since unimodal curate, run that again"
        )
    if window.box is not None:
        x0, y0, x1, y1 = window.box
        picture = np.ascontiguousarray(picture[y0:y1, x0:x1])
    return resize(picture, window.size)


def mp4(pixels: np.ndarray, fps: float, comment: str = "") -> bytes:
    """uint8 [F, H, W, 3] as H.264, or MPEG-4 part 2 where FFmpeg was built without it.

    Sides are made even by repetition.
    """
    import av

    height, width = pixels.shape[1:3]
    pixels = np.pad(pixels, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        container.metadata["comment"] = comment
        stream: Any = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1000))
        stream.height, stream.width = pixels.shape[1:3]
        # x264's macroblock tree reads unwritten memory where pictures are small: now and then the
        # same frames came out in other bytes.
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "14", "x264-params": "mbtree=0"}
        for frame in pixels:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()
