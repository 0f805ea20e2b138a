"""Documents, their order and their packs as pure functions of (seed, epoch, key)."""

from __future__ import annotations

import json
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from unimodal.model import data
from unimodal.model.data import (
    KINDS,
    Batch,
    Cursor,
    DataSettings,
    Loader,
    Samples,
    choose,
    open_shards,
    validation,
)
from unimodal.model.samples import draw, hashed
from unimodal.pipeline import large
from unimodal.pipeline.errors import UnimodalError
from unimodal.tokenize import shards as shards_module
from unimodal.tokenize.document import (
    Image,
    Part,
    Piece,
    Text,
    Video,
    compose,
    generation,
    parse,
    serialize,
    understanding,
    write,
)
from unimodal.tokenize.shards import Sample, Shards, ShardWriter
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
    loader = Loader(Samples([tiny_shards]), SETTINGS, 0, Cursor(((3, 0, 0),)))
    assert loader.plan.skipped == 0
    keys = sorted(loader.samples.key(d.row) for pack in loader.plan.packs for d in pack)
    assert keys == [f"key{i:04d}" for i in range(11) if i not in (8, 9)]
    assert loader.plan.behind[0][:2] == (4, 0)


def test_order_and_choices_depend_on_seed_and_epoch_alone(tiny_shards: Shards) -> None:
    def said(seed: int, epoch: int) -> list[object]:
        return Loader(Samples([tiny_shards]), SETTINGS, seed, Cursor(((epoch, 0, 0),))).plan.packs

    assert said(0, 1) == said(0, 1)
    assert said(0, 1) != said(0, 2)
    assert said(0, 1) != said(1, 1)


def test_a_loader_at_a_saved_cursor_goes_on_as_the_first_would(tiny_shards: Shards) -> None:
    samples = Samples([tiny_shards])
    first = Loader(samples, SETTINGS, 5)
    for _ in range(7):  # more than an epoch of packs
        next(first)
    second = Loader(samples, SETTINGS, 5, Cursor(**json.loads(json.dumps(asdict(first.cursor)))))
    assert first.cursor == second.cursor and first.cursor.epoch > 0
    for _ in range(7):
        a, b = next(first), next(second)
        assert a.keys == b.keys
        assert torch.equal(a.ids, b.ids) and torch.equal(a.weights, b.weights)


def test_shares_of_describing_and_of_dropped_captions_are_as_set() -> None:
    keys = np.array([hashed(f"key{i}") for i in range(4000)], np.uint64)
    draws = draw(0, 0, keys, "describes")
    assert draws.min() >= 0 and draws.max() < 1
    assert np.mean(draws < 0.3) == pytest.approx(0.3, abs=0.03)
    for other in (draw(0, 0, keys, "dropout"), draw(0, 1, keys, "describes")):
        assert abs(np.corrcoef(draws, other)[0, 1]) < 0.05
    for number in (0, 7):  # one at a time or all at once, each with its epoch
        assert (
            draw(0, number, keys[number], "dropout")
            == draw(0, np.arange(4000), keys, "dropout")[number]
        )


def test_a_sample_without_captions_is_drawn_unconditionally(
    tmp_path: Path, make_shards: Callable[..., Shards]
) -> None:
    shards = make_shards(tmp_path / "s", [np.zeros((1, 2, 2), int)], [[]])
    samples = Samples([shards])
    describes, captions = choose(samples, samples.rows["train"], 0, SETTINGS, 0)
    assert not describes.any() and captions.tolist() == [-1]
    batch = next(Loader(samples, SETTINGS, 0))
    assert int(batch.ids[1]) == shards.vocabulary.boi


def test_a_picture_longer_than_the_context_is_skipped_and_counted(tiny_shards: Shards) -> None:
    settings = DataSettings(context=41)  # the clip and the longer captions do not fit
    made = Loader(Samples([tiny_shards]), settings, 0).plan
    assert made.skipped > 0
    assert sum(map(len, made.packs)) + made.skipped == 9
    context = int(made.left_out(41).split("data.context=")[1].split()[0])
    wider = Loader(Samples([tiny_shards]), DataSettings(context=context), 0).plan
    assert wider.skipped == 0 and not wider.left_out(context)
    assert 41 < made.longest <= context < made.longest + 256
    assert all(d.length == d.total <= 41 for pack in made.packs for d in pack)
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
    shards = tiny_shards
    fake = SimpleNamespace(
        index=index, vocabulary=shards.vocabulary, codes=shards.codes, segments=shards.segments
    )
    with pytest.raises(UnimodalError, match="run tokenize again"):
        for _ in range(3):
            next(Loader(Samples([fake]), SETTINGS, 0))


def test_a_mapped_index_gives_what_one_in_memory_does(
    tmp_path: Path,
    tiny_shards: Shards,
    make_shards: Callable[..., Shards],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    codes = [np.full((1, 2, 2), i) for i in range(9)]
    more = make_shards(tmp_path, codes, [[f"picture {i}"] * (i % 3) for i in range(9)])
    settings = SETTINGS.model_copy(update={"styles": ["long"]})
    found = []
    for held, batch in ((100, 100), (0, 4)):
        monkeypatch.setattr(shards_module, "HELD", held)
        monkeypatch.setattr(large, "BATCH", batch)
        opened = [Shards.open(one.path) for one in (tiny_shards, more)]
        assert all((one.index["key"].num_chunks == 1) == (held > 0) for one in opened)
        for each in (SETTINGS, settings):
            samples = Samples(opened, each.styles)
            loader = Loader(samples, each, 0)
            said = [
                samples.caption(row, which)
                for row in range(len(samples.tasks))
                for which in range(int(samples.captions(row)))
            ]
            batches = [next(loader) for _ in range(8)]
            found.append([samples.digests(), said, [(b.ids.tolist(), b.keys) for b in batches]])
    assert found[:2] == found[2:] and found[0] != found[1]


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


# Documents of several pieces, sources, steps


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory, tokenizer: VisionTokenizer) -> Shards:
    """Texts of 1 to 400 bytes, and 3 of each other task."""
    rng = np.random.default_rng(0)
    vocabulary = Vocabulary.bytes(tokenizer.codebook_size)
    words = ("a cat sat", "on the mat", "in the sun")

    def picture() -> Image:
        return Image(rng.integers(0, tokenizer.codebook_size, (2, 3)))

    tasks: list[tuple[str, list[Piece]]] = [
        ("text", [Piece(Text("x" * int(size)))]) for size in rng.integers(1, 400, 20)
    ]
    for word in words:
        asked = Piece(Text(f"what is {word}?"), "user")
        tasks += [
            ("chat", [Piece(picture(), "user"), asked, Piece(Text(word), "assistant")] * 2),
            ("interleaved", [Piece(Text(word)), Piece(picture()), Piece(Text(word))]),
            (
                "edit",
                [
                    Piece(picture(), "source"),
                    Piece(Text(word), "instruction"),
                    Piece(picture(), "result"),
                ],
            ),
        ]
    return _write(tmp_path_factory.mktemp("documents"), tokenizer, vocabulary, tasks)


def _write(
    out: Path,
    tokenizer: VisionTokenizer,
    vocabulary: Vocabulary,
    tasks: Sequence[tuple[str, list[Piece]]],
) -> Shards:
    """Shards of documents; every tenth is for validation."""
    writer = ShardWriter(out, tokenizer, vocabulary, {})
    samples = [
        Sample(
            key=f"doc{number:03d}",
            uid=f"doc{number:03d}",
            kind="document",
            codes=None,
            split="val" if number % 10 == 9 else "train",
            source_sha256="0" * 64,
            task=task,
            pieces=pieces,
            tokens=[
                len(vocabulary.text.encode(piece.segment.text))
                if isinstance(piece.segment, Text)
                else None
                for piece in pieces
            ],
        )
        for number, (task, pieces) in enumerate(tasks)
    ]
    writer.write(0, "unit", samples)
    return writer.finish(1)


def test_ids_and_weights_are_those_of_the_documents(tiny_shards: Shards, documents: Shards) -> None:
    settings = DataSettings(
        context=700, caption_dropout=0.0, described_vision_weight=0.25, instruction_dropout=0.0
    )
    samples = Samples([tiny_shards, documents])
    loader = Loader(samples, settings, 0)
    rows = {samples.key(row): row for row in range(len(samples.tasks))}
    seen = set()
    for _ in range(12):
        batch = next(loader)
        kinds = batch.kinds.split(batch.lengths)
        for key, found, kind in zip(batch.keys, _documents(batch), kinds, strict=True):
            row = rows[key] - int(samples.starts[1])
            ids, weights = None, None
            if row >= 0:
                task = str(documents.index["task"][row])
                ids, weights = write(
                    compose(task, documents.segments(row)), documents.vocabulary, 0.5
                )
            else:
                seen.add("caption")
                codes = tiny_shards.codes(row + len(tiny_shards))
                vision = Image(codes[0]) if len(codes) == 1 else Video(codes, 6.0)
                captions = tiny_shards.index["captions"][row + len(tiny_shards)].as_py()
                for caption in captions:
                    for make, weight in ((generation, 0.5), (understanding, 0.25)):
                        parts = [Part(segment, True) for segment in make(caption["text"], vision)]
                        one = write(parts, tiny_shards.vocabulary, weight)
                        if np.array_equal(one[0][:-1], found[0]):
                            ids, weights = one
            assert ids is not None and weights is not None
            assert np.array_equal(found[0], ids[:-1]) and np.array_equal(found[1], ids[1:])
            assert np.array_equal(found[2], weights[1:])
            if row >= 0:
                seen.add(task)
                names = {KINDS[k] for k in kind[found[2] > 0].tolist()}
                wanted = {
                    "text": {"text"},
                    "chat": {"chat/text"},
                    "interleaved": {"interleaved/text", "interleaved/vision", "structure"},
                    "edit": {"edit/text", "edit/vision", "structure"},
                }
                assert names == wanted[task]
    assert seen == {"caption", "text", "chat", "interleaved", "edit"}


def test_edits_lose_instruction_and_source_in_their_shares(
    tmp_path: Path, tokenizer: VisionTokenizer
) -> None:
    rng = np.random.default_rng(0)
    vocabulary = Vocabulary.bytes(tokenizer.codebook_size)

    def picture(role: str) -> Piece:
        return Piece(Image(rng.integers(0, tokenizer.codebook_size, rng.integers(1, 4, 2))), role)

    made = [
        [picture("source")] * int(rng.integers(1, 3))
        + [Piece(Text("x" * int(rng.integers(1, 9))), "instruction"), picture("result")]
        for _ in range(300)
    ]
    shards = _write(tmp_path / "s", tokenizer, vocabulary, [("edit", one) for one in made])
    settings = DataSettings(context=96, instruction_dropout=0.4, source_dropout=0.25)
    samples = Samples([shards])
    order = {samples.key(row): row for row in range(len(made))}
    train = [one for row in samples.rows["train"] for one in made[order[samples.key(row)]]]
    sizes = Counter(p.segment.codes.shape for p in train if isinstance(p.segment, Image))
    grids = samples.grids(4096)  # what a checkpoint of edits alone knows of sizes
    assert {tuple(one["size"][1:]): one["samples"] for one in grids} == sizes
    assert grids[0]["kind"] == "image" and grids[0]["samples"] == max(sizes.values())
    counts, first = Counter[tuple[str, ...]](), {}
    for seed in (0, 0, 1):
        loader, found = Loader(samples, settings, seed), {}
        for _ in loader.plan.packs:
            batch = next(loader)
            for key, (ids, targets, weights) in zip(batch.keys, _documents(batch), strict=True):
                pieces = made[order[key]]
                for left in ((), ("instruction",), ("instruction", "source")):
                    kept = [piece for piece in pieces if piece.role not in left]
                    told = serialize([piece.segment for piece in kept], vocabulary)
                    if np.array_equal(told[:-1], ids):
                        break
                found[key] = left
                assert np.array_equal(told[:-1], ids) and np.array_equal(told[1:], targets)
                # The result alone is learned, and not that a lone picture has nothing behind it.
                block = len(serialize([kept[-1].segment], vocabulary, bos=False))
                learned = block - (len(left) == 2)
                size = len(ids)
                assert np.flatnonzero(weights).tolist() == [
                    *range(size - block, size - block + learned)
                ]
        assert len(found) == len(samples.rows["train"])  # no pack was too full for its documents
        assert seed or first in ({}, found)  # pure of (seed, epoch, key)
        first = first or found
        counts.update(found.values())
    assert found != first
    shares = {left: count / counts.total() for left, count in counts.items()}
    assert shares[("instruction",)] == pytest.approx(0.3, abs=0.06)
    assert shares[("instruction", "source")] == pytest.approx(0.1, abs=0.04)


def test_caption_weight_0_learns_the_picture_alone(tiny_shards: Shards) -> None:
    settings = DataSettings(context=128, caption_weight=0.0, understanding=0.0)
    batch = next(Loader(Samples([tiny_shards]), settings, 0))
    names = np.array(KINDS)[batch.kinds.numpy()]
    assert set(names[batch.weights.numpy() > 0]) == {"generation/vision", "structure"}


def test_long_texts_are_cut_without_losing_or_doubling_a_target(documents: Shards) -> None:
    samples = Samples([documents])
    loader = Loader(samples, DataSettings(context=150), 0)
    rows = samples.rows["train"]
    chats = (samples.lengths[rows] > 150) & ~samples.splittable(rows)
    assert loader.plan.skipped == chats.sum() > 0
    pieces: dict[str, list[tuple[int, np.ndarray, np.ndarray]]] = {}
    for one in loader.plan.packs:
        batch = data.collate(samples, one, loader.settings)
        for document, (ids, targets, _) in zip(one, _documents(batch), strict=True):
            told = (document.start, ids.numpy(), targets.numpy())
            pieces.setdefault(samples.key(document.row), []).append(told)
    lengths = set()
    for row, task in enumerate(documents.index["task"].to_pylist()):
        key = samples.key(row)
        if key not in pieces:  # of the validation split, or skipped
            continue
        pieces[key].sort(key=lambda piece: piece[0])
        lengths.add(len(pieces[key]))
        whole, _ = write(compose(task, documents.segments(row)), documents.vocabulary, 0.5)
        assert np.array_equal(np.concatenate([ids for _, ids, _ in pieces[key]]), whole[:-1])
        assert np.array_equal(np.concatenate([ids for _, _, ids in pieces[key]]), whole[1:])
        assert len(pieces[key]) == 1 or task == "text"
    assert {1, 2, 3} <= lengths


def test_sources_get_their_weight_in_tokens_and_keep_epochs_of_their_own(
    tiny_shards: Shards, documents: Shards
) -> None:
    settings = DataSettings(context=700, weights=[1.0, 3.0])
    loader = Loader(Samples([tiny_shards, documents]), settings, 0)
    border, tokens, rows = int(loader.samples.starts[1]), [0, 0], []
    while loader.cursor.epoch < 12:
        for document in loader._take():
            tokens[document.row >= border] += document.length
            rows.append(document.row)
    assert tokens[1] / sum(tokens) == pytest.approx(0.75, abs=0.02)
    (one, _, _), (other, _, _) = loader.cursor.sources
    assert 0 < min(one, other) < max(one, other)
    # A row comes again only when all the others of its source have come as often, but for the
    # window that is under way.
    for source, epochs in ((range(border), one), (range(border, len(loader.samples.tasks)), other)):
        counts = [rows.count(row) for row in source if row in loader.samples.rows["train"]]
        assert set(counts) <= {epochs - 1, epochs, epochs + 1}


def test_every_world_size_sees_the_same_packs_and_resumes_at_another(
    tiny_shards: Shards, documents: Shards
) -> None:
    samples, settings = Samples([tiny_shards, documents]), DataSettings(context=256)

    def steps(count: int, world: int, cursor: Cursor) -> tuple[list[list[list[str]]], Cursor]:
        """Packs of each step, as the sorted keys of all ranks; and where it ended."""
        loaders = [Loader(samples, settings, 0, cursor) for _ in range(world)]
        found = []
        for _ in range(count):
            batches = [one.step(8, rank, world) for rank, one in enumerate(loaders)]
            assert {len(mine) for mine in batches} == {8 // world}
            found.append(sorted(batch.keys for mine in batches for batch in mine))
            assert len({one.cursor for one in loaders}) == 1
        return found, loaders[0].cursor

    alone, end = steps(6, 1, Cursor())
    assert end.epoch > 0
    for first, then in ((2, 4), (4, 1), (1, 2)):
        begun, cursor = steps(3, first, Cursor())
        rest, last = steps(3, then, cursor)
        assert begun + rest == alone and last == end


@pytest.mark.parametrize(("alike", "each", "least"), [(False, 8, 0.85), (True, 1, 0.95)])
def test_ranks_have_as_much_attention_to_compute(alike: bool, each: int, least: float) -> None:
    # 131,072 tokens a pack, a twentieth of them video; a stand-in for the shards of so much.
    # Beside it each pack costs an 8B decoder its matrix products: as much as 64,850 T of len^2.
    rng, ranks, context = np.random.default_rng(0), 64, 131_072
    sizes = np.concatenate([[124_840] * 40, rng.choice([4171, 8201], 16_000)])
    samples = _lengths_alone(sizes)
    settings = DataSettings(context=context, alike=alike)
    loader = Loader(samples, settings, 0)
    loader._group = each * ranks
    packs = loader.plan.packs
    shares = []
    for at in range(0, len(packs) - each * ranks + 1, each * ranks):
        costs = [data._cost(one) for one in packs[at : at + each * ranks]]
        loads = [sum(costs[i] for i in hand) for hand in data.deal(costs, ranks)]
        same = 64_850 * context * each
        shares.append((np.mean(loads) + same) / (max(loads) + same))
    assert np.mean(shares) >= least


def test_every_step_within_a_window_is_of_packs_that_cost_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(data, "WINDOW", 300)
    monkeypatch.setattr(data, "collate", lambda samples, documents, settings: documents)
    settings = DataSettings(context=64, alike=True)
    loader = Loader(_lengths_alone(np.arange(1000) % 50 + 1), settings, 0)
    steps: dict[object, list[list[int]]] = {}
    while loader.cursor.epoch < 3:
        window, done = loader.cursor.sources, loader.cursor.pack
        step = sorted(data._cost(one) for one in loader.step(8))
        if loader.cursor.sources == window:  # else two windows share it
            assert loader.cursor.pack == done + 8
            steps.setdefault(window, []).append(step)
        again = Loader(loader.samples, settings, 0, Cursor(**asdict(loader.cursor)))
        again._group = 8
        assert again.plan == loader.plan
    for found in steps.values():
        assert len(found) > 8
        for cheap, dear in pairwise(sorted(found)):
            assert cheap[-1] <= dear[0]


def _lengths_alone(sizes: np.ndarray) -> Samples:
    samples = object.__new__(Samples)
    count = len(sizes)
    samples.shards = [SimpleNamespace(path="sizes")]
    samples.lengths, samples.tasks = sizes, np.zeros(count, np.uint8)
    samples.hashes, samples.starts = np.arange(count, dtype=np.uint64), np.array([0, count])
    samples._first, samples._tokens = np.zeros(count + 1, np.int64), np.zeros(1, np.int32)
    samples._dropped = np.zeros((count, 3), np.int32)
    samples.rows = {"train": np.arange(count), "val": np.arange(0)}
    return samples


def test_windows_share_out_an_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "WINDOW", 300)
    loader = Loader(_lengths_alone(np.arange(1000) % 50 + 1), DataSettings(context=64), 0)
    rows: list[int] = []
    sizes = []
    while loader.cursor.epoch == 0:
        documents = [document for one in loader.plan.packs for document in one]
        rows += [document.row for document in documents]
        sizes.append(len(documents))
        loader.cursor = Cursor(loader.plan.behind)
    assert sizes == [250] * 4
    assert sorted(rows) == list(range(1000))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0], r"data.weights = \[1.0\] for 2 shard directories"),
        ([1.0, 0.0], r"give each a number above 0"),
        ([math.nan, 1.0], r"give each a number above 0"),
        ([math.inf, 1.0], r"give each a number above 0"),
    ],
)
def test_weights_that_make_no_mixture_are_one_clear_line(
    tiny_shards: Shards, documents: Shards, weights: list[float], message: str
) -> None:
    with pytest.raises(UnimodalError, match=message):
        Loader(Samples([tiny_shards, documents]), DataSettings(weights=weights), 0)


def test_no_shards_no_samples_and_other_shards_are_one_clear_line(
    tmp_path: Path, tiny_shards: Shards, make_shards: Callable[..., Shards]
) -> None:
    with pytest.raises(UnimodalError, match="no shards given"):
        open_shards([])
    only = make_shards(tmp_path / "val", [np.zeros((1, 2, 2), int)], [["a"]], val=(0,))
    with pytest.raises(UnimodalError, match="no training sample"):
        Loader(Samples([only]), SETTINGS, 0)
    with pytest.raises(UnimodalError, match=r"val has a weight in data\.weights but no training"):
        Loader(Samples([tiny_shards, only]), DataSettings(context=128, weights=[1.0, 1.0]), 0)
    with pytest.raises(UnimodalError, match="the position is in 2 shard directories, not in 1"):
        Loader(Samples([tiny_shards]), SETTINGS, 0, Cursor(((0, 0, 0), (0, 0, 0))))


def test_plain_webdataset_reads_captions_and_documents(
    tiny_shards: Shards, documents: Shards
) -> None:
    import io

    import webdataset

    def read(shards: Shards) -> list[dict[str, bytes]]:
        urls = [str(shards.path / shard["name"]) for shard in shards.manifest["shards"]]
        return list(webdataset.WebDataset(urls, shardshuffle=False))

    for row, sample in enumerate(read(tiny_shards)):
        assert sample["__key__"] == str(tiny_shards.index["key"][row])
        codes = np.load(io.BytesIO(sample["vision.npy"]), allow_pickle=False)
        assert np.array_equal(codes, tiny_shards.codes(row))
        assert json.loads(sample["json"])["captions"] == tiny_shards.index["captions"][row].as_py()
    for row, sample in enumerate(read(documents)):
        said = json.loads(sample["json"])
        assert said["task"] == str(documents.index["task"][row])
        vision = 0
        for number, piece in enumerate(documents.segments(row)):
            if isinstance(piece.segment, Text):
                assert sample[f"{number}.txt"].decode() == piece.segment.text
                continue
            name = f"vision.{vision}.npy" if vision else "vision.npy"
            codes = np.load(io.BytesIO(sample[name]), allow_pickle=False)
            assert np.array_equal(codes[0], piece.segment.codes)
            vision += 1


WORDS = st.text(st.characters(codec="utf-8"), max_size=30)
SIZES = st.tuples(st.integers(1, 3), st.integers(1, 4))


@st.composite
def _pieces(draw: st.DrawFn) -> tuple[str, list[Piece]]:
    def vision() -> Image | Video:
        height, width = draw(SIZES)
        codes = np.full((draw(st.integers(1, 2)), height, width), draw(st.integers(0, 63)))
        return Image(codes[0]) if draw(st.booleans()) else Video(codes, 6.0)

    def some(role: str) -> list[Piece]:
        things = draw(st.lists(st.booleans(), min_size=1, max_size=3))
        return [Piece(Text(draw(WORDS)) if one else vision(), role) for one in things]

    task = draw(st.sampled_from(["text", "chat", "interleaved", "edit"]))
    if task == "text":
        return task, [Piece(Text(draw(WORDS)))]
    if task == "interleaved":
        return task, some("text")
    if task == "edit":
        instruction = Piece(Text(draw(WORDS)), "instruction")
        return task, [Piece(vision(), "source"), instruction, Piece(vision(), "result")]
    turns = draw(st.integers(1, 2))
    return task, [p for _ in range(turns) for role in ("user", "assistant") for p in some(role)]


@given(st.lists(_pieces(), min_size=1, max_size=12))
@hypothesis_settings(max_examples=15, deadline=None)
def test_the_index_knows_the_length_of_every_document(
    tokenizer: VisionTokenizer, made: list[tuple[str, list[Piece]]]
) -> None:
    vocabulary = Vocabulary.bytes(tokenizer.codebook_size)
    with tempfile.TemporaryDirectory() as folder:
        shards = _write(Path(folder) / "shards", tokenizer, vocabulary, made)
        samples = Samples([shards])
        for row, (task, pieces) in enumerate(made):
            ids, _ = write(compose(task, pieces), vocabulary, 0.5)
            assert samples.lengths[row] == len(ids) - 1
        loader = Loader(samples, DataSettings(context=2048), 0)
        rows = sorted(d.row for one in loader.plan.packs for d in one)
        assert rows == samples.rows["train"].tolist()
        assert sum(map(len, (next(loader).keys for _ in loader.plan.packs))) == len(rows)


def test_validation_holds_documents_of_all_tasks_and_cuts_long_texts(documents: Shards) -> None:
    samples = Samples([documents])
    batches = validation(samples, DataSettings(context=150), limit=10)
    rows = samples.rows["val"]
    kept = rows[(samples.lengths[rows] <= 150) | samples.splittable(rows)]
    assert {key for batch in batches for key in batch.keys} == {samples.key(row) for row in kept}
    assert sum(len(batch.ids) for batch in batches) == samples.lengths[kept].sum()
