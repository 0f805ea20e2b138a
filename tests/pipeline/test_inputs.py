"""What the user typed, and what is made of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from unimodal.pipeline.errors import UsageError
from unimodal.pipeline.inputs import list_sources


def _put(path: Path, data: bytes = b"x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def _names(root: Path, *inputs: str | Path, limit: int | None = None) -> list[str]:
    return [str(Path(s.uri).relative_to(root)) for s in list_sources(inputs, limit)]


def test_folders_are_searched_and_the_list_is_sorted(tmp_path: Path) -> None:
    for i, name in enumerate(["b/z.MP4", "a.png", "b/c/y.webm", "notes.txt", ".hidden/x.png"]):
        _put(tmp_path / name, bytes([i]))
    (tmp_path / "b" / ".thumb.jpg").write_bytes(b"t")
    assert _names(tmp_path, tmp_path) == ["a.png", "b/c/y.webm", "b/z.MP4"]
    assert _names(tmp_path, tmp_path / "b", tmp_path / "a.png", limit=2) == ["a.png", "b/c/y.webm"]


def test_a_file_that_is_named_is_taken_whatever_it_is_called(tmp_path: Path) -> None:
    odd = _put(tmp_path / "clip.bin")
    assert _names(tmp_path, odd, odd) == ["clip.bin"]


def test_globs_cross_folders_and_a_path_that_exists_is_no_glob(tmp_path: Path) -> None:
    _put(tmp_path / "a/1.png", b"1")
    _put(tmp_path / "a/b/2.png", b"2")
    _put(tmp_path / "what[1].png", b"3")
    assert _names(tmp_path, f"{tmp_path}/**/*.png") == ["a/1.png", "a/b/2.png", "what[1].png"]
    assert _names(tmp_path, tmp_path / "what[1].png") == ["what[1].png"]
    assert _names(tmp_path, f"{tmp_path}/*/") == ["a/1.png", "a/b/2.png"]


def test_bad_inputs_are_named(tmp_path: Path) -> None:
    (tmp_path / "hollow").mkdir()
    for bad, words in [
        ([], "no input"),
        ([tmp_path / "gone.mp4"], "gone.mp4: no such file or folder"),
        ([tmp_path / "hollow"], "hollow: no images or videos"),
        ([f"{tmp_path}/*.mp4"], "nothing matches"),
    ]:
        with pytest.raises(UsageError, match=words):
            list_sources(bad)


def test_copies_collapse_to_the_first_and_equal_sizes_do_not(tmp_path: Path) -> None:
    _put(tmp_path / "b.png", b"same")
    _put(tmp_path / "a.png", b"same")
    _put(tmp_path / "c.png", b"diff")
    first, other = list_sources([tmp_path])
    assert Path(first.uri).name == "a.png"
    assert [Path(uri).name for uri in first.aliases] == ["b.png"]
    assert Path(other.uri).name == "c.png" and other.aliases == ()


def test_a_copy_that_comes_later_does_not_displace_the_source_that_was_curated(
    tmp_path: Path,
) -> None:
    _put(tmp_path / "b.png", b"same")
    before = list_sources([tmp_path])
    _put(tmp_path / "a.png", b"same")
    (after,) = list_sources([tmp_path], known=before)
    assert Path(after.uri).name == "b.png"
    assert [Path(uri).name for uri in after.aliases] == ["a.png"]


def test_a_name_that_is_not_utf8_harms_nobody(tmp_path: Path) -> None:
    import os

    _put(tmp_path / "good.png")
    try:
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/bad\xff.png")).write_bytes(b"x2")
    except OSError:
        pytest.skip("this file system wants UTF-8")
    names = [s.uri.encode() for s in list_sources([tmp_path])]  # encodable, for the tables
    assert len(names) == 2
