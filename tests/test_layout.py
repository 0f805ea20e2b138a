"""The house itself: packaging and the one-way doors between the four rooms."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ["pipeline", "tokenize", "model", "cli"]  # each may import those before it, never after
HEAVY = {"ray", "vllm", "open_clip", "scenedetect", "av", "duckdb", "cv2"}


def test_tokenize_has_no_init_because_it_would_shadow_the_standard_library() -> None:
    assert not (ROOT / "tokenize" / "__init__.py").exists()
    # From the root, with the current directory first on sys.path, both must be importable.
    code = "import tokenize, inspect; assert 'open' in dir(tokenize), tokenize"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def _imports(path: Path, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


@pytest.mark.parametrize("room", ROOMS)
def test_imports_only_point_down(room: str) -> None:
    above = ROOMS[ROOMS.index(room) + 1 :]
    for path in (ROOT / room).rglob("*.py"):
        for name in _imports(path):
            bad = [a for a in above if name == f"unimodal.{a}" or name.startswith(f"unimodal.{a}.")]
            assert not bad, f"{path.relative_to(ROOT)} imports {name}, which is above it"


@pytest.mark.parametrize("room", ["model", "tokenize"])
def test_model_and_tokenize_import_without_the_curation_libraries(room: str) -> None:
    modules = [
        "unimodal." + ".".join(p.relative_to(ROOT).with_suffix("").parts)
        for p in sorted((ROOT / room).rglob("*.py"))
        if p.name != "__init__.py"
    ]
    blocked = "\n".join(
        ["import sys"]
        + [f"sys.modules[{name!r}] = None" for name in sorted(HEAVY)]
        + [f"import {module}" for module in modules]
    )
    subprocess.run([sys.executable, "-c", blocked], cwd=ROOT, check=True)
