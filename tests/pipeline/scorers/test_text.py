"""Writing of known area, rendered on real frames; and real frames that have none."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from unimodal.pipeline.errors import UsageError
from unimodal.pipeline.frames import Clip, Sample
from unimodal.pipeline.media import iter_frames, read_image
from unimodal.pipeline.scorers import text
from unimodal.pipeline.scorers.text import TextSettings
from unimodal.pipeline.settings import build

Score = Callable[[Clip], dict[str, float | None]]


@pytest.fixture(scope="module")
def frames(videos: Path) -> list[np.ndarray]:
    """Ten half seconds of one 720p shot, short side 448, BGR: no writing in it."""
    import cv2

    found = []
    for time, pixels in iter_frames(videos / "bigbuckbunny.mp4"):
        if float(time) + 1e-6 >= len(found) / 2 and len(found) < 10:
            small = cv2.resize(pixels, (796, 448), interpolation=cv2.INTER_AREA)
            found.append(np.ascontiguousarray(small[..., ::-1]))
    return found


@pytest.fixture(scope="module")
def score() -> Score:
    """The scorer with its defaults, for one clip."""
    loaded = text.load(TextSettings())
    return lambda clip: loaded([clip])[0]


def _clip(pictures: Sequence[np.ndarray], kind: str = "video") -> Clip:
    """A clip of BGR pictures, half a second apart, stored as the pipeline stores them."""
    import cv2

    samples = []
    for i, picture in enumerate(pictures):
        jpeg = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()
        samples.append(Sample(None if kind == "image" else i / 2, True, True, 0, jpeg))
    return Clip({"uid": "u", "kind": kind}, tuple(samples))


def _write(
    picture: np.ndarray, words: str, size: int, x: float = 0.5, y: float = 0.9
) -> tuple[np.ndarray, float]:
    """White letters with a black rim, and the share of the picture that a box around them covers.

    `x` and `y` are where the box is between the edges, 0 to 1.
    """
    from PIL import Image, ImageDraw, ImageFont

    image = Image.fromarray(np.ascontiguousarray(picture[..., ::-1]))
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size)
    rim = max(1, size // 14)
    left, top, right, bottom = draw.textbbox((0, 0), words, font, stroke_width=rim)
    width, height = right - left, bottom - top
    at = (x * (image.width - width) - left, y * (image.height - height) - top)
    draw.text(at, words, "white", font, stroke_width=rim, stroke_fill="black")
    share = width * height / (image.width * image.height)
    return np.ascontiguousarray(np.asarray(image)[..., ::-1]), share


@pytest.mark.parametrize("size", [14, 24, 40, 72])
def test_text_area_is_that_of_a_box_around_the_letters(
    size: int, frames: list[np.ndarray], score: Score
) -> None:
    lines = ["jumping over the lazy fox", "Why, you again?", "quietly boxed jugs"]
    ratios = []
    for frame, line in zip(frames[::3], lines, strict=False):
        picture, true = _write(frame, line[: 900 // size], size)
        found = score(_clip([picture]))["text_area_mean"]
        assert found is not None
        ratios.append(found / true)
    # Of small letters a pixel more on each side is a third: 14 pixels are 11 to the detector.
    assert 0.8 < np.median(ratios) < (1.5 if size == 14 else 1.25), ratios


def test_a_film_and_photographs_without_writing_have_no_text(
    frames: list[np.ndarray], photos: Path, score: Score
) -> None:
    assert score(_clip(frames))["text_area_p90"] == 0
    for name in ("chelsea.png", "coffee.png", "astronaut.png", "rocket.jpg"):
        picture = read_image(photos / name)[..., ::-1]
        found = score(_clip([picture], "image"))["text_area_mean"]
        assert found is not None and found < 0.005, name


def test_a_page_is_mostly_text_and_an_image_has_no_track(photos: Path, score: Score) -> None:
    page = read_image(photos / "page.png")[..., ::-1]
    found = score(_clip([page], "image"))
    assert found["text_area_mean"] is not None and found["text_area_mean"] > 0.3
    assert found["text_area_p90"] == found["text_area_mean"]
    assert found["text_track_s"] is None and found["text_corner"] is None


def test_overlapping_boxes_are_counted_once() -> None:
    box = np.array([[10, 10], [49, 10], [49, 29], [10, 29]], np.float32)
    assert text.share(box[None], (100, 100)) == pytest.approx(0.08)
    assert text.share(np.stack([box, box + np.array([20, 0])]), (100, 100)) == pytest.approx(0.12)


def test_a_subtitle_stands_still_and_rolling_credits_do_not(
    frames: list[np.ndarray], score: Score
) -> None:
    """Six samples with a subtitle: 2.5 s lie between the first and the last, which may shake."""
    still = [
        _write(frame, "I never said that.", 26)[0] if 2 <= i < 8 else frame
        for i, frame in enumerate(frames)
    ]
    found = score(_clip(still))
    assert found["text_track_s"] in (2.0, 2.5) and found["text_corner"] == 0
    rolling = [
        _write(frame, "I never said that.", 26, y=0.9 - 0.08 * i)[0]
        for i, frame in enumerate(frames)
    ]
    found = score(_clip(rolling))
    assert found["text_track_s"] == 0
    assert found["text_area_mean"] is not None and found["text_area_mean"] > 0.01


def test_a_small_mark_in_one_corner_is_told_from_other_writing(
    frames: list[np.ndarray], score: Score
) -> None:
    marked = [_write(frame, "SAMPLE TV", 20, x=0.97, y=0.04)[0] for frame in frames]
    assert score(_clip(marked))["text_corner"] == 1
    half = [*marked[:5], *frames[5:]]
    assert score(_clip(half))["text_corner"] == pytest.approx(0.5, abs=0.11)


def _box(x: float, y: float, width: float = 0.1, height: float = 0.04) -> np.ndarray:
    return np.array([[x, y, x + width, y + height]])


def test_a_track_outlives_one_missing_sample_but_not_two() -> None:
    none, box, times = np.zeros((0, 4)), _box(0.4, 0.9), np.arange(5) / 2
    track = text.longest_track
    assert track([box, none, box, box, box], times, TextSettings()) == 2.0
    assert track([box, none, none, box, box], times, TextSettings()) == 0.5
    assert track([box, none, box, none, none], times, TextSettings(track_gap=0)) == 0
    drifting = [_box(0.4 + 0.01 * i, 0.9) for i in range(5)]  # each overlaps the next by 0.82
    assert track(drifting, times, TextSettings()) == 0.5


def test_only_small_boxes_near_two_edges_are_corner_marks() -> None:
    def share(*boxes: np.ndarray) -> float | None:
        return text.corner_share(boxes, TextSettings())

    corner = _box(0.88, 0.02)
    assert share(corner, corner, corner, corner) == 1
    assert share(_box(0.4, 0.95), _box(0.4, 0.95)) == 0  # a subtitle touches one edge
    assert share(_box(0.0, 0.0, 1.0, 0.3), _box(0.0, 0.0, 1.0, 0.3)) == 0  # a banner is not small
    assert share(corner, _box(0.02, 0.02), _box(0.02, 0.9)) == 0  # it does not stay
    assert share(corner) is None


@pytest.mark.parametrize("start", [0, 1, 2, 3])
def test_sparing_looks_finds_what_looking_everywhere_finds(
    start: int, frames: list[np.ndarray]
) -> None:
    """A subtitle in three samples, wherever they begin."""
    looks: list[int] = []

    def counted(settings: TextSettings) -> text.Find:
        find = text.detector(settings)

        def count(picture: np.ndarray, short_side: int) -> np.ndarray:
            looks.append(picture.shape[0])
            return find(picture, short_side)

        return count

    clip = _clip(
        [
            _write(frame, "Where are you going?", 24)[0] if start <= i < start + 3 else frame
            for i, frame in enumerate(frames[:7])
        ]
    )
    every = TextSettings(coarse_s=0, still=0)
    full = text.columns(clip, counted(every), every)
    assert looks == [352] * 7
    looks.clear()
    sparing = text.columns(clip, counted(TextSettings()), TextSettings())
    assert sum(looks) < 0.65 * 7 * 352
    assert full["text_track_s"] == sparing["text_track_s"] == 1
    assert sparing["text_area_mean"] == pytest.approx(full["text_area_mean"], rel=0.1)
    assert sparing["text_area_p90"] == pytest.approx(full["text_area_p90"], rel=0.1)


def test_a_sample_that_hardly_differs_is_not_looked_at(frames: list[np.ndarray]) -> None:
    looks = []

    def find(picture: np.ndarray, short_side: int) -> np.ndarray:
        looks.append(picture.shape)
        return np.array([[[0, 0], [64, 0], [64, 32], [0, 32]]], np.float32)

    still = _clip([frames[0]] * 9)
    found, size = text.look(still, find, TextSettings()) or ([], None)
    assert size == (352, 640) and len(looks) == 1 and len(found) == 9
    assert all(len(boxes) == 1 for boxes in found)
    changed, _ = _write(frames[0], "!", 20)  # one letter anywhere is enough of a difference
    looks.clear()
    text.look(_clip([frames[0], frames[0], changed, changed]), find, TextSettings())
    assert len(looks) == 2


def test_no_two_samples_running_and_no_second_are_left_out() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        times = np.cumsum(rng.choice([0.4, 0.5, 0.52, 1.7], rng.integers(1, 20))).tolist()
        chosen = text._coarse(times, 1.0)
        assert chosen and chosen[0] <= 1 and chosen[-1] >= len(times) - 2
        for a, b in pairwise(chosen):
            assert b == a + 1 or (b == a + 2 and times[b] - times[a] <= 1.02)
    grid = [i / 2 for i in range(9)]
    assert text._coarse(grid, 1.0) == [1, 3, 5, 7]
    assert text._coarse(grid, 0.0) == list(range(9))


@pytest.mark.parametrize("size", [(1, 1), (1, 1000), (1000, 1), (7, 640)])
def test_pictures_too_small_for_a_letter_are_null(size: tuple[int, int], score: Score) -> None:
    found = score(_clip([np.full((*size, 3), 128, np.uint8)] * 2))
    assert set(found) == set(text.COLUMNS.names) and set(found.values()) == {None}
    assert set(score(Clip({"uid": "u", "kind": "video"}, ())).values()) == {None}


@pytest.mark.parametrize("size", [(33, 31), (12, 900), (900, 20)])
def test_odd_sizes_are_measured(size: tuple[int, int], score: Score) -> None:
    assert score(_clip([np.full((*size, 3), 128, np.uint8)] * 2))["text_area_mean"] == 0


def test_boxes_are_those_of_rapidocr_on_the_same_map(photos: Path) -> None:
    """With its settings and without our own conditions; its order and rounding are not ours."""
    import cv2
    from rapidocr.ch_ppocr_det.utils import DBPostProcess

    maps: list[np.ndarray] = []
    settings = TextSettings(unclip=1.6, crisp=0, crisp_thick=0, thickest=1, score=0.5)
    original, text.boxes = (
        text.boxes,
        lambda map_, *rest: maps.append(map_) or original(map_, *rest),
    )
    try:
        page = cv2.resize(read_image(photos / "page.png"), (640, 320))
        ours = text.detector(settings)(page, 320)
    finally:
        text.boxes = original
    height, width = maps[0].shape
    post = DBPostProcess(0.3, 0.5, 1000, 1.6, "fast", True)
    theirs, _ = post(maps[0][None, None], (height, width))
    masks = [np.zeros((height, width), np.uint8) for _ in range(2)]
    for mask, found in zip(masks, (ours, theirs), strict=True):
        for corners in found:
            cv2.fillConvexPoly(mask, np.rint(corners).astype(np.int32), 1)
    assert len(ours) > 5 and abs(len(ours) - len(theirs)) <= 2
    assert (masks[0] & masks[1]).sum() / (masks[0] | masks[1]).sum() > 0.9


def test_emu3_looks_at_fewer_pixels(frames: list[np.ndarray]) -> None:
    """Short side 256, as Emu3 does; the larger of two bounds never enlarges."""
    sizes = []

    def find(picture: np.ndarray, short_side: int) -> np.ndarray:
        sizes.append(picture.shape[:2])
        return np.zeros((0, 4, 2), np.float32)

    settings = build(TextSettings, sets=["long_side=none", "short_side=256"])
    text.look(_clip(frames[:1]), find, settings)
    text.look(_clip([frames[0][:96, :160]]), find, settings)
    assert sizes == [(256, 448), (96, 160)]


def test_missing_and_broken_detectors_are_named(tmp_path: Path) -> None:
    assert text.absent(TextSettings()) is None
    missing = TextSettings(model=str(tmp_path / "no.onnx"))
    assert "no.onnx" in str(text.absent(missing))
    with pytest.raises(UsageError, match=r"no\.onnx"):
        text.load(missing)
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"not a model")
    with pytest.raises(UsageError, match=r"broken\.onnx cannot be loaded"):
        text.load(TextSettings(model=str(broken)))
    first = text.identity(TextSettings(model=str(broken)))
    broken.write_bytes(b"another")
    assert text.identity(TextSettings(model=str(broken))) != first


def test_nothing_heavy_is_imported_before_a_detector_is_loaded() -> None:
    code = (
        "import sys; from unimodal.pipeline.scorers import quality, text; "
        "text.absent(text.TextSettings()); quality.absent(quality.QualitySettings()); "
        "heavy = {'onnxruntime', 'rapidocr', 'cv2', 'torch', 'av'} & set(sys.modules); "
        "sys.exit(str(heavy) if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
