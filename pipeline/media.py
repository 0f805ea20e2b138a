"""Open, measure and read media that nobody vouches for.

Every frame of the project comes through here: the curation pass, keyframes and tokenizing read
the same pixels at the same times. Rules of the house:

- What a file is follows from its first bytes, never from its name. FFmpeg may use only the
  container formats and the one protocol listed below, so a playlist cannot open other files.
- Sizes are known and bounded before a pixel is decoded.
- Times are presentation time stamps (PTS) in the container's ticks. Frame index / fps is wrong
  for variable frame rates and is not used.
- Pixels are as a person would see them: rotation metadata, EXIF orientation and pixel aspect
  applied, transparency on white, 8 bits of RGB.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from unimodal.pipeline import fetch
from unimodal.pipeline.bounds import DEFAULT_LIMITS, Limits, Probe
from unimodal.pipeline.errors import MediaError
from unimodal.pipeline.images import decode_image, is_image, open_pillow, probe_image, to_rgb

if TYPE_CHECKING:
    import av

VIDEO_FORMATS = (
    "mov,matroska,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,mxf,h264,hevc,ivf,yuv4mpegpipe,nut,dv,rm"
)
"""FFmpeg demuxers that may open a file: self-contained ones. No hls, concat, dash, sdp, image2,
lavfi or subtitle formats, which name other files, the network or devices."""

MILLISECOND = Fraction(1, 1000)


@dataclass
class Frame:
    """One decoded frame, still in the decoder's size and color format."""

    pts: int
    duration: int  # ticks; 0 when unknown
    image: av.VideoFrame


@dataclass
class Video:
    """An opened video: its geometry, and one way through its frames.

    `damaged` counts packets that could not be decoded so far. `frames()` may be called once.
    """

    path: Path
    probe: Probe
    time_base: Fraction
    coded: tuple[int, int]  # width, height of decoded frames
    turns: int  # quarter turns counter-clockwise that bring a decoded frame upright
    limits: Limits
    container: Any = None
    stream: Any = None
    damaged: int = 0
    packets: int = 0
    scalers: dict[tuple[int, int, str, int], Any] = field(default_factory=dict)
    source: Iterator[Frame] | None = None  # where frames() goes on
    tick: fetch.Tick | None = None  # told of each packet, of which some yield nothing

    def seek(self, pts: int) -> bool:
        """Go to the key frame before `pts`, if the container can; false if it cannot."""
        import av

        if self.container is None:
            return False
        try:
            self.container.seek(pts, stream=self.stream, backward=True)
        except av.error.FFmpegError:
            return False
        self.source = self.decode()
        return True

    def frames(self) -> Iterator[Frame]:
        """Frames in presentation order with strictly rising PTS; raises `MediaError`."""
        source = self.source if self.source is not None else self._animation()
        last: int | None = None
        count = late = 0
        for frame in source:
            count += 1
            if count > self.limits.max_frames:
                raise MediaError(f"more than {self.limits.max_frames} frames", self.path)
            if last is not None and frame.pts <= last:
                late += 1  # a clock that runs backwards cannot be cut: the frame is passed over
                if late > 100 and late * 2 > count:
                    raise MediaError("its time stamps do not rise", self.path)
                continue
            last = frame.pts
            yield frame

    def scaled(
        self, frame: Frame, size: tuple[int, int], format: str, fast: bool = False
    ) -> np.ndarray:
        """The frame as coded, scaled: uint8 [H, W] for "gray", [H, W, 3] for "rgb24", "bgr24".

        `fast` reads two source lines per output line and does not low-pass, which is what
        cv2.resize(INTER_LINEAR) does and thus what PySceneDetect sees.
        """
        from av.video.reformatter import Interpolation, VideoReformatter

        how = Interpolation.FAST_BILINEAR if fast else Interpolation.BILINEAR
        width, height = size
        key = (width, height, format, int(how))
        if key not in self.scalers:  # swscale wants a context per size, for speed
            self.scalers[key] = VideoReformatter()
        scaled = self.scalers[key].reformat(
            frame.image, width=width, height=height, format=format, interpolation=how, threads=1
        )
        return scaled.to_ndarray()

    def upright(self, frame: Frame, size: tuple[int, int], format: str) -> np.ndarray:
        """The frame as shown, scaled to `size` (width, height): uint8 [H, W] or [H, W, 3]."""
        array = self.scaled(frame, size if self.turns % 2 == 0 else size[::-1], format)
        return np.ascontiguousarray(np.rot90(array, self.turns)) if self.turns else array

    def check_complete(self, first_pts: int, end_pts: int) -> None:
        """Raise `MediaError` if the frames that came are not what the container promised."""
        if self.damaged > max(1, self.limits.max_damage * self.packets):
            raise MediaError(
                f"damaged: {self.damaged} of {self.packets} packets cannot be decoded", self.path
            )
        declared = self.probe.duration_s
        if declared is None or self.probe.animated:
            return
        got = float((end_pts - first_pts) * self.time_base)
        if declared - got > max(0.5, 0.05 * declared):
            raise MediaError(
                f"truncated: {got:.1f} s of the promised {declared:.1f} s can be decoded", self.path
            )

    def decode(self) -> Iterator[Frame]:
        """Every frame that comes out of the container from where it stands, in any PTS order."""
        import av

        demuxer = self.container.demux(self.stream)
        previous = -1
        while True:
            try:
                packet = next(demuxer)
            except StopIteration:
                return
            except av.error.FFmpegError:
                self.damaged += 1  # the container itself breaks off here
                return
            self.packets += 1
            if self.tick is not None:
                self.tick(0)
            try:
                images = packet.decode()
            except av.error.FFmpegError:
                self.damaged += 1
                continue
            for image in images:
                if image.is_corrupt:
                    self.damaged += 1
                pts = image.pts if image.pts is not None else image.dts
                if pts is None:
                    pts = previous + max(1, image.duration or 1)
                previous = pts
                yield Frame(pts, image.duration or 0, image)

    def _animation(self) -> Iterator[Frame]:
        import av

        pts = 0
        with open_pillow(self.path) as image:
            for index in range(getattr(image, "n_frames", 1)):
                try:
                    image.seek(index)
                    rgb = to_rgb(image)
                except (EOFError, OSError, SyntaxError, ValueError) as error:
                    raise MediaError(
                        f"truncated: frame {index} cannot be read ({error})", self.path
                    ) from error
                # Browsers show frames of 10 ms and less for 100 ms; so must we, to show the same.
                declared = float(image.info.get("duration") or 0)
                ticks = round(declared) if declared > 10 else 100
                yield Frame(pts, ticks, av.VideoFrame.from_ndarray(rgb, format="rgb24"))
                pts += ticks


def probe(uri: Path | str, limits: Limits = DEFAULT_LIMITS) -> Probe:
    """What a source is, from its bytes and headers alone; raises `MediaError` with the reason.

    Like all that take a `uri` here: a path, a member of a tar (x.tar#name) or an object (s3://…).
    """
    with fetch.local(str(uri), keep=True) as path:
        if is_image(path):
            return probe_image(path, limits)
        with open_video(path, limits) as video:
            return video.probe


def read_image(uri: Path | str, limits: Limits = DEFAULT_LIMITS) -> np.ndarray:
    """A still image as it is shown: uint8 RGB [H, W, 3]; raises `MediaError` with the reason."""
    with fetch.local(str(uri), keep=True) as path:
        if not is_image(path):
            raise MediaError("not an image", path)
        probe_image(path, limits)
        return decode_image(path)


def iter_frames(
    uri: Path | str,
    start_pts: int | None = None,
    end_pts: int | None = None,
    *,
    size: tuple[int, int] | None = None,
    limits: Limits = DEFAULT_LIMITS,
    tick: fetch.Tick | None = None,
) -> Iterator[tuple[int, np.ndarray]]:
    """Frames of a video with start_pts <= PTS < end_pts, as shown: (pts, uint8 RGB [H, W, 3]).

    One seek to the key frame before the span, then decoding in sequence. `size` is (height,
    width); by default the size at which the video is shown. `tick` is told while nothing is
    yielded: of bytes that are fetched, and with 1 of each frame before the span. Raises
    `MediaError`.
    """
    with fetch.local(str(uri), keep=True, tick=tick) as path:
        for video, frame in decoded(path, start_pts, end_pts, limits, tick):
            shown = (video.probe.width, video.probe.height) if size is None else size[::-1]
            yield frame.pts, video.upright(frame, shown, "rgb24")


def decoded(
    path: Path,
    start_pts: int | None,
    end_pts: int | None,
    limits: Limits,
    tick: fetch.Tick | None = None,
) -> Iterator[tuple[Video, Frame]]:
    """Frames as `iter_frames` finds them, before they are brought upright; the video with each."""
    for seek in (start_pts is not None, False):
        with open_video(path, limits) as video:
            if seek and not video.seek(start_pts or 0):
                continue
            frames = video.frames()
            first = next(frames, None)
            if seek and (first is None or first.pts > (start_pts or 0)):
                continue  # the index led past the span, or nowhere: from the beginning then
            for frame in chain([first] if first else [], frames):
                if end_pts is not None and frame.pts >= end_pts:
                    return
                if start_pts is None or frame.pts >= start_pts:
                    yield video, frame
                elif tick is not None:
                    tick(1)
            return


def open_image(path: Path, found: Probe, limits: Limits = DEFAULT_LIMITS) -> Video:
    """A still image that was probed, as a video of one frame for the observers of the pass."""
    import av

    rgb = decode_image(path)
    frame = Frame(0, 0, av.VideoFrame.from_ndarray(rgb, format="rgb24"))
    height, width = rgb.shape[:2]
    found = replace(found, width=width, height=height)
    return Video(path, found, MILLISECOND, (width, height), 0, limits, source=iter([frame]))


@contextmanager
def open_video(
    path: Path,
    limits: Limits = DEFAULT_LIMITS,
    threads: int = 1,
    tick: fetch.Tick | None = None,
) -> Iterator[Video]:
    """Open a video for one pass; raises `MediaError` if it is none or beyond a limit.

    `threads` are the decoder's. The frames are the same for any number. `tick` is told, with 0, of
    each packet that is read.
    """
    if is_image(path):
        found = probe_image(path, limits)
        if found.kind != "video":
            raise MediaError("a still image, not a video", path)
        yield Video(path, found, MILLISECOND, (found.width, found.height), 0, limits)
        return
    with opened(path) as container:
        yield _measure(path, container, limits, threads, tick)


@contextmanager
def opened(path: Path) -> Iterator[av.container.InputContainer]:
    """A video's container, of the formats that may be; raises `MediaError` if it is none."""
    import av

    options = {"format_whitelist": VIDEO_FORMATS, "protocol_whitelist": "file"}
    try:
        # The explicit protocol keeps a file named "concat:…" or "http:…" a file. Titles in Latin-1
        # and the like are no reason to refuse a film.
        container = av.open(f"file:{path}", options=options, metadata_errors="replace")
    except av.error.FFmpegError as error:
        why = (error.strerror or str(error)).strip().rstrip(".")
        raise MediaError(f"not a video that can be read ({why})", path) from error
    with container:
        yield container


def _stream(path: Path, container: Any, limits: Limits) -> Any:
    """The stream of pictures, which is within the limits; raises `MediaError`."""
    import av

    cover = av.stream.Disposition.attached_pic  # an album's
    streams = (stream for stream in container.streams.video if not stream.disposition & cover)
    stream = next(streams, None)
    if stream is None:
        raise MediaError("no video in it (audio only?)", path)
    context = stream.codec_context
    if context is None:
        raise MediaError("its codec is not supported", path)
    width, height = context.width, context.height
    if width <= 0 or height <= 0:
        raise MediaError("its picture size is not known", path)
    if width * height > limits.max_video_pixels:
        raise MediaError(
            f"{width}x{height} pixels are over the limit of {limits.max_video_pixels}", path
        )
    if stream.time_base is None:
        raise MediaError("it has no time base", path)
    return stream


def _measure(
    path: Path, container: Any, limits: Limits, threads: int, tick: fetch.Tick | None
) -> Video:
    """The video in a container, with its first frame decoded: that tells how it is turned."""
    stream = _stream(path, container, limits)
    context = stream.codec_context
    width, height = context.width, context.height
    # A stream may change its size midway: the decoder itself holds the bound.
    context.options = {**context.options, "max_pixels": str(limits.max_video_pixels)}
    context.thread_type = "AUTO"
    context.thread_count = threads
    aspect = stream.sample_aspect_ratio
    shown_width = width
    if aspect and 0.1 < float(aspect) < 10 and aspect != 1:
        shown_width = max(1, round(width * float(aspect)))
    rate = stream.average_rate or stream.guessed_rate
    found = Probe(
        "video",
        shown_width,
        height,
        codec=context.name,
        fps=float(rate) if rate else None,
        duration_s=_declared(container, stream),
    )
    video = Video(
        path,
        found,
        Fraction(stream.time_base),
        (width, height),
        0,
        limits,
        container=container,
        stream=stream,
        tick=tick,
    )
    decoded = video.decode()
    first = next(decoded, None)
    if first is None:
        raise MediaError("no frame can be decoded", path)
    # Rotation metadata reaches us with the frames; the first one is put back in front.
    video.source = chain([first], decoded)
    video.turns = round(first.image.rotation / 90) % 4
    if video.turns % 2:
        video.probe = replace(found, width=height, height=shown_width)
    return video


def _declared(container: Any, stream: Any) -> float | None:
    """Seconds that the container promises for its video; None where it only guesses.

    Transport and elementary streams have no index, and their durations are estimates. Matroska
    notes a duration per stream in a tag, and the file's own may be that of a longer sound track.
    """
    whole = container.duration / 1_000_000 if container.duration else None
    names = set(container.format.name.split(","))
    if "avi" in names and stream.frames:
        # The header's length in ticks; the duration is already cut to what the file holds.
        return float(stream.frames * stream.time_base)
    if names & {"mov", "mp4"}:
        own = float(stream.duration * stream.time_base) if stream.duration else None
        # An edit list shows less than the stream holds: the shorter one is the promise.
        return min((d for d in (own, whole) if d), default=None)
    if names & {"matroska", "webm"}:
        tag = re.fullmatch(r"(\d+):(\d\d):(\d\d(?:\.\d+)?)", stream.metadata.get("DURATION", ""))
        if tag:
            return int(tag[1]) * 3600 + int(tag[2]) * 60 + float(tag[3])
        return whole if len(container.streams) == 1 else None
    return None
