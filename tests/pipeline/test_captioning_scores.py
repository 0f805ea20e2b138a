"""Captions against references: the libraries' figures against an independent computation."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.pipeline.answering import answering
from unimodal.pipeline.captioning.scores import (
    Pair,
    compared,
    load_words,
    naming,
    pairs_in,
    references_in,
    scores,
    wilson,
    words,
)
from unimodal.pipeline.clips import CLIPS
from unimodal.pipeline.errors import UsageError

ENGLISH = [
    Pair("a", "A red circle on white.", ("a red circle on a white ground", "one red disc")),
    Pair("b", "A blue square.", ("A green square, small.",)),
    Pair("c", "The dog runs on the grass", ("the dog is running on the grass", "A dog runs.")),
    Pair("d", "nothing like it", ("two boats in a harbour",)),
]
CHINESE = [
    Pair("a", "白色背景上的红色圆形。", ("白色背景上有一个红色的圆",)),
    Pair("b", "一只狗在草地上跑", ("一只狗在草地上奔跑", "草地上的狗")),
    Pair("c", "蓝色的方块", ("蓝色方块", "一个方块")),
]


def cider_d(pairs: Sequence[Sequence[Any]]) -> float:
    """CIDEr-D of (words, references as words), as the paper defines it, times ten."""

    def grams(said: list[str], size: int) -> Counter[tuple[str, ...]]:
        return Counter(tuple(said[i : i + size]) for i in range(len(said) - size + 1))

    total = 0.0
    for said, references in pairs:
        for size in (1, 2, 3, 4):
            seen: Counter[tuple[str, ...]] = Counter()
            for _, others in pairs:
                seen.update({gram for other in others for gram in grams(other, size)})

            def weights(
                text: list[str], size: int = size, seen: Counter[Any] = seen
            ) -> dict[Any, float]:
                rare = math.log(len(pairs))
                return {
                    gram: count * (rare - math.log(max(1, seen[gram])))
                    for gram, count in grams(text, size).items()
                }

            mine = weights(said)
            for other in references:
                theirs = weights(other)
                dot = sum(min(w, theirs.get(g, 0)) * theirs.get(g, 0) for g, w in mine.items())
                norms = math.hypot(*mine.values()) * math.hypot(*theirs.values())
                # The length is that of bigrams, as in the reference code.
                apart = max(0, len(said) - 1) - max(0, len(other) - 1)
                near = math.exp(-(apart**2) / (2 * 6.0**2))
                total += 10 * near * (dot / norms if norms else 0) / (4 * len(references))
    return total / len(pairs)


def rouge_l(said: list[str], references: list[list[str]]) -> float:
    def common(a: Sequence[str], b: Sequence[str]) -> int:
        if not a or not b:
            return 0
        if a[0] == b[0]:
            return 1 + common(a[1:], b[1:])
        return max(common(a[1:], b), common(a, b[1:]))

    lengths = [common(said, other) for other in references]
    precision = max(n / len(said) for n in lengths)
    recall = max(n / len(other) for n, other in zip(lengths, references, strict=True))
    if not precision or not recall:
        return 0.0
    return 100 * (1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision)


class TestLibraries:
    @pytest.fixture(autouse=True)
    def _there(self) -> None:
        pytest.importorskip("sacrebleu", reason="needs the eval extra")
        pytest.importorskip("pycocoevalcap", reason="needs the eval extra")

    @pytest.mark.parametrize(("pairs", "language"), [(ENGLISH, "en"), (CHINESE, "zh-Hans")])
    def test_cider_and_rouge_are_what_their_papers_say(
        self, pairs: list[Pair], language: str
    ) -> None:
        split = [
            (words(p.said, language).split(), [words(r, language).split() for r in p.references])
            for p in pairs
        ]
        found = scores(pairs, language)
        assert found["cider_d"] == pytest.approx(cider_d(split), abs=1e-4)
        assert 0.5 < (found["cider_d"] or 0) < 9
        rouge = sum(rouge_l(*one) for one in split) / len(split)
        assert found["rouge_l"] == pytest.approx(rouge, abs=1e-4)

    def test_bleu_and_chrf_are_those_that_sacrebleu_publishes(self) -> None:
        said = ("The dog bit the man.", "It wasn't surprising.", "The man had just bitten him.")
        first = ("The dog bit the man.", "It was not unexpected.", "The man bit him first.")
        second = (
            "The dog had bit the man.",
            "No one was surprised.",
            "The man had bitten the dog.",
        )
        rows = enumerate(zip(said, first, second, strict=True))
        found = scores([Pair(str(i), a, (b, c)) for i, (a, b, c) in rows], "en")
        assert found["bleu_4"] == pytest.approx(48.53, abs=0.01)
        assert found["chrf"] == pytest.approx(59.73, abs=0.4)  # theirs minds capitals

    def test_copies_score_highest_and_clips_may_differ_in_how_many_references_they_have(
        self,
    ) -> None:
        copies = [Pair(p.uid, p.references[0], p.references) for p in ENGLISH]
        found = scores(copies, "en")
        assert found["bleu_4"] == pytest.approx(100) and found["rouge_l"] == pytest.approx(100)
        assert found["chrf"] == pytest.approx(100)
        alone = [Pair(p.uid, p.references[0], p.references[:1]) for p in ENGLISH]
        assert scores(alone, "en")["cider_d"] == pytest.approx(10)
        assert scores(alone[:1], "en")["cider_d"] is None  # no word is rarer than another

    def test_chinese_is_split_into_characters_and_english_into_words(self) -> None:
        assert words("白色背景上的红色圆形。OK？", "zh") == "白 色 背 景 上 的 红 色 圆 形 ok"
        assert words("It's a Dog, isn't it?", "en") == "it's a dog isn't it"


def test_only_exact_words_count_and_chance_is_told() -> None:
    forms = {"red": "red", "crimson": "red", "blue": "blue", "green": "green"}
    pairs = [
        Pair("a", "A crimson circle.", ("a RED disc",)),
        Pair("b", "Red and blue.", ("blue", "green and blue")),
        Pair("c", "It was bored, reddish.", ("green",)),
        Pair("d", "green", ("no colour", "a green thing")),
        Pair("e", "blue", ("nothing is named",)),
    ]
    found = naming(pairs, forms)
    assert (found.right, found.n, found.share) == (2, 4, 0.5)
    # Of 16 ways to deal out, captions {red}, {red, blue}, {}, {green} fit so many references:
    assert found.by_chance == pytest.approx((1 + 0 + 1 + 1) / 16)
    assert (found.low, found.high) == pytest.approx(wilson(2, 4))
    # As scipy.stats.binomtest(2, 4).proportion_ci(method="wilson") has it.
    assert wilson(2, 4) == pytest.approx((0.15003899, 0.84996101), abs=1e-6)
    assert naming(pairs[-1:], forms).share is None


def test_chinese_words_are_found_without_spaces_and_the_longest_counts() -> None:
    forms = {"红": "red", "粉红": "pink", "圆": "circle"}
    pairs = [Pair("a", "一个粉红的圆", ("粉红的圆",)), Pair("b", "红的圆", ("粉红圆",))]
    assert naming(pairs, forms).right == 1


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("colour = 'red'", "colour is no list of words"),
        ("colour = []", "colour is no list of words"),
        ("colour = ['red', 1]", "colour is no list of words"),
        ("a = {b = 'c'}\nd = 3", "a is no list of words, as a = ['red', 'blue']; d is no list"),
        ("", "has no class"),
        ("colour = [", "is not TOML"),
    ],
)
def test_files_of_words_say_what_is_wrong_with_them(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "words.toml"
    file.write_text(text)
    with pytest.raises(UsageError) as caught:
        load_words(file)
    assert says in str(caught.value) and str(file) in str(caught.value)


def _caption(text: str, model: str | None = None, style: str = "short", **more: Any) -> Any:
    found = {"text": text, "style": style, "lang": "en" if model else None, "model": model}
    return {**found, "status": "ok", **more}


def _clips(*rows: dict[str, Any]) -> Any:
    names = ("uid", "uri", "verdict", "captions")
    schema = pa.schema([CLIPS.field(n) if n in CLIPS.names else (n, pa.string()) for n in names])
    return pa.Table.from_pylist(list(rows), schema=schema)


def test_a_models_captions_meet_those_of_people_in_the_same_language() -> None:
    texts = [
        _caption("a red kite", "m"),
        _caption("the red kite flies", "m", style="dense", start_s=0.0, end_s=9.0),
        _caption("and falls", "m", style="dense", start_s=9.0, end_s=18.0),
        _caption("一只红色的风筝", "m", lang="zh"),
        _caption("a kite"),
        _caption("红色的风筝"),
        _caption("un cerf-volant", lang="fr"),
        _caption("what is heard", style="subtitle"),
    ]
    failed = {**_caption("x", "m"), "text": None, "status": "refused"}
    clips = _clips(
        {"uid": "1", "uri": "a", "verdict": "keep", "captions": texts},
        {"uid": "2", "uri": "b", "verdict": "drop", "captions": texts},
        {"uid": "3", "uri": "c", "verdict": "keep", "captions": [failed, _caption("a dog")]},
        {"uid": "4", "uri": "d", "verdict": "keep", "captions": [_caption("no one says", "m")]},
    )
    assert pairs_in(clips) == {
        ("m", "en", "short"): [Pair("1", "a red kite", ("a kite",))],
        ("m", "en", "dense"): [Pair("1", "the red kite flies and falls", ("a kite",))],
        ("m", "zh", "short"): [Pair("1", "一只红色的风筝", ("红色的风筝",))],
    }
    given = {"4": ["somebody did"]}
    assert pairs_in(clips, given) == {
        ("m", "en", "short"): [Pair("4", "no one says", ("somebody did",))]
    }


def test_references_are_named_by_path_or_uid(tmp_path: Path) -> None:
    uris = [str(tmp_path / name) for name in ("a.mp4", "b.png")]
    clips = _clips(
        {"uid": "u1", "uri": uris[0], "verdict": "keep", "captions": []},
        {"uid": "u2", "uri": uris[0], "verdict": "keep", "captions": []},
        {"uid": "u3", "uri": uris[1], "verdict": "keep", "captions": []},
    )
    by_path = tmp_path / "paths.jsonl"
    rows = [{"path": uris[0], "captions": ["one", "two"]}, {"path": "elsewhere.png", "text": "x"}]
    by_path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert references_in(str(by_path), clips) == {"u1": ["one", "two"], "u2": ["one", "two"]}
    by_uid = tmp_path / "uids.csv"
    by_uid.write_text("uid,caption\nu3,three\nu1,one\n")
    assert references_in(str(by_uid), clips) == {"u3": ["three"], "u1": ["one"]}
    parquet = tmp_path / "uids.parquet"
    pq.write_table(pa.table({"uid": ["u2"], "captions": [["two", "2"]]}), parquet)
    assert references_in(str(parquet), clips) == {"u2": ["two", "2"]}
    by_uid.write_text("uid,caption\nu9,three\n")
    with pytest.raises(UsageError, match="none of its 1 rows is about a clip"):
        references_in(str(by_uid), clips)


def test_nothing_to_compare_is_said() -> None:
    clips = _clips({"uid": "1", "uri": "a", "verdict": "keep", "captions": [_caption("b", "m")]})
    with pytest.raises(UsageError, match="nothing to compare"):
        compared(clips)


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory, emoji: list[Path]) -> Path:
    """A run whose pictures have captions of people, and of a server."""
    from unimodal.pipeline.presets import CurateSettings
    from unimodal.pipeline.run import curate
    from unimodal.pipeline.settings import build

    folder = tmp_path_factory.mktemp("media")
    for path in emoji[:4]:
        shutil.copy(path, folder)
        (folder / f"{path.stem}.txt").write_text("The short words are amber and red")
    skip = 'skip=["text", "quality", "embed", "nsfw", "dedup", "match"]'
    with answering() as server:
        sets = [skip, "decide.image_min_area=0", f"caption.url={server.url}", "caption.model=m"]
        settings = build(CurateSettings, sets=[*sets, "caption.source=endpoint"])
        out = folder.parent / "run"
        return curate([folder], out, settings, engine="inline").path


def _eval(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int, str, str]:
    from unimodal.cli.app import main

    monkeypatch.setattr(sys, "argv", ["unimodal", "caption", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    told = capsys.readouterr()
    return int(ended.value.code or 0), told.out, told.err


def test_the_command_compares_and_asks_nobody(
    described: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("sacrebleu", reason="needs the eval extra")
    pytest.importorskip("pycocoevalcap", reason="needs the eval extra")
    classes = tmp_path / "words.toml"
    classes.write_text("colour = ['amber', 'red']")
    asked = (str(described), "--eval", f"--words={classes}")
    code, out, _ = _eval(monkeypatch, capsys, *asked, "--json")
    by_style = {one["style"]: one for one in json.loads(out)["scores"]}
    assert code == 0 and set(by_style) == {"short", "dense", "style"}
    short = by_style["short"]
    assert (short["model"], short["language"], short["n"], short["references"]) == ("m", "en", 4, 4)
    assert short["bleu_4"] > by_style["dense"]["bleu_4"] > 0
    assert short["words"]["colour"]["n"] == 4 and short["words"]["colour"]["right"] == 0
    code, out, _ = _eval(monkeypatch, capsys, *asked)
    assert code == 0 and "CIDEr-D" in out and f"{short['bleu_4']:.3f}" in out and "colour" in out


def test_a_missing_library_and_mistaken_options_are_one_line(
    described: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("sacrebleu.metrics.bleu", "pycocoevalcap.cider.cider"):
        monkeypatch.setitem(sys.modules, name, None)
    code, _, told = _eval(monkeypatch, capsys, str(described), "--eval")
    assert code == 2 and "pip install 'unimodal[eval]'" in told and told.count("\n") == 1
    code, _, told = _eval(monkeypatch, capsys, str(described), "--words=w.toml")
    assert code == 2 and "are for --eval" in told
    code, _, told = _eval(monkeypatch, capsys, "--eval")
    assert code == 2 and "name one" in told
