"""Three engines, one result."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from unimodal.pipeline.engine import choose
from unimodal.pipeline.errors import UnimodalError, UsageError
from unimodal.pipeline.presets import CurateSettings
from unimodal.pipeline.progress import Progress
from unimodal.pipeline.run import curate
from unimodal.pipeline.settings import build

Tree = Callable[[Path], dict[str, bytes]]
SETTINGS = build(CurateSettings, sets=["parts.max_sources=8", "decide.image_min_area=0"])


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, bikes: Path, emoji: list[Path]) -> Path:
    """A video with cuts, 24 pictures, and a file that cannot be read."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "bikes.mp4").symlink_to(bikes)
    for path in emoji[:24]:
        (folder / path.name).symlink_to(path)
    (folder / "broken.mp4").write_text("nothing")
    return folder


@pytest.fixture(scope="module")
def expected(
    tmp_path_factory: pytest.TempPathFactory, inputs: Path, tree: Tree
) -> dict[str, bytes]:
    """What the inline engine writes."""
    out = tmp_path_factory.mktemp("inline") / "run"
    run = curate([inputs], out, SETTINGS, engine="inline")
    assert run.quarantined == 1 and run.clips.num_rows > 24
    return tree(out)


def test_auto_is_ray_where_an_address_is_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert choose("auto", None) == "local"
    assert choose("auto", "ray://head:10001") == "ray"
    assert choose("inline", "ray://head:10001") == "inline"
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    assert choose("auto", None) == "ray"
    with pytest.raises(UsageError, match="unknown engine spark"):
        choose("spark", None)


def test_the_local_pool_writes_the_same_bytes(
    tmp_path: Path, inputs: Path, expected: dict[str, bytes], tree: Tree
) -> None:
    curate([inputs], tmp_path / "run", SETTINGS, engine="local", workers=2)
    assert tree(tmp_path / "run") == expected


def _children() -> list[int]:
    """Worker processes that this process has started."""
    found = []
    for task in Path("/proc/self/task").iterdir():
        for pid in (task / "children").read_text().split():
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
            if b"unimodal.pipeline.worker" in command:
                found.append(int(pid))
    return found


def test_the_pool_survives_workers_that_are_killed(
    tmp_path: Path, inputs: Path, expected: dict[str, bytes], tree: Tree
) -> None:
    """Every worker is killed once, as the machine's out-of-memory killer might."""
    killed: set[int] = set()

    class Reaper(Progress):
        def advance(self, task: str, amount: float = 1.0) -> None:
            if task == "sources" and len(killed) < 2:
                for pid in _children():
                    os.kill(pid, signal.SIGKILL)
                    killed.add(pid)

    curate([inputs], tmp_path / "run", SETTINGS, engine="local", workers=2, progress=Reaper())
    assert killed
    assert tree(tmp_path / "run") == expected


@pytest.fixture
def ray_apart() -> Iterator[None]:
    """Ray must not be running before, and does not afterwards."""
    import ray

    assert not ray.is_initialized()
    yield
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.usefixtures("ray_apart")
def test_a_ray_of_our_own_writes_the_same_bytes(
    tmp_path: Path, inputs: Path, expected: dict[str, bytes], tree: Tree
) -> None:
    """Also where another cluster runs on the machine, which is left alone."""
    import ray
    from ray.cluster_utils import Cluster

    somebodys = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        curate([inputs], tmp_path / "run", SETTINGS, engine="ray", workers=2)
    finally:
        somebodys.shutdown()
    assert tree(tmp_path / "run") == expected
    assert not ray.is_initialized()


@pytest.mark.slow
@pytest.mark.usefixtures("ray_apart")
def test_a_ray_cluster_of_two_nodes_writes_the_same_bytes(
    tmp_path: Path, inputs: Path, expected: dict[str, bytes], tree: Tree
) -> None:
    from ray.cluster_utils import Cluster

    # Folders of their own: nothing passes between the nodes but Ray and the run directory. Not
    # under tmp_path, which is too long for the sockets that Ray puts there.
    homes = [Path(tempfile.mkdtemp(prefix="um")) for _ in range(2)]
    cluster = Cluster()
    try:
        for home in homes:
            cluster.add_node(num_cpus=1, temp_dir=str(home))
        cluster.wait_for_nodes()
        curate([inputs], tmp_path / "run", SETTINGS, engine="auto", address=cluster.address)
        assert all(list(home.glob("session_*/logs/worker-*")) for home in homes)
    finally:
        cluster.shutdown()
        for home in homes:
            shutil.rmtree(home, ignore_errors=True)
    assert tree(tmp_path / "run") == expected


def test_an_address_without_a_cluster_is_named(tmp_path: Path, emoji: list[Path]) -> None:
    with pytest.raises(UnimodalError, match=r"no Ray at 127\.0\.0\.1:9 .* --engine local"):
        curate([emoji[0]], tmp_path / "run", engine="ray", address="127.0.0.1:9")
