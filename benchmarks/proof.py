"""Whether a model learns what it is shown: motion, understanding, edits and guidance, in figures.

    OMP_NUM_THREADS=2 python -m benchmarks.proof -o DIR [--quick] [--pictures docs/pictures]
    python -m benchmarks.proof -o DIR --only "train clips" videos ...

A small decoder is trained with `unimodal.model.train` on the world of benchmarks/shapes.py: first
on pictures with captions, drawn and described; from there one goes on with clips, another with
edits. Then they are asked for what they have never seen, and what they draw is measured. Every
stage leaves its result in DIR and is skipped when that is there; training goes on from its last
checkpoint. DIR/figures.json holds all figures.
"""

from __future__ import annotations

import argparse
import base64
import json
import multiprocessing
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import proof_pictures, shapes
from benchmarks.shapes import Clip, Edit, Seen, Thing
from unimodal.model.recipe import settings_from
from unimodal.model.sample import Sampler
from unimodal.model.train import train
from unimodal.pipeline.files import atomic
from unimodal.tokenize.document import Image, Piece, Text
from unimodal.tokenize.shard import write_shard
from unimodal.tokenize.shards import Sample, ShardWriter
from unimodal.tokenize.vision.pixels import to_pixels, to_uint8
from unimodal.tokenize.vision.tokenizer import VisionTokenizer
from unimodal.tokenize.vocabulary import Vocabulary

RECIPE = Path(__file__).parent / "shapes.toml"
SEED = 0
WORLD = 4
"""To be raised when shapes.py draws other pictures: shards are made anew."""
COUNTS = {"pictures": 6144, "clips": 2048, "edits": 5120}
"""Training samples of each kind; a thirty-second more is for validation."""
QUICK = {"pictures": 64, "clips": 32, "edits": 64}
SHARD = {"pictures": 512, "clips": 128, "edits": 256}
"""Samples of one unit of work, half a minute or so."""
BATCH = 32  # pictures, or clips of four times fewer groups, that are encoded at once


# --- data -----------------------------------------------------------------------------------


def vocabulary(folder: Path, codebook_size: int) -> Vocabulary:
    """One id for each word of the shapes' captions, as a large model's vocabulary has it, and the
    bytes: half as many ids in a caption. What that does for learning was not measured by itself."""
    folder.mkdir(parents=True, exist_ok=True)
    ranks = [bytes([byte]) for byte in range(256)] + [word.encode() for word in shapes.WORDS]
    lines = [f"{base64.b64encode(one).decode()} {rank}" for rank, one in enumerate(ranks)]
    with atomic(folder / "words.tiktoken") as path:
        path.write_text("\n".join(lines) + "\n")
    return Vocabulary.named(str(folder / "words.tiktoken"), codebook_size)


def make_shards(out: Path, counts: Mapping[str, int], workers: int) -> list[Path]:
    """A directory of shards for each kind; shards that are there are kept."""
    tokenizer = VisionTokenizer.load("small")
    words = vocabulary(out, tokenizer.codebook_size)
    writers, todo = {}, []
    for kind, count in counts.items():
        writers[kind] = ShardWriter(out / kind, tokenizer, words, {"shapes": kind})
        for number, start in enumerate(range(0, count, SHARD[kind])):
            size = min(SHARD[kind], count - start)
            digest = f"{kind}-{number}-{size}-{WORLD}-{SEED}"
            if not writers[kind].has(number, digest):
                writers[kind].begin([number])
                todo.append((kind, number, size, digest, out / kind, writers[kind].header))
    if todo:
        todo.sort(key=lambda unit: -unit[2] * (8 if unit[0] == "clips" else 1))
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            for done, _ in enumerate(pool.imap_unordered(_unit, todo), 1):
                print(f"shards: {done} of {len(todo)}", flush=True)
    for kind, count in counts.items():
        writers[kind].finish(-(-count // SHARD[kind]))
    return [out / kind for kind in counts]


def _unit(unit: tuple[str, int, int, str, Path, dict[str, Any]]) -> None:
    """Make one shard."""
    kind, number, size, digest, out, header = unit
    torch.set_num_threads(1)
    tokenizer = VisionTokenizer.load("small")
    words = Vocabulary.load(out / "vocabulary")
    make = {"pictures": _pictures, "clips": _clips, "edits": _edits}[kind]
    rng = shapes.rng_of(SEED, kind, number, WORLD)
    samples = []
    for place, told in enumerate(make(rng, size, tokenizer, words)):
        key = f"{kind}-{number:03d}-{place:04d}"
        split = "val" if place % 32 == 0 else "train"
        samples.append(Sample(key=key, uid=key, split=split, source_sha256=f"{0:064x}", **told))
    write_shard(out, number, header, (), digest, samples)


Told = Iterator[dict[str, Any]]


def _pictures(
    rng: np.random.Generator, size: int, tokenizer: VisionTokenizer, words: Vocabulary
) -> Told:
    things = [shapes.thing(rng, unseen=False) for _ in range(size)]
    codes = encoded(tokenizer, [shapes.picture(one) for one in things])
    for one, grid in zip(things, codes, strict=True):
        yield {"kind": "image", "codes": grid, "captions": [_caption(one.caption, words)]}


def _clips(
    rng: np.random.Generator, size: int, tokenizer: VisionTokenizer, words: Vocabulary
) -> Told:
    clips = [shapes.moving(rng, unseen=False) for _ in range(size)]
    codes = encoded(tokenizer, [shapes.clip(one) for one in clips])
    for one, grid in zip(clips, codes, strict=True):
        caption = _caption(one.caption, words)
        yield {"kind": "video", "codes": grid, "fps": shapes.FPS, "captions": [caption]}


def _edits(
    rng: np.random.Generator, size: int, tokenizer: VisionTokenizer, words: Vocabulary
) -> Told:
    edits = [shapes.edit(rng, unseen=False) for _ in range(size)]
    codes = [
        encoded(tokenizer, [shapes.picture(getattr(one, side)) for one in edits])
        for side in ("source", "result")
    ]
    for one, source, result in zip(edits, *codes, strict=True):
        pieces = [
            Piece(Image(source[0]), "source"),
            Piece(Text(one.instruction), "instruction"),
            Piece(Image(result[0]), "result"),
        ]
        tokens = [None, len(words.text.encode(one.instruction)), None]
        more = {"task": "edit", "pieces": pieces, "tokens": tokens}
        yield {"kind": "document", "codes": None, **more}


def _caption(text: str, words: Vocabulary) -> dict[str, Any]:
    tokens = len(words.text.encode(text))
    return {"style": "plain", "lang": "en", "text": text, "tokens": tokens}


def encoded(tokenizer: VisionTokenizer, media: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Codes int64 [T, H, W] of pictures [H, W, 3] or clips [F, H, W, 3], uint8."""
    found: list[np.ndarray] = []
    for start in range(0, len(media), BATCH):
        pixels = np.stack(media[start : start + BATCH])
        pixels = pixels[:, None] if pixels.ndim == 4 else pixels
        found += list(tokenizer.encode(to_pixels(pixels)).numpy())
    return found


def decoded(tokenizer: VisionTokenizer, codes: Sequence[np.ndarray]) -> list[np.ndarray]:
    """uint8 pictures [H, W, 3] of codes [1, H, W], clips [F, H, W, 3] of [T, H, W]."""
    found: list[np.ndarray] = []
    for start in range(0, len(codes), BATCH):
        part = torch.from_numpy(np.stack(codes[start : start + BATCH]))
        still = part.shape[1] == 1
        pixels = to_uint8(tokenizer.decode(part, image=still))
        found += list(pixels[:, 0] if still else pixels)
    return found


# --- what is asked, and what of it is right -----------------------------------------------------


@dataclass(frozen=True)
class Run:
    """Where the stages work."""

    out: Path
    quick: bool
    workers: int

    def sampler(self, kind: str) -> Sampler:
        """Of the decoder that was trained on pictures, clips or edits last."""
        return Sampler.load(self.out / "ckpt" / kind, "cpu")

    @cached_property
    def tokenizer(self) -> VisionTokenizer:
        return VisionTokenizer.load("small")

    def count(self, number: int) -> int:
        """How many are judged: a few where it is quick."""
        return 12 if self.quick else number

    def keep(self, name: str, **arrays: np.ndarray) -> None:
        """Keep what was drawn, for the pictures."""
        np.savez_compressed(self.out / f"{name}.npz", **arrays)


def share(right: Iterable[bool]) -> dict[str, Any]:
    """How many are right of how many, and Wilson's 95 % interval of the share."""
    told = [bool(one) for one in right]
    low, high = shapes.interval(sum(told), len(told))
    return {
        "right": sum(told),
        "n": len(told),
        "share": round(sum(told) / len(told), 4),
        "interval": [round(low, 4), round(high, 4)],
    }


PICTURE = ("colour", "shape", "size", "place", "ground")
CLIP = ("colour", "shape", "ground")


def matches(
    wanted: Sequence[Thing], seen: Sequence[Seen], names: Sequence[str] = PICTURE
) -> dict[str, Any]:
    """Share of pictures that show what they should, by attribute and in all."""
    pairs = list(zip(wanted, seen, strict=True))
    found = {n: share(getattr(one, n) == getattr(other, n) for one, other in pairs) for n in names}
    whole = (all(getattr(one, n) == getattr(other, n) for n in names) for one, other in pairs)
    return {**found, "all": share(whole)}


def subject(frames: np.ndarray) -> Seen:
    """What most frames of a clip show, each attribute by itself."""
    looks = [shapes.look(frame) for frame in frames]
    most = {n: Counter(getattr(one, n) for one in looks).most_common(1)[0][0] for n in CLIP}
    return replace(looks[-1], **most)


def movements(clips: Sequence[Clip], drawn: Sequence[np.ndarray]) -> dict[str, Any]:
    """Motion and subject of clips, and how far their frames are from the first."""
    motions = [shapes.motion(frames) for frames in drawn]
    changes = np.array([shapes.change(frames) for frames in drawn])
    still = shapes.MOTIONS
    return {
        "motion": share(found == one.motion for found, one in zip(motions, clips, strict=True)),
        "motions": {
            name: share(
                found == name
                for found, one in zip(motions, clips, strict=True)
                if one.motion == name
            )
            for name in still
            if any(one.motion == name for one in clips)
        },
        **matches([one.thing for one in clips], [subject(frames) for frames in drawn], CLIP),
        "change": {
            "mean": round(float(changes.mean()), 2),
            "least": round(float(changes.min()), 2),
        },
    }


def asked_pictures(run: Run, purpose: str, number: int, unseen: bool) -> list[Thing]:
    rng = shapes.rng_of(SEED, purpose, unseen)
    return [shapes.thing(rng, unseen) for _ in range(run.count(number))]


def asked_clips(run: Run, purpose: str, number: int, unseen: bool) -> list[Clip]:
    """As many of each motion."""
    rng = shapes.rng_of(SEED, purpose, unseen)
    return [
        shapes.moving(rng, unseen, motion=shapes.MOTIONS[i % len(shapes.MOTIONS)])
        for i in range(run.count(number))
    ]


SETS = {"seen": False, "unseen": True}
"""Combinations of attributes that training had, and that it never had. The world is small: of the
first most pictures were in training too; of the second none."""


def judge(run: Run) -> dict[str, Any]:
    """How often the judge is right on real pictures and clips, and on what codes keep of them."""
    things = [one for unseen in SETS.values() for one in asked_pictures(run, "judge", 240, unseen)]
    clips = [one for unseen in SETS.values() for one in asked_clips(run, "judge", 48, unseen)]
    real = [shapes.picture(one) for one in things]
    moving = [shapes.clip(one) for one in clips]
    kept = decoded(run.tokenizer, encoded(run.tokenizer, real))
    kept_moving = decoded(run.tokenizer, encoded(run.tokenizer, moving))
    rng = shapes.rng_of(SEED, "judge edits")
    edits = [shapes.edit(rng, i % 2 == 0) for i in range(run.count(240))]
    sides = [[shapes.picture(getattr(e, side)) for e in edits] for side in ("source", "result")]
    codes = [decoded(run.tokenizer, encoded(run.tokenizer, one)) for one in sides]
    frozen = [np.repeat(one[:1], shapes.FRAMES, axis=0) for one in kept_moving]
    return {
        "pictures": {
            "real": matches(things, [shapes.look(one) for one in real]),
            "through codes": matches(things, [shapes.look(one) for one in kept]),
        },
        "clips": {
            "real": movements(clips, moving),
            "through codes": movements(clips, kept_moving),
            "first frame alone": movements(clips, frozen),
        },
        "edits": {
            "real": edited(edits, sides[0], sides[1]),
            "through codes": edited(edits, *codes),
            "left as they are": edited(edits, sides[0], sides[0]),
        },
    }


SCALES = (1.0, 1.5, 2.0, 3.0, 5.0)


def images(run: Run) -> dict[str, Any]:
    """Pictures from captions, at each scale of guidance."""
    sampler = run.sampler("pictures")
    found: dict[str, Any] = {}
    for name, unseen in SETS.items():
        things = asked_pictures(run, "images", 240, unseen)
        for scale in SCALES:
            drawn = sampler.images([t.caption for t in things], guidance=scale, seed=SEED)
            seen = [shapes.look(row[0]) for row in drawn]
            other = things[1:] + things[:1]  # what is right by chance
            found.setdefault(name, {})[str(scale)] = {
                **matches(things, seen),
                "another caption": matches(other, seen)["all"],
            }
    shown = [
        *asked_pictures(run, "sweep", 5, False)[:5],
        *asked_pictures(run, "sweep", 3, True)[:3],
    ]
    told = [one.caption for one in shown]
    rows = [sampler.images(told, guidance=scale, seed=1) for scale in SCALES]
    names = [name for name, many in (("seen", 5), ("unseen", 3)) for _ in range(many)]
    labels = [f"{one}\n\n({name})" for one, name in zip(told, names, strict=True)]
    run.keep("sweep", drawn=np.array(rows)[:, :, 0], captions=np.array(labels))
    return found


def videos(run: Run) -> dict[str, Any]:
    """Clips from captions."""
    sampler = run.sampler("clips")
    found: dict[str, Any] = {}
    for name, unseen in SETS.items():
        clips = asked_clips(run, "videos", 144, unseen)
        for scale in SCALES[:4:2] if not run.quick else SCALES[2:3]:
            rows = sampler.videos([c.caption for c in clips], guidance=scale, seed=SEED)
            drawn = [row[0] for row in rows]
            found.setdefault(name, {})[str(scale)] = movements(clips, drawn)
        run.keep(
            f"videos-{name}",
            drawn=np.stack(drawn[:24]),
            captions=np.array([c.caption for c in clips[:24]]),
        )
    return found


def continuation(run: Run) -> dict[str, Any]:
    """The second half of clips whose first half is given, without a word and with the caption."""
    sampler = run.sampler("clips")
    found: dict[str, Any] = {}
    half = shapes.FRAMES // 2
    for name, unseen in SETS.items():
        clips = asked_clips(run, "continuation", 96, unseen)
        real = [shapes.clip(one) for one in clips]
        given = [frames[:half] for frames in real]
        kept = decoded(run.tokenizer, encoded(run.tokenizer, real))
        for told, prompts in (("silent", None), ("told", [one.caption for one in clips])):
            rows = sampler.extend(given, half, prompts=prompts, guidance=1.0, seed=SEED)
            drawn = [row[0] for row in rows]
            found.setdefault(name, {})[told] = continued(clips, drawn, kept)
            if told == "silent":
                run.keep(
                    f"continuation-{name}",
                    drawn=np.stack(drawn[:24]),
                    real=np.stack(kept[:24]),
                    captions=np.array([one.caption for one in clips[:24]]),
                )
        found[name]["kept still"] = continued(
            clips,
            [np.concatenate([k[:half], np.repeat(k[half - 1 : half], half, 0)]) for k in kept],
            kept,
        )
    return found


def continued(
    clips: Sequence[Clip], drawn: Sequence[np.ndarray], real: Sequence[np.ndarray]
) -> dict[str, Any]:
    """Of the frames behind the first half: subject, motion, and pixels from where it should be."""
    half = shapes.FRAMES // 2
    new = [frames[half - 1 :] for frames in drawn]  # with the last that was given
    ends = [(shapes.look(a[-1]), shapes.look(b[-1])) for a, b in zip(drawn, real, strict=True)]
    apart = [np.hypot(a.x - b.x, a.y - b.y) for a, b in ends if a.found and b.found]
    return {
        **movements(clips, new),
        "pixels from the real end": round(float(np.median(apart)), 2) if apart else None,
    }


def describe(run: Run) -> dict[str, Any]:
    """Captions of pictures and clips, of their codes in another order, and of others' codes."""
    samplers = {kind: run.sampler(kind) for kind in ("pictures", "clips")}
    found: dict[str, Any] = {}
    for name, unseen in SETS.items():
        things = asked_pictures(run, "describe", 240, unseen)
        clips = asked_clips(run, "describe", 96, unseen)
        told = {
            "pictures": ([t.caption for t in things], [shapes.picture(t) for t in things]),
            "clips": ([c.caption for c in clips], [shapes.clip(c) for c in clips]),
        }
        for kind, (captions, media) in told.items():
            codes = encoded(run.tokenizer, media)
            rng = shapes.rng_of(SEED, "shuffle", kind)
            orders = [rng.permutation(one.size) for one in codes]
            ways = {
                "codes": codes,
                "codes shuffled": [
                    one.reshape(-1)[order].reshape(one.shape)
                    for one, order in zip(codes, orders, strict=True)
                ],
                "another's codes": codes[1:] + codes[:1],
            }
            for way, some in ways.items():
                asked = [one[0] if kind == "pictures" else one for one in some]
                texts = samplers[kind].describe(asked, max_tokens=80)
                found.setdefault(name, {}).setdefault(kind, {})[way] = worded(captions, texts)
                if way == "codes":
                    shown = [m if kind == "pictures" else m[:: shapes.FRAMES // 4] for m in media]
                    run.keep(
                        f"described-{kind}-{name}",
                        media=np.stack(shown[:16]),
                        texts=np.array(texts[:16]),
                        captions=np.array(captions[:16]),
                    )
    return found


WORDS = {
    "colour": tuple(shapes.COLOURS),
    "shape": shapes.SHAPES,
    "size": tuple(shapes.SIZES),
    "place": tuple(shapes.PLACES),
    "ground": tuple(f"on {name}" for name in shapes.GROUNDS),
    "motion": shapes.MOTIONS,
}


def worded(captions: Sequence[str], texts: Sequence[str]) -> dict[str, Any]:
    """Share of descriptions that are exactly the caption, and that name each attribute right."""

    def said(text: str, words: Sequence[str]) -> list[str]:
        return [word for word in words if word in text]

    pairs = list(zip(captions, texts, strict=True))
    found = {"exact": share(caption == text for caption, text in pairs)}
    for name, words in WORDS.items():
        if any(said(caption, words) for caption in captions):
            found[name] = share(said(c, words) == said(t, words) for c, t in pairs)
    return found


EDITING = ((1.0, 1.0), (1.0, 2.0), (1.5, 2.0), (1.5, 3.0))
"""(image guidance, guidance); the first is none at all."""


SHOWN = "1-2"
"""Of these, what the page shows."""


def edits(run: Run) -> dict[str, Any]:
    """Edits of pictures that training never had, at some scales of guidance."""
    sampler = run.sampler("edits")
    found: dict[str, Any] = {}
    for name, unseen in SETS.items():
        rng = shapes.rng_of(SEED, "edits", unseen)
        asked = [
            shapes.edit(rng, unseen, ("recolour", "move")[i % 2]) for i in range(run.count(192))
        ]
        sources = [shapes.picture(one.source) for one in asked]
        for image, scale in EDITING:
            rows = sampler.edit(
                sources,
                [one.instruction for one in asked],
                guidance=scale,
                image_guidance=image,
                seed=SEED,
            )
            drawn = [row[0] for row in rows]
            found.setdefault(name, {})[f"{image:g}, {scale:g}"] = edited(asked, sources, drawn)
            run.keep(
                f"edits-{name}-{image:g}-{scale:g}",
                sources=np.stack(sources[:24]),
                drawn=np.stack(drawn[:24]),
                told=np.array([one.instruction for one in asked[:24]]),
            )
    return found


NEAR = 4.0
"""Pixels by which what should stay in its place may be off."""


def edited(
    edits: Sequence[Edit], sources: Sequence[np.ndarray], drawn: Sequence[np.ndarray]
) -> dict[str, Any]:
    """Share of edits that were done as told, that left the rest as it was, and both."""
    done: dict[str, list[bool]] = {"recolour": [], "move": []}
    kept: dict[str, list[bool]] = {}
    both: list[bool] = []
    for one, source, result in zip(edits, sources, drawn, strict=True):
        was, now = shapes.look(source), shapes.look(result)
        recolour = one.source.colour != one.result.colour
        name = "colour" if recolour else "place"
        right = getattr(now, name) == getattr(one.result, name)
        stays = {
            "shape": now.shape == one.source.shape,
            "size": now.size == one.source.size,
            "ground": now.found and abs(now.grey - was.grey) <= shapes.GROUND_STEP,
        }
        if recolour:
            stays["place"] = now.found and np.hypot(now.x - was.x, now.y - was.y) <= NEAR
        else:
            stays["colour"] = now.colour == one.source.colour
        done["recolour" if recolour else "move"].append(right)
        both.append(right and all(stays.values()))
        for what, same in stays.items():
            kept.setdefault(what, []).append(bool(same))
    return {
        "done": share(done["recolour"] + done["move"]),
        **{name: share(one) for name, one in done.items()},
        "kept": {what: share(one) for what, one in kept.items()},
        "done and all kept": share(both),
    }


# --- stages -----------------------------------------------------------------------------------


def shards(run: Run) -> dict[str, Any]:
    counts = QUICK if run.quick else COUNTS
    make_shards(run.out / "shards", counts, run.workers)
    return {"samples": counts}


TRAININGS = {
    "pictures": (None, ["steps=2400", "optimizer.lr=6e-3"]),
    "clips": ("pictures", ["steps=4000", "optimizer.lr=5e-3"]),
    "edits": ("pictures", ["steps=3000", "optimizer.lr=4e-3"]),
}
"""Of each decoder: whose weights it begins with, and what it has otherwise than shapes.toml."""


def learn(run: Run, kind: str) -> dict[str, Any]:
    """Train, or go on with it."""
    start, sets = TRAININGS[kind]
    less = ["steps=20", "log.validate_every=0"] if run.quick else []
    settings = settings_from(RECIPE, {"seed": SEED, "device": "cpu"}, sets=[*sets, *less])
    init = run.out / "ckpt" / start if start else None
    out = train([run.out / "shards" / kind], run.out / "ckpt" / kind, settings, init=init)
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    last: dict[str, Any] = {}
    for record in records:
        last |= record
    return {
        "threads": torch.get_num_threads(),
        "parameters": sum(one.numel() for one in run.sampler(kind).decoder.parameters()),
        **{key: last[key] for key in ("step", "tokens", "epoch", "elapsed_s")},
        **{key: round(value, 4) for key, value in last.items() if "/" in key},
    }


STAGES: dict[str, Callable[[Run], dict[str, Any]]] = {
    "judge": judge,
    "shards": shards,
    **{f"train {kind}": partial(learn, kind=kind) for kind in TRAININGS},
    "images": images,
    "videos": videos,
    "describe": describe,
    "continuation": continuation,
    "edits": edits,
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("-o", "--out", type=Path, required=True, help="all that is made")
    parser.add_argument("--quick", action="store_true", help="every stage, nothing learned")
    parser.add_argument("--only", nargs="+", choices=STAGES, help="these stages, even if done")
    parser.add_argument("--pictures", type=Path, help="folder of the pictures of the page")
    parser.add_argument("--workers", type=int, default=2, help="processes that tokenize")
    arguments = parser.parse_args()
    run = Run(arguments.out, arguments.quick, arguments.workers)
    run.out.mkdir(parents=True, exist_ok=True)
    path = run.out / "figures.json"
    for name, stage in STAGES.items():
        figures = json.loads(path.read_text()) if path.exists() else {}
        if name in figures if arguments.only is None else name not in arguments.only:
            continue
        begun = time.monotonic()
        found = stage(run)
        found["seconds"] = round(time.monotonic() - begun, 1)
        print(f"{name}: {found['seconds']} s", flush=True)
        figures = json.loads(path.read_text()) if path.exists() else {}  # others may run
        path.write_text(json.dumps(figures | {name: found}, indent=1) + "\n")
    if arguments.pictures:
        proof_pictures.write(run.out, arguments.pictures, SCALES, SHOWN)


if __name__ == "__main__":
    main()
