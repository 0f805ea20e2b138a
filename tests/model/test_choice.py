"""Drawing one id from logits."""

from __future__ import annotations

import torch

from unimodal.model.choice import Choice


def test_draws_follow_the_probabilities() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0]).expand(20_000, 4)
    noise = torch.empty(20_000, 4).exponential_(generator=torch.Generator().manual_seed(0))
    p = (logits[0] / 0.7).softmax(-1)
    drawn = Choice(temperature=0.7).pick(logits, lambda: noise)
    share = torch.bincount(drawn, minlength=4) / 20_000
    torch.testing.assert_close(share, p, atol=0.012, rtol=0)  # over 3 standard errors
    top = Choice(temperature=0.7, top_k=2).pick(logits, lambda: noise)
    share = torch.bincount(top, minlength=4) / 20_000
    torch.testing.assert_close(share[:2], p[:2] / p[:2].sum(), atol=0.012, rtol=0)
    nucleus = Choice(temperature=0.7, top_p=0.75).pick(logits, lambda: noise)
    assert set(nucleus.tolist()) == {0}  # p[0] = 0.77 is enough
    assert set(Choice(top_k=1).pick(logits, lambda: noise).tolist()) == {0}


def test_guidance_draws_nothing_that_the_prompt_alone_makes_implausible() -> None:
    # Both rows are sure of column 0; the last two columns are noise that guidance blows up.
    conditional = torch.tensor([[15.0, 13.0, 0.0, 0.0]])
    unconditional = torch.tensor([[14.0, 13.0, -20.0, -5.0]])
    free = Choice().guide(conditional, unconditional, 3.0)
    assert int(free.argmax()) == 2
    kept = Choice(plausible=0.1).guide(conditional, unconditional, 3.0)
    assert int(kept.argmax()) == 0
    assert kept.isinf().tolist() == [[False, False, True, True]]
    assert torch.equal(kept[:, :2], free[:, :2])
