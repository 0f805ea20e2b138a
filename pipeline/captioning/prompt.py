"""What a model is asked: a TOML file with a section for each language.

version = 1
[en]
system, image, clip      come before the pictures, the same words for all requests of a kind
after_image, after_clip  come after them; {count}, {seconds} and {times} are filled in
json, text               ask for all styles in one object, or for the words of one style
[en.styles.NAME]
ask = "…"                what this caption is to say
only = "clip"            not asked for pictures ("image": not for clips)
least, most              characters that an answer has
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from unimodal.pipeline.errors import UsageError
from unimodal.pipeline.settings import load_recipe

HERE = Path(__file__).parent / "prompts"
WORDS = ("system", "image", "clip", "after_image", "after_clip", "json", "text")


@dataclass(frozen=True)
class Style:
    """One caption that is asked for."""

    name: str
    ask: str
    only: str | None  # "clip" or "image"
    least: int  # characters
    most: int


@dataclass(frozen=True)
class Prompt:
    """What a model is asked, in one language."""

    name: str
    version: int
    language: str
    words: Mapping[str, str]
    styles: tuple[Style, ...]
    hash: str
    """12 hex digits of all its words; captions carry it."""

    def of(self, kind: str) -> tuple[Style, ...]:
        """Styles that are asked for; `kind` is image or video."""
        other = "clip" if kind == "image" else "image"
        return tuple(style for style in self.styles if style.only != other)

    def before(self, kind: str, form: str) -> str:
        """The words before the pictures."""
        asked = self.of(kind)
        lines = [self.words["image" if kind == "image" else "clip"], self.words[form]]
        if form == "json":
            lines += [f"- {style.name}: {style.ask}" for style in asked]
        else:
            lines.append(asked[0].ask)
        return "\n".join(lines)

    def after(self, kind: str, times_s: Sequence[float], seconds: float) -> str:
        """The words after the pictures; `times_s` are theirs, from where the piece begins."""
        if kind == "image":
            return self.words["after_image"]
        text = self.words["after_clip"].replace("{count}", str(len(times_s)))
        text = text.replace("{seconds}", f"{seconds:.1f}")
        return text.replace("{times}", ", ".join(f"{at:.1f}" for at in times_s))

    def schema(self, kind: str) -> dict[str, Any]:
        """JSON schema of an answer."""
        names = [style.name for style in self.of(kind)]
        return {
            "type": "object",
            "properties": {name: {"type": "string"} for name in names},
            "required": names,
            "additionalProperties": False,
        }


def load_prompt(
    name: str, language: str, styles: Sequence[str] | None = None, form: str = "json"
) -> Prompt:
    """A prompt of the package or of a file.toml, in one language; raises `UsageError`.

    Every problem of a file is told at once.
    """
    return _loaded(str(name), language, tuple(styles) if styles is not None else None, form)


@lru_cache(maxsize=8)
def _loaded(name: str, language: str, styles: tuple[str, ...] | None, form: str) -> Prompt:
    try:
        file = load_recipe(name, HERE)
    except UsageError as error:
        raise UsageError(str(error).replace("recipe", "prompt")) from error
    section = file.get(language)
    if not isinstance(section, Mapping):
        known = ", ".join(key for key, value in file.items() if isinstance(value, Mapping))
        raise UsageError(f"prompt {name} has no language {language}: there are {known or 'none'}")
    words = {key: section.get(key) for key in WORDS}
    problems = [f"{language}.{k} is not a text" for k, v in words.items() if not isinstance(v, str)]
    version = file.get("version")
    if not isinstance(version, int):
        problems.append("version is not a number")
    found = []
    listed = section.get("styles")
    for key, style in (listed if isinstance(listed, Mapping) else {}).items():
        if not isinstance(style, Mapping) or not isinstance(style.get("ask"), str):
            problems.append(f"{language}.styles.{key}.ask is not a text")
            continue
        only, least, most = style.get("only"), style.get("least", 1), style.get("most", 4000)
        if only not in (None, "clip", "image"):
            problems.append(f"{language}.styles.{key}.only is neither clip nor image")
        if not (isinstance(least, int) and isinstance(most, int) and 1 <= least <= most):
            problems.append(f"{language}.styles.{key}: 1 <= least <= most does not hold")
            continue
        found.append(Style(key, style["ask"], only, least, most))
    if not found and not problems:
        problems.append(f"{language}.styles is empty")
    known_styles = [style.name for style in found]
    if styles is not None:
        problems += [
            f"there is no style {s}, but {', '.join(known_styles)}"
            for s in styles
            if s not in known_styles
        ]
        found = [style for wanted in styles for style in found if style.name == wanted]
    if form == "text":  # a bare answer has no keys: it is the words of the first style
        found = [s for s in found if s.only is None][:1] or found[:1]
    if not problems and not all(any(s.only != other for s in found) for other in ("clip", "image")):
        problems.append("neither pictures nor clips may be left without a style")
    if problems:
        raise UsageError(f"prompt {name}: {'; '.join(problems)}")
    told = json.dumps([version, language, words, [vars(style) for style in found], form])
    digest = hashlib.sha256(told.encode()).hexdigest()[:12]
    stem = Path(name).stem
    clean = {key: str(value) for key, value in words.items()}
    return Prompt(stem, int(version or 0), language, clean, tuple(found), digest)
