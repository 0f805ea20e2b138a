"""Buckets: a real S3 server on loopback, in a process of its own, and what is made of it."""

from __future__ import annotations

import http.client
import io
import shutil
import socket
import subprocess
import sys
import tarfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from unimodal.pipeline import fetch, media, remote
from unimodal.pipeline.caption import find_sidecars, read_given, read_sidecar
from unimodal.pipeline.errors import MediaError, UnimodalError, UsageError
from unimodal.pipeline.inputs import list_inputs, list_sources
from unimodal.pipeline.presets import CurateSettings
from unimodal.pipeline.run import Run, curate
from unimodal.pipeline.settings import build

BARE = build(
    CurateSettings,
    sets=[
        *("decide.image_min_area=0", "report=false", "parts.max_sources=2"),
        'skip=["text", "quality", "dedup"]',
    ],
)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """Address of an S3 server that holds everything in memory."""
    pytest.importorskip("s3fs")
    pytest.importorskip("moto")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", port],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        until = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/moto-api/", timeout=5).close()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < until
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


Client = Any


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Client]]:
    """Function that turns this process and its workers to a server, and returns a client."""
    import s3fs

    def turn(address: str) -> Client:
        for name, value in [
            ("AWS_ENDPOINT_URL", address),
            ("AWS_ACCESS_KEY_ID", "nobody"),
            ("AWS_SECRET_ACCESS_KEY", "nothing"),
            ("AWS_DEFAULT_REGION", "us-east-1"),
            ("AWS_EC2_METADATA_DISABLED", "true"),
        ]:
            monkeypatch.setenv(name, value)
        forget()
        return s3fs.S3FileSystem(use_listings_cache=False, skip_instance_cache=True)

    def forget() -> None:
        remote._store.cache_clear()
        s3fs.S3FileSystem.clear_instance_cache()

    yield turn
    forget()


@pytest.fixture
def bucket(server: str, use: Callable[[str], Client]) -> Iterator[Client]:
    """A client of the server, which has one empty bucket called media."""
    client = use(server)
    client.mkdir("media")
    yield client
    client.rm("media", recursive=True)


def _tar(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return out.getvalue()


def _uris(*inputs: str) -> list[str]:
    return [source.uri.removeprefix("s3://media/") for source in list_sources(inputs)]


def _parts(run: Run) -> dict[str, int]:
    folder = run.path / run.info["stages"]["watch"]
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.parquet")}


def test_objects_prefixes_and_globs_are_listed_as_files_are(bucket: Client) -> None:
    keys = ["a.png", "sub/b.MP4", "sub/.hidden/c.png", "sub/notes.txt", "odd[1].png", "sub/d.bin"]
    for i, key in enumerate([*keys, "../../up.png", "sp ace/é#1.png", "sub/9f.frames.tar"]):
        bucket.pipe(f"media/{key}", bytes(i + 1))
    everything = ["../../up.png", "a.png", "odd[1].png", "sp ace/é#1.png", "sub/b.MP4"]
    assert _uris("s3://media") == [k for k in everything if not k.startswith(".")]
    assert _uris("S3A://media/sub/", "s3://media/sub") == ["sub/b.MP4"]
    assert _uris("s3://media/sub/d.bin") == ["sub/d.bin"]  # named outright, whatever it is called
    assert _uris("s3://media/odd[1].png") == ["odd[1].png"]
    assert _uris("s3://media/**/*.png") == ["a.png", "odd[1].png", "sp ace/é#1.png"]
    assert _uris("s3://media/s*/") == ["sp ace/é#1.png", "sub/b.MP4"]
    (source,) = list_sources(["s3://media/a.png"])
    assert (source.size, source.mtime_ns) == (1, 0) and source.etag and '"' not in source.etag
    with fetch.local("s3://media/../../up.png") as path:
        assert path.read_bytes() == bytes(7)


def test_what_cannot_be_listed_is_one_clear_line(
    bucket: Client, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.pipe("media/notes.txt", b"x")
    for item in ["s3://nobucket", "s3://nobucket/a.png", "s3://media/no.png", "s3://media/none*"]:
        with pytest.raises(UsageError, match="no such object or bucket") as caught:
            list_sources([item])
        assert str(caught.value).startswith(f"{item}: ") and "\n" not in str(caught.value)
    with pytest.raises(UsageError, match=r"cannot be listed .*'\*\*' can only be an entire path"):
        list_sources(["s3://media/**.png"])
    with pytest.raises(UsageError, match="name a bucket"):
        list_sources(["s3://"])
    with pytest.raises(UsageError, match=r"^gs:// needs a package: pip install 'gcsfs'$"):
        monkeypatch.setitem(sys.modules, "gcsfs", None)
        list_sources(["gcs://bucket/a.png"])

    def rules(count: str) -> None:  # of the server: calls without a check of who asks
        address, plain = f"{server}/moto-api/reset-auth", {"Content-Type": "text/plain"}
        urllib.request.urlopen(urllib.request.Request(address, count.encode(), plain)).close()

    rules("0")
    try:
        with pytest.raises(UsageError, match=r"s3://media/a.png: cannot be listed .access denied"):
            list_sources(["s3://media/a.png"])
        with (
            pytest.raises(MediaError, match=r"^s3://media/a.png: access denied"),
            fetch.local("s3://media/a.png"),
        ):
            pass
    finally:
        rules("inf")


def test_without_credentials_the_line_says_which(
    use: Callable[[str], Client], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use("http://127.0.0.1:9")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(UsageError, match=r"no credentials: set AWS_ACCESS_KEY_ID .*ANON=true"):
        list_sources(["s3://media/a.png"])


@pytest.mark.slow  # the client's own patience with a server that is gone
def test_a_server_that_is_not_reached_is_one_line_too(use: Callable[[str], Client]) -> None:
    use("http://127.0.0.1:9")
    with pytest.raises(UnimodalError, match=r"cannot be listed .*Could not connect"):
        list_sources(["s3://media/a.png"])
    with pytest.raises(MediaError, match="Could not connect"), fetch.local("s3://media/a.png"):
        pass


@pytest.fixture
def local_copy(
    tmp_path: Path,
    emoji: list[Path],
    write_video: Callable[..., Path],
    moving: Callable[..., list[np.ndarray]],
) -> Path:
    """A folder with five pictures, a video with a cut, captions and a file that is none."""
    folder = tmp_path / "media"
    (folder / "deep" / "er").mkdir(parents=True)
    for path in emoji[:3]:
        shutil.copy(path, folder)
    for path in emoji[3:5]:
        shutil.copy(path, folder / "deep" / "er")
    write_video(folder / "deep" / "film.mp4", [*moving(75), *moving(75, seed=1)])
    (folder / f"{emoji[0].stem}.txt").write_text("a tile")
    (folder / "deep" / "film.mp4.json").write_text('{"caption": "it moves", "lang": "en"}')
    (folder / "bad.png").write_bytes(b"no picture")
    return folder


def test_a_bucket_gives_the_clips_of_its_local_copy_and_changes_cost_their_own_part(
    tmp_path: Path, bucket: Client, local_copy: Path, emoji: list[Path]
) -> None:
    bucket.put(f"{local_copy}/", "media/set/", recursive=True)

    def at(run: Run, root: str) -> list[dict[str, object]]:
        rows = run.clips.drop_columns(["part"]).to_pylist()
        return [{**row, "uri": str(row["uri"]).removeprefix(root)} for row in rows]

    there = curate(["s3://media/set"], tmp_path / "a", BARE, engine="local", workers=2)
    here = curate([local_copy], tmp_path / "b", BARE, engine="inline")
    assert at(there, "s3://media/set/") == at(here, f"{local_copy}/")
    assert there.clips.num_rows >= 7 and there.quarantined == here.quarantined == 1
    assert there.quarantine.column("uri")[0].as_py() == "s3://media/set/bad.png"
    said = {c["text"] for row in there.clips.to_pylist() for c in row["captions"]}
    assert said == {"a tile", "it moves"}

    # Nothing new: nothing is read, whatever the objects' times say.
    before = _parts(there)
    assert len(before) >= 4  # and the quarantine of one
    bucket.put(str(local_copy / "deep" / "film.mp4"), "media/set/deep/film.mp4")
    again = curate(["s3://media/set"], tmp_path / "a", BARE, engine="inline")
    assert _parts(again) == before and again.clips.equals(there.clips)

    changed = local_copy / emoji[1].name
    shutil.copy(emoji[7], changed)
    bucket.put(str(changed), f"media/set/{changed.name}")
    (local_copy / emoji[2].name).unlink()
    bucket.rm(f"media/set/{emoji[2].name}")
    there = curate(["s3://media/set"], tmp_path / "a", BARE, engine="inline")
    here = curate([local_copy], tmp_path / "c", BARE, engine="inline")
    assert at(there, "s3://media/set/") == at(here, f"{local_copy}/")
    after = _parts(there)
    assert before.items() <= after.items() and len(after) == len(before) + 1


def test_an_object_that_changes_between_listing_and_reading_is_told(bucket: Client) -> None:
    bucket.pipe("media/a.png", b"one")
    (source,) = list_sources(["s3://media/a.png"])
    bucket.pipe("media/a.png", b"two")
    with (
        pytest.raises(MediaError, match=r"s3://media/a.png: it has changed since it was listed"),
        fetch.local(source.uri, listed=source),
    ):
        pass
    bucket.rm("media/a.png")
    for uri in ("s3://media/a.png", "s3://nobucket/a.png"):
        with pytest.raises(MediaError, match="no such object"), fetch.local(uri):
            pass


def test_tars_and_tables_in_a_bucket_are_inputs_too(
    bucket: Client, tmp_path: Path, emoji: list[Path]
) -> None:
    pictures = [path.read_bytes() for path in emoji[:3]]
    shard = {"0.png": pictures[0], "0.txt": b"zero", "1.png": pictures[1], "1.json": b'{"n": 1}'}
    bucket.pipe("media/set/x.tar", _tar(shard))
    bucket.pipe("media/set/sub/2.png", pictures[2])
    rows = '{"file_name": "sub/2.png", "text": "two"}\n{"file_name": "x.tar#1.png", "text": "one"}'
    bucket.pipe("media/set/all.jsonl", f"{rows}\n".encode())
    run = curate(
        ["s3://media/set/x.tar", "s3://media/set/all.jsonl"], tmp_path / "a", BARE, engine="inline"
    )
    found = {
        row["uri"].removeprefix("s3://media/set/"): [c["text"] for c in row["captions"]]
        for row in run.clips.to_pylist()
    }
    assert found == {"x.tar#0.png": ["zero"], "x.tar#1.png": ["one"], "sub/2.png": ["two"]}
    assert dict(run.clips.to_pylist()[2]["meta"]) == {"n": "1"}
    assert run.quarantined == 0
    given = read_given("s3://media/set/all.jsonl")
    assert list(given.captions) == ["s3://media/set/sub/2.png", "s3://media/set/x.tar#1.png"]
    bucket.pipe("media/set/bad.csv", b"path\nsub/2.png\nhttp://127.0.0.1/3.png\n")
    with pytest.raises(UsageError, match=r"s3://media/set/bad.csv, line 3: http://127.* Allowed"):
        list_sources(["s3://media/set/bad.csv"])
    # A table here may name objects there; one that is gone is quarantined.
    table = tmp_path / "all.txt"
    table.write_text("s3://media/set/sub/2.png\ns3a://media/set/gone.png\n")
    assert [(s.uri, s.size) for s in list_sources([table])] == [
        ("s3://media/set/gone.png", 0),
        ("s3://media/set/sub/2.png", len(pictures[2])),
    ]


def test_equal_objects_are_one_clip_though_no_byte_is_compared_at_listing(
    bucket: Client, tmp_path: Path, emoji: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for key in ("a.png", "b.png"):
        bucket.put(str(emoji[0]), f"media/{key}")
    with monkeypatch.context() as patch:
        patch.setattr(remote, "read", None)
        assert [s.aliases for s in list_sources(["s3://media"])] == [(), ()]
    run = curate(["s3://media"], tmp_path / "run", BARE, engine="inline")
    (row,) = run.clips.to_pylist()
    assert (row["uri"], row["aliases"]) == ("s3://media/a.png", ["s3://media/b.png"])
    (one,) = list_inputs(["s3://media"], verify=True).sources
    assert one.aliases == ("s3://media/b.png",)
    (same,) = list_inputs(["s3://media"], known=[one]).sources  # and it is remembered
    assert same == one


def test_captions_beside_objects_are_found_with_one_listing_of_a_folder(
    bucket: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(5):
        bucket.pipe({f"media/d/{i}.png": b"x", f"media/d/{i}.txt": b"number %d" % i})
    listed: list[str] = []
    real = remote.folder
    monkeypatch.setattr(remote, "folder", lambda uri: listed.append(uri) or real(uri))
    found = find_sidecars([f"s3://media/d/{i}.png" for i in range(5)], ("json", "txt"))
    assert listed == ["s3://media/d"] and len(found) == 5
    ((uri, size, etag),) = found["s3://media/d/3.png"]
    assert (uri, size) == ("s3://media/d/3.txt", 8) and isinstance(etag, str)
    assert [caption.text for caption in read_sidecar(uri)] == ["number 3"]
    with pytest.raises(ValueError, match="no such object"):
        read_sidecar("s3://media/d/9.txt")


def test_windows_of_one_remote_video_fetch_it_once(
    bucket: Client, bikes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.put(str(bikes), "media/bikes.mp4")
    reads: list[int] = []
    real = remote.read
    monkeypatch.setattr(fetch, "STEP", 100_000)
    monkeypatch.setattr(
        remote, "read", lambda uri, start, end, tick: reads.append(start) or real(uri, start, end)
    )
    uri = "s3://media/bikes.mp4"
    for start, end in [(0, 3000), (60_000, 63_000)]:
        mine = list(media.iter_frames(uri, start, end))
        theirs = list(media.iter_frames(bikes, start, end))
        assert len(mine) == len(theirs) > 0
        assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(mine, theirs, strict=True))
    assert reads == list(range(0, bikes.stat().st_size, 100_000))
    bucket.put(__file__, "media/bikes.mp4")  # another object under the name: the copy is stale
    with pytest.raises(MediaError, match="not a video"):
        next(media.iter_frames(uri))


class _Cutting(BaseHTTPRequestHandler):
    """Forwards to the server; the first few answers with an object's bytes break off halfway."""

    target = ""
    cuts = 0
    seen = 0

    def do_GET(self) -> None:
        connection = http.client.HTTPConnection(self.target)
        connection.request(self.command, self.path, headers=dict(self.headers))
        answer = connection.getresponse()
        body = answer.read()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "connection", "server", "date"):
                self.send_header(name, value)
        self.end_headers()
        if self.command == "GET" and self.path.startswith("/media/a.bin"):
            type(self).seen += 1
            if self.seen <= self.cuts:
                body = body[: len(body) // 2]
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


def test_a_connection_that_breaks_off_is_taken_up_again(
    server: str, bucket: Client, use: Callable[[str], Client]
) -> None:
    data = np.random.default_rng(0).bytes(300_000)
    bucket.pipe("media/a.bin", data)
    handler = type("Cutting", (_Cutting,), {"target": server.removeprefix("http://"), "cuts": 3})
    proxy = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    try:
        use(f"http://127.0.0.1:{proxy.server_address[1]}")
        with fetch.local("s3://media/a.bin") as path:
            assert path.read_bytes() == data
        assert handler.seen == 4  # type: ignore[attr-defined]
    finally:
        proxy.shutdown()
        proxy.server_close()
        use(server)
