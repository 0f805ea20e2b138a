"""The trainer: it learns, it resumes exactly, and it stops in one clear line."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from unimodal.model.checkpoint import latest_step
from unimodal.model.decoder import Decoder
from unimodal.model.recipe import TrainSettings
from unimodal.model.train import Interrupted, _Run, train
from unimodal.pipeline.errors import UnimodalError
from unimodal.pipeline.progress import Progress
from unimodal.tokenize.shards import Shards
from unimodal.tokenize.training import Record, read_record
from unimodal.tokenize.vision.tokenizer import VisionTokenizer
from unimodal.tokenize.vocabulary import Vocabulary

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


@pytest.mark.parametrize(("dropout", "optimizer"), [("0.0", "adamw"), ("0.1", "muon")])
def test_an_interrupted_run_has_bit_for_bit_the_losses_of_an_uninterrupted_one(
    tmp_path: Path, tiny_shards: Shards, tiny_settings: MakeSettings, dropout: str, optimizer: str
) -> None:
    settings = tiny_settings(
        f"decoder.dropout={dropout}",
        f"optimizer.kind={optimizer}",
        "log.validate_every=4",
        "log.every=3",
        "accumulate=2",
    )
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
    train([tiny_shards.path], tmp_path / "parts", settings)
    assert _records(tmp_path / "parts") == _records(tmp_path / "whole")


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


def test_minutes_shorten_the_schedule_and_the_learning_rate_with_it(
    tmp_path: Path, tiny_shards: Shards, tiny_settings: MakeSettings
) -> None:
    settings = tiny_settings("steps=100000", "minutes=0.03", "log.every=16")
    train([tiny_shards.path], tmp_path, settings)
    last = read_record(tmp_path / "metrics.jsonl")[-1]
    assert last["step"] < 5000
    assert last["elapsed_s"] < 10  # 1.8 s were asked for; the machine may be busy
    assert last["lr"] < 0.1 * settings.optimizer.lr


def test_shards_without_training_samples_are_refused(
    tmp_path: Path, tiny_settings: MakeSettings, make_shards: Callable[..., Shards]
) -> None:
    import numpy as np

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
    Record(tmp_path, 2, tensorboard=False).close()
    assert [record["step"] for record in read_record(tmp_path / "metrics.jsonl")] == [1, 2]
