"""Floors under the figures of docs/accuracy.md, on a few of the benchmark's videos."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks import accuracy, synthetic
from benchmarks.accuracy import DETECTORS, Tally
from benchmarks.synthetic import Transition
from unimodal.pipeline.observers.cut import CutSettings

BEST = "preset best: adaptive, fade, dissolve"
PLAIN = "preset best without dissolve"


@pytest.fixture(autouse=True)
def _material(videos: Path, photos: Path, emoji: list[Path]) -> None:
    """The pictures that videos are made of; skips where they are not installed."""


@pytest.fixture(scope="module")
def tallies() -> dict[str, Tally]:
    scripts = (synthetic.cut_script(seed, shots=7) for seed in (0, 1))
    return accuracy.cuts_of(scripts, {name: DETECTORS[name] for name in (BEST, PLAIN)})


def test_hard_cuts_fades_and_dissolves_are_found_and_little_else(
    tallies: dict[str, Tally],
) -> None:
    best = tallies[BEST]
    assert sum(best.true.values()) == 12 and set(best.true) >= {"cut", "dissolve", "fade"}
    assert best.f1("cut") >= 0.9
    assert best.recall("fade") == 1
    assert best.recall("dissolve") >= 0.75
    assert best.precision() >= 0.95


def test_the_dissolve_detector_finds_more_and_keeps_transitions_out_of_clips(
    tallies: dict[str, Tally],
) -> None:
    best, plain = tallies[BEST], tallies[PLAIN]
    assert best.f1() >= plain.f1() + 0.1
    assert best.false <= plain.false
    assert best.leaked_s <= 0.2 * plain.leaked_s
    # It costs little of what is no transition: trims, and what is taken too much.
    assert best.kept_s / best.sole_s >= plain.kept_s / plain.sole_s - 0.1


def test_motion_is_measured_to_a_fraction_of_a_pixel() -> None:
    found = accuracy.flow_errors((0, 3, 11, 13))
    assert sorted(true for true, _ in found)[-1] > 15
    for true, measured in found:
        assert abs(measured - true) <= 0.1 + 0.08 * true


def test_bars_and_freezes_are_measured_as_rendered() -> None:
    assert max(accuracy.box_errors(range(4))) <= 2
    assert max(accuracy.freeze_errors(range(3))) <= 0.1


def test_copies_are_grouped_with_their_original_and_with_nothing_else() -> None:
    copies = accuracy.copies_found((0, 1))
    assert copies.wrong == 0
    assert copies.found["encoded"] + copies.found["half"] + copies.found["grain"] == 6


def test_the_area_of_text_is_near_the_rendered_one() -> None:
    found = accuracy.text_errors((0, 3, 4))
    assert [true > 0 for true, _ in found] == [True, False, True]
    for true, measured in found:
        assert abs(measured - true) <= 0.01 + 0.35 * true


def test_a_find_counts_once_and_only_where_a_transition_is() -> None:
    tally = Tally()
    truth = [Transition("cut", 2.0, 2.0), Transition("dissolve", 4.0, 5.0)]
    tally.add(truth, [2.04, 3.0, 3.92, 4.5, 5.2], synthetic.RATES[0])
    assert tally.hits == {"cut": 1, "dissolve": 1} and tally.false == 3
    assert tally.recall("cut") == 1 and tally.precision() == pytest.approx(2 / 5)
    assert tally.f1() == pytest.approx(2 * 0.4 / 1.4)


def test_a_script_knows_its_own_frames() -> None:
    script, again = (synthetic.cut_script(1, shots=5) for _ in range(2))
    assert {kind for kind, _ in script.joins} == {"faint", "dissolve", "fade"}
    frames = list(script.frames())
    assert len(frames) == int(script.seconds * script.fps + 1e-6)
    for index, frame in enumerate(again.frames()):
        assert np.array_equal(frame, frames[index])
        if index == 50:
            break
    for one in script.transitions():
        first, last = round(one.start_s * script.fps), round(one.end_s * script.fps)
        step = np.abs(frames[first].astype(int) - frames[first - 1]).mean()
        assert (step > 10) == (one.kind == "faint")  # the others begin with the shot before
        if one.kind == "fade":
            assert frames[(first + last) // 2].max() == 0


@pytest.mark.slow
def test_the_whole_set_of_synthetic_videos_keeps_its_figures() -> None:
    detectors = {name: DETECTORS[name] for name in (BEST, PLAIN)}
    found = accuracy.cuts_of(map(synthetic.cut_script, range(16)), detectors)
    assert found[BEST].f1() >= 0.82 > found[PLAIN].f1() + 0.05
    assert found[BEST].f1("cut") >= 0.88
    assert found[BEST].recall("dissolve") >= 0.7
    assert found[BEST].precision() >= 0.95
    assert found[BEST].leaked_s <= 0.3 * found[BEST].mixed_s


def test_real_cuts_are_found(bikes: Path) -> None:
    content = CutSettings(adaptive=0, content=27)
    timeline, found = accuracy.detect(bikes, {"content": content, "best": CutSettings()})
    true = [timeline.seconds(int(timeline.pts[frame])) for frame in accuracy.BIKES]
    assert found["content"][0] == pytest.approx(true)
    assert set(found["best"][0]) <= set(found["content"][0]) and len(found["best"][0]) >= 4
