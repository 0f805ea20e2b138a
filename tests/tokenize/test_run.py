"""Tokenizing a run: the right pixels at the right times, whatever interrupts it."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from unimodal.pipeline.clips import CLIPS, clip_uid, image_uid, table, write_parquet
from unimodal.pipeline.errors import MediaError, UnimodalError
from unimodal.pipeline.lock import run_lock
from unimodal.pipeline.progress import Progress
from unimodal.pipeline.supervise import Patience
from unimodal.tokenize.pictures import resample
from unimodal.tokenize.run import TokenizeSettings, tokenize

SMALL = TokenizeSettings(area=32 * 32, fps=8, seconds=1, batch=3, shard_size=4)


def picture(path: Path, size: tuple[int, int], seed: int) -> Path:
    """A noisy PNG of (width, height)."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (6, 8, 3), np.uint8)
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(path)
    return path


def movie(path: Path, pts: list[int], size: tuple[int, int] = (64, 48)) -> Path:
    """A video whose frame k is grey level 4 k, shown at `pts[k]` milliseconds."""
    import av

    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("ffv1", rate=1000)
        stream.width, stream.height, stream.pix_fmt = *size, "gray"
        stream.codec_context.time_base = stream.time_base = Fraction(1, 1000)
        for k, at in enumerate(pts):
            frame = av.VideoFrame.from_ndarray(np.full(size[::-1], 4 * k, np.uint8), format="gray")
            frame.pts, frame.time_base = at, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def row(path: Path, span: tuple[int, int] | None = None, **changes: Any) -> dict[str, Any]:
    """The row that curation would write for an image, or for a span of a video."""
    sha = hashlib.sha256(path.read_bytes()).hexdigest()
    found: dict[str, Any] = dict.fromkeys(CLIPS.names) | {
        "part": "p",
        "uri": str(path),
        "source_sha256": sha,
        "verdict": "keep",
        "captions": [{"style": "given", "lang": "en", "text": f"this is {path.stem}"}],
    }
    if span is None:
        with Image.open(path) as image:
            width, height = image.size
        found |= {"uid": image_uid(sha), "kind": "image", "width": width, "height": height}
    else:
        from unimodal.pipeline.media import open_video

        with open_video(path) as video:
            pts = [frame.pts for frame in video.frames()]
            base, first = video.time_base, pts[0]
            start, end = (round(Fraction(ms, 1000) / base) for ms in span)
            found |= {"width": video.probe.width, "height": video.probe.height}
        found |= {
            "uid": clip_uid(sha, start, end, base),
            "kind": "video",
            "start_pts": start,
            "end_pts": end,
            "time_base": f"{base.numerator}/{base.denominator}",
            "start_s": float((start - first) * base),
            "end_s": float((end - first) * base),
            "frames": sum(start <= p < end for p in pts),
        }
    return found | changes


def run_directory(folder: Path, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_parquet(table(rows, CLIPS), folder / "clips.parquet")
    return folder


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of seven images in three shapes and two clips of one video."""
    folder = tmp_path_factory.mktemp("media")
    shapes = [(40, 40), (80, 40), (40, 40), (40, 80), (40, 40), (40, 40), (80, 40)]
    rows = [row(picture(folder / f"{i}.png", s, i)) for i, s in enumerate(shapes)]
    film = movie(folder / "film.mkv", [40 * k for k in range(60)])
    rows += [row(film, (0, 1400)), row(film, (1400, 2400))]
    return run_directory(folder / "run", rows)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_codes_are_those_of_the_resized_picture(
    media: Path, tmp_path: Path, block_mean: Any
) -> None:
    import torch

    shards = tokenize(media, tmp_path, SMALL, tokenizer=block_mean)
    images = [r for r in shards.index.to_pylist() if r["kind"] == "image"]
    assert len(images) == 7
    for found in images:
        number = int(found["captions"][0]["text"].split()[-1])
        size = (found["width"] * 8, found["height"] * 8)
        with Image.open(media.parent / f"{number}.png") as original:
            resized = np.array(original.convert("RGB").resize(size, Image.Resampling.BICUBIC))
            aspect = original.width / original.height
        pixels = torch.from_numpy(resized).permute(2, 0, 1).float().div(127.5).sub(1)
        expected = type(block_mean)().encode(pixels[None, None].contiguous())[0]
        position = shards.index["key"].to_pylist().index(found["key"])
        got = shards.codes(position).astype(int)
        assert np.abs(got - expected.numpy()).max() <= 1  # the scaling may differ in the last bit
        assert abs(np.log(size[0] / size[1] / aspect)) < 0.4
        assert found["captions"][0]["tokens"] == len(found["captions"][0]["text"])


def test_batches_hold_pictures_of_one_size_and_are_bounded(
    media: Path, tmp_path: Path, block_mean: Any
) -> None:
    tokenize(media, tmp_path, SMALL.model_copy(update={"shard_size": 100}), tokenizer=block_mean)
    images = [shape for shape in block_mean.shapes if shape[1] == 1]
    videos = [shape for shape in block_mean.shapes if shape[1] == 4]
    assert sorted(shape[0] for shape in images) == [1, 1, 2, 3]  # 4 squares, 2 wide, 1 tall
    assert len({shape[3:] for shape in images}) == 3
    assert sorted(shape[0] for shape in videos) == [1, 2, 2]  # 8 pictures: two groups at once


def test_frames_are_chosen_by_time_stamp(tmp_path: Path, block_mean: Any) -> None:
    # Irregular: dense at first, then a long still, then dense again.
    pts = [*range(0, 500, 25), *range(1000, 2000, 40)]
    film = movie(tmp_path / "film.mkv", pts)
    run = run_directory(tmp_path / "run", [row(film, (0, 2000))])
    shards = tokenize(run, tmp_path / "out", SMALL, tokenizer=block_mean)
    assert shards.index["frames"].to_pylist() == [2, 2]
    assert shards.index["start_s"].to_pylist() == [0.0, 1.0]
    assert shards.index["fps"].to_pylist() == [8.0, 8.0]
    for position in (0, 1):
        times = [1000 * position + 125 * i for i in range(8)]
        on_screen = [max(k for k, at in enumerate(pts) if at <= t) for t in times]
        grey = np.array([4 * k for k in on_screen]).reshape(2, 4).mean(1)
        codes = shards.codes(position)
        assert np.abs(codes.astype(float).mean((1, 2)) - grey).max() <= 1
        assert np.ptp(codes, axis=(1, 2)).max() == 0


def test_a_clip_inside_a_video_starts_at_its_own_frame(
    media: Path, tmp_path: Path, block_mean: Any
) -> None:
    shards = tokenize(media, tmp_path, SMALL, tokenizer=block_mean)
    videos = [(i, r) for i, r in enumerate(shards.index.to_pylist()) if r["kind"] == "video"]
    starts = {r["start_s"]: shards.codes(i)[0, 0, 0] for i, r in videos}
    # 8 pictures a second, 25 frames a second, 4 grey levels a frame: the first four are
    # frames 0, 3, 6, 9 of the clip.
    assert starts[0.0] == pytest.approx(4 * 4.5, abs=1)
    assert starts[1.4] == pytest.approx(4 * (35 + 4.5), abs=1)
    # What is left of the first clip, 0.4 s, holds the moments 0, 1/8, 2/8 and 3/8 of a second.
    assert starts[1.0] == pytest.approx(4 * (25 + 4.5), abs=1)
    assert sorted((r["start_s"], r["end_s"]) for _, r in videos) == [
        (0.0, 1.0),
        (1.0, 1.4),
        (1.4, 2.4),
    ]


def test_letterbox_bars_are_cut_off_unless_asked_not_to(tmp_path: Path, block_mean: Any) -> None:
    boxed = np.zeros((80, 80, 3), np.uint8)
    boxed[20:60] = 200
    Image.fromarray(boxed).save(tmp_path / "boxed.png")
    box = {"crop_x0": 0, "crop_y0": 20, "crop_x1": 80, "crop_y1": 60}
    run = run_directory(tmp_path / "run", [row(tmp_path / "boxed.png", **box)])
    cut = tokenize(run, tmp_path / "cut", SMALL, tokenizer=block_mean).codes(0)
    assert cut.min() >= 199 and cut.shape[2] > cut.shape[1]
    whole = SMALL.model_copy(update={"crop": False})
    kept = tokenize(run, tmp_path / "whole", whole, tokenizer=block_mean).codes(0)
    assert kept.min() <= 3 and kept.shape[1] == kept.shape[2]


def test_a_bad_clip_is_quarantined_and_the_rest_is_done(tmp_path: Path, block_mean: Any) -> None:
    rows = [row(picture(tmp_path / f"{i}.png", (40, 40), i)) for i in range(4)]
    film = movie(tmp_path / "film.mkv", [40 * k for k in range(50)])
    rows.append(row(film, (0, 2000)))
    rows.append(row(picture(tmp_path / "thin.png", (20, 7), 9)))
    (tmp_path / "0.png").write_bytes((tmp_path / "0.png").read_bytes()[:-60])
    (tmp_path / "1.png").unlink()
    picture(tmp_path / "2.png", (48, 40), 2)
    film.write_bytes(film.read_bytes()[:3000])
    run = run_directory(tmp_path / "run", rows)
    shards = tokenize(run, tmp_path / "out", SMALL, tokenizer=block_mean)
    assert [c[0]["text"] for c in shards.index["captions"].to_pylist()] == ["this is 3"]
    lost = pq.read_table(tmp_path / "out" / "quarantine.parquet").to_pylist()
    reasons = {(Path(r["uri"]).name, r["reason"].split(":")[0]) for r in lost}
    assert ("0.png", "the image cannot be decoded") in reasons
    assert ("1.png", "no such file") in reasons
    assert ("2.png", "it is 48x40 pixels now and was 40x40") in reasons
    assert ("thin.png", "20x7 pixels") in reasons
    assert any(name == "film.mkv" for name, _ in reasons)
    assert len(lost) == 5 and shards.manifest["totals"]["quarantined"] == 5
    assert {r["stage"] for r in lost} == {"tokenize"}


def test_a_file_that_was_mended_is_picked_up_when_asked_for(
    tmp_path: Path, block_mean: Any
) -> None:
    rows = [row(picture(tmp_path / f"{i}.png", (40, 40), i)) for i in range(3)]
    rows.append(row(picture(tmp_path / "thin.png", (20, 7), 9)))
    whole = (tmp_path / "0.png").read_bytes()
    run, out = run_directory(tmp_path / "run", rows), tmp_path / "out"
    fresh = tokenize(run, tmp_path / "fresh", SMALL, tokenizer=block_mean)
    (tmp_path / "0.png").write_bytes(whole[:-60])
    assert len(tokenize(run, out, SMALL, tokenizer=block_mean)) == 2
    (tmp_path / "0.png").write_bytes(whole)
    block_mean.shapes.clear()
    assert len(tokenize(run, out, SMALL, tokenizer=block_mean)) == 2
    assert not block_mean.shapes
    again = tokenize(run, out, SMALL, tokenizer=block_mean, retry_quarantined=True)
    assert len(again) == len(fresh) == 3
    assert snapshot(out) == snapshot(tmp_path / "fresh")
    block_mean.shapes.clear()  # what can never be a sample is no reason to try
    tokenize(run, out, SMALL, tokenizer=block_mean, retry_quarantined=True)
    assert not block_mean.shapes


def test_a_clip_of_fewer_than_four_pictures_repeats_its_last(
    tmp_path: Path, block_mean: Any
) -> None:
    film = movie(tmp_path / "film.mkv", [40 * k for k in range(20)])
    run = run_directory(tmp_path / "run", [row(film, (0, 200)), row(film, (200, 480))])
    shards = tokenize(run, tmp_path / "out", SMALL, tokenizer=block_mean)
    found = sorted(
        (r["start_s"], r["end_s"], r["frames"], int(shards.codes(i)[0, 0, 0]))
        for i, r in enumerate(shards.index.to_pylist())
    )
    # At 8 a second: frames 0 and 3 of the first clip (at 0 and 120 ms), then 3 and 3 again;
    # 5, 8 and 11 of the second, then 11 again. A frame is 4 grey levels.
    assert [f[:3] for f in found] == [(0.0, 0.2, 1), (0.2, 0.48, 1)]
    assert [f[3] for f in found] == pytest.approx([4 * 9 / 4, 4 * 35 / 4], abs=1)


def test_pictures_keep_their_size_within_bounds_where_no_area_is_wanted(
    tmp_path: Path, block_mean: Any
) -> None:
    sizes = {"small": (40, 40), "just": (72, 60), "large": (300, 200), "long": (300, 50)}
    rows = [row(picture(tmp_path / f"{n}.png", s, 1)) for n, s in sizes.items()]
    run = run_directory(tmp_path / "run", rows)
    clamp = {"area": None, "min_area": 64 * 64, "max_area": 96 * 96, "max_aspect": 8.0}
    shards = tokenize(run, tmp_path / "out", SMALL.model_copy(update=clamp), tokenizer=block_mean)
    found = {
        r["captions"][0]["text"].split()[-1]: (8 * r["width"], 8 * r["height"])
        for r in shards.index.to_pylist()
    }
    assert found == {"small": (64, 64), "just": (72, 64), "large": (112, 72), "long": (232, 32)}
    assert shards.manifest["settings"]["area"] is None
    upside = SMALL.model_copy(update={"area": None, "min_area": 4096, "max_area": 1024})
    with pytest.raises(UnimodalError, match="min_area 4096 is over max_area 1024"):
        tokenize(run, tmp_path / "other", upside, tokenizer=block_mean)


def test_a_window_is_encoded_as_one_where_that_is_asked_for(
    media: Path, tmp_path: Path, block_mean: Any
) -> None:
    joint = SMALL.model_copy(update={"joint": True})
    shards = tokenize(media, tmp_path / "joint", joint, tokenizer=block_mean)
    assert sorted(s[:2] for s in block_mean.shapes if s[1] > 1) == [(1, 4), (1, 8), (1, 8)]
    assert block_mean.joint and shards.manifest["settings"]["joint"] is True
    with pytest.raises(UnimodalError, match="joint was True, now False"):
        tokenize(media, tmp_path / "joint", SMALL, tokenizer=block_mean)


def test_memory_that_does_not_suffice_is_an_error_of_the_run(
    media: Path, tmp_path: Path, block_mean: Any
) -> None:
    def full(pixels: Any) -> Any:
        raise MemoryError

    block_mean.encode = full
    with pytest.raises(UnimodalError, match=r"lower batch \(now 3\) or area \(now \d+ pixels\)"):
        tokenize(media, tmp_path, SMALL, tokenizer=block_mean)


def test_a_run_stops_when_most_of_its_media_are_away(tmp_path: Path, block_mean: Any) -> None:
    rows = [row(picture(tmp_path / f"{i}.png", (40, 40), i)) for i in range(6)]
    run = run_directory(tmp_path / "run", rows)
    for i in range(1, 6):
        (tmp_path / f"{i}.png").rename(tmp_path / f"{i}.away")
    strict = SMALL.model_copy(update={"patience": Patience(failures_least=3), "shard_size": 2})
    with pytest.raises(UnimodalError, match=r"clips could not be read.*--retry-quarantined"):
        tokenize(run, tmp_path / "out", strict, tokenizer=block_mean)
    for i in range(1, 6):
        (tmp_path / f"{i}.away").rename(tmp_path / f"{i}.png")
    tokenize(run, tmp_path / "out", strict, tokenizer=block_mean, retry_quarantined=True)
    tokenize(run, tmp_path / "fresh", strict, tokenizer=block_mean)
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "fresh")


def test_a_member_of_a_tar_is_tokenized_like_the_file(tmp_path: Path, block_mean: Any) -> None:
    files = [picture(tmp_path / "a.png", (40, 40), 1)]
    files.append(movie(tmp_path / "film.mkv", [40 * k for k in range(50)]))
    rows = [row(files[0]), row(files[1], (0, 1000)), row(files[1], (1000, 2000))]
    plain = tokenize(
        run_directory(tmp_path / "run", rows), tmp_path / "plain", SMALL, tokenizer=block_mean
    )
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        for file in files:
            tar.add(file, file.name)
            file.unlink()
    inside = [r | {"uri": f"{tmp_path / 'all.tar'}#{Path(r['uri']).name}"} for r in rows]
    packed = tokenize(
        run_directory(tmp_path / "run2", inside), tmp_path / "packed", SMALL, tokenizer=block_mean
    )
    assert len(packed) == len(plain) == 3 and not packed.manifest["totals"]["quarantined"]
    for name in ("shard-00000.tar", "shard-00000.parquet"):
        assert (packed.path / name).read_bytes() == (plain.path / name).read_bytes()


class Killed(Exception):
    pass


def test_an_interrupted_run_resumes_to_the_same_bytes(
    media: Path, tmp_path: Path, block_mean: Any
) -> None:
    tokenize(media, tmp_path / "fresh", SMALL, tokenizer=block_mean)
    calls = len(block_mean.shapes)
    for after in range(0, calls, 2):
        limited = type(block_mean)()
        encode: Callable[[Any], Any] = limited.encode

        def stopping(pixels: Any, after: int = after, limited: Any = limited) -> Any:
            if len(limited.shapes) >= after:
                raise Killed
            return type(limited).encode(limited, pixels)

        limited.encode = stopping
        out = tmp_path / str(after)
        with pytest.raises(Killed):
            tokenize(media, out, SMALL, tokenizer=limited)
        with pytest.raises(UnimodalError, match="unfinished"):
            from unimodal.tokenize.shards import Shards

            Shards.open(out)
        limited.encode = encode
        done = len(limited.shapes)
        tokenize(media, out, SMALL, tokenizer=limited)
        # At most the batches of one shard (4 samples) were done twice.
        assert len(limited.shapes) - done <= calls
        assert len(limited.shapes) <= calls + 4
        assert snapshot(out) == snapshot(tmp_path / "fresh")


def test_a_second_run_encodes_nothing_and_touches_nothing(
    media: Path, tmp_path: Path, block_mean: Any
) -> None:
    tokenize(media, tmp_path, SMALL, tokenizer=block_mean)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.glob("shard-*")}
    manifest = (tmp_path / "manifest.json").stat().st_mtime_ns
    block_mean.shapes.clear()
    tokenize(media, tmp_path, SMALL, tokenizer=block_mean)
    assert not block_mean.shapes
    assert {p: p.stat().st_mtime_ns for p in tmp_path.glob("shard-*")} == before
    assert (tmp_path / "manifest.json").stat().st_mtime_ns == manifest


def test_a_finished_directory_is_not_planned_again(
    media: Path, tmp_path: Path, block_mean: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from unimodal.tokenize import run as module

    tokenize(media, tmp_path, SMALL, tokenizer=block_mean)
    before = snapshot(tmp_path)
    monkeypatch.setattr(module, "kept_clips", lambda *a: pytest.fail("planned again"))
    assert len(tokenize(media, tmp_path, SMALL, tokenizer=block_mean)) == 10
    assert snapshot(tmp_path) == before


def test_pictures_are_decoded_while_others_are_encoded_and_not_without_bound(
    tmp_path: Path, block_mean: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from unimodal.tokenize import assemble, unit

    rows = [row(picture(tmp_path / f"{i}.png", (40, 40), i)) for i in range(20)]
    read: list[str] = []
    right, waited = assemble.image_pixels, threading.Event()

    def reading(window: Any, tick: Any = None) -> Any:
        read.append(window.key)
        if len(read) == 9:
            waited.set()
        return right(window, tick)

    first, counted = threading.Lock(), threading.Event()

    def encode(pixels: Any) -> Any:
        if first.acquire(blocking=False):
            try:
                assert waited.wait(20), "nobody decodes while the network is busy"
                time.sleep(0.1)
                # The batches of 3 at work, one that waits, and two more ahead.
                assert len(read) <= 3 * (2 + 1 + 2) + 1
            finally:
                counted.set()
        # A batch that ends meanwhile would let another be read.
        assert counted.wait(30)
        return type(block_mean).encode(block_mean, pixels)

    monkeypatch.setattr(assemble, "image_pixels", reading)
    monkeypatch.setattr(unit, "processors", lambda: 2)
    block_mean.encode = encode
    one = SMALL.model_copy(update={"shard_size": 100})
    run = run_directory(tmp_path / "run", rows)
    assert len(tokenize(run, tmp_path / "out", one, tokenizer=block_mean)) == len(read) == 20


def test_a_clip_that_was_read_holds_neither_its_decoder_nor_its_pictures(
    tmp_path: Path, block_mean: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from unimodal.tokenize import assemble

    shown = [125 * j for j in range(8)]
    sizes = [(64, 48), (48, 64), (64, 64), (48, 48), (80, 48), (48, 80), (80, 80), (96, 48)]
    films = [movie(tmp_path / f"{i}.mkv", shown, size) for i, size in enumerate(sizes)]
    rows = [row(film, (0, 1000)) for film in films]
    right, held, most = assemble.video_pixels, 0, 0

    def reading(windows: Any, tick: Any = None) -> Iterator[np.ndarray]:
        nonlocal held, most
        held += 1
        most = max(most, held)
        try:
            yield from right(windows, tick)
        finally:
            held -= 1

    monkeypatch.setattr(assemble, "video_pixels", reading)
    one = SMALL.model_copy(update={"shard_size": 100})
    run = run_directory(tmp_path / "run", rows)
    assert len(tokenize(run, tmp_path / "out", one, tokenizer=block_mean)) >= len(rows)
    assert most <= 4 and not held  # two are read ahead of the one that is asked for


def test_a_smaller_selection_leaves_what_a_fresh_run_would(
    media: Path, tmp_path: Path, block_mean: Any
) -> None:
    tokenize(media, tmp_path / "out", SMALL, tokenizer=block_mean)
    tokenize(media, tmp_path / "out", SMALL, tokenizer=block_mean, limit=3)
    tokenize(media, tmp_path / "fresh", SMALL, tokenizer=block_mean, limit=3)
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "fresh")


def test_a_run_of_unreadable_clips_is_one_clear_error(tmp_path: Path, block_mean: Any) -> None:
    found = row(picture(tmp_path / "a.png", (40, 40), 0))
    (tmp_path / "a.png").unlink()
    run = run_directory(tmp_path / "run", [found])
    with pytest.raises(UnimodalError, match=r"none of the clips .*first: no such file"):
        tokenize(run, tmp_path / "out", SMALL, tokenizer=block_mean)


def test_shards_of_another_tokenizer_are_refused(
    media: Path, tmp_path: Path, block_mean: Any
) -> None:
    tokenize(media, tmp_path, SMALL, tokenizer=block_mean)
    with pytest.raises(UnimodalError, match="another vision tokenizer"):
        tokenize(media, tmp_path, SMALL, tokenizer=type(block_mean)("f" * 64))
    with pytest.raises(UnimodalError, match=r"fps was 8\.0, now 4\.0"):
        tokenize(media, tmp_path, SMALL.model_copy(update={"fps": 4.0}), tokenizer=block_mean)


def test_a_directory_of_something_else_is_left_alone(
    media: Path, tmp_path: Path, block_mean: Any
) -> None:
    (tmp_path / "letters.txt").write_text("dear")
    before = snapshot(tmp_path)
    for out in (tmp_path, tmp_path / "letters.txt", media):
        with pytest.raises(UnimodalError, match="choose another --out"):
            tokenize(media, out, SMALL, tokenizer=block_mean)
    assert snapshot(tmp_path) == before


def test_two_runs_never_write_one_directory(media: Path, tmp_path: Path, block_mean: Any) -> None:
    out = tmp_path / "out"
    with run_lock(out, Progress()), pytest.raises(UnimodalError, match="is writing here"):
        tokenize(media, out, SMALL, tokenizer=block_mean)
    tokenize(media, out, SMALL, tokenizer=block_mean)
    assert not list(out.glob("*.lock"))


def test_every_clip_is_counted_once(media: Path, tmp_path: Path, block_mean: Any) -> None:
    class Counter(Progress):
        total = done = 0.0

        def begin(self, task: str, total: float, unit: str) -> None:
            self.total = total

        def advance(self, task: str, amount: float = 1.0) -> None:
            self.done += amount

    for _ in range(2):  # fresh, and where one shard is lost
        (tmp_path / "shard-00001.tar").unlink(missing_ok=True)
        counter = Counter()
        tokenize(media, tmp_path, SMALL, tokenizer=block_mean, progress=counter)
        assert counter.done == counter.total == 9


def test_no_source_is_in_both_splits(media: Path, tmp_path: Path, block_mean: Any) -> None:
    half = SMALL.model_copy(update={"val_fraction": 0.5})
    index = tokenize(media, tmp_path, half, tokenizer=block_mean).index
    pairs = set(zip(index["source_sha256"].to_pylist(), index["split"].to_pylist(), strict=True))
    assert len(pairs) == len({source for source, _ in pairs}) == 8
    assert {split for _, split in pairs} == {"train", "val"}


def frames(*pts: int) -> Iterator[tuple[int, np.ndarray]]:
    return ((at, np.array(at)) for at in pts)


def test_resampling_holds_the_last_frame_that_was_due() -> None:
    times = [Fraction(t) for t in (0, 3, 10, 11, 19, 40)]
    shown = [int(f) for f in resample(frames(1, 4, 10, 20, 21), times)]
    assert shown == [1, 1, 10, 10, 10, 21]


def test_frames_that_stop_early_are_an_error() -> None:
    times = [Fraction(t) for t in range(0, 100, 10)]
    with pytest.raises(MediaError, match="only 3 of its 10 frames"):
        list(resample(frames(0, 10, 20), times, expected=10))
    with pytest.raises(MediaError, match="no frame"):
        list(resample(frames(), times))
    assert len(list(resample(frames(0, 10, 20), times, expected=3))) == 10


def test_the_real_tokenizer_writes_what_it_encodes_and_can_be_loaded_again(
    media: Path, tmp_path: Path
) -> None:
    import torch

    from unimodal.tokenize.pictures import image_pixels, video_pixels
    from unimodal.tokenize.plan import kept_clips, units
    from unimodal.tokenize.vision.movq import MoVQ, MoVQConfig
    from unimodal.tokenize.vision.pixels import to_pixels
    from unimodal.tokenize.vision.tokenizer import VisionTokenizer

    torch.manual_seed(0)
    shape = MoVQConfig(64, ch=32, ch_mult=(1, 1, 1, 1), num_res_blocks=1, attn_resolutions=())
    network = MoVQ(shape)
    # A codebook of latents that occur, so that codes differ from one another.
    flat = torch.linspace(-1, 1, 16).reshape(16, 1, 1, 1, 1) + torch.randn(16, 1, 3, 16, 16) / 4
    with torch.no_grad():
        latents = network.eval().latents(flat).permute(0, 2, 3, 4, 1).reshape(64, 4)
        network.quantize.embedding.weight.copy_(latents)
    tokenizer = VisionTokenizer(network)
    tokenizer.save(tmp_path / "weights")
    settings = SMALL.model_copy(update={"tokenizer": str(tmp_path / "weights")})
    shards = tokenize(media, tmp_path / "out", settings, engine="inline")
    assert shards.vocabulary.codebook_size == 64
    again = VisionTokenizer.load(shards.vision_tokenizer_dir)
    assert again.digest == shards.manifest["vision_tokenizer"]["digest"] == tokenizer.digest

    same = []
    row_of = {key: i for i, key in enumerate(shards.index["key"].to_pylist())}
    for unit in units(kept_clips(media), settings, shards.vocabulary):
        for window in unit.windows:
            if window.fps is None:
                pixels = image_pixels(window)[None]
            elif window.first == 0:
                pixels = next(video_pixels([window]))
            else:
                continue
            # A whole clip at once, batched with nothing: near ties apart, the same codes.
            alone = tokenizer.encode(to_pixels(pixels[None]))[0].numpy()
            got = shards.codes(row_of[window.key])
            assert alone.shape == got.shape
            same.append((alone == got).ravel())
            assert len(np.unique(got)) > 1
    assert np.concatenate(same).mean() > 0.97


FORKS = """
import os, signal, sys, time
sys.path.insert(0, {tests!r})
from pathlib import Path
# Imported once; every run below is a fork of a process that has not computed anything yet.
import av, torch, PIL.Image, pyarrow.compute, pyarrow.parquet
import unimodal.pipeline.media, unimodal.tokenize.vision.pixels
from conftest import BlockMean
from unimodal.tokenize.run import TokenizeSettings, tokenize

class Slow(BlockMean):
    def encode(self, pixels):
        time.sleep(0.03)
        return super().encode(pixels)

settings = TokenizeSettings(area=1024, fps=8, seconds=1, batch=1, shard_size=2)
for line in sys.stdin:
    out, _, kill_after = line.rstrip("\\n").partition(" after ")
    child = os.fork()
    if not child:
        tokenize(Path({run!r}), Path(out), settings, tokenizer=Slow())
        os._exit(0)
    if kill_after:
        time.sleep(float(kill_after))
        os.kill(child, signal.SIGKILL)
    print(os.waitpid(child, 0)[1], flush=True)
"""


@pytest.mark.slow
def test_kill_9_at_any_moment_and_resume_gives_the_same_bytes(media: Path, tmp_path: Path) -> None:
    code = FORKS.format(tests=str(Path(__file__).parent), run=str(media))
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as forks:

        def run(out: Path, kill_after: float | None = None) -> int:
            assert forks.stdin is not None and forks.stdout is not None
            print(out, "after", kill_after or "", file=forks.stdin, flush=True)
            return int(forks.stdout.readline())

        assert run(tmp_path / "imports") == 0
        began = time.monotonic()
        assert run(tmp_path / "fresh") == 0
        whole = time.monotonic() - began
        killed = 0
        for k in range(12):  # three kills in a row into each of four directories
            killed += run(tmp_path / f"out{k // 3}", whole * (k + 1) / 14) != 0
        assert killed >= 4
        for k in range(4):
            assert run(tmp_path / f"out{k}") == 0
            assert snapshot(tmp_path / f"out{k}") == snapshot(tmp_path / "fresh")
        assert forks.stdin is not None
        forks.stdin.close()
