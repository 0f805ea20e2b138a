"""Drawing one id from logits."""

from __future__ import annotations

import math

import pytest
import torch

from unimodal.model.choice import Choice, Noise, candidates


def test_draws_follow_the_probabilities() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0]).expand(20_000, 4)
    noise = torch.empty(20_000, 4).exponential_(generator=torch.Generator().manual_seed(0))
    p = (logits[0] / 0.7).softmax(-1)
    drawn = Choice(temperature=0.7).pick(
        logits, lambda columns: noise.gather(1, columns.expand(len(noise), -1))
    )
    share = torch.bincount(drawn, minlength=4) / 20_000
    torch.testing.assert_close(share, p, atol=0.012, rtol=0)  # over 3 standard errors
    top = Choice(temperature=0.7, top_k=2).pick(
        logits, lambda columns: noise.gather(1, columns.expand(len(noise), -1))
    )
    share = torch.bincount(top, minlength=4) / 20_000
    torch.testing.assert_close(share[:2], p[:2] / p[:2].sum(), atol=0.012, rtol=0)
    nucleus = Choice(temperature=0.7, top_p=0.75).pick(
        logits, lambda columns: noise.gather(1, columns.expand(len(noise), -1))
    )
    assert set(nucleus.tolist()) == {0}  # p[0] = 0.77 is enough
    assert set(
        Choice(top_k=1)
        .pick(logits, lambda columns: noise.gather(1, columns.expand(len(noise), -1)))
        .tolist()
    ) == {0}


def test_guidance_draws_nothing_that_the_prompt_alone_makes_implausible() -> None:
    # Both rows are sure of column 0; the last two columns are noise that guidance blows up.
    conditional = torch.tensor([[15.0, 13.0, 0.0, 0.0]])
    unconditional = torch.tensor([[14.0, 13.0, -20.0, -5.0]])
    free = Choice().guide([conditional, unconditional], [torch.tensor([[3.0]])])
    assert int(free.argmax()) == 2
    kept = Choice(plausible=0.1).guide([conditional, unconditional], [torch.tensor([[3.0]])])
    assert int(kept.argmax()) == 0
    assert kept.isinf().tolist() == [[False, False, True, True]]
    assert torch.equal(kept[:, :2], free[:, :2])


def test_three_rows_guide_towards_picture_and_instruction_apart() -> None:
    c, i, u = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(0))
    a, b = torch.tensor([[1.5], [2.0]]), torch.tensor([[3.0], [1.0]])
    guided = Choice().guide([c, i, u], [a, b])
    torch.testing.assert_close(guided, u + a * (i - u) + b * (c - i))


def test_noise_is_exponential_and_each_sequence_step_and_id_has_its_own() -> None:
    noise = Noise(0, [(number, 0) for number in range(8)])
    ids = torch.arange(151_854, 151_854 + 4096)
    drawn = torch.stack([noise.exponential(step, ids) for step in range(32)])  # [32, 8, 4096]
    share = [(drawn < edge).float().mean().item() for edge in (0.01, 0.1, 1.0, 3.0)]
    # A million draws: the standard error is below 5e-4.
    for found, edge in zip(share, (0.01, 0.1, 1.0, 3.0), strict=True):
        assert abs(found - (1 - math.exp(-edge))) < 2e-3
    rows = drawn.flatten(0, 1)
    rows = (rows - rows.mean(1, keepdim=True)) / rows.std(1, keepdim=True)
    correlation = rows @ rows.T / rows.shape[1]
    correlation.fill_diagonal_(0)
    assert correlation.abs().max() < 6 / math.sqrt(rows.shape[1])  # of 32,640 pairs
    wins = torch.cat([noise.exponential(step, ids[:16]).argmin(-1) for step in range(1000)])
    counts = torch.bincount(wins, minlength=16).float()
    assert ((counts - 500) ** 2 / 500).sum() < 37.7  # chi-square, 15 degrees, p = 0.001


def test_noise_depends_on_nothing_but_seed_sequence_step_and_id() -> None:
    ids = torch.arange(100)
    whole = Noise(3, [(0, 0), (1, 0), (1, 1)])
    alone = Noise(3, [(1, 1)])
    assert torch.equal(whole.exponential(7, ids)[2:], alone.exponential(7, ids))
    assert torch.equal(whole.exponential(7, ids, [2]), alone.exponential(7, ids))
    some = torch.tensor([[5, 99], [0, 1], [50, 7]])
    assert torch.equal(whole.exponential(7, some), whole.exponential(7, ids).gather(1, some))
    steps = torch.tensor([7, 8, 9])
    mixed = torch.stack([whole.exponential(7 + row, ids)[row] for row in range(3)])
    assert torch.equal(whole.exponential(steps, ids), mixed)
    assert not torch.equal(Noise(4, [(1, 1)]).exponential(7, ids), alone.exponential(7, ids))


def test_the_smallest_and_the_largest_noise_are_finite_chances() -> None:
    values = torch.cat([Noise(0, [(0,)]).exponential(s, torch.arange(1 << 16)) for s in range(64)])
    assert values.min() > 0 and values.isfinite().all()


@pytest.mark.parametrize("k", [1, 16, 64, 500])
def test_candidates_by_a_bound_hold_those_of_topk(k: int) -> None:
    """Whether the bound of every eighth column is right, too high or of no use."""
    logits = torch.randn(3, 4096, generator=torch.Generator().manual_seed(0))
    skewed = logits.clone()
    skewed[:, ::8] += 9  # every eighth column is larger than all others
    few = torch.full((2, 4096), -torch.inf)
    few[:, 3:9] = torch.arange(6.0)
    for rows in (logits, skewed, few, few[:, :5]):
        least = min(k, rows.shape[-1])
        expected = rows.topk(least, dim=-1)
        kept, columns = candidates(rows, least)
        assert kept.shape[-1] < rows.shape[-1] or rows is not logits
        found = kept.topk(least, dim=-1)
        assert torch.equal(found.values, expected.values)
        real = kept > -torch.inf
        assert torch.equal(rows.gather(-1, columns)[real], kept[real])
        for columns_of, inside in zip(columns, real, strict=True):
            assert len(columns_of[inside].unique()) == inside.sum()


@pytest.mark.parametrize("top_p", [1.0, 0.7])
@pytest.mark.parametrize("k", [1, 3, 50])
def test_a_draw_falls_as_one_among_all_of_the_k_largest(k: int, top_p: float) -> None:
    """Candidates that are none of the k never win, even where noise favours them."""
    rows = 0.01 * torch.randn(16, 4096, generator=torch.Generator().manual_seed(1))
    noise = Noise(0, [(i,) for i in range(16)])
    most, columns = rows.topk(k, dim=-1)
    p = most.softmax(-1)
    most = most.masked_fill((p.cumsum(-1) - p) >= top_p, -torch.inf)
    for step in range(64):
        drawn = Choice(top_k=k, top_p=top_p).pick(rows, lambda at: noise.exponential(step, at))  # noqa: B023
        best = (most - noise.exponential(step, columns).log()).argmax(-1, keepdim=True)
        assert torch.equal(drawn, columns.gather(-1, best)[:, 0])
