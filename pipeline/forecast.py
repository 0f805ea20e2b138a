"""What a run would do, before it does it: stages, parts, and about how long it takes.

The lengths of a few sources are read from their headers, never decoded; the rest is multiplication.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from unimodal.pipeline import fetch, media
from unimodal.pipeline.bounds import Limits, Probe
from unimodal.pipeline.errors import MediaError
from unimodal.pipeline.parts import plan, read_parts
from unimodal.pipeline.presets import CurateSettings
from unimodal.pipeline.processors import processors
from unimodal.pipeline.source import Source
from unimodal.pipeline.stage import PartFiles
from unimodal.pipeline.stages import part_stages

PROBED = 32
"""Sources whose headers are read."""

# CPU seconds of one core of an AMD EPYC, as docs/measured has them: of older machines half as fast,
# twice as many.
DECODE_S = 0.028  # per second of 1280x720 at 24 frames a second, in proportion to pixels
SAMPLED_S = {"watch": 0.012, "text": 0.016, "quality": 0.005, "embed": 0.7, "nsfw": 0.03}
"""Per sampled picture, though scorers see only 3 of a clip's (embed: ViT-L/14 on a processor)."""

TEXT_S = 0.041
"""Per image: of a video's samples many are known to have no text and not looked at."""
PICTURE_S = 0.00053
"""Per picture and stage, however small (benchmarks/growth.py --plan)."""
START_S = 1.0
"""A process that loads its libraries."""

SAMPLE_BYTES = 60_000
"""A stored picture of the full size, 796x448; a smaller one takes its share."""
PICTURE_BYTES = 2_500
"""What it takes besides, in tables and headers of tars."""
FULL = 796 * 448


@dataclass(frozen=True)
class Forecast:
    """What `curate --plan` prints."""

    sources: int
    bytes: int
    images: int  # by the share among the probed ones
    video_s: float
    unreadable: int
    unknown: int  # sources in buckets, whose headers are not fetched
    parts: int
    stages: tuple[tuple[str, str], ...]  # name, what will happen
    cpu_s: float
    disk_bytes: int


def forecast(sources: Sequence[Source], out: Path, settings: CurateSettings) -> Forecast:
    """What `curate` would do with listed sources in the run directory `out`."""
    stages = part_stages(settings)
    previous = read_parts(out / "parts.parquet")
    watched = out / stages.watch.folder
    parts = plan(sources, previous, lambda name: PartFiles(watched, name).done(), settings.parts)
    local = [source for source in sources if "://" not in source.uri]  # others come whole or not
    chosen = sorted(local, key=lambda s: hashlib.sha256(s.uri.encode()).digest())[:PROBED]
    probes = [_probe(source, settings.limits) for source in chosen]
    seen = [(source, found) for source, found in zip(chosen, probes, strict=True) if found]
    share = len(local) / max(1, len(chosen))
    # Length goes with bytes: a mean over files would be one long video's, or miss it.
    bytes_seen = sum(source.size for source, found in seen if found.kind == "video")
    seconds_seen = sum(found.duration_s or 0.0 for _, found in seen if found.kind == "video")
    images = round(share * sum(found.kind == "image" for _, found in seen))
    bytes_all = sum(source.size for source in sources)
    video_share = bytes_seen / max(1, sum(source.size for source in chosen))
    bytes_local = sum(source.size for source in local)
    video_s = seconds_seen * (bytes_local * video_share / bytes_seen) if bytes_seen else 0.0
    pixels = [found.width * found.height for _, found in seen if found.kind == "video"]
    size = (sum(pixels) / len(pixels) if pixels else 0) / (1280 * 720)
    small = [min(1.0, f.width * f.height / FULL) for _, f in seen if f.kind == "image"]
    counts = {"video": settings.keyframes.fps * video_s, "image": float(images)}
    count = sum(counts.values())
    shares = {"video": min(1.0, size * 1280 * 720 / FULL), "image": sum(small)}
    shares["image"] /= max(1, len(small))
    full = sum(counts[kind] * shares[kind] for kind in counts)  # in pictures of the full size
    cpu = 0.0
    lines = []
    for stage in stages.by_part:
        folder = out / stage.folder
        missing = [part for part in parts if not PartFiles(folder, part.name).done()]
        todo = sum(s.size for part in missing for s in part.sources) / max(1, bytes_all)
        cost = count * PICTURE_S + full * SAMPLED_S[stage.name]
        if stage.name == "text":
            cost += counts["image"] * shares["image"] * (TEXT_S - SAMPLED_S["text"])
        cost += DECODE_S * size * video_s if stage.name == "watch" else 0.0
        cpu += cost * todo
        state = f"{len(missing)} of {len(parts)} parts to do" if missing else "done"
        lines.append((stage.name, state))
    cpu += START_S if cpu else 0.0
    lines += [(name, f"skipped: {why}") for name, why in stages.skipped.items()]
    lines.append(("then", "caption, match, dedup and decide over all clips"))
    return Forecast(
        sources=len(sources),
        bytes=bytes_all,
        images=images,
        video_s=round(video_s, 1),
        unreadable=round(share * (len(chosen) - len(seen))),
        unknown=len(sources) - len(local),
        parts=len(parts),
        stages=tuple(lines),
        cpu_s=round(cpu, 1),
        disk_bytes=int(count * PICTURE_BYTES + full * SAMPLE_BYTES),
    )


def _probe(source: Source, limits: Limits) -> Probe | None:
    try:
        with fetch.local(source.uri) as path:
            return media.probe(path, limits)
    except (MediaError, OSError):
        return None


def wall_s(found: Forecast, workers: int | None) -> float:
    """Seconds that it takes with so many processes (default: one per processor)."""
    return found.cpu_s / max(1, min(workers or processors(), found.parts))
