"""What the tokenizer is measured against: JPEG of no more bits, as good as JPEG can be made."""

from __future__ import annotations

import io
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import small_tokenizer as benchmark
from unimodal.pipeline.media import read_image
from unimodal.tokenize.vision.movq import MoVQ, MoVQConfig
from unimodal.tokenize.vision.pixels import resize
from unimodal.tokenize.vision.tokenizer import VisionTokenizer


@pytest.fixture(scope="module")
def coffee(photos: Path) -> np.ndarray:
    return resize(read_image(photos / "coffee.png"), (128, 192))


def error(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.square(a.astype(float) - b).mean())


def test_jpeg_data_is_what_lies_between_the_scan_header_and_the_end(coffee: np.ndarray) -> None:
    data, length = benchmark.jpeg_data(Image.fromarray(coffee), 30)
    scan = data.index(b"\xff\xda")  # no segment before it holds these bytes
    header = scan + 2 + int.from_bytes(data[scan + 2 : scan + 4], "big")
    assert data[-2:] == b"\xff\xd9"
    assert length == len(data[header:-2]) > 1000
    # The tables are the standard's: another picture of that quality has the same header.
    other, _ = benchmark.jpeg_data(Image.fromarray(coffee[::-1].copy()), 30)
    assert other[:header] == data[:header]


def test_a_rival_stays_within_its_bytes_and_uses_them(coffee: np.ndarray) -> None:
    sizes: list[int] = []

    def watched(image: Image.Image, quality: int) -> tuple[bytes, int]:
        data, length = benchmark.jpeg_file(image, quality)
        sizes.append(length)
        return data, length

    copies = {most: benchmark.squeeze(coffee, most, watched) for most in (200, 900, 1500, 6000)}
    assert copies[200] is None  # headers alone are larger
    assert min(sizes) > 200
    errors = [error(copies[most], coffee) for most in (900, 1500, 6000)]
    assert errors == sorted(errors, reverse=True) and errors[0] > 2 * errors[2]
    # Where there is room, it is JPEG's largest that fits, at full size.
    best = max(q for q in range(1, 96) if len(_jpeg(coffee, q)) <= 6000)
    direct = np.asarray(Image.open(io.BytesIO(_jpeg(coffee, best))))
    np.testing.assert_array_equal(copies[6000], direct)
    # Where there is little, a reduced picture beats the full size at quality 1.
    data = benchmark.squeeze(coffee, 400, benchmark.jpeg_data)
    assert data is not None
    assert error(data, coffee) < error(np.asarray(Image.open(io.BytesIO(_jpeg(coffee, 1)))), coffee)


def _jpeg(pixels: np.ndarray, quality: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality, optimize=True)
    return file.getvalue()


def test_bits_follow_the_codebook(coffee: np.ndarray) -> None:
    codes = np.zeros((1, 1, 16, 24), np.int64)
    one = benchmark.Quality("coffee", 0, 0, 0, 0, coffee[None], coffee[None], codes)
    found = [benchmark.rivals(one, book, ["JPEG, data"])["JPEG, data"][0] for book in (16, 4096)]
    assert found[1] > found[0] + 1  # three times the bits
    (none, _) = benchmark.rivals(one, 16, ["JPEG, file"])["JPEG, file"]
    assert math.isnan(none)  # 192 bytes


@pytest.mark.slow
def test_two_tokenizers_of_different_codebooks_are_compared_in_one_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(benchmark, "PHOTOGRAPHS", benchmark.PHOTOGRAPHS[:4])
    monkeypatch.setattr(benchmark, "VIDEOS", benchmark.VIDEOS[2:])
    photographs, emoji, videos = benchmark.photographs, benchmark.emoji, benchmark.videos
    monkeypatch.setattr(benchmark, "videos", lambda t: videos(t, frames=4))
    monkeypatch.setattr(benchmark, "photographs", lambda t: photographs(t, side=64))
    monkeypatch.setattr(benchmark, "emoji", lambda t: emoji(t, count=12))
    shape = {"ch": 32, "ch_mult": (1, 1, 1, 1), "num_res_blocks": 1, "attn_resolutions": (3,)}
    wide = MoVQConfig(codebook_size=512, embed_dim=16, z_channels=16, **shape)
    VisionTokenizer(MoVQ(wide)).save(tmp_path / "other")
    arguments = ["small_tokenizer.py", "--against", str(tmp_path / "other")]
    monkeypatch.setattr(sys, "argv", [*arguments, "--pictures", str(tmp_path / "sheets")])
    benchmark.main()
    text = capsys.readouterr().out
    assert "512 codes of 9 bits" in text and f"small less {tmp_path / 'other'}" in text
    assert {p.name for p in (tmp_path / "sheets").iterdir()} == {
        *("photographs.jpg", "emoji.png", "videos.jpg")
    }
    monkeypatch.setattr(sys, "argv", [arguments[0], arguments[2], "--json"])
    benchmark.main()
    (other,) = json.loads(capsys.readouterr().out)
    assert other["bits a code"] == 9
    for group in other["groups"].values():
        told = [one["PSNR"] for one in group["each"].values()]
        assert group["mean"]["PSNR"] == pytest.approx(np.mean(told))
    assert other["groups"]["held-out emoji 64x64"]["mean"]["JPEG, file"] is None
