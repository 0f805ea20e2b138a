"""What the user typed, and what is made of it."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import pytest

from unimodal.pipeline.errors import UsageError
from unimodal.pipeline.inputs import Listing, list_inputs, list_sources, sha256_of


def _put(path: Path, data: bytes = b"x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def _names(root: Path, *inputs: str | Path, limit: int | None = None) -> list[str]:
    return [str(Path(s.uri).relative_to(root)) for s in list_sources(inputs, limit)]


def _tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def _uris(listing: Listing, root: Path) -> list[str]:
    return [source.uri.removeprefix(f"{root}/") for source in listing.sources]


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


def test_links_to_files_are_followed_and_links_to_folders_are_not(tmp_path: Path) -> None:
    _put(tmp_path / "real" / "a.png", b"a")
    (tmp_path / "b.png").symlink_to(tmp_path / "real" / "a.png")
    (tmp_path / "c.png").symlink_to(tmp_path / "real")
    (tmp_path / "again").symlink_to(tmp_path)
    (tmp_path / "gone.png").symlink_to("nowhere")
    (tmp_path / "loop.png").symlink_to("loop.png")
    first, gone, loop = list_sources([tmp_path])
    assert (Path(first.uri).name, [Path(u).name for u in first.aliases]) == ("b.png", ["a.png"])
    assert (gone.size, loop.size) == (0, 0)


@pytest.mark.parametrize("name", ["all.txt", "all.csv", "all.jsonl", "all.parquet"])
def test_a_table_brings_its_media_captions_and_columns(tmp_path: Path, name: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for i, file in enumerate(["sets/b.png", "sets/a.png", "other.png"]):
        _put(tmp_path / file, bytes(i + 1))
    paths, texts = ["b.png", "a.png", "a.png"], ["b it is", "a it is", "or so"]
    table = tmp_path / "sets" / name
    rows = [
        {"path": p, "text": t, "n": i} for i, (p, t) in enumerate(zip(paths, texts, strict=True))
    ]
    if name == "all.txt":
        table.write_text("\n".join(paths))
    elif name == "all.csv":
        lines = ["path,text,n", *(f"{row['path']},{row['text']},{row['n']}" for row in rows)]
        table.write_text("\n".join(lines))
    elif name == "all.jsonl":
        table.write_text("\n".join(json.dumps(row) for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), table)
    listing = list_inputs([table])
    assert _uris(listing, tmp_path) == ["sets/a.png", "sets/b.png"]
    if name == "all.txt":
        assert listing.given.captions == listing.given.meta == {}
        return
    said = {Path(uri).name: [c.text for c in cs] for uri, cs in listing.given.captions.items()}
    assert said == {"a.png": ["a it is", "or so"], "b.png": ["b it is"]}
    assert listing.given.meta[f"{tmp_path}/sets/a.png"] == {"n": "1"}  # the first row's counts


def test_a_table_is_read_when_it_is_named_and_passed_over_in_a_search(tmp_path: Path) -> None:
    _put(tmp_path / "a.png")
    _put(tmp_path / "a.txt", b"a red kite")
    _put(tmp_path / "one.lst", b"a.png\n")
    assert _names(tmp_path, tmp_path) == ["a.png"]
    assert _names(tmp_path, f"{tmp_path}/*.lst") == ["a.png"]
    # A pattern that is not one of tables takes what it matches for media, as it ever did.
    assert _names(tmp_path, f"{tmp_path}/a*") == ["a.png", "a.txt"]


def test_a_row_whose_file_is_missing_is_listed_and_a_table_of_them_is_a_mistake(
    tmp_path: Path,
) -> None:
    _put(tmp_path / "a.png")
    table = _put(tmp_path / "all.txt", b"# mine\na.png\ngone.png\n")
    found = {Path(s.uri).name: s.size for s in list_sources([table])}
    assert found == {"a.png": 1, "gone.png": 0}
    for content, words in [
        (b"\na red kite\nover the sea\n", "line 2: no such file: 'a red kite', nor any other"),
        (b"# nothing\n", "no path in this table"),
        (b"a.png\nhttp://example.com/b.png\n", "line 2: http:.* Allowed are s3://, s3a://"),
        (b"a.png\npipe:cat a.png\n", "line 2: pipe:cat a.png: no such file, and pipe: is not a"),
    ]:
        table.write_bytes(content)
        with pytest.raises(UsageError, match=f"all.txt.*{words}"):
            list_sources([table])


def test_only_allowed_schemes_are_opened_and_a_file_of_that_name_is_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for item in [
        "http://127.0.0.1/a.png",
        "file:///etc/passwd",
        "pipe:cat /etc/passwd",
        "memory://a.png",
        "simplecache::s3://bucket/a.png",
        "hf://datasets/x",
        "concat:a.mp4|b.mp4",
        "ssh://host/*.png",
    ]:
        with pytest.raises(UsageError, match=r"Allowed are s3://, s3a://, gs://, .*abfs://"):
            list_sources([item])
    _put(tmp_path / "shot:1.png")
    assert [Path(s.uri).name for s in list_sources(["shot:1.png", "./shot:*"])] == ["shot:1.png"]


def test_members_of_a_tar_are_sources_and_those_of_the_same_key_speak_of_them(
    tmp_path: Path,
) -> None:
    sidecar = {"caption": "json says", "width": 9, "captions": [{"text": "de", "lang": "de"}]}
    _tar(
        tmp_path / "x.tar",
        {
            "set/0001.json": json.dumps(sidecar).encode(),
            "set/0001.jpg": b"1",
            "set/0001.txt": b"text says\n",
            "set/0002.caption": b"both pictures",
            "set/0002.left.png": b"22",
            "set/0002.right.png": b"333",
            "my.photo.jpg": b"4444",
            "my.photo.cap": b"mine",
            "film.mp4.txt": b"a film",
            "film.mp4": b"55555",
            "notes.txt": b"nobody's",
            "data.npy": b"6",
            "set/._0001.jpg": b"7",
        },
    )
    listing = list_inputs([tmp_path])
    assert _uris(listing, tmp_path) == [
        "x.tar#film.mp4",
        "x.tar#my.photo.jpg",
        "x.tar#set/0001.jpg",
        "x.tar#set/0002.left.png",
        "x.tar#set/0002.right.png",
    ]
    said = {
        uri.rpartition("#")[2]: [(c.text, c.lang) for c in captions]
        for uri, captions in listing.given.captions.items()
    }
    assert said == {
        "film.mp4": [("a film", None)],
        "my.photo.jpg": [("mine", None)],
        "set/0001.jpg": [("json says", None), ("de", "de"), ("text says", None)],
        "set/0002.left.png": [("both pictures", None)],
        "set/0002.right.png": [("both pictures", None)],
    }
    assert listing.given.meta == {f"{tmp_path}/x.tar#set/0001.jpg": {"width": "9"}}
    assert list_inputs([tmp_path / "x.tar", f"{tmp_path}/*.tar"]) == listing


def test_the_identity_of_a_member_is_that_of_its_tar_and_its_place(tmp_path: Path) -> None:
    files = {"a.png": b"first", "b.png": b"second"}
    path = _tar(tmp_path / "x.tar", files)
    before = {s.uri: s for s in list_sources([path])}
    assert {s.uri: s for s in list_sources([path])} == before
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    _tar(path, {"b.png": b"second", "a.png": b"first"})  # the same size, the others first
    os.utime(path, ns=times)
    after = {s.uri: s for s in list_sources([path])}
    assert [s.size for s in after.values()] == [s.size for s in before.values()]
    for uri, source in after.items():
        assert source.identity != before[uri].identity
    os.utime(path, ns=(0, 0))
    assert {s.identity for s in list_sources([path])}.isdisjoint(s.identity for s in after.values())


def test_a_broken_tar_is_a_source_itself_beside_what_can_be_read_of_it(tmp_path: Path) -> None:
    path = _tar(tmp_path / "x.tar", {"a.png": b"a" * 600, "b.png": b"b" * 600})
    path.write_bytes(path.read_bytes()[:2100])
    assert _uris(list_inputs([tmp_path]), tmp_path) == ["x.tar", "x.tar#a.png"]
    _put(tmp_path / "empty.tar", b"")
    assert _names(tmp_path, tmp_path / "empty.tar") == ["empty.tar"]


def test_a_tar_without_media_is_an_error_when_it_is_all_there_is(tmp_path: Path) -> None:
    path = _tar(tmp_path / "shard.tar", {"0.vision.npy": b"x", "0.json": b"{}"})
    for item in (path, tmp_path):
        with pytest.raises(UsageError, match="no images or videos in any tar"):
            list_sources([item])
    _put(tmp_path / "a.png")
    assert _names(tmp_path, tmp_path) == ["a.png"]


def test_a_search_does_not_pick_up_the_frames_of_an_earlier_run(tmp_path: Path) -> None:
    _put(tmp_path / "a.png")
    _tar(_put(tmp_path / "run" / "watch-1" / "9f.frames.tar"), {"u.00000.jpg": b"x"})
    assert _names(tmp_path, tmp_path) == ["a.png"]


def test_captions_in_a_tar_that_cannot_be_read_are_told_and_the_picture_stays(
    tmp_path: Path,
) -> None:
    files = {"a.png": b"1", "a.json": b"{", "a.txt": b"x" * (2 << 20), "b.png": b"22"}
    path = _tar(tmp_path / "x.tar", {**files, "b.json": b"[" * 200_000})
    listing = list_inputs([path])
    assert len(listing.sources) == 2 and not listing.given.captions
    why = {uri.rpartition("#")[2]: reason for uri, reason in listing.given.sick.items()}
    assert why.keys() == {"a.json", "a.txt", "b.json"}
    assert why["a.txt"].startswith("larger than 1048576 bytes")
    assert why["b.json"] == "nested too deeply"


def test_a_member_can_be_named_alone_and_a_table_of_members_opens_its_tar_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from unimodal.pipeline import tars

    opened = []
    real = tars.read_index
    monkeypatch.setattr(tars, "read_index", lambda *a: opened.append(a) or real(*a))
    path = _tar(tmp_path / "x.tar", {f"{i:03}.png": bytes(i + 1) for i in range(200)})
    (one,) = list_sources([f"{path}#007.png"])
    assert (one.uri, one.size) == (f"{path}#007.png", 8)
    opened.clear()
    table = tmp_path / "some.txt"
    table.write_text("".join(f"x.tar#{i:03}.png\n" for i in range(0, 202, 2)))
    sources = list_sources([table])
    assert len(sources) == 101 and len(opened) == 1
    assert sources[-1].size == 0  # x.tar#200.png, which is not in it: quarantined


def test_a_sample_follows_from_the_names_alone_and_a_larger_one_holds_it(tmp_path: Path) -> None:
    for i in range(300):
        _put(tmp_path / "files" / f"{i:03}.png", bytes(i + 1))
    _tar(tmp_path / "x.tar", {f"{i:03}.png": bytes(i + 400) for i in range(300)})
    table = tmp_path / "all.csv"
    table.write_text("path,text\n" + "".join(f"files/{i:03}.png,text\n" for i in range(300)))
    inputs = [tmp_path / "files", tmp_path / "x.tar", table]
    all_of = list_inputs(inputs, fraction=1)
    assert len(all_of.sources) == 600 and len(all_of.given.captions) == 300
    tenth, half = (list_inputs(inputs, fraction=share) for share in (0.1, 0.5))
    assert 35 <= len(tenth.sources) <= 90 and 250 <= len(half.sources) <= 350
    assert set(tenth.sources) < set(half.sources) < set(all_of.sources)
    assert {s.uri for s in tenth.sources} >= tenth.given.captions.keys() != set()
    assert list_inputs(inputs, fraction=0.1) == tenth
    assert list_inputs(inputs, fraction=0.5, limit=5).sources == half.sources[:5]
    for share, words in [(0.0, "more than 0%"), (1.5, "at most 100%"), (1e-9, "holds no source")]:
        with pytest.raises(UsageError, match=words):
            list_inputs(inputs, fraction=share)


def test_a_limit_opens_no_more_tars_and_brings_no_more_captions_than_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from unimodal.pipeline import tars

    opened = []
    real = tars.read_index
    monkeypatch.setattr(tars, "read_index", lambda *a: opened.append(a) or real(*a))
    for i in range(9):
        _tar(tmp_path / f"{i}.tar", {f"{k}.{x}": b"%d" % i for k in "ab" for x in ("png", "txt")})
    listing = list_inputs([tmp_path], limit=3)
    assert len(opened) == 2
    assert _uris(listing, tmp_path) == ["0.tar#a.png", "1.tar#a.png"]  # with 0.tar#b.png, a copy
    assert len(listing.given.captions) == 3


def test_copies_collapse_across_files_and_tars(tmp_path: Path) -> None:
    _put(tmp_path / "z.png", b"same")
    _tar(tmp_path / "x.tar", {"a.png": b"same", "b.png": b"diff", "c.png": b"same"})
    first, other = list_sources([tmp_path])
    assert first.uri.endswith("x.tar#a.png") and other.uri.endswith("x.tar#b.png")
    assert [Path(uri).name for uri in first.aliases] == ["x.tar#c.png", "z.png"]


def test_verify_hashes_every_source_as_it_is_now(tmp_path: Path) -> None:
    import hashlib

    _put(tmp_path / "a.png", b"alone")
    _put(tmp_path / "b.png", b"same")
    _tar(tmp_path / "x.tar", {"c.png": b"in a tar", "d.png": b"same"})
    before = list_inputs([tmp_path], verify=True).sources
    digests = {Path(s.uri).name: s.sha256 for s in before}
    assert digests == {
        "a.png": hashlib.sha256(b"alone").hexdigest(),
        "b.png": hashlib.sha256(b"same").hexdigest(),
        "x.tar#c.png": hashlib.sha256(b"in a tar").hexdigest(),
    }
    assert [Path(uri).name for uri in before[1].aliases] == ["x.tar#d.png"]
    times = (tmp_path / "b.png").stat().st_mtime_ns
    _put(tmp_path / "b.png", b"else")
    os.utime(tmp_path / "b.png", ns=(times, times))  # nothing shows but its bytes
    after = {s.uri: s for s in list_inputs([tmp_path], known=before, verify=True).sources}
    changed = after[str(tmp_path / "b.png")]
    assert changed.identity == before[1].identity and changed.sha256 == sha256_of(changed.uri)
    assert changed.aliases == ()


def test_twenty_thousand_files_are_listed_in_a_moment(tmp_path: Path) -> None:
    import time

    for folder in range(20):
        (tmp_path / str(folder)).mkdir()
        for i in range(1000):
            descriptor = os.open(tmp_path / str(folder) / f"{i}.jpg", os.O_CREAT | os.O_WRONLY)
            os.ftruncate(descriptor, folder * 1000 + i + 1)
            os.close(descriptor)
    begun = time.process_time()
    assert len(list_sources([tmp_path])) == 20_000
    assert time.process_time() - begun < 3.0  # 0.3 s alone; quadratic would be minutes


def test_a_name_that_is_not_utf8_harms_nobody(tmp_path: Path) -> None:
    import os

    _put(tmp_path / "good.png")
    try:
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/bad\xff.png")).write_bytes(b"x2")
    except OSError:
        pytest.skip("this file system wants UTF-8")
    names = [s.uri.encode() for s in list_sources([tmp_path])]  # encodable, for the tables
    assert len(names) == 2
