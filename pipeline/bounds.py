"""What a source may be at most, and what it says of itself before it is decoded."""

from __future__ import annotations

from dataclasses import dataclass

from unimodal.pipeline.clips import Kind
from unimodal.pipeline.settings import Settings


class Limits(Settings):
    """Bounds on what is decoded; a source beyond one is quarantined before it is read."""

    max_image_pixels: int = 100_000_000
    """Width times height of an image."""
    max_video_pixels: int = 36_000_000
    """Width times height of a video frame (8K is 33 million)."""
    max_frames: int = 4_000_000
    """Frames of one video (37 hours at 30 a second)."""
    max_image_bytes: int = 500_000_000
    """Size of an image file."""
    max_damage: float = 0.02
    """Share of a video's packets that may fail to decode before it counts as broken."""


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True)
class Probe:
    """What a source says of itself before it is decoded."""

    kind: Kind
    width: int  # as shown
    height: int
    codec: str
    animated: bool = False  # a video that Pillow reads: GIF, WebP, APNG, AVIF
    fps: float | None = None
    duration_s: float | None = None  # as declared; None when the container does not say
