"""What the tests of this room share."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def qwen_ranks() -> Path:
    """Qwen's rank file from an installed package; the test is skipped without it."""
    spec = importlib.util.find_spec("dashscope")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / "resources" / "qwen.tiktoken"
        if path.is_file():
            return path
    pytest.skip("the package dashscope, which carries Qwen's ranks, is not installed")
