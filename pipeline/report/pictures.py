"""Small pictures for the report, taken out of the frames tars without reading the rest of them."""

from __future__ import annotations

import base64
import mmap
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from unimodal.pipeline.errors import MediaError
from unimodal.pipeline.observers.keyframes import even

if TYPE_CHECKING:
    from unimodal.pipeline.run import Run

BOX = (320, 271)
"""Pixels, width and height, that a clip's picture fits in."""
CELL = (96, 54)
"""Pixels of one frame of a source's film strip."""
GAP = 2
QUALITY = 66
BACK = 128  # gray level between frames: visible on light pages and on dark ones

Row = Mapping[str, Any]
Member = tuple[str, str]  # part, name in its frames tar
Box = tuple[int, int, int, int]  # x, y, width, height


@dataclass(frozen=True)
class Picture:
    """A JPEG as a data URI, and its size in pixels."""

    uri: str
    width: int
    height: int


@dataclass
class Pictures:
    """What `draw` made; what could not be read is missing from it."""

    clips: dict[str, Picture] = field(default_factory=dict)  # by uid
    strips: dict[str, Picture] = field(default_factory=dict)  # by uri


def places(tar: Path, wanted: Collection[str]) -> dict[str, tuple[int, int]]:
    """Offset and length of the members `wanted` of a tar of ours; those it lacks are left out.

    Only headers are looked at, and none behind the last that is wanted: tarfile takes fifty times
    as long, and a report of a large run would spend its time there. Raises `MediaError`
    if `tar` is none.
    """
    found: dict[str, tuple[int, int]] = {}
    left = {name.encode() for name in wanted}
    try:
        with tar.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            at, end = 0, len(data)
            while left and at + 512 <= end and data[at]:
                if data[at + 257 : at + 262] != b"ustar":
                    raise ValueError("a header is broken")
                name = data[at : at + 100].rstrip(b"\0")
                size = int(data[at + 124 : at + 135], 8)
                if name in left and size >= 0 and at + 512 + size <= end:
                    left.discard(name)
                    found[name.decode()] = (at + 512, size)
                at += 512 + -(-max(0, size) // 512) * 512
    except (OSError, ValueError) as error:
        raise MediaError(f"frames cannot be read: {error}", tar) from error
    return found


def draw(run: Run, clips: Sequence[Row], strips: Mapping[str, Sequence[Member | None]]) -> Pictures:
    """Pictures of clips (rows of the joined view) and film strips of sources.

    A video's picture shows three frames, an image's the image. Each tar that is needed is opened
    once. Frames that are not there any more are left out.
    """
    wanted: dict[str, set[str]] = defaultdict(set)
    owners: dict[str, list[Row]] = defaultdict(list)
    for row in clips:
        owners[row["part"]].append(row)
        wanted[row["part"]].update(members(row))
    for cells in strips.values():
        for part, member in filter(None, cells):
            wanted[part].add(member)
    cells_by_part: dict[str, list[tuple[str, int, str]]] = defaultdict(list)
    canvases: dict[str, np.ndarray] = {}
    for uri, cells in strips.items():
        width, height = CELL
        canvases[uri] = np.full((height, width * len(cells), 3), BACK, np.uint8)
        for number, cell in enumerate(cells):
            if cell is not None:
                cells_by_part[cell[0]].append((uri, number, cell[1]))
    made = Pictures()
    for part in sorted(wanted):
        tar = run.frames_tar(part)
        try:
            found = places(tar, wanted[part])
            with tar.open("rb") as file:
                data = {name: _at(file, place) for name, place in found.items()}
        except (MediaError, OSError):
            continue  # the report shows a placeholder
        for row in owners[part]:
            frames = [data[member] for member in members(row) if member in data]
            picture = _clip(frames, row)
            if picture is not None:
                made.clips[row["uid"]] = picture
        for uri, number, member in cells_by_part[part]:
            if member in data:
                _paste(canvases[uri], data[member], (number * CELL[0], 0, *CELL))
    for uri, canvas in canvases.items():
        if (canvas != BACK).any():
            made.strips[uri] = _encoded(canvas)
    return made


def members(row: Row) -> list[str]:
    """The (at most) three samples that stand for a clip, in order of time."""
    samples = row["samples"] or []
    chosen = [s["member"] for s in samples if s["scoring"]] or [s["member"] for s in samples]
    return [chosen[i] for i in even(len(chosen), 3)]


def layout(count: int, aspect: float, widest: int) -> tuple[list[Box], int, int]:
    """Boxes of `count` (1 to 3) frames of one aspect within `BOX`, and the size they take.

    Three frames stand side by side, or the middle one large with the others under or beside it:
    whichever makes most of the box. No frame gets wider than `widest` pixels.
    """
    wide, high = BOX

    def grid(columns: int, rows: int) -> list[Box]:
        room = (wide - GAP * (columns - 1)) / columns, (high - GAP * (rows - 1)) / rows
        w, h = _fit(min(room[0], room[1] * aspect, widest), aspect)
        return [(x * (w + GAP), y * (h + GAP), w, h) for y in range(rows) for x in range(columns)]

    tries = [grid(count, 1), grid(1, count)]
    if count == 3:
        w, h = _fit(min((wide - GAP) / 2, (high - GAP) / 3 * aspect, widest / 2), aspect)
        large = (0, 0, 2 * w + GAP, 2 * h)
        tries.append([(0, 2 * h + GAP, w, h), large, (w + GAP, 2 * h + GAP, w, h)])
        w, h = _fit(min((wide - GAP) / 3, (high - GAP) / 2 * aspect, widest / 2), aspect)
        large = (0, 0, 2 * w, 2 * h + GAP)
        tries.append([(2 * w + GAP, 0, w, h), large, (2 * w + GAP, h + GAP, w, h)])
    best = max(tries, key=lambda boxes: sum(w * h for _, _, w, h in boxes))
    return best, max(x + w for x, _, w, _ in best), max(y + h for _, y, _, h in best)


def _fit(width: float, aspect: float) -> tuple[int, int]:
    return max(1, int(width)), min(BOX[1], max(1, int(int(width) / aspect)))


def _at(file: Any, place: tuple[int, int]) -> bytes:
    file.seek(place[0])
    return file.read(place[1])


def _clip(jpegs: Sequence[bytes], row: Row) -> Picture | None:
    if not jpegs:
        return None
    boxes, width, height = layout(len(jpegs), row["width"] / row["height"], row["width"])
    canvas = np.full((height, width, 3), BACK, np.uint8)
    for jpeg, box in zip(jpegs, boxes, strict=True):
        _paste(canvas, jpeg, box)
    return _encoded(canvas)


def _paste(canvas: np.ndarray, jpeg: bytes, box: Box) -> None:
    """Scale a JPEG to cover a box of the canvas; what sticks out on both sides is cut off."""
    import cv2

    x, y, width, height = box
    reduced = {
        8: cv2.IMREAD_REDUCED_COLOR_8,
        4: cv2.IMREAD_REDUCED_COLOR_4,
        2: cv2.IMREAD_REDUCED_COLOR_2,
        1: cv2.IMREAD_COLOR,
    }
    data = np.frombuffer(jpeg, np.uint8)
    # Stored frames have a short side of 448 by default: the decoder can skip most of the work.
    factor = max(f for f in reduced if f == 1 or f * min(width, height) <= 448)
    frame = cv2.imdecode(data, reduced[factor])
    if frame is not None and (frame.shape[0] < height or frame.shape[1] < width) and factor > 1:
        frame = cv2.imdecode(data, cv2.IMREAD_COLOR)
    if frame is None:
        return
    scale = max(height / frame.shape[0], width / frame.shape[1])
    size = (max(width, round(frame.shape[1] * scale)), max(height, round(frame.shape[0] * scale)))
    frame = cv2.resize(frame, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    canvas[y : y + height, x : x + width] = frame[top : top + height, left : left + width]


def _encoded(canvas: np.ndarray) -> Picture:
    import cv2

    _, jpeg = cv2.imencode(".jpg", canvas, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])
    text = base64.b64encode(jpeg.tobytes()).decode()
    return Picture(f"data:image/jpeg;base64,{text}", canvas.shape[1], canvas.shape[0])
