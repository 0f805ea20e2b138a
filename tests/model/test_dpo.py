"""Preferences: the loss is the formula's, pairs travel together, and training follows them."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from benchmarks import preferences as benchmark
from unimodal.model.checkpoint import latest_step
from unimodal.model.data import KINDS, DataSettings
from unimodal.model.decoder import Decoder, DecoderConfig, Shape
from unimodal.model.dpo import (
    MEANS,
    DPOSettings,
    PairBatch,
    Pairs,
    Position,
    Triplets,
    pair_loss,
)
from unimodal.model.loss import LossByKind
from unimodal.model.naming import read_json
from unimodal.model.parallel import Mesh, MeshSettings
from unimodal.model.prefer import color
from unimodal.model.recipe import TrainSettings
from unimodal.model.train import train
from unimodal.pipeline.errors import UnimodalError, UsageError
from unimodal.pipeline.progress import Progress
from unimodal.tokenize.document import Image, serialize
from unimodal.tokenize.shards import Shards
from unimodal.tokenize.training import read_record
from unimodal.tokenize.vocabulary import Vocabulary

MakeSettings = Callable[..., TrainSettings]

ALONE = Mesh(MeshSettings(), torch.device("cpu"))
PROMPTS = ["a kite", "red", "a longer prompt than these", "b", "cat"]


def _document(vocabulary: Vocabulary, codes: np.ndarray) -> list[int]:
    return serialize([Image(codes)], vocabulary, bos=False).tolist()


@pytest.fixture(scope="session")
def write_triplets(vocabulary: Vocabulary) -> Callable[..., Path]:
    """Write random triplets of these grids (one a prompt, by default unequal ones)."""

    def write(
        file: Path,
        grids: Sequence[tuple[int, int]] = ((3, 4), (2, 2), (4, 5), (1, 3), (3, 3)),
        digest: str | None = None,
        shift: int = 0,
    ) -> Path:
        rng = np.random.default_rng(0)
        rows = []
        for number, grid in enumerate(grids):
            prompt = PROMPTS[number % len(PROMPTS)]
            chosen, rejected = (rng.integers(0, vocabulary.codebook_size, grid) for _ in range(2))
            rows.append(
                {
                    "prompt": prompt,
                    "prompt_ids": [vocabulary.bos, *vocabulary.text.encode(prompt)],
                    "chosen_ids": _document(vocabulary, chosen),
                    "rejected_ids": [i + shift for i in _document(vocabulary, rejected)],
                    "vocabulary": digest or vocabulary.digest(),
                    "checkpoint": "0" * 16,
                }
            )
        file.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), file)
        return file

    return write


@pytest.fixture(scope="module")
def decoders(vocabulary: Vocabulary) -> tuple[Decoder, Decoder]:
    """A decoder in training, and the reference that it began as."""
    shape = Shape(width=32, layers=2, heads=4, kv_heads=2, ffn=48, init_std=0.2)
    config = DecoderConfig(shape, vocabulary.size, 128)
    return Decoder(config, 1), Decoder(config, 2)


def _pairs(triplets: Triplets, over: str = "vision", context: int = 400, **values: float) -> Pairs:
    settings = DPOSettings.model_validate({"over": over, **values})
    return Pairs(triplets, settings, DataSettings(context=context), seed=3)


def _tally() -> LossByKind:
    return LossByKind((*KINDS, *MEANS))


def _gradients(decoder: Decoder, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    decoder.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in decoder.named_parameters() if p.grad is not None}


def _formula(
    decoder: Decoder, reference: Decoder, triplets: Triplets, settings: DPOSettings
) -> torch.Tensor:
    """Rafailov et al. 2023, eq. 7, and the chosen samples' loss, one document at a time and with
    all logits."""

    def log_p(model: Decoder, prompt: np.ndarray, answer: np.ndarray) -> tuple[torch.Tensor, int]:
        ids = torch.from_numpy(np.concatenate([prompt, answer]))
        rows = model(ids[None])[0].log_softmax(-1)
        taken = [
            rows[i - 1, ids[i]]
            for i in range(len(prompt), len(ids))
            if settings.over == "answer" or triplets.vocabulary.is_vision(ids[i : i + 1].numpy())[0]
        ]
        return torch.stack(taken).sum(), len(taken)

    losses = []
    for pair in range(len(triplets)):
        prompt, chosen, rejected = triplets.ids(pair)
        w, count = log_p(decoder, prompt, chosen)
        lost, _ = log_p(decoder, prompt, rejected)
        with torch.no_grad():
            ref_w, ref_l = (log_p(reference, prompt, one)[0] for one in (chosen, rejected))
        dpo = -torch.log(
            torch.sigmoid(settings.beta * (w - ref_w) - settings.beta * (lost - ref_l))
        )
        losses.append(dpo - settings.next_token * w / count)
    return torch.stack(losses).mean()


@pytest.mark.parametrize("over", ["vision", "answer"])
@pytest.mark.parametrize("next_token", [0.0, 1.0])
def test_loss_and_gradients_are_those_of_the_formula(
    tmp_path: Path,
    vocabulary: Vocabulary,
    decoders: tuple[Decoder, Decoder],
    write_triplets: Callable[..., Path],
    over: str,
    next_token: float,
) -> None:
    decoder, reference = decoders
    triplets = Triplets([write_triplets(tmp_path / "t.parquet")], vocabulary)
    pairs = _pairs(triplets, over, beta=0.3, next_token=next_token)
    pairs.measure(reference, ALONE)
    (batch,) = pairs.step(1)
    assert isinstance(batch, PairBatch)
    loss = pair_loss(decoder, batch, _tally(), pairs.settings) / len(batch.reference)
    expected = _formula(decoder, reference, triplets, pairs.settings)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    ours, plain = _gradients(decoder, loss), _gradients(decoder, expected)
    assert ours.keys() == plain.keys()
    for name, gradient in plain.items():
        assert (ours[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_loss_and_gradients_are_those_of_trl(
    tmp_path: Path,
    vocabulary: Vocabulary,
    decoders: tuple[Decoder, Decoder],
    write_triplets: Callable[..., Path],
) -> None:
    """TRL takes the next-token mean over all chosen ids of a batch, hence one grid for all."""
    pytest.importorskip("trl", reason="trl is no dependency; docs/preferences.md has the result")
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    from unimodal.model.naming import config_record

    decoder, reference = decoders
    theirs, frozen = (
        LlamaForCausalLM.from_pretrained(_exported(one, tmp_path / str(i), config_record))
        for i, one in enumerate((decoder, reference))
    )
    triplets = Triplets([write_triplets(tmp_path / "t.parquet", [(3, 4)] * 5)], vocabulary)
    pairs = _pairs(triplets)
    pairs.measure(reference, ALONE)
    (batch,) = pairs.step(1)
    assert isinstance(batch, PairBatch)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<e>": 0, "a": 1}, "<e>")),
        pad_token="<e>",
        eos_token="<e>",
    )
    arguments = DPOConfig(
        output_dir=str(tmp_path / "trl"),
        beta=pairs.settings.beta,
        loss_type=["sigmoid", "sft"],
        loss_weights=[1.0, pairs.settings.next_token],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
    )
    words = Dataset.from_list([{"prompt": "a", "chosen": "a", "rejected": "a"}])
    trainer = DPOTrainer(theirs, frozen, arguments, train_dataset=words, processing_class=tokenizer)
    # A row for each document: chosen ones first, padded on the right.
    order = [*range(0, len(batch.lengths), 2), *range(1, len(batch.lengths), 2)]
    rows = [triplets.ids(pair) for pair in pairs.packs(0)[0]]
    whole = [
        torch.from_numpy(np.concatenate([rows[i // 2][0], rows[i // 2][1 + i % 2]])) for i in order
    ]
    counted = batch.counted.split(batch.lengths)
    masks = [torch.cat([torch.zeros(1), counted[i]]).long() for i in order]
    pad = torch.nn.utils.rnn.pad_sequence
    inputs = {
        "input_ids": pad(whole, batch_first=True),
        "attention_mask": pad([torch.ones_like(one) for one in whole], batch_first=True),
        "completion_mask": pad(masks, batch_first=True),
    }
    expected = trainer.compute_loss(trainer.model, inputs)
    theirs.zero_grad()
    expected.backward()
    loss = pair_loss(decoder, batch, _tally(), pairs.settings) / len(batch.reference)
    print(f"TRL {expected.item():.7f}, ours {loss.item():.7f}")
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    worst = 0.0
    ours = _gradients(decoder, loss)
    for name, parameter in theirs.named_parameters():
        assert parameter.grad is not None
        difference = (ours[name] - parameter.grad).norm() / parameter.grad.norm()
        worst = max(worst, float(difference))
    print(f"largest relative difference of a gradient {worst:.1e}")
    assert worst <= 1e-5


def _exported(decoder: Decoder, folder: Path, config_record: Callable[..., Any]) -> Path:
    import json

    from safetensors.torch import save_file

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config_record(decoder.config)))
    save_file(dict(decoder.state_dict()), folder / "model.safetensors", {"format": "pt"})
    return folder


def test_before_the_first_step_no_pair_is_preferred(
    tmp_path: Path,
    vocabulary: Vocabulary,
    decoders: tuple[Decoder, Decoder],
    write_triplets: Callable[..., Path],
) -> None:
    decoder, _ = decoders
    pairs = _pairs(Triplets([write_triplets(tmp_path / "t.parquet")], vocabulary), next_token=0.0)
    pairs.measure(decoder, ALONE)
    assert (pairs.reference < 0).all()
    tally = _tally()
    batch = pairs.batch([0, 1, 2])
    loss = pair_loss(decoder, batch, tally, pairs.settings)
    assert loss.item() / 3 == pytest.approx(np.log(2), abs=1e-5)
    assert tally.means()["dpo"] == pytest.approx(np.log(2), abs=1e-5)


def test_a_pair_counts_the_same_in_any_pack(
    tmp_path: Path,
    vocabulary: Vocabulary,
    decoders: tuple[Decoder, Decoder],
    write_triplets: Callable[..., Path],
) -> None:
    decoder, reference = decoders
    pairs = _pairs(Triplets([write_triplets(tmp_path / "t.parquet")], vocabulary))
    pairs.measure(reference, ALONE)
    together = pair_loss(decoder, pairs.batch([0, 1, 2, 3, 4]), _tally(), pairs.settings)
    apart = [pair_loss(decoder, pairs.batch([i]), _tally(), pairs.settings) for i in range(5)]
    assert together.item() == pytest.approx(sum(one.item() for one in apart), rel=1e-5)


def test_an_epoch_has_every_pair_once_and_its_order_is_a_function_of_the_seed(
    tmp_path: Path, vocabulary: Vocabulary, write_triplets: Callable[..., Path]
) -> None:
    grids = [(2 + i % 3, 3) for i in range(23)]
    triplets = Triplets([write_triplets(tmp_path / "t.parquet", grids)], vocabulary)
    pairs = _pairs(triplets, context=150)
    first, second = pairs.packs(0), pairs.packs(1)
    assert sorted(chain(*first)) == sorted(chain(*second)) == list(range(23))
    assert first != second
    assert _pairs(triplets, context=150).packs(1) == second
    for pack in first:
        batch = pairs.batch(pack)
        assert len(batch.ids) == sum(batch.lengths) <= 150
        assert len(batch.lengths) == 2 * len(pack)


def test_ranks_share_a_step_and_a_position_is_all_that_is_kept(
    tmp_path: Path, vocabulary: Vocabulary, write_triplets: Callable[..., Path]
) -> None:
    grids = [(2 + i % 3, 3) for i in range(23)]
    triplets = Triplets([write_triplets(tmp_path / "t.parquet", grids)], vocabulary)
    alone = _pairs(triplets, context=150)
    ranks = [_pairs(triplets, context=150) for _ in range(2)]
    for _ in range(len(alone.packs(0))):  # into the second epoch
        whole = [batch.keys for batch in alone.step(2)]
        parts = [[batch.keys for batch in one.step(2, rank, 2)] for rank, one in enumerate(ranks)]
        assert sorted(whole) == sorted(parts[0] + parts[1])
        assert ranks[0].cursor == ranks[1].cursor == alone.cursor
    again = Pairs(triplets, alone.settings, DataSettings(context=150), 3, alone.cursor)
    assert alone.cursor.epoch == 1
    assert [b.keys for b in again.step(3)] == [b.keys for b in alone.step(3)]
    assert alone.cursor != Position()


def test_pairs_too_long_are_left_out_whole_and_counted(
    tmp_path: Path, vocabulary: Vocabulary, write_triplets: Callable[..., Path]
) -> None:
    triplets = Triplets([write_triplets(tmp_path / "t.parquet", [(2, 2), (9, 9)])], vocabulary)
    pairs = _pairs(triplets, context=64)
    assert pairs.skipped == 1 and pairs.packs(0) == [[0]]
    with pytest.raises(UnimodalError, match=r"no pair .* fits in data.context = 16 .* takes 40"):
        _pairs(triplets, context=16)


def test_what_are_no_triplets_is_said_in_one_line(
    tmp_path: Path, vocabulary: Vocabulary, write_triplets: Callable[..., Path]
) -> None:
    with pytest.raises(UnimodalError, match=r"nowhere.*holds no triplets.*unimodal prefer"):
        Triplets([tmp_path / "nowhere"], vocabulary)
    (tmp_path / "text").write_text("no parquet")
    with pytest.raises(UnimodalError, match="text holds no triplets"):
        Triplets([tmp_path / "text"], vocabulary)
    pq.write_table(pa.table({"prompt": ["a"]}), tmp_path / "other.parquet")
    with pytest.raises(UnimodalError, match=r"other\.parquet holds no triplets .*prompt_ids"):
        Triplets([tmp_path / "other.parquet"], vocabulary)
    with pytest.raises(UnimodalError, match="of another vocabulary"):
        Triplets([write_triplets(tmp_path / "v.parquet", digest="f" * 64)], vocabulary)
    with pytest.raises(UnimodalError, match="rejected_ids are outside the vocabulary"):
        Triplets([write_triplets(tmp_path / "s.parquet", shift=300)], vocabulary)


# --- training -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(
    tmp_path_factory: pytest.TempPathFactory, tiny_shards: Shards, tiny_settings: MakeSettings
) -> Path:
    """The checkpoint that preferences start from."""
    out = tmp_path_factory.mktemp("base") / "ckpt"
    return train([tiny_shards.path], out, tiny_settings("steps=3"))


def _preferring(tiny_settings: MakeSettings, *sets: str) -> TrainSettings:
    return tiny_settings("objective=dpo", "data.context=160", "accumulate=2", *sets)


def _losses(out: Path) -> list[dict[str, Any]]:
    timing = ("tokens_per_s", "elapsed_s")
    records = read_record(out / "metrics.jsonl")
    return [{k: v for k, v in record.items() if k not in timing} for record in records]


def test_training_learns_the_preferences_and_goes_on_as_if_it_had_not_been_stopped(
    tmp_path: Path, base: Path, tiny_settings: MakeSettings, write_triplets: Callable[..., Path]
) -> None:
    file = write_triplets(tmp_path / "t" / "triplets.parquet", [(2 + i % 3, 3) for i in range(9)])
    settings = _preferring(tiny_settings, "steps=24", "checkpoint.every=5", "decoder.dropout=0.1")
    whole = train([file.parent], tmp_path / "whole", settings, init=base)
    losses = _losses(whole)
    assert losses[0]["loss/dpo"] == pytest.approx(np.log(2), abs=0.05)  # dropout
    assert losses[-1]["loss/dpo"] < 0.3
    about = read_json(whole / "data.json")
    assert about["grids"] == read_json(base / "data.json")["grids"] and about["triplets"]

    class Killed(Exception):
        pass

    class KillAt(Progress):
        def show(self, values: Mapping[str, Any]) -> None:
            if values["step"] == 7:
                raise Killed

    with pytest.raises(Killed):
        train([file.parent], tmp_path / "parts", settings, init=base, progress=KillAt())
    train([file.parent], tmp_path / "parts", settings)  # what --init gave is all there
    assert _losses(tmp_path / "parts") == losses
    other = write_triplets(tmp_path / "other.parquet", [(2, 2)] * 9)
    with pytest.raises(UnimodalError, match=r"not those that .* was trained on"):
        train([other], whole, settings, init=base)
    for damaged in (b"cut", b""):
        (whole / "reference.npy").write_bytes(damaged)
        with pytest.raises(UnimodalError, match=r"reference\.npy does not hold the reference's"):
            train([file], whole, settings.model_copy(update={"steps": 25}))


def test_preferences_need_a_checkpoint_to_start_from(
    tmp_path: Path, base: Path, tiny_settings: MakeSettings, write_triplets: Callable[..., Path]
) -> None:
    file = write_triplets(tmp_path / "t.parquet")
    with pytest.raises(UsageError, match="dpo starts from a trained checkpoint: give --init DIR"):
        train([file], tmp_path / "out", _preferring(tiny_settings))
    with pytest.raises(UnimodalError, match="has no vocabulary or no data"):
        bare = base / latest_step(base).name  # type: ignore[union-attr]
        shutil.copytree(bare, tmp_path / "bare")
        train([file], tmp_path / "out", _preferring(tiny_settings), init=tmp_path / "bare")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("mesh", ["shard", "context", "tensor"])
@pytest.mark.slow
def test_every_mesh_prefers_as_one_process(
    tmp_path: Path,
    base: Path,
    tiny_settings: MakeSettings,
    write_triplets: Callable[..., Path],
    mesh: str,
) -> None:
    sys.path.append(str(Path(__file__).parent))  # the fork server imports it by its plain name
    import parallel_ranks as ranks  # type: ignore[import-not-found]

    file = write_triplets(tmp_path / "t.parquet", [(2 + i % 3, 3) for i in range(9)])
    for name, sets in (("one", ()), (mesh, (f"mesh.{mesh}=2",))):
        settings = _preferring(tiny_settings, "steps=3", "optimizer.lr=1e-3", *sets)
        job = partial(train, [file], tmp_path / name, settings, init=base)
        if sets:
            ranks.run(2, job)
        else:
            job()
    expected, found = (np.load(tmp_path / name / "reference.npy") for name in ("one", mesh))
    assert (expected < 0).all()
    assert np.allclose(found, expected, rtol=1e-6)
    one, two = (_losses(tmp_path / name) for name in ("one", mesh))
    for name in ("loss", "loss/dpo", "loss/misranked", "loss/generation/vision", "tokens"):
        assert [r[name] for r in two] == pytest.approx([r[name] for r in one], abs=2e-4), name


@pytest.mark.slow
def test_preferences_raise_the_win_rate_on_unseen_prompts(tmp_path: Path) -> None:
    """A shorter run of the benchmark, which has 50 % before and 84 % after."""
    base = benchmark.make_base(tmp_path, 120, seed=0)
    seen, unseen = (benchmark.prompts(unseen=one) for one in (False, True))
    found = benchmark.proof(tmp_path, base, seen[::2], unseen, color, seed=0, steps=30, n=2)
    assert found["triplets"] == 96 and found["judged"] == 96
    assert found["wins"] >= 0.7
