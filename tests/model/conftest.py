"""What the tests of this room share: a small vocabulary, shards of known codes, settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from unimodal.model.recipe import TrainSettings
from unimodal.pipeline.settings import build
from unimodal.tokenize.shards import Sample, Shards, ShardWriter
from unimodal.tokenize.vision.movq import MoVQ, MoVQConfig
from unimodal.tokenize.vision.tokenizer import VisionTokenizer
from unimodal.tokenize.vocabulary import Vocabulary

CODEBOOK = 64


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    # Matrices this small gain nothing from a second thread, and on a busy machine its spinning
    # made these tests ten times slower.
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def vocabulary() -> Vocabulary:
    return Vocabulary.bytes(CODEBOOK)


@pytest.fixture(scope="session")
def tokenizer() -> VisionTokenizer:
    """A vision tokenizer of the real architecture with random weights."""
    torch.manual_seed(0)
    return VisionTokenizer(MoVQ(MoVQConfig(codebook_size=CODEBOOK, ch=32, num_res_blocks=1)))


MakeShards = Callable[..., Shards]


@pytest.fixture(scope="session")
def make_shards(vocabulary: Vocabulary, tokenizer: VisionTokenizer) -> MakeShards:
    """Write real shards: `codes` [T, H, W] arrays, each with its captions."""

    def make(
        out: Path,
        codes: Sequence[np.ndarray],
        captions: Sequence[Sequence[str]],
        val: Sequence[int] = (),
        fps: float = 6.0,
        joint: bool = False,
        by: VisionTokenizer = tokenizer,
        prefix: str = "key",
    ) -> Shards:
        writer = ShardWriter(out, by, vocabulary, {"joint": True} if joint else {})
        samples = [
            Sample(
                key=f"{prefix}{number:04d}",
                uid=f"{prefix}{number:04d}",
                kind="image" if len(one) == 1 else "video",
                codes=one,
                split="val" if number in val else "train",
                source_sha256=f"{number:064x}",
                fps=None if len(one) == 1 else fps,
                captions=[
                    {
                        "style": "name",
                        "lang": "en",
                        "text": text,
                        "tokens": len(vocabulary.text.encode(text)),
                    }
                    for text in captions[number]
                ],
            )
            for number, one in enumerate(codes)
        ]
        writer.write(0, "unit", samples)
        return writer.finish(1)

    return make


@pytest.fixture(scope="session")
def tiny_shards(tmp_path_factory: pytest.TempPathFactory, make_shards: MakeShards) -> Shards:
    """Ten pictures of 4x5 codes, two of them for validation, and a clip of two latent frames."""
    rng = np.random.default_rng(0)
    codes = [rng.integers(0, CODEBOOK, (1, 4, 5)) for _ in range(10)]
    codes.append(rng.integers(0, CODEBOOK, (2, 3, 3)))
    captions = [[f"picture {i}", f"the {i}"] for i in range(10)] + [["a clip"]]
    return make_shards(tmp_path_factory.mktemp("shards"), codes, captions, val=(8, 9))


@pytest.fixture(scope="session")
def tiny_settings() -> Callable[..., TrainSettings]:
    """Settings of a decoder small enough for tests; keyword `sets` are `key=value` strings."""

    def make(*sets: str) -> TrainSettings:
        base = {
            "steps": 8,
            "precision": "float32",
            "device": "cpu",
            "decoder": {"width": 32, "layers": 2, "heads": 4, "kv_heads": 2, "ffn": 64},
            "data": {"context": 128},
            "optimizer": {"lr": 3e-3, "warmup": 2},
            "checkpoint": {"every": 100},
            "log": {"every": 1, "validate_every": 0, "tensorboard": False},
        }
        return build(TrainSettings, base, sets=sets)

    return make
