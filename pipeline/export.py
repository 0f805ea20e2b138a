"""Clips as files, for tools that want files; the project itself reads spans of sources.

    out/{uid}.mp4     the pictures (mkv for codecs that mp4 does not hold; images: png, jpg, …)
    out/{uid}.json    the clip's row, and what of the source is really in the file
    out/{uid}.txt     its first caption, if it has one
    out/clips.jsonl   all sidecars, one a line; failed.jsonl: what could not be written, and why

Three ways to cut a video:

    copy      packets as they are, from the key frame at or before the start: fast, no loss, and
              up to some seconds of the scene before as a lead-in
    keyframe  packets as they are, from the first key frame inside the span: fast, no loss, nothing
              of the scene before; what lies before that key frame is missing, and a clip without
              one is reported as failed
    exact     decoded and encoded again (H.264): the span to the frame, upright, with its own times

There is no sound in any of them: curation looks at pictures, and so do the models.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import chain, dropwhile, pairwise, takewhile
from pathlib import Path
from typing import Any, Literal, get_args

import pyarrow as pa

from unimodal.pipeline import fetch, large, media
from unimodal.pipeline.bounds import Limits
from unimodal.pipeline.clips import first_text
from unimodal.pipeline.errors import MediaError, UsageError, full_disk, reason, telling_full_disk
from unimodal.pipeline.files import atomic
from unimodal.pipeline.parts import read_parts
from unimodal.pipeline.progress import Progress
from unimodal.pipeline.run import Run
from unimodal.pipeline.settings import build
from unimodal.pipeline.where import rows_where

VERSION = 2

STEADY = {"x264-params": "mbtree=0"}
"""x264's macroblock tree reads memory that nobody wrote where pictures are small (found at 96x64
pixels): about one in a hundred encodings of the same frames came out in other bytes."""

Mode = Literal["copy", "keyframe", "exact"]

MP4 = frozenset({"h264", "hevc", "av1", "vp9", "mpeg4", "mpeg2video", "mpeg1video", "mjpeg"})
"""Codecs that an mp4 holds; others are copied into Matroska, which holds anything."""

SUFFIXES = {"jpeg": ".jpg", "jpeg2000": ".jp2", "ppm": ".ppm"}
"""How the file of an image codec is called, where not by the codec's name."""

Row = Mapping[str, Any]


@dataclass
class Exported:
    """What `export_clips` did."""

    out: Path
    written: int = 0
    kept: int = 0  # files that were there already, complete
    failed: list[dict[str, str]] = field(default_factory=list)  # uid, uri, reason


def export_clips(
    run: Run,
    out: Path | str,
    *,
    mode: Mode = "copy",
    where: str | pa.Table = "verdict = 'keep'",
    crop: bool = False,
    crf: int = 18,
    notes: str = "",
    progress: Progress | None = None,
) -> Exported:
    """Write the clips of a run for which `where` holds (SQL over the clip columns) into `out`.

    `where` may be the rows themselves.

    `crop` cuts letterbox bars off and needs mode exact, as does turning a picture upright; `crf`
    is the H.264 encoder's quality, lower is better. `notes` is a folder in `out` for all but the
    pictures, where other tools would take it for data. Images are copied, in mode exact written as
    upright PNG. Files that are there already and whole are kept, so an interrupted export goes
    on; one clip's failure is told in the result and stops no other. Files of earlier exports
    that are not asked for any more stay, but clips.jsonl does not name them.

    Raises `UsageError` for options that do not go together or a condition that does not
    evaluate, `UnimodalError` if the disk is full.
    """
    out, progress = Path(out), progress or Progress()
    if mode not in get_args(Mode):
        raise UsageError(f"no mode {mode}: there are {', '.join(get_args(Mode))}")
    if crop and mode != "exact":
        raise UsageError(f"mode {mode} copies packets, which cannot be cropped: use --mode exact")
    if not 0 <= crf <= 51:
        raise UsageError(f"crf {crf}: the H.264 encoder takes 0 (lossless) to 51")
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out}: a file is in the way; name another -o")
    if isinstance(where, str):
        where = large.take(run.clips, rows_where(run.clips, where, "clips"))
    rows = where.to_pylist()
    how = {"version": VERSION, "mode": mode, "crop": crop, "crf": crf if mode == "exact" else None}
    limits = build(Limits, run.info["settings"]["limits"])
    sources = {s.uri: s for part in read_parts(run.path / "parts.parquet") for s in part.sources}
    done = Exported(out)
    written: list[dict[str, Any]] = []
    beside = out / notes
    beside.mkdir(parents=True, exist_ok=True)
    progress.begin("clips", len(rows), "clips")
    with telling_full_disk(out):
        for row in rows:
            uri, uid = row["uri"], row["uid"]
            try:
                if not re.fullmatch(r"[0-9a-f]{32}", uid):  # it becomes a file's name
                    raise MediaError("its uid is none of ours")
                made = _complete(out, beside / f"{uid}.json", how)
                done.kept += made is not None
                if made is None:
                    with fetch.local(uri, listed=sources.get(uri), keep=True) as path:
                        made = _write(path, row, out / uid, how, limits)
                    done.written += 1
                written.append(_sidecar(row, beside / uid, made))
            except Exception as error:
                if full_disk(error, out):
                    raise
                why = reason(error)
                done.failed.append({"uid": uid, "uri": uri, "reason": why})
                progress.note(f"not exported {uid} of {uri}: {why}")
            progress.advance("clips")
        write_lines(beside / "clips.jsonl", written)
        write_lines(out / "failed.jsonl", done.failed)
    progress.end("clips")
    return done


def _complete(out: Path, note: Path, how: Mapping[str, Any]) -> dict[str, Any] | None:
    """What an earlier export noted of a clip, if its file is whole and was made as asked now."""
    try:
        made = json.loads(note.read_text())["export"]
        name = made["file"]
        if name != f"{note.stem}{Path(name).suffix}":
            return None
        if (out / name).stat().st_size != made["bytes"]:
            return None
        return made if all(made.get(key) == value for key, value in how.items()) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _sidecar(row: Row, stem: Path, made: Mapping[str, Any]) -> dict[str, Any]:
    """Write a clip's .json and .txt where they differ from what is there; return the former."""
    note = {**row, "meta": dict(row["meta"] or []), "export": made}
    texts = {".json": json.dumps(note, indent=1, ensure_ascii=False) + "\n"}
    if text := first_text(row):
        texts[".txt"] = text + "\n"
    else:
        stem.with_suffix(".txt").unlink(missing_ok=True)
    for suffix, text in sorted(texts.items(), reverse=True):  # the .json last: it is the mark
        path = stem.with_suffix(suffix)
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            with atomic(path) as temporary:
                temporary.write_text(text, encoding="utf-8")
    return note


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """JSON Lines; no failed.jsonl where nothing failed."""
    if not rows and path.name == "failed.jsonl":
        path.unlink(missing_ok=True)
        return
    with atomic(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _write(
    path: Path, row: Row, stem: Path, how: Mapping[str, Any], limits: Limits
) -> dict[str, Any]:
    """Write the pictures of a clip; returns what its sidecar says of the file."""
    still, exact = row["kind"] == "image", how["mode"] == "exact"
    found = media.probe(path, limits)
    whole = not exact and (still or found.animated)
    if exact:
        suffix = ".png" if still else ".mp4"
    elif whole:
        suffix = SUFFIXES.get(row["codec"], f".{row['codec']}")
    else:
        suffix = ".mp4" if row["codec"] in MP4 else ".mkv"
    file = stem.with_suffix(suffix)
    start, end, size = row["start_pts"], row["end_pts"], (row["width"], row["height"])
    with atomic(file) as temporary:
        if whole:
            if not still and not row["starts_at"] == row["ends_at"] == "source":
                raise MediaError("an animated picture cannot be copied in part: use --mode exact")
            shutil.copyfile(path, temporary)
        elif still:
            size = _save(path, row, temporary, how["crop"], limits)
        elif exact:
            start, end, size = _encode(path, row, temporary, how, limits)
        else:
            start, end = _copy(path, row, temporary, how["mode"] == "keyframe", limits)
    made = {**how, "file": file.name, "bytes": file.stat().st_size}
    made |= {"width": size[0], "height": size[1]}
    if still:
        return made
    tick = Fraction(row["time_base"])
    first = round(row["start_pts"] - row["start_s"] / tick)  # of the source, where its clock is 0
    return {
        **made,
        # The span of the source that is in the file; longer than the clip's where packets are
        # copied. The file's own clock begins at 0.
        "start_pts": start,
        "end_pts": end,
        "start_s": float((start - first) * tick),
        "end_s": float((end - first) * tick),
        "audio": False,
    }


def _save(path: Path, row: Row, out: Path, crop: bool, limits: Limits) -> tuple[int, int]:
    """Save an image as it is shown, as PNG; returns its size."""
    from PIL import Image

    x0, y0, x1, y1 = _box(row, crop, 1)
    pixels = media.read_image(path, limits)
    Image.fromarray(pixels[y0:y1, x0:x1]).save(out, format="PNG")
    return x1 - x0, y1 - y0


def _box(row: Row, crop: bool, step: int) -> tuple[int, int, int, int]:
    """The part of the shown picture that is written, its sides multiples of `step` pixels.

    Video is stored with one color sample per 2x2 pixels: a last odd row or column is left out.
    """
    x0, y0, x1, y1 = 0, 0, row["width"], row["height"]
    if crop and row["crop_x0"] is not None:
        x0, y0, x1, y1 = row["crop_x0"], row["crop_y0"], row["crop_x1"], row["crop_y1"]
    x0, y0 = -(-x0 // step) * step, -(-y0 // step) * step
    x1, y1 = x0 + (x1 - x0) // step * step, y0 + (y1 - y0) // step * step
    if x1 <= x0 or y1 <= y0:
        raise MediaError(f"{row['width']}x{row['height']} pixels are too few for a video")
    return x0, y0, x1, y1


def _copy(path: Path, row: Row, out: Path, inside: bool, limits: Limits) -> tuple[int, int]:
    """Copy the packets of a span, from a key frame `inside` it or from the one before its start.

    Returns the ticks that the file really covers.
    """
    import av

    form = "mp4" if row["codec"] in MP4 else "matroska"
    with media.open_video(path, limits) as video, av.open(str(out), "w", format=form) as container:
        stream = container.add_stream_from_template(video.stream)
        start = end = None
        for packet in _packets(path, video.stream.index, row["start_pts"], row["end_pts"], inside):
            shown = packet.pts
            start = shown if start is None else start
            end = max(end or start, shown + (packet.duration or 1))
            packet.pts, packet.dts = shown - start, packet.dts - start
            packet.stream = stream
            try:
                container.mux_one(packet)
            except av.error.FFmpegError as error:
                why = f"its packets cannot be copied ({error}): use --mode exact"
                raise MediaError(why) from error
    if start is None or end is None:
        raise MediaError("it has no packets: use --mode exact")
    return start, end


def _packets(path: Path, index: int, start: int, end: int, inside: bool) -> Iterator[Any]:
    """Packets in decoding order that show start <= PTS < end, and what they need to be decoded.

    They begin with a key frame: the first one inside, else the last one at or before the start.
    """
    # An index may lead to a key frame that is shown too late, as it goes by decoding times, or
    # there is none. From the beginning then: reading packets is cheap, decoding is not.
    for seek in (start, None):
        packets = _demuxed(path, index, seek)
        near = takewhile(lambda p: p.dts < end if inside else p.dts <= start, packets)
        keys = (packet.pts for packet in near if packet.is_keyframe)
        if inside:
            key = next((pts for pts in keys if pts >= start), None)
        else:
            key = max((pts for pts in keys if pts <= start), default=None)
        if key is not None:
            break
    if key is None or key >= end:
        remedy = "inside the clip: use --mode copy or exact" if inside else "before it: use exact"
        raise MediaError(f"no key frame {remedy}")
    demuxed = _demuxed(path, index, seek)
    packets = dropwhile(lambda p: p.pts != key or not p.is_keyframe, demuxed)
    late: list[Any] = []  # shown after the end; needed only if something before the end follows
    for packet in packets:
        if packet.dts >= end:
            return
        if packet.pts < key:
            continue  # shown before the key frame, and leans on what is not copied
        late.append(packet)
        if packet.pts < end:
            yield from late
            late = []


def _demuxed(path: Path, index: int, seek: int | None) -> Iterator[Any]:
    """Packets of a stream, from the one that the container finds for `seek` on."""
    import av

    with media.opened(path) as container:
        stream = container.streams[index]
        try:
            if seek is not None:
                container.seek(seek, stream=stream, backward=True)
            for packet in container.demux(stream):
                if packet.pts is not None and packet.dts is not None:
                    yield packet
                elif packet.size:
                    raise MediaError("its packets carry no time stamps: use --mode exact")
        except av.error.FFmpegError:
            return  # it cannot be searched, or breaks off here


def _encode(
    path: Path, row: Row, out: Path, how: Mapping[str, Any], limits: Limits
) -> tuple[int, int, tuple[int, int]]:
    """Encode exactly the frames of a span, as shown; returns its ticks and the picture's size."""
    import av

    x0, y0, x1, y1 = _box(row, how["crop"], 2)
    size = x1 - x0, y1 - y0
    tick = Fraction(row["time_base"])
    frames = media.decoded(path, row["start_pts"], row["end_pts"], limits)
    opened = next(frames, None)
    if opened is None:
        raise MediaError("none of its frames can be decoded")
    video, first = opened
    start, end = first.pts, row["end_pts"]
    graph = _graph(video, first, (x0, y0, *size), tick)
    with av.open(str(out), "w", format="mp4", options={"movflags": "faststart"}) as container:
        rate = Fraction(row["fps"] or 25).limit_denominator(100_000)
        stream: Any = container.add_stream("libx264", rate=rate)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        # No B-frames: mp4 keeps times in decoding order, and with them a clip of uneven frame
        # rate would not last as long as its frames do.
        stream.options = {"crf": str(how["crf"]), "preset": "fast", "bf": "0"} | STEADY
        context = stream.codec_context
        stream.time_base = context.time_base = tick
        count = last = 0

        def write(packets: Sequence[Any]) -> None:
            for packet in packets:
                if packet.pts == last:  # the durations of the others follow from the times
                    packet.duration = end - start - last
                container.mux(packet)

        for _, frame in chain([opened], frames):
            count, last = count + 1, frame.pts - start
            frame.image.pts, frame.image.time_base = last, tick
            graph.vpush(frame.image)
            image = graph.vpull()
            image.pict_type = 0  # the encoder decides for itself where key frames go
            if count == 1:
                for name in ("color_range", "colorspace", "color_primaries", "color_trc"):
                    setattr(context, name, getattr(image, name))
            write(stream.encode(image))
        write(stream.encode(None))
    if count != row["frames"]:
        raise MediaError(f"{count} of its {row['frames']} frames could be decoded")
    return start, end, size


def _graph(video: media.Video, first: media.Frame, box: tuple[int, ...], tick: Fraction) -> Any:
    """Filters from decoded frames to what is encoded: upright, square pixels, the box, 4:2:0.

    They work on the planes as they are, so no color is converted that need not be.
    """
    import av

    image = first.image
    graph = av.filter.Graph()
    chained = [
        graph.add_buffer(
            width=image.width, height=image.height, format=image.format, time_base=tick
        )
    ]
    shown = video.probe.width, video.probe.height
    upright = shown if video.turns % 2 == 0 else shown[::-1]
    if upright != (image.width, image.height):  # pixels that are not square
        chained.append(graph.add("scale", f"{upright[0]}:{upright[1]}:flags=bilinear"))
    if image.format.is_rgb:
        chained.append(graph.add("scale", "out_color_matrix=bt709:out_range=limited"))
    if video.turns:
        turns = {1: ("transpose", "cclock"), 3: ("transpose", "clock")}
        for name, how in (
            [turns[video.turns]] if video.turns % 2 else [("hflip", ""), ("vflip", "")]
        ):
            chained.append(graph.add(name, how))
    x, y, width, height = box
    if (x, y, width, height) != (0, 0, *shown):
        chained.append(graph.add("crop", f"{width}:{height}:{x}:{y}"))
    chained += [graph.add("format", "yuv420p"), graph.add("buffersink")]
    for one, after in pairwise(chained):
        one.link_to(after)
    graph.configure()
    return graph
