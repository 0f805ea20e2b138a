"""Rules: what they drop, why, and what they cannot do."""

from __future__ import annotations

import re
from typing import Any

import pyarrow as pa
import pytest

from unimodal.pipeline.clips import WATCH, table
from unimodal.pipeline.decide import RULES, DecideSettings, decide, rules
from unimodal.pipeline.errors import UsageError
from unimodal.pipeline.presets import PRESETS, CurateSettings
from unimodal.pipeline.settings import build


def _clips(*rows: dict[str, Any]) -> pa.Table:
    base = {"uri": "/x", "source_sha256": "s", "width": 640, "height": 480}
    return table(({**base, "uid": str(i), **row} for i, row in enumerate(rows)), WATCH)


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
    assert spoken == set(DecideSettings.model_fields) - {"extra"}
    assert len(rules(DecideSettings())) < len(RULES)  # those without a threshold are off
