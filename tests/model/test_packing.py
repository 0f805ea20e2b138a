"""Packing: nothing lost, nothing split, little wasted."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unimodal.model.packing import best_fit


@given(st.lists(st.integers(1, 100), max_size=200), st.integers(100, 300))
@settings(deadline=None)
def test_every_document_is_whole_in_exactly_one_pack(lengths: list[int], capacity: int) -> None:
    packs = best_fit(lengths, capacity)
    assert sorted(i for pack in packs for i in pack) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in pack) <= capacity for pack in packs)


@pytest.mark.parametrize(
    ("capacity", "low", "high", "waste"),
    [
        (2048, 80, 115, 0.015),  # the demo's emoji
        (2048, 200, 1100, 0.02),
        (8704, 100, 8300, 0.02),
    ],
)
def test_packs_are_nearly_full(capacity: int, low: int, high: int, waste: float) -> None:
    lengths = np.random.default_rng(0).integers(low, high, 20_000)
    packs = best_fit(lengths, capacity)
    bound = int(np.ceil(lengths.sum() / capacity))
    assert len(packs) <= bound * (1 + waste) + 1


def test_neighbours_of_a_small_document_change_with_the_order() -> None:
    lengths = np.random.default_rng(0).integers(80, 115, 700)
    order = np.random.default_rng(1).permutation(700)

    def neighbours(packs: list[list[int]]) -> set[int]:
        return next({*pack} for pack in packs if 0 in pack)

    first = neighbours(best_fit(lengths, 2048))
    shuffled = best_fit(lengths[order], 2048)
    second = neighbours([[int(order[i]) for i in pack] for pack in shuffled])
    assert len(first & second) < 6  # of about 20


def test_a_document_over_the_capacity_is_refused() -> None:
    with pytest.raises(ValueError, match="101 tokens exceeds a pack of 100"):
        best_fit([50, 101], 100)
