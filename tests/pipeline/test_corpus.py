"""A folder of everything that breaks curators, through the whole of `curate`.

Each file is either measured rightly or quarantined with its reason; none of them stops the run,
hangs it, or makes it read a file that is not among the inputs.
"""

from __future__ import annotations

import os
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from unimodal.pipeline.presets import CurateSettings
from unimodal.pipeline.run import Run, curate
from unimodal.pipeline.settings import build

RIGHT: dict[str, dict[str, Any]] = {
    "alpha.png": {"kind": "image", "width": 64, "height": 48},
    "animated.gif": {"kind": "video", "frames": 10, "duration_s": 2.0},
    "cmyk.jpg": {"kind": "image", "width": 64, "height": 48},
    "concat:a|b.mp4": {"kind": "video", "frames": 20},
    "deep.png": {"kind": "image", "width": 64, "height": 48, "luma_mean": 128},
    "dot.png": {"kind": "image", "width": 1, "height": 1},
    "gray.jpg": {"kind": "image", "width": 64, "height": 48},
    "line.png": {"kind": "image", "width": 1, "height": 900},
    "one.mp4": {"kind": "video", "frames": 1},
    "phone.jpg": {"kind": "image", "width": 48, "height": 64},
    "picture.mp4": {"kind": "image", "width": 64, "height": 48},  # a PNG with a wrong name
    "progressive.jpg": {"kind": "image", "width": 64, "height": 48},
    "turned.mp4": {"kind": "video", "width": 96, "height": 128},
    "video.jpg": {"kind": "video", "frames": 20},  # a video with a wrong name
    "vfr.mkv": {"kind": "video", "frames": 20, "duration_s": 3.74},
}
"""What must be found of the readable ones."""

REFUSED = {
    "audio.mp4": "no video in it",
    "bomb.png": "pixels",
    "clock.ts": "time stamps",
    "cut.mp4": "not a video|truncated|damaged",
    "empty.mp4": "0 bytes",
    "garbage.mkv": "not a video",
    "half.png": "cannot be decoded",
    "list.ffconcat": "not a video",
    "list.m3u8": "not a video",
    "list.mp4": "not a video",
    "nothing.mp4": "no such file",
    "pages.ts": "not a video|no video|no frame",
    "pipe.mp4": "not a regular file",
    "text.png": "not a video|image",
}
"""What must be quarantined, and a word of the reason."""


@pytest.fixture(scope="module")
def corpus(
    tmp_path_factory: pytest.TempPathFactory,
    write_video: Callable[..., Path],
    moving: Callable[..., list[np.ndarray]],
) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    outside = tmp_path_factory.mktemp("outside")
    frames = moving(20, size=(96, 128), step=3)
    plain = write_video(outside / "secret.mp4", frames)
    secret = outside / "fifo.mp4"
    os.mkfifo(secret)  # whoever opens it hangs, and is found out
    _pictures(folder, frames[0][:48, :64])
    _videos(folder, plain, frames, write_video)
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "garbage.mkv").write_bytes(np.random.default_rng(1).bytes(50_000))
    (folder / "text.png").write_text("<html>not found</html>\n" * 50)
    (folder / "cut.mp4").write_bytes(plain.read_bytes()[: plain.stat().st_size // 2])
    (folder / "nothing.mp4").symlink_to(outside / "gone.mp4")
    os.mkfifo(folder / "pipe.mp4")
    header = "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n"
    (folder / "list.m3u8").write_text(f"{header}{secret}\n#EXT-X-ENDLIST\n")
    (folder / "list.mp4").write_text(f"{header}file://{secret}\n#EXT-X-ENDLIST\n")
    (folder / "list.ffconcat").write_text(f"ffconcat version 1.0\nfile '{secret}'\n")
    (folder / "pages.ts").write_text(f"{header}concat:{secret}|{plain}\n" * 200)
    assert {p.name for p in folder.iterdir()} == {*RIGHT, *REFUSED}
    return folder


def _pictures(folder: Path, pixels: np.ndarray) -> None:
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    picture.save(folder / "gray.jpg")
    Image.open(folder / "gray.jpg").convert("L").save(folder / "gray.jpg")
    picture.save(folder / "progressive.jpg", progressive=True)
    picture.convert("CMYK").save(folder / "cmyk.jpg")
    with_alpha = picture.convert("RGBA")
    with_alpha.putalpha(120)
    with_alpha.save(folder / "alpha.png")
    deep = np.full((48, 64), 128 * 257, np.uint16)
    Image.fromarray(deep).save(folder / "deep.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(folder / "phone.jpg", exif=exif)
    Image.new("RGB", (1, 1), (9, 9, 9)).save(folder / "dot.png")
    Image.effect_noise((1, 900), 60).save(folder / "line.png")
    picture.save(folder / "picture.png")
    (folder / "picture.png").rename(folder / "picture.mp4")
    data = (folder / "picture.mp4").read_bytes()
    (folder / "half.png").write_bytes(data[: len(data) // 2])
    shots = [Image.fromarray(np.ascontiguousarray(np.roll(pixels, 5 * i, 1))) for i in range(10)]
    shots[0].save(
        folder / "animated.gif", save_all=True, append_images=shots[1:], duration=200, loop=0
    )

    def chunk(kind: bytes, body: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + crc

    size = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    (folder / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def _videos(
    folder: Path, plain: Path, frames: list[np.ndarray], write_video: Callable[..., Path]
) -> None:
    import av

    (folder / "concat:a|b.mp4").write_bytes(plain.read_bytes() + b"1")
    (folder / "video.jpg").write_bytes(plain.read_bytes() + b"2")
    write_video(folder / "one.mp4", frames[:1])
    # 10 frames a tenth of a second apart, 10 more 0.3 s apart; the last one lasts 40 ms.
    ticks = [250 * i for i in range(10)] + [2500 + 750 * i for i in range(10)]
    write_video(folder / "vfr.mkv", frames, pts=ticks)
    data = plain.read_bytes()
    at = data.index(b"tkhd") + 4 + 40
    quarter = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    (folder / "turned.mp4").write_bytes(data[:at] + quarter + data[at + 36 :])
    with av.open(str(folder / "audio.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000, layout="mono")
        for i in range(10):
            sound = av.AudioFrame.from_ndarray(
                np.zeros((1, 1024), np.float32), format="fltp", layout="mono"
            )
            sound.sample_rate, sound.pts = 8000, i * 1024
            container.mux(stream.encode(sound))
        container.mux(stream.encode())
    # Every frame claims the same time: nothing can be cut in such a video.
    data = bytearray(write_video(folder / "clock.ts", frames * 12).read_bytes())
    packet = rb"\x00\x00\x01\xe0..[\x80-\xbf][\x80-\xff]"
    stamps = [found.start() + 9 for found in re.finditer(packet, data, re.S)]
    for at in stamps:  # 5 bytes of PTS in the header of every PES packet
        data[at : at + 5] = data[stamps[0] : stamps[0] + 5]
    (folder / "clock.ts").write_bytes(data)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Run:
    settings = build(CurateSettings, sets=["patience.stall_s=20", "decide.image_min_area=0"])
    files = [str(path) for path in corpus.iterdir()]
    out = tmp_path_factory.mktemp("run") / "run"
    return curate(files, out, settings, engine="local", workers=2)


def test_nothing_is_lost_and_nothing_is_both(run: Run, corpus: Path) -> None:
    read = {Path(uri).name for uri in run.clips.column("uri").to_pylist()}
    refused = {Path(uri).name for uri in run.quarantine.column("uri").to_pylist()}
    assert (read, refused) == (set(RIGHT), set(REFUSED))


@pytest.mark.parametrize("name", RIGHT)
def test_odd_media_are_measured_rightly(run: Run, name: str) -> None:
    rows = [row for row in run.clips.to_pylist() if Path(row["uri"]).name == name]
    assert len(rows) == 1
    for column, value in RIGHT[name].items():
        tolerance = 0.1 if column == "duration_s" else 1.0 if column == "luma_mean" else 0
        assert rows[0][column] == (pytest.approx(value, abs=tolerance) if tolerance else value)
    assert run.samples(rows[0]["part"])[rows[0]["uid"]] and rows[0]["luma_mean"] is not None


@pytest.mark.parametrize("name", REFUSED)
def test_broken_media_are_refused_with_their_reason(run: Run, name: str) -> None:
    (reason,) = [
        row["reason"] for row in run.quarantine.to_pylist() if Path(row["uri"]).name == name
    ]
    assert re.search(REFUSED[name], reason), reason
    assert "\n" not in reason and "progress" not in reason  # nothing had hung


def test_only_the_scorers_of_readable_pictures_say_anything(run: Run) -> None:
    """No score stage fails on a picture that the decode has accepted, however odd."""
    assert set(run.quarantine.column("stage").to_pylist()) == {"watch"}
