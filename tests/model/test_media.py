"""Pictures and clips as files, there and back."""

from __future__ import annotations

import io
import json
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from unimodal.model import media
from unimodal.pipeline.errors import MediaError

ABOUT = {"prompt": 'ein "roter" Drache 風箏 <b>', "seed": 3}
CLIP = np.random.default_rng(0).integers(0, 256, (8, 24, 32, 3), np.uint8)
PIXELS = 1_000_000


@pytest.mark.parametrize("form", ["png", "webp", "jpeg"])
def test_a_picture_tells_its_origin_and_comes_back(form: str) -> None:
    data = media.picture(CLIP[0], form, ABOUT)
    with Image.open(io.BytesIO(data)) as image:
        told = image.text["unimodal"] if form == "png" else image.getexif()[0x010E]
    assert json.loads(told) == ABOUT
    back, fps = media.read(data, PIXELS, 1024)
    assert fps is None and back.shape == CLIP[0].shape
    if form != "jpeg":
        assert (back == CLIP[0]).all()


@pytest.mark.parametrize("form", ["webp", "gif", "mp4"])
@pytest.mark.parametrize("fps", [3.0, 8.0, 24.0])
def test_a_clip_tells_its_origin_and_keeps_its_pace(form: str, fps: float) -> None:
    data = media.clip(CLIP, fps, form, ABOUT)
    if form == "mp4":
        import av

        with av.open(io.BytesIO(data)) as container:
            told = container.metadata["comment"]
    else:
        with Image.open(io.BytesIO(data)) as image:
            told = image.getexif()[0x010E] if form == "webp" else image.info["comment"]
    assert json.loads(told) == ABOUT
    back, rate = media.read(data, PIXELS, 24 * 32, fps=fps)
    assert back.shape == CLIP.shape and rate == pytest.approx(fps, rel=0.05)
    if form == "webp":
        assert (back == CLIP).all()


def test_of_a_fast_clip_so_many_pictures_are_taken_as_training_saw() -> None:
    data = media.clip(CLIP, 16.0, "webp", ABOUT)
    back, rate = media.read(data, PIXELS, 24 * 32, fps=8.0)
    assert (back == CLIP[::2]).all() and rate == 8


def test_a_clip_is_scaled_as_it_is_read() -> None:
    back, _ = media.read(media.clip(CLIP, 8.0, "mp4", ABOUT), PIXELS, 4 * 24 * 32)
    assert back.shape == (8, 48, 64, 3)


def _promising(width: int, height: int) -> bytes:
    """A PNG whose header promises pixels that are not there."""

    def chunk(name: bytes, data: bytes) -> bytes:
        check = zlib.crc32(name + data)
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", check)

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(b""))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + body + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"", "empty"),
        (b"#EXTM3U\nfile:///etc/passwd", "not a video"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a video"),
        (_promising(1001, 1000), "over the limit"),
        (_promising(100_000, 100_000), "too many"),
        (_promising(10, 10), "decoded"),
        (media.clip(CLIP[:3], 8.0, "gif", {}), "at least 4"),
        (media.picture(CLIP[0], "png")[:-300], "decoded"),
    ],
)
def test_what_is_no_picture_is_named_and_no_path_is_told(data: bytes, reason: str) -> None:
    with pytest.raises(MediaError, match=reason) as caught:
        media.read(data, PIXELS, 1024)
    assert "/" not in str(caught.value).replace("I/O", "")
