"""Which of the road's directories a path is, for errors that say what comes next."""

from __future__ import annotations

from pathlib import Path

KINDS = {
    "clips.parquet": ("run directory", "unimodal tokenize {} -o shards"),
    "manifest.json": ("directory of shards", "unimodal train {} -o ckpt"),
    "latest": ("checkpoint", 'unimodal sample {} "a prompt"'),
}
"""By the file that marks it: what it is, and what is made of it."""


def mistaken(path: Path, wanted: str) -> str:
    """`run is a run directory, no checkpoint: unimodal tokenize run -o shards goes on from it`;
    empty where `path` is none of the road's directories."""
    for mark, (kind, command) in KINDS.items():
        if (path / mark).is_file():
            return f"{path} is a {kind}, no {wanted}: {command.format(path)} goes on from it"
    return ""
