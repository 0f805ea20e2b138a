"""Triplets to prefer by: n samples of each prompt, ranked by scores; the best against the worst.

OUT/
  prefer.json                  what was asked for: a run is gone on with only if it is the same
  prompts.txt                  one a line
  candidates/000000.parquet    from that prompt on: prompt (number), sample, codes, and a column
                               for each score that was asked for so far
  pictures/000000-00.png       of prompt and sample, where people are to vote
  votes.csv                    to be filled in: prompt, sample, picture, text, vote
  triplets.parquet             see TRIPLETS

The codes that were drawn are what is learned from; pixels are only looked at (Emu3, arXiv
2409.18869, §2.5: encoding them again would give other codes). The chance in a sample is keyed by
(seed, number of the prompt, number of the sample), so a killed run goes on where it was, and
prompts appended to the list change nothing of those before.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import BeforeValidator, Field

from unimodal.model.checkpoint import find
from unimodal.model.choice import Choice
from unimodal.model.dpo import FILE
from unimodal.model.grammar import BlockGrammar
from unimodal.model.naming import read_json, weight_files
from unimodal.model.recipe import SamplingSettings
from unimodal.pipeline.errors import UnimodalError, UsageError, first_line
from unimodal.pipeline.files import atomic
from unimodal.pipeline.progress import Progress
from unimodal.pipeline.scorers.weights import fingerprint
from unimodal.pipeline.settings import Settings, build

if TYPE_CHECKING:
    import pyarrow as pa

    from unimodal.model.sample import Sampler
    from unimodal.tokenize.vocabulary import Vocabulary

Scorer = Callable[[Sequence[str], Sequence[np.ndarray]], Sequence[float | None]]
"""Prompts and a picture of each, uint8 [H, W, 3] -> scores, higher is better; None: cannot say."""

TRIPLETS = {
    "prompt": "text",
    "prompt_ids": "BOS and the prompt, as the sampler was given it: list of int32",
    "chosen_ids": "the whole vision block, BOI to EOI, of the best sample: list of int32",
    "rejected_ids": "the same of the worst sample",
    "grid": "height and width in codes",
    "scores": "list of {name, chosen, rejected}: what each scorer or voter gave",
    "samples": "numbers of the chosen and the rejected sample",
    "checkpoint": "digest of the weights that were sampled from",
    "vocabulary": "digest of the vocabulary that the ids are of",
    "seed": "of the samples",
}
"""Columns of triplets.parquet."""

COLORS = {
    "black": (0, 0, 0),
    "white": (255, 255, 255),
    "gray": (128, 128, 128),
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "cyan": (0, 255, 255),
    "magenta": (255, 0, 255),
    "orange": (255, 128, 0),
    "purple": (128, 0, 255),
    "brown": (128, 64, 0),
    "pink": (255, 160, 192),
}
"""The words that `color` looks for in a prompt, and the RGB it takes them for."""


def _sides(value: Any) -> Any:
    """`HxW`, as `sample --size` takes it, as two numbers for pydantic to judge."""
    return value.split("x") if isinstance(value, str) and "x" in value else value


class PreferSettings(Settings):
    """How candidates are drawn; None: as the checkpoint's recipe says."""

    n: int = Field(default=8, ge=2)
    """Samples of each prompt; Emu3 takes 8 to 10."""
    seed: int = Field(default=0, ge=0)
    """Of the samples."""
    size: Annotated[tuple[int, int] | None, BeforeValidator(_sides)] = None
    """Height and width in pixels, as 256x256 or [256, 256]; none: what training saw most."""
    guidance: float | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    plausible: float | None = None
    embed: dict[str, Any] = Field(default_factory=dict)
    """CLIP and the aesthetic head, as curation's settings `embed` name them."""


@dataclass(frozen=True)
class Outcome:
    """What came of it."""

    path: Path
    """The triplets, or the table of votes that is to be filled in."""
    counts: dict[str, int]
    """Prompts; triplets; and prompts left out: tied (all samples score alike), identical (best and
    worst are the same codes), unscored (fewer than two samples have every score)."""


def brightness(prompts: Sequence[str], pictures: Sequence[np.ndarray]) -> list[float]:
    """Mean luma (Rec. 709 weights on the stored values), 0 to 1, whatever the prompt."""
    return [float((p.astype(np.float64) @ [0.2126, 0.7152, 0.0722]).mean() / 255) for p in pictures]


def color(prompts: Sequence[str], pictures: Sequence[np.ndarray]) -> list[float | None]:
    """1 less the mean difference of all pixels from the color that the prompt names, 0 to 1.

    None for a prompt that names no color of COLORS, or several.
    """
    found: list[float | None] = []
    for prompt, picture in zip(prompts, pictures, strict=True):
        named = set(re.findall(r"[a-z]+", prompt.lower())) & COLORS.keys()
        want = np.array(COLORS[named.pop()], np.float64) if len(named) == 1 else None
        found.append(None if want is None else float(1 - abs(picture - want).mean() / 255))
    return found


def scorer(name: str, settings: PreferSettings) -> tuple[str, Scorer]:
    """A scorer by name, and the name that its scores are kept under.

    `brightness` and `color` need nothing; `clip` (cosine of text and picture) and `aesthetic`
    (LAION's head) are curation's scorers and need the weights that `settings` name. Raises
    `UsageError` for another name or absent weights.
    """
    simple: dict[str, Scorer] = {"brightness": brightness, "color": color}
    if name in simple:
        return name, simple[name]
    if name not in ("clip", "aesthetic"):
        raise UsageError(f"no score {name}: there are {', '.join(simple)}, clip and aesthetic")
    from PIL import Image

    from unimodal.pipeline.scorers.embed import EmbedSettings, absent, head, identity
    from unimodal.pipeline.scorers.openclip import clip_model

    embed = build(EmbedSettings, settings.embed)
    lacks = absent(embed)
    if not lacks and name == "aesthetic" and embed.aesthetic is None:
        lacks = "no head: set embed.aesthetic=PATH"
    if lacks:
        raise UsageError(f"score {name}: {lacks}")
    model = clip_model(embed)
    weight, offset = head(embed.aesthetic or "", model.width) if name == "aesthetic" else (None, 0)

    def score(prompts: Sequence[str], pictures: Sequence[np.ndarray]) -> list[float]:
        units = model.pictures([Image.fromarray(picture) for picture in pictures])
        wanted = model.texts(prompts) if weight is None else weight[None]
        return [float(value) + offset for value in (units * wanted).sum(axis=1)]

    return f"{name}-{identity(embed)}", score


def prefer(
    sampler: Sampler,
    checkpoint: Path,
    prompts: Sequence[str],
    out: Path,
    settings: PreferSettings,
    scorers: Mapping[str, Scorer],
    votes: Sequence[Path] = (),
    progress: Progress | None = None,
) -> Outcome:
    """Draw what is not drawn yet, score it, and write `out / triplets.parquet`.

    `scorers` by the names their scores are kept under; `votes` are filled-in copies of votes.csv,
    one a voter. With several scores or voters samples are ranked by the mean of their ranks.
    Without any, pictures and votes.csv are written instead. Raises `UnimodalError` if `out` holds
    another run's candidates or the context no such picture, and `UsageError` for settings and votes
    that cannot be.
    """
    progress = progress or Progress()
    voting = not scorers and not votes
    given = settings.model_dump(include=set(SamplingSettings.model_fields), exclude_none=True)
    weights = weight_files(find(checkpoint)[1])
    grammar = sampler.canvas.grammar(*sampler.canvas.grid(settings.size, "image")[1:])
    about = {
        "checkpoint": fingerprint(*map(str, weights)),
        "vocabulary": sampler.vocabulary.digest(),
        "grid": list(grammar.shape),
        "n": settings.n,
        "seed": settings.seed,
        **{key: given.get(key, own) for key, own in sampler.defaults.model_dump().items()},
    }
    _same(out, about, prompts)
    ballots = {str(path): _votes(path) for path in votes}
    rows: list[dict[str, Any]] = []
    counts = {"prompts": len(prompts), "triplets": 0, "tied": 0, "identical": 0, "unscored": 0}
    progress.begin("prefer", len(prompts), "prompts")
    some = max(1, sampler.batch // settings.n)
    for first in range(0, len(prompts), some):
        mine = prompts[first : first + some]
        table = _candidates(sampler, grammar, mine, first, out, about, scorers, voting)
        for place, prompt in enumerate(() if voting else mine):
            own = table.slice(place * settings.n, settings.n).to_pydict()
            scores = {name: own[name] for name in scorers}
            for name, cast in ballots.items():
                scores[name] = [cast.get((first + place, i)) for i in own["sample"]]
            pair = best_and_worst(list(scores.values()), own["codes"])
            counts[pair if isinstance(pair, str) else "triplets"] += 1
            if not isinstance(pair, str):
                rows.append(_triplet(sampler.vocabulary, grammar, prompt, own, scores, pair, about))
        progress.advance("prefer", len(mine))
    progress.end("prefer")
    if voting:
        return Outcome(_ballot(out / "votes.csv", prompts, settings.n), {"prompts": len(prompts)})
    return Outcome(_write_triplets(out / FILE, rows), counts)


def _triplet(
    vocabulary: Vocabulary,
    grammar: BlockGrammar,
    prompt: str,
    own: Mapping[str, Sequence[Any]],
    scores: Mapping[str, Sequence[float | None]],
    pair: tuple[int, int],
    about: Mapping[str, Any],
) -> dict[str, Any]:
    chosen, rejected = pair
    return {
        "prompt": prompt,
        "prompt_ids": [vocabulary.bos, *vocabulary.text.encode(prompt + about["suffix"])],
        "chosen_ids": grammar.ids(own["codes"][chosen]).tolist(),
        "rejected_ids": grammar.ids(own["codes"][rejected]).tolist(),
        "scores": [
            {"name": name, "chosen": values[chosen], "rejected": values[rejected]}
            for name, values in scores.items()
        ],
        "samples": [own["sample"][chosen], own["sample"][rejected]],
        **{name: about[name] for name in ("grid", "checkpoint", "vocabulary", "seed")},
    }


def _write_triplets(path: Path, rows: list[dict[str, Any]]) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    ints, text = pa.list_(pa.int32()), pa.string()
    score = pa.struct([("name", text), ("chosen", pa.float64()), ("rejected", pa.float64())])
    kinds = [text, ints, ints, ints, ints, pa.list_(score), ints, text, text, pa.int64()]
    schema = pa.schema(list(zip(TRIPLETS, kinds, strict=True)))
    with atomic(path) as file:
        pq.write_table(pa.Table.from_pylist(rows, schema), file, compression="zstd")
    return path


def best_and_worst(
    scores: Sequence[Sequence[float | None]], codes: Sequence[object]
) -> tuple[int, int] | str:
    """Which of a prompt's samples are chosen and rejected, or why none are (see `Outcome`).

    `scores` has one list for each scorer. A sample that lacks one is passed over. Ranks are means
    where scores are equal; of equally ranked samples the first is taken.
    """
    usable = [
        i
        for i in range(len(codes))
        if all(one[i] is not None and math.isfinite(one[i] or 0) for one in scores)
    ]
    if len(usable) < 2:
        return "unscored"
    values = np.array([[one[i] for i in usable] for one in scores], np.float64)
    above = values[:, :, None] - values[:, None, :]  # [scorers, samples, samples]
    ranks = np.sign(above).sum(axis=(0, 2))
    best, worst = int(ranks.argmax()), int(ranks.argmin())
    if ranks[best] == ranks[worst]:
        return "tied"
    if codes[usable[best]] == codes[usable[worst]]:
        return "identical"
    return usable[best], usable[worst]


def _candidates(
    sampler: Sampler,
    grammar: BlockGrammar,
    prompts: Sequence[str],
    first: int,
    out: Path,
    about: Mapping[str, Any],
    scorers: Mapping[str, Scorer],
    voting: bool,
) -> pa.Table:
    """Codes and scores of some prompts' samples: read, or made and written."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    n, file = about["n"], out / "candidates" / f"{first:06d}.parquet"
    table = None
    if file.is_file():
        try:
            table = pq.read_table(file)
        except (OSError, pa.ArrowException) as error:
            reason = first_line(error)
            raise UnimodalError(f"{file} cannot be read ({reason}): remove it") from error
        table = table.slice(0, n * len(prompts))  # a sampler of larger batches drew more
    if drawing := table is None or table.num_rows < n * len(prompts):  # the list was shorter
        choice = Choice(*(about[name] for name in ("temperature", "top_k", "top_p", "plausible")))
        drawn = sampler.codes(
            prompts, grammar, n, about["guidance"], choice, about["seed"], first=first
        )
        table = pa.table(
            {
                "prompt": np.repeat(np.arange(first, first + len(prompts), dtype=np.int32), n),
                "sample": np.tile(np.arange(n, dtype=np.int32), len(prompts)),
                "codes": pa.array([c.ravel() for row in drawn for c in row], pa.list_(pa.int32())),
            }
        )
    missing = [name for name in scorers if name not in table.column_names]
    if missing or voting:
        codes = [np.reshape(one, (1, *grammar.shape)) for one in table.column("codes").to_pylist()]
        # A prompt at a time: what else is in a batch can turn the last bit of a pixel.
        batches = [sampler.canvas.pixels(codes[i : i + n], True) for i in range(0, len(codes), n)]
        pictures = [clip[0] for batch in batches for clip in batch]
        texts = [prompt for prompt in prompts for _ in range(n)]
        for name in missing:
            scores = pa.array(list(scorers[name](texts, pictures)), pa.float64())
            table = table.append_column(name, scores)
        for number, picture in enumerate(pictures if voting else ()):
            _write_picture(out / _picture(first + number // n, number % n), picture)
    if missing or drawing:
        with atomic(file) as temporary:
            pq.write_table(table, temporary, compression="zstd")
    return table


def _same(out: Path, about: dict[str, Any], prompts: Sequence[str]) -> None:
    """Refuse a directory with candidates of another kind; more prompts at the end are welcome."""
    file, lines = out / "prompts.txt", "\n".join(prompts).split("\n")
    if (out / "prefer.json").is_file():
        was = read_json(out / "prefer.json")
        changed = [f"{k} was {was.get(k)}, now {v}" for k, v in about.items() if was.get(k) != v]
        before = file.read_text()[:-1].split("\n") if file.is_file() else []
        if lines[: len(before)] != before:
            changed.append("its prompts are others")
        if changed:
            raise UnimodalError(
                f"{out} holds candidates drawn otherwise ({'; '.join(changed)}): choose another -o"
            )
    texts = {out / "prefer.json": json.dumps(about, indent=2), file: "\n".join(lines)}
    for path, text in texts.items():
        with atomic(path) as temporary:
            temporary.write_text(text + "\n")


def _picture(prompt: int, sample: int) -> str:
    return f"pictures/{prompt:06d}-{sample:02d}.png"


def _write_picture(path: Path, picture: np.ndarray) -> None:
    from PIL import Image

    if not path.is_file():
        with atomic(path) as temporary:
            Image.fromarray(picture).save(temporary, format="png")


def _ballot(path: Path, prompts: Sequence[str], n: int) -> Path:
    """votes.csv to be filled in; one that is there is work, and is kept."""
    if path.is_file():
        return path
    with atomic(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("prompt", "sample", "picture", "text", "vote"))
        for number, text in enumerate(prompts):
            writer.writerows((number, i, _picture(number, i), text, "") for i in range(n))
    return path


def _votes(path: Path) -> dict[tuple[int, int], float]:
    """Votes by (prompt, sample); empty cells are no votes."""
    found = {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            for line, row in enumerate(csv.DictReader(file), 2):
                try:
                    vote = (row["vote"] or "").strip()
                    if vote:
                        found[int(row["prompt"]), int(row["sample"])] = float(vote)
                except (KeyError, TypeError, ValueError) as error:
                    raise UsageError(
                        f"{path}, line {line}: needs whole numbers prompt and sample and a number "
                        f"vote ({error}): fill in the votes.csv that prefer writes"
                    ) from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"votes {path} cannot be read ({error})") from error
    return found


def read_prompts(path: Path) -> list[str]:
    """Prompts of a text file, one a line; blank lines are passed over."""
    try:
        lines = [line.strip() for line in path.read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"prompts {path} cannot be read ({error})") from error
    prompts = [line for line in lines if line]
    if not prompts:
        raise UsageError(f"{path} holds no prompt: write one a line")
    return prompts
