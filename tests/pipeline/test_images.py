"""Still images: upright, on white, 8 bits of RGB, or a reason."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from unimodal.pipeline import media
from unimodal.pipeline.errors import MediaError


def _reason(path: Path) -> str:
    with pytest.raises(MediaError) as caught:
        media.read_image(path)
    assert str(path) in str(caught.value)
    assert str(path) not in caught.value.reason
    return caught.value.reason


@pytest.mark.parametrize("side", [12000, 20000])
def test_a_header_that_promises_too_many_pixels_is_refused_before_decoding(
    tmp_path: Path, side: int
) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + crc

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    path = tmp_path / "bomb.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    assert "pixels" in _reason(path)


def test_a_truncated_image_is_refused(tmp_path: Path, photos: Path) -> None:
    path = tmp_path / "cut.png"
    path.write_bytes((photos / "astronaut.png").read_bytes()[:100_000])
    assert "cannot be decoded" in _reason(path)


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    upright = np.zeros((20, 30, 3), np.uint8)
    upright[:10, :15] = 255  # white in the upper left corner
    exif = Image.Exif()
    exif[0x0112] = 6  # stored so that a quarter turn clockwise shows it upright
    stored = np.rot90(upright, 1)
    path = tmp_path / "phone.jpg"
    Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif, quality=95)
    seen = media.read_image(path)
    found = media.probe(path)
    assert seen.shape == (20, 30, 3)
    assert (found.width, found.height) == (30, 20)
    assert np.abs(seen.astype(int) - upright).mean() < 3


def test_transparency_lies_on_white(tmp_path: Path) -> None:
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[..., 0] = 255  # red, and
    pixels[:2, :, 3] = 255  # opaque above, transparent below
    Image.fromarray(pixels).save(tmp_path / "a.png")
    seen = media.read_image(tmp_path / "a.png")
    assert (seen[:2] == [255, 0, 0]).all() and (seen[2:] == 255).all()
    palette = Image.fromarray(pixels).convert("RGB").convert("P")
    palette.save(tmp_path / "p.png", transparency=palette.getpixel((0, 0)))
    assert (media.read_image(tmp_path / "p.png") == 255).all()


def test_sixteen_bits_keep_their_scale(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    seen = media.read_image(tmp_path / "deep.png")
    assert np.abs(seen[..., 0].astype(float) - ramp / 257).max() <= 0.51
    dim = (ramp // 300).astype(np.uint16)  # a dark 16-bit picture stays dark
    Image.fromarray(dim).save(tmp_path / "dim.tif")
    assert media.read_image(tmp_path / "dim.tif").max() <= 1


def test_cmyk_becomes_rgb(tmp_path: Path) -> None:
    ink = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    ink.save(tmp_path / "print.jpg", quality=95)
    seen = media.read_image(tmp_path / "print.jpg")
    assert seen.shape == (8, 8, 3) and seen[0, 0, 0] > 200 and seen[0, 0, 1] < 60


def test_one_pixel_is_enough(tmp_path: Path) -> None:
    Image.new("RGB", (1, 1), (9, 8, 7)).save(tmp_path / "dot.png")
    assert media.read_image(tmp_path / "dot.png").tolist() == [[[9, 8, 7]]]


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM", "GIF", "AVIF"])
def test_a_format_is_known_by_its_bytes_whatever_the_name(tmp_path: Path, format: str) -> None:
    if format == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    path = tmp_path / "picture.dat"
    Image.new("RGB", (20, 10), (200, 30, 40)).save(path, format=format)
    assert media.probe(path).codec == format.lower()
    assert np.abs(media.read_image(path).astype(int) - [200, 30, 40]).max() < 12


def test_heic_is_named_with_its_remedy(tmp_path: Path) -> None:
    path = tmp_path / "phone.heic"
    path.write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100))
    assert "convert it" in _reason(path)


def test_postscript_starts_no_interpreter(tmp_path: Path) -> None:
    path = tmp_path / "page.png"
    path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n(x) print\n")
    assert _reason(path) == "not an image"
