"""A small world in which everything is known: coloured shapes on grey, still, moving and edited.

    Thing          what a picture shows; `picture`, `caption`
    Motion         how a thing moves or changes; `clip`, `clip_caption`
    Edit           a picture, what is to be done, and what must come out

and a judge, which measures the same in pictures alone: `look` (colour, shape, size, place and
ground of the subject) and `motion` (by Farnebäck's optical flow). It is not learned, and
`benchmarks/proof.py` reports how often it is right on real pictures and on what the vision
tokenizer makes of them.

Some combinations are never trained on: of (colour, shape, place) in pictures, of (colour, shape,
motion) in clips, see `held_out`. Everything follows from a seed. Colours are RGB, lengths pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise

import cv2
import numpy as np

SIDE = 64
"""Pixels of a picture along each side: 8x8 codes."""
FRAMES = 16
FPS = 8.0

COLOURS = {
    "red": (225, 40, 40),
    "yellow": (235, 220, 40),
    "green": (40, 190, 60),
    "cyan": (40, 210, 225),
    "blue": (45, 70, 230),
    "magenta": (225, 50, 215),
}
SHAPES = ("circle", "square", "triangle", "bar")
"""A bar lies, half as high as wide. A cross was tried: the vision tokenizer makes it a circle."""
SIZES = {"small": 20.0, "large": 30.0}
GROUNDS = {"black": 40, "grey": 96, "white": 232}
"""Grey levels; of these the vision tokenizer has few different codes."""
PLACES = {
    "on the left": (16.0, 32.0),
    "on the right": (48.0, 32.0),
    "at the top": (32.0, 16.0),
    "at the bottom": (32.0, 48.0),
    "in the middle": (32.0, 32.0),
}
"""(x, y) of the centre."""
LATTICE = 8
"""Centres, and the starts of clips, are multiples of it: a side of a code. Where shapes may stand
at any pixel, the same shape has 64 different sets of codes, and a decoder of width 192 that trained
for half an hour on one core learned colours, but neither shapes nor motions (shape: chance)."""
MOTIONS = ("moves left", "moves right", "moves up", "moves down", "grows", "shrinks")
SPEED = 2.0
"""Pixels per frame; what grows or shrinks gains or loses half as many."""
LANES = (16.0, 32.0, 48.0)
"""Where a clip's shape is along the side of the picture that it does not cross."""

_NAMES = (*SIZES, *COLOURS, *SHAPES, *PLACES, *GROUNDS, *MOTIONS, "it to the on")
WORDS = ("make", "move", *sorted({f" {word}" for name in _NAMES for word in name.split()}))
"""Of captions and instructions, as a text tokenizer parts them."""

GROUND_STEP = 15.0
"""Grey levels by which the ground may differ and is still called kept."""


@dataclass(frozen=True)
class Thing:
    """A shape on a plain ground."""

    colour: str
    shape: str
    size: str
    place: str
    ground: str
    rgb: tuple[int, int, int]
    grey: int
    x: float
    y: float
    side: float

    @property
    def caption(self) -> str:
        return f"a {self.size} {self.colour} {self.shape} {self.place} on {self.ground}"


@dataclass(frozen=True)
class Clip:
    """A thing that moves or changes its size evenly."""

    thing: Thing
    motion: str
    step: tuple[float, float]
    """(x, y) pixels per frame."""
    growth: float
    """Pixels of `side` per frame."""

    @property
    def caption(self) -> str:
        one = self.thing
        return f"a {one.colour} {one.shape} on {one.ground} {self.motion}"


@dataclass(frozen=True)
class Edit:
    """A picture that is changed in one respect."""

    source: Thing
    instruction: str
    result: Thing
    """What comes out; only what the instruction speaks of differs."""


def held_out(colour: str, shape: str, other: str) -> bool:
    """Whether a combination is kept from training: one in six, every pair is seen with others.

    `other` is a place or a motion.
    """
    names = list(MOTIONS) if other in MOTIONS else list(PLACES)
    return (list(COLOURS).index(colour) + SHAPES.index(shape) + names.index(other)) % 6 == 0


def thing(rng: np.random.Generator, unseen: bool, **told: str) -> Thing:
    """A random picture of combinations that are held out, or that are not."""
    while True:
        pick = {
            "colour": str(rng.choice(list(COLOURS))),
            "shape": str(rng.choice(SHAPES)),
            "size": str(rng.choice(list(SIZES))),
            "place": str(rng.choice(list(PLACES))),
            "ground": str(rng.choice(list(GROUNDS))),
        } | told
        if held_out(pick["colour"], pick["shape"], pick["place"]) == unseen:
            break
    return Thing(
        **pick,
        rgb=COLOURS[pick["colour"]],
        grey=GROUNDS[pick["ground"]],
        **dict(zip("xy", _centre(rng, pick["place"]), strict=True)),
        side=SIZES[pick["size"]],
    )


def moving(rng: np.random.Generator, unseen: bool, **told: str) -> Clip:
    """A random clip of combinations that are held out, or that are not."""
    while True:
        colour, shape = str(rng.choice(list(COLOURS))), str(rng.choice(SHAPES))
        motion = told.get("motion", str(rng.choice(MOTIONS)))
        if held_out(colour, shape, motion) == unseen:
            break
    ground = str(rng.choice(list(GROUNDS)))
    steps = FRAMES - 1
    way = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
    dx, dy = (SPEED * part for part in way.get(motion.split()[-1], (0, 0)))
    growth = {"grows": 0.5, "shrinks": -0.5}.get(motion, 0.0) * SPEED
    side = 16.0 if growth else 24.0
    largest = side + abs(growth) * steps
    lane = float(rng.choice(LANES))
    middle = SIDE / 2
    # What moves crosses the picture in its lane; what grows or shrinks stays in a lane's middle.
    start = (middle - 8 * dx if dx else lane, middle - 8 * dy if dy else middle)
    first = largest if growth < 0 else side
    one = Thing(colour, shape, "", "", ground, COLOURS[colour], GROUNDS[ground], *start, first)
    return Clip(one, motion, (dx, dy), growth)


def edit(rng: np.random.Generator, unseen: bool, kind: str | None = None) -> Edit:
    """A random edit, `kind` recolour or move: of a held-out picture, or with neither the source
    nor the result held out."""
    kind = kind or str(rng.choice(["recolour", "move"]))
    while True:
        source = thing(rng, unseen)
        if kind == "recolour":
            colour = str(rng.choice([one for one in COLOURS if one != source.colour]))
            result = replace(source, colour=colour, rgb=COLOURS[colour])
            told = f"make it {colour}"
        else:
            place = str(rng.choice([one for one in PLACES if one != source.place]))
            x, y = _centre(rng, place)
            result = replace(source, place=place, x=x, y=y)
            told = "move it to " + place.split(" ", 1)[1]
        if unseen or not held_out(result.colour, result.shape, result.place):
            return Edit(source, told, result)


def _centre(rng: np.random.Generator, place: str) -> tuple[float, float]:
    """At the place, or a step of the lattice along the side of the picture that it names."""
    x, y = PLACES[place]
    along = LATTICE * float(rng.integers(-1, 1, endpoint=True))
    return x + along * (y != 32), y + along * (x != 32)


# --- drawing --------------------------------------------------------------------------------


def picture(one: Thing) -> np.ndarray:
    """uint8 [SIDE, SIDE, 3]"""
    cover = _cover(one.shape, one.x, one.y, one.side)[..., None]
    pixels = cover * np.array(one.rgb, np.float32) + (1 - cover) * one.grey
    return pixels.round().astype(np.uint8)


def clip(one: Clip, frames: int = FRAMES) -> np.ndarray:
    """uint8 [frames, SIDE, SIDE, 3]"""
    start = one.thing
    return np.stack(
        [
            picture(
                replace(
                    start,
                    x=start.x + number * one.step[0],
                    y=start.y + number * one.step[1],
                    side=start.side + number * one.growth,
                )
            )
            for number in range(frames)
        ]
    )


def _cover(shape: str, x: float, y: float, side: float) -> np.ndarray:
    """Share of each pixel that a shape `side` wide covers, by its signed distance; [SIDE, SIDE]."""
    across = np.arange(SIDE, dtype=np.float32) + 0.5 - x
    down = (np.arange(SIDE, dtype=np.float32) + 0.5 - y)[:, None]
    half = side / 2
    if shape == "circle":
        outside = np.hypot(across, down) - half
    elif shape == "square":
        outside = np.maximum(abs(across), abs(down)) - half
    elif shape == "triangle":  # on its base, as high as wide
        slanted = (2 * abs(across) - (down + half)) / np.float32(5**0.5)
        outside = np.maximum(slanted, down - half)
    else:
        outside = np.maximum(abs(across) - half, abs(down) - half / 2)
    return np.clip(0.5 - outside, 0, 1)


# --- judging --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    """What a picture shows, measured."""

    colour: str
    shape: str
    size: str
    place: str
    ground: str
    grey: float
    """Median level of the ground."""
    x: float
    y: float
    side: float

    @property
    def found(self) -> bool:
        """Whether there is one subject at all."""
        return bool(self.shape)


NOTHING = Seen("", "", "", "", "", 0.0, 0.0, 0.0, 0.0)
CHROMA = 60
"""Difference of the largest and the smallest of R, G and B from which a pixel is the subject's."""
LEAST = 24
"""Pixels of the smallest subject."""


def look(pixels: np.ndarray) -> Seen:
    """Measure uint8 [SIDE, SIDE, 3]. Nothing is found where there is no coloured part, or two."""
    chroma = pixels.max(-1).astype(np.int16) - pixels.min(-1)
    mask = (chroma > CHROMA).astype(np.uint8)
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=4)
    areas = stats[1:, cv2.CC_STAT_AREA]
    if count < 2 or areas.max() < LEAST or (areas >= max(LEAST, areas.max() / 3)).sum() > 1:
        return NOTHING
    mask = labels == 1 + int(areas.argmax())
    near = cv2.dilate(mask.astype(np.uint8), np.ones((7, 7), np.uint8)) > 0
    inner = cv2.erode(mask.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
    rgb = np.median(pixels[inner if inner.any() else mask], axis=0)
    ground = np.median(pixels[~near], axis=0) if not near.all() else np.zeros(3)
    # How much of each pixel is the subject's: its place between the two colours.
    way = rgb - ground
    cover = np.clip(((pixels - ground) * way).sum(-1) / max(1.0, (way * way).sum()), 0, 1) * near
    shape, x, y, side = _fit(cover.astype(np.float32))
    grey = float(ground.mean())
    return Seen(
        min(COLOURS, key=lambda name: _apart(rgb, np.array(COLOURS[name]))),
        shape,
        "small" if side < 25 else "large",
        min(PLACES, key=lambda name: np.hypot(x - PLACES[name][0], y - PLACES[name][1])),
        min(GROUNDS, key=lambda name: abs(grey - GROUNDS[name])),
        grey,
        x,
        y,
        side,
    )


def _apart(one: np.ndarray, other: np.ndarray) -> float:
    """Difference of two colours without their lightness."""
    return float(np.abs((one - one.mean()) - (other - other.mean())).sum())


def _fit(cover: np.ndarray) -> tuple[str, float, float, float]:
    """Shape, centre and side whose drawing is nearest to a cover [SIDE, SIDE] float32, by squared
    difference; sides are tried in steps of a pixel, centres in steps of half a pixel or one."""
    padded = np.pad(cover, PAD)
    best = (np.inf, "", 0.0, 0.0, 0.0)
    middle = (
        2 * (cover.sum() / np.pi) ** 0.5
    )  # of a circle; a square's is less, a bar's and a triangle's more
    for side in range(max(8, int(0.75 * middle)), min(40, int(1.6 * middle) + 2)):
        for shape in SHAPES:
            drawn = _template(shape, side)
            alike = cv2.matchTemplate(padded, drawn, cv2.TM_CCORR)
            _, most, _, (left, top) = cv2.minMaxLoc(alike)
            apart = float((drawn * drawn).sum()) - 2 * most
            if apart < best[0]:
                half = len(drawn) / 2 - PAD
                best = (apart, shape, left + half, top + half, float(side))
    return best[1:]


PAD = 8


@cache
def _template(shape: str, side: int) -> np.ndarray:
    """A shape in the middle of as many pixels as it needs, float32."""
    drawn = _cover(shape, SIDE / 2, SIDE / 2, side).astype(np.float32)
    edge = (SIDE - side) // 2 - 1
    return np.ascontiguousarray(drawn[edge : SIDE - edge, edge : SIDE - edge])


def flow(frames: np.ndarray) -> tuple[float, float, float]:
    """Mean motion (right, down) and growth of what moves, pixels per frame, by Farnebäck's flow.

    `frames` uint8 [F, H, W, 3]. Growth is how fast the rim of what moves goes outwards.
    """
    luma = [_contrast(frame) for frame in frames]
    found = []
    for before, after in pairwise(luma):
        field = cv2.calcOpticalFlowFarneback(before, after, None, 0.5, 3, 13, 5, 7, 1.5, 0)
        changed = cv2.absdiff(before, after) > 12
        if changed.sum() < 8:
            found.append((0.0, 0.0, 0.0))
            continue
        rows, columns = np.nonzero(changed)
        right, down = field[rows, columns].T.astype(np.float64)
        x, y = columns - columns.mean(), rows - rows.mean()
        radius = np.sqrt((x * x + y * y).mean())
        rate = (right * x + down * y).sum() / max(1e-9, (x * x + y * y).sum())
        found.append((right.mean(), down.mean(), rate * radius))
    right, down, growth = np.mean(found, axis=0)
    return float(right), float(down), float(growth)


def _contrast(frame: np.ndarray) -> np.ndarray:
    """One channel in which every colour stands out from every grey: the chroma; uint8 [H, W]."""
    return frame.max(-1) - frame.min(-1)


STILL = 0.05
"""Pixels per frame below which nothing moves."""


def motion(frames: np.ndarray) -> str:
    """Which of MOTIONS a clip shows, by its flow; empty if it stands still."""
    right, down, growth = flow(frames)
    strength = dict(zip(MOTIONS, (-right, right, -down, down, growth, -growth), strict=True))
    best = max(strength, key=strength.__getitem__)
    return best if strength[best] > STILL else ""


def change(frames: np.ndarray) -> float:
    """Mean absolute difference of the later frames from the first, grey levels."""
    return float(np.abs(frames[1:].astype(np.int16) - frames[0]).mean())


def interval(right: int, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    if not count:
        return 0.0, 1.0
    z, share = 1.96, right / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * (share * (1 - share) / count + z * z / (4 * count**2)) ** 0.5
    return max(0.0, middle - half), min(1.0, middle + half)


def rng_of(seed: int, *what: object) -> np.random.Generator:
    """A generator for one purpose."""
    words: Sequence[int] = [seed, *(ord(c) for c in "/".join(map(str, what)))]
    return np.random.default_rng(words)
