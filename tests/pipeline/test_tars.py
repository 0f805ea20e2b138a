"""Tars that nobody vouches for: every format is read, no name is a path, no header a trap."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unimodal.pipeline import tars
from unimodal.pipeline.errors import MediaError
from unimodal.pipeline.tars import Index, Tar, read_index


def _index(data: bytes, texts: Sequence[str] = ()) -> Index:
    return read_index(Tar(lambda at, n: data[at : at + n], len(data), 0, str(len(data))), texts)


def _tar(files: dict[str, bytes], format: int = tarfile.USTAR_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return out.getvalue()


NAMES = st.text(st.characters(blacklist_categories=("Cs", "Cc")), min_size=1, max_size=300)


@settings(deadline=None)
@given(
    st.dictionaries(NAMES, st.binary(max_size=1500), max_size=6),
    st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_names_places_and_sizes_are_those_that_tarfile_finds(
    files: dict[str, bytes], format: int
) -> None:
    data = _tar(files, format)
    index = _index(data)
    assert index.trouble == ""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        found = {m.name: (m.offset_data, m.size) for m in tar if m.isfile()}
    # tarfile takes the slash off a name's end, which makes a folder of it.
    mine = {name: (m.offset, m.size) for name, m in index.members.items()}
    assert mine == {name: place for name, place in found.items() if name in mine}
    assert mine.keys() == {name for name in files if not name.endswith("/")}
    for name, member in index.members.items():
        assert data[member.offset :][: member.size] == files[name]


def test_long_names_in_every_format_and_names_that_are_not_utf8() -> None:
    folder = "/".join(["folder" * 5] * 4)  # more than the 100 bytes of a plain header
    for format in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        assert list(_index(_tar({f"{folder}/a.jpg": b"x"}, format)).members) == [f"{folder}/a.jpg"]
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", encoding="latin-1", format=tarfile.GNU_FORMAT) as tar:
        tar.addfile(tarfile.TarInfo("caf\xe9.jpg"))
    (name,) = _index(out.getvalue()).members
    assert name == r"caf\xe9.jpg" and name.encode()


def test_a_real_tar_program_s_sparse_files_links_and_folders_are_told_apart(
    tmp_path: Path,
) -> None:
    import shutil
    import subprocess

    program = shutil.which("tar")
    if program is None:
        pytest.skip("no tar program")
    (tmp_path / "in" / "sub.jpg").mkdir(parents=True)
    with (tmp_path / "in" / "hole.jpg").open("wb") as file:
        for block in range(30):  # more holes than one header maps
            file.seek(block << 20)
            file.write(b"x")
    (tmp_path / "in" / "link.jpg").symlink_to("/etc/passwd")
    (tmp_path / "in" / "plain.jpg").write_bytes(b"plain")
    os.link(tmp_path / "in" / "plain.jpg", tmp_path / "in" / "same.jpg")
    os.mkfifo(tmp_path / "in" / "pipe.jpg")
    for sparse in (["--format=gnu"], ["--format=pax", "--sparse-version=1.0"]):
        call = [program, "-S", *sparse, "--sort=name", "-cf", tmp_path / "x.tar", "-C", tmp_path]
        if subprocess.run([*call, "in"], capture_output=True).returncode:
            pytest.skip("the tar program here is not GNU's")
        data = (tmp_path / "x.tar").read_bytes()
        index = _index(data)
        problems = {name.rpartition("/")[2]: m.problem for name, m in index.members.items()}
        assert index.trouble == ""
        assert problems.pop("plain.jpg") == ""
        hole = next(name for name in problems if name.startswith("hole"))
        assert "a sparse file" in problems.pop(hole)
        assert {name: why.partition(" in")[0] for name, why in problems.items()} == {
            "link.jpg": "a link",
            "same.jpg": "a link",
            "pipe.jpg": "a pipe",
        }


def test_of_equal_names_the_last_counts_as_for_tar_itself() -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for data in (b"old", b"newer"):
            member = tarfile.TarInfo("a.jpg")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    member = _index(out.getvalue()).members["a.jpg"]
    assert out.getvalue()[member.offset :][: member.size] == b"newer"


def test_a_tar_that_breaks_off_gives_what_comes_before_and_the_reason() -> None:
    data = _tar({"a.jpg": b"a" * 600, "b.jpg": b"b" * 600})
    for end, names, words in [
        (len(data), ["a.jpg", "b.jpg"], ""),
        (2 * (512 + 1024), ["a.jpg", "b.jpg"], "it has no end mark at byte 3072, after 2 files"),
        (512 + 1024 + 512 + 100, ["a.jpg"], "it breaks off within b.jpg"),
        (512 + 1024 + 100, ["a.jpg"], "a broken tar: it breaks off at byte 1536, after 1 files"),
        (700, [], "not a tar that can be read .it breaks off within a.jpg"),
        (0, [], "not a tar"),
    ]:
        index = _index(data[:end])
        assert list(index.members) == names
        assert (index.trouble == "") == (words == "")
        assert words.replace(" .it", " (it") in index.trouble
    hurt = bytearray(data)
    hurt[512 + 1024 + 3] ^= 1  # a letter of the second name: its checksum is wrong now
    index = _index(bytes(hurt))
    assert list(index.members) == ["a.jpg"] and "no header at byte 1536" in index.trouble
    assert "not a tar" in _index(b"no tar at all, but long enough" * 100).trouble


def _resized(data: bytes, size: bytes) -> bytes:
    """The first header of a tar with other bytes for its size, and the right checksum."""
    head = bytearray(data)
    head[124:136] = size
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head[:512])
    return bytes(head)


def test_a_checksum_of_signed_bytes_counts_as_old_tools_wrote_it() -> None:
    data = bytearray(_tar({"Ü.jpg": b"x"}, tarfile.GNU_FORMAT))
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(byte - 256 * (byte > 127) for byte in data[:512])
    assert list(_index(bytes(data)).members) == ["Ü.jpg"]


@pytest.mark.parametrize("size", [b"\xff" * 12, b"\xff" * 11 + b"\0", b"-0000000777\0", b"9" * 12])
def test_a_negative_or_senseless_size_ends_the_walk(size: bytes) -> None:
    index = _index(_resized(_tar({"a.jpg": b"x" * 600, "b.jpg": b"y"}), size))
    assert index.members == {} and "no header" in index.trouble


def test_a_size_beyond_the_tar_is_never_asked_for() -> None:
    asked = []
    for size in (b"\x80" + b"\0" * 4 + b"\x7f" + b"\xff" * 6, b"77777777777\0"):
        data = _resized(_tar({"a.jpg": b"x" * 600}), size)

        def read(at: int, count: int, data: bytes = data) -> bytes:
            asked.append(count)
            return data[at : at + count]

        index = read_index(Tar(read, len(data), 0, ""), [".jpg"])
        assert index.members == {} and "breaks off within a.jpg" in index.trouble
    assert max(asked) <= 512


def test_an_extended_header_of_any_size_is_not_read_into_memory() -> None:
    for kind in (b"x", b"L", b"g", b"K"):
        member = tarfile.TarInfo("a.jpg")
        member.type = kind
        member.size = tars.LARGEST_HEADER + 1
        data = member.tobuf(tarfile.USTAR_FORMAT) + bytes(2 << 20)
        index = _index(data)
        assert index.members == {} and "a header of 1048577 bytes" in index.trouble


@given(st.binary(max_size=200), st.integers(0, 6 * 512 - 1), st.integers(0, 255))
@settings(deadline=None, max_examples=300)
def test_no_broken_tar_raises_or_names_bytes_outside_of_it(
    attributes: bytes, place: int, value: int
) -> None:
    head = tarfile.TarInfo("pax")
    head.type, head.size = tarfile.XHDTYPE, len(attributes)
    data = head.tobuf() + attributes.ljust(512, b"\0") + _tar({"a.jpg": b"x" * 600})
    hurt = bytearray(data[:-1024])
    hurt[place] = value
    index = _index(bytes(hurt), [".jpg"])
    for member in index.members.values():
        assert 0 <= member.offset <= member.offset + member.size <= len(hurt)


def test_only_small_texts_that_were_asked_for_are_kept() -> None:
    large = bytes(tars.LARGEST_TEXT + 1)
    index = _index(_tar({"a.TXT": b"yes", "b.jpg": b"no", "c.txt": large}), [".txt"])
    assert index.texts == {"a.TXT": b"yes"} and len(index.members) == 3


def test_a_uri_names_a_member_only_where_its_tar_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"x")
    (tmp_path / "odd.tar#").mkdir()
    assert tars.split(f"{tmp_path}/a.tar#../../b.jpg") == (f"{tmp_path}/a.tar", "../../b.jpg")
    assert tars.split(f"{tmp_path}/a.tar#b.tar#c.jpg") == (f"{tmp_path}/a.tar", "b.tar#c.jpg")
    assert tars.split(f"{tmp_path}/odd.tar#/a.jpg") is None
    assert tars.split(f"{tmp_path}/a.tar") is tars.split(f"{tmp_path}/a.tar#") is None
    assert tars.split("s3://bucket/a.TAR#b.jpg") == ("s3://bucket/a.TAR", "b.jpg")


def test_a_pipe_that_is_called_a_tar_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.tar")
    with pytest.raises(MediaError, match="not a regular file"), tars.opened(f"{tmp_path}/a.tar"):
        pass
