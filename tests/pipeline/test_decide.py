"""Rules: what they drop, why, and what they cannot do."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from unimodal.pipeline.clips import CLIPS, WATCH, table, write_parquet
from unimodal.pipeline.decide import (
    DEDUP,
    RULES,
    DecideSettings,
    decide,
    rules,
    what_if,
)
from unimodal.pipeline.errors import UsageError
from unimodal.pipeline.judged import advice, in_words, judge
from unimodal.pipeline.presets import PRESETS, CurateSettings
from unimodal.pipeline.settings import build

SCORED = pa.schema([field for field in CLIPS if field.name not in ("verdict", "reasons")])


def _clips(*rows: dict[str, Any], schema: pa.Schema = SCORED) -> pa.Table:
    base = {"part": "p", "uri": "/x", "source_sha256": "s", "width": 640, "height": 480}
    return table(({**base, "uid": str(i), **row} for i, row in enumerate(rows)), schema)


def _verdicts(settings: DecideSettings, *rows: dict[str, Any]) -> list[tuple[str, list[str]]]:
    found = decide(_clips(*rows), settings).to_pylist()
    assert [row["uid"] for row in found] == [str(i) for i in range(len(rows))]
    return [(row["verdict"], row["reasons"]) for row in found]


GOOD = {"kind": "video", "duration_s": 5.0, "flow_mean": 0.02, "luma_mean": 100.0}


def test_a_reason_names_stage_score_and_threshold() -> None:
    (keep, none), (drop, why) = _verdicts(
        DecideSettings(), GOOD, {**GOOD, "flow_mean": 0.001, "duration_s": 1.25}
    )
    assert (keep, none) == ("keep", [])
    assert drop == "drop"
    assert why == [
        "cut:duration_s=1.25:round(duration_s, 2) >= 2.0",
        "flow:flow_mean=0.001:flow_mean >= 0.003",
    ]


def test_null_never_drops() -> None:
    bare = {"kind": "video"}
    assert _verdicts(DecideSettings(blur_min=100), bare) == [("keep", [])]


def test_a_rule_speaks_of_its_own_kind_only() -> None:
    picture = {"kind": "image", "width": 600, "height": 600, "luma_mean": 254.0}
    assert _verdicts(DecideSettings(), picture) == [("keep", [])]
    tiny_video = {**GOOD, "width": 300, "height": 300}
    assert _verdicts(DecideSettings(), tiny_video) == [("keep", [])]


def test_small_images_pass_when_the_setting_says_so() -> None:
    emoji = {"kind": "image", "width": 72, "height": 72}
    ((drop, why),) = _verdicts(DecideSettings(), emoji)
    assert drop == "drop"
    assert why == ["source:width * height=5184:width * height >= 262144"]
    for value in ("0", "none"):
        settings = build(CurateSettings, sets=[f"decide.image_min_area={value}"]).decide
        assert _verdicts(settings, emoji) == [("keep", [])]


def test_presets_differ_where_the_papers_do() -> None:
    emu3 = build(CurateSettings, PRESETS["emu3"]).decide
    slow = {**GOOD, "duration_s": 6.0}
    fast = {**GOOD, "duration_s": 6.0, "flow_mean": 0.3}
    assert [v for v, _ in _verdicts(emu3, slow, fast)] == ["drop", "keep"]
    assert [v for v, _ in _verdicts(DecideSettings(), slow, fast)] == ["keep", "drop"]
    assert [v for v, _ in _verdicts(emu3, {**fast, "duration_s": 4.9})] == ["drop"]


def test_a_user_can_add_rules() -> None:
    settings = DecideSettings(extra=("video: flow_p90 < 0.2", "any: uri NOT LIKE '%secret%'"))
    rows = [
        {**GOOD, "flow_p90": 0.3},
        {**GOOD, "uri": "/secret/x"},
        {"kind": "image", "width": 900},
    ]
    verdicts = _verdicts(settings, *rows)
    assert [v for v, _ in verdicts] == ["drop", "drop", "keep"]
    assert verdicts[0][1] == ["extra::flow_p90 < 0.2"]


@pytest.mark.parametrize(
    "rule", ["blur > 3", "audio: blur > 3", "video: nonsense > 3", "video: ", "video: blur >"]
)
def test_a_rule_that_does_not_evaluate_is_named(rule: str) -> None:
    with pytest.raises(UsageError, match=r"decide\.extra"):
        decide(_clips(GOOD), DecideSettings(extra=(rule,)))


def test_a_rule_reaches_no_file() -> None:
    for source in ("read_text('/etc/hostname')", "read_csv('/etc/passwd')"):
        rule = f"any: 1 < (SELECT count(*) FROM {source})"
        with pytest.raises(UsageError, match=r"decide\.extra"):
            decide(_clips(GOOD), DecideSettings(extra=(rule,)))


def test_every_threshold_belongs_to_a_rule() -> None:
    spoken = {name for rule in RULES for name in re.findall(r"\$(\w+)", rule.keep)}
    assert spoken == set(DecideSettings.model_fields) - {"extra", "dedup"}
    assert len(rules(DecideSettings())) < len(RULES)  # those without a threshold are off


def test_columns_that_no_stage_has_measured_yet_drop_nothing() -> None:
    rows = _clips(GOOD, {"kind": "image", "width": 900, "height": 900}, schema=WATCH)
    assert decide(rows, DecideSettings()).column("verdict").to_pylist() == ["keep", "keep"]
    assert decide(SCORED.empty_table(), DecideSettings()).num_rows == 0


@pytest.mark.parametrize(
    ("score", "keep", "drop"),
    [
        ("text_area_mean", 0.05, 0.051),
        ("text_area_p90", 0.15, 0.151),
        ("text_track_s", 0.5, 1.0),
        ("text_corner", 0.5, 0.75),
        ("aesthetic", 5.0, 4.99),
        ("nsfw", 0.5, 0.51),
    ],
)
def test_each_score_of_a_video_has_a_bound(score: str, keep: float, drop: float) -> None:
    settings = DecideSettings()
    (kept, _), (dropped, (reason,)) = _verdicts(
        settings, {**GOOD, score: keep}, {**GOOD, score: drop}
    )
    assert (kept, dropped) == ("keep", "drop")
    assert reason.split(":")[1] == f"{score}={drop:g}"
    name = next(r for r in rules(settings) if r.score == score and r.kind != "image").settings[0]
    off = build(CurateSettings, sets=[f"decide.{name}=none"]).decide
    assert _verdicts(off, {**GOOD, score: drop}) == [("keep", [])]


def test_a_plain_image_below_the_aesthetic_bound_is_rescued_on_evidence_only() -> None:
    picture = {"kind": "image", "width": 900, "height": 900}
    colorful, empty = {"colorfulness": 40.0}, {"text_area_mean": 0.0}
    cases = {
        "good": {"aesthetic": 5.5},
        "not measured": {},
        "rescued": {"aesthetic": 3.0, **colorful, **empty},
        "monochrome": {"aesthetic": 3.0, "colorfulness": 2.0, **empty},
        "a page of text": {"aesthetic": 3.0, **colorful, "text_area_mean": 0.4},
        "text not measured": {"aesthetic": 3.0, **colorful},
        "color not measured": {"aesthetic": 3.0, **empty},
    }

    def kept(settings: DecideSettings) -> set[str]:
        found = _verdicts(settings, *({**picture, **case} for case in cases.values()))
        return {name for name, (verdict, _) in zip(cases, found, strict=True) if verdict == "keep"}

    assert kept(DecideSettings()) == {"good", "not measured", "rescued"}
    assert kept(DecideSettings(rescue_text=None)) == {"good", "not measured"}
    assert kept(DecideSettings(rescue_colorfulness=None)) == {"good", "not measured"}
    assert kept(DecideSettings(image_aesthetic_min=None)) == set(cases)
    ((_, why),) = _verdicts(DecideSettings(), {**picture, **cases["monochrome"]})
    assert why == [
        "embed:aesthetic=3:aesthetic >= 5.5 OR (aesthetic IS NOT NULL AND "
        "coalesce(colorfulness >= 15.0 AND text_area_mean <= 0.05, false))"
    ]


def test_of_a_group_the_best_that_passes_all_else_is_kept() -> None:
    def member(group: str | None, rank: int | None, **scores: float) -> dict[str, Any]:
        return {**GOOD, "dup_group": group, "dup_rank": rank, **scores}

    rows = [
        member("a", 2),
        member("a", 0, flow_mean=0.5),  # the best, but thrown about
        member("a", 1),
        member("b", 0, flow_mean=0.5),
        member("b", 1, flow_mean=0.5),
        member(None, None),
        member("c", 0),
        member("c", 1, flow_mean=0.5),
    ]
    flow = "flow:flow_mean=0.5:flow_mean <= 0.1"
    copy = "dedup:dup_rank={}:dup_rank <= best_kept_rank"
    found = _verdicts(DecideSettings(), *rows)
    assert found == [
        ("drop", [copy.format(2)]),
        ("drop", [flow]),
        ("keep", []),
        ("drop", [flow]),  # nothing of b passes: its copies are not what it is dropped for
        ("drop", [flow]),
        ("keep", []),
        ("keep", []),
        ("drop", [flow, copy.format(1)]),
    ]
    tolerant = _verdicts(DecideSettings(flow_max=None), *rows)
    assert [v for v, _ in tolerant] == ["drop", "keep", "drop", "keep", "drop"] + ["keep"] * 2 + [
        "drop"
    ]
    alone = _verdicts(DecideSettings(dedup=False, flow_max=None), *rows)
    assert {v for v, _ in alone} == {"keep"}


def test_verdicts_do_not_depend_on_chunks_and_give_equal_bytes(tmp_path: Path) -> None:
    rows = [{**GOOD, "flow_mean": i / 100, "blur": 3.0 * i} for i in range(50)]
    settings = DecideSettings(blur_min=60.0, dedup=False)
    whole = _clips(*rows)
    pieces = pa.concat_tables([whole.slice(i, 7) for i in range(0, 50, 7)])
    for name, clips in (("a", whole), ("b", pieces)):
        write_parquet(decide(clips, settings), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    found = decide(whole, settings).to_pylist()
    expected = [
        [
            *([f"flow:flow_mean={i / 100:.6g}:flow_mean >= 0.003"] if i / 100 < 0.003 else []),
            *([f"flow:flow_mean={i / 100:.6g}:flow_mean <= 0.1"] if i / 100 > 0.1 else []),
            *([f"light:blur={3.0 * i:.6g}:blur >= 60.0"] if 3 * i < 60 else []),
        ]
        for i in range(50)
    ]
    assert [row["reasons"] for row in found] == expected


def test_a_rule_of_the_users_that_fails_on_a_row_is_named() -> None:
    rule = "any: uri::INT > 3"
    with pytest.raises(UsageError, match=r"decide\.extra \"uri::INT > 3\""):
        decide(_clips(GOOD), DecideSettings(extra=("any: blur > 3", rule)))
    # Dollars and colons in it are its own.
    odd = DecideSettings(extra=("any: uri::TEXT NOT SIMILAR TO '.*$flow_min:x'",))
    assert _verdicts(odd, GOOD) == [("keep", [])]


def test_every_rule_counts_the_clips_that_it_speaks_of_judges_and_drops() -> None:
    rows = [
        GOOD,
        {**GOOD, "flow_mean": 0.5},
        {**GOOD, "flow_mean": 0.5, "luma_mean": 3.0},
        {**GOOD, "luma_mean": None},
        {"kind": "image", "width": 900, "height": 900, "luma_mean": 3.0},
    ]
    clips = _clips(*rows)
    found = {one.keep: one for one in judge(clips, DecideSettings())}
    fast, dark = found["flow_mean <= 0.1"], found["luma_mean >= 16.0"]
    assert (fast.speaks.sum(), fast.judged, fast.dropped) == (4, 4, 2)
    assert (dark.speaks.sum(), dark.judged, dark.dropped) == (4, 3, 1)
    assert np.nanmedian(fast.values) == pytest.approx((0.02 + 0.5) / 2)
    assert fast.rule.settings == ("flow_max",)
    nsfw = found["nsfw <= 0.5"]
    assert (nsfw.speaks.sum(), nsfw.judged, nsfw.dropped) == (5, 0, 0)
    assert np.isnan(nsfw.values).all()
    # The same counts come out of the verdicts.
    reasons = [r for row in decide(clips, DecideSettings()).to_pylist() for r in row["reasons"]]
    assert sum(one.dropped for one in found.values()) == len(reasons)
    for one in found.values():
        assert one.drops.shape == one.passes.shape == one.speaks.shape == (len(rows),)
        assert not (one.drops | one.passes)[~one.speaks].any()
    assert list(found.values())[-1].rule == DEDUP


@pytest.mark.parametrize(
    ("rule", "fails"),
    [
        ("any: colorfulness > 5", "colorfulness <= 5"),
        ("video: flow_mean <= 0.1", "flow_mean > 0.1"),
        ("any: blur >= 3 OR quality < 1", "not (blur >= 3 OR quality < 1)"),
    ],
)
def test_what_is_true_of_what_a_rule_drops(rule: str, fails: str) -> None:
    (*_, mine) = judge(_clips(GOOD), DecideSettings(extra=(rule,), dedup=False))
    assert mine.fails == fails and mine.named == "decide.extra"


def test_reasons_are_told_in_words() -> None:
    told = in_words("flow:flow_mean=0.0011:flow_mean >= 0.003")
    assert told == "flow_mean is 0.0011; kept if flow_mean >= 0.003"
    assert in_words("dedup:dup_rank=1:dup_rank <= 0") == "a better near-duplicate is kept"
    assert in_words("extra::blur > 3") == "kept if blur > 3"


def _advice(clips: pa.Table, settings: DecideSettings) -> list[str]:
    return advice(judge(clips, settings), settings)


def test_advice_speaks_of_rules_that_drop_most_or_nothing() -> None:
    slow = [{**GOOD, "flow_mean": 0.0001 * i} for i in range(1, 81)]
    fine = [{**GOOD, "luma_mean": None} for _ in range(20)]
    said = _advice(_clips(*slow, *fine), DecideSettings(flow_min=0.008))
    assert said[0] == (
        "decide.flow_min=0.008 drops 79 % of 100 videos: their median of flow_mean is 0.00505"
    )
    (idle,) = [line for line in said if line.startswith("no clip is dropped by ")]
    assert "luma_min" in idle
    assert "flow_min" not in idle
    assert "aesthetic" not in idle  # it was not measured: the rule had nothing to judge
    assert not any("%" in line for line in said[1:])
    quiet = _advice(_clips(*slow, *fine), DecideSettings(flow_min=0.005))
    assert not any("%" in line for line in quiet)  # 49 of 100
    mine = _advice(_clips(*slow), DecideSettings(extra=("any: flow_mean > 1",)))
    assert 'decide.extra "any: flow_mean > 1" drops 100 % of 80 clips' in mine


def test_what_if_tells_which_rules_turn_which_clips() -> None:
    rows = [
        *({**GOOD, "flow_mean": 0.02} for _ in range(3)),
        *({**GOOD, "flow_mean": 0.09} for _ in range(30)),
        {**GOOD, "flow_mean": 0.09, "blur": 1.0},
        *({**GOOD, "luma_mean": 10.0} for _ in range(2)),
        {**GOOD, "luma_mean": 10.0, "duration_s": 1.0},
    ]
    clips = _clips(*rows)
    old = decide(clips, DecideSettings())
    new = decide(clips, DecideSettings(flow_max=0.08, luma_min=5.0, blur_min=50.0))
    shuffled = new.take(pa.array(list(reversed(range(new.num_rows)))))  # joined by uid
    found = what_if(old, shuffled)
    assert (found.dropped, found.kept, found.same) == (31, 2, 4)
    by = {turn.rule: turn for turn in found.dropped_by}
    assert list(by) == ["flow: flow_mean <= 0.08", "light: blur >= 50.0"]
    assert [turn.clips for turn in found.dropped_by] == [31, 1]
    uids = sorted(str(i) for i in range(3, 34))
    assert by["flow: flow_mean <= 0.08"].examples == tuple(uids[:20])
    assert [(turn.rule, turn.clips, turn.examples) for turn in found.formerly_by] == [
        ("light: luma_mean >= 16.0", 2, ("34", "35"))
    ]
    nothing = what_if(old, old)
    assert (nothing.dropped, nothing.kept, nothing.same) == (0, 0, len(rows))
    assert nothing.dropped_by == nothing.formerly_by == ()
