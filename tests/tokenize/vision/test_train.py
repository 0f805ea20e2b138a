"""Training a tokenizer: it learns, resumes to the same bytes, stops cleanly, and runs on ranks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from skimage.data import astronaut, coffee

from unimodal.pipeline.errors import UnimodalError, UsageError
from unimodal.pipeline.lock import run_lock
from unimodal.pipeline.progress import Progress
from unimodal.pipeline.settings import build
from unimodal.tokenize.vision import bank as banks
from unimodal.tokenize.vision import train as trainer
from unimodal.tokenize.vision.bank import Bank, held_out, list_spans
from unimodal.tokenize.vision.evaluate import evaluate
from unimodal.tokenize.vision.movq import MoVQ, MoVQConfig
from unimodal.tokenize.vision.pixels import to_pixels
from unimodal.tokenize.vision.recipe import DataSettings, TokenizerSettings
from unimodal.tokenize.vision.tokenizer import VisionTokenizer
from unimodal.tokenize.vision.train import Interrupted, train_tokenizer

# The smallest network of the architecture, and everything that has a state switched on; what the
# recipe of the command has otherwise than the defaults is said.
TINY = [
    "clip_share=0.15",
    "codebook.decay=0.99",
    "loss.sharpness=0.3",
    "optimizer.encoder=1.0",
    "network.codebook_size=32",
    "network.embed_dim=4",
    "network.ch_mult=[1,1,1,1]",
    "steps=6",
    "batch=4",
    "crop=32",
    "save_every=3",
    "log_every=2",
    "tensorboard=false",
    "data.val_fraction=0.3",
    "optimizer.warmup=1",
    "codebook.revive_every=2",
    "loss.adversarial=0.1",
    "discriminator.width=8",
    "discriminator.start=1",
]


def _settings(*sets: str) -> TokenizerSettings:
    return build(TokenizerSettings, sets=[*TINY, *sets])


def _rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(8):
        cut = (astronaut() if i % 2 else coffee())[i * 20 : i * 20 + 96, 100:220]
        Image.fromarray(np.ascontiguousarray(cut)).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def whole(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted training."""
    return train_tokenizer([pictures], tmp_path_factory.mktemp("whole"), _settings())


class _Kill(Progress):
    """Sends this process a signal while the second step is being done."""

    def advance(self, task: str, amount: float = 1.0) -> None:
        self.seen = getattr(self, "seen", 0) + (task == "steps" and amount == 1)
        if self.seen == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_directory_that_another_process_writes_to_is_refused(
    pictures: Path, tmp_path: Path
) -> None:
    with run_lock(tmp_path, Progress()):
        with pytest.raises(UnimodalError, match=f"process {os.getpid()}"):
            train_tokenizer([pictures], tmp_path, _settings())
        assert [path.name for path in tmp_path.iterdir()] == ["run.lock"]


def test_a_training_stopped_by_sigterm_and_resumed_ends_with_the_same_bytes(
    pictures: Path, whole: Path, tmp_path: Path
) -> None:
    with pytest.raises(Interrupted, match=r"step 2 of 6.*same command"):
        train_tokenizer([pictures], tmp_path, _settings(), progress=_Kill())
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    left = tmp_path / "grids" / ".000003.png.7.tmp"  # of a process that was killed
    left.parent.mkdir(exist_ok=True)
    left.write_bytes(b"half")
    train_tokenizer([pictures], tmp_path, _settings())
    assert not left.exists()
    ours, theirs = (load_file(d / "state.safetensors") for d in (tmp_path, whole))
    parts = {name.partition(".")[0] for name in ours}
    assert parts == {"model", "average", "optimizer", "book", "judge", "judge_optimizer"}
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    names = ("model.safetensors", "config.json", "grids/000006.png")
    assert all((tmp_path / n).read_bytes() == (whole / n).read_bytes() for n in names)
    timed = [{k: v for k, v in row.items() if k != "seconds"} for row in _rows(tmp_path)]
    assert timed == [{k: v for k, v in row.items() if k != "seconds"} for row in _rows(whole)]


def test_what_is_exported_is_the_average_and_loads(whole: Path) -> None:
    state = load_file(whole / "state.safetensors")
    weights = VisionTokenizer.load(whole).model.state_dict()
    assert all(torch.equal(weights[name], state[f"average.{name}"]) for name in weights)
    assert any(not torch.equal(weights[name], state[f"model.{name}"]) for name in weights)


def test_records_tell_losses_and_held_out_quality(whole: Path) -> None:
    rows = _rows(whole)
    assert [row["step"] for row in rows] == [2, 3, 4, 6, 6]
    assert {"loss", "l2", "sharpness", "commitment", "adversarial", "hinge", "lr"} <= rows[0].keys()
    measured = {"val_psnr", "val_ssim", "val_usage", "val_perplexity"}
    assert measured <= rows[1].keys() and measured <= rows[4].keys()


def test_from_a_start_it_soon_paints_better(pictures: Path, tmp_path: Path) -> None:
    sets = ["steps=24", "log_every=1", "optimizer.lr=4e-3", "loss.adversarial=0", "ema=0.5"]
    sets += ["save_every=24", "network.ch_mult=[1,1,1,4]", "data.val_fraction=0"]
    train_tokenizer([pictures], tmp_path, _settings(*sets))
    l2 = [row["l2"] for row in _rows(tmp_path)]
    assert np.mean(l2[-5:]) < 0.8 * np.mean(l2[:3])


@pytest.mark.parametrize("kind", ["ema", "gradient"])
def test_both_kinds_of_codebook_move_and_start_from_given_weights(
    pictures: Path, whole: Path, tmp_path: Path, kind: str
) -> None:
    sets = ["steps=2", f"codebook.kind={kind}", "ema=0", "optimizer.kind=adamw"]
    train_tokenizer([pictures], tmp_path, _settings(*sets, "loss.pixel=l1"), init=whole)
    before, after = (load_file(d / "model.safetensors") for d in (whole, tmp_path))
    name = "quantize.embedding.weight"
    assert 0 < (before[name] - after[name]).abs().max() < 3
    assert "l1" in _rows(tmp_path)[0] and "revived" in _rows(tmp_path)[0]


def test_other_settings_and_shapes_are_refused_by_name(
    pictures: Path, whole: Path, tmp_path: Path
) -> None:
    with pytest.raises(UnimodalError, match=r"other settings \(optimizer\.lr\).*--init"):
        train_tokenizer([pictures], whole, _settings("optimizer.lr=5e-4"))
    with pytest.raises(UnimodalError, match=r"other pictures or clips.*--init"):
        train_tokenizer([pictures / "0.png", pictures / "1.png"], whole, _settings())
    with pytest.raises(UsageError, match="codebook_size 32, not 64"):
        train_tokenizer([pictures], tmp_path, _settings("network.codebook_size=64"), init=whole)
    with pytest.raises(UsageError, match="crop = 36"):
        _settings("crop=36")
    with pytest.raises(UsageError, match="give --init"):
        train_tokenizer([pictures], tmp_path, _settings("needs_init=true"))


def test_a_loss_that_is_not_finite_stops_with_a_report(
    pictures: Path, whole: Path, tmp_path: Path
) -> None:
    with pytest.raises(UnimodalError, match=r"the loss is .* lower optimizer\.lr"):
        train_tokenizer([pictures], tmp_path, _settings("optimizer.lr=1e30"), init=whole)
    report = json.loads((tmp_path / "not-finite.json").read_text())
    assert report["step"] >= 1 and report["not_finite"]
    assert not (tmp_path / "model.safetensors").exists()


def test_a_full_memory_names_the_settings_to_lower(
    pictures: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(trainer._Run, "losses", full)
    with pytest.raises(UnimodalError, match=r"lower batch \(now 4\) or crop \(now 32\)"):
        train_tokenizer([pictures], tmp_path, _settings(), init=whole)


def test_crops_depend_on_their_place_alone_and_ranks_share_them_out() -> None:
    rng = np.random.default_rng(0)
    bank = Bank(
        pictures=[rng.integers(256, size=(80, 90, 3), dtype=np.uint8) for _ in range(5)],
        clips=[rng.integers(256, size=(8, 50, 60, 3), dtype=np.uint8) for _ in range(3)],
    )
    shapes = set()
    for step in range(12):
        cut = {"frames": 16, "crop": 32, "clip_share": 0.5}
        together = banks.batch(bank, 7, step, **cut)
        halves = [banks.batch(bank, 7, step, **cut, part=(i, 2)) for i in range(2)]
        assert np.array_equal(together, np.concatenate(halves))
        shapes.add(together.shape[:2])
        assert len({crop.tobytes() for crop in together}) == len(together)
    assert shapes == {(16, 1), (4, 4), (2, 8)}
    assert not np.array_equal(banks.batch(bank, 7, 0, **cut), banks.batch(bank, 8, 0, **cut))


def test_clips_of_a_run_are_learned_without_their_bars(
    tmp_path: Path, whole: Path, write_video: Callable[..., Path], moving: Callable[..., Any]
) -> None:
    frames = [np.pad(f, ((16, 16), (0, 0), (0, 0))) for f in moving(50, (96, 128))]
    names = ["a.mp4", "b.mp4", "c.mp4"]
    share = next(f / 100 for f in range(100) if sum(held_out(n, f / 100) for n in names) == 1)
    rows = [
        {"uri": str(write_video(tmp_path / name, frames)), "kind": "video", "verdict": "keep"}
        | {"start_pts": None, "end_pts": None, "fps": 25.0}
        | {"crop_x0": 0, "crop_y0": 16, "crop_x1": 128, "crop_y1": 112}
        for name in names
    ]
    rows.append({**rows[0], "uri": "nowhere.mp4", "verdict": "drop"})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "clips.parquet")
    wanted = DataSettings(clip_frames=8, val_fraction=share)
    data = banks.load_bank(list_spans([tmp_path]), wanted, Progress())
    assert [clip.shape for clip in data.clips] == [(8, 96, 128, 3)] * 2
    assert all(np.abs(clip[:, [0, -1]].mean()) > 30 for clip in data.clips)
    # The texture moves by a pixel a frame, so two pixels from one kept frame to the next.
    clip = data.clips[0].astype(int)
    assert np.abs(clip[1, :, 2:] - clip[0, :, :-2]).mean() < 6
    assert np.abs(clip[1] - clip[0]).mean() > 6
    sets = ["steps=4", "data.clip_frames=8", f"data.val_fraction={share}", "batch=8"]
    train_tokenizer([tmp_path], tmp_path / "out", _settings(*sets), init=whole)
    assert {"val_video_psnr", "val_video_usage"} <= _rows(tmp_path / "out")[-1].keys()


def test_holding_out_goes_by_name_and_share() -> None:
    names = [f"/somewhere/{i:04x}.png" for i in range(2000)]
    share = np.mean([held_out(name, 0.1) for name in names])
    assert 0.07 < share < 0.13
    assert [held_out(n, 0.1) for n in names] == [held_out("/other" + n, 0.1) for n in names]


def test_nothing_to_train_on_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        list_spans([tmp_path / "missing"])
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(UnimodalError, match="no picture or video found"):
        list_spans([tmp_path])


@pytest.mark.slow
def test_two_processes_do_what_one_does_and_one_goes_on_from_there(
    pictures: Path, whole: Path, tmp_path: Path
) -> None:
    """Float32 and a constant rate: only the order of sums differs. The discriminator's BatchNorm
    is of each process's frames, as published, so it is left out."""
    sets = ["bf16=false", "optimizer.kind=adamw", "optimizer.warmup=0", "optimizer.min_lr=2e-3"]
    sets += ["loss.adversarial=0", "optimizer.weight_decay=0", "save_every=2"]
    one, two = tmp_path / "one", tmp_path / "two"
    train_tokenizer([pictures], one, _settings(*sets), init=whole)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", "unimodal.cli", "train-tokenizer", str(pictures)]
    command += ["--init", str(whole), "-q", "--device", "cpu", "-o", str(two)]
    for item in [*TINY, *sets, "steps=4"]:
        command += ["--set", item]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=250)
    assert _rows(two)[-1]["step"] == 4
    train_tokenizer([pictures], two, _settings(*sets), init=whole)
    _same(one, two)


def _same(one: Path, two: Path) -> None:
    """Same records, codebook and latents. Weights by themselves may differ: a bias before a norm
    of single channels has no gradient but noise, which AdamW makes a step of."""
    rows = [_rows(d) for d in (one, two)]
    for mine, other in zip(*rows, strict=True):
        assert mine.keys() == other.keys()
        for name in mine.keys() - {"seconds"}:
            assert np.isclose(mine[name], other[name], rtol=1e-4), name
    ours, theirs = load_file(one / "state.safetensors"), load_file(two / "state.safetensors")
    for name in ("book.count", "book.total", "average.quantize.embedding.weight"):
        assert torch.allclose(ours[name], theirs[name], atol=1e-4), name
    pixels = to_pixels(astronaut()[:64, 200:264])[None, None]
    latents = [VisionTokenizer.load(d).model.latents(pixels) for d in (one, two)]
    assert torch.allclose(*latents, atol=1e-4)


def test_a_damaged_state_says_what_to_do(pictures: Path, tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "state.safetensors")
    with pytest.raises(UnimodalError, match=r"cannot be read.*delete it"):
        train_tokenizer([pictures], tmp_path, _settings())


def test_a_kept_encoder_must_begin_as_something(pictures: Path, tmp_path: Path) -> None:
    narrow = _settings("network.ch_mult=[1,1,2,2]", "optimizer.encoder=0")
    with pytest.raises(UsageError, match="too narrow for patches' principal components"):
        train_tokenizer([pictures], tmp_path / "out", narrow)


def test_held_out_pictures_of_any_size_are_measured_or_left_out() -> None:
    model = MoVQ(MoVQConfig(codebook_size=32, ch=32, ch_mult=(1, 1, 1, 1, 1), num_res_blocks=1))
    rng = np.random.default_rng(0)
    sizes = [(14, 40), (5, 90), (40, 40), (64, 33)]
    held = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    clips = [rng.integers(0, 256, (4, *size, 3), dtype=np.uint8) for size in ((40, 70), (9, 9))]
    bank = Bank(pictures=[], clips=[], held_pictures=held, held_clips=clips)
    measured, sheet = evaluate(model, bank, "cpu")
    assert {"val_psnr", "val_ssim", "val_video_psnr"} <= measured.keys()
    assert sheet is not None
    assert evaluate(model, Bank(held_pictures=held[:2]), "cpu") == ({}, None)
