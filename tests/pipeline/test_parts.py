"""Parts: deterministic, kept from run to run, named after what they hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from unimodal.pipeline.parts import Part, PartSettings, digest, group, plan, read_parts, write_parts
from unimodal.pipeline.source import Source

SMALL = PartSettings(max_bytes=100, max_sources=3)


def _sources(*sizes: int) -> list[Source]:
    return [Source(f"/{i:03d}.png", size, i) for i, size in enumerate(sizes)]


@given(st.lists(st.integers(0, 150), max_size=40), st.randoms())
def test_grouping_is_deterministic_bounded_and_complete(sizes: list[int], random: object) -> None:
    sources = _sources(*sizes)
    parts = group(sources, SMALL)
    shuffled = list(sources)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert group(shuffled, SMALL) == parts
    assert sorted(s for part in parts for s in part.sources) == sources
    for part in parts:
        assert len(part.sources) <= 3
        assert len(part.sources) == 1 or sum(s.size for s in part.sources) <= 100
    assert len({part.name for part in parts}) == len(parts)


def test_one_long_video_does_not_hide_in_a_crowd() -> None:
    parts = group(_sources(10, 500, 10), SMALL)
    assert [[s.size for s in part.sources] for part in parts] == [[10, 10], [500]]


def _done(parts: list[Part]) -> Callable[[str], bool]:
    """What is committed: these parts."""
    names = {part.name for part in parts}
    return lambda name: name in names


def test_a_run_that_was_cut_short_finds_its_whole_parts_again() -> None:
    whole = group(_sources(10, 10, 10), SMALL)
    short = plan(_sources(10), whole, _done(whole), SMALL)  # as with --limit 1
    assert [part.name for part in short] == [part.name for part in whole]
    assert plan(_sources(10, 10, 10), short, _done(whole), SMALL) == whole


def test_a_file_that_is_added_costs_one_part() -> None:
    before = group(_sources(40, 40, 40, 40), SMALL)
    sources = [*_sources(40, 40, 40, 40), Source("/000a.png", 5, 9)]
    after = plan(sources, before, _done(before), SMALL)
    assert len(after) == len(before) + 1
    assert {part.name for part in before} < {part.name for part in after}


def test_an_edited_file_moves_to_a_new_part_and_leaves_the_old_one_standing() -> None:
    before = group(_sources(10, 10, 10), SMALL)
    sources = _sources(10, 10, 10)
    sources[1] = replace(sources[1], mtime_ns=99)
    after = plan(sources, before, _done(before), SMALL)
    kept = next(part for part in after if part.name == before[0].name)
    assert [s.uri for s in kept.sources] == ["/000.png", "/002.png"] and kept.members == 3
    assert [s for part in after if part is not kept for s in part.sources] == [sources[1]]


def test_a_part_that_lost_a_source_before_it_was_done_is_grouped_anew() -> None:
    before = group(_sources(10, 10, 10), SMALL)
    after = plan(_sources(10, 10), before, lambda name: False, SMALL)
    assert after == group(_sources(10, 10), SMALL)
    assert plan([], before, lambda name: True, SMALL) == []


def test_a_source_that_comes_back_is_not_forgotten() -> None:
    first = group(_sources(10, 10, 10), SMALL)
    second = plan(_sources(10, 10), first, lambda name: True, SMALL)
    third = plan(_sources(10, 10, 10), second, lambda name: True, SMALL)
    assert sorted(s.uri for part in third for s in part.sources) == [
        "/000.png",
        "/001.png",
        "/002.png",
    ]


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    copy = Source("/z.png", 10, 7, "abc")
    sources = [Source("/a.png", 10, 1, "abc", (copy,)), *_sources(20, 30)]
    parts = group(sources, SMALL)
    write_parts(parts, tmp_path / "parts.parquet")
    assert read_parts(tmp_path / "parts.parquet") == parts
    assert read_parts(tmp_path / "gone.parquet") == []
    assert digest(parts) != digest(group(_sources(20, 30), SMALL))
