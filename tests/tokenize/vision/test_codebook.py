"""The moving codebook and the moving weights, against their formulas."""

from __future__ import annotations

import numpy as np
import torch

from unimodal.tokenize.training import WeightAverage
from unimodal.tokenize.vision.codebook import MovingCodebook
from unimodal.tokenize.vision.movq import MoVQ, MoVQConfig
from unimodal.tokenize.vision.optim import Optimizer, jump
from unimodal.tokenize.vision.ranks import Ranks
from unimodal.tokenize.vision.recipe import CodebookSettings, OptimizerSettings


def _model() -> MoVQ:
    torch.manual_seed(0)
    return MoVQ(MoVQConfig(codebook_size=4, ch=32, ch_mult=(1, 1), num_res_blocks=1))


def _rows(*points: float) -> torch.Tensor:
    """Latents [1,4,1,1,N] whose first number is a point."""
    z = torch.zeros(1, 4, 1, 1, len(points))
    z[0, 0, 0, 0] = torch.tensor(points)
    return z


def _book(model: MoVQ, *points: float, **changes: object) -> MovingCodebook:
    with torch.no_grad():
        model.quantize.embedding.weight.copy_(_rows(*points)[0, :, 0, 0].T)
    settings = CodebookSettings(decay=0.9).model_copy(update=changes)
    return MovingCodebook(model, settings, even=1.0, ranks=Ranks())


def test_entries_are_moving_averages_of_the_latents_that_chose_them() -> None:
    model = _model()
    book = _book(model, 0.0, 10.0, 20.0, 30.0)
    z = _rows(1.0, 3.0, 12.0)
    codes = model.quantize(z)
    assert codes.flatten().tolist() == [0, 0, 1]
    book.update(z, codes)
    # count = 0.9 * 1 + 0.1 * uses; total = 0.9 * entry + 0.1 * sum
    assert torch.allclose(book.count, torch.tensor([1.1, 1.0, 0.9, 0.9]))
    moved = torch.tensor([0.4 / 1.1, (9.0 + 1.2) / 1.0, 20.0, 30.0])
    assert torch.allclose(book.weight[:, 0], moved)


def test_k_means_finds_the_clusters() -> None:
    model = _model()
    book = _book(model, 0.0, 0.1, 0.2, 0.3)
    rng = np.random.default_rng(0)
    points = [float(c + 0.01 * rng.normal()) for c in (-5, 1, 7, 40) for _ in range(50)]
    book.start(_rows(*points)[0, :, 0, 0].T)
    spread = torch.cdist(_rows(*points)[0, :, 0, 0].T, book.weight.detach()).min(1).values
    assert spread.square().mean() < 0.2 * np.var(points)


def test_only_dead_entries_revive_onto_latents_of_the_last_batch() -> None:
    model = _model()
    book = _book(model, 0.0, 10.0, 1000.0, 2000.0, dead=0.5)
    z = _rows(1.0, 9.0, 8.0, 2.0)
    for _ in range(10):
        book.update(z, model.quantize(z))
    kept = book.weight[:2].clone()
    assert book.revive(np.random.default_rng(0)).tolist() == [2, 3]
    assert torch.equal(book.weight[:2], kept)
    assert set(book.weight[2:, 0].tolist()) <= {1.0, 9.0, 8.0, 2.0}
    assert book.revive(np.random.default_rng(0)).tolist() == []


def test_a_gradient_codebook_is_counted_but_not_moved() -> None:
    model = _model()
    book = _book(model, 0.0, 10.0, 20.0, 30.0, kind="gradient")
    assert book.weight.requires_grad
    before = book.weight.detach().clone()
    book.update(_rows(1.0), model.quantize(_rows(1.0)))
    assert torch.equal(book.weight, before) and book.count[0] == 1.0 and book.count[1] < 1.0


def test_weights_are_averaged_over_few_steps_first_and_jump_where_entries_did() -> None:
    model = _model()
    average = WeightAverage(model, 0.5)
    bias = model.decoder.conv_out.bias
    old = bias.detach().clone()
    with torch.no_grad():
        bias.add_(1.0)
    average.update(0)  # decay (1 + 0) / (10 + 0)
    ours = average.model.decoder.conv_out.bias
    assert torch.allclose(ours, old + 0.9)
    average.update(100)  # decay 0.5
    assert torch.allclose(ours, old + 0.95)
    with torch.no_grad():
        model.quantize.embedding.weight.add_(1.0)
    jump(average, torch.tensor([1]))
    same = (average.model.quantize.embedding.weight == model.quantize.embedding.weight).all(1)
    assert same.tolist() == [False, True, False, False]
    assert WeightAverage(model, 0.0).model is model


def test_muon_takes_convolutions_and_adamw_the_rest_and_both_clip() -> None:
    model = _model()
    muon = Optimizer(model, OptimizerSettings())
    assert "decoder.mid.block_1.conv1.weight" in muon.matrices
    assert {"quantize.embedding.weight", "encoder.conv_in.weight"} <= muon.rest.keys()
    adam = Optimizer(model, OptimizerSettings(kind="adamw", clip=0.1, clip_by="value"))
    assert not adam.matrices and len(adam.rest) == len(list(model.parameters()))
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 2.0)
    count = sum(p.numel() for p in model.parameters())
    assert np.isclose(adam.clip().item(), 2 * count**0.5, rtol=1e-4)
    assert all(p.grad is not None and p.grad.max() <= 0.1 for p in model.parameters())


def test_entries_that_stay_empty_move_to_where_latents_are_far() -> None:
    """Of a thousand equal latents one entry is enough; the others go to the few that differ."""
    book = _book(_model(), 0.0, 0.1, 0.2, 0.3)
    book.start(_rows(*[0.0] * 1000, -50.0, 20.0, 90.0)[0, :, 0, 0].T)
    assert sorted(book.weight[:, 0].tolist()) == [-50.0, 0.0, 20.0, 90.0]


def test_the_encoder_learns_at_its_share_of_the_rate() -> None:
    for share in (0.0, 0.5):
        model, still = _model(), _model()
        learner = Optimizer(model, OptimizerSettings(encoder=share, weight_decay=0.0))
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        learner.step(1e-3)
        moved = {
            name: (p - q).abs().max().item()
            for (name, p), q in zip(model.named_parameters(), still.parameters(), strict=True)
        }
        assert abs(moved["encoder.conv_in.bias"] - share * 1e-3) < 1e-6
        assert abs(moved["decoder.conv_in.bias"] - 1e-3) < 1e-6
