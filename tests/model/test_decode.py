"""Decoding step by step against the whole sequence at once."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from unimodal.model import decode as module
from unimodal.model.choice import Choice
from unimodal.model.decode import Decoding, Layout, bucket
from unimodal.model.decoder import Decoder, DecoderConfig, Shape
from unimodal.model.generate import Draft, Drawing, TorchBackend
from unimodal.model.grammar import BlockGrammar
from unimodal.tokenize.vocabulary import Vocabulary

CLOSE = {"atol": 3e-5, "rtol": 1e-5}
SIZE = 97


@pytest.fixture(scope="module", params=["plain", "qk_norm", "one_kv_head"])
def decoder(request: pytest.FixtureRequest) -> Decoder:
    more = {"plain": {}, "qk_norm": {"qk_norm": True, "head_dim": 12}, "one_kv_head": {}}
    kv_heads = 1 if request.param == "one_kv_head" else 2
    shape = Shape(
        width=48, layers=3, heads=6, kv_heads=kv_heads, ffn=80, init_std=0.2, **more[request.param]
    )
    decoder = Decoder(DecoderConfig(shape, SIZE, 64)).eval()
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if "norm" in name:  # ones hide what is forgotten
                parameter.mul_(torch.linspace(0.5, 1.5, len(parameter)))
    return decoder


def _ids(rows: int, length: int) -> torch.Tensor:
    return torch.randint(SIZE, (rows, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _behind(decoder: Decoder, sequences: Sequence[Sequence[int]]) -> torch.Tensor:
    """Hidden states [R, D] behind whole sequences, each computed alone."""
    found = []
    for one in sequences:
        ids = torch.tensor(one)
        found.append(decoder.hidden(ids, torch.arange(len(ids)), decoder.packed([len(ids)]))[-1])
    return torch.stack(found)


@torch.inference_mode()
def test_steps_equal_the_whole_sequence_for_rows_of_unequal_length(decoder: Decoder) -> None:
    rows = [one.tolist()[: 3 + 2 * n] for n, one in enumerate(_ids(4, 20))]
    decoding = Decoding(decoder, 4, 32)
    torch.testing.assert_close(decoding.prefill(rows), _behind(decoder, rows), **CLOSE)
    for step, new in enumerate((1, 2, 1, 4)):
        part = _ids(4, 40)[:, 20 + 4 * step :][:, :new]
        rows = [[*one, *more] for one, more in zip(rows, part.tolist(), strict=True)]
        torch.testing.assert_close(decoding.feed(part), _behind(decoder, rows), **CLOSE)


@torch.inference_mode()
def test_rows_take_as_many_ids_as_are_counted_and_none_leaves_a_row_as_it_was(
    decoder: Decoder,
) -> None:
    rows = [one.tolist() for one in _ids(3, 5)]
    decoding = Decoding(decoder, 3, 16)
    decoding.prefill(rows)
    for counts in ([3, 1, 0], [0, 2, 4], [1, 1, 1]):
        part = _ids(3, 9)[:, : max(counts)]
        hidden = decoding.feed(part, counts)
        rows = [
            [*one, *more[:count]]
            for one, more, count in zip(rows, part.tolist(), counts, strict=True)
        ]
        there = [row for row, count in enumerate(counts) if count]
        expected = _behind(decoder, [rows[row] for row in there])
        torch.testing.assert_close(hidden[there], expected, **CLOSE)
    assert decoding.lengths == [len(one) for one in rows] == decoding.starts.tolist()


@torch.inference_mode()
def test_kept_rows_go_on_as_before(decoder: Decoder) -> None:
    rows = [one.tolist()[: 4 + n] for n, one in enumerate(_ids(4, 9))]
    decoding = Decoding(decoder, 4, 16)
    decoding.prefill(rows)
    decoding.keep([3, 1])
    part = _ids(2, 2)
    rows = [[*rows[3], *part[0].tolist()], [*rows[1], *part[1].tolist()]]
    torch.testing.assert_close(decoding.feed(part), _behind(decoder, rows), **CLOSE)


@torch.inference_mode()
@pytest.mark.parametrize(("piece", "mask"), [(8, 2**26), (64, 2**26), (2**13, 60)])
def test_contexts_in_pieces_and_groups_are_those_at_once(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch, piece: int, mask: int
) -> None:
    monkeypatch.setattr(module, "PIECE", piece)
    monkeypatch.setattr(module, "MASK", mask)
    rows = [one.tolist()[: 2 + 5 * n] for n, one in enumerate(_ids(5, 24))]
    decoding = Decoding(decoder, 5, 32)
    torch.testing.assert_close(decoding.prefill(rows), _behind(decoder, rows), **CLOSE)
    part = _ids(5, 1)
    rows = [[*one, *more] for one, more in zip(rows, part.tolist(), strict=True)]
    torch.testing.assert_close(decoding.feed(part), _behind(decoder, rows), **CLOSE)


@torch.inference_mode()
def test_contexts_that_are_alike_are_computed_once(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = _ids(2, 7).tolist()
    rows = [a, b[:4], a, a, b[:4]]
    fed = []
    hidden = decoder.hidden

    def counted(ids: torch.Tensor, *others: object) -> torch.Tensor:
        fed.append(len(ids))
        return hidden(ids, *others)

    monkeypatch.setattr(decoder, "hidden", counted)
    decoding = Decoding(decoder, 5, 16)
    found = decoding.prefill(rows)
    assert fed == [2 * 7]
    monkeypatch.undo()
    torch.testing.assert_close(found, _behind(decoder, rows), **CLOSE)
    part = _ids(5, 1)
    rows = [[*one, *more] for one, more in zip(rows, part.tolist(), strict=True)]
    torch.testing.assert_close(decoding.feed(part), _behind(decoder, rows), **CLOSE)


@torch.inference_mode()
def test_matrices_too_large_to_be_copied_give_the_same(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [one.tolist() for one in _ids(2, 5)]
    found = []
    for copies in (2**31, 0):
        monkeypatch.setattr(module, "COPIES", copies)
        layout = Layout(decoder, 2)
        assert len(layout.layers[0].qkv.parts) == (1 if copies else 3)
        decoding = Decoding(decoder, 2, 16, layout)
        decoding.prefill(rows)
        found.append(decoding.feed(_ids(2, 2)))
        found.append(layout.head(lambda matrix: matrix[10:20])(found[-1]))
    torch.testing.assert_close(found[0], found[2], **CLOSE)
    torch.testing.assert_close(found[1], found[3], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found[3], found[2] @ decoder.lm_head.weight[10:20].T, **CLOSE)


@torch.inference_mode()
def test_steps_in_bfloat16_stay_near_float32(decoder: Decoder) -> None:
    rows = [one.tolist() for one in _ids(2, 6)]
    half = Decoder(decoder.config, seed=None).bfloat16().eval()
    half.load_state_dict(decoder.state_dict())
    half.compute = torch.bfloat16
    decoding = Decoding(half, 2, 16)
    decoding.prefill(rows)
    part = _ids(2, 2)
    hidden = decoding.feed(part)
    assert hidden.dtype == torch.bfloat16
    rows = [[*one, *more] for one, more in zip(rows, part.tolist(), strict=True)]
    similar = torch.cosine_similarity(hidden.float(), _behind(decoder, rows), dim=-1)
    assert float(similar.min()) > 0.995


def test_buckets_are_few_and_hold_what_they_must() -> None:
    for length in range(1, 140_000, 7):
        found = bucket(length, 140_000)
        assert length <= found <= max(length + 255, length * 1.25)
    assert len({bucket(length, 140_000) for length in range(1, 131_073)}) < 50
    assert bucket(300, 301) == 301


@pytest.mark.slow
def test_a_compiled_step_has_no_graph_breaks_and_draws_the_same(vocabulary: Vocabulary) -> None:
    shape = Shape(width=32, layers=2, heads=4, kv_heads=2, ffn=48, init_std=0.2)
    decoder = Decoder(DecoderConfig(shape, vocabulary.size, 512)).eval()
    grammar = BlockGrammar(vocabulary, 4, 5)
    drafts = [
        Draft(
            (
                [vocabulary.bos, *prompt.encode(), *grammar.opening],
                [vocabulary.bos, *grammar.opening],
            ),
            grammar,
            (3.0,),
            key=(number, 0),
        )
        for number, prompt in enumerate(["a kite", "the quick brown fox"])
    ]
    drawing = Drawing(Choice(top_k=20), Choice(), 3)
    # Whole graphs are asked for: a break would be an error.
    written = [
        TorchBackend(decoder, compile=compile).generate(drafts, drawing)
        for compile in (False, True)
    ]
    assert written[0] == written[1]
