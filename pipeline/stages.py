"""Which stages a run has in one configuration, in which order, and what each of them reads.

    watch ─┬─> text ─────┐
           ├─> quality ──┤
           ├─> embed ────┼─> dedup ─> decide ─> clips.parquet, report.html
           ├─> nsfw ─────┤              ^
           └─> caption ──┴─> match ─────┘

watch, text, quality, embed, nsfw and match work part by part, wherever the engine runs them; the
others look at all clips at once. A stage whose weights are missing is left out, by name.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from unimodal.pipeline import score, watch
from unimodal.pipeline.errors import UsageError
from unimodal.pipeline.stage import Stage

if TYPE_CHECKING:
    from unimodal.pipeline.presets import CurateSettings

SKIPPABLE = (*score.SCORERS, "dedup", "match")
"""Stages that `skip` may name; the run goes on without them."""


@dataclass(frozen=True)
class Stages:
    """The stages that read pictures, and why others do not run."""

    watch: Stage
    scores: tuple[Stage, ...]
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def by_part(self) -> tuple[Stage, ...]:
        """Those that need nothing but a part."""
        return (self.watch, *self.scores)

    @property
    def folders(self) -> dict[str, str]:
        """Folder of each."""
        return {stage.name: stage.folder for stage in self.by_part}


def part_stages(settings: CurateSettings) -> Stages:
    """The stages of a configuration that work part by part, before anything is joined."""
    first = Stage("watch", watch.VERSION, settings.watch().digest())
    scores: list[Stage] = []
    skipped: dict[str, str] = {}
    for name in score.SCORERS:
        module = score.module(name)
        own = getattr(settings, name)
        why = "switched off (skip)" if name in settings.skip else why_not(name, settings)
        if why:
            skipped[name] = why
        else:
            # Weights may be replaced under their name: what is in them counts.
            weights = (module.identity(own),) if hasattr(module, "identity") else ()
            scores.append(Stage(name, module.VERSION, own.digest(), (first.folder, *weights)))
    for name in ("dedup", "match"):
        if name in settings.skip:
            skipped[name] = "switched off (skip)"
    if "embed" in skipped:
        skipped.setdefault("match", "it reads what embed writes")
    return Stages(first, tuple(scores), skipped)


def why_not(name: str, settings: CurateSettings) -> str | None:
    """Why a scorer cannot run; None if it can. Raises `UsageError` if it was asked for."""
    own = getattr(settings, name)
    why = score.module(name).absent(own)
    if why and getattr(own, "weights", None):
        raise UsageError(f"{name}: {why}")
    return why
