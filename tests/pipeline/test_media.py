"""Files that nobody vouches for: the right pixels and times, or a reason."""

from __future__ import annotations

import struct
import wave
from collections.abc import Callable
from fractions import Fraction
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unimodal.pipeline import media
from unimodal.pipeline.bounds import Limits
from unimodal.pipeline.errors import MediaError


def _read_all(path: Path) -> None:
    """Read a source to its end as the pipeline does."""
    if media.probe(path).kind == "image":
        media.read_image(path)
        return
    with media.open_video(path) as video:
        pts = [frame.pts for frame in video.frames()]
        video.check_complete(pts[0], pts[-1])


def _reason(path: Path) -> str:
    with pytest.raises(MediaError) as caught:
        _read_all(path)
    assert str(path) in str(caught.value)
    assert str(path) not in caught.value.reason
    return caught.value.reason


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "empty.png"
    path.write_bytes(b"")
    assert _reason(path) == "empty file (0 bytes)"


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    assert _reason(tmp_path / "nothing.mp4") == "no such file"


def test_text_that_is_named_like_a_video_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "notes.mp4"
    path.write_text("These are not the frames you are looking for.\n" * 100)
    assert "not a video" in _reason(path)


def test_a_named_pipe_is_refused_without_waiting_for_it(tmp_path: Path) -> None:
    import os

    path = tmp_path / "pipe.mp4"
    os.mkfifo(path)
    assert _reason(path) == "not a regular file"


@pytest.mark.parametrize(
    ("name", "faststart"), [("a.mp4", False), ("a.mp4", True), ("a.mkv", False), ("a.avi", False)]
)
def test_a_truncated_video_is_refused(
    tmp_path: Path,
    write_video: Callable[..., Path],
    moving: Callable[..., list[np.ndarray]],
    name: str,
    faststart: bool,
) -> None:
    whole = write_video(tmp_path / name, moving(100, step=3), faststart=faststart)
    _read_all(whole)
    cut = tmp_path / f"cut-{name}"
    data = whole.read_bytes()
    cut.write_bytes(data[: len(data) * 6 // 10])
    reason = _reason(cut)
    assert "truncated" in reason or "damaged" in reason or "not a video" in reason


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts"])
def test_sound_that_is_longer_than_the_picture_is_no_damage(tmp_path: Path, name: str) -> None:
    import av

    path = tmp_path / name
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=25)
        video.width = video.height = 64
        audio = container.add_stream("aac", rate=8000, layout="mono")
        for i in range(25):
            image = av.VideoFrame.from_ndarray(np.full((64, 64, 3), i, np.uint8), format="rgb24")
            container.mux(video.encode(image))
        container.mux(video.encode())
        for i in range(40):  # 5 s
            sound = av.AudioFrame.from_ndarray(
                np.zeros((1, 1024), np.float32), format="fltp", layout="mono"
            )
            sound.sample_rate, sound.pts = 8000, i * 1024
            container.mux(audio.encode(sound))
        container.mux(audio.encode())
    _read_all(path)
    assert len(list(media.iter_frames(path))) == 25


def test_a_damaged_video_is_refused_with_the_extent_of_the_damage(
    tmp_path: Path, write_video: Callable[..., Path], moving: Callable[..., list[np.ndarray]]
) -> None:
    path = write_video(tmp_path / "whole.mp4", moving(100, step=3), faststart=True)
    data = bytearray(path.read_bytes())
    start = data.index(b"mdat") + 4000
    noise = np.random.default_rng(0).integers(0, 256, (len(data) - start) // 2, dtype=np.uint8)
    data[start : start + len(noise)] = noise.tobytes()
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(data)
    assert "damaged" in _reason(broken)


def test_audio_alone_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "song.wav"
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(bytes(16000))
    assert "not a video" in _reason(path)
    import av

    sound = tmp_path / "song.mp4"
    with av.open(str(sound), "w") as container:
        stream = container.add_stream("aac", rate=44100, layout="mono")
        for i in range(10):
            frame = av.AudioFrame.from_ndarray(
                np.zeros((1, 1024), np.float32), format="fltp", layout="mono"
            )
            frame.sample_rate, frame.pts = 44100, i * 1024
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert "no video in it" in _reason(sound)


@pytest.mark.parametrize("name", ["list.m3u8", "list.mp4", "list.ffconcat", "image.sdp"])
def test_a_playlist_reads_no_other_file(tmp_path: Path, bikes: Path, name: str) -> None:
    secret = tmp_path / "secret.mp4"
    secret.write_bytes(bikes.read_bytes())
    scripts = {
        "list.m3u8": f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{secret}\n#EXT-X-ENDLIST\n",
        "list.mp4": "#EXTM3U\n#EXTINF:10,\nhttp://127.0.0.1:9/x.ts\n#EXT-X-ENDLIST\n",
        "list.ffconcat": f"ffconcat version 1.0\nfile '{secret}'\n",
        "image.sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n",
    }
    path = tmp_path / name
    path.write_text(scripts[name])
    assert "not a video" in _reason(path)


@pytest.mark.parametrize("suffix", [".mkv", ".mp4"])
def test_a_title_that_is_not_utf8_is_no_reason_to_refuse_a_video(
    tmp_path: Path,
    suffix: str,
    write_video: Callable[..., Path],
    moving: Callable[..., list[np.ndarray]],
) -> None:
    import av

    plain, path = write_video(tmp_path / "plain.mp4", moving(8)), tmp_path / f"titled{suffix}"
    with av.open(str(plain)) as before, av.open(str(path), "w") as after:
        after.metadata["title"] = "Cafe au lait"
        stream = after.add_stream_from_template(before.streams.video[0])
        for packet in before.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                after.mux(packet)
    data = path.read_bytes()
    assert b"Cafe" in data
    path.write_bytes(data.replace(b"Cafe", b"Caf\xe9"))
    with media.open_video(path) as video:
        assert len(list(video.frames())) == 8


def test_a_name_that_looks_like_a_protocol_is_a_file(tmp_path: Path, bikes: Path) -> None:
    path = tmp_path / "concat:a|b http:%d?x.mp4"
    path.write_bytes(bikes.read_bytes())
    assert media.probe(path).kind == "video"


def test_a_video_frame_over_the_limit_is_refused(bikes: Path) -> None:
    with pytest.raises(MediaError, match="640x272 pixels are over the limit"):
        media.probe(bikes, Limits(max_video_pixels=100_000))
    with (
        pytest.raises(MediaError, match="more than 10 frames"),
        media.open_video(bikes, Limits(max_frames=10)) as video,
    ):
        list(video.frames())


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_more_than_one_frame_makes_a_video(tmp_path: Path, suffix: str) -> None:
    colors = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    frames = [Image.new("RGB", (32, 24), color) for color in colors]
    path = tmp_path / f"anim.{suffix}"
    frames[0].save(
        path, save_all=True, append_images=frames[1:], duration=[40, 200, 60], lossless=True
    )
    found = media.probe(path)
    assert (found.kind, found.width, found.height) == ("video", 32, 24)
    seen = list(media.iter_frames(path))
    assert [pts for pts, _ in seen] == [0, 40, 240]  # milliseconds, each frame its own time
    for (_, pixels), color in zip(seen, colors, strict=True):
        assert np.abs(pixels.reshape(-1, 3).mean(axis=0) - color).max() < 4
    assert [pts for pts, _ in media.iter_frames(path, 40, 240)] == [40]


def test_one_frame_of_an_animation_format_is_an_image(tmp_path: Path) -> None:
    Image.new("RGB", (32, 24)).save(tmp_path / "still.gif")
    assert media.probe(tmp_path / "still.gif").kind == "image"


def _rotate_metadata(data: bytes, degrees: int) -> bytes:
    """Write a display matrix (ISO/IEC 14496-12 §8.3.2) for a clockwise turn into an MP4."""
    one = 0x00010000
    matrix = {90: (0, one, -one, 0), 180: (-one, 0, 0, -one), 270: (0, -one, one, 0)}[degrees]
    a, b, c, d = matrix
    at = data.index(b"tkhd") + 4 + 40  # version 0: the matrix follows 40 bytes of other fields
    return data[:at] + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30) + data[at + 36 :]


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_rotation_metadata_is_applied(
    tmp_path: Path, write_video: Callable[..., Path], degrees: int
) -> None:
    picture = np.zeros((64, 96, 3), np.uint8)
    picture[:32, :48] = 255  # white in the upper left corner
    path = write_video(tmp_path / "plain.mp4", [picture] * 3)
    turned = tmp_path / "turned.mp4"
    turned.write_bytes(_rotate_metadata(path.read_bytes(), degrees))
    expected = np.rot90(picture, -degrees // 90)  # clockwise
    found = media.probe(turned)
    assert (found.height, found.width) == expected.shape[:2]
    _, seen = next(media.iter_frames(turned))
    assert seen.shape == expected.shape
    assert np.abs(seen.astype(int) - expected).mean() < 8


def test_pixel_aspect_is_applied(tmp_path: Path, write_video: Callable[..., Path]) -> None:
    picture = np.full((64, 64, 3), 128, np.uint8)
    path = write_video(tmp_path / "wide.mp4", [picture] * 3, aspect=Fraction(3, 2))
    found = media.probe(path)
    assert (found.width, found.height) == (96, 64)
    assert next(media.iter_frames(path))[1].shape == (64, 96, 3)


def test_times_are_those_of_the_container_at_a_variable_rate(
    tmp_path: Path, write_video: Callable[..., Path], moving: Callable[..., list[np.ndarray]]
) -> None:
    ticks = [0, 100, 200, 900, 1000, 2500]  # of 1/2500 s
    path = write_video(tmp_path / "vfr.mkv", moving(6), pts=ticks)
    with media.open_video(path) as video:
        seconds = [float(frame.pts * video.time_base) for frame in video.frames()]
    assert seconds == pytest.approx([t / 2500 for t in ticks], abs=1e-3)  # Matroska: milliseconds


def test_a_span_gives_the_same_frames_as_a_pass_from_the_beginning(videos: Path) -> None:
    for name, low, high in [("bikes.mp4", 40, 43), ("bikes.mp4", 200, 250), ("bikes.mp4", 0, 2)]:
        every = list(islice(media.iter_frames(videos / name, size=(68, 160)), high + 1))
        end = every[high][0] if high < len(every) else None
        span = list(media.iter_frames(videos / name, every[low][0], end, size=(68, 160)))
        assert [pts for pts, _ in span] == [pts for pts, _ in every[low:high]]
        for (_, mine), (_, theirs) in zip(span, every[low:high], strict=True):
            assert (mine == theirs).all()


def test_frames_do_not_depend_on_the_number_of_decoder_threads(bikes: Path) -> None:
    def frames(threads: int) -> list[bytes]:
        with media.open_video(bikes, threads=threads) as video:
            return [
                video.upright(frame, (160, 68), "rgb24").tobytes()
                for frame in islice(video.frames(), 60)
            ]

    assert frames(1) == frames(4)
