"""The stages as filters: the same columns as in a run, whatever became of the cache."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from unimodal.pipeline import caption, filter
from unimodal.pipeline.clips import QUALITY, TEXT
from unimodal.pipeline.errors import UsageError
from unimodal.pipeline.presets import CurateSettings
from unimodal.pipeline.progress import Progress
from unimodal.pipeline.run import Run, curate
from unimodal.pipeline.settings import build

SETTINGS = build(CurateSettings, sets=["decide.image_min_area=0", "report=false"])
Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, bikes: Path, emoji: list[Path]) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "bikes.mp4").symlink_to(bikes)
    for path in emoji[:4]:
        shutil.copy(path, folder)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, inputs: Path) -> Run:
    return curate([inputs], tmp_path_factory.mktemp("run") / "run", SETTINGS, engine="inline")


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory, inputs: Path) -> Rows:
    cache = tmp_path_factory.mktemp("cache")
    rows, _ = filter.cut_rows([inputs], SETTINGS, cache, engine="inline")
    return [json.loads(json.dumps(row)) for row in rows]  # as a pipe would have them


def _all(rows: Iterator[dict[str, Any]] | Rows) -> Rows:
    rows = filter.score_rows(
        filter.flow_rows(rows, SETTINGS, Progress()), ("text", "quality"), SETTINGS, Progress()
    )
    return list(filter.decide_rows(filter.dedup_rows(rows, SETTINGS), SETTINGS))


def test_a_chain_of_filters_gives_the_rows_of_a_run(whole: Run, cut: Rows) -> None:
    expected = whole.clips.to_pylist()
    names = [
        *("uid", "uri", "start_s", "end_s", "starts_at", "start_cut", "luma_mean"),
        *(*filter.FLOW, *TEXT.names, *QUALITY.names, "dup_group", "verdict", "reasons"),
    ]
    for row, want in zip(_all(cut), expected, strict=True):
        assert {name: row[name] for name in names} == {name: want[name] for name in names}


def test_without_the_cache_the_spans_are_decoded_to_the_same_scores(cut: Rows) -> None:
    lost = [{**row, "frames_tar": "/nowhere/p.frames.tar"} for row in cut]
    for row, want in zip(_all(lost), _all(cut), strict=True):
        assert {**row, "frames_tar": 0} == {**want, "frames_tar": 0}


def test_other_settings_are_measured_anew(tmp_path: Path, cut: Rows, bikes: Path) -> None:
    video = [row for row in cut if row["kind"] == "video"]
    double = build(CurateSettings, sets=["flow.fps=4"])
    before = [row["flow_mean"] for row in filter.flow_rows(video, SETTINGS, Progress())]
    after = [row["flow_mean"] for row in filter.flow_rows(video, double, Progress())]
    passed, _ = filter.cut_rows([bikes], double, tmp_path, engine="inline")
    assert after == [row["flow_mean"] for row in filter.flow_rows(passed, double, Progress())]
    assert None not in (before[0], after[0]) and after[0] != before[0]


def test_keys_of_the_users_own_ride_along_and_rules_may_speak_of_them(cut: Rows) -> None:
    rows = [{**row, "stars": 5 - number, "note": {"a": 1}} for number, row in enumerate(cut)]
    settings = build(CurateSettings, sets=["decide.image_min_area=0", "report=false"])
    settings = build(
        CurateSettings, settings.model_dump(mode="json"), sets=['decide.extra=["any: stars >= 5"]']
    )
    judged = list(filter.decide_rows(rows, settings))
    assert [row["note"] for row in judged] == [{"a": 1}] * len(cut)
    starred = [any(r.startswith("extra:") for r in row["reasons"]) for row in judged]
    assert starred == [False] + [True] * (len(cut) - 1)


def test_captions_join_rows_that_came_through_a_pipe(cut: Rows) -> None:
    given = caption.Given({cut[0]["uri"]: [caption.Caption("a street")]})
    rows = list(filter.caption_rows(cut, SETTINGS, given, Progress()))
    assert [c["text"] for c in rows[0]["captions"]] == ["a street"]
    assert all(row["captions"] == [] for row in rows if row["uri"] != cut[0]["uri"])


def test_lines_that_are_no_rows_are_named() -> None:
    with pytest.raises(UsageError, match="line 2: not JSON"):
        list(filter.read_rows(['{"uid": "a", "uri": "b", "kind": "image"}', "{oops"]))
    with pytest.raises(UsageError, match="line 1: not a clip row"):
        list(filter.read_rows(["[]"]))
