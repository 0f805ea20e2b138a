"""Decoding step by step out of the cache against the whole sequence at once."""

from __future__ import annotations

import torch

from unimodal.model.attention import Cached
from unimodal.model.decoder import Decoder, DecoderConfig, Shape

SHAPE = Shape(width=48, layers=3, heads=6, kv_heads=2, ffn=80, init_std=0.2)


@torch.no_grad()
def test_cached_steps_equal_the_full_forward_for_rows_of_unequal_length() -> None:
    decoder = Decoder(DecoderConfig(SHAPE, 97, 64)).eval()
    ids = torch.randint(97, (3, 16), generator=torch.Generator().manual_seed(0))
    full = decoder(ids)
    cache = decoder.cache(rows=3, length=16)
    lengths = torch.tensor([5, 3, 8])  # rows of 5, 3 and 8 ids, padded on the right to 8
    seen = torch.zeros(3, dtype=torch.int64)

    def feed(part: torch.Tensor) -> torch.Tensor:
        step = Cached(cache, seen, part.shape[1])
        hidden = decoder.hidden(part.flatten(), step.positions.flatten(), step)
        return decoder.lm_head(hidden).view(3, part.shape[1], -1)

    logits = feed(ids[:, :8])
    for row in range(3):
        last = int(lengths[row]) - 1
        torch.testing.assert_close(logits[row, last], full[row, last], atol=2e-5, rtol=1e-5)
    seen = lengths.clone()
    for count in (1, 2, 1, 3):  # several ids at once, as given ids are fed
        part = torch.stack([ids[row, seen[row] : seen[row] + count] for row in range(3)])
        logits = feed(part)
        for row in range(3):
            expected = full[row, seen[row] : seen[row] + count]
            torch.testing.assert_close(logits[row], expected, atol=2e-5, rtol=1e-5)
        seen += count


@torch.no_grad()
def test_selected_rows_go_on_as_before() -> None:
    decoder = Decoder(DecoderConfig(SHAPE, 97, 64)).eval()
    ids = torch.randint(97, (3, 6), generator=torch.Generator().manual_seed(0))
    cache = decoder.cache(rows=3, length=6)
    step = Cached(cache, torch.zeros(3, dtype=torch.int64), 5)
    decoder.hidden(ids[:, :5].flatten(), step.positions.flatten(), step)
    rows = torch.tensor([2, 0])
    step = Cached(cache.select(rows), torch.tensor([5, 5]), 1)
    hidden = decoder.hidden(ids[rows, 5], step.positions.flatten(), step)
    torch.testing.assert_close(decoder.lm_head(hidden), decoder(ids)[rows, 5], atol=2e-5, rtol=1e-5)
