"""A checkpoint for commands that draw: real architecture, random weights, one step of training."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

CODEBOOK = 64
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="session")
def drawn_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four pictures of 3x4 codes called picture0000 … and a clip of three latent frames, clip0004,
    with their captions."""
    import torch

    from unimodal.tokenize.shards import Sample, ShardWriter
    from unimodal.tokenize.vision.movq import MoVQ, MoVQConfig
    from unimodal.tokenize.vision.tokenizer import VisionTokenizer
    from unimodal.tokenize.vocabulary import Vocabulary

    torch.manual_seed(0)
    torch.set_num_threads(1)
    tokenizer = VisionTokenizer(MoVQ(MoVQConfig(codebook_size=CODEBOOK, ch=32, num_res_blocks=1)))
    vocabulary = Vocabulary.bytes(CODEBOOK)
    rng = np.random.default_rng(0)
    shapes = [(1, 3, 4)] * 4 + [(3, 3, 4)]
    samples = [
        Sample(
            key=f"{'clip' if shape[0] > 1 else 'picture'}{number:04d}",
            uid=f"{number:04d}",
            kind="video" if shape[0] > 1 else "image",
            codes=rng.integers(0, CODEBOOK, shape),
            split="train",
            source_sha256=f"{number:064x}",
            fps=6.0 if shape[0] > 1 else None,
            captions=[{"style": "name", "lang": "en", "text": f"the {number}", "tokens": 5}],
        )
        for number, shape in enumerate(shapes)
    ]
    out = tmp_path_factory.mktemp("drawn") / "shards"
    writer = ShardWriter(out, tokenizer, vocabulary, {})
    writer.write(0, "unit", samples)
    writer.finish(1)
    return out


@pytest.fixture(scope="session")
def drawer(drawn_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that was trained on `drawn_shards`; its context holds 256 ids."""
    from unimodal.model.recipe import TrainSettings
    from unimodal.model.train import train
    from unimodal.pipeline.settings import build

    settings = build(
        TrainSettings,
        {
            "steps": 1,
            "precision": "float32",
            "device": "cpu",
            "decoder": {"width": 32, "layers": 2, "heads": 4, "kv_heads": 2, "ffn": 64},
            "data": {"context": 256},
            "log": {"validate_every": 0, "tensorboard": False},
        },
    )
    return train([drawn_shards], tmp_path_factory.mktemp("drawer") / "ckpt", settings)


@pytest.fixture
def sample(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Function that runs `unimodal sample` in this process: exit code, stdout, stderr."""
    from unimodal.cli.app import main

    def run(*arguments: str | Path | int | float, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["unimodal", "sample", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out, printed.err

    return run
