"""Blocks: what is dropped in training, what backward computes again, and that neither is felt."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from unimodal.model.attention import Packed
from unimodal.model.blocks import Recompute, prepare
from unimodal.model.decoder import Decoder, DecoderConfig, Shape

LENGTHS = [5, 11]
IDS = torch.arange(16)
POSITIONS = torch.cat([torch.arange(n) for n in LENGTHS])


def _decoder(dropout: float, layers: int = 3) -> Decoder:
    shape = Shape(width=32, layers=layers, heads=4, kv_heads=2, ffn=64, dropout=dropout)
    return Decoder(DecoderConfig(shape, 40, 64)).train()


def _step(decoder: Decoder) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    hidden = decoder.hidden(IDS, POSITIONS, decoder.packed(LENGTHS))
    decoder.lm_head(hidden).square().sum().backward()
    return {name: p.grad for name, p in decoder.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputed_gradients_are_bit_for_bit_those_that_were_kept(
    dropout: float, recompute: Recompute
) -> None:
    kept, again = _decoder(dropout), _decoder(dropout)
    prepare(again, recompute)
    expected, grads = _step(kept), _step(again)
    assert set(grads) == set(expected) == {name for name, _ in kept.named_parameters()}
    assert all(torch.equal(grads[name], expected[name]) for name in grads)


def _cost(recompute: Recompute) -> tuple[int, int]:
    """FLOPs of a step, and bytes that autograd keeps outside of what is recomputed."""
    decoder, kept = _decoder(0.0), 0

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += (
            tensor.numel() * tensor.element_size() * (not isinstance(tensor, torch.nn.Parameter))
        )
        return tensor

    prepare(decoder, recompute)
    with (
        FlopCounterMode(display=False) as flops,
        torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
    ):
        _step(decoder)
    return flops.get_total_flops(), kept


def test_full_runs_every_block_twice_and_selective_no_matrix_product() -> None:
    (none, most), (selective, _), (full, least) = map(_cost, ("none", "selective", "full"))
    assert selective == none
    head = 6 * len(IDS) * 32 * 40
    # Forward is a third of the matrix products; attention's backward recomputes scores anyway.
    assert 1.25 < (full - head) / (none - head) < 4 / 3 + 1e-3
    assert least < 0.3 * most


def test_dropout_is_at_the_four_sites_of_emu3_and_only_while_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Embedding, attention probabilities, and both residual branches (EMU3's modelling code)."""
    decoder = _decoder(0.25)
    dropped: list[str] = []
    for name, module in decoder.named_modules():
        if isinstance(module, torch.nn.Dropout):
            assert module.p == 0.25
            module.register_forward_hook(lambda m, *_, name=name: dropped.append(name))
    attended: list[float] = []
    attention = F.scaled_dot_product_attention

    def spied(*args: Any, dropout_p: float = 0.0, **kwargs: Any) -> torch.Tensor:
        attended.append(dropout_p)
        return attention(*args, dropout_p=dropout_p, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spied)
    _step(decoder)
    branches = [f"model.layers.{i}.dropout" for i in range(3) for _ in "am"]
    assert dropped == ["model.dropout", *branches]
    assert attended == [0.25] * 3 * len(LENGTHS)
    decoder.eval()
    with torch.no_grad():
        one, two = (decoder(IDS[None]) for _ in range(2))
    assert torch.equal(one, two)
    assert attended[-1] == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "selective"])
def test_compiled_blocks_compute_what_eager_ones_do(
    monkeypatch: pytest.MonkeyPatch, recompute: Recompute
) -> None:
    monkeypatch.setattr(Packed, "attend", Packed.attend)  # put back what `prepare` wraps
    eager, compiled = _decoder(0.0, layers=2), _decoder(0.0, layers=2)
    prepare(compiled, recompute, compiled=True)
    expected, grads = _step(eager), _step(compiled)
    for name, grad in grads.items():
        assert (grad - expected[name]).norm() <= 1e-5 * expected[name].norm(), name
    compiled.eval()  # sampling runs the plain block
    with torch.no_grad():
        assert torch.equal(compiled(IDS[None]), eager.eval()(IDS[None]))
