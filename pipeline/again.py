"""Look at one clip again: what the shared pass measures, for a row that came without its pictures.

A filter in a pipe gets rows, perhaps from another machine or after the cache was emptied. Then the
span alone is decoded, from the key frame before it, and sampled as the pass over the whole was.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import IO, Any

from unimodal.pipeline import fetch, media
from unimodal.pipeline.errors import MediaError
from unimodal.pipeline.framepass import watch_frames
from unimodal.pipeline.frames import Clip, Sample
from unimodal.pipeline.images import probe_image
from unimodal.pipeline.watch import Looks, WatchSettings


def look_again(row: Mapping[str, Any], settings: WatchSettings) -> Clip:
    """A clip with its pictures and all that the pass measures within it.

    `row` has at least uri, kind and, for a video, the span as `clips.SPAN` has it. Raises
    `MediaError` if the source cannot be read.
    """
    with fetch.local(row["uri"], keep=True) as path, tempfile.TemporaryFile() as spool:
        looks = Looks(settings, spool)
        if row["kind"] == "image":
            start, end = 0, 1
            still = media.open_image(path, probe_image(path, settings.limits), settings.limits)
            measured = looks.still(still)
        else:
            start, end = row["start_pts"], row["end_pts"]
            measured, looks = _span(row, path, settings, spool)
        samples = []
        for picture, keyframe, scoring in looks.keyframes.choose(start, end):
            spool.seek(picture.offset)
            seconds = None if row["kind"] == "image" else picture.seconds
            jpeg = spool.read(picture.size)
            samples.append(Sample(seconds, keyframe, scoring, picture.hash, jpeg))
    return Clip({**row, **measured}, tuple(samples))


def _span(
    row: Mapping[str, Any], path: Path, settings: WatchSettings, spool: IO[bytes]
) -> tuple[dict[str, Any], Looks]:
    start, end, tick = row["start_pts"], row["end_pts"], Fraction(row["time_base"])
    first = start - round(row["start_s"] / tick)
    for seek in (True, False):
        spool.truncate(0)
        looks = Looks(settings, spool)
        with media.open_video(path, settings.limits) as video:
            if video.time_base != tick:
                raise MediaError(f"its time base is {video.time_base}, not {tick}: another file?")
            if seek and not video.seek(start):
                continue
            try:
                timeline = watch_frames(video, looks.observers, span=(start, end, first))
            except MediaError:
                if seek:
                    continue  # the index led nowhere: from the beginning then
                raise
        if seek and int(timeline.pts[0]) > start + round(1 / (video.probe.fps or 25) / tick):
            continue  # it led past the span
        return looks.columns(start, end, video.probe), looks
    raise MediaError("the span is not in this file")
