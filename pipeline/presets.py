"""All settings of `curate`, and its presets.

`build(CurateSettings, PRESETS["emu3"], sets=["cut.trim_s=0.5"])` gives a resolved set.
"""

from __future__ import annotations

from typing import Any

from pydantic import field_validator

from unimodal.pipeline.captioning.settings import CaptionSettings
from unimodal.pipeline.decide import DecideSettings
from unimodal.pipeline.dedup import DedupSettings
from unimodal.pipeline.errors import UsageError
from unimodal.pipeline.parts import PartSettings
from unimodal.pipeline.scorers.embed import EmbedSettings
from unimodal.pipeline.scorers.nsfw import NsfwSettings
from unimodal.pipeline.scorers.quality import QualitySettings
from unimodal.pipeline.scorers.text import TextSettings
from unimodal.pipeline.stages import SKIPPABLE
from unimodal.pipeline.supervise import Patience
from unimodal.pipeline.watch import WatchSettings

NOT_THRESHOLDS = ("dedup", "extra")


class CurateSettings(WatchSettings):
    """Everything that `curate` can be told."""

    text: TextSettings = TextSettings()
    """How much writing is in the picture."""
    quality: QualitySettings = QualitySettings()
    """Technical quality."""
    embed: EmbedSettings = EmbedSettings()
    """CLIP: embeddings, aesthetics and agreement with captions, from given weights."""
    nsfw: NsfwSettings = NsfwSettings()
    """Pictures not safe for work, from given weights."""
    dedup: DedupSettings = DedupSettings()
    """Near-duplicates."""
    skip: tuple[str, ...] = ()
    """Stages to leave out, of text, quality, embed, nsfw, dedup and match."""
    caption: CaptionSettings = CaptionSettings()
    """Captions: those that lie beside the media, and those that a model is to write."""
    decide: DecideSettings = DecideSettings()
    """Thresholds."""
    parts: PartSettings = PartSettings()
    """Units of work."""
    patience: Patience = Patience()
    """When to give up on a file, a worker or the whole run."""
    report: bool = True
    """Write report.html when something has changed."""

    @field_validator("skip")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        unknown = sorted(set(value) - set(SKIPPABLE))
        if unknown:
            raise ValueError(f"no such stage: {', '.join(unknown)}; one of {', '.join(SKIPPABLE)}")
        return value

    def watch(self) -> WatchSettings:
        """The settings that the shared decode depends on."""
        return WatchSettings(**{name: getattr(self, name) for name in WatchSettings.model_fields})


PRESETS: dict[str, dict[str, Any]] = {
    # The defaults: the detectors and thresholds that the field's own sweeps come out at.
    "best": {},
    # Emu3 (arXiv 2409.18869, §2.1): ContentDetector and ThresholdDetector at their library
    # defaults, text looked for at short side 256; its kept clips start at 5 s and at a flow score
    # of 0.04, without upper bounds. What it does not have is off.
    "emu3": {
        "cut": {"adaptive": 0.0, "content": 27.0, "dissolve": 0.0, "max_clip_s": 0.0},
        "text": {"long_side": None, "short_side": 256},
        "decide": {
            "video_min_s": 5.0,
            "video_min_side": None,
            "flow_min": 0.04,
            "flow_max": None,
            "luma_min": None,
            "luma_max": None,
            "text_track_max_s": None,
            "text_corner_max": None,
        },
    },
    # For fine-tuning on few good clips: less text, calmer motion, nothing soft, frozen or flashing.
    "strict": {
        "cut": {"trim_s": 0.5},
        "dedup": {"distance": 8},
        "decide": {
            "image_min_area": 1024 * 1024,
            "image_max_aspect": 3.0,
            "video_min_side": 480,
            "video_min_s": 3.0,
            "flow_min": 0.005,
            "flow_max": 0.06,
            "luma_min": 30.0,
            "luma_max": 220.0,
            "contrast_min": 15.0,
            "blur_min": 50.0,
            "freeze_max": 0.1,
            "flash_max": 0.02,
            "text_area_max": 0.02,
            "text_area_p90_max": 0.05,
            "text_track_max_s": 0.5,
            "text_corner_max": 0.2,
            "image_aesthetic_min": 6.0,
            "rescue_colorfulness": None,
            "video_aesthetic_min": 5.5,
            "nsfw_max": 0.2,
            "match_min": 0.15,
        },
    },
    # Measure everything, drop nothing: to look at the scores before choosing thresholds.
    "score-only": {
        "decide": {
            **{name: None for name in DecideSettings.model_fields if name not in NOT_THRESHOLDS},
            "dedup": False,
        }
    },
}


def preset_layer(name: str) -> dict[str, Any]:
    """The settings that a preset changes; raises `UsageError` for a name that is none."""
    if name not in PRESETS:
        raise UsageError(f"no preset {name}: there are {', '.join(PRESETS)}")
    return PRESETS[name]
