"""How good captions are: a model's against those that people gave for the same clips.

CIDEr-D   agreement in rare word sequences, 0 to 10, where 1 is good; Vedantam, arXiv 1411.5726
BLEU-4    precision of word sequences, 0 to 100; Papineni 2002, with the brevity penalty
ROUGE-L   longest common subsequence of words, recall counts more (beta 1.2), 0 to 100; Lin 2004
chrF      F2 of character sequences, 0 to 100; Popović 2015. The one that needs no words.

CIDEr-D and ROUGE-L come from `pycocoevalcap`, the code that published figures are made with, and
BLEU and chrF from `sacrebleu`. METEOR and SPICE need Java or a download, and are left out. Java is
also what splits words there; here `sacrebleu` does (13a; Chinese character by character), so that
CIDEr-D and ROUGE-L may differ in the last digits from figures behind Stanford's tokenizer.

For small classes (colours, shapes) the exact words are compared besides: see `naming`.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from unimodal.pipeline.captioning.answers import OK, speaks
from unimodal.pipeline.errors import UsageError
from unimodal.pipeline.fetch import local
from unimodal.pipeline.tables import PATHS, absolute, read_rows

METRICS = ("cider_d", "bleu_4", "rouge_l", "chrf")
SPOKEN = "subtitle"
"""Style of captions that say what is heard; they are no reference for what is seen."""

Words = Mapping[str, Mapping[str, str]]
"""By class, what each way of writing a word stands for."""


@dataclass(frozen=True)
class Pair:
    """What a model says of a clip, and what people say of it."""

    uid: str
    said: str
    references: tuple[str, ...]


@dataclass(frozen=True)
class Named:
    """How often captions name the same words of a class as their references."""

    right: int
    n: int  # captions whose references name any word of the class
    share: float | None
    low: float | None  # Wilson's 95 % interval
    high: float | None
    by_chance: float | None  # the same share if captions were dealt out among the clips


def pairs_in(
    clips: pa.Table, given: Mapping[str, Sequence[str]] | None = None
) -> dict[tuple[str, str, str], list[Pair]]:
    """What there is to compare: by model, language and style.

    `clips` has uid, verdict and captions; `given` are references by uid, otherwise the captions
    that people gave count. Only kept clips are taken, and references in the model's language (by
    their script where none is written). A clip described in pieces is one text, in order of time.
    """
    found: dict[tuple[str, str, str], list[Pair]] = {}
    for row in clips.select(["uid", "verdict", "captions"]).to_pylist():
        if row["verdict"] != "keep":
            continue
        said: dict[tuple[str, str, str], list[str]] = {}
        people: list[tuple[str, str | None]] = []
        for one in row["captions"] or []:
            if one["status"] != OK or not one["text"]:
                continue
            if one["model"]:
                key = one["model"], one["lang"] or "en", one["style"]
                said.setdefault(key, []).append(one["text"])
            elif one["style"] != SPOKEN:
                people.append((one["text"], one["lang"]))
        if given is not None:
            people = [(text, None) for text in given.get(row["uid"], ())]
        for key, texts in said.items():
            theirs = tuple(text for text, lang in people if _same_language(text, lang, key[1]))
            if theirs:
                found.setdefault(key, []).append(Pair(row["uid"], " ".join(texts), theirs))
    return found


def references_in(table: str, clips: pa.Table) -> dict[str, list[str]]:
    """Captions by uid from a table of captions and paths, or uids (in a column `uid`).

    A path speaks of all clips of that source. `clips` has uid and uri. Raises `UsageError`, also
    if no row is about any of the clips.
    """
    uids = set(clips.column("uid").to_pylist())
    of_source: dict[str, list[str]] = {}
    for row in clips.select(["uid", "uri"]).to_pylist():
        of_source.setdefault(row["uri"], []).append(row["uid"])
    found: dict[str, list[str]] = {}
    rows = 0
    base = table.rpartition("/")[0]
    with local(table) as path:
        for one in read_rows(path, table, captions=True, paths=("uid", *PATHS)):
            rows += 1
            about = [one.path] if one.path in uids else of_source.get(absolute(one.path, base), ())
            for uid in about:
                found.setdefault(uid, []).extend(one.texts)
    if not found:
        raise UsageError(
            f"{table}: none of its {rows} rows is about a clip of this run: name a clip's uid, or "
            "the path of its source"
        )
    return found


def scores(pairs: Sequence[Pair], language: str) -> dict[str, float | None]:
    """The figures of `METRICS`; raises `UsageError` if the libraries are missing.

    CIDEr-D weighs by how rare words are among these references: of one clip alone there is none.
    """
    try:
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.rouge.rouge import Rouge
        from sacrebleu.metrics.bleu import BLEU
        from sacrebleu.metrics.chrf import CHRF
    except ImportError as error:
        raise UsageError(f"--eval needs {error.name}: pip install 'unimodal[eval]'") from error
    said = [pair.said for pair in pairs]
    most = max(len(pair.references) for pair in pairs)
    # Streams as sacrebleu wants them: the i-th reference of each clip, None where there is none.
    streams: list[list[str | None]] = [
        [pair.references[i] if i < len(pair.references) else None for pair in pairs]
        for i in range(most)
    ]
    split = "zh" if _chinese(language) else "13a"
    bleu = BLEU(lowercase=True, tokenize=split).corpus_score(said, streams)  # type: ignore[arg-type]
    chrf = CHRF(lowercase=True).corpus_score(said, streams)  # type: ignore[arg-type]
    ours = {pair.uid: [words(pair.said, language)] for pair in pairs}
    theirs = {pair.uid: [words(text, language) for text in pair.references] for pair in pairs}
    cider = Cider().compute_score(theirs, ours)[0] if len(pairs) > 1 else None
    rouge = 100 * Rouge().compute_score(theirs, ours)[0]
    found = (cider, bleu.score, rouge, chrf.score)
    return {
        name: None if value is None else round(float(value), 4)
        for name, value in zip(METRICS, found, strict=True)
    }


def words(text: str, language: str) -> str:
    """A caption's words, small and without punctuation, with a space between each two."""
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a
    from sacrebleu.tokenizers.tokenizer_zh import TokenizerZh

    split = (TokenizerZh() if _chinese(language) else Tokenizer13a())(text.lower()).split()
    return " ".join(word for word in split if any(c.isalnum() for c in word))


def load_words(path: Path) -> dict[str, dict[str, str]]:
    """Classes of words from a TOML file; raises `UsageError` with all that is wrong.

    colour = ["red", "blue"]                          # each word stands for itself
    shape = { circle = ["circle", "disc", "圆"] }     # or is written in several ways
    """
    try:
        file = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not TOML: {error}") from error
    found: dict[str, dict[str, str]] = {}
    problems = []
    for name, entry in file.items():
        forms = entry if isinstance(entry, dict) else None
        if isinstance(entry, list):
            forms = {word: [word] for word in entry if isinstance(word, str)}
            forms = forms if len(forms) == len(entry) else None
        if not forms or not all(_texts(written) for written in forms.values()):
            problems.append(f"{name} is no list of words, as {name} = ['red', 'blue']")
            continue
        found[name] = {form.casefold(): word for word, all_ in forms.items() for form in all_}
    if not file:
        problems.append("it has no class of words, as colour = ['red', 'blue']")
    if problems:
        raise UsageError(f"{path}: {'; '.join(problems)}")
    return found


def naming(pairs: Sequence[Pair], forms: Mapping[str, str]) -> Named:
    """How often captions name the words of a class that a reference names, no less and no more.

    Whole words are looked for, in any case of letters; in Chinese, and wherever else words have no
    spaces between them, the longest that fits.
    """
    pattern = _pattern(forms)
    truths, said = [], []
    for pair in pairs:
        of_people = {_named(text, pattern, forms) for text in pair.references} - {frozenset()}
        if of_people:
            truths.append(of_people)
            said.append(_named(pair.said, pattern, forms))
    n = len(said)
    if not n:
        return Named(0, 0, None, None, None, None)
    right = sum(found in truth for found, truth in zip(said, truths, strict=True))
    often = Counter(said)
    chance = sum(often[found] for truth in truths for found in truth) / n**2
    low, high = wilson(right, n)
    return Named(right, n, right / n, low, high, chance)


def named(text: str, forms: Mapping[str, str]) -> frozenset[str]:
    """The words of a class that a text names."""
    return _named(text, _pattern(forms), forms)


def wilson(right: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's interval of a share, of 95 % by default (E. B. Wilson, JASA 1927)."""
    share = right / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, middle - half), min(1.0, middle + half)


def compared(
    clips: pa.Table,
    given: Mapping[str, Sequence[str]] | None = None,
    classes: Words | None = None,
) -> list[dict[str, Any]]:
    """One record for each model, language and style: how many, the figures, and classes of words.

    Raises `UsageError` if there is nothing to compare, or a library is missing.
    """
    found = []
    for (model, language, style), pairs in sorted(pairs_in(clips, given).items()):
        record: dict[str, Any] = {"model": model, "language": language, "style": style}
        record["n"] = len(pairs)
        record["references"] = sum(len(pair.references) for pair in pairs)
        record |= scores(pairs, language)
        if classes is not None:
            record["words"] = {name: asdict(naming(pairs, classes[name])) for name in classes}
        found.append(record)
    if not found:
        raise UsageError(
            "there is nothing to compare: no kept clip has both a model's caption and one that "
            "people gave in the same language (--references FILE gives some)"
        )
    return found


def _same_language(text: str, written: str | None, wanted: str) -> bool:
    if written:
        return written.split("-")[0].casefold() == wanted.split("-")[0].casefold()
    return speaks(text, wanted)


def _chinese(language: str) -> bool:
    return language.split("-")[0].casefold() == "zh"


def _texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, str) and v for v in value)


def _pattern(forms: Iterable[str]) -> re.Pattern[str]:
    """Finds any of some words, the longest first; letters beside one that has spaces count."""
    alphabetic = r"(?<![^\W_]){}(?![^\W_])"
    each = [
        re.escape(form) if _unspaced(form) else alphabetic.format(re.escape(form))
        for form in sorted(forms, key=len, reverse=True)
    ]
    return re.compile("|".join(each))


def _unspaced(word: str) -> bool:
    return re.search(r"[\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]", word) is not None


def _named(text: str, pattern: re.Pattern[str], forms: Mapping[str, str]) -> frozenset[str]:
    return frozenset(forms[found] for found in pattern.findall(text.casefold()))
