"""The world and the judge of benchmarks/proof.py: what its figures can be trusted for."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from benchmarks import proof, shapes


def test_one_combination_in_six_is_held_out_and_every_pair_of_it_is_trained_on() -> None:
    for others in (tuple(shapes.PLACES), shapes.MOTIONS):
        every = list(product(shapes.COLOURS, shapes.SHAPES, others))
        kept = [one for one in every if not shapes.held_out(*one)]
        assert len(every) - len(kept) == len(every) // 6
        for left, right in ((0, 1), (0, 2), (1, 2)):
            pairs = {(one[left], one[right]) for one in every}
            assert {(one[left], one[right]) for one in kept} == pairs


def test_training_never_meets_what_is_held_out() -> None:
    rng = shapes.rng_of(0, "training")
    for _ in range(200):
        clip = shapes.moving(rng, unseen=False)
        assert not shapes.held_out(clip.thing.colour, clip.thing.shape, clip.motion)
        edit = shapes.edit(rng, unseen=False)
        for one in (shapes.thing(rng, unseen=False), edit.source, edit.result):
            assert not shapes.held_out(one.colour, one.shape, one.place)
    asked = shapes.edit(rng, unseen=True).source
    assert shapes.held_out(asked.colour, asked.shape, asked.place)


@pytest.mark.parametrize("unseen", [False, True])
def test_the_judge_is_right_on_real_pictures(unseen: bool) -> None:
    rng = shapes.rng_of(1, "judge", unseen)
    things = [shapes.thing(rng, unseen) for _ in range(150)]
    found = proof.matches(things, [shapes.look(shapes.picture(one)) for one in things])
    assert found["all"]["share"] >= 0.99
    assert len({one.caption for one in things}) > 70


@pytest.mark.slow
def test_the_judge_is_right_on_real_clips_and_sees_no_motion_in_a_still() -> None:
    rng = shapes.rng_of(2)
    clips = [shapes.moving(rng, i % 2 == 0, motion=m) for i in range(4) for m in shapes.MOTIONS]
    real = [shapes.clip(one) for one in clips]
    found = proof.movements(clips, real)
    assert found["motion"]["share"] == found["all"]["share"] == 1
    assert found["change"]["least"] > 2
    still = proof.movements(clips, [np.repeat(one[:1], 16, axis=0) for one in real])
    assert still["motion"]["share"] == still["change"]["mean"] == 0
    back = {"moves left": "moves right", "moves up": "moves down", "grows": "shrinks"}
    back |= {after: before for before, after in back.items()}
    assert [shapes.motion(one[::-1]) for one in real] == [back[one.motion] for one in clips]


def test_the_judge_says_nothing_of_a_plain_ground_and_of_two_subjects() -> None:
    one = shapes.thing(shapes.rng_of(3), False, place="on the left", size="small")
    left, right = (shapes.picture(replace(one, x=x)) for x in (16.0, 48.0))
    two = np.where(np.arange(64)[:, None] < 32, left, right)
    assert shapes.look(left).found and shapes.look(right).found
    assert not shapes.look(two).found
    assert not shapes.look(np.full((64, 64, 3), 90, np.uint8)).found


def test_an_edit_counts_as_done_only_if_done_and_as_clean_only_if_the_rest_stayed() -> None:
    rng = shapes.rng_of(4)
    edits = [shapes.edit(rng, True, ("recolour", "move")[i % 2]) for i in range(40)]
    sources, results = (
        [shapes.picture(getattr(one, side)) for one in edits] for side in ("source", "result")
    )
    right = proof.edited(edits, sources, results)
    assert right["done"]["share"] == right["done and all kept"]["share"] == 1
    assert proof.edited(edits, sources, sources)["done"]["share"] == 0
    others = {"circle": "bar", "bar": "circle", "square": "triangle", "triangle": "square"}
    turned = [shapes.picture(replace(one.result, shape=others[one.result.shape])) for one in edits]
    found = proof.edited(edits, sources, turned)
    assert found["done"]["share"] >= 0.95
    assert found["kept"]["shape"]["share"] == found["done and all kept"]["share"] == 0
    assert found["kept"]["ground"]["share"] == 1


def test_descriptions_are_judged_by_exact_words() -> None:
    captions = ["a small red circle on the left on grey", "a large red circle at the top on grey"]
    found = proof.worded(captions, [captions[0], captions[1].replace("red", "blue")])
    assert found["exact"]["right"] == found["colour"]["right"] == 1
    assert found["place"]["right"] == found["ground"]["right"] == 2
    assert "motion" not in found


def test_intervals_are_wilsons() -> None:
    # scipy.stats.binomtest(k, n).proportion_ci(method="wilson")
    assert shapes.interval(8, 10) == pytest.approx((0.49016, 0.94332), abs=1e-4)
    assert shapes.interval(0, 50) == pytest.approx((0.0, 0.07135), abs=1e-4)
    assert shapes.interval(96, 96)[1] == 1


def test_motions_and_colours_are_asked_for_alike() -> None:
    run = proof.Run(proof.Path("unused"), quick=False, workers=1)
    clips = proof.asked_clips(run, "videos", 48, True)
    assert set(Counter(one.motion for one in clips).values()) == {8}
    assert clips == proof.asked_clips(run, "videos", 48, True)
