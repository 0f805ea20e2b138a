"""Exported files hold the frames that they say they hold, for every container and way to cut."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from unimodal.pipeline import media
from unimodal.pipeline.errors import UsageError
from unimodal.pipeline.export import Exported, export_clips
from unimodal.pipeline.presets import CurateSettings
from unimodal.pipeline.run import Run, curate
from unimodal.pipeline.settings import build

SETS = [
    'skip=["text", "quality", "embed", "nsfw", "match", "dedup"]',
    *("decide.image_min_area=0", "decide.video_min_side=0", "decide.flow_min=none", "report=false"),
    *("decide.flow_max=none", "decide.video_min_s=none", "cut.max_clip_s=1.3"),
]

Paint = Callable[..., list[np.ndarray]]


def _curate(*inputs: Path, out: Path, sets: Iterable[str] = ()) -> Run:
    settings = build(CurateSettings, sets=[*SETS, *sets])
    return curate(inputs, out, settings, engine="inline")


def _frames(path: Path, start: int | None = None, end: int | None = None) -> dict[Fraction, Any]:
    """Pictures by their time in seconds."""
    with media.open_video(path) as video:
        tick = video.time_base
    return {pts * tick: pixels for pts, pixels in media.iter_frames(path, start, end)}


def _packets(path: Path) -> list[Any]:
    with av.open(str(path)) as container:
        return [packet for packet in container.demux(video=0) if packet.size]


def _index(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "clips.jsonl").read_text().splitlines()]


def _encode(path: Path, frames: list[np.ndarray], codec: str, options: dict[str, str]) -> Path:
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=25, options=options)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for pixels in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def sources(
    tmp_path_factory: pytest.TempPathFactory,
    bikes: Path,
    moving: Paint,
    write_video: Callable[..., Path],
) -> Path:
    """Videos of many containers, codecs and kinds of time."""
    folder = tmp_path_factory.mktemp("sources")
    shutil.copy(bikes, folder)
    frames = moving(90, step=2.0)
    gop = {"g": "20", "bf": "3", "preset": "ultrafast"}
    x264 = gop | {"x264-params": "scenecut=0:b-pyramid=none"}
    _encode(folder / "closed.mp4", frames, "libx264", x264)
    _encode(folder / "open.mp4", frames, "libx264", gop | {"x264-params": "open-gop=1:scenecut=0"})
    _encode(folder / "stream.ts", frames, "libx264", x264)
    _encode(folder / "vp8.webm", frames, "libvpx", {"g": "20", "deadline": "realtime"})
    _encode(folder / "mpeg4.avi", frames, "mpeg4", {"g": "20"})
    rng = np.random.default_rng(5)
    pts = np.cumsum(rng.integers(40, 400, 90))  # of 1 / 2500 s: 6 to 60 frames a second
    write_video(folder / "vfr.mp4", frames, pts=[int(p) for p in pts])
    write_video(folder / "wide.mp4", moving(40, size=(64, 64)), aspect=Fraction(3, 2))
    plain = write_video(folder / "turned.mp4", moving(40)).read_bytes()
    at = plain.index(b"tkhd") + 44
    quarter = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    (folder / "turned.mp4").write_bytes(plain[:at] + quarter + plain[at + 36 :])
    return folder


@pytest.fixture(scope="module")
def run(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    made = _curate(sources, out=tmp_path_factory.mktemp("run") / "run")
    assert made.quarantined == 0
    return made


@pytest.fixture(scope="module")
def originals(sources: Path) -> dict[str, dict[Fraction, Any]]:
    """All pictures of all sources, by time stamp in seconds."""
    return {str(path): _frames(path) for path in sources.iterdir()}


@pytest.mark.parametrize("mode", ["copy", "keyframe"])
def test_copied_packets_show_the_very_pixels_of_the_source_at_their_times(
    run: Run, originals: dict[str, dict[Fraction, Any]], tmp_path: Path, mode: Any
) -> None:
    done = export_clips(run, tmp_path / "out", mode=mode)
    rows = _index(tmp_path / "out")
    assert len(rows) == done.written and rows
    whole = 0
    for row in rows:
        made, tick = row["export"], Fraction(row["time_base"])
        original = originals[row["uri"]]
        seen = _frames(tmp_path / "out" / made["file"])
        begin = min(seen)
        # Matroska and AVI count in other ticks than the source: the nearest frame is the frame.
        times = np.array([float(moment) for moment in original])
        pictures = list(original.values())
        found = set()
        for moment, pixels in seen.items():
            at = float(made["start_pts"] * tick + moment - begin)
            nearest = int(np.argmin(np.abs(times - at)))
            assert abs(times[nearest] - at) < 0.002
            assert np.array_equal(pictures[nearest], pixels), (row["uri"], at)
            found.add(nearest)
        assert len(found) == len(seen)
        # Nothing that cannot be decoded, as frames that lean on a scene left out.
        assert len(_packets(tmp_path / "out" / made["file"])) == len(seen)
        inside = [
            i for i, at in enumerate(original) if row["start_pts"] <= at / tick < row["end_pts"]
        ]
        if mode == "copy":
            assert set(inside) <= found, row["uri"]  # all of the clip, perhaps more
            assert made["start_pts"] <= row["start_pts"] and made["start_s"] <= row["start_s"]
        else:
            assert made["start_pts"] >= row["start_pts"]  # nothing of the scene before
            assert found >= {i for i in inside if times[i] >= float(made["start_pts"] * tick)}
        assert made["end_pts"] >= min(row["end_pts"], max(original) / tick)
        whole += set(inside) == found
    assert whole > 3  # and where key frames allow it, nothing but the clip
    if mode == "copy":
        assert not done.failed and len(rows) == run.kept
        assert {Path(row["export"]["file"]).suffix for row in rows} == {".mp4", ".mkv"}
    else:
        assert done.failed and all("no key frame" in row["reason"] for row in done.failed)
        assert len(rows) + len(done.failed) == run.kept


def test_exact_clips_have_every_frame_at_its_time_and_no_other(
    run: Run, originals: dict[str, dict[Fraction, Any]], tmp_path: Path
) -> None:
    done = export_clips(run, tmp_path / "out", mode="exact", crf=12)
    assert not done.failed and done.written == run.kept
    for row in _index(tmp_path / "out"):
        made, tick = row["export"], Fraction(row["time_base"])
        span = [
            (at, pixels)
            for at, pixels in originals[row["uri"]].items()
            if row["start_pts"] <= at / tick < row["end_pts"]
        ]
        seen = _frames(tmp_path / "out" / made["file"])
        assert len(seen) == len(span) == row["frames"]
        begin = next(iter(seen))
        for (at, pixels), (shown, exported) in zip(span, seen.items(), strict=True):
            assert shown - begin == pytest.approx(at - span[0][0], abs=1e-6)  # VFR and all
            assert exported.shape == pixels.shape  # upright, with square pixels
            error = np.square(exported.astype(float) - pixels).mean()
            assert 10 * np.log10(255**2 / max(error, 1e-9)) > 30, (row["uri"], at)
        with av.open(str(tmp_path / "out" / made["file"])) as container:
            (stream,) = container.streams
            assert stream.type == "video" and stream.duration is not None
            length = stream.duration * stream.time_base
        keys = sum(packet.is_keyframe for packet in _packets(tmp_path / "out" / made["file"]))
        assert keys == 1  # the source's key frames are not the encoder's
        assert length == pytest.approx((row["end_pts"] * tick) - span[0][0], abs=0.002)
        assert made["start_pts"] * tick == span[0][0]


def test_bars_are_cropped_and_colors_stay(
    tmp_path: Path, moving: Paint, write_video: Callable[..., Path]
) -> None:
    frames = moving(40, size=(90, 160))
    for frame in frames:
        frame[:15] = frame[-13:] = 0
    source = write_video(tmp_path / "bars.mp4", frames)
    run = _curate(source, out=tmp_path / "run", sets=["cut.max_clip_s=0"])
    (row,) = run.clips.to_pylist()
    assert (row["crop_y0"], row["crop_y1"]) != (0, 90)
    export_clips(run, tmp_path / "out", mode="exact", crop=True, crf=10)
    (made,) = _index(tmp_path / "out")
    top = row["crop_y0"] + row["crop_y0"] % 2
    seen = list(_frames(tmp_path / "out" / made["export"]["file"]).values())
    height = made["export"]["height"]
    assert seen[0].shape == (height, 160, 3) and height % 2 == 0 and height <= 64
    original = list(_frames(source).values())
    for one, other in zip(seen, original, strict=True):
        assert np.abs(one.astype(int) - other[top : top + height]).mean() < 6
    with pytest.raises(UsageError, match="cannot be cropped: use --mode exact"):
        export_clips(run, tmp_path / "out", mode="copy", crop=True)


def test_color_tags_of_the_source_are_kept(tmp_path: Path, moving: Paint) -> None:
    source = tmp_path / "hd.mp4"
    with av.open(str(source), "w") as container:
        stream: Any = container.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = 96, 128, "yuv420p"
        context = stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = 1  # BT.709
        for pixels in moving(30):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            container.mux(stream.encode(frame.reformat(format="yuv420p", dst_colorspace=1)))
        container.mux(stream.encode())
    run = _curate(source, out=tmp_path / "run", sets=["cut.max_clip_s=0"])
    export_clips(run, tmp_path / "out", mode="exact")
    (row,) = _index(tmp_path / "out")
    with av.open(str(tmp_path / "out" / row["export"]["file"])) as container:
        context = container.streams.video[0].codec_context
        assert (context.colorspace, context.color_primaries, context.color_trc) == (1, 1, 1)


def test_animated_pictures_are_copied_whole_or_encoded_exactly(
    tmp_path: Path, moving: Paint
) -> None:
    frames = [Image.fromarray(frame) for frame in moving(24, size=(48, 65))]
    times = [40 + 20 * (i % 5) for i in range(24)]
    frames[0].save(
        tmp_path / "a.webp", save_all=True, append_images=frames[1:], duration=times, lossless=True
    )
    run = _curate(tmp_path / "a.webp", out=tmp_path / "run", sets=["cut.max_clip_s=0"])
    export_clips(run, tmp_path / "copy")
    (row,) = _index(tmp_path / "copy")
    copied = tmp_path / "copy" / row["export"]["file"]
    assert copied.suffix == ".webp" and copied.read_bytes() == (tmp_path / "a.webp").read_bytes()
    done = export_clips(run, tmp_path / "exact", mode="exact", crf=8)
    assert not done.failed
    seen = _frames(tmp_path / "exact" / f"{row['uid']}.mp4")
    assert np.allclose(np.diff([float(at) for at in seen]), np.array(times[:-1]) / 1000)
    for pixels, frame in zip(seen.values(), frames, strict=True):
        assert pixels.shape == (48, 64, 3)  # an odd column has no place in 4:2:0
        luma = (pixels - np.asarray(frame)[:, :64].astype(float)) @ [0.2126, 0.7152, 0.0722]
        assert np.abs(luma).mean() < 3
    split = _curate(tmp_path / "a.webp", out=tmp_path / "split", sets=["cut.max_clip_s=1"])
    done = export_clips(split, tmp_path / "parts")
    assert {row["reason"] for row in done.failed} == {
        "an animated picture cannot be copied in part: use --mode exact"
    }


def test_images_are_copied_as_they_are_or_written_upright(tmp_path: Path, photos: Path) -> None:
    picture = Image.open(photos / "astronaut.png").convert("RGB").resize((120, 80))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned a quarter clockwise when shown
    (tmp_path / "in").mkdir()
    picture.save(tmp_path / "in" / "turned.dat", format="JPEG", exif=exif, quality=95)
    run = _curate(tmp_path / "in" / "turned.dat", out=tmp_path / "run")
    export_clips(run, tmp_path / "copy")
    (row,) = _index(tmp_path / "copy")
    copied = tmp_path / "copy" / f"{row['uid']}.jpg"  # called by what it is
    assert copied.read_bytes() == (tmp_path / "in" / "turned.dat").read_bytes()
    export_clips(run, tmp_path / "exact", mode="exact")
    upright = np.asarray(Image.open(tmp_path / "exact" / f"{row['uid']}.png"))
    assert np.array_equal(upright, media.read_image(tmp_path / "in" / "turned.dat"))
    assert upright.shape == (120, 80, 3)


def _bytes(out: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.iterdir()}


def test_what_is_there_and_whole_is_kept_and_the_rest_is_made(
    tmp_path: Path, bikes: Path, emoji: list[Path]
) -> None:
    (tmp_path / "in").mkdir()
    for path in (bikes, *emoji[:4]):
        shutil.copy(path, tmp_path / "in")
    (tmp_path / "in" / f"{emoji[0].stem}.txt").write_text("first words")
    run = _curate(tmp_path / "in", out=tmp_path / "run")
    out = tmp_path / "out"
    first = export_clips(run, out)
    before = _bytes(out)
    assert {Path(name).suffix for name in before} == {".mp4", ".png", ".json", ".txt", ".jsonl"}
    (text,) = out.glob("*.txt")
    assert text.read_text() == "first words\n"

    again = export_clips(run, out)
    assert (again.written, again.kept, again.failed) == (0, first.written, [])
    unchanged = {name for name in before if name != "clips.jsonl"}
    assert {n: v for n, v in _bytes(out).items() if n in unchanged} == {
        n: before[n] for n in unchanged
    }

    clips = sorted(out.glob("*.mp4"))
    clips[0].write_bytes(clips[0].read_bytes()[:-100])  # cut off
    clips[1].unlink()
    clips[2].with_suffix(".json").write_text("{broken")
    mended = export_clips(run, out)
    assert (mended.written, mended.kept) == (3, first.written - 3)
    assert {n: v[0] for n, v in _bytes(out).items()} == {n: v[0] for n, v in before.items()}

    (tmp_path / "in" / f"{emoji[0].stem}.txt").write_text("other words")
    (tmp_path / "in" / f"{emoji[1].stem}.txt").write_text("new words")
    run = _curate(tmp_path / "in", out=tmp_path / "run")
    captioned = export_clips(run, out)
    assert captioned.written == 0  # words cost no pictures
    assert sorted(path.read_text() for path in out.glob("*.txt")) == [
        "new words\n",
        "other words\n",
    ]

    changed = export_clips(run, out, mode="exact", where="kind = 'video' AND frames > 20")
    assert changed.written and not changed.kept
    assert all(row["frames"] > 20 for row in _index(out))


def test_one_clips_failure_is_told_and_stops_no_other(
    tmp_path: Path, moving: Paint, write_video: Callable[..., Path], emoji: list[Path]
) -> None:
    (tmp_path / "in").mkdir()
    for name, seed in (("a.mp4", 1), ("b.mp4", 2), ("c.mp4", 3)):
        write_video(tmp_path / "in" / name, moving(40, seed=seed))
    shutil.copy(emoji[0], tmp_path / "in")
    run = _curate(tmp_path / "in", out=tmp_path / "run", sets=["cut.max_clip_s=0"])
    (tmp_path / "in" / "a.mp4").unlink()
    write_video(tmp_path / "in" / "b.mp4", moving(30, seed=4))
    done = export_clips(run, tmp_path / "out")
    told = {Path(row["uri"]).name: row["reason"] for row in done.failed}
    assert told == {
        "a.mp4": "no such file",
        "b.mp4": "it has changed since it was listed: run curate again",
    }
    lines = (tmp_path / "out" / "failed.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == done.failed
    assert {Path(row["uri"]).name for row in _index(tmp_path / "out")} == {"c.mp4", emoji[0].name}
    assert not [p for p in (tmp_path / "out").iterdir() if p.name.startswith(".")]


def test_a_condition_reads_columns_and_nothing_else(run: Run, tmp_path: Path) -> None:
    (tmp_path / "secret.csv").write_text("a\n1\n")
    for where in (
        "no_such_column > 3",
        f"EXISTS (SELECT * FROM read_csv('{tmp_path}/secret.csv'))",
        "verdict = 'keep'); COPY clips TO 'x.csv'; SELECT (1",
    ):
        with pytest.raises(UsageError, match="cannot be evaluated"):
            export_clips(run, tmp_path / "out", where=where)
    assert not (tmp_path / "out").exists()
    for wrong in ({"mode": "fast"}, {"mode": "exact", "crf": 99}):
        with pytest.raises(UsageError):
            export_clips(run, tmp_path / "out", **wrong)  # type: ignore[arg-type]
    done = export_clips(run, tmp_path / "out", where="verdict = 'nothing' -- a comment")
    assert done == Exported(tmp_path / "out") and _index(tmp_path / "out") == []


def test_a_killed_export_goes_on_where_it_was(run: Run, tmp_path: Path) -> None:
    code = """if True:
        import sys
        from pathlib import Path
        from unimodal.pipeline.export import export_clips
        from unimodal.pipeline.run import Run
        export_clips(Run.open(sys.argv[1]), Path(sys.argv[2]), mode="exact")
    """
    out = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", code, str(run.path), str(out)])
    deadline = time.monotonic() + 60
    while len(list(out.glob("*.json"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    there = {path.stem: path.stat().st_mtime_ns for path in out.glob("*.json")}
    assert 3 <= len(there) < run.kept
    done = export_clips(run, out, mode="exact")
    assert done.kept == len(there) and done.written == run.kept - len(there)
    for stem, time_ns in there.items():
        assert (out / f"{stem}.json").stat().st_mtime_ns == time_ns
    for row in _index(out):
        assert len(_frames(out / row["export"]["file"])) == row["frames"]
