"""Packing: nothing lost, nothing cut that may not be, little wasted; dealing evenly."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unimodal.model.packing import PIECE, deal, pack


@given(
    st.lists(st.tuples(st.integers(1, 900), st.booleans()), max_size=120),
    st.integers(100, 300),
)
@settings(deadline=None)
def test_every_token_is_in_one_pack_and_only_text_is_cut(
    documents: list[tuple[int, bool]], capacity: int
) -> None:
    documents = [(size if text else min(size, capacity), text) for size, text in documents]
    packs = pack([size for size, _ in documents], capacity, [text for _, text in documents])
    assert all(0 < sum(stop - start for _, start, stop in one) <= capacity for one in packs)
    pieces: dict[int, list[tuple[int, int]]] = {number: [] for number in range(len(documents))}
    for one in packs:
        for index, start, stop in one:
            pieces[index].append((start, stop))
    for (size, text), parts in zip(documents, pieces.values(), strict=True):
        parts.sort()
        assert [start for start, _ in parts] + [size] == [0] + [stop for _, stop in parts]
        assert text or len(parts) == 1
        shortest = min(stop - start for start, stop in parts)
        assert shortest >= min(size, 1 + (size - 1) % capacity, PIECE, capacity // 64)


def lower_bound(whole: np.ndarray, tokens: int, capacity: int) -> int:
    """Packs that no packing can do without: all tokens together, and dual feasible functions of
    those that may not be cut (Fekete and Schepers 2001: u^(k), and Martello and Toth's L2)."""
    bounds = [-(-tokens // capacity)]
    for k in range(1, 40):
        share = whole * (k + 1)
        bounds.append(
            -(
                -int(np.where(share % capacity, share // capacity * capacity, whole * k).sum())
                // (k * capacity)
            )
        )
    for small in np.unique(whole[whole * 2 <= capacity])[::50]:
        middle = whole[(whole * 2 > capacity) & (whole <= capacity - small)]
        rest = whole[(whole * 2 <= capacity) & (whole >= small)].sum() - (capacity - middle).sum()
        bounds.append((whole * 2 > capacity).sum() + max(0, -(-int(rest) // capacity)))
    return int(max(bounds))


RNG = np.random.default_rng(0)


def text(count: int, median: int = 120) -> np.ndarray:
    """Lengths of texts: lognormal, as the benchmark of the trainer has them."""
    return np.exp(RNG.normal(np.log(median), 1.0, count)).astype(np.int64) + 2


def pictures(count: int, *sides: int) -> np.ndarray:
    """Lengths of square pictures with a caption of 5 to 120 tokens."""
    side = RNG.choice(sides, count)
    return side * (side + 1) + 9 + RNG.integers(5, 120, count)


NONE = np.zeros(0, np.int64)


@pytest.mark.parametrize(
    ("capacity", "whole", "texts", "full"),
    [
        (2048, RNG.integers(80, 115, 6000), NONE, 0.99),  # the demo's emoji
        (2048, RNG.integers(64, 1025, 5000), text(5000), 0.99),  # the trainer's benchmark
        (2048, RNG.integers(64, 1025, 5000), NONE, 0.99),
        (2048, RNG.integers(200, 1100, 8000), NONE, 0.99),
        (4096, RNG.integers(64, 1025, 3000), text(900), 0.99),  # a tenth of the tokens is text
        (8704, pictures(3000, 32, 64, 90), text(7500), 0.99),  # likewise
        (131_072, np.append(pictures(9000, 64, 90), [124_840] * 20), text(38_000), 0.99),
        (5120, pictures(2000, 64), text(1200), 0.8),  # one picture each: text fills no gap of 900
        (32_768, pictures(3000, 64, 90), NONE, 0.8),
        (4096, NONE, text(4000, 1500), 0.99),  # text alone, much of it longer than a pack
        (2048, NONE, np.full(3000, 1500), 0.99),
    ],
)
def test_packs_are_within_a_hundredth_of_the_lower_bound(
    capacity: int, whole: np.ndarray, texts: np.ndarray, full: float
) -> None:
    lengths = np.concatenate([whole, texts])
    cut = np.arange(len(lengths)) >= len(whole)
    order = np.random.default_rng(1).permutation(len(lengths))
    packs = pack(lengths[order], capacity, cut[order])
    assert len(packs) <= lower_bound(whole, int(lengths.sum()), capacity) * 1.01
    assert lengths.sum() / capacity / len(packs) >= full


def test_neighbours_of_a_small_document_change_with_the_order() -> None:
    lengths = np.random.default_rng(0).integers(80, 115, 700)
    order = np.random.default_rng(1).permutation(700)

    def neighbours(given: np.ndarray) -> set[int]:
        packs = [{int(given[i]) for i, _, _ in one} for one in pack(lengths[given], 2048)]
        return next(one for one in packs if 0 in one)

    assert len(neighbours(np.arange(700)) & neighbours(order)) < 6  # of about 20


def test_a_document_over_the_capacity_is_refused_unless_it_is_text() -> None:
    with pytest.raises(ValueError, match="101 tokens exceeds a pack of 100"):
        pack([50, 101], 100)
    assert sorted(pack([50, 101], 100, [False, True])) == [
        [(0, 0, 50), (1, 100, 101)],
        [(1, 0, 100)],
    ]


@given(st.lists(st.integers(1, 10**6), min_size=8, max_size=8), st.sampled_from([1, 2, 4, 8]))
def test_packs_are_dealt_in_equal_numbers_and_nearly_equal_cost(
    costs: list[int], hands: int
) -> None:
    dealt = deal(costs, hands)
    assert sorted(i for hand in dealt for i in hand) == list(range(8))
    assert {len(hand) for hand in dealt} == {8 // hands}
    loads = [sum(costs[i] for i in hand) for hand in dealt]
    assert max(loads) <= sum(costs) / hands + max(costs)
    with pytest.raises(ValueError, match="8 packs cannot be dealt evenly to 3 ranks"):
        deal(costs, 3)
