"""The trainer: it learns, it resumes exactly, and it stops in one clear line."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from unimodal.model import train as trainer
from unimodal.model.checkpoint import keep_inputs, latest_step
from unimodal.model.data import DataSettings, Loader, Samples
from unimodal.model.decoder import Decoder
from unimodal.model.plan import flops_per_token, peak
from unimodal.model.recipe import TrainSettings
from unimodal.model.sample import Sampler
from unimodal.model.train import Interrupted, _Run, train
from unimodal.pipeline.errors import UnimodalError, UsageError
from unimodal.pipeline.progress import Progress
from unimodal.tokenize.shards import Shards
from unimodal.tokenize.training import Record, read_record
from unimodal.tokenize.vision.movq import MoVQ, MoVQConfig
from unimodal.tokenize.vision.tokenizer import VisionTokenizer
from unimodal.tokenize.vocabulary import Vocabulary

MakeShards = Callable[..., Shards]
MakeSettings = Callable[..., TrainSettings]


def _records(out: Path) -> list[dict[str, Any]]:
    timing = ("tokens_per_s", "elapsed_s")
    records = read_record(out / "metrics.jsonl")
    return [{k: v for k, v in record.items() if k not in timing} for record in records]


class _SignalAt(Progress):
    """Sends this process a signal when a step has been shown."""

    def __init__(self, step: int, number: int = signal.SIGTERM) -> None:
        self.step, self.number = step, number

    def show(self, values: Mapping[str, Any]) -> None:
        if values["step"] == self.step:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize(
    "sets",
    [
        (),
        ("decoder.dropout=0.1", "optimizer.kind=muon", "checkpoint.background=false"),
        ("decoder.dropout=0.1", "lora.rank=2", "recompute=selective"),
        ("ema=0.9", "optimizer.schedule=linear", "optimizer.fused=false", "recompute=full"),
        pytest.param(
            ("parameters=bfloat16", "precision=bfloat16", "decoder.dropout=0.1"),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["plain", "muon", "lora", "average", "bfloat16"],
)
def test_an_interrupted_run_has_bit_for_bit_the_losses_of_an_uninterrupted_one(
    tmp_path: Path, tiny_shards: Shards, tiny_settings: MakeSettings, sets: tuple[str, ...]
) -> None:
    settings = tiny_settings(*sets, "log.validate_every=4", "log.every=3", "accumulate=2")
    train([tiny_shards.path], tmp_path / "whole", settings)
    with pytest.raises(Interrupted, match="stopped by SIGTERM at step 3 of 8; saved"):
        train([tiny_shards.path], tmp_path / "parts", settings, progress=_SignalAt(3))
    with pytest.raises(Interrupted, match="SIGINT at step 6"):
        train(
            [tiny_shards.path],
            tmp_path / "parts",
            settings,
            progress=_SignalAt(6, signal.SIGINT),
        )
    train([tiny_shards.path], tmp_path / "parts", settings)
    assert _records(tmp_path / "parts") == _records(tmp_path / "whole")
    whole, parts = (Decoder.load(tmp_path / name).state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_a_second_training_of_a_directory_is_refused_while_one_is_under_way(
    tmp_path: Path, tiny_shards: Shards, tiny_settings: MakeSettings
) -> None:
    class Another(Progress):
        def show(self, values: Mapping[str, Any]) -> None:
            with pytest.raises(UnimodalError, match=f"process {os.getpid()}"):
                train([tiny_shards.path], tmp_path / "run", tiny_settings())

    train([tiny_shards.path], tmp_path / "run", tiny_settings("steps=2"), progress=Another())
    assert latest_step(tmp_path / "run") and not (tmp_path / "run/run.lock").exists()


def test_a_killed_run_goes_on_from_its_last_checkpoint_and_repeats_no_metrics(
    tmp_path: Path, tiny_shards: Shards, tiny_settings: MakeSettings
) -> None:
    settings = tiny_settings("checkpoint.every=3")
    train([tiny_shards.path], tmp_path / "whole", settings)

    class Killed(Exception):
        pass

    class KillAt(Progress):
        def show(self, values: Mapping[str, Any]) -> None:
            if values["step"] == 5:
                raise Killed

    with pytest.raises(Killed):
        train([tiny_shards.path], tmp_path / "parts", settings, progress=KillAt())
    assert latest_step(tmp_path / "parts") == tmp_path / "parts" / "step-00000003"
    left = tmp_path / "parts" / "samples" / ".step-00000003.png.7.tmp"
    left.parent.mkdir(exist_ok=True)
    left.write_bytes(b"half")
    train([tiny_shards.path], tmp_path / "parts", settings)
    assert not left.exists()
    assert _records(tmp_path / "parts") == _records(tmp_path / "whole")


def test_records_count_what_was_too_long_for_the_context(
    tmp_path: Path, tiny_shards: Shards, tiny_settings: MakeSettings
) -> None:
    train([tiny_shards.path], tmp_path, tiny_settings("steps=1", "data.context=41"))
    counted = Loader(Samples([tiny_shards]), DataSettings(context=41), 0).plan.skipped
    assert read_record(tmp_path / "metrics.jsonl")[0]["skipped"] == counted > 0


def test_a_decoder_learns_a_few_pictures_by_heart(
    tmp_path: Path, tiny_shards: Shards, tiny_settings: MakeSettings
) -> None:
    settings = tiny_settings(
        "steps=120",
        "log.every=20",
        "optimizer.lr=0.01",
        "decoder.width=64",
        "data.context=256",
        "data.caption_dropout=0",
        "data.understanding=0",
    )
    train([tiny_shards.path], tmp_path, settings)
    records = [r for r in _records(tmp_path) if "loss" in r]
    assert records[0]["loss/generation/vision"] > 3.5  # of log(64 + ...) = 5.8
    assert records[-1]["loss/generation/vision"] < 0.1
    assert records[-1]["loss/structure"] < 0.1


def test_a_checkpoint_is_self_contained(
    tmp_path: Path, tiny_shards: Shards, tiny_settings: MakeSettings
) -> None:
    out = train([tiny_shards.path], tmp_path / "run", tiny_settings("log.tensorboard=true"))
    assert Vocabulary.load(out / "vocabulary").digest() == tiny_shards.vocabulary.digest()
    digest = VisionTokenizer.load(out / "vision_tokenizer").digest
    assert digest == tiny_shards.manifest["vision_tokenizer"]["digest"]
    about = json.loads((out / "data.json").read_text())
    assert about["grids"][0] == {"kind": "image", "size": [1, 4, 5], "fps": None, "samples": 8}
    assert list((out / "tensorboard").iterdir())
    assert not [path for path in out.rglob("*") if path.suffix in (".pt", ".bin", ".pkl")]


def test_validation_is_reported_by_task_and_modality(
    tmp_path: Path, tiny_shards: Shards, tiny_settings: MakeSettings
) -> None:
    train([tiny_shards.path], tmp_path, tiny_settings("log.validate_every=8"))
    last = _records(tmp_path)[-1]
    tasks = {
        f"validation/{t}/{m}" for t in ("generation", "understanding") for m in ("text", "vision")
    }
    assert set(last) == {"step", "validation/structure", *tasks}


def test_a_loss_that_is_not_finite_stops_with_a_report_and_keeps_the_last_checkpoint(
    tmp_path: Path,
    tiny_shards: Shards,
    tiny_settings: MakeSettings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = tiny_settings("checkpoint.every=2")
    step = _Run.step

    def poisoned(run: _Run) -> dict[str, float]:
        if run.clock.step == 3:
            run.learners.decoder.model.norm.weight.data[0] = float("nan")
        return step(run)

    monkeypatch.setattr(_Run, "step", poisoned)
    with pytest.raises(UnimodalError, match=r"loss is nan .* at step 3; .*not-finite\.json"):
        train([tiny_shards.path], tmp_path, settings)
    report = json.loads((tmp_path / "not-finite.json").read_text())
    assert "model.norm.weight" in report["not_finite"]
    assert report["samples"]
    assert latest_step(tmp_path) == tmp_path / "step-00000002"


def test_other_settings_or_other_shards_are_not_resumed(
    tmp_path: Path,
    tiny_shards: Shards,
    tiny_settings: MakeSettings,
    make_shards: Callable[..., Shards],
) -> None:
    out = train([tiny_shards.path], tmp_path / "run", tiny_settings())
    with pytest.raises(UnimodalError, match=r"optimizer\.lr was 0\.003, now 0\.5"):
        train([tiny_shards.path], out, tiny_settings("optimizer.lr=0.5"))
    with pytest.raises(UnimodalError, match="already holds a run"):
        train([tiny_shards.path], out, tiny_settings(), resume=False)
    codes = [tiny_shards.codes(0)] * 3
    other = make_shards(tmp_path / "other", codes, [["a"], ["b"], ["c"]])
    with pytest.raises(UnimodalError, match="the shards are not those"):
        train([other.path], out, tiny_settings())
    train([tiny_shards.path], out, tiny_settings("steps=9"))  # longer is allowed
    assert latest_step(out) == out / "step-00000009"


def test_shards_of_equal_counts_but_other_samples_order_or_captions_are_not_resumed(
    tmp_path: Path, tiny_settings: MakeSettings, make_shards: Callable[..., Shards]
) -> None:
    codes = [np.full((1, 2, 2), number) for number in range(4)]
    texts = [["a"], ["b"], ["c"], ["d"]]
    first = make_shards(tmp_path / "first", codes, texts)
    second = make_shards(tmp_path / "second", codes, [["e"], ["f"], ["g"], ["h"]])
    settings = tiny_settings("steps=1")
    out = train([first.path, second.path], tmp_path / "run", settings)
    foreign = make_shards(tmp_path / "foreign", codes, texts, prefix="other")
    retold = make_shards(tmp_path / "retold", codes, [["a"], ["b"], ["z"], ["d"]])
    for shards in ([second, first], [foreign, second], [retold, second]):
        with pytest.raises(UnimodalError, match="the shards are not those"):
            train([one.path for one in shards], out, settings)
    again = make_shards(tmp_path / "again", codes, texts)  # elsewhere, the same
    train([again.path, second.path], out, settings.model_copy(update={"steps": 2}))


def test_a_start_that_never_saved_leaves_no_vocabulary_to_the_next(
    tmp_path: Path,
    tiny_shards: Shards,
    tiny_settings: MakeSettings,
    make_shards: Callable[..., Shards],
) -> None:
    torch.manual_seed(1)
    another = VisionTokenizer(MoVQ(MoVQConfig(codebook_size=64, ch=32, num_res_blocks=1)))
    other = make_shards(tmp_path / "other", [tiny_shards.codes(0)] * 2, [["a"], ["b"]], by=another)
    out = tmp_path / "run"
    keep_inputs(out, other)
    (out / "vocabulary" / "stale").write_text("")
    train([tiny_shards.path], out, tiny_settings("steps=1"))
    digest = VisionTokenizer.load(out / "vision_tokenizer").digest
    assert digest == tiny_shards.manifest["vision_tokenizer"]["digest"]
    assert not (out / "vocabulary" / "stale").exists()
    with pytest.raises(UsageError, match=r"directory of shards, no checkpoint.*choose another"):
        train([tiny_shards.path], other.path, tiny_settings("steps=1"))


def test_where_no_sample_can_be_drawn_training_says_so_and_goes_on(
    tmp_path: Path, tiny_shards: Shards, tiny_settings: MakeSettings, make_shards: MakeShards
) -> None:
    class Noted(Progress):
        def note(self, text: str) -> None:
            notes.append(text)

    notes: list[str] = []
    clips = make_shards(tmp_path / "clips", [np.zeros((2, 2, 3), int)] * 4, [["a"]] * 4)
    settings = tiny_settings("steps=1", "log.sample_every=1")
    out = train([clips.path], tmp_path / "ckpt", settings, progress=Noted())
    assert latest_step(out) and not (out / "samples").exists()
    assert any(n.startswith("no samples at step 1: ") and "any image" in n for n in notes)


def test_a_tokenizer_that_cannot_be_copied_is_one_line(
    tmp_path: Path, tiny_shards: Shards, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".vocabulary.1.tmp").mkdir()

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shutil, "copytree", full)
    with pytest.raises(UnimodalError, match=r"could not be copied .*No space left.*make room"):
        keep_inputs(tmp_path, tiny_shards)
    assert not [*tmp_path.iterdir()]


def test_a_folder_of_something_else_is_left_alone(
    tmp_path: Path, tiny_shards: Shards, tiny_settings: MakeSettings
) -> None:
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(UsageError, match="not empty and not a checkpoint: choose another -o"):
        train([tiny_shards.path], tmp_path, tiny_settings("steps=1"))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_fewer_steps_than_are_done_already_are_refused(
    tmp_path: Path, tiny_shards: Shards, tiny_settings: MakeSettings
) -> None:
    out = train([tiny_shards.path], tmp_path, tiny_settings())
    before = (out / "config.toml").read_text()
    with pytest.raises(UsageError, match="done 8 steps already, and steps = 4 asks for fewer"):
        train([tiny_shards.path], out, tiny_settings("steps=4"))
    assert (out / "config.toml").read_text() == before
    train([tiny_shards.path], out, tiny_settings())  # found finished
    assert latest_step(out) == out / "step-00000008"


def test_a_run_starts_from_given_weights_of_its_shape_and_data(
    tmp_path: Path,
    tiny_shards: Shards,
    tiny_settings: MakeSettings,
    make_shards: Callable[..., Shards],
) -> None:
    first = train([tiny_shards.path], tmp_path / "first", tiny_settings())
    still = tiny_settings("steps=1", "optimizer.lr=1e-12", "needs_init=true", "seed=7")
    second = train([tiny_shards.path], tmp_path / "second", still, init=first)
    before, after = (Decoder.load(path).state_dict() for path in (first, second))
    assert all(torch.allclose(before[name], after[name], atol=1e-9) for name in before)
    # Resumed, it goes on from its own weights.
    train([tiny_shards.path], second, still.model_copy(update={"steps": 2}))

    out = tmp_path / "third"
    with pytest.raises(UsageError, match=r"give --init DIR"):
        train([tiny_shards.path], out, still)
    with pytest.raises(UsageError, match=r"another shape \(.*width 32, not 48\); set decoder"):
        train([tiny_shards.path], out, tiny_settings("decoder.width=48"), init=first)
    with pytest.raises(UnimodalError, match="no checkpoint at"):
        train([tiny_shards.path], out, tiny_settings(), init=tmp_path / "nowhere")
    torch.manual_seed(1)
    another = VisionTokenizer(MoVQ(MoVQConfig(codebook_size=64, ch=32, num_res_blocks=1)))
    codes = [tiny_shards.codes(0)] * 2
    other = make_shards(tmp_path / "other", codes, [["a"], ["b"]], by=another)
    with pytest.raises(UsageError, match="trained with another vision tokenizer"):
        train([other.path], out, tiny_settings(), init=first)
    foreign = tmp_path / "foreign"  # weights alone: what their ids mean is the user's word
    shutil.copytree(latest_step(first), foreign)
    train([other.path], out, tiny_settings("steps=1"), init=foreign)
    config = json.loads((foreign / "config.json").read_text())
    (foreign / "config.json").write_text(json.dumps(config | {"vocab_size": 99}))
    with pytest.raises(UsageError, match="has 99 ids, the vocabulary of the shards"):
        train([other.path], tmp_path / "fourth", tiny_settings(), init=foreign)


def test_an_average_of_the_weights_is_what_is_measured_and_saved(
    tmp_path: Path, tiny_shards: Shards, tiny_settings: MakeSettings
) -> None:
    sets = ("log.validate_every=8", "log.validate_samples=2")
    plain = train([tiny_shards.path], tmp_path / "plain", tiny_settings(*sets))
    out = train([tiny_shards.path], tmp_path / "averaged", tiny_settings(*sets, "ema=0.9"))
    (a, *_), (b, *_) = (
        [r for r in _records(o) if "validation/structure" in r] for o in (plain, out)
    )
    assert a["validation/structure"] != b["validation/structure"]
    # The decoder that is trained is the same; the average lags behind it.
    assert [r.get("loss") for r in _records(plain)] == [r.get("loss") for r in _records(out)]
    last = load_file(out / "step-00000008" / "trained.safetensors")
    weights = Decoder.load(plain).state_dict()
    assert all(torch.equal(last[f"trained.{name}"], weights[name]) for name in weights)
    shown = Decoder.load(out)
    assert not torch.equal(shown.lm_head.weight, weights["lm_head.weight"])
    assert b["validation/structure"] > a["validation/structure"]


def test_weights_and_biases_gets_the_records_when_asked(
    tmp_path: Path,
    tiny_shards: Shards,
    tiny_settings: MakeSettings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = tiny_settings("log.wandb=emoji", "steps=2")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UsageError, match="pip install wandb"):
        train([tiny_shards.path], tmp_path / "without", settings)
    logged: list[dict[str, Any]] = []
    online = SimpleNamespace(
        log=logged.append, define_metric=lambda *_, **__: None, finish=lambda: logged.append({})
    )
    began: dict[str, Any] = {}
    fake = SimpleNamespace(init=lambda **kwargs: began.update(kwargs) or online)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    train([tiny_shards.path], tmp_path / "with", settings)
    assert (began["project"], began["name"], began["config"]["steps"]) == ("emoji", "with", 2)
    assert [row.get("step") for row in logged] == [1, 2, None]
    assert {"loss", "lr", "tokens_per_s"} <= logged[0].keys()


def test_utilisation_is_operations_per_second_of_the_peak(
    tmp_path: Path, tiny_shards: Shards, tiny_settings: MakeSettings, monkeypatch: Any
) -> None:
    monkeypatch.setattr(trainer, "peak", lambda device: 1e9)
    sets = ("precision=bfloat16", "log.every=2", "steps=4", "data.context=64")
    train([tiny_shards.path], tmp_path, tiny_settings(*sets))
    settings = tiny_settings(*sets)
    for row in read_record(tmp_path / "metrics.jsonl"):
        # Documents of at most 64 tokens: attention is a few percent of the matrices' operations.
        least = sum(flops_per_token(settings, tiny_shards.vocabulary.size, [1]))
        most = sum(flops_per_token(settings, tiny_shards.vocabulary.size, [64]))
        assert least < row["mfu"] * 1e9 / row["tokens_per_s"] < most
    assert peak(torch.device("cpu")) is None


def test_minutes_shorten_the_schedule_and_the_learning_rate_with_it(
    tmp_path: Path, tiny_shards: Shards, tiny_settings: MakeSettings
) -> None:
    settings = tiny_settings("steps=100000", "minutes=0.03", "log.every=16")
    train([tiny_shards.path], tmp_path, settings)
    last = read_record(tmp_path / "metrics.jsonl")[-1]
    assert last["step"] < 5000
    assert last["elapsed_s"] < 10  # 1.8 s were asked for; the machine may be busy
    assert last["lr"] < 0.1 * settings.optimizer.lr


def test_other_steps_or_minutes_of_a_resumed_run_count(
    tmp_path: Path, tiny_shards: Shards, tiny_settings: MakeSettings
) -> None:
    timed = tiny_settings("steps=100000", "minutes=0.01")
    out = train([tiny_shards.path], tmp_path, timed)
    done = latest_step(out)
    train([tiny_shards.path], out, timed)  # found finished, though the pace would allow others
    assert latest_step(out) == done and done is not None
    more = int(done.name[-8:]) + 3
    train([tiny_shards.path], out, tiny_settings(f"steps={more}", "minutes=60"))
    assert latest_step(out) == out / f"step-{more:08d}"
    # What was asked for and not yet saved is asked for again; the pace so far says how much it is.
    state = json.loads((out / f"step-{more:08d}" / "train.json").read_text())
    minutes = 1.2 * state["elapsed_s"] / 60
    train([tiny_shards.path], out, tiny_settings("steps=100000", f"minutes={minutes}"))
    assert more < int((out / "latest").read_text()[-9:]) < 3 * more + 50


def test_a_step_without_targets_is_skipped_and_settings_that_have_none_refused(
    tmp_path: Path, tiny_settings: MakeSettings, make_shards: Callable[..., Shards]
) -> None:
    codes, told = [np.full((1, 5, 5), i) for i in range(6)], [["a"], *[[]] * 5]
    shards = make_shards(tmp_path / "s", codes, told)
    sets = ("data.vision_weight=0", "data.described_vision_weight=0", "data.context=64", "steps=12")
    settings = tiny_settings(*sets, "data.understanding=1", "checkpoint.every=1")
    out = train([shards.path], tmp_path / "run", settings)
    losses = [record["loss"] for record in _records(out)]
    assert losses.count(0.0) >= 8 and any(losses)  # one document of six has a caption
    with pytest.raises(Interrupted):
        parts = tmp_path / "parts"
        train([shards.path], parts, settings, progress=_SignalAt(losses.index(max(losses))))
    train([shards.path], parts, settings)
    assert _records(parts) == _records(out)
    silent = make_shards(tmp_path / "silent", codes, [[]] * 6)
    for one, more in ((silent, ()), (shards, ("data.understanding=0", "data.caption_weight=0"))):
        with pytest.raises(UsageError, match=r"nothing would be learned: data\.vision_weight is 0"):
            train([one.path], tmp_path / "none", tiny_settings(*sets, *more))


def test_a_place_in_the_data_of_another_version_is_refused_with_the_remedy(
    tmp_path: Path, tiny_shards: Shards, tiny_settings: MakeSettings
) -> None:
    out = train([tiny_shards.path], tmp_path, tiny_settings())
    file = out / "step-00000008" / "train.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"cursor": {"epoch": 1, "at": 3}}))
    with pytest.raises(UnimodalError, match=r"saved by another version.* with --init"):
        train([tiny_shards.path], out, tiny_settings("steps=9"))
    file.write_text(json.dumps(json.loads(file.read_text()) | {"step": "eight"}))
    with pytest.raises(UnimodalError, match=r"train\.json is damaged \(step: .*copy the"):
        train([tiny_shards.path], out, tiny_settings("steps=9"))
    about = json.loads((out / "data.json").read_text())
    (out / "data.json").write_text(json.dumps(about | {"vocabulary": 7}))
    with pytest.raises(UnimodalError, match=r"data\.json is damaged \(vocabulary: "):
        Sampler.for_checkpoint(out, Decoder.load(out / "step-00000008"))


def test_shards_without_training_samples_are_refused(
    tmp_path: Path, tiny_settings: MakeSettings, make_shards: Callable[..., Shards]
) -> None:
    shards = make_shards(tmp_path / "s", [np.zeros((1, 2, 2), int)], [["a"]], val=(0,))
    with pytest.raises(UnimodalError, match="hold no training sample"):
        train([shards.path], tmp_path / "run", tiny_settings())
    with pytest.raises(UnimodalError, match="no shards given"):
        train([], tmp_path / "run", tiny_settings())
    with pytest.raises(UnimodalError, match="device nonsense cannot be used"):
        train([shards.path], tmp_path / "run2", tiny_settings("device=nonsense"))


def test_metrics_drop_what_a_killed_run_wrote_behind_its_checkpoint(tmp_path: Path) -> None:
    metrics = Record(tmp_path, 0, tensorboard=False)
    for step in (1, 2, 3):
        metrics.write(step, {"loss": 0.5})
    metrics.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # cut short
    with (tmp_path / "metrics.jsonl").open() as before:
        Record(tmp_path, 2, tensorboard=False).close()
        replaced = (tmp_path / "metrics.jsonl").stat()
        assert not os.path.samestat(os.fstat(before.fileno()), replaced)  # whole at any moment
    assert [record["step"] for record in read_record(tmp_path / "metrics.jsonl")] == [1, 2]
