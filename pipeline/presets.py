"""All settings of `curate`, and its presets.

`build(CurateSettings, PRESETS["emu3"], sets=["cut.trim_s=0.5"])` gives a resolved set.
"""

from __future__ import annotations

from typing import Any

from unimodal.pipeline.bounds import Limits
from unimodal.pipeline.caption import CaptionSettings
from unimodal.pipeline.decide import DecideSettings
from unimodal.pipeline.observers.cut import CutSettings
from unimodal.pipeline.observers.flow import FlowSettings
from unimodal.pipeline.observers.keyframes import KeyframeSettings
from unimodal.pipeline.observers.light import LightSettings
from unimodal.pipeline.parts import PartSettings
from unimodal.pipeline.settings import Settings
from unimodal.pipeline.supervise import Patience
from unimodal.pipeline.watch import WatchSettings


class CurateSettings(Settings):
    """Everything that `curate` can be told."""

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
    caption: CaptionSettings = CaptionSettings()
    """Captions that lie beside the media."""
    decide: DecideSettings = DecideSettings()
    """Thresholds."""
    parts: PartSettings = PartSettings()
    """Units of work."""
    patience: Patience = Patience()
    """When a worker counts as stuck."""

    def watch(self) -> WatchSettings:
        """The settings that the shared decode depends on."""
        return WatchSettings(
            cut=self.cut,
            flow=self.flow,
            light=self.light,
            keyframes=self.keyframes,
            limits=self.limits,
        )


PRESETS: dict[str, dict[str, Any]] = {
    # The defaults: the detector and thresholds that the field's own sweeps come out at.
    "best": {},
    # Emu3 (arXiv 2409.18869, §2.1): ContentDetector and ThresholdDetector at their library
    # defaults; its kept clips start at 5 s and at a flow score of 0.04, without upper bounds.
    "emu3": {
        "cut": {"adaptive": 0.0, "content": 27.0, "max_clip_s": 0.0},
        "decide": {
            "video_min_s": 5.0,
            "video_min_side": None,
            "flow_min": 0.04,
            "flow_max": None,
            "luma_min": None,
            "luma_max": None,
        },
    },
}
