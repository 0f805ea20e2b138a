"""What a run does when things break: disks, clusters, files, and the process itself."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from unimodal.pipeline.errors import UnimodalError
from unimodal.pipeline.files import atomic
from unimodal.pipeline.presets import CurateSettings
from unimodal.pipeline.run import curate, update
from unimodal.pipeline.settings import build

Tree = Callable[[Path], dict[str, bytes]]
SETTINGS = build(
    CurateSettings, sets=["parts.max_sources=4", "decide.image_min_area=0", "report=false"]
)


@pytest.fixture
def pictures(tmp_path: Path, emoji: list[Path]) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for path in emoji[:12]:
        shutil.copy(path, folder)
    return folder


@pytest.mark.parametrize("engine", ["inline", "local"])
def test_mass_failure_stops_the_run_and_a_retry_mends_it(
    tmp_path: Path, pictures: Path, tree: Tree, engine: str
) -> None:
    whole = curate([pictures], tmp_path / "whole", SETTINGS, engine="inline")
    assert whole.quarantined == 0
    settings = build(
        CurateSettings,
        SETTINGS.model_dump(mode="json"),
        sets=["patience.failures_least=3"],
    )
    # As a share does that comes back empty: same names, sizes and times, other bytes.
    kept = {path: path.read_bytes() for path in pictures.iterdir()}
    times = {path: path.stat().st_mtime_ns for path in kept}
    for path in kept:
        path.write_bytes(b"\0" * len(kept[path]))
        os.utime(path, ns=(7, times[path]))
    with pytest.raises(UnimodalError, match=r"3 of the first 3 sources .* --retry-quarantined"):
        curate([pictures], tmp_path / "run", settings, engine=engine, workers=1)
    for path, data in kept.items():
        path.write_bytes(data)
        os.utime(path, ns=(7, times[path]))
    run = curate(
        [pictures], tmp_path / "run", settings, engine=engine, workers=1, retry_quarantined=True
    )
    assert run.quarantined == 0
    assert tree(tmp_path / "run") == tree(tmp_path / "whole")


def test_clips_of_good_sources_do_not_hide_that_most_sources_fail(
    tmp_path: Path, bikes: Path
) -> None:
    for number in range(6):
        (tmp_path / f"{number}.mp4").write_text(f"broken {number}")
    settings = build(
        CurateSettings,
        sets=["patience.failures_least=3", "parts.max_sources=1", "report=false"],
    )
    with pytest.raises(UnimodalError, match=r"\d of the first \d sources could not be read"):
        curate([bikes, tmp_path], tmp_path / "run", settings, engine="inline")


def test_without_being_told_a_quarantined_file_is_not_tried_again(
    tmp_path: Path, pictures: Path
) -> None:
    victim = sorted(pictures.iterdir())[3]
    data, at = victim.read_bytes(), victim.stat().st_mtime_ns
    victim.write_bytes(b"\0" * len(data))
    os.utime(victim, ns=(at, at))
    assert curate([pictures], tmp_path / "run", SETTINGS, engine="inline").quarantined == 1
    victim.write_bytes(data)
    os.utime(victim, ns=(at, at))
    assert curate([pictures], tmp_path / "run", SETTINGS, engine="inline").quarantined == 1
    made = curate([pictures], tmp_path / "run", SETTINGS, engine="inline", retry_quarantined=True)
    assert (made.quarantined, made.clips.num_rows) == (0, 12)


def test_contents_that_changed_behind_an_equal_time_are_found_by_verifying(
    tmp_path: Path, pictures: Path, emoji: list[Path]
) -> None:
    first = curate([pictures], tmp_path / "run", SETTINGS, engine="inline").clips
    victim = sorted(pictures.iterdir())[3]
    before = victim.stat()
    other = next(p for p in emoji[20:] if p.stat().st_size <= before.st_size)
    victim.write_bytes(other.read_bytes().ljust(before.st_size, b"\0"))
    os.utime(victim, ns=(before.st_mtime_ns, before.st_mtime_ns))
    again = curate([pictures], tmp_path / "run", SETTINGS, engine="inline")
    assert again.clips.equals(first)
    verified = curate([pictures], tmp_path / "run", SETTINGS, engine="inline", verify=True)
    fresh = curate([pictures], tmp_path / "fresh", SETTINGS, engine="inline", verify=True)
    assert verified.clips.equals(fresh.clips) and not verified.clips.equals(first)


def test_a_run_is_updated_with_its_own_captions_and_other_thresholds(
    tmp_path: Path, pictures: Path
) -> None:
    first = sorted(pictures.iterdir())[0]
    out = tmp_path / "run"
    run = curate([pictures], out, SETTINGS, engine="inline", captions={str(first): "a sign"})
    assert run.kept == 12
    strict = build(CurateSettings, run.info["settings"], sets=["decide.image_min_area=100000"])
    changed = update(out, strict, engine="inline")
    assert changed.kept == 0
    assert changed.clips.to_pylist()[0]["captions"][0]["text"] == "a sign"
    assert update(out, engine="inline").kept == 0  # the run remembers its latest settings


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1.5 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1536k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here (it needs root)")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("engine", ["inline", "local"])
def test_a_full_disk_is_told_and_the_run_goes_on_when_there_is_space(
    tmp_path: Path, small_disk: Path, bikes: Path, pictures: Path, tree: Tree, engine: str
) -> None:
    inputs = [pictures, bikes]
    curate(inputs, tmp_path / "whole", SETTINGS, engine="inline")
    full = small_disk / "ballast"
    full.write_bytes(b"\0" * 1_000_000)
    with pytest.raises(UnimodalError, match=r"the disk is full; free some space and run the same"):
        curate(inputs, small_disk / "run", SETTINGS, engine=engine, workers=1)
    full.unlink()
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    curate(inputs, small_disk / "run", SETTINGS, engine=engine, workers=1)
    assert tree(small_disk / "run") == tree(tmp_path / "whole")


CODE = """if True:
    import sys
    from unimodal.pipeline.presets import CurateSettings
    from unimodal.pipeline.run import curate
    from unimodal.pipeline.settings import build
    sets = ["parts.max_sources=4", "decide.image_min_area=0"]
    settings = build(CurateSettings, sets=sets)
    curate([sys.argv[1]], sys.argv[2], settings, engine=sys.argv[3], workers=2)
"""


def _start(inputs: Path, out: Path, engine: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", CODE, str(inputs), str(out), engine]
    return subprocess.Popen(command, stderr=subprocess.PIPE)


@pytest.mark.slow
def test_ten_kills_at_random_moments_lose_nothing(
    tmp_path: Path, videos: Path, emoji: list[Path], tree: Tree
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for path in [*emoji[:24], *videos.glob("*.mp4")]:
        (folder / path.name).symlink_to(path)
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    begun = time.monotonic()
    assert _start(folder, whole, "local").wait() == 0
    took = time.monotonic() - begun
    rng = random.Random(10)
    committed: list[int] = []
    for _ in range(10):
        process = _start(folder, torn, "local")
        # Some of them before anything is written, most of them in the middle of the work.
        time.sleep(took * rng.uniform(0.1, 0.7))
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        done = {file.name for file in torn.glob("*-*/*.parquet")}
        committed.append(len(done))
    process = _start(folder, torn, "local")
    _, errors = process.communicate()
    assert process.returncode == 0, errors.decode()
    assert committed == sorted(committed) and committed[-1] > 0  # nothing is ever taken back
    assert tree(torn) == tree(whole)


@pytest.mark.slow
def test_a_node_that_dies_with_parts_in_its_hands_loses_nothing(
    tmp_path: Path, bikes: Path, videos: Path, emoji: list[Path], tree: Tree
) -> None:
    """Two nodes with folders of their own; the one that is at work is killed."""
    import ray
    from ray.cluster_utils import Cluster

    assert not ray.is_initialized()
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(6):  # copies would collapse: each gets a byte of its own at the end
        (folder / f"bikes{number}.mp4").write_bytes(bikes.read_bytes() + bytes([number]))
    for path in emoji[:24]:
        (folder / path.name).symlink_to(path)
    settings = build(CurateSettings, SETTINGS.model_dump(mode="json"), sets=["parts.max_sources=2"])
    curate([folder], tmp_path / "whole", settings, engine="inline")
    homes = [Path(tempfile.mkdtemp(prefix="um")) for _ in range(2)]
    cluster = Cluster()
    killed: list[int] = []
    try:
        cluster.add_node(num_cpus=1, temp_dir=str(homes[0]))
        victim = cluster.add_node(num_cpus=1, temp_dir=str(homes[1]))
        cluster.wait_for_nodes()
        out = tmp_path / "run"

        def kill_when_at_work() -> None:
            while not killed:
                # Its worker holds a temporary file in the stage's folder, so it is at a part.
                done = len(list(out.glob("watch-*/*.parquet")))
                if done >= 3:
                    killed.append(done)
                    cluster.remove_node(victim, allow_graceful=False)
                time.sleep(0.05)

        import threading

        killer = threading.Thread(target=kill_when_at_work, daemon=True)
        killer.start()
        run = curate([folder], out, settings, engine="ray", address=cluster.address)
        killer.join(timeout=30)
    finally:
        ray.shutdown()
        cluster.shutdown()
        for home in homes:
            shutil.rmtree(home, ignore_errors=True)
    assert killed and killed[0] < run.info["totals"]["parts"]
    assert run.quarantined == 0
    assert tree(tmp_path / "run") == tree(tmp_path / "whole")


def test_a_full_disk_that_a_writer_tells_of_in_words_alone_has_its_number(tmp_path: Path) -> None:
    with pytest.raises(OSError) as raised, atomic(tmp_path / "weights") as temporary:
        temporary.write_bytes(b"half")
        raise RuntimeError("I/O error: No space left on device (os error 28)")
    assert raised.value.errno == errno.ENOSPC and raised.value.filename.endswith("weights")
    assert not list(tmp_path.iterdir())
