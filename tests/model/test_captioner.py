"""A checkpoint as a captioner: alone, in a run and between pipes; and how often one is right."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from benchmarks.self_captioner import KINDS
from unimodal.cli.app import main
from unimodal.model.captioner import ENTRY, CheckpointDescriber, media, open_checkpoint
from unimodal.model.recipe import TrainSettings
from unimodal.model.sample import Sampler
from unimodal.model.train import train
from unimodal.pipeline.captioning.captioner import Answer, Ask, Failure
from unimodal.pipeline.captioning.describe import open_source
from unimodal.pipeline.captioning.settings import CaptionSettings
from unimodal.pipeline.errors import UnimodalError
from unimodal.pipeline.presets import CurateSettings
from unimodal.pipeline.run import Run, curate
from unimodal.pipeline.settings import build
from unimodal.tokenize.shards import Shards

SAID = "a quick brown"
ONE_CORE = {"OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
CURATE = 'skip=["text", "quality", "embed", "nsfw", "dedup", "match"]', "decide.image_min_area=0"


@pytest.fixture(scope="module")
def checkpoint(
    tmp_path_factory: pytest.TempPathFactory,
    make_shards: Callable[..., Shards],
    tiny_settings: Callable[..., TrainSettings],
) -> Path:
    """It says the same of every picture, and has seen no clip."""
    folder = tmp_path_factory.mktemp("says")
    rng = np.random.default_rng(0)
    codes = [rng.integers(0, 64, (1, 4, 4)) for _ in range(8)]
    shards = make_shards(folder / "shards", codes, [[SAID]] * 8)
    sets = "steps=80", "data.understanding=1.0", "data.described_vision_weight=0.0"
    return train([shards.path], folder / "ckpt", tiny_settings(*sets, "optimizer.lr=1e-2"))


@pytest.fixture(scope="module")
def stammering(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_shards: Shards,
    tiny_settings: Callable[..., TrainSettings],
) -> Path:
    """It has learned next to nothing, and says of each picture and clip something else."""
    out = tmp_path_factory.mktemp("stammers") / "ckpt"
    return train([tiny_shards.path], out, tiny_settings("steps=2", "decoder.init_std=0.3"))


def _settings(checkpoint: Path, **more: Any) -> CaptionSettings:
    return CaptionSettings(source="checkpoint", model=str(checkpoint), backend="torch", **more)


def _pictures(count: int, side: int = 48) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    small = rng.integers(0, 256, (count, 4, 4, 3), np.uint8)
    return [cv2.resize(one, (side, side)) for one in small]


def _ask(key: str, frames: tuple[bytes, ...] = (), **more: Any) -> Ask:
    told = {"max_tokens": 12, "temperature": 0.0, "top_p": 1.0, "seed": 0} | more
    return Ask(key, "", "", frames, "", None, **told)


def _jpeg(picture: np.ndarray) -> bytes:
    return cv2.imencode(".jpg", picture[..., ::-1])[1].tobytes()


def test_every_answer_is_that_of_its_own_picture_whatever_is_asked_with_it(
    stammering: Path,
) -> None:
    describer = CheckpointDescriber(_settings(stammering))
    shown = _pictures(9)
    clips = {f"k{i}": [one] for i, one in enumerate(shown[:7])} | {"clip": shown[7:]}
    asks = {
        key: _ask(key, max_tokens=30, temperature=0.7, seed=seed) for seed, key in enumerate(clips)
    }
    asks["k2"] = _ask("k2", temperature=0.0)
    asks["k5"] = _ask("k5", temperature=0.0)
    found = describer.describe(clips, asks)
    assert set(found) == set(clips)
    for key in clips:
        assert describer.describe({key: clips[key]}, asks) == {key: found[key]}
    sampler = Sampler.load(stammering, "cpu")
    warm = [key for key in clips if asks[key].temperature]
    texts = sampler.describe(
        [media(clips[key], sampler.canvas.seen) for key in warm],
        30,
        temperature=0.7,
        seed=[asks[key].seed for key in warm],
    )
    said = {key: answer.text for key, answer in found.items() if isinstance(answer, Answer)}
    assert [said[key] for key in warm] == texts and len(set(texts)) > 4


def test_an_answer_that_is_cut_off_says_so_and_tokens_are_counted(checkpoint: Path) -> None:
    describer = CheckpointDescriber(_settings(checkpoint))
    clips = {"short": _pictures(1), "whole": _pictures(1)}
    found = describer.describe(
        clips, {"short": _ask("short", max_tokens=4), "whole": _ask("whole", max_tokens=40)}
    )
    block = len(describer.sampler.described(clips["whole"][0]))
    assert found["short"] == Answer(SAID[:4], "length", block, 4)
    assert found["whole"] == Answer(SAID, "stop", block, len(SAID) + 1)  # the end is a token


def test_what_cannot_be_described_fails_alone(checkpoint: Path, stammering: Path) -> None:
    captioner = open_checkpoint(_settings(checkpoint))
    shown = [_jpeg(one) for one in _pictures(12)]
    for ask in (
        _ask("broken", (b"\xff\xd8 no picture \xff\xd9",)),
        _ask("clip", tuple(shown), max_tokens=40),
        _ask("good", (shown[0],), max_tokens=40),
    ):
        captioner.submit(ask)
    found = dict(captioner.collect())
    captioner.close()
    broken, clip, good = found["broken"], found["clip"], found["good"]
    assert isinstance(broken, Failure) and broken.status == "no frames"
    assert isinstance(clip, Failure) and "any video it was trained on" in clip.detail
    assert isinstance(good, Answer) and good.text == SAID

    describer = CheckpointDescriber(_settings(stammering))
    clip = {"kind": "video", "size": [3, 8, 8], "fps": 6.0, "samples": 9}
    describer.sampler.canvas.grids.insert(0, clip)
    clips = {"long": _pictures(12), "good": _pictures(1)}
    found = dict(describer.describe(clips, {key: _ask(key) for key in clips}))
    long = found["long"]
    assert isinstance(long, Failure) and "holds 128: lower caption.frames" in long.detail
    assert isinstance(found["good"], Answer)


@pytest.mark.parametrize(
    ("count", "seen", "chosen"),
    [
        (2, None, [0, 0, 1, 1]),
        (3, 8, [0, 0, 1, 2]),
        (7, None, [0, 2, 4, 6]),
        (12, 16, list(range(12))),
        (12, 8, [0, 2, 3, 5, 6, 8, 9, 11]),
    ],
)
def test_keyframes_are_shown_in_fours_from_beginning_to_end(
    count: int, seen: int | None, chosen: list[int]
) -> None:
    frames = [np.full((8, 8, 3), number, np.uint8) for number in range(count)]
    assert media(frames, seen)[:, 0, 0, 0].tolist() == chosen
    assert media(frames[:1], seen).ndim == 3


def test_torch_stands_in_where_vllm_does_not_start_and_that_is_said(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(*_: Any, **engine: Any) -> None:
        assert engine["rows"] == 64 and engine["enforce_eager"] is True
        raise UnimodalError("vLLM has a cold")

    monkeypatch.setattr("unimodal.model.vllm.VllmBackend.load", load)
    settings = _settings(checkpoint, engine={"enforce_eager": True})
    auto = settings.model_copy(update={"backend": "auto"})
    found = CheckpointDescriber(auto).describe({"k": _pictures(1)}, {"k": _ask("k")})
    assert isinstance(found["k"], Answer)
    told = capsys.readouterr().err
    assert "describes with torch, not vLLM (vLLM has a cold)" in told and told.count("\n") == 1
    with pytest.raises(UnimodalError, match="cold"):
        CheckpointDescriber(settings.model_copy(update={"backend": "vllm"}))


def test_a_checkpoint_is_known_by_the_weights_of_its_newest_step(
    checkpoint: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(checkpoint, tmp_path / "ckpt"))
    settings = _settings(copy)
    before = settings.words("")
    (copy / "vllm").mkdir()
    (copy / "metrics.jsonl").write_text("more\n")
    assert settings.words("") == before
    weights = next(copy.glob("step-*")) / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1  # of the same size
    weights.write_bytes(data)
    assert settings.words("") != before


def _run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["unimodal", *arguments])
    try:
        main()
    except SystemExit as stopped:
        return int(stopped.code or 0)
    return 0


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of five pictures without captions, to be copied; they lie beside it."""
    folder = tmp_path_factory.mktemp("bare")
    (folder / "files").mkdir()
    for number, pixels in enumerate(_pictures(5, 96)):
        Image.fromarray(pixels).save(folder / "files" / f"{number}.png")
    settings = build(CurateSettings, sets=CURATE)
    return curate([folder / "files"], folder / "run", settings, engine="inline").path


def _said(rows: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    names = "style", "lang", "text", "status"
    return [tuple(one[name] for name in names) for row in rows for one in row["captions"]]


def test_it_describes_while_curating_and_afterwards_and_between_pipes(
    bare: Path,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    after = Path(shutil.copytree(bare, tmp_path / "after"))
    asked = ["caption", str(after), "--source=checkpoint", f"--model={checkpoint}"]
    asked += ["--set=caption.backend=torch", "-q"]
    assert _run(monkeypatch, *asked, "--plan", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["requests"] == 5 and plan["prompt"].startswith("trained 1 (en")
    assert "prompt_tokens_about" not in plan
    assert _run(monkeypatch, *asked) == 0
    rows = Run.open(after).clips.to_pylist()
    assert _said(rows) == [("caption", "en", SAID, "ok")] * 5
    assert {row["captions"][0]["model"] for row in rows} == {str(checkpoint)}

    both = ["curate", str(bare.parent / "files"), "-o", str(tmp_path / "both"), "--engine=inline"]
    both += [f"--set=caption.model={checkpoint}", "--set=caption.source=checkpoint", "-q"]
    both += ["--set=caption.backend=torch", *(f"--set={one}" for one in CURATE)]
    assert _run(monkeypatch, *both) == 0
    assert _said(Run.open(tmp_path / "both").clips.to_pylist()) == _said(rows)

    capsys.readouterr()
    unsaid = "".join(json.dumps(row | {"captions": []}, default=str) + "\n" for row in rows)
    monkeypatch.setattr(sys, "stdin", io.StringIO(unsaid))
    assert _run(monkeypatch, "caption", *asked[2:]) == 0
    out = capsys.readouterr().out
    assert _said([json.loads(line) for line in out.splitlines()]) == _said(rows)


@pytest.mark.parametrize(
    ("arguments", "says", "code"),
    [
        (["--model=nowhere"], "no checkpoint at nowhere", 2),
        (["--model=."], "holds no finished checkpoint", 2),
        (["--model={blind}"], "has no vision_tokenizer", 1),
        (["--model={ckpt}", "--set=caption.format=json"], "leave out caption.format", 2),
        ([], "source checkpoint needs caption.model", 2),
    ],
)
def test_mistakes_are_one_line(
    bare: Path,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    says: str,
    code: int,
) -> None:
    run = str(shutil.copytree(bare, tmp_path / "run"))
    blind = Path(shutil.copytree(checkpoint, tmp_path / "blind"))
    shutil.rmtree(blind / "vision_tokenizer")
    monkeypatch.chdir(tmp_path)
    told = [one.format(blind=blind, ckpt=checkpoint) for one in arguments]
    asked = ["caption", run, "--source=checkpoint", "--set=caption.backend=torch", "-q", *told]
    assert _run(monkeypatch, *asked) == code
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["local", "ray"])
def test_engines_side_by_side_describe_as_one_does(stammering: Path, engine: str) -> None:
    clips = {f"k{i}": one for i, one in enumerate(_pictures(6))}
    asks = [_ask(key, (_jpeg(one),), temperature=0.7) for key, one in clips.items()]
    alone = open_checkpoint(_settings(stammering))
    for ask in asks:
        alone.submit(ask)
    expected = dict(alone.collect())
    settings = _settings(stammering, data_parallel=2, in_flight=2)
    both = open_source(settings, engine, None, ENTRY)
    found: dict[str, Any] = {}
    try:
        while len(found) < len(asks):
            waiting = [ask for ask in asks if ask.key not in found][: both.in_flight]
            for ask in waiting:
                both.submit(ask)
            while not all(ask.key in found for ask in waiting):
                found.update(both.collect())
    finally:
        both.close()
    assert found == expected


@pytest.mark.slow
@pytest.mark.timeout(1800)  # two minutes of one core for training, two starts of vLLM
def test_a_model_trained_here_describes_new_pictures_right_through_vllm(tmp_path: Path) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed")
    command = [sys.executable, "-m", "benchmarks.self_captioner", "-o", str(tmp_path)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, env={**os.environ, **ONE_CORE}, cwd=root, stdout=subprocess.PIPE)
    assert done.returncode == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    codes = figures.pop("codes")
    assert {kind: one["n"] for kind, one in figures.items()} == dict.fromkeys(KINDS, 100)
    assert figures["seen"]["both"] >= 80 and figures["pair"]["both"] >= 60
    # By chance one shape of the five that training had in a colour is right, and one colour of 16:
    # three deviations of 100 pictures.
    shape, colour = (100 * p + 3 * (100 * p * (1 - p)) ** 0.5 for p in (1 / 5, 1 / 16))
    assert codes["as they are"]["shape"] >= 80 and codes["in another order"]["shape"] <= shape
    other = codes["of another picture"]
    assert other["shape"] <= shape and other["colour"] <= colour
    # What the commands print is the run's path alone, whatever vLLM has to say.
    assert done.stdout.decode().splitlines().count(str(tmp_path / "run")) == 2
