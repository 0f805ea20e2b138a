"""Documents, their order and their packs as pure functions of (seed, epoch, key)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from unimodal.model.data import (
    KINDS,
    Batch,
    DataSettings,
    Loader,
    Samples,
    choose,
    draw,
    open_shards,
    plan,
    validation,
)
from unimodal.pipeline.errors import UnimodalError
from unimodal.tokenize.document import Image, Text, Video, parse
from unimodal.tokenize.shards import Shards
from unimodal.tokenize.vision.movq import MoVQ, MoVQConfig
from unimodal.tokenize.vision.tokenizer import VisionTokenizer
from unimodal.tokenize.vocabulary import Vocabulary

SETTINGS = DataSettings(context=128)


def _documents(batch: Batch) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    parts = (batch.ids, batch.targets, batch.weights)
    return list(zip(*(part.split(batch.lengths) for part in parts), strict=True))


def test_targets_are_the_next_ids_of_the_same_document(tiny_shards: Shards) -> None:
    vocabulary = tiny_shards.vocabulary
    for batch in [next(Loader(Samples([tiny_shards]), SETTINGS, 0)) for _ in range(3)]:
        assert len(batch.ids) == sum(batch.lengths) <= SETTINGS.context
        for ids, targets, _ in _documents(batch):
            assert ids[0] == vocabulary.bos
            assert targets[-1] == vocabulary.eos
            assert torch.equal(ids[1:], targets[:-1])
        restarts = torch.cat([torch.arange(length) for length in batch.lengths])
        assert torch.equal(batch.positions, restarts)


def test_every_document_parses_into_its_sample_and_one_of_its_captions(
    tiny_shards: Shards,
) -> None:
    vocabulary = tiny_shards.vocabulary
    loader = Loader(Samples([tiny_shards]), SETTINGS, 0)
    index = {key: row for row, key in enumerate(tiny_shards.index["key"].to_pylist())}
    seen = set()
    for _ in range(12):
        batch = next(loader)
        for key, (ids, targets, _) in zip(batch.keys, _documents(batch), strict=True):
            segments = parse([*ids.tolist(), int(targets[-1])], vocabulary)
            row = index[key]
            captions = {c["text"] for c in tiny_shards.index["captions"][row].as_py()}
            vision = next(s for s in segments if not isinstance(s, Text))
            codes = vision.codes if isinstance(vision, Video) else vision.codes[None]
            assert np.array_equal(codes, tiny_shards.codes(row))
            texts = [s.text for s in segments if isinstance(s, Text)]
            assert set(texts) <= captions
            order = "none" if not texts else "draw" if segments[0] is not vision else "describe"
            seen.add((type(vision), order))
    assert {(Image, "draw"), (Image, "describe"), (Image, "none")} <= seen


def test_vision_targets_weigh_half_and_described_pictures_what_the_setting_says(
    tiny_shards: Shards,
) -> None:
    settings = DataSettings(context=128, described_vision_weight=0.0, understanding=0.5)
    for batch in [next(Loader(Samples([tiny_shards]), settings, 0)) for _ in range(3)]:
        weights = {
            name: set(batch.weights[batch.kinds == kind].tolist())
            for kind, name in enumerate(KINDS)
        }
        assert weights["generation/vision"] <= {0.5}
        assert weights["understanding/vision"] <= {0.0}
        assert weights["generation/text"] | weights["understanding/text"] <= {1.0}
        assert weights["structure"] <= {0.0, 0.5}
        codes = tiny_shards.vocabulary.is_vision(batch.targets.numpy())
        names = np.array(KINDS)[batch.kinds.numpy()]
        assert np.array_equal(codes, np.char.endswith(names, "/vision"))


def test_a_dropped_caption_never_teaches_that_a_picture_has_no_description(
    tiny_shards: Shards,
) -> None:
    settings = DataSettings(context=128, caption_dropout=0.5, understanding=0.3)
    vocabulary = tiny_shards.vocabulary
    ends: dict[str, set[float]] = {"dropped": set(), "drawn": set(), "described": set()}
    loader = Loader(Samples([tiny_shards]), settings, 0)
    for _ in range(12):
        for ids, _, weights in _documents(next(loader)):
            first, last = int(ids[1]), int(ids[-1])
            drawn = "drawn" if last == vocabulary.eoi else "described"
            kind = "dropped" if first == vocabulary.boi and last == vocabulary.eoi else drawn
            ends[kind].add(float(weights[-1]))
    assert ends == {"dropped": {0.0}, "drawn": {1.0}, "described": {1.0}}


def test_an_epoch_holds_every_training_sample_once_and_no_validation_sample(
    tiny_shards: Shards,
) -> None:
    made = plan(Samples([tiny_shards]), SETTINGS, seed=0, epoch=3, window=0)
    assert made is not None and made.skipped == 0
    keys = sorted(document.row.key for pack in made.packs for document in pack)
    assert keys == [f"key{i:04d}" for i in range(11) if i not in (8, 9)]


def test_order_and_choices_depend_on_seed_and_epoch_alone(tiny_shards: Shards) -> None:
    def keys(seed: int, epoch: int) -> list[tuple[str, bool, int | None]]:
        made = plan(Samples([tiny_shards]), SETTINGS, seed, epoch, 0)
        assert made is not None
        return [(d.row.key, d.describes, d.caption) for pack in made.packs for d in pack]

    assert keys(0, 1) == keys(0, 1)
    assert keys(0, 1) != keys(0, 2)
    assert keys(0, 1) != keys(1, 1)


def test_a_loader_at_a_saved_cursor_goes_on_as_the_first_would(tiny_shards: Shards) -> None:
    samples = Samples([tiny_shards])
    first = Loader(samples, SETTINGS, 5)
    for _ in range(7):  # more than an epoch of packs
        next(first)
    second = Loader(samples, SETTINGS, 5, first.cursor)
    for _ in range(7):
        a, b = next(first), next(second)
        assert a.keys == b.keys
        assert torch.equal(a.ids, b.ids) and torch.equal(a.weights, b.weights)


def test_shares_of_describing_and_of_dropped_captions_are_as_set() -> None:
    keys = [f"key{i}" for i in range(4000)]
    draws = np.array([draw(0, 0, key, "describes") for key in keys])
    assert draws.min() >= 0 and draws.max() < 1
    assert np.mean(draws < 0.3) == pytest.approx(0.3, abs=0.03)
    other = np.array([draw(0, 0, key, "dropout") for key in keys])
    assert abs(np.corrcoef(draws, other)[0, 1]) < 0.05


def test_a_sample_without_captions_is_drawn_unconditionally(
    tmp_path: Path, make_shards: Callable[..., Shards]
) -> None:
    shards = make_shards(tmp_path / "s", [np.zeros((1, 2, 2), int)], [[]])
    samples = Samples([shards])
    document = choose(samples, samples.rows["train"][0], SETTINGS, 0, 0)
    assert not document.describes and document.caption is None
    batch = next(Loader(samples, SETTINGS, 0))
    assert int(batch.ids[1]) == shards.vocabulary.boi


def test_a_picture_longer_than_the_context_is_skipped_and_counted(tiny_shards: Shards) -> None:
    settings = DataSettings(context=41)  # the clip and the longer captions do not fit
    made = plan(Samples([tiny_shards]), settings, 0, 0, 0)
    assert made is not None
    assert made.skipped > 0
    assert all(d.length <= 41 for pack in made.packs for d in pack)
    with pytest.raises(UnimodalError, match=r"data.context = 16 tokens; the smallest needs \d+"):
        Loader(Samples([tiny_shards]), DataSettings(context=16), 0)


def test_validation_shows_each_sample_both_ways_with_every_target(tiny_shards: Shards) -> None:
    settings = DataSettings(context=128, described_vision_weight=0.0)
    batches = validation(Samples([tiny_shards]), settings, limit=10)
    assert (
        sorted(key for batch in batches for key in batch.keys) == ["key0008"] * 2 + ["key0009"] * 2
    )
    assert all((batch.weights > 0).all() for batch in batches)


def test_an_index_that_disagrees_with_its_captions_is_named(tiny_shards: Shards) -> None:
    import pyarrow as pa

    captions = tiny_shards.index["captions"].to_pylist()
    longer = [[c | {"tokens": c["tokens"] + 1} for c in one] for one in captions]
    place = tiny_shards.index.schema.get_field_index("captions")
    field = tiny_shards.index.schema.field(place)
    index = tiny_shards.index.set_column(place, field, pa.array(longer, field.type))
    fake = SimpleNamespace(index=index, vocabulary=tiny_shards.vocabulary, codes=tiny_shards.codes)
    with pytest.raises(UnimodalError, match="run tokenize again"):
        for _ in range(3):
            next(Loader(Samples([fake]), SETTINGS, 0))


def test_styles_choose_among_captions(tiny_shards: Shards) -> None:
    samples = Samples([tiny_shards], styles=["name"])
    assert samples.captions(samples.rows["train"][0]) == 2
    samples = Samples([tiny_shards], styles=["long"])
    assert samples.captions(samples.rows["train"][0]) == 0


def test_shards_of_two_vocabularies_do_not_mix(
    tmp_path: Path, tiny_shards: Shards, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = SimpleNamespace(
        vocabulary=Vocabulary.bytes(128), manifest=tiny_shards.manifest, path=tmp_path
    )
    monkeypatch.setattr(Shards, "open", lambda path: tiny_shards if path == Path("a") else other)
    with pytest.raises(UnimodalError, match="shards b and a have different vocabularies"):
        open_shards([Path("a"), Path("b")])


def test_shards_whose_codes_mean_something_else_do_not_mix(
    tmp_path: Path, make_shards: Callable[..., Shards], vocabulary: Vocabulary
) -> None:
    torch.manual_seed(1)
    size = vocabulary.codebook_size
    other = VisionTokenizer(MoVQ(MoVQConfig(codebook_size=size, ch=32, num_res_blocks=1)))
    codes, captions = [np.zeros((2, 3, 3), np.int64)], [["a clip"]]
    make_shards(tmp_path / "plain", codes, captions)
    make_shards(tmp_path / "joint", codes, captions, joint=True)
    make_shards(tmp_path / "other", codes, captions, by=other)
    assert len(open_shards([tmp_path / "joint", tmp_path / "joint"])) == 2
    for name in ("joint", "other"):
        with pytest.raises(UnimodalError, match="different vision tokenizers"):
            open_shards([tmp_path / "plain", tmp_path / name])
