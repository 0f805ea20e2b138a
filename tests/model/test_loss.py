"""The chunked loss against the plain one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from unimodal.model.loss import LossByKind, weighted_cross_entropy

T, D, V = 50, 16, 301


def _inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(T, D, generator=g, requires_grad=True)
    head = torch.randn(V, D, generator=g, requires_grad=True)
    targets = torch.randint(V, (T,), generator=g)
    weights = torch.tensor([1.0, 0.5, 0.0])[torch.randint(3, (T,), generator=g)]
    return hidden, head, targets, weights


@pytest.mark.parametrize("chunk", [7, 50, 512])
def test_chunked_loss_and_gradients_equal_plain_cross_entropy(chunk: int) -> None:
    hidden, head, targets, weights = _inputs()
    total, losses = weighted_cross_entropy(hidden, head, targets, weights, chunk)
    (total / 3).backward()
    grads = hidden.grad, head.grad
    hidden.grad = head.grad = None
    plain = F.cross_entropy(hidden @ head.T, targets, reduction="none")
    ((plain * weights).sum() / 3).backward()
    torch.testing.assert_close(total, (plain * weights).sum())
    torch.testing.assert_close(losses, plain.detach() * (weights > 0))
    torch.testing.assert_close(grads[0], hidden.grad, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(grads[1], head.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="needs torch 2.12 or newer")
def test_loss_equals_torchs_own_chunked_one() -> None:
    hidden, head, targets, weights = _inputs()
    total, _ = weighted_cross_entropy(hidden, head, targets, weights)
    options = torch.nn.LinearCrossEntropyOptions(chunking_method=None, batch_chunk_size=16)
    theirs = F.linear_cross_entropy(hidden, head, targets, reduction="none", options=options)
    torch.testing.assert_close(total, (theirs * weights).sum())


def test_logits_of_all_tokens_never_exist_at_once() -> None:
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for one in out if isinstance(out, tuple) else (out,):
                if isinstance(one, torch.Tensor):
                    largest = max(largest, one.numel())
            return out

    hidden, head, targets, _ = _inputs()
    with Watch():
        total, _ = weighted_cross_entropy(hidden, head, targets, torch.ones(T), chunk=10)
        total.backward()
    assert largest <= max(10 * V, V * D)


def test_half_the_vision_weight_halves_its_gradient() -> None:
    hidden, head, targets, _ = _inputs()
    grads = []
    for weight in (1.0, 0.5):
        hidden.grad = None
        weights = torch.ones(T)
        weights[::2] = weight
        weighted_cross_entropy(hidden, head, targets, weights)[0].backward()
        assert hidden.grad is not None
        grads.append(hidden.grad.clone())
    torch.testing.assert_close(grads[1][::2], grads[0][::2] / 2)
    torch.testing.assert_close(grads[1][1::2], grads[0][1::2])


def test_means_by_kind_leave_out_targets_of_weight_zero_and_survive_a_checkpoint() -> None:
    kinds = torch.tensor([0, 0, 1, 1])
    first = LossByKind(("a", "b", "c"))
    first.add(torch.tensor([1.0, 2.0, 4.0, 9.0]), kinds, torch.tensor([1.0, 1.0, 0.5, 0.0]))
    second = LossByKind(("a", "b", "c"))
    second.restore(first.state())
    assert second.means() == {"a": 1.5, "b": 4.0}
    second.clear()
    assert second.means() == {}
