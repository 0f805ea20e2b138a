"""What the user is told when something fails."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from unimodal.pipeline.errors import (
    UnimodalError,
    first_line,
    harmless,
    on_one_line,
    telling_full_disk,
)


def test_an_error_without_words_is_told_by_its_kind() -> None:
    assert first_line(ValueError("a\nb")) == "a"
    assert first_line(ValueError("\n")) == "ValueError"
    assert first_line(KeyError()) == "KeyError"


def test_a_full_disk_is_one_line_with_the_remedy_and_other_trouble_stays_what_it_is(
    tmp_path: Path,
) -> None:
    told = pytest.raises(UnimodalError, match=r"out: the disk is full; free some space")
    with told, telling_full_disk(tmp_path / "out"):
        raise OSError(errno.ENOSPC, "no space")
    with pytest.raises(FileNotFoundError), telling_full_disk(tmp_path):
        (tmp_path / "none").read_text()


def test_what_would_steer_a_terminal_is_spelled_out() -> None:
    assert harmless("a\x1b[2J\n\tb\u202e", "\n\t") == "a\\x1b[2J\n\tb\\u202e"
    assert harmless("क्‍ष") == "क्‍ष"  # joiners belong to letters
    assert on_one_line(ValueError("a\n  b " + "c" * 400)) == "a b " + "c" * 296
    assert on_one_line(ValueError()) == "ValueError"
