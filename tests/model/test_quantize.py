"""Smaller weights against float32 ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from unimodal.model.choice import Choice
from unimodal.model.decoder import Decoder, DecoderConfig, Shape
from unimodal.model.generate import Draft, Drawing, TorchBackend
from unimodal.model.grammar import BlockGrammar
from unimodal.model.quantize import FEW, convert, int8_linear, quantize, weight_bytes
from unimodal.pipeline.errors import UsageError
from unimodal.tokenize.vocabulary import Vocabulary

SHAPE = Shape(width=64, layers=2, heads=4, kv_heads=2, ffn=128, qk_norm=True)


@pytest.fixture(scope="module")
def trained(vocabulary: Vocabulary) -> Callable[[], Decoder]:
    """Copies of a decoder that knows eight pictures of 4x5 codes by heart."""
    decoder = Decoder(DecoderConfig(SHAPE, vocabulary.size, 64))
    ids = _pictures(vocabulary)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=3e-3)
    for _ in range(150):
        logits = decoder(ids[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.2  # the first code is one of eight

    def copy() -> Decoder:
        again = Decoder(decoder.config, seed=None)
        again.load_state_dict(decoder.state_dict())
        return again.eval()

    return copy


def _pictures(vocabulary: Vocabulary) -> torch.Tensor:
    codes = torch.randint(vocabulary.codebook_size, (8, 4, 5), generator=_generator())
    grammar = BlockGrammar(vocabulary, 4, 5)
    return torch.stack(
        [
            torch.tensor([vocabulary.bos, ord("a") + number, *grammar.ids(one.numpy())])
            for number, one in enumerate(codes)
        ]
    )


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_rows_keep_their_own_scale_and_come_back_to_half_a_step() -> None:
    matrix = torch.randn(7, 33, generator=_generator()) * torch.logspace(-6, 2, 7)[:, None]
    weight, scale = quantize(matrix)
    assert weight.dtype == torch.int8 and int(weight.abs().amax()) == 127
    error = (weight * scale[:, None] - matrix).abs().amax(-1)
    assert (error <= 0.5001 * scale).all()
    zero, scale = quantize(torch.zeros(2, 3))
    assert not zero.any() and scale.isfinite().all()


@pytest.mark.parametrize("rows", [1, 3, FEW, FEW + 1])
def test_products_of_int8_weights_are_those_of_their_values(rows: int) -> None:
    weight, scale = quantize(torch.randn(48, 64, generator=_generator()))
    x = torch.randn(rows, 64, generator=_generator()).bfloat16()
    expected = x.float() @ (weight * scale[:, None]).T
    found = int8_linear(x, weight, scale)
    assert found.dtype == torch.bfloat16
    # Rounded twice to 8 bits: of the product, and of the product times the scale.
    torch.testing.assert_close(found.float(), expected, rtol=2**-7, atol=2e-2)


@torch.no_grad()
@pytest.mark.parametrize(("weights", "cosine"), [("bfloat16", 0.9999), ("int8", 0.999)])
def test_smaller_weights_of_a_trained_decoder_agree_with_float32(
    trained: Callable[[], Decoder], vocabulary: Vocabulary, weights: str, cosine: float
) -> None:
    whole, small = trained(), convert(trained(), weights)
    ids = _pictures(vocabulary)
    expected, found = whole(ids), small(ids)
    assert float(F.cosine_similarity(expected, found, dim=-1).mean()) > cosine
    sure = expected[:, 10:-1]  # behind the first code, each picture goes on in one way
    assert float((sure.argmax(-1) == found[:, 10:-1].argmax(-1)).float().mean()) > 0.99


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8"])
def test_a_decoder_draws_what_it_knows_with_smaller_weights_too(
    trained: Callable[[], Decoder], vocabulary: Vocabulary, weights: str
) -> None:
    grammar = BlockGrammar(vocabulary, 4, 5)
    drafts = [
        Draft(
            ([vocabulary.bos, ord("a") + number, *grammar.opening], [vocabulary.bos]),
            grammar,
            (1.0,),
        )
        for number in range(8)
    ]
    greedy = Choice(temperature=None)
    written = TorchBackend(convert(trained(), weights)).generate(drafts, Drawing(greedy, greedy))
    known = _pictures(vocabulary)[:, 2 + len(grammar.opening) :]
    assert [one == whole for one, whole in zip(written, known.tolist(), strict=True)] == [True] * 8


def test_weights_take_the_bytes_that_they_should(trained: Callable[[], Decoder]) -> None:
    whole = weight_bytes(trained())
    assert 0.49 < weight_bytes(convert(trained(), "bfloat16")) / whole < 0.52
    assert 0.25 < weight_bytes(convert(trained(), "int8")) / whole < 0.28
    with pytest.raises(UsageError, match=r"int4.*bfloat16"):
        convert(trained(), "int4")
