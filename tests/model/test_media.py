"""Pictures and clips as files, there and back."""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from unimodal.model import media
from unimodal.model.media import Take
from unimodal.pipeline.errors import MediaError
from unimodal.tokenize.vision.pixels import area_size, resize

ABOUT = {"prompt": 'ein "roter" Drache 風箏 <b>', "seed": 3}
CLIP = np.random.default_rng(0).integers(0, 256, (8, 24, 32, 3), np.uint8)
PIXELS = 1_000_000


def to_area(area: int) -> Callable[[int, int, str], tuple[int, int]]:
    return lambda height, width, kind: area_size(height, width, area)


@pytest.mark.parametrize("form", ["png", "webp", "jpeg"])
def test_a_picture_tells_its_origin_and_comes_back(form: str) -> None:
    data = media.picture(CLIP[0], form, ABOUT)
    with Image.open(io.BytesIO(data)) as image:
        told = image.text["unimodal"] if form == "png" else image.getexif()[0x010E]
    assert json.loads(told) == ABOUT
    back, fps = media.read(data, Take(pixels=PIXELS))
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
    back, rate = media.read(data, Take(size=to_area(24 * 32), fps=fps, pixels=PIXELS))
    assert back.shape == CLIP.shape and rate == pytest.approx(fps, rel=0.05)
    if form == "webp":
        assert (back == CLIP).all()


def test_of_a_fast_clip_so_many_pictures_are_taken_as_training_saw() -> None:
    data = media.clip(CLIP, 16.0, "webp", ABOUT)
    back, rate = media.read(data, Take(size=to_area(24 * 32), pixels=PIXELS))
    assert (back == CLIP[::2]).all() and rate == 8


def test_a_clip_is_scaled_as_it_is_read() -> None:
    back, _ = media.read(media.clip(CLIP, 8.0, "mp4", ABOUT), Take(size=to_area(4 * 24 * 32)))
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
        media.read(data, Take(size=to_area(1024), pixels=PIXELS))
    assert "/" not in str(caught.value).replace("I/O", "")


@pytest.mark.parametrize("shape", [(640, 320), (32, 32), (333, 500), (24, 40)])
def test_a_picture_is_scaled_as_it_is_read_and_the_sampler_finds_the_same_size(
    shape: tuple[int, int],
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    back, _ = media.read(media.picture(pixels, "png"), Take(size=to_area(1024)))
    sides = area_size(*shape, 1024)
    assert area_size(*back.shape[:2], 1024) == sides
    if area_size(*sides, 1024) == sides:
        assert (back == resize(pixels, sides)).all()
    assert back[..., 0].size < 4.3 * 1024


NUMBERED = np.arange(48, dtype=np.uint8).repeat(8 * 8 * 3).reshape(48, 8, 8, 3)


def test_of_a_long_clip_the_beginning_is_taken_or_all_or_it_is_refused() -> None:
    data = media.clip(NUMBERED, 8.0, "webp", {})
    assert (media.read(data, Take())[0] == NUMBERED[:40]).all()
    assert (media.read(data, Take(frames=48, whole=True))[0] == NUMBERED).all()
    with pytest.raises(MediaError, match="more than 47 pictures of 8x8 pixels at 8 a second"):
        media.read(data, Take(frames=47, whole=True))
    with pytest.raises(MediaError, match="more than 40 pictures of 8x8"):
        media.read(data, Take(frames=100, whole=True, volume=40 * 64 + 63))
    assert len(media.read(data, Take(volume=21 * 64))[0]) == 20


def test_a_slow_clip_may_be_taken_at_a_steady_rate() -> None:
    data = media.clip(NUMBERED[:8], 4.0, "webp", {})
    assert media.read(data, Take())[1] == 4
    back, rate = media.read(data, Take(steady=True))
    assert rate == 8 and (back == NUMBERED[:8].repeat(2, axis=0)).all()


def test_decoding_ends_when_time_is_up_or_nobody_waits() -> None:
    for form in ("mp4", "webp"):
        data = media.clip(NUMBERED, 8.0, form, {})
        with pytest.raises(MediaError, match="more than 1e-09 seconds"):
            media.read(data, Take(seconds=1e-9))
        looks = [False] * 12
        with pytest.raises(media.Stopped):
            media.read(data, Take(), lambda left=looks: left.pop() if left else True)


def test_pictures_that_are_decoded_and_not_taken_are_bounded_too() -> None:
    data = media.clip(NUMBERED, 1000.0, "mp4", {})
    with pytest.raises(MediaError, match="more than 31 frames"):
        media.read(data, Take(frames=1, fps=8.0))


@pytest.mark.parametrize("form", ["jpeg", "webp", "png", "gif", "mp4"])
def test_long_prompts_fit_into_any_file_or_are_cut_and_say_so(form: str) -> None:
    about = {"prompt": "風" * 8000 + "凧" * 4000, "negative": "箏" * 12000, "seed": 3}
    if form in ("gif", "mp4"):
        assert media.clip(CLIP, 8.0, form, about)
        return
    data = media.picture(CLIP[0], form, about)
    with Image.open(io.BytesIO(data)) as image:
        told = image.text["unimodal"] if form == "png" else image.getexif()[0x010E]
    record = json.loads(told)
    assert record["seed"] == 3 and record["prompt"].startswith("風" * 1000)
    if form == "png":
        assert record == about
    else:
        assert record["negative"].endswith("箏… (cut: it has 12000 characters)")
