"""Still images as people see them: upright, on white, 8 bits of RGB. Pillow reads them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from unimodal.pipeline.bounds import Limits, Probe
from unimodal.pipeline.errors import MediaError

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
"""Pillow decoders that may open a file. EPS is left out: it would start another program."""

ANIMATED_FORMATS = frozenset({"GIF", "WEBP", "PNG", "AVIF"})
"""Image formats that are videos when they hold more than one frame (TIFF pages are not time)."""

_IMAGE_MAGIC = (b"\x89PNG\r\n", b"\xff\xd8\xff", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"II+\0")
_IMAGE_BRANDS = (b"avif", b"avis")
_HEIC_BRANDS = {b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1"}


def is_image(path: Path) -> bool:
    """Whether the first bytes are an image's (animated or not).

    Raises `MediaError` if it is no file, or an empty one.
    """
    try:
        if not path.is_file():
            raise MediaError("not a regular file" if path.exists() else "no such file", path)
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise MediaError(f"cannot be opened ({error.strerror})", path) from error
    if not head:
        raise MediaError("empty file (0 bytes)", path)
    if head[4:8] == b"ftyp":
        if any(brand in head for brand in _IMAGE_BRANDS):
            return True
        if head[8:12] in _HEIC_BRANDS:
            raise MediaError("HEIC pictures are not supported: convert it to JPEG or PNG", path)
    return (
        head.startswith(_IMAGE_MAGIC)
        or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")
        or head[4:8] == b"jP  "
        or (head[:1] == b"P" and head[1:2] in b"123456" and head[2:3].isspace())
    )


def probe_image(path: Path, limits: Limits) -> Probe:
    """What an image file is, from its header alone; raises `MediaError` with the reason.

    The size of a PNG whose orientation is noted behind its pixels is as stored, not as shown.
    """
    size = path.stat().st_size
    if size > limits.max_image_bytes:
        raise MediaError(f"an image of {size} bytes (limit {limits.max_image_bytes})", path)
    with open_pillow(path) as image:
        width, height = image.size
        if width * height > limits.max_image_pixels:
            raise MediaError(
                f"{width}x{height} pixels are over the limit of {limits.max_image_pixels}", path
            )
        codec = (image.format or "image").lower()
        if image.format in ANIMATED_FORMATS and getattr(image, "n_frames", 1) > 1:
            return Probe("video", width, height, codec, animated=True)
        # For a PNG, Pillow would decode all pixels to look for EXIF behind them.
        early = image.format != "PNG" or "exif" in image.info
        orientation = image.getexif().get(0x0112, 1) if early else 1
        if orientation in (5, 6, 7, 8):  # the four that swap width and height
            width, height = height, width
        return Probe("image", width, height, codec)


def decode_image(path: Path) -> np.ndarray:
    """Pixels of an image that was probed: uint8 RGB [H, W, 3]; raises `MediaError`."""
    with open_pillow(path) as image:
        return to_rgb(image)


def to_rgb(image: Image) -> np.ndarray:
    """Any Pillow image, upright and on white: uint8 RGB [H, W, 3]."""
    from PIL import Image as pillow
    from PIL import ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        gray = np.asarray(image).astype(np.float64)
        # 16-bit files span 0..65535 whatever their brightest pixel; floats are 0..1 by custom.
        white = 65535.0 if image.mode.startswith("I") else 255.0 if gray.max() > 1 else 1.0
        gray = np.nan_to_num(gray) * (255.0 / white)
        rgb = np.repeat(np.clip(np.rint(gray), 0, 255).astype(np.uint8)[..., None], 3, axis=2)
        return np.ascontiguousarray(rgb)
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        white_page = pillow.new("RGBA", image.size, (255, 255, 255, 255))
        image = pillow.alpha_composite(white_page, image)
    return np.ascontiguousarray(np.asarray(image.convert("RGB")))


@contextmanager
def open_pillow(path: Path) -> Iterator[Image]:
    """Open one of `IMAGE_FORMATS` without decoding it.

    Raises `MediaError` with the reason, also for what Pillow finds wrong while the block reads it.
    """
    from PIL import Image as pillow

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # our own bound is stricter than the bomb warning
            pillow.init()  # a Pillow built without AVIF or JPEG 2000 lacks their entries
            image = pillow.open(path, formats=[f for f in IMAGE_FORMATS if f in pillow.OPEN])
        with image:
            yield image
    except pillow.DecompressionBombError as error:
        raise MediaError("its header promises far too many pixels", path) from error
    except pillow.UnidentifiedImageError as error:
        raise MediaError("its image format or color layout is not known", path) from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise MediaError(f"the image cannot be decoded: {error}", path) from error
