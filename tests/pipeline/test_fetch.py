"""Any source as a file: paths stay, members of tars come out whole, and nothing is left behind."""

from __future__ import annotations

import io
import json
import os
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from unimodal.pipeline import fetch, media, remote
from unimodal.pipeline.errors import MediaError
from unimodal.pipeline.inputs import list_inputs, list_sources
from unimodal.pipeline.presets import CurateSettings
from unimodal.pipeline.run import Run, curate
from unimodal.pipeline.settings import build

BARE = build(
    CurateSettings,
    sets=["decide.image_min_area=0", 'skip=["text", "quality", "dedup"]', "report=false"],
)


def _tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def _seen(run: Run) -> list[dict[str, object]]:
    """What was found out about the clips, wherever they lay."""
    rows = run.clips.drop_columns(["part", "uri", "aliases"]).to_pylist()
    return sorted(rows, key=lambda row: row["uid"])


def _reasons(run: Run) -> dict[str, str]:
    return {Path(row["uri"]).name: row["reason"] for row in run.quarantine.to_pylist()}


def test_a_path_is_its_own_and_a_member_is_a_copy_that_is_gone_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    tar = _tar(tmp_path / "x.tar", {"a/b.png": b"bytes" * 1000, "c.png": b"others"})
    with fetch.local(str(tar.with_name("no.png"))) as path:
        assert path == tmp_path / "no.png"  # whether it exists is found out by who opens it
    steps: list[int] = []
    with fetch.local(f"{tar}#a/b.png", tick=steps.append) as path:
        assert path.read_bytes() == b"bytes" * 1000 and path.is_file() and sum(steps) == 5000
        if str(path).startswith("/proc/"):  # nothing to clean up after a kill -9
            assert not list((tmp_path / "temporary").iterdir())
    with pytest.raises(OSError):
        path.read_bytes()
    assert not list((tmp_path / "temporary").iterdir())


def test_where_files_need_names_the_copy_has_one_until_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tar = _tar(tmp_path / "x.tar", {"a.png": b"bytes"})
    with monkeypatch.context() as patch:
        patch.setattr(Path, "exists", lambda _: False)  # no /proc, as on macOS
        with fetch.local(f"{tar}#a.png") as path:
            assert path.is_file() and path.is_absolute() and path.read_bytes() == b"bytes"
            assert not str(path).startswith("/proc")
    assert not path.exists()


def test_what_cannot_be_had_is_a_media_error_with_its_reason(tmp_path: Path) -> None:
    tar = _tar(tmp_path / "x.tar", {"a.png": b"12345"})
    with tarfile.open(tar, "a") as file:
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        file.addfile(link)
    for uri, bound, words in [
        (f"{tar}#b.png", 10, "x.tar#b.png: the tar has no member of this name"),
        (f"{tar}#link.png", 10, "link.png: a link in the tar, not a plain file"),
        (f"{tar}#a.png", 4, "5 bytes are over the limit of 4"),
        (str(tar), 10, "x.tar: a tar that could not be opened before: run"),
    ]:
        with pytest.raises(MediaError, match=words), fetch.local(uri, max_bytes=bound):
            pass
    with (
        pytest.raises(MediaError, match=r"x.tar#a.png: mine") as caught,
        fetch.local(f"{tar}#a.png"),
    ):
        raise MediaError("mine", "/proc/self/fd/7")  # a reader knows only the copy's path
    assert caught.value.reason == "mine"


def test_a_member_of_a_tar_that_changed_since_it_was_listed_is_not_read(tmp_path: Path) -> None:
    tar = _tar(tmp_path / "x.tar", {"a.png": b"12345", "b.png": b"1234567"})
    first, second = list_sources([tar])
    with fetch.local(second.uri, listed=second) as path:
        assert path.read_bytes() == b"1234567"
    status = tar.stat()
    _tar(tar, {"b.png": b"7654321", "a.png": b"54321"})
    for times in (None, (status.st_atime_ns, 1)):
        os.utime(tar, ns=times) if times else None
        with (
            pytest.raises(MediaError, match="changed since it was listed"),
            fetch.local(first.uri, listed=first),
        ):
            pass
    with fetch.local(first.uri) as path:  # by name alone, it is found where it lies now
        assert path.read_bytes() == b"54321"
    tar.unlink()
    with pytest.raises(MediaError, match="no such"), fetch.local(first.uri, listed=first):
        pass


def test_windows_of_one_video_in_a_tar_share_one_copy(
    tmp_path: Path, bikes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = []
    real = fetch._copy
    monkeypatch.setattr(fetch, "_copy", lambda *a: copied.append(a) or real(*a))
    tar = _tar(tmp_path / "x.tar", {"bikes.mp4": bikes.read_bytes(), "not.png": b"12345678"})
    uri = f"{tar}#bikes.mp4"
    assert media.probe(uri) == media.probe(bikes)
    for start, end in [(0, 3000), (60_000, 63_000)]:
        mine = list(media.iter_frames(uri, start, end))
        theirs = list(media.iter_frames(bikes, start, end))
        assert [pts for pts, _ in mine] == [pts for pts, _ in theirs] != []
        assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(mine, theirs, strict=True))
    assert len(copied) == 1
    frames = media.iter_frames(uri)
    next(frames)
    with pytest.raises(MediaError, match=r"x.tar#not.png: not an image"):
        media.read_image(f"{tar}#not.png")
    assert len(list(frames)) == 249  # its copy stayed while it was read, though another was kept
    assert len(copied) == 2


def test_tries_again_what_may_pass_and_not_what_will_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "WAIT_S", 0.0)
    calls: list[int] = []

    def flaky(error: Exception, times: int) -> str:
        calls.append(1)
        if len(calls) <= times:
            raise error
        return "bytes"

    ticks: list[int] = []
    assert remote.patiently(lambda: flaky(TimeoutError(), 2), ticks.append) == "bytes"
    assert len(calls) == 3 and ticks == [0, 0]
    for error, tries, words in [
        (TimeoutError("slow"), remote.TRIES, "TimeoutError: slow"),
        (FileNotFoundError("x"), 1, "no such object"),
        (PermissionError("Forbidden\nby law"), 1, "access denied: Forbidden$"),
    ]:
        calls.clear()
        with pytest.raises(MediaError, match=words):
            remote.patiently(lambda error=error: flaky(error, 9))
        assert len(calls) == tries


def test_a_webdataset_is_curated_as_its_files_are(
    tmp_path: Path,
    emoji: list[Path],
    write_video: Callable[..., Path],
    moving: Callable[..., list[np.ndarray]],
) -> None:
    import webdataset

    film = write_video(tmp_path / "film.mp4", [*moving(60), *moving(60, seed=1)])
    plain = tmp_path / "plain"
    plain.mkdir()
    with webdataset.TarWriter(str(tmp_path / "0.tar")) as sink:
        for number, path in enumerate([*emoji[:3], film]):
            key, suffix, data = f"{number:04}", path.suffix[1:], path.read_bytes()
            note = {"caption": f"number {number}", "license": "CC0", "tags": ["x"]}
            sink.write({"__key__": key, suffix: data, "json": note, "txt": f"picture {number}"})
            (plain / f"{key}.{suffix}").write_bytes(data)
            (plain / f"{key}.json").write_text(json.dumps(note))
            (plain / f"{key}.txt").write_text(f"picture {number}")
    ours = curate([tmp_path / "0.tar"], tmp_path / "a", BARE, engine="inline")
    files = curate([plain], tmp_path / "b", BARE, engine="inline")
    meta = {"license": "CC0", "tags": '["x"]'}
    found, expected = _seen(ours), _seen(files)
    assert [dict(row.pop("meta")) for row in found] == [meta] * len(found)
    assert [row.pop("meta") for row in expected] == [[]] * len(found)
    assert found == expected and len(found) > 4
    texts = [[c["text"] for c in row["captions"]] for row in ours.clips.to_pylist()]
    assert texts[0] == ["number 0", "picture 0"]
    assert ours.clips.column("uri")[0].as_py() == f"{tmp_path}/0.tar#0000.png"
    assert ours.quarantined == 0


def test_hostile_members_do_nothing_and_are_told(tmp_path: Path, emoji: list[Path]) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(emoji[0].read_bytes())
    good = emoji[1].read_bytes()
    names = ["../secret.png", "/etc/hostname.png", "a/../../b.png", "pipe:cat x|.png"]
    names += ["http://127.0.0.1:9/a.png", "file:///etc/passwd#.png", "-rf.png", "a\nb.png"]
    tar = tmp_path / "in" / "x.tar"
    tar.parent.mkdir()
    with tarfile.open(tar, "w", format=tarfile.PAX_FORMAT) as file:
        for number, name in enumerate(names):
            member = tarfile.TarInfo(name)
            data = good + b"\0" * number  # no two alike
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))
        for number, (kind, target) in enumerate(
            [
                (tarfile.SYMTYPE, str(secret)),
                (tarfile.LNKTYPE, "../secret.png"),
                (tarfile.CHRTYPE, ""),
                (tarfile.FIFOTYPE, ""),
            ]
        ):
            member = tarfile.TarInfo(f"special{number}.png")
            member.type, member.linkname = kind, target
            file.addfile(member)
    before = sorted(tmp_path.rglob("*"))
    run = curate([tar.parent], tmp_path / "run", BARE, engine="inline")
    members = {row["uri"].partition("#")[2] for row in run.clips.to_pylist()}
    assert {"../secret.png", "/etc/hostname.png", "a/../../b.png", "-rf.png"} <= members
    assert len(members) == len(names)
    assert set(_reasons(run).values()) == {
        f"{what} in the tar, not a plain file" for what in ("a link", "a device", "a pipe")
    }
    outside = [p for p in tmp_path.rglob("*") if not p.is_relative_to(tmp_path / "run")]
    assert sorted(outside) == before


def test_a_tar_that_breaks_off_is_quarantined_beside_the_clips_of_what_is_whole(
    tmp_path: Path, emoji: list[Path]
) -> None:
    tar = _tar(tmp_path / "x.tar", {path.name: path.read_bytes() for path in emoji[:3]})
    data = tar.read_bytes()
    (member,) = [s for s in list_sources([tar]) if s.uri.endswith(emoji[2].name)]
    tar.write_bytes(data[: int((member.etag or "").partition("@")[0]) + 10])
    (tmp_path / "no.tar").write_bytes(b"<html>404</html>")
    run = curate([tmp_path / "x.tar", tmp_path / "no.tar"], tmp_path / "run", BARE, engine="inline")
    assert run.clips.num_rows == 2
    assert _reasons(run) == {
        "x.tar": f"a broken tar: it breaks off within {emoji[2].name} at byte "
        f"{int((member.etag or '').partition('@')[0]) - 512}, after 2 files",
        "no.tar": "not a tar that can be read (it breaks off at byte 0)",
    }


def test_a_table_s_captions_and_columns_arrive_at_the_clips_after_the_call_s_own(
    tmp_path: Path, emoji: list[Path]
) -> None:
    for path in emoji[:3]:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    one, two, three = (path.name for path in emoji[:3])
    (tmp_path / f"{Path(one).stem}.txt").write_text("sidecar one")
    table = tmp_path / "media.csv"
    table.write_text(
        f"image,text,license,year\n{one},table one,CC0,1999\n{two},table two,,2001\n{three},,BSD,\n"
    )
    own = tmp_path / "own.jsonl"
    own.write_text(json.dumps({"path": one, "caption": "own one", "license": "mine"}))
    run = curate([table], tmp_path / "run", BARE, engine="inline", captions=own)
    rows = {Path(row["uri"]).name: row for row in run.clips.to_pylist()}
    texts = {name: [c["text"] for c in row["captions"]] for name, row in rows.items()}
    assert texts == {one: ["own one", "table one", "sidecar one"], two: ["table two"], three: []}
    assert {name: dict(row["meta"]) for name, row in rows.items()} == {
        one: {"license": "mine", "year": "1999"},
        two: {"year": "2001"},
        three: {"license": "BSD"},
    }


def test_a_caption_file_in_a_tar_that_cannot_be_read_is_in_the_quarantine_table(
    tmp_path: Path, emoji: list[Path]
) -> None:
    tar = _tar(tmp_path / "x.tar", {"a.png": emoji[0].read_bytes(), "a.json": b"{"})
    run = curate([tar], tmp_path / "run", BARE, engine="inline")
    ((name, reason),) = _reasons(run).items()
    assert name == "x.tar#a.json" and reason.startswith("this caption file cannot be read")
    assert run.clips.num_rows == 1


def test_identity_survives_what_the_parts_table_keeps(tmp_path: Path) -> None:
    from unimodal.pipeline.parts import PartSettings, group, read_parts, write_parts

    _tar(tmp_path / "x.tar", {"a.png": b"1", "b.png": b"22", "c.png": b"22"})
    sources = list_inputs([tmp_path]).sources
    sources.append(replace(sources[0], uri="s3://bucket/a.png", mtime_ns=0, etag="0123"))
    parts = group(sources, PartSettings())
    write_parts(parts, tmp_path / "parts.parquet")
    assert read_parts(tmp_path / "parts.parquet") == parts
    assert [s.identity for p in parts for s in p.sources] == [s.identity for s in sources]
