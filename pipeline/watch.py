"""The watch stage: every source of a part is decoded once, and all that can be seen is noted.

Columns of `clips.WATCH`, one row per clip; sampled frames go to the part's frames tar. A source
that cannot be read becomes a quarantine row; the rest of the part is done.
"""

from __future__ import annotations

import io
import json
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from unimodal.pipeline import fetch, media
from unimodal.pipeline.bounds import Limits, Probe
from unimodal.pipeline.clips import WATCH, clip_uid, image_uid, table
from unimodal.pipeline.errors import MediaError, full_disk, reason, telling_full_disk
from unimodal.pipeline.framepass import Observer, watch_frames
from unimodal.pipeline.images import is_image, probe_image
from unimodal.pipeline.inputs import sha256_of
from unimodal.pipeline.observers.cut import Cuts, CutSettings, spans
from unimodal.pipeline.observers.flow import Flow, FlowSettings
from unimodal.pipeline.observers.keyframes import Keyframes, KeyframeSettings, Picture
from unimodal.pipeline.observers.light import Flicker, Light, LightSettings
from unimodal.pipeline.settings import Settings
from unimodal.pipeline.source import Source
from unimodal.pipeline.stage import PartFiles
from unimodal.pipeline.tell import SILENT, Tell

VERSION = 2


class WatchSettings(Settings):
    """All that the shared decode depends on."""

    cut: CutSettings = CutSettings()
    """Shot detection and clip lengths."""
    flow: FlowSettings = FlowSettings()
    """Motion."""
    light: LightSettings = LightSettings()
    """Exposure, sharpness, bars, freezes."""
    keyframes: KeyframeSettings = KeyframeSettings()
    """Pictures kept of every clip."""
    limits: Limits = Limits()
    """Bounds on what is decoded."""


class Looks:
    """The observers of one source that measure, and what they say of a span of it."""

    def __init__(self, settings: WatchSettings, spool: IO[bytes]) -> None:
        self._flow, self._flicker = Flow(settings.flow), Flicker(settings.light)
        self._light, self.keyframes = Light(settings.light), Keyframes(settings.keyframes, spool)

    @property
    def observers(self) -> list[Observer]:
        """All of them, for the pass."""
        return [self._flow, self._flicker, self._light, self.keyframes]

    def columns(self, start_pts: int, end_pts: int, shown: Probe) -> dict[str, Any]:
        """The columns of a span of a video: the box inside its bars, and `clips.SCORES`."""
        return {
            **self._light.crop(start_pts, end_pts, shown.width, shown.height),
            **self._flow.columns(start_pts, end_pts),
            **self._flicker.columns(start_pts, end_pts),
            **self._light.columns(start_pts, end_pts),
        }

    def still(self, image: media.Video) -> dict[str, Any]:
        """Look at an image: those of its columns that a picture without time has."""
        watch_frames(image, self.observers)
        found = {**self._flicker.columns(0, 1), **self._light.columns(0, 1)}
        return {name: found[name] for name in ("luma_mean", "contrast", "blur", "colorfulness")}


@dataclass(frozen=True)
class _Clip:
    row: dict[str, Any]
    pictures: list[Picture]


def watch_part(
    part: str,
    sources: Sequence[Source],
    settings: WatchSettings,
    folder: Path,
    poison: Mapping[str, str] | None = None,
    tell: Tell = SILENT,
    threads: int = 1,
) -> None:
    """Watch the sources of a part and commit its rows, frames and quarantine to `folder`.

    Sources in `poison` (uri: reason) are quarantined unopened: they have killed a worker before.
    Raises `UnimodalError` if the disk is full; a bad source raises nothing.
    """
    poison = poison or {}
    folder.mkdir(parents=True, exist_ok=True)
    clips: list[_Clip] = []
    quarantined: list[dict[str, str]] = []
    # Without a name on disk, the spool is gone when the process is, however that ends.
    with telling_full_disk(folder), tempfile.TemporaryFile(dir=folder) as spool:
        for source in sorted(sources):
            tell.begin("watch", source.uri)
            why = ""
            try:
                if source.uri in poison:
                    raise MediaError(poison[source.uri])
                clips += _watch_source(source, settings, spool, tell, threads)
            except Exception as error:
                if full_disk(error, folder):
                    raise
                why = reason(error)
                quarantined.append(
                    {"uri": source.uri, "stage": "watch", "reason": why, "part": part}
                )
            tell.done("watch", source.uri, why)
        rows = table((clip.row for clip in clips), WATCH)
        files = PartFiles(folder, part)
        files.commit(rows, quarantined, lambda path: _write_frames(clips, spool, path))


def _watch_source(
    source: Source, settings: WatchSettings, spool: IO[bytes], tell: Tell, threads: int
) -> list[_Clip]:
    def alive(count: int) -> None:
        tell.seconds(0.0)

    with fetch.local(source.uri, listed=source, tick=alive) as path:
        image = is_image(path)
        digest = source.sha256 or sha256_of(path, alive)
        whose = {"uri": source.uri, "source_sha256": digest}
        if image:
            found = probe_image(path, settings.limits)
            if found.kind == "image":
                return [_image(whose, path, found, settings, spool)]
        with media.open_video(path, settings.limits, threads) as video:
            return _video(whose, video, settings, spool, tell)


def _image(
    whose: Mapping[str, str], path: Path, found: Probe, settings: WatchSettings, spool: IO[bytes]
) -> _Clip:
    still, looks = media.open_image(path, found, settings.limits), Looks(settings, spool)
    row = {
        "uid": image_uid(whose["source_sha256"]),
        **whose,
        "kind": "image",
        "width": still.probe.width,
        "height": still.probe.height,
        "codec": found.codec,
        **looks.still(still),
    }
    return _with_samples(row, looks.keyframes.choose(0, 1))


def _video(
    whose: Mapping[str, str],
    video: media.Video,
    settings: WatchSettings,
    spool: IO[bytes],
    tell: Tell,
) -> list[_Clip]:
    found, looks = video.probe, Looks(settings, spool)
    cut = Cuts(settings.cut, video.time_base, found.fps)
    timeline = watch_frames(video, [cut, *looks.observers], tell.seconds)
    total_s = timeline.seconds(timeline.end_pts)
    fps = len(timeline.pts) / total_s
    if found.fps and abs(found.fps - fps) < 0.1 * fps:
        fps = found.fps  # what the container says, unless the rate varies and it only guesses
    clips = []
    for span in spans(timeline, cut.cuts(timeline), settings.cut):
        start, end = span.start_pts, span.end_pts
        row = {
            "uid": clip_uid(whose["source_sha256"], start, end, timeline.time_base),
            **whose,
            "kind": "video",
            "start_s": timeline.seconds(start),
            "end_s": timeline.seconds(end),
            "duration_s": float((end - start) * timeline.time_base),
            "start_pts": start,
            "end_pts": end,
            "time_base": f"{timeline.time_base.numerator}/{timeline.time_base.denominator}",
            "starts_at": span.starts_at,
            "ends_at": span.ends_at,
            "start_cut": span.start_cut and asdict(span.start_cut),
            "end_cut": span.end_cut and asdict(span.end_cut),
            "width": found.width,
            "height": found.height,
            "fps": fps,
            "frames": timeline.count(start, end),
            "codec": found.codec,
            **looks.columns(start, end, found),
        }
        clips.append(_with_samples(row, looks.keyframes.choose(start, end)))
    return clips


def _with_samples(row: dict[str, Any], samples: list[tuple[Picture, bool, bool]]) -> _Clip:
    row["samples"] = [
        {
            "member": f"{row['uid']}.{number:05d}.jpg",
            "time_s": None if row["kind"] == "image" else picture.seconds,
            "keyframe": keyframe,
            "scoring": scoring,
            "hash": picture.hash,
        }
        for number, (picture, keyframe, scoring) in enumerate(samples)
    ]
    return _Clip(row, [picture for picture, _, _ in samples])


def _write_frames(clips: Sequence[_Clip], spool: IO[bytes], path: Path) -> None:
    """A WebDataset tar, a sample per clip: {uid}.00000.jpg … {uid}.json, sorted, without times."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for clip in sorted(clips, key=lambda clip: clip.row["uid"]):
            samples = clip.row["samples"]
            for picture, sample in zip(clip.pictures, samples, strict=True):
                spool.seek(picture.offset)
                _add(tar, sample["member"], spool.read(picture.size))
            note = {
                "uid": clip.row["uid"],
                "kind": clip.row["kind"],
                "times_s": [sample["time_s"] for sample in samples],
                "keyframes": [i for i, sample in enumerate(samples) if sample["keyframe"]],
                "scoring": [i for i, sample in enumerate(samples) if sample["scoring"]],
            }
            _add(tar, f"{clip.row['uid']}.json", json.dumps(note, sort_keys=True).encode())


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # mtime, uid and gid are 0: equal content, equal bytes
    member.size = len(data)
    member.mode = 0o644
    tar.addfile(member, io.BytesIO(data))
