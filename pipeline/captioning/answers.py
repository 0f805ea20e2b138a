"""From a model's answer to captions that can be believed, or the reason why there are none.

Statuses are few, so that a report can count them: ok, truncated, broken JSON, broken characters,
empty, refused, repeats itself, wrong language, too short, too long; sources add theirs.
"""

from __future__ import annotations

import json
import re
import tomllib
import unicodedata
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from unimodal.pipeline.captioning.captioner import Answer
from unimodal.pipeline.captioning.prompt import HERE, Prompt, Style
from unimodal.pipeline.errors import printed
from unimodal.pipeline.tables import clean

OK = "ok"
TRUNCATED, BROKEN, EMPTY, REFUSED = "truncated", "broken JSON", "empty", "refused"
GARBLED = "broken characters"
REPEATS, LANGUAGE, SHORT, LONG = "repeats itself", "wrong language", "too short", "too long"

LARGEST = 100_000
"""Characters of an answer that are looked at; what is longer is no caption."""


def usable(caption: Mapping[str, Any]) -> bool:
    """Whether a caption of a clip has a text, and none that was found wanting."""
    return bool(caption["text"]) and caption.get("status") in (None, "", OK)


def captioned(captions: pa.ChunkedArray) -> np.ndarray:
    """bool [N]: which of N clips have a caption. Where a model failed is a row without a text."""
    found = [np.zeros(0, bool)]
    for some in captions.chunks:  # all together may be too much text for one array
        text = pc.list_flatten(some).field("text")
        written = pc.greater(pc.fill_null(pc.utf8_length(text), 0), 0)
        found.append(np.zeros(len(some), bool))
        found[-1][pc.list_parent_indices(some).filter(written).to_numpy()] = True
    return np.concatenate(found)


def read_answer(answer: Answer, prompt: Prompt, kind: str, form: str) -> dict[str, tuple[str, str]]:
    """Status and text of each style that was asked for; the text is "" where the status is not ok.

    `kind` is image or video.
    """
    styles = prompt.of(kind)
    if len(answer.text) > LARGEST:
        return {style.name: (LONG, "") for style in styles}
    if answer.finish == "length":
        return {style.name: (TRUNCATED, "") for style in styles}
    text = re.sub(r"\A\s*<think>.*?</think>", "", answer.text, flags=re.DOTALL).strip()
    if not text:
        return {style.name: (EMPTY, "") for style in styles}
    if form == "text":
        return {styles[0].name: checked(text, styles[0], prompt.language)}
    said = _object(text)
    if said is None:
        why = REFUSED if refuses(tidy(text)) else BROKEN
        return {style.name: (why, "") for style in styles}
    found = {}
    for style in styles:
        words = said.get(style.name, "")
        found[style.name] = (
            checked(words, style, prompt.language) if isinstance(words, str) else (BROKEN, "")
        )
    return found


def checked(text: str, style: Style, language: str) -> tuple[str, str]:
    """Status, and the text without what says nothing; "" where the status is not ok."""
    text = tidy(text)
    if not text:
        return EMPTY, ""
    if refuses(text):
        return REFUSED, ""
    text = without_opening(text)
    if "\ufffd" in text:  # stands for bytes that are no UTF-8: the model lost its way
        return GARBLED, ""
    if len(text) > style.most:
        return LONG, ""
    if loops(text):
        return REPEATS, ""
    if len(text) < style.least:
        return SHORT, ""
    if not speaks(text, language):
        return LANGUAGE, ""
    return OK, text


def tidy(text: str) -> str:
    """NFC, single spaces, and no characters that control or cannot be shown."""
    text = unicodedata.normalize("NFC", clean(text))
    kept = (" " if c.isspace() else c for c in text if c.isspace() or printed(c))
    text = re.sub(r" {2,}", " ", "".join(kept)).strip()
    inner = re.sub(r"\b'\b", "", text[1:-1])  # apostrophes are no quotes
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'`" and text[0] not in inner:
        text = text[1:-1].strip()
    return text


def without_opening(text: str) -> str:
    """The text without phrases such as "The image shows", and a capital where it now begins."""
    openings, _ = phrases()
    for _ in range(3):  # "In this image, we can see": one may hide another
        plain = text.casefold().replace("’", "'")
        if len(plain) != len(text):  # casefolding may lengthen: places would not agree
            return text
        found = next((o for o in openings if plain.startswith(o) and _ends(plain, len(o))), None)
        if found is None:
            return text
        rest = re.sub(r"\A[\s,:;，：、]*(that\b\s*|了)?", "", text[len(found) :])
        if not rest or rest[0] in ".。!?！？":
            return text
        text = rest[0].upper() + rest[1:]
    return text


def refuses(text: str) -> bool:
    """Whether a text begins as models decline."""
    begins = text[:200].casefold().replace("’", "'").lstrip("\"'`{ ")
    return any(begins.startswith(p) and _ends(begins, len(p)) for p in phrases()[1])


def loops(text: str) -> bool:
    """Whether the same words come again and again, as when a model does not find its end."""
    units = re.findall(r"[^\W\d_]{2,}|\w", _spaced(text.casefold()))
    for size in range(1, 33):
        times = 5 if size < 3 else 3  # "very, very, very" is speech
        run = 0
        for at in range(size, len(units)):
            run = run + 1 if units[at] == units[at - size] else 0
            if run >= size * (times - 1):
                return True
    grams = [tuple(units[at : at + 4]) for at in range(len(units) - 3)]
    if len(grams) >= 40 and len(set(grams)) < 0.5 * len(grams):
        return True
    return re.search(r"(\S)\1{15}", text) is not None


def speaks(text: str, language: str) -> bool:
    """Whether most of a text is in the script of a language (en, zh-Hans, …).

    A word of letters counts as much as one Chinese sign. Languages that share a script are not
    told apart.
    """
    wanted = SCRIPTS.get(language.split("-")[0].casefold(), ("LATIN",))
    mine = others = 0
    for word in re.findall(r"[^\W\d_]+", _spaced(text)):
        if unicodedata.name(word[0], "").startswith(wanted):
            mine += 1
        else:
            others += 1
    return mine > others


SCRIPTS: dict[str, tuple[str, ...]] = {
    "zh": ("CJK",),
    "ja": ("CJK", "HIRAGANA", "KATAKANA"),
    "ko": ("HANGUL", "CJK"),
    **dict.fromkeys(("ru", "uk", "bg", "sr", "be", "kk"), ("CYRILLIC",)),
    **dict.fromkeys(("ar", "fa", "ur"), ("ARABIC",)),
    "he": ("HEBREW",),
    "el": ("GREEK",),
    **dict.fromkeys(("hi", "mr", "ne"), ("DEVANAGARI",)),
    "bn": ("BENGALI",),
    "ta": ("TAMIL",),
    "th": ("THAI",),
}
"""Beginnings of the Unicode names of a language's letters; Latin for all others."""


@lru_cache(maxsize=1)
def phrases() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Openings, the longest first, and beginnings of refusals."""
    found = tomllib.loads((HERE / "phrases.toml").read_text(encoding="utf-8"))
    openings = sorted(found["openings"], key=len, reverse=True)
    return tuple(openings), tuple(found["refusals"])


def _object(text: str) -> dict[str, object] | None:
    """The one JSON object of an answer, perhaps within a code fence; None if there is none."""
    fenced = re.fullmatch(r"```(?:json)?\s*(.*?)\s*```", text, flags=re.DOTALL)
    try:
        value = json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _spaced(text: str) -> str:
    """Signs that are words by themselves, apart."""
    return re.sub(r"([\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff])", r" \1 ", text)


def _ends(text: str, at: int) -> bool:
    """Whether a word ends at `at`; Chinese has no spaces to tell."""
    before, after = text[at - 1], text[at : at + 1]
    return not (before.isascii() and before.isalpha() and after.isascii() and after.isalpha())


def reasons(found: Sequence[tuple[str, str]]) -> str:
    """What was wrong with an answer, first things first; "ok" if nothing was."""
    return next((status for status, _ in found if status != OK), OK)
