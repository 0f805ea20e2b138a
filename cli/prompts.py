"""What is asked of `unimodal sample`: one request or a file of them, checked before anything loads.

    a.txt                  a prompt a line; blank lines are passed over
    a.jsonl                an object a line, whose keys are the fields of `Request`
    a.csv a.tsv a.parquet  a column `prompt` (or `caption`, `text`), others as in `Request`
    a.json                 an interleaved document: [{"text": …}, {"image": "path"}, …]
    -                      lines on stdin; those that begin with { are objects

Whatever a line does not say is as the command line has it. A line that cannot be used is kept
with its number and its reason, and the others go on. The number of a request is its place in
the file, bad lines counted: it names the files and keys the noise, so that mending one line
changes none of the others.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from unimodal.pipeline.errors import UnimodalError, UsageError, first_line
from unimodal.pipeline.settings import Settings, build
from unimodal.tokenize.document import SPATIAL, TEMPORAL

PROMPTS = ("prompt", "caption", "text")
"""Columns of a table that may hold the prompt; the first of them that it has."""
SUFFIXES = (".txt", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".json")
LONGEST_LINE = 16 << 20
"""Bytes; a file with longer ones holds no prompts."""
MOST_COPIES = 10_000

STILLS = ("png", "webp")
CLIPS = ("mp4", "gif", "webp")
FORMATS = (*STILLS, "mp4", "gif", "text")


WORDS = frozenset({"temperature", "top_k", "top_p", "seed", "format"})
SIZED = frozenset({"size", "ratio", "area"})
DRAWN = WORDS | SIZED | {"n", "guidance", "plausible"}
COUNT = {
    "image": DRAWN | {"negative"},
    "video": DRAWN | {"negative", "frames", "fps"},
    "continue": DRAWN - SIZED | {"negative", "frames", "fps", "overlap"},
    "edit": DRAWN | {"image_guidance"},
    "document": DRAWN | {"images", "max_tokens", "text"},
    "describe": WORDS | {"max_tokens", "fps"},
    "ask": WORDS | {"max_tokens", "fps"},
    "text": WORDS | {"max_tokens"},
}
"""By direction, the settings that change what comes."""
SETTINGS = frozenset().union(*COUNT.values())
TOLD = {
    "image": "a picture",
    "video": "a clip",
    "document": "a document",
    "text": "--format text",
}
"""What an error calls a direction that no option is called by."""
OPTIONS = DRAWN - {"plausible"} | {"frames", "negative"}
"""Settings that have one; the others are --set's."""


def _listed(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


def _warmth(value: float | None) -> float | None:
    if value is not None and value < 0:
        message = "Input should be greater than 0, or 0 for words: the likeliest, always"
        raise PydanticCustomError("temperature", message)
    return value


Temperature = Annotated[float | None, AfterValidator(_warmth)]


class TextSettings(Settings):
    """How text is chosen where pictures are drawn too, in a document."""

    temperature: Temperature = Field(default=None, allow_inf_nan=False)
    """0: the likeliest, always."""
    top_k: int | None = Field(default=None, ge=1)
    top_p: float | None = Field(default=None, gt=0, le=1)


class LoadSettings(Settings):
    """How the checkpoint is loaded."""

    weights: str | None = Field(default=None, pattern="^(float32|bfloat16|int8)$")
    """float32, bfloat16 or int8 (weights alone); default: what the device is best at."""
    tokenizer: str | None = None
    """Vision tokenizer, of a released checkpoint that comes without."""
    kind: str | None = Field(default=None, pattern="^(gen|stage1|chat)$")
    """What a released checkpoint is, where its files and name do not tell."""
    batch: int = Field(default=32, ge=1)
    """Sequences that are drawn at once."""
    compile: bool = False
    """Through `torch.compile`."""


class Request(Settings):
    """One thing that is asked for; each field may stand in a line of a file of prompts."""

    prompt: str = ""
    negative: str | None = None
    """What guidance leads away from."""
    describe: Annotated[tuple[str, ...], BeforeValidator(_listed)] = ()
    """Pictures or clips to describe, or to ask of."""
    ask: str | None = None
    continue_: str | None = Field(default=None, alias="continue")
    edit: str | None = None
    document: str | tuple[dict[str, str], ...] | None = None
    size: str | None = None
    ratio: str | None = None
    area: int | None = Field(default=None, ge=SPATIAL**2, le=1 << 28)
    frames: int | None = Field(default=None, ge=1)
    fps: float | None = Field(default=None, gt=0, lt=10_000)
    n: int = Field(default=1, ge=1, le=MOST_COPIES)
    guidance: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    image_guidance: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Of an edit: how closely it keeps to the picture, where `guidance` is to the instruction."""
    temperature: Temperature = Field(default=None, allow_inf_nan=False)
    """Of words, 0: the likeliest, always."""
    top_k: int | None = Field(default=None, ge=1)
    top_p: float | None = Field(default=None, gt=0, le=1)
    plausible: float | None = Field(default=None, ge=0, lt=1)
    """Only codes of at least this share of the likeliest one's probability before guidance."""
    seed: int = Field(default=0, ge=0, lt=1 << 63)
    max_tokens: int | None = Field(default=None, ge=1)
    """Of a text."""
    images: int = Field(default=4, ge=0)
    """Pictures that a document may get."""
    overlap: int | None = Field(default=None, ge=TEMPORAL)
    """Frames that are kept in sight where a clip outgrows the context."""
    text: TextSettings = TextSettings()
    format: str | None = None

    @property
    def direction(self) -> str:
        """image, video, continue, edit, describe, ask, document or text: see `check`."""
        if self.ask is not None:
            return "ask"
        for name in ("describe", "edit", "document"):
            if getattr(self, name):
                return name
        if self.continue_:
            return "continue"
        if self.format == "text":
            return "text"
        return "image" if self.frames is None else "video"

    @property
    def writes_text(self) -> bool:
        return self.direction in ("describe", "ask", "text")

    @property
    def moving(self) -> bool:
        return self.direction in ("video", "continue")

    @property
    def files(self) -> tuple[str, ...]:
        """What it takes pictures, clips or codes from, in order."""
        one = self.edit or self.continue_
        return (one,) if one else self.describe

    @property
    def suffix(self) -> str:
        """Of the file that it makes."""
        if self.writes_text:
            return "txt"
        return self.format or ("mp4" if self.moving else "png")

    def pixels(self, trained: Callable[[], tuple[int, int]]) -> tuple[int, int] | str | None:
        """(height, width) as told by size, or by ratio and area; "free"; None: as trained.

        `trained` gives the size of what training saw most, whose area or ratio stands in for
        what is not told. The grid of a ratio is that of Emu3: each side to the nearest code, halves
        to even (EMU3.md, §4).
        """
        if self.size is not None:
            sides = size_of(self.size)
            return "free" if sides is None else sides
        if self.ratio is None and self.area is None:
            return None
        wide, high = ratio_of(self.ratio) if self.ratio else reversed(trained())
        area = self.area or math.prod(trained())
        scale = (area / (wide * high)) ** 0.5
        rows, columns = (max(1, round(side * scale / SPATIAL)) for side in (high, wide))
        return rows * SPATIAL, columns * SPATIAL


class SampleSettings(Request):
    """All that `--set` may name."""

    load: LoadSettings = LoadSettings()


@dataclass(frozen=True)
class Item:
    """A request, where it stands, and from where its paths are counted."""

    number: int
    request: Request
    where: str = ""
    """`prompts.jsonl, line 7`; empty for what the command line itself asks."""
    line: int = 0
    given: Any = None
    """The line as it stands in its file."""
    base: Path = Path()

    @property
    def title(self) -> str:
        """What its files are called by."""
        asked = self.request
        if asked.ask or asked.prompt:
            return asked.ask or asked.prompt
        if isinstance(asked.document, str):
            return Path(asked.document).stem
        if not asked.files:
            return ""
        file, _, key = asked.files[0].rpartition("#")
        return key if file else Path(key).stem


@dataclass(frozen=True)
class Bad:
    """A line that is no request, or that failed."""

    line: int
    where: str
    reason: str
    given: Any
    """The line as it stands in its file."""


def requests(
    given: Sequence[str],
    flags: Mapping[str, Any],
    sets: Sequence[str] = (),
    file: str | None = None,
) -> tuple[list[Item], list[Bad], LoadSettings]:
    """What the command line asks: `given` are its prompts, or files for `describe` and `ask`.

    Flags that are None were not given. Raises `UsageError` for what cannot be meant.
    """
    named = {key: value for key, value in flags.items() if value not in (None, [], ())}
    settings = build(SampleSettings, named, sets=sets)
    base = settings.model_dump(by_alias=True, exclude_unset=True, exclude={"load"})
    if file is not None:
        if given:
            raise UsageError("prompts are in --prompts FILE or on the command line, not in both")
        told = "ask" in base or any(base.get(key) for key in ("describe", "edit", "continue"))
        if told and Path(file).suffix.lower() == ".json":
            raise UsageError("--prompts FILE.json is a document: it takes no other input")
        items, bad = read_prompts(file, base)
        return items, bad, settings.load
    layers: list[dict[str, Any]]
    describe = [*base.pop("describe", ()), *given]
    if "ask" in base:
        layers = [{"describe": describe}]
    elif flags.get("describe"):
        layers = [{"describe": [one]} for one in describe]
    elif given:
        layers = [{"prompt": prompt} for prompt in given]
    elif base.get("continue"):
        layers = [{}]
    else:
        raise UsageError(
            "give prompts to draw, or --describe FILE, --continue FILE, --edit FILE INSTRUCTION, "
            "--prompts FILE"
        )
    items = [Item(n, request(base, layer)) for n, layer in enumerate(layers)]
    return items, [], settings.load


def request(*layers: Mapping[str, Any]) -> Request:
    """A request of these fields, later layers first; raises `UsageError` for what cannot be."""
    made = build(Request, *layers)
    check(made)
    return made


def check(asked: Request) -> None:
    """Raise `UsageError` if the fields of a request do not go together."""
    inputs = {
        "--describe": asked.describe and asked.ask is None,
        "--ask": asked.ask is not None,
        "--edit": asked.edit,
        "--continue": asked.continue_,
        "a document": asked.document,
    }
    told = [name for name, value in inputs.items() if value]
    if len(told) > 1:
        raise UsageError(f"{' and '.join(told)} are different things to ask: give one of them")
    if asked.ask is not None and not asked.describe:
        raise UsageError("--ask takes the picture or clip it is about: --ask TEXT FILE")
    if asked.edit and not asked.prompt:
        raise UsageError('--edit takes an instruction: --edit FILE "make it red"')
    _check_size(asked)
    _check_format(asked)
    if asked.frames is not None and asked.frames % TEMPORAL:
        near = max(TEMPORAL, round(asked.frames / TEMPORAL) * TEMPORAL)
        raise UsageError(f"frames {asked.frames} must be a multiple of {TEMPORAL}: try {near}")
    if asked.direction in ("edit", "document") and asked.frames is not None:
        raise UsageError(f"--frames makes clips: {told[0]} makes pictures")
    if asked.moving and asked.size == "free":
        raise UsageError("--size free is for pictures: a clip needs a size")
    if asked.temperature == 0 and not asked.writes_text:
        raise UsageError("temperature = 0: Input should be greater than 0; it is of words alone")
    _check_use(asked)


def settings_of(asked: Request) -> set[str]:
    """Names of settings that say something: none of what is asked, and no defaults."""
    return {name for name in SETTINGS if getattr(asked, name) != Request.model_fields[name].default}


def alone(asked: Request, n: int, guidance: float | None) -> list[str]:
    """Settings of a request that are its own, where all are to have these."""
    common = {"n": n, "guidance": guidance}
    own = settings_of(asked) - common.keys()
    return sorted(own | {name for name, value in common.items() if getattr(asked, name) != value})


def _check_use(asked: Request) -> None:
    """Nothing is passed over in silence: what would change nothing is refused."""
    direction = asked.direction
    useless = sorted(settings_of(asked) - COUNT[direction])
    if "negative" in useless and direction == "edit":
        raise UsageError(
            "an edit is led away from the picture without the instruction: it takes no negative"
        )
    if "negative" in useless and direction == "document":
        raise UsageError(
            "a document is led away from its pictures without the words: it takes no negative"
        )
    if not useless:
        return
    hint = ""
    if "text" in useless:
        hint = "; without text., temperature, top_k and top_p are of words" * asked.writes_text
    elif direction == "continue" and SIZED & set(useless):
        hint = "; the clip keeps its size"
    elif direction == "image" and {"fps", "overlap"} & set(useless):
        hint = "; for a clip say how many --frames"
    named = ", ".join(map(_option, useless))
    raise UsageError(f"{TOLD.get(direction, f'--{direction}')} takes no {named}{hint}")


def _option(name: str) -> str:
    """How the command line says a setting."""
    if name not in OPTIONS:
        return f"--set {name}" + ".…" * (name == "text")
    return "-n" if name == "n" else f"--{name.replace('_', '-')}"


def _check_size(asked: Request) -> None:
    if asked.size is not None:
        sides = size_of(asked.size)
        if asked.ratio or asked.area:
            raise UsageError("--size says it all: leave out --ratio and --area")
        if sides and any(side < SPATIAL or side % SPATIAL for side in sides):
            near = "x".join(str(max(SPATIAL, round(side / SPATIAL) * SPATIAL)) for side in sides)
            raise UsageError(
                f"size {asked.size}: both sides must be multiples of {SPATIAL}: try {near}"
            )
    if asked.ratio is not None:
        ratio_of(asked.ratio)


def _check_format(asked: Request) -> None:
    form = asked.format
    if form is None:
        return
    if form not in FORMATS:
        raise UsageError(f"format {form}: {', '.join(FORMATS[:-1])} or {FORMATS[-1]}")
    direction = asked.direction
    known: Sequence[str] = CLIPS if asked.moving else STILLS
    if asked.writes_text:
        known = ("text",)
    elif direction == "document":
        known = ("png",)
    if form not in known:
        made = "a clip" if asked.moving else "a picture"
        made = "text" if asked.writes_text else made
        more = form in CLIPS and direction == "image"
        hint = "; for a clip say how many --frames" if more else ""
        raise UsageError(f"format {form}: {made} is {' or '.join(known)}{hint}")


def size_of(text: str) -> tuple[int, int] | None:
    """(height, width) of `HxW`, None of `free`; raises `UsageError`."""
    if text == "free":
        return None
    match = re.fullmatch(r"(\d{1,6})x(\d{1,6})", text, re.ASCII)
    if not match:
        raise UsageError(
            f"size {text}: write height x width in pixels, for example 256x256, or free"
        )
    return int(match[1]), int(match[2])


def ratio_of(text: str) -> tuple[float, float]:
    """(width, height) of `W:H`; raises `UsageError`."""
    number = r"(\d{1,5}(?:\.\d{1,5})?)"
    match = re.fullmatch(f"{number}:{number}", text, re.ASCII)
    sides = (float(match[1]), float(match[2])) if match else (0.0, 0.0)
    if min(sides) <= 0:
        raise UsageError(f"ratio {text}: write width : height, for example 16:9")
    return sides


# --- files of prompts ----------------------------------------------------------------------


def read_prompts(file: str, base: Mapping[str, Any]) -> tuple[list[Item], list[Bad]]:
    """Requests of a file, and its lines that are none; see the head of this module.

    `base` is what lines do not say. Raises `UsageError` if the file cannot be read at all.
    """
    path, suffix = Path(file), Path(file).suffix.lower()
    if file != "-" and suffix not in SUFFIXES:
        raise UsageError(f"{file}: prompts are in {', '.join(SUFFIXES)}, or - for stdin")
    if suffix == ".json" and file != "-":
        return [Item(0, request(base, {"document": str(path)}))], []
    name = "stdin" if file == "-" else file
    items: list[Item] = []
    bad: list[Bad] = []
    used: set[str] = set()
    try:
        lines = _lines(file, suffix)
        for number, (line, given) in enumerate(lines):
            where = f"{name}, {'row' if suffix == '.parquet' else 'line'} {line}"
            try:
                if isinstance(given, UnimodalError):
                    raise given
                fields = _fields(given, base)
                folder = Path() if file == "-" else path.parent
                asked = _asked(base, fields)
                used |= COUNT[asked.direction]
                items.append(Item(number, asked, where, line, given, folder))
            except UnimodalError as error:
                kept = given.args[1] if isinstance(given, UnimodalError) else given
                bad.append(Bad(line, where, str(error), kept))
    except OSError as error:
        raise UsageError(f"{file}: cannot be read ({error.strerror or error})") from error
    if not items and not bad:
        raise UsageError(f"{name}: holds no prompts")
    common = settings_of(build(Request, base))
    if useless := sorted(common - used) if items else []:
        raise UsageError(f"{name}: no line takes {', '.join(map(_option, useless))}")
    return items, bad


def _asked(base: Mapping[str, Any], fields: Mapping[str, Any]) -> Request:
    """What a line asks. Of what is said for all lines, it takes what counts for it."""
    direction = build(Request, base, fields).direction
    ours = {k: v for k, v in base.items() if k in COUNT[direction] or k not in SETTINGS}
    return request(ours, fields)


def _fields(given: Any, base: Mapping[str, Any]) -> Mapping[str, Any]:
    if isinstance(given, str):
        return {"prompt": given}
    fields = dict(given)
    for name in PROMPTS[1:]:  # other tools' names for it
        if "prompt" not in fields and isinstance(fields.get(name), str):
            fields["prompt"] = fields.pop(name)
    if not {"prompt", "describe", "continue", "document"} & {*fields, *base}:
        raise UsageError("no prompt")
    return fields


class _BadLine(UnimodalError):
    """A line that cannot be read: the reason, and what is there."""

    def __str__(self) -> str:
        return str(self.args[0])


def _lines(file: str, suffix: str) -> Iterator[tuple[int, Any]]:
    """(line, prompt, fields or `_BadLine`) of each line that is not blank."""
    if suffix == ".parquet":
        yield from _parquet(Path(file))
        return
    if file == "-":
        if sys.stdin.isatty():
            raise UsageError("--prompts - reads prompts from a pipe")
        raw: Any = getattr(sys.stdin, "buffer", None) or io.BytesIO(sys.stdin.read().encode())
        yield from _parsed(raw, objects=None)
        return
    with Path(file).open("rb") as raw:
        if suffix in (".csv", ".tsv"):
            yield from _csv(raw, file, "," if suffix == ".csv" else "\t")
        else:
            yield from _parsed(raw, objects=suffix != ".txt")


def _decoded(raw: Any) -> Iterator[tuple[int, str | _BadLine]]:
    number = 0
    while data := raw.readline(LONGEST_LINE + 1):
        number += 1
        if len(data) > LONGEST_LINE:
            raise UsageError(f"line {number} is longer than {LONGEST_LINE} bytes: no prompts")
        try:
            yield number, data.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            shown = data.decode("utf-8", "replace").strip()
            yield number, _BadLine(f"not UTF-8 at column {error.start + 1}", shown)


def _parsed(raw: Any, objects: bool | None) -> Iterator[tuple[int, Any]]:
    """`objects`: whether lines are JSON; None: those that begin with `{` are."""
    for number, line in _decoded(raw):
        if isinstance(line, _BadLine):
            yield number, line
            continue
        line = line.strip()
        if not line:
            continue
        if objects is False or (objects is None and not line.startswith("{")):
            yield number, line
            continue
        try:
            value = json.loads(line)
            if not isinstance(value, dict):
                raise ValueError('not an object such as {"prompt": "a kite"}')
            yield number, _clean(value)
        except (ValueError, RecursionError) as error:
            yield number, _BadLine(f"not JSON ({error})", line)


def _clean(value: Any) -> Any:
    """Halves of characters, which JSON can spell, replaced: UTF-8 cannot hold them."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, list):
        return [_clean(one) for one in value]
    if isinstance(value, dict):
        return {_clean(key): _clean(one) for key, one in value.items()}
    return value


def _csv(raw: Any, file: str, delimiter: str) -> Iterator[tuple[int, Any]]:
    text = io.TextIOWrapper(raw, encoding="utf-8-sig", errors="replace", newline="")
    reader = csv.reader(text, delimiter=delimiter)
    header: list[str] | None = None
    try:
        for cells in reader:
            if not any(cells):
                continue
            if header is None:
                header = [cell.strip() for cell in cells]
                columns = _columns(header, file)
                continue
            if len(cells) != len(header):
                why = f"{len(cells)} cells under {len(header)} column names"
                yield reader.line_num, _BadLine(why, delimiter.join(cells))
                continue
            if any("\ufffd" in cell for cell in cells):
                yield reader.line_num, _BadLine("not UTF-8", delimiter.join(cells))
                continue
            row = dict(zip(header, cells, strict=True))
            told = {field: row[name] for field, name in columns.items()}
            yield reader.line_num, {k: v for k, v in told.items() if v or k == "prompt"}
    except csv.Error as error:
        raise UsageError(f"{file}, line {reader.line_num}: {error}") from error


def _parquet(path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            columns = _columns(file.schema_arrow.names, str(path))
            number = 0
            for batch in file.iter_batches(4096, columns=sorted(set(columns.values()))):
                for row in batch.to_pylist():
                    number += 1
                    told = {field: row[name] for field, name in columns.items()}
                    told["prompt"] = told.get("prompt") or ""
                    yield number, {k: v for k, v in told.items() if v is not None}
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read ({first_line(error)})") from error


def _columns(names: Sequence[str], file: str) -> dict[str, str]:
    """Column of each field that a table has; others are no concern of ours."""
    lower = {name.strip().lower(): name for name in reversed(names)}
    fields = {field.alias or name for name, field in Request.model_fields.items()}
    found = {field: lower[field] for field in sorted(fields & lower.keys()) if field != "text"}
    prompt = next((lower[name] for name in PROMPTS if name in lower), None)
    files = found.keys() & {"describe", "continue", "document"}
    if prompt is None and not files:
        raise UsageError(
            f"{file}: no column of prompts (one of {', '.join(PROMPTS)}); "
            f"its columns are: {', '.join(names) or 'none'}"
        )
    return found | ({"prompt": prompt} if prompt is not None else {})
