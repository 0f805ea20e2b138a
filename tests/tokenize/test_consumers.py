"""What is written for our own training is read by the tools it is named after."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from unimodal.tokenize.shards import Sample, ShardWriter
from unimodal.tokenize.training import Record
from unimodal.tokenize.vocabulary import Vocabulary


def _sample(key: str, frames: int) -> Sample:
    rng = np.random.default_rng(frames)
    return Sample(
        key=key,
        uid=key,
        kind="image" if frames == 1 else "video",
        codes=rng.integers(0, 256, (frames, 3, 5)),
        split="train",
        source_sha256="0" * 64,
        fps=None if frames == 1 else 8.0,
        captions=[{"style": "given", "lang": "en", "text": f"a {key} é", "tokens": 9}],
    )


@pytest.mark.slow
def test_energon_prepares_and_loads_token_shards(tmp_path: Path, block_mean: Any) -> None:
    energon = pytest.importorskip("megatron.energon")
    writer = ShardWriter(tmp_path, block_mean, Vocabulary.bytes(256), {})
    truth = {"a": _sample("a", 1), "b": _sample("b", 3), "c": _sample("c", 2)}
    writer.write(0, "one", [truth["a"], truth["b"]])
    writer.write(1, "two", [truth["c"]])
    writer.finish(2)
    code = "from megatron.energon.cli.main import main; main()"
    command = [sys.executable, "-c", code, "prepare", str(tmp_path), "--non-interactive"]
    command += ["--no-progress", "--num-workers", "1", "--sample-type", "CrudeWebdataset"]
    command += ["--split-parts", "train:shard-.*"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr

    @energon.stateless
    def cook(sample: dict[str, Any]) -> dict[str, Any]:
        return sample

    class Encoder(energon.DefaultTaskEncoder):  # type: ignore[misc]
        cookers = [energon.Cooker(cook)]  # noqa: RUF012

        def batch(self, samples: list[Any]) -> Any:
            return samples[0]

        def encode_batch(self, batch: Any) -> Any:
            return batch

    data = energon.get_train_dataset(
        str(tmp_path),
        batch_size=1,
        worker_config=energon.WorkerConfig(rank=0, world_size=1, num_workers=0),
        shuffle_buffer_size=None,
        max_samples_per_sequence=None,
        repeat=False,
        task_encoder=Encoder(),
    )
    seen = {sample["__key__"].split("/")[-1]: sample for sample in energon.get_loader(data)}
    assert set(seen) == set(truth)
    for key, sample in seen.items():
        np.testing.assert_array_equal(np.asarray(sample["vision.npy"]), truth[key].codes)
        assert sample["json"]["captions"][0]["text"] == f"a {key} é"


def test_tensorboard_reads_a_training_that_was_resumed(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = Record(tmp_path, 0, tensorboard=True)
    for step in range(1, 7):
        first.write(step, {"train/loss": 10.0 / step, "train/lr": 1e-3})
    first.close()
    # Killed after step 6, with a save at step 4: steps 5 and 6 are computed again.
    again = Record(tmp_path, 4, tensorboard=True)
    for step in range(5, 9):
        again.write(step, {"train/loss": 1.0 / step})
    again.close()
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(board.Tags()["scalars"]) == {"train/loss", "train/lr"}
    loss = {event.step: event.value for event in board.Scalars("train/loss")}
    assert len(board.Scalars("train/loss")) == len(loss) == 8  # each step once
    for step, value in loss.items():
        expected = 10.0 / step if step <= 4 else 1.0 / step
        assert math.isclose(value, expected, rel_tol=1e-6), step
