"""How much of a picture is writing: the boxes of a text detector, their area and how they stand.

    sample JPEG ──> 640 px, multiples of 32 ──> PP-OCR detector (ONNX) ──> probability map ──> boxes

Only the detector that the rapidocr package brings is used: nothing is recognized or downloaded.
Its map is thresholded, and each region becomes the smallest rotated rectangle around it, grown
because detectors of this kind (DB, Liao et al., arXiv 1911.08947) mark the core of a line.

A detection at 640x352 costs about 70 ms of one core, more than all else that `curate` does for half
a second of video. So samples are looked at coarse to fine, which halves the cost and loses no text
that stands for a second (Big Buck Bunny, 131 clips: 47 instead of 79 ms a sample, the same verdict
on every clip, a mean area off by 0.013 in the one with a title that grows; benchmarks/text.py):

- in time: every second sample first, and one between two others only if one of them has text,
- in space: such a sample is searched only in the rows where its neighbors have text,
- not at all: a sample that hardly differs from a neighbor has the neighbor's boxes.

The detector takes what lies in the middle of a soft picture for one thick line: thick regions must
be surer than lines (`crisp_thick`), which leaves 1 of 155 frames of that film with "text", not 20,
and finds 121 of 124 rendered texts. Tried and left out: a first look at 320 pixels (overlooks the
small print of credits), and a threshold on the density of edges (spares one look in six before it
loses text).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from unimodal.pipeline.clips import TEXT as COLUMNS
from unimodal.pipeline.errors import UsageError
from unimodal.pipeline.framepass import one_opencv_thread
from unimodal.pipeline.frames import Clip
from unimodal.pipeline.scorers.weights import fingerprint
from unimodal.pipeline.settings import Settings

VERSION = 1
BATCH = 1

# What PP-OCR's detectors are trained with (ImageNet's, on BGR). The rapidocr package uses 0.5 for
# all six, which finds "text" in 35 of 155 frames of a film that has none, instead of in 20.
MEAN = np.array([0.485, 0.456, 0.406], np.float32)
STD = np.array([0.229, 0.224, 0.225], np.float32)

STRIDE = 32  # the detector wants sides that it divides
MARGIN = 32  # pixels around known text in which it may have moved, or the neighborhood tells
LEAST_SIDE = 8  # pixels: no letter is smaller


class TextSettings(Settings):
    """The search for writing in the pictures of a clip."""

    model: str | None = None
    """Path of another DB text detector (ONNX); without it, the one in the rapidocr package."""
    long_side: int | None = 640
    """Pixels that pictures are scaled down to; "none" for no such bound."""
    short_side: int | None = None
    """The same for the shorter side. Emu3 has 256, which loses subtitles."""
    threshold: float = 0.3
    """Probability from which a pixel counts as text."""
    score: float = 0.5
    """Mean probability within a box below which it is none."""
    crisp: float = 0.7
    """Share of a region's pixels that must be sure (probability over 0.8)."""
    crisp_thick: float = 0.88
    """The same for regions thicker than `thick`: a main object in the middle looks like that."""
    thick: float = 0.08
    """Thickness of a region over the picture's short side; a line of text is thinner."""
    thickest: float = 0.35
    """Regions thicker than this are no text, whatever they look like."""
    unclip: float = 0.8
    """How much boxes are grown: area * unclip / perimeter on each side. At 0.8 they cover 0.9 to
    1.25 times what a box around the letters does; rapidocr's 1.6 makes that 1.4 to 1.9."""
    coarse_s: float = 1.0
    """Seconds between the samples that are looked at first; 0 looks at every sample."""
    still: float = 3.0
    """Gray levels that no 16x16 block may change by in a sample that is not looked at; 0: look."""
    track_iou: float = 0.8
    """Overlap with its first box by which a text stands still. At 0.9 a line of 15 pixels that the
    detector sees a pixel higher has moved: 10 of 22 subtitles of 1.5 s fall apart, at 0.8 two."""
    track_gap: int = 1
    """Samples that such a box may be missing from in between: detectors blink."""
    track_area: float = 0.002
    """Share of the picture that such a box covers at least; a word of a subtitle covers more."""
    corner: float = 0.1
    """A mark in a corner begins within this share of the width and height from it."""
    corner_area: float = 0.02
    """Share of the picture that such a mark covers at most."""
    threads: int = 1
    """Of the detector; engines run a part per core, so more would get in each other's way."""


def absent(settings: TextSettings) -> str | None:
    """Why text cannot be looked for; None if it can."""
    if importlib.util.find_spec("onnxruntime") is None:
        return "no onnxruntime: install it"
    try:
        model_path(settings)
    except UsageError as error:
        return str(error)
    return None


def identity(settings: TextSettings) -> str:
    """What tells the detector in use apart, 16 hex digits: packages bring another now and then."""
    return fingerprint(str(model_path(settings)))


def model_path(settings: TextSettings) -> Path:
    """The detector's file; raises `UsageError` if there is none."""
    if settings.model is not None:
        if not Path(settings.model).is_file():
            raise UsageError(f"no detector at text.model={settings.model}")
        return Path(settings.model)
    spec = importlib.util.find_spec("rapidocr")  # finds it without importing it
    folders = spec.submodule_search_locations if spec else None
    found = [path for folder in folders or () for path in Path(folder).glob("models/*_det_*.onnx")]
    if not found:
        raise UsageError("no text detector: install rapidocr, or set text.model=PATH")
    return max(found)


def load(settings: TextSettings) -> Callable[[Sequence[Clip]], list[dict[str, Any]]]:
    """A function from clips to their columns; raises `UsageError` without a detector."""
    find = detector(settings)

    def score(clips: Sequence[Clip]) -> list[dict[str, Any]]:
        with one_opencv_thread():
            return [columns(clip, find, settings) for clip in clips]

    return score


Find = Callable[[np.ndarray, int], np.ndarray]
"""Picture, BGR uint8 [H, W, 3] with sides divided by 32, and the short side of the whole that it
is a piece of -> corners of its text boxes in pixels, float32 [N, 4, 2]."""


def detector(settings: TextSettings) -> Find:
    """Load the detector."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = settings.threads
    options.inter_op_num_threads = 1
    options.enable_cpu_mem_arena = False  # an arena keeps the largest picture's memory for good
    options.log_severity_level = 3
    path = model_path(settings)
    try:
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:
        raise UsageError(f"{path} cannot be loaded as an ONNX model: {error}") from error
    name = session.get_inputs()[0].name

    def find(picture: np.ndarray, short_side: int) -> np.ndarray:
        pixels = np.empty((1, 3, *picture.shape[:2]), np.float32)
        for c in range(3):
            np.multiply(picture[..., c], 1 / (255 * STD[c]), out=pixels[0, c])
            pixels[0, c] -= MEAN[c] / STD[c]
        return boxes(session.run(None, {name: pixels})[0][0, 0], short_side, settings)

    return find


def boxes(probability: np.ndarray, short_side: int, settings: TextSettings) -> np.ndarray:
    """Text boxes in a detector's map, float32 [H, W]: corners in its pixels, float32 [N, 4, 2].

    `short_side` is that of the whole picture, which thickness is a share of.
    """
    import cv2

    likely = (probability > settings.threshold).astype(np.uint8)
    joined = cv2.dilate(likely, np.ones((2, 2), np.uint8))
    regions, _ = cv2.findContours(joined, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    found = []
    for region in regions:
        center, (width, height), angle = cv2.minAreaRect(region)
        thickness = min(width, height)
        if thickness < 2 or thickness > settings.thickest * short_side:
            continue
        x, y, w, h = cv2.boundingRect(region)
        inside = np.zeros((h, w), np.uint8)
        cv2.drawContours(inside, [region], -1, 1, cv2.FILLED, offset=(-x, -y))
        box = np.zeros((h, w), np.uint8)
        corners = cv2.boxPoints((center, (width, height), angle)) - np.array([x, y], np.float32)
        cv2.fillPoly(box, [corners.astype(np.int32)], 1)
        piece = probability[y : y + h, x : x + w]
        if cv2.mean(piece, box)[0] < settings.score:
            continue
        own = piece[(inside > 0) & (piece > settings.threshold)]
        thick = thickness > settings.thick * short_side
        if np.mean(own > 0.8) < (settings.crisp_thick if thick else settings.crisp):
            continue
        grow = width * height * settings.unclip / (width + height)  # on both sides together
        found.append(cv2.boxPoints((center, (width + grow, height + grow), angle)))
    return np.asarray(found, np.float32).reshape(-1, 4, 2)


def columns(clip: Clip, find: Find, settings: TextSettings) -> dict[str, float | None]:
    """The columns of one clip; null where its pictures are too small for any letter.

    A still picture has no track, and does not tell a mark from a sign: both are null.
    """
    result: dict[str, float | None] = dict.fromkeys(COLUMNS.names)
    looked = look(clip, find, settings)
    if looked is None:
        return result
    found, size = looked
    areas = [share(one, size) for one in found]
    result |= {
        "text_area_mean": float(np.mean(areas)),
        "text_area_p90": float(np.percentile(areas, 90)),
    }
    if clip.row["kind"] == "video":
        times = [sample.time_s or 0.0 for sample in clip.samples]
        spans = [_bounds(one) / np.tile(size[::-1], 2) for one in found]
        result["text_track_s"] = longest_track(spans, times, settings)
        result["text_corner"] = corner_share(spans, settings)
    return result


def look(
    clip: Clip, find: Find, settings: TextSettings
) -> tuple[list[np.ndarray], tuple[int, int]] | None:
    """Boxes [N, 4, 2] of every sample, in pixels of the (height, width) that is returned too.

    None if the clip has no pictures, or too small ones for any letter.
    """
    count = len(clip.samples)
    coarse = _coarse([sample.time_s or 0.0 for sample in clip.samples], settings.coarse_s)
    found = [np.zeros((0, 4, 2), np.float32)] * count
    pictures: dict[int, np.ndarray] = {}
    size = None
    for left, right in pairwise([-1, *coarse, count]):
        ends = [end for end in (left, right) if 0 <= end < count]
        # The coarse sample first, then those before it if it or the one before them has text.
        for i in (right, *range(left + 1, right)):
            if i == count or (i != right and not any(len(found[end]) for end in ends)):
                continue
            picture = _scaled(clip.samples[i].bgr(), settings)
            if picture is None:
                return None
            size = height, _ = picture.shape[:2]
            near = [end for end in ends if end in pictures]
            still = [k for k in near if _change(picture, pictures[k]) < settings.still]
            if still:
                found[i] = found[still[0]]
            elif i == right:
                found[i] = find(picture, min(size))
            else:
                found[i] = np.concatenate(
                    [
                        find(picture[top:bottom], min(size)) + np.array([0, top], np.float32)
                        for top, bottom in _bands([found[end] for end in ends], height)
                    ]
                )
            if i == right:
                pictures[i] = picture
        pictures.pop(left, None)
    return None if size is None else (found, size)


def share(found: np.ndarray, size: tuple[int, int]) -> float:
    """Share of a picture of (height, width) that boxes [N, 4, 2] cover; overlaps count once."""
    import cv2

    mask = np.zeros(size, np.uint8)
    for corners in found:
        cv2.fillConvexPoly(mask, np.rint(corners).astype(np.int32), 1)
    return float(mask.mean(dtype=np.float64))


def longest_track(
    spans: Sequence[np.ndarray], times: Sequence[float], settings: TextSettings
) -> float:
    """Seconds from the first to the last sample of the box that stands still longest.

    `spans` holds each sample's boxes [N, 4] as (x0, y0, x1, y1). A box that one sample alone has
    stands for 0 s: how long it was there before the next sample is not known.
    """
    longest = 0.0
    tracks: list[tuple[np.ndarray, int, float]] = []  # first box, last sample, since when
    for i, (seen, now) in enumerate(zip(spans, times, strict=True)):
        tracks = [track for track in tracks if i - track[1] <= settings.track_gap + 1]
        overlaps = iou(seen, np.asarray([track[0] for track in tracks]).reshape(-1, 4))
        for k in np.flatnonzero(_areas(seen) >= settings.track_area):
            best = int(overlaps[k].argmax()) if overlaps.size else -1
            if best >= 0 and overlaps[k, best] >= settings.track_iou:
                box, _, since = tracks[best]
                tracks[best] = (box, i, since)
                longest = max(longest, now - since)
            else:
                tracks.append((seen[k], i, now))
    return longest


def corner_share(spans: Sequence[np.ndarray], settings: TextSettings) -> float | None:
    """Share of samples that have a small box at one same place in a corner; 0 if it never stays.

    `spans` holds each sample's boxes [N, 4] as (x0, y0, x1, y1) in shares of width and height.
    None for fewer than two samples: nothing can stay.
    """
    if len(spans) < 2:
        return None
    places = np.zeros((0, 4))
    counts: list[int] = []
    for found in spans:
        near = (found[:, :2] <= settings.corner) | (found[:, 2:] >= 1 - settings.corner)
        marks = found[near.all(axis=1) & (_areas(found) <= settings.corner_area)]
        same = iou(marks, places) >= 0.5  # small boxes shake by a pixel or two
        for k in np.flatnonzero(same.any(axis=0)):
            counts[k] += 1
        new = marks[~same.any(axis=1)]
        places = np.concatenate([places, new])
        counts += [1] * len(new)
    most = max(counts, default=0)
    return most / len(spans) if most > 1 else 0.0


def iou(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Overlap over union of boxes [N, 4] and [M, 4] (x0, y0, x1, y1): float [N, M]."""
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    common = np.clip(high - low, 0, None).prod(axis=2)
    union = _areas(first)[:, None] + _areas(second)[None] - common
    return np.asarray(common / np.maximum(union, 1e-12))


def _areas(spans: np.ndarray) -> np.ndarray:
    return np.asarray((spans[:, 2:] - spans[:, :2]).prod(axis=1))


def _bounds(found: np.ndarray) -> np.ndarray:
    """Upright boxes [N, 4] (x0, y0, x1, y1) around rotated ones [N, 4, 2]."""
    return np.concatenate([found.min(axis=1), found.max(axis=1)], axis=1)


def _scaled(bgr: np.ndarray, settings: TextSettings) -> np.ndarray | None:
    """A picture as the detector wants it, never enlarged but to a multiple of 32; None if tiny."""
    import cv2

    height, width = bgr.shape[:2]
    factor = 1.0
    if settings.long_side:
        factor = min(factor, settings.long_side / max(height, width))
    if settings.short_side:
        factor = min(factor, settings.short_side / min(height, width))
    if min(height, width) * factor < LEAST_SIDE:
        return None
    size = [max(STRIDE, round(side * factor / STRIDE) * STRIDE) for side in (width, height)]
    return cv2.resize(bgr, size, interpolation=cv2.INTER_AREA)


def _coarse(times: Sequence[float], step: float) -> list[int]:
    """Samples to look at first: as few as leave no two neighbors out, nor `step` seconds unseen.

    So text that is in two samples running, or stands for `step` seconds, is in one of them.
    """
    chosen: list[int] = []
    for i in range(len(times)):
        before = chosen[-1] if chosen else -1
        ahead = times[i + 1] - times[max(before, 0)] if i + 1 < len(times) else 0.0
        # A tolerance of half a frame: sample times of film are off the half-second grid.
        if not step or i - before > 1 or ahead > (step if chosen else step / 2) + 0.02:
            chosen.append(i)
    return chosen or list(range(len(times)))


def _change(first: np.ndarray, second: np.ndarray) -> float:
    """The most that any 16x16 block differs by on average, in gray levels of a color channel."""
    import cv2

    height, width = first.shape[:2]
    difference = cv2.absdiff(first, second)
    small = cv2.resize(difference, (width // 16, height // 16), interpolation=cv2.INTER_AREA)
    return float(small.max())


def _bands(known: Sequence[np.ndarray], height: int) -> list[tuple[int, int]]:
    """Rows (top, bottom), multiples of 32, around known boxes; the whole height if it is most."""
    corners = np.concatenate(list(known))
    wanted = np.zeros(height // STRIDE, bool)
    for top, bottom in zip(corners[..., 1].min(axis=1), corners[..., 1].max(axis=1), strict=True):
        first, last = int(top - MARGIN) // STRIDE, int(bottom + MARGIN) // STRIDE
        wanted[max(0, first) : last + 1] = True
    if wanted.mean() > 0.75:  # two halves of a picture cost what the whole does
        return [(0, height)]
    edges = np.flatnonzero(np.diff(np.concatenate([[False], wanted, [False]]).astype(int)))
    return [(int(a) * STRIDE, int(b) * STRIDE) for a, b in edges.reshape(-1, 2)]
