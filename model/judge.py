"""How well a checkpoint draws what it is told, and says what it is shown.

prompts -> pictures ─┬─ CLIP: cosine of prompt and picture
                     ├─ Inception: FID against real pictures
                     └─ a classifier, taught here: is the word of the prompt to be seen?
held-out pictures, questions -> words ── beside captions and answers of people
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
import torch.nn.functional as F
from torch import nn

from unimodal.model.captioner import media
from unimodal.model.sample import Sampler
from unimodal.pipeline.captioning.answers import usable
from unimodal.pipeline.captioning.scores import (
    SPOKEN,
    Pair,
    Words,
    named,
    naming,
    scores,
    wilson,
)
from unimodal.pipeline.errors import UnimodalError, UsageError
from unimodal.pipeline.frames import read_clips
from unimodal.pipeline.progress import Progress
from unimodal.pipeline.run import Run
from unimodal.pipeline.scorers.openclip import Model as ClipModel
from unimodal.pipeline.settings import build
from unimodal.tokenize.document import Text
from unimodal.tokenize.fidelity import remade
from unimodal.tokenize.plan import TokenizeSettings
from unimodal.tokenize.shards import Shards

LEAST = 20
"""Labelled pictures that a classifier is taught with."""
SIDE, BATCH = 32, 32
EPOCHS, STEPS = 40, (300, 2000)
"""Of teaching a classifier, and between how many steps that is kept. Of 1,033 pictures of
shapes in colours, 12 epochs taught 82 % of the shapes and 37 taught 98 %."""
HELD = 5
"""Of so many labelled pictures one is kept back, to tell how good the classifier is."""


def people(captions: Sequence[Mapping[str, Any]] | None) -> list[str]:
    """What people say of a picture, of its captions in a run or in shards."""
    return [
        one["text"]
        for one in captions or ()
        if one["style"] != SPOKEN and not one.get("model")
        if usable(one)
    ]


# --- pictures --------------------------------------------------------------------------------


def real_pictures(
    things: Sequence[str], area: int, sampler: Sampler, progress: Progress | None = None
) -> list[tuple[np.ndarray, np.ndarray, list[str]]]:
    """Still pictures of about `area` pixels, as they are, as their codes show them, and captions.

    Drawings are made of codes: a classifier is taught on pictures that went through them too.
    """
    settings = build(TokenizeSettings, {"area": area})
    tokenizer: Any = sampler.tokenizer
    return [
        (one.originals[0], one.painted[0], people(one.row["captions"]))
        for one in remade(things, settings, tokenizer, None, progress)
        if one.row["kind"] == "image"
    ]


def clip_scores(
    clip: ClipModel, prompts: Sequence[str], pictures: Sequence[np.ndarray]
) -> list[float]:
    """100 times the cosine of each prompt and its picture, not under 0 (CLIPScore, arXiv
    2104.08718, as torchmetrics scales it)."""
    from PIL import Image

    seen = clip.pictures([Image.fromarray(picture) for picture in pictures])
    return (100 * np.clip((clip.texts(prompts) * seen).sum(axis=1), 0, None)).tolist()


def only_word(texts: Sequence[str], forms: Mapping[str, str]) -> str | None:
    """The word of a class that texts name, if it is one and no more."""
    found = named(" ".join(texts), forms)
    return next(iter(found)) if len(found) == 1 else None


def prompted(
    prompts: Sequence[str],
    drawn: Sequence[Sequence[np.ndarray]],
    real: Sequence[tuple[np.ndarray, Sequence[str]]],
    words: Words,
    seed: int,
) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """By class of words, how often drawings show the word that their prompt names.

    `drawn` are pictures for each prompt, `real` pictures with captions, which a classifier for
    each class is taught on; its own accuracy on those it was not taught stands beside. Drawings
    whose prompt names no word of a class, several, or one that no picture shows are `left_out`.
    Returns that, and what was seen in each drawing, by class. Raises `UsageError` for too few
    pictures.
    """
    flat = [
        (prompt, picture) for prompt, some in zip(prompts, drawn, strict=True) for picture in some
    ]
    found: dict[str, Any] = {}
    seen: list[dict[str, str]] = [{} for _ in flat]
    for name, forms in words.items():
        labelled = [(p, word) for p, texts in real if (word := only_word(texts, forms))]
        kinds = sorted({word for _, word in labelled})
        if len(labelled) < LEAST or len(kinds) < 2:
            raise UsageError(
                f"{name}: {len(labelled)} labelled pictures name one word of it, {len(kinds)} "
                f"different: a classifier wants {LEAST} and 2; give --real more"
            )
        labels = [kinds.index(word) for _, word in labelled]
        tell, known = taught([picture for picture, _ in labelled], labels, len(kinds), seed)
        asked = [(i, word) for i, (p, _) in enumerate(flat) if (word := only_word([p], forms))]
        asked = [(i, word) for i, word in asked if word in kinds]
        told = tell([flat[i][1] for i, _ in asked]) if asked else []
        for (i, _), kind in zip(asked, told, strict=True):
            seen[i][name] = kinds[kind]
        right = sum(kinds[kind] == word for (_, word), kind in zip(asked, told, strict=True))
        found[name] = share(right, len(asked)) | {"left_out": len(flat) - len(asked)}
        found[name] |= {"words": len(kinds), "classifier": known}
    return found, seen


def taught(
    pictures: Sequence[np.ndarray], labels: Sequence[int], kinds: int, seed: int
) -> tuple[Callable[[Sequence[np.ndarray]], list[int]], dict[str, Any]]:
    """A small convolutional network that tells pictures, uint8 [H, W, 3], apart.

    Returns a function from pictures to labels, and how often it is right on those kept back.
    """
    from unimodal.tokenize.vision.pixels import resize, to_pixels

    def batch(some: Sequence[np.ndarray]) -> torch.Tensor:
        return to_pixels(np.stack([resize(one, (SIDE, SIDE)) for one in some]))

    order = np.random.default_rng(seed).permutation(len(pictures))
    held, learned = order[: max(1, len(order) // HELD)], order[max(1, len(order) // HELD) :]
    x, y = batch(pictures), torch.tensor(labels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for into, out in ((3, 16), (16, 32), (32, 64)):
            layers += [nn.Conv2d(into, out, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        net = nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.5), nn.Linear(SIDE * SIDE, kinds))
        optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
        for _ in range(int(np.clip(EPOCHS * len(learned) // BATCH, *STEPS))):
            some = torch.from_numpy(learned)[torch.randint(len(learned), (BATCH,))]
            optimizer.zero_grad()
            F.cross_entropy(net(x[some]), y[some]).backward()
            optimizer.step()
    net.eval()

    @torch.inference_mode()
    def tell(some: Sequence[np.ndarray]) -> list[int]:
        return net(batch(some)).argmax(1).tolist()

    with torch.inference_mode():
        right = int((net(x[held]).argmax(1) == y[held]).sum())
    return tell, share(right, len(held)) | {"taught": len(learned)}


def share(right: int, n: int) -> dict[str, Any]:
    """How often something was right, with Wilson's 95 % interval."""
    if not n:
        return {"right": 0, "n": 0, "share": None, "low": None, "high": None}
    low, high = wilson(right, n)
    return {"right": right, "n": n, "share": right / n, "low": low, "high": high}


# --- descriptions ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Shown:
    """A picture or a clip that is to be described, or asked about."""

    key: str
    media: list[np.ndarray]
    """Pixels or codes, as `Sampler` takes them; one thing unless it is a question."""
    references: tuple[str, ...]
    asked: tuple[str, ...] = ()
    """Questions and answers in turn, the last one a question; empty: to be described."""


def shown_in(thing: str, sampler: Sampler, limit: int | None = None) -> list[Shown]:
    """What people described in the val split of shards, or among the kept clips of a run.

    Raises `UnimodalError` if it is neither, if the codes are of another tokenizer, or if nobody
    said anything.
    """
    folder = Path(thing)
    found: list[Shown] = []
    if (folder / "clips.parquet").exists():
        run = Run.open(folder)
        kept = run.clips.select(["uid", "part", "verdict", "captions"]).to_pylist()
        texts = {r["uid"]: people(r["captions"]) for r in kept if r["verdict"] == "keep"}
        for part in sorted({row["part"] for row in kept}):
            if len(found) == limit:
                break
            for clip in read_clips(run.path / run.info["stages"]["watch"], part):
                if len(found) == limit:
                    break
                if said := texts.get(uid := clip.row["uid"]):
                    frames = [one.bgr()[..., ::-1] for one in clip.samples if one.keyframe]
                    found.append(Shown(uid, [media(frames, sampler.canvas.seen)], tuple(said)))
    else:
        shards = Shards.open(folder)
        theirs, ours = (shards.manifest["vision_tokenizer"]["digest"], sampler.tokenizer.digest)  # type: ignore[attr-defined]
        if theirs != ours:
            raise UnimodalError(
                f"{thing}: its codes are of another vision tokenizer ({theirs[:12]}) than the "
                f"checkpoint's ({ours[:12]}): tokenize with the checkpoint's, or give the run"
            )
        index = shards.index.select(["key", "task", "kind", "captions"])
        for number in np.flatnonzero(pc.equal(shards.index["split"], "val")).tolist():
            if len(found) != limit:
                (row,) = index.slice(number, 1).to_pylist()
                found += filter(None, [_stored(shards, number, row)])
    if not found:
        raise UnimodalError(
            f"{thing}: nothing to compare with: no captions by people in a run's kept clips, or in "
            "the val split of shards (tokenize --set val_fraction=0.1 makes one)"
        )
    return found[:limit]


def _stored(shards: Shards, number: int, row: Mapping[str, Any]) -> Shown | None:
    if row["task"] == "caption":
        codes, said = shards.codes(number).astype(np.int64), tuple(people(row["captions"]))
        return (
            Shown(row["key"], [codes if row["kind"] == "video" else codes[0]], said)
            if said
            else None
        )
    if row["task"] != "chat":
        return None
    pieces = [(piece.role, piece.segment) for piece in shards.segments(number)]
    seen = [one.codes.astype(np.int64) for _, one in pieces if not isinstance(one, Text)]
    turns = [one.text for _, one in pieces if isinstance(one, Text)]
    if len(turns) < 2 or len(turns) % 2 or [role for role, _ in pieces][-1] != "assistant":
        return None
    return Shown(row["key"], seen, (turns[-1],), tuple(turns[:-1]))


def described(
    sampler: Sampler,
    shown: Sequence[Shown],
    words: Words | None = None,
    max_tokens: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """Figures of what the checkpoint says, and what it says of each.

    Descriptions and answers apart: CIDEr-D and the others of `scores`, the share that is a
    reference to the letter (but for case and spaces), and words of small classes.
    """
    said = [""] * len(shown)
    found: dict[str, Any] = {}
    for task in ("descriptions", "answers"):
        mine = [i for i, one in enumerate(shown) if bool(one.asked) == (task == "answers")]
        if not mine:
            continue
        some = [shown[i] for i in mine]
        how: Any = {"seed": seed, "progress": progress}
        if task == "answers":
            texts = sampler.ask([s.media for s in some], [s.asked for s in some], max_tokens, **how)
        else:
            texts = sampler.describe([s.media[0] for s in some], max_tokens, **how)
        pairs = []
        for i, text in zip(mine, texts, strict=True):
            said[i] = text
            pairs.append(Pair(shown[i].key, text, shown[i].references))
        right = sum(_plain(p.said) in map(_plain, p.references) for p in pairs)
        found[task] = {"n": len(pairs)} | scores(pairs, "en") | {"exact": share(right, len(pairs))}
        if words is not None:
            found[task]["words"] = {k: asdict(naming(pairs, forms)) for k, forms in words.items()}
    return found, said


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())
