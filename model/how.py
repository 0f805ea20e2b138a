"""How pictures are drawn and words are chosen: keywords of the sampler's methods."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypedDict, TypeVar

from unimodal.model.choice import Choice
from unimodal.model.generate import Watch
from unimodal.model.recipe import SamplingSettings
from unimodal.pipeline.errors import UsageError
from unimodal.pipeline.progress import Progress

T = TypeVar("T")


class How(TypedDict, total=False):
    """How pictures and clips are drawn. What is left out, or None, the checkpoint's own recipe
    says, as it is best drawn from."""

    guidance: float | list[float] | None
    """Scale of classifier-free guidance, 1 is none: for all, or one for each prompt."""
    negative: str | list[str] | None
    """The prompt that guidance leads away from: for all, or one for each prompt."""
    temperature: float | None
    top_k: int | None
    top_p: float | None
    plausible: float | None
    """These four as `Choice`."""
    seed: int | list[int]
    """For all, or one for each prompt, which then comes as it does alone with that seed."""
    progress: Progress | None
    watch: Watch | None
    """Sees the sequences grow."""


class Words(TypedDict, total=False):
    """How words are chosen. What is left out, or None, the checkpoint's own recipe says, the
    likeliest always if that says nothing."""

    temperature: float | None
    """0: the likeliest always."""
    top_k: int | None
    top_p: float | None
    seed: int | list[int]
    progress: Progress | None
    watch: Watch | None


def each(value: Any, count: int, name: str) -> list[Any]:
    """`value` for each of `count` prompts: a list as it is, anything else again and again."""
    if not isinstance(value, list):
        return [value] * count
    if len(value) != count:
        raise UsageError(f"{len(value)} values of {name} for {count} prompts: one for each")
    return value


def first(value: T | None, default: T) -> T:
    """`value`, or what the recipe says where it is None."""
    return default if value is None else value


def _known(how: Mapping[str, Any], kind: type) -> None:
    if unknown := sorted(set(how) - set(kind.__annotations__)):
        raise TypeError(f"there is no {', '.join(unknown)}: {', '.join(kind.__annotations__)}")


def check_guidance(scale: float, name: str = "guidance") -> None:
    """Raise `UsageError` for a scale of guidance that is none."""
    if not 0 < scale < math.inf:
        raise UsageError(f"{name} {scale} must be positive (1 is none)")


def check_count(count: int, name: str) -> None:
    """Raise `UsageError` for less than one of anything."""
    if count < 1:
        raise UsageError(f"{name} {count} must be at least 1")


def scales_of(how: How, own: SamplingSettings, count: int) -> list[float]:
    """The guidance of each of `count` prompts."""
    found = each(first(how.get("guidance"), own.guidance), count, "guidance")
    for scale in found:
        check_guidance(scale)
    return found


def codes_choice(how: How, own: SamplingSettings) -> Choice:
    """How codes are chosen."""
    _known(how, How)
    return Choice(
        first(how.get("temperature"), own.temperature),
        first(how.get("top_k"), own.top_k),
        first(how.get("top_p"), own.top_p),
        first(how.get("plausible"), own.plausible),
    )


def words_choice(how: Words, own: SamplingSettings) -> Choice:
    """How words are chosen."""
    _known(how, Words)
    return Choice(
        first(how.get("temperature"), own.text_temperature) or None,
        first(how.get("top_k"), own.text_top_k),
        first(how.get("top_p"), own.text_top_p),
    )
