"""Directories of the road that are given to the wrong command."""

from __future__ import annotations

from pathlib import Path

import pytest

from unimodal.model.checkpoint import find
from unimodal.pipeline.errors import UnimodalError
from unimodal.pipeline.kinds import mistaken
from unimodal.pipeline.run import Run
from unimodal.tokenize.plan import clips_file
from unimodal.tokenize.shards import Shards

OPENED = {find: "sample", Shards.open: "train", clips_file: "tokenize", Run.open: "tokenize"}
MARKS = {"clips.parquet": "tokenize", "manifest.json": "train", "latest": "sample"}


@pytest.mark.parametrize(
    ("opened", "mark", "next_step"),
    [(one, *mark) for one, own in OPENED.items() for mark in MARKS.items() if mark[1] != own],
)
def test_what_the_wrong_directory_is_and_what_goes_on_from_it_is_told(
    tmp_path: Path, opened: object, mark: str, next_step: str
) -> None:
    (tmp_path / mark).touch()
    with pytest.raises(UnimodalError, match=f"unimodal {next_step} .* goes on from it"):
        opened(tmp_path)  # type: ignore[operator]


def test_other_directories_are_none_of_them(tmp_path: Path) -> None:
    assert mistaken(tmp_path, "checkpoint") == mistaken(tmp_path / "nowhere", "shards") == ""
