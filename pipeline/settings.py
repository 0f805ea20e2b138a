"""Settings: defaults, then a preset or recipe, then `--set a.b=c`; all errors at once.

A settings class derives from `Settings`; nested groups are themselves `Settings`. Field
docstrings become the help text.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import tomllib
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from unimodal.pipeline.errors import UsageError


class Settings(BaseModel):
    """Base of every settings class: frozen, no unknown keys, field docstrings as help."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    def digest(self) -> str:
        """Hash of all values, 16 hex digits; equal settings give equal digests."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


S = TypeVar("S", bound=Settings)


def build(cls: type[S], *layers: Mapping[str, Any], sets: Iterable[str] = ()) -> S:
    """Merge `layers` (later wins) and `key.sub=value` strings into a `cls`.

    Values of `sets` are read as TOML (`3`, `0.5`, `true`, `[1, 2]`), `none` as None, else as text.
    Raises `UsageError` that lists every problem; an unknown key names the nearest valid one.
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        _merge(merged, layer)
    problems: list[str] = []
    for item in sets:
        key, equals, value = item.partition("=")
        if not equals:
            problems.append(f"--set {item}: write it as key=value")
            continue
        nested: Any = _value(value)
        for part in reversed(key.strip().split(".")):
            nested = {part: nested}
        _merge(merged, nested)
    try:
        built = cls.model_validate(merged)
    except ValidationError as error:
        problems += [_explain(cls, dict(e)) for e in error.errors()]
    if problems:
        raise UsageError("; ".join(problems))
    return built


def keys(cls: type[Settings], prefix: str = "") -> list[str]:
    """Every dotted key of a settings class."""
    found: list[str] = []
    for name, field in cls.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Settings):
            found += keys(inner, f"{prefix}{name}.")
        else:
            found.append(prefix + name)
    return found


def _merge(into: dict[str, Any], layer: Mapping[str, Any]) -> None:
    for key, value in layer.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = dict(value) if isinstance(value, Mapping) else value


def _value(text: str) -> Any:
    if text == "none":  # TOML has no word for it
        return None
    try:
        return tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        return text


def _explain(cls: type[Settings], error: dict[str, Any]) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        known = keys(cls)
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
        last = key.rpartition(".")[2]
        near = near or [k for k in known if k.rpartition(".")[2] == last]
        hint = f"did you mean {near[0]}?" if near else f"known settings: {', '.join(known)}"
        return f"unknown setting {key}: {hint}"
    return f"setting {key} = {error.get('input')!r}: {error['msg']}"
