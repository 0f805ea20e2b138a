"""The watch stage on real and on broken media, in one part."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image

from unimodal.pipeline import media
from unimodal.pipeline.clips import WATCH
from unimodal.pipeline.errors import UnimodalError
from unimodal.pipeline.frames import read_clips
from unimodal.pipeline.inputs import list_sources
from unimodal.pipeline.observers.cut import CutSettings
from unimodal.pipeline.observers.keyframes import perceptual_hash
from unimodal.pipeline.stage import PartFiles
from unimodal.pipeline.tell import Tell
from unimodal.pipeline.watch import WatchSettings, watch_part


def _watch(
    folder: Path, *inputs: Path, **more: Any
) -> tuple[list[dict[str, Any]], dict[str, str], PartFiles]:
    settings = more.pop("settings", WatchSettings())
    watch_part("p", list_sources(inputs), settings, folder, **more)
    files = PartFiles(folder, "p")
    rows = pq.read_table(files.rows, schema=WATCH).to_pylist()
    refused = pq.read_table(files.quarantine).to_pylist() if files.quarantine.exists() else []
    return rows, {Path(r["uri"]).name: r["reason"] for r in refused}, files


def test_a_real_video_becomes_clips_whose_frames_can_be_read_again(
    tmp_path: Path, bikes: Path
) -> None:
    settings = WatchSettings(cut=CutSettings(adaptive=0, content=27))
    rows, refused, _ = _watch(tmp_path, bikes, settings=settings)
    assert refused == {} and len(rows) == 6
    cuts = [30, 76, 137, 187, 242]
    starts = [0.0, *(cut / 25 + 0.25 for cut in cuts)]
    assert [row["start_s"] for row in rows] == pytest.approx(starts, abs=1e-4)
    for row in rows:
        frames = list(media.iter_frames(bikes, row["start_pts"], row["end_pts"], size=(34, 80)))
        assert len(frames) == row["frames"]
        assert row["width"] == 640 and row["height"] == 272 and row["fps"] == 25
        assert row["duration_s"] == pytest.approx(row["end_s"] - row["start_s"])
        assert (row["crop_y0"], row["crop_y1"]) == (0, 272)
    # The first shot pans through a street, none of them is black or frozen.
    assert all(row["flow_mean"] is None or 0.005 < row["flow_mean"] < 0.2 for row in rows)
    assert all(row["freeze_ratio"] in (None, 0.0) and row["black_ratio"] == 0 for row in rows)


def test_keyframes_are_a_dataset_that_webdataset_reads(tmp_path: Path, bikes: Path) -> None:
    rows, _, files = _watch(tmp_path, bikes)
    dataset = webdataset.WebDataset(str(files.frames), shardshuffle=False)
    samples = {sample["__key__"]: sample for sample in dataset}
    assert set(samples) == {row["uid"] for row in rows}
    for row in rows:
        sample = samples[row["uid"]]
        note = json.loads(sample["json"])
        assert note["times_s"] == [k["time_s"] for k in row["samples"]]
        assert sum(k["scoring"] for k in row["samples"]) == min(3, len(row["samples"]))
        for keyframe in row["samples"]:
            field = keyframe["member"].split(".", 1)[1]
            picture = np.asarray(Image.open(io.BytesIO(sample[field])))
            assert picture.shape == (272, 640, 3)
            assert row["start_s"] <= keyframe["time_s"] < row["end_s"]
    # The JPEG is the frame of that time, not a neighbor of it.
    row = max(rows, key=lambda row: len(row["samples"]))
    keyframe = row["samples"][-1]
    pts = round(keyframe["time_s"] * 12800)
    _, frame = next(media.iter_frames(bikes, pts, pts + 1))
    sample = samples[row["uid"]][keyframe["member"].split(".", 1)[1]]
    assert np.abs(np.asarray(Image.open(io.BytesIO(sample))).astype(int) - frame).mean() < 6
    with tarfile.open(files.frames) as tar:
        members = tar.getmembers()
    assert [m.name for m in members] == sorted(m.name for m in members)
    assert {(m.mtime, m.uid, m.gid) for m in members} == {(0, 0, 0)}


def test_an_image_is_a_clip_without_video_columns(tmp_path: Path, photos: Path) -> None:
    (row,), refused, _ = _watch(tmp_path, photos / "astronaut.png")
    assert refused == {}
    assert (row["kind"], row["width"], row["height"], row["codec"]) == ("image", 512, 512, "png")
    nulls = ("start_s", "end_s", "duration_s", "start_pts", "end_pts", "time_base", "fps", "frames")
    nulls += ("flow_mean", "freeze_ratio", "flash_ratio", "black_ratio", "crop_x0", "starts_at")
    assert all(row[name] is None for name in nulls)
    assert 50 < row["luma_mean"] < 200 and row["blur"] > 100 and row["colorfulness"] > 10
    assert len(row["samples"]) == 1 and row["samples"][0]["scoring"]


def test_tiny_transparent_pictures_are_ordinary(tmp_path: Path, emoji: list[Path]) -> None:
    rows, refused, _ = _watch(tmp_path, *emoji[:20])
    assert refused == {} and len(rows) == 20
    assert all((row["width"], row["height"]) == (72, 72) for row in rows)


def test_an_animation_is_a_video(tmp_path: Path, photos: Path) -> None:
    (row,), refused, _ = _watch(tmp_path, photos / "no_time_for_that_tiny.gif")
    assert refused == {}
    assert (row["kind"], row["frames"], row["time_base"]) == ("video", 24, "1/1000")
    assert row["duration_s"] == pytest.approx(1.68)


def test_a_bad_file_among_good_ones_costs_itself_alone(
    tmp_path: Path,
    bikes: Path,
    photos: Path,
    write_video: Callable[..., Path],
) -> None:
    inputs = tmp_path / "in"
    inputs.mkdir()
    (inputs / "empty.mp4").write_bytes(b"")
    (inputs / "text.mp4").write_text("hello " * 1000)
    (inputs / "cut.mp4").write_bytes(bikes.read_bytes()[:200_000])
    (inputs / "half.png").write_bytes((photos / "coffee.png").read_bytes()[:100_000])
    (inputs / "link.png").symlink_to(inputs / "nowhere.png")
    shutil.copy(photos / "coins.png", inputs / "good.png")
    frame = np.full((16, 16, 3), 99, np.uint8)
    write_video(inputs / "one.mp4", [frame])
    Image.new("RGB", (1, 1)).save(inputs / "dot.gif")
    rows, refused, _ = _watch(tmp_path / "out", inputs)
    assert [Path(row["uri"]).name for row in rows] == ["dot.gif", "good.png", "one.mp4"]
    assert rows[2]["frames"] == 1 and rows[2]["duration_s"] == pytest.approx(0.04)
    assert set(refused) == {"empty.mp4", "text.mp4", "cut.mp4", "half.png", "link.png"}
    assert refused["empty.mp4"] == "empty file (0 bytes)"
    assert refused["link.png"] == "no such file"
    assert all(reason and "\n" not in reason for reason in refused.values())


def test_poison_is_not_touched(tmp_path: Path, bikes: Path, photos: Path) -> None:
    rows, refused, _ = _watch(
        tmp_path, bikes, photos / "coins.png", poison={str(bikes): "it killed a worker"}
    )
    assert len(rows) == 1 and refused == {"bikes.mp4": "it killed a worker"}


def test_a_file_that_changed_since_it_was_listed_is_not_mixed_up(
    tmp_path: Path, emoji: list[Path]
) -> None:
    path = tmp_path / "a.png"
    shutil.copy(emoji[0], path)
    sources = list_sources([path])
    os.utime(path, ns=(1, 1))
    watch_part("p", sources, WatchSettings(), tmp_path / "out")
    (row,) = pq.read_table(PartFiles(tmp_path / "out", "p").quarantine).to_pylist()
    assert "changed since it was listed" in row["reason"]


def test_a_full_disk_is_no_fault_of_the_source(
    tmp_path: Path, emoji: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from unimodal.pipeline.observers.keyframes import Keyframes

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Keyframes, "see", full)
    with pytest.raises(UnimodalError, match="disk is full"):
        _watch(tmp_path / "out", emoji[0])
    assert not PartFiles(tmp_path / "out", "p").done()


def test_events_tell_of_every_source_and_of_all_seconds(
    tmp_path: Path, bikes: Path, emoji: list[Path]
) -> None:
    (tmp_path / "bad.mp4").write_text("no video")
    begun: list[str] = []
    done: dict[str, str] = {}
    seconds: list[float] = []
    tell = Tell(
        lambda stage, uri: begun.append(uri),
        seconds.append,
        lambda stage, uri, why: done.update({uri: why}),
    )
    inputs = [bikes, emoji[0], tmp_path / "bad.mp4"]
    _watch(tmp_path, *inputs, tell=tell)
    assert sorted(begun) == sorted(done) == sorted(map(str, inputs))
    assert [bool(done[str(path)]) for path in inputs] == [False, False, True]
    assert sum(seconds) == pytest.approx(10.0)


@pytest.mark.slow
def test_memory_does_not_grow_with_length(
    tmp_path: Path, write_video: Callable[..., Path], moving: Callable[..., list[np.ndarray]]
) -> None:
    """Ten times the frames, at most 1.1 times the peak memory."""
    frames = moving(150, size=(360, 640))
    short = write_video(tmp_path / "short.mp4", frames)
    long = write_video(tmp_path / "long.mp4", frames * 10)
    code = """if True:
        import resource, sys
        from pathlib import Path
        from unimodal.pipeline.inputs import list_sources
        from unimodal.pipeline.watch import WatchSettings, watch_part
        watch_part("p", list_sources([sys.argv[1]]), WatchSettings(), Path(sys.argv[2]))
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    """
    peaks = [
        int(
            subprocess.run(
                [sys.executable, "-c", code, str(path), str(tmp_path / path.stem)],
                check=True,
                capture_output=True,
            ).stdout
        )
        for path in (short, long)
    ]
    assert peaks[1] <= 1.1 * peaks[0], peaks


def test_stored_clips_are_read_back_with_their_pictures(tmp_path: Path, bikes: Path) -> None:
    rows, _, files = _watch(tmp_path, bikes)
    clips = list(read_clips(files.folder, files.part))
    assert [clip.row["uid"] for clip in clips] == sorted(row["uid"] for row in rows)
    for clip in clips:
        assert [s.time_s for s in clip.samples] == [s["time_s"] for s in clip.row["samples"]]
        # Compression moves few of a hash's 64 bits; another picture's would differ in about 32.
        for sample in clip.samples:
            assert (sample.hash ^ perceptual_hash(sample.bgr())).bit_count() <= 6
