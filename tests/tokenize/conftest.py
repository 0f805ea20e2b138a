"""What the tests of this room share."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def qwen_ranks() -> Path:
    """Qwen's rank file from an installed package; the test is skipped without it."""
    spec = importlib.util.find_spec("dashscope")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / "resources" / "qwen.tiktoken"
        if path.is_file():
            return path
    pytest.skip("the package dashscope, which carries Qwen's ranks, is not installed")


class BlockMean:
    """Stands in for the vision tokenizer where only its interface matters.

    The code of an 8x8 block is its mean grey level, of 4 frames together; T = 1 is an image.
    """

    codebook_size = 256
    spatial_factor = 8

    def __init__(self, digest: str = "0" * 64) -> None:
        self.digest = digest
        self.shapes: list[tuple[int, ...]] = []  # of every call, to see how work was grouped
        self.joint = False  # in any call

    def encode(self, pixels: torch.Tensor, joint: bool = False) -> torch.Tensor:
        self.joint |= joint
        batch, frames, _, height, width = pixels.shape
        assert pixels.dtype == torch.float32 and pixels.is_contiguous()
        assert pixels.min() >= -1 and pixels.max() <= 1
        assert height % 8 == width % 8 == 0 and (frames == 1 or frames % 4 == 0)
        self.shapes.append(tuple(pixels.shape))
        step = min(frames, 4)
        blocks = pixels.reshape(batch, frames // step, step, 3, height // 8, 8, width // 8, 8)
        return ((blocks.mean((2, 3, 5, 7)) + 1) * 127.5).round().long()

    def save(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.json").write_text('{"stand": "in"}\n')


@pytest.fixture
def block_mean() -> BlockMean:
    """A deterministic stand-in with the vision tokenizer's interface; see `BlockMean`."""
    return BlockMean()
