"""Settings: defaults, then a preset or recipe, then `--set a.b=c`; all errors at once.

A settings class derives from `Settings`; nested groups are themselves `Settings`. Field
docstrings become the help text.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
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
LARGEST_RECIPE = 1 << 16
"""Bytes; ours have 2,000. TOML takes seconds for some files of a hundred thousand."""
MOST_PROBLEMS = 20
"""That are told of at once."""


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
            problems.append(f"--set {_short(item)}: write it as key=value")
            continue
        nested: Any = _value(value)
        for part in reversed(key.strip().split(".")):
            nested = {part: nested}
        _merge(merged, nested)
    try:
        built = cls.model_validate(merged)
    except ValidationError as error:
        found = error.errors()
        problems += [_explain(cls, dict(e)) for e in found[:MOST_PROBLEMS]]
        problems += [f"and {len(found) - MOST_PROBLEMS} more"] * (len(found) > MOST_PROBLEMS)
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


def recipe_names(folder: Path) -> list[str]:
    """Recipes in a folder of the package."""
    return sorted(path.stem for path in folder.glob("*.toml"))


def load_recipe(name: str | Path, folder: Path) -> dict[str, Any]:
    """Values of a recipe in `folder` (`tiny`), or of a TOML file; else raises `UsageError`."""
    path = Path(name)
    if path.suffix != ".toml":
        path, known = folder / f"{name}.toml", recipe_names(folder)
        if str(name) not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
            raise UsageError(f"no recipe {name}: {hint} (or give a file.toml)")
    try:
        if path.stat().st_size > LARGEST_RECIPE:
            raise UsageError(f"recipe {path} is larger than {LARGEST_RECIPE} bytes: name another")
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise UsageError(f"recipe {path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # also numbers without end
        raise UsageError(f"recipe {path} is not TOML: {error}") from error


def differences(
    before: Mapping[str, Any], now: Mapping[str, Any], free: Sequence[str] = ()
) -> dict[str, tuple[Any, Any]]:
    """Old and new value of each dotted key that differs, but for keys and groups in `free`."""

    def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
        out: dict[str, Any] = {}
        for key, value in values.items():
            if prefix + key in free:
                continue
            inner = isinstance(value, Mapping)
            out |= flat(value, f"{prefix}{key}.") if inner else {prefix + key: value}
        return out

    old, new = flat(before), flat(now)
    return {k: (old.get(k), v) for k, v in sorted(new.items()) if old.get(k) != v}


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
        found = tomllib.loads(f"v = {text}")
        return found["v"] if len(found) == 1 else text  # else there are lines behind it
    except (ValueError, RecursionError):
        return text


def _explain(cls: type[Settings], error: dict[str, Any]) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        known = keys(cls)
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
        last = key.rpartition(".")[2]
        near = near or [k for k in known if k.rpartition(".")[2] == last]
        hint = f"did you mean {near[0]}?" if near else f"known settings: {', '.join(known)}"
        return f"unknown setting {_short(key)}: {hint}"
    return f"setting {_short(key)} = {_short(repr(error.get('input')))}: {error['msg']}"


def _short(text: str, most: int = 200) -> str:
    return text if len(text) <= most else f"{text[:most]}…"
