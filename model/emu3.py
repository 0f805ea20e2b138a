"""Emu3's own checkpoints, as they are published: read where they lie, nothing converted.

    original       BAAI/Emu3-Gen, -Chat, -Stage1: config.json (model_type "Emu3"), shards of
                   weights, emu3.tiktoken, emu3_vision_tokens.txt; and BAAI/Emu3-VisionTokenizer,
                   a directory of its own
    transformers   what Emu3ForConditionalGeneration saves: config.json (model_type "emu3"), both
                   networks in one set of shards, tokenizer.json, preprocessor_config.json

Python files that come with them are never executed, pickles never opened, templates of chats not
read: the two that exist are written here.

Ids come from the tokenizer's files alone, and config.json must agree with them. Sizes, prompts
and guidance are those of the scripts and the paper that each checkpoint was published with
(baaivision/Emu3; arXiv 2409.18869); generation_config.json overrides them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from unimodal.model.checkpoint import weights_config
from unimodal.model.decoder import Decoder
from unimodal.model.export import STRINGS
from unimodal.model.naming import WEIGHTS, read_json
from unimodal.model.recipe import SamplingSettings
from unimodal.pipeline.errors import UnimodalError, UsageError
from unimodal.pipeline.settings import build
from unimodal.tokenize.document import SPATIAL, SYSTEM
from unimodal.tokenize.text import TextTokenizer
from unimodal.tokenize.vision.pixels import MAX_ASPECT, smart_size
from unimodal.tokenize.vision.tokenizer import VisionTokenizer
from unimodal.tokenize.vocabulary import Vocabulary

RANKS, VISION_TOKENS = "emu3.tiktoken", "emu3_vision_tokens.txt"
VISION = "Emu3-VisionTokenizer"
TYPES = ("Emu3", "emu3", "emu3_text_model")
NEGATIVE = (
    "lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, fewer digits, "
    "cropped, worst quality, low quality, normal quality, jpeg artifacts, signature, watermark, "
    "username, blurry."
)
_CODE = "<|visual token {:06d}|>"


@dataclass(frozen=True)
class Kind:
    """One of the published checkpoints, and what it is used with."""

    repository: str
    context: int
    """Tokens; as in its config.json."""
    area: int
    """Pixels of a picture that it draws; as in its config.json."""
    sampling: Mapping[str, Any]
    """Beside guidance 3, top-k 2048, temperature 1, which all have. One that was tuned to answer
    is asked for descriptions; the others go on behind a picture."""


KINDS = {
    "gen": Kind(
        "BAAI/Emu3-Gen",
        9216,
        518_400,
        {"suffix": " masterpiece, film grained, best quality.", "negative": NEGATIVE},
    ),
    "stage1": Kind("BAAI/Emu3-Stage1", 5120, 262_144, {}),
    "chat": Kind(
        "BAAI/Emu3-Chat",
        131_072,
        262_144,
        {"describe": "Please describe the image", "max_tokens": 1024},
    ),
}


@dataclass(frozen=True)
class Manner:
    """How a checkpoint wants its pictures scaled and its questions put."""

    min_pixels: int = 1 << 18
    max_pixels: int = 1 << 20
    max_aspect: float = MAX_ASPECT
    after: str = ". ASSISTANT:"
    """What stands behind a question."""

    def size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) in pixels of a picture before it is encoded; raises `MediaError`."""
        return smart_size(height, width, self.min_pixels, self.max_pixels, SPATIAL, self.max_aspect)

    def prompt(
        self, vocabulary: Vocabulary, blocks: Sequence[Sequence[int]], turns: Sequence[str]
    ) -> list[int]:
        """Ids of a question about vision blocks (BOI to EOI each), up to where the answer begins.

        `turns`: questions and answers in turn, most often one question. What stands between control
        tokens is encoded as one text, as Emu3's processors do: "?" and the period behind it may be
        one id. Emu3 has no further turns; ours follow Vicuna, as in `tokenize.document`.
        """
        encode, first = vocabulary.text.encode, turns[0] + self.after
        if blocks:
            seen = [i for block in blocks for i in block]
            ids = [vocabulary.bos, *encode(f"{SYSTEM}USER: "), *seen, *encode(first)]
        else:
            ids = [vocabulary.bos, *encode(f"{SYSTEM}USER: {first}")]
        for answer, question in zip(turns[1::2], turns[2::2], strict=True):
            ids += [*encode(answer), vocabulary.eos, *encode(f"USER: {question}{self.after}")]
        return ids


@dataclass(frozen=True)
class Parts:
    """What a sampler needs beside the decoder."""

    vocabulary: Vocabulary
    tokenizer: VisionTokenizer
    grids: list[dict[str, Any]]
    """As in `data.json` of our own checkpoints."""
    defaults: SamplingSettings
    manner: Manner
    kind: str
    """One of `KINDS`."""


def is_emu3(path: str | Path) -> bool:
    """Whether a directory is a checkpoint as BAAI or transformers lay it out, and not of `train`
    or `export`, which keep their vocabulary beside the weights."""
    path = Path(path)
    if not (path / "config.json").is_file() or (path / "vocabulary").exists():
        return False
    try:
        return read_json(path / "config.json").get("model_type") in TYPES
    except UnimodalError:
        return False


def load(
    path: str | Path,
    device: str | torch.device = "cpu",
    tokenizer: str | Path | None = None,
    kind: str | None = None,
) -> Parts:
    """The parts of a sampler, all but the decoder, from a directory that `is_emu3`.

    `device`: where the vision tokenizer computes, in float32. `tokenizer`: its directory; by
    default `vision_tokenizer` in the checkpoint's, `Emu3-VisionTokenizer` beside it, or the one in
    the same weights (transformers). `kind`: one of `KINDS`, where config.json and the directory's
    name mislead.

    Raises `UnimodalError` naming all files that are missing and where they are to be had, or what
    does not fit. The weights of the decoder are not read, so that all this takes seconds.
    """
    path = Path(path)
    record = read_json(path / "config.json")
    kind = _kind(path, record, kind)
    vision = _vision(path, record, tokenizer, kind)
    vocabulary = _vocabulary(path, record)
    size = weights_config(path).vocabulary_size
    if size < vocabulary.size:
        raise UnimodalError(
            f"{path / 'config.json'} has vocab_size {size}, its tokenizer's files "
            f"{vocabulary.size} ids: they are of two checkpoints; copy all again"
        )
    seeing = VisionTokenizer.load(vision, str(device))
    if seeing.codebook_size != vocabulary.codebook_size:
        raise UnimodalError(
            f"{vision} has {seeing.codebook_size} codes, {path} was trained with "
            f"{vocabulary.codebook_size}: give the vision tokenizer that belongs to it "
            f"(BAAI/{VISION}, with --set load.tokenizer=DIR)"
        )
    nested = "vq_config" in record
    side = max(1, round(math.sqrt(_area(record, kind)) / SPATIAL))
    return Parts(
        vocabulary,
        seeing,
        [{"kind": "image", "size": [1, side, side], "fps": None, "samples": 0}],
        _defaults(path, kind, nested),
        _manner(path, vision, nested),
        kind,
    )


def check_room(path: Path, device: str | torch.device, dtype: torch.dtype) -> None:
    """Raise `UnimodalError` if memory certainly does not hold a decoder's weights as `dtype`.

    Better than to bring the machine to its knees first: Emu3's take 34 GB as float32.
    """
    with torch.device("meta"):
        decoder = Decoder(weights_config(path), seed=None)
    need = sum(parameter.numel() for parameter in decoder.parameters()) * dtype.itemsize
    free = _free(torch.device(device))
    if free is not None and need > free:
        hint = "give --set load.weights=bfloat16, or " if dtype == torch.float32 else ""
        raise UnimodalError(
            f"{path} takes {need / 1e9:.0f} GB as {str(dtype).removeprefix('torch.')}, "
            f"{free / 1e9:.0f} GB of memory are free on {device}: {hint}choose a larger machine"
        )


def _free(device: torch.device) -> int | None:
    """Bytes that can be had; None where this is not told."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if "MemAvailable" in line), None)


# --- which checkpoint it is ----------------------------------------------------------------


def _text(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of config.json that is about the decoder."""
    nested = record.get("text_config")
    return nested if isinstance(nested, dict) else record


def _kind(path: Path, record: Mapping[str, Any], given: str | None) -> str:
    """What is said, else what config.json tells, else the directory's name, else `stage1`."""
    if given is not None:
        if given not in KINDS:
            raise UsageError(f"kind {given}: give one of {', '.join(KINDS)}")
        return given
    context = _text(record).get("max_position_embeddings")
    for name, kind in KINDS.items():
        if context == kind.context:
            return name
    if record.get("image_area") == KINDS["gen"].area:
        return "gen"
    named = re.findall(r"(?<![a-z])(gen|chat|stage-?1)(?![a-z])", path.resolve().name.lower())
    return named[-1].replace("-", "") if named else "stage1"


def _area(record: Mapping[str, Any], kind: str) -> int:
    area = record.get("image_area")
    return area if isinstance(area, int) and area > 0 else KINDS[kind].area


# --- ids -----------------------------------------------------------------------------------


def _vocabulary(path: Path, record: Mapping[str, Any]) -> Vocabulary:
    """The id space that the tokenizer's files describe, checked against config.json."""
    strings = _strings(path)
    if (path / RANKS).is_file():
        text, ids, source = _original_ids(path)
    else:
        text, ids, source = _transformers_ids(path, record, strings)
    lacking = [string for string in strings.values() if string not in ids]
    if lacking:
        raise UnimodalError(f"{source} does not list {', '.join(lacking)}: copy it again")
    codes = sum(name.startswith("<|visual token ") for name in ids)
    start = ids.get(_CODE.format(0), 0)
    for code in range(codes):
        if ids.get(_CODE.format(code)) != start + code:
            raise UnimodalError(
                f"{source}: {_CODE.format(code)} has id {ids.get(_CODE.format(code))}, not "
                f"{start + code}: its vision tokens are not in order; copy it again"
            )
    specials = {name: ids[string] for name, string in strings.items()}
    told = _text(record)
    for name, number in specials.items():
        said = told.get(f"{name}_token_id")
        if said is not None and number not in (said if isinstance(said, list) else [said]):
            raise UnimodalError(
                f"{path / 'config.json'}: {name}_token_id is {said}, {source.name} has {number} "
                f"for {strings[name]}: they are of two checkpoints; copy all again"
            )
    return Vocabulary(text=text, vision_start=start, codebook_size=codes, **specials)


def _original_ids(path: Path) -> tuple[TextTokenizer, dict[str, int], Path]:
    """Text, then control tokens by name with their ids: those of Qwen, its spare ones, and the
    lines of the release's list, in their order (Emu3Tokenizer)."""
    text, source = TextTokenizer.load(path / RANKS), path / VISION_TOKENS
    try:
        lines = [line.strip() for line in source.read_text().splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UnimodalError(f"{source} cannot be read ({error}): copy it again") from error
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    names += [f"<|extra_{number}|>" for number in range(205)] + lines
    ids = {name: text.size + place for place, name in enumerate(names)}
    if len(ids) != len(names):
        raise UnimodalError(f"{source} lists a token twice: copy it again")
    return text, ids, source


def _transformers_ids(
    path: Path, record: Mapping[str, Any], strings: Mapping[str, str]
) -> tuple[TextTokenizer, dict[str, int], Path]:
    """As `_original_ids`, from a tokenizer.json that lists text, control and vision tokens."""
    from tokenizers import Tokenizer

    source = path / "tokenizer.json"
    whole: Any = None
    try:
        whole = Tokenizer.from_str(source.read_bytes().decode())
    except Exception as error:  # the library raises bare Exception for a bad file
        raise UnimodalError(f"{source} is not a tokenizer.json: {error}") from error
    ids: dict[str, int] = whole.get_vocab(with_added_tokens=True)
    mapped = record.get("vocabulary_map")
    if isinstance(mapped, dict):  # which transformers' Emu3 takes the codes' ids from
        ours = {name: i for name, i in ids.items() if name.startswith("<|visual token ")}
        ours |= {string: ids[string] for string in strings.values() if string in ids}
        for name, number in ours.items():
            if mapped.get(name, number) != number:
                raise UnimodalError(
                    f"{path / 'config.json'} has id {mapped[name]} for {name}, {source.name} has "
                    f"{number}: they are of two checkpoints; copy all again"
                )
    first = [ids[name] for name in [*strings.values(), _CODE.format(0)] if name in ids]
    return TextTokenizer.load(source, size=min(first, default=0) or None), ids, source


def _strings(path: Path) -> dict[str, str]:
    """The control tokens by our names: Emu3's, or what tokenizer_config.json calls them."""
    found = dict(STRINGS)
    file = path / "tokenizer_config.json"
    record = read_json(file) if file.is_file() else {}
    extra = record.get("extra_special_tokens")
    named = (extra if isinstance(extra, dict) else {}) | record
    keys = {f"{name}_token": name for name in found} | {"image_wrapper_token": "img"}
    for key, name in keys.items():
        value = named.get(key)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            found[name] = value
    return found


# --- files beside the weights --------------------------------------------------------------


def _vision(
    path: Path, record: Mapping[str, Any], given: str | Path | None, kind: str
) -> str | Path:
    """Directory of the vision tokenizer, after a look at whether all files are there."""
    lacking = []
    if not (path / WEIGHTS).is_file() and not (path / f"{WEIGHTS}.index.json").is_file():
        lacking.append(f"{WEIGHTS}.index.json and the files it names")
    if not (path / RANKS).is_file() and not (path / "tokenizer.json").is_file():
        lacking.append(RANKS)
    if not (path / VISION_TOKENS).is_file() and not (path / "tokenizer.json").is_file():
        lacking.append(VISION_TOKENS)
    problems = []
    if lacking:
        where = KINDS[kind].repository
        problems.append(f"lacks {', '.join(lacking)}: download all of {where} into it")
    beside = path.resolve().parent / VISION
    places = [path / "vision_tokenizer", beside]
    places = [path, *places] if "vq_config" in record else places
    found = [place for place in places if (place / "config.json").is_file()]
    if given is None and not found:
        problems.append(
            f"has no vision tokenizer: download BAAI/{VISION} to {beside}, or name its directory "
            "with --set load.tokenizer=DIR"
        )
    if problems:
        raise UnimodalError(f"{path} {'; it '.join(problems)}")
    return given if given is not None else found[0]


def _defaults(path: Path, kind: str, nested: bool) -> SamplingSettings:
    """How it draws and writes: as its kind, and as generation_config.json says."""
    sampling: dict[str, Any] = {"guidance": 3.0, "temperature": 1.0, "top_k": 2048, "top_p": 1.0}
    sampling |= KINDS[kind].sampling
    if nested and "describe" in sampling:
        sampling["describe"] += "."  # which Emu3's own template adds
    file = path / "generation_config.json"
    told = read_json(file) if file.is_file() else {}
    chats = kind == "chat"
    if not chats or told.get("do_sample"):
        for theirs in ("temperature", "top_k", "top_p"):
            if told.get(theirs):  # 0 and null are "not used"
                sampling[f"text_{theirs}" if chats else theirs] = told[theirs]
    if told.get("guidance_scale"):
        sampling["guidance"] = told["guidance_scale"]
    if told.get("max_new_tokens") and chats:
        sampling["max_tokens"] = told["max_new_tokens"]
    try:
        return build(SamplingSettings, sampling)
    except UsageError as error:
        raise UnimodalError(f"{file}: {error}: correct it, or remove the file") from error


def _manner(path: Path, vision: str | Path, nested: bool) -> Manner:
    """How pictures and questions are put: as its layout's processor does, with the bounds of a
    picture's area from that processor's file."""
    bounds: dict[str, int] = {}
    files = [path / "processor_config.json"]
    files += [Path(place) / "preprocessor_config.json" for place in (vision, path)]
    for file in (file for file in files if file.is_file()):
        record = read_json(file)
        record = record.get("image_processor", record)
        if not isinstance(record, dict) or "max_pixels" not in record:
            continue
        for key in ("image_mean", "image_std"):
            if record.get(key) not in ([0.5] * 3, 0.5, None):
                raise UnimodalError(
                    f"{file}: {key} is {json.dumps(record[key])}, and Emu3's tokenizer knows 0.5 "
                    "alone: copy it again"
                )
        bounds = {
            key: record.get(key, getattr(Manner, key)) for key in ("min_pixels", "max_pixels")
        }
        if not all(isinstance(value, int) for value in bounds.values()) or not (
            SPATIAL**2 <= bounds["min_pixels"] <= bounds["max_pixels"]
        ):
            raise UnimodalError(f"{file}: {bounds} are no bounds of an area: copy it again")
        break
    least, most = bounds.get("min_pixels", 1 << 18), bounds.get("max_pixels", 1 << 20)
    if nested:  # its template has no period, and its processor takes pictures of any shape
        return Manner(least, most, max_aspect=200.0, after=" ASSISTANT:")
    return Manner(least, most)
