"""Quality falls with every fault, on photographs that are stored as samples are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from unimodal.pipeline.frames import Clip, Sample
from unimodal.pipeline.media import iter_frames, read_image
from unimodal.pipeline.scorers import quality
from unimodal.pipeline.scorers.quality import QualitySettings

# Scans and micrographs are left out: a page of print, for one, has a white ground for its noise.
PHOTOGRAPHS = (
    *("astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "grass.png"),
    *("gravel.png", "motorcycle_left.png", "rocket.jpg"),
)
Fault = Callable[[np.ndarray, float], np.ndarray]


def _stored(picture: np.ndarray, level: int = 90) -> np.ndarray:
    import cv2

    jpeg = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, level])[1]
    return np.asarray(cv2.imdecode(jpeg, cv2.IMREAD_COLOR))


def _blur(picture: np.ndarray, sigma: float) -> np.ndarray:
    import cv2

    return np.asarray(cv2.GaussianBlur(picture, (0, 0), sigma) if sigma else picture)


def _noise(picture: np.ndarray, sigma: float) -> np.ndarray:
    noise = np.random.default_rng(0).normal(0, sigma, picture.shape)
    return np.clip(np.rint(picture + noise), 0, 255).astype(np.uint8)


def _enlarged(picture: np.ndarray, factor: float) -> np.ndarray:
    import cv2

    height, width = picture.shape[:2]
    small = cv2.resize(
        picture, (round(width / factor), round(height / factor)), interpolation=cv2.INTER_AREA
    )
    return np.asarray(cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC))


def _faded(picture: np.ndarray, contrast: float) -> np.ndarray:
    return np.rint((picture - 128.0) * contrast + 128).astype(np.uint8)


def _overexposed(picture: np.ndarray, gain: float) -> np.ndarray:
    return np.clip(picture * gain, 0, 255).astype(np.uint8)


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0, the mean of their places for equal ones."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(counts) - (counts + 1) / 2)[places])


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    """Rank correlation."""
    return float(np.corrcoef(_ranks(first), _ranks(second))[0, 1])


@pytest.fixture(scope="module")
def pictures(photos: Path) -> dict[str, np.ndarray]:
    """BGR, 320 pixels high."""
    import cv2

    found = {}
    for name in PHOTOGRAPHS:
        pixels = read_image(photos / name)[..., ::-1]
        width = round(pixels.shape[1] * 320 / pixels.shape[0])
        found[name] = cv2.resize(pixels, (width, 320), interpolation=cv2.INTER_AREA)
    return found


def _measure(picture: np.ndarray) -> float:
    found = quality.quality(_stored(picture), (8, 8), QualitySettings())
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("fault", "levels"),
    [
        (_blur, (0, 1, 1.5, 2, 3, 5)),
        (_noise, (0, 12, 18, 27, 40)),  # less of it does not outlive being stored as JPEG
        (lambda p, q: _stored(p, int(q)), (95, 60, 40, 25, 15, 8)),
        (_enlarged, (1, 2, 3, 4, 6, 8)),
        (_faded, (0.5, 0.25, 0.15, 0.1)),
    ],
    ids=["blur", "noise", "jpeg", "enlarged", "faded"],
)
def test_quality_falls_with_every_fault(
    fault: Fault, levels: tuple[float, ...], pictures: dict[str, np.ndarray]
) -> None:
    correlations = []
    for name, picture in pictures.items():
        found = np.array([_measure(fault(picture, level)) for level in levels])
        # A hundredth: JPEG's own grain is not the same on two levels.
        assert np.diff(found).max() < 0.01, (name, found)
        assert found[-1] < 0.75 * found[0], (name, found)
        correlations.append(spearman(found, -np.arange(len(levels))))
    assert np.mean(correlations) > 0.97, correlations


def test_untouched_photographs_are_good(pictures: dict[str, np.ndarray]) -> None:
    """Rough surfaces too: texture is neither noise nor blocks."""
    found = {name: _measure(picture) for name, picture in pictures.items()}
    assert min(found.values()) > 0.75, found


def test_clipping_costs_more_the_more_of_the_picture_it_takes(
    pictures: dict[str, np.ndarray],
) -> None:
    some = [picture for name, picture in pictures.items() if name != "brick.png"]
    means = [
        np.mean([_measure(_overexposed(picture, gain)) for picture in some])
        for gain in (1.0, 2.0, 3.0, 4.0)
    ]
    assert np.diff(means).max() < -0.04, means
    white = _overexposed(pictures["brick.png"], 4.0)  # nothing is left of it
    assert quality.quality(_stored(white), (8, 8), QualitySettings()) is None


def test_noise_is_measured_in_gray_levels_and_texture_is_none(
    pictures: dict[str, np.ndarray],
) -> None:
    import cv2

    for name, picture in pictures.items():
        gray = cv2.cvtColor(picture, cv2.COLOR_BGR2GRAY).astype(np.float32)
        assert quality.noise(gray) < 1, name
        noise = np.random.default_rng(0).normal(0, 10, gray.shape).astype(np.float32)
        # Within grass and gravel noise does not show, to people either.
        if name not in ("grass.png", "gravel.png"):
            assert 6.5 < quality.noise(gray + noise) < 11, name


def test_blocks_are_found_where_the_grid_is(pictures: dict[str, np.ndarray]) -> None:
    import cv2

    coded = _stored(pictures["coffee.png"], 15)
    gray = cv2.cvtColor(coded, cv2.COLOR_BGR2GRAY).astype(np.float32)
    whole = quality.blockiness(gray, (8, 8))
    assert whole > 2
    assert quality.blockiness(gray, (4, 4)) < 0
    assert quality.blockiness(gray[3:, 5:], (5, 3)) == pytest.approx(whole, rel=0.2)


def _clip(pictures: list[np.ndarray], looked_at: int, **row: int) -> Clip:
    import cv2

    samples = []
    for i, picture in enumerate(pictures):
        jpeg = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()
        samples.append(Sample(i / 2, True, i < looked_at, 0, jpeg))
    return Clip({"uid": "u", "kind": "video", **row}, tuple(samples))


def _score(clip: Clip) -> float | None:
    (found,) = quality.load(QualitySettings())([clip])
    assert set(found) == set(quality.COLUMNS.names)
    return found["quality"]


def test_a_talking_head_ranks_above_its_wreck(videos: Path) -> None:
    found = {}
    for name in ("carphone_pristine.mp4", "carphone_distorted.mp4"):
        frames = [pixels[..., ::-1] for _, pixels in iter_frames(videos / name)][::40]
        found[name] = _score(_clip(frames, 3))
    pristine, distorted = found.values()
    assert pristine is not None and distorted is not None
    assert pristine > 0.85 > distorted + 0.15


def test_a_video_has_the_mean_of_what_scorers_look_at(pictures: dict[str, np.ndarray]) -> None:
    sharp = pictures["coffee.png"]
    soft = _blur(sharp, 3)
    one, other = (_score(_clip([picture], 1)) for picture in (sharp, soft))
    assert one is not None and other is not None and one > other + 0.3
    assert _score(_clip([sharp, soft, soft], 2)) == pytest.approx((one + other) / 2, abs=1e-9)


def test_letterbox_bars_are_not_underexposed(pictures: dict[str, np.ndarray]) -> None:
    picture = pictures["coffee.png"]
    height, width = picture.shape[:2]
    bars = np.zeros((96, width, 3), np.uint8)
    boxed = np.concatenate([bars, picture, bars])
    size = {"width": width, "height": height + 192}
    crop = {"crop_x0": 0, "crop_y0": 96, "crop_x1": width, "crop_y1": height + 96}
    plain = _score(_clip([picture], 1, width=width, height=height))
    assert _score(_clip([boxed], 1, **size, **crop)) == pytest.approx(plain, abs=0.02)
    double = {name: 2 * value for name, value in (size | crop).items()}  # a source twice as large
    assert _score(_clip([boxed], 1, **double)) == pytest.approx(plain, abs=0.05)
    assert _score(_clip([boxed], 1, **size)) < plain - 0.05  # type: ignore[operator]


def test_the_grid_of_a_scaled_source_is_not_looked_for(pictures: dict[str, np.ndarray]) -> None:
    picture = pictures["rocket.jpg"]
    height, width = picture.shape[:2]
    _, own = quality.inside_bars(picture, {"width": width, "height": height})
    _, scaled = quality.inside_bars(picture, {"width": 2 * width, "height": 2 * height})
    assert own == (8, 8) and scaled is None


@pytest.mark.parametrize("size", [(1, 1), (1, 1000), (1000, 3), (23, 23)])
def test_tiny_and_plain_pictures_are_null(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    assert _score(_clip([rng.integers(0, 256, (*size, 3), dtype=np.uint8)], 1)) is None
    assert _score(_clip([np.full((64, 64, 3), 200, np.uint8)], 1)) is None
    assert _score(_clip([], 0)) is None


@pytest.mark.parametrize("size", [(24, 24), (25, 200), (131, 33)])
def test_odd_sizes_are_measured(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    found = _score(_clip([rng.integers(0, 256, (*size, 3), dtype=np.uint8)], 1))
    assert found is not None and 0 <= found < 0.2
