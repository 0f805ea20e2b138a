"""From what is asked to calls of the sampler, and from what comes to files.

Requests with equal settings share calls, in the order of the first of them; a call makes so many
outputs as are drawn at once, and what it made is written before the next begins. Which outputs
share a call follows from what is asked alone, not from what is there already: a run that was
interrupted draws the call it was in again, whole, and comes to the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from unimodal.cli.given import Given, check, read, read_document, resolve
from unimodal.cli.live import Show, Watched
from unimodal.cli.outputs import FAILED, Folder, name_of
from unimodal.cli.prompts import Bad, Item, Request
from unimodal.pipeline.errors import UnimodalError, UsageError
from unimodal.tokenize.document import SPATIAL, TEMPORAL

if TYPE_CHECKING:
    from unimodal.model.sample import Sampler

USUAL = 0.9
"""Share of training's pictures from which on their commonest size goes without saying."""


@dataclass(eq=False)
class Ready:
    """A request with what it was given at hand."""

    told: dict[str, Any]
    """What its files tell of their origin."""
    given: list[Given]
    pieces: list[str | Given]
    """Of a document."""
    fps: float | None
    """Of a clip."""


@dataclass(eq=False)
class Output:
    """One thing to be made: a copy of what a request asks for."""

    item: Item
    copy: int
    ready: Ready

    @property
    def asked(self) -> dict[str, Any]:
        """What its file tells of its origin."""
        return {**self.ready.told, "copy": self.copy}

    @property
    def fps(self) -> float | None:
        return self.ready.fps

    @property
    def request(self) -> Request:
        return self.item.request

    @property
    def stem(self) -> str:
        asked, title = self.request, self.item.title
        if not (asked.ask or asked.prompt):  # a file's name, whose hyphens are its own
            title = title.replace("-", " ")
        return name_of(self.item.number, title, asked.seed, self.copy)

    @property
    def name(self) -> str:
        """Of its file; of a document its folder."""
        return self.stem if self.request.direction == "document" else f"{self.stem}.{self.suffix}"

    @property
    def suffix(self) -> str:
        return self.request.suffix


@dataclass
class Studio:
    """A sampler at work for one run of the command."""

    sampler: Sampler
    folder: Folder | None
    """None: texts are only reported."""
    show: Show
    report: Callable[[Output, dict[str, Any], bool], None]
    """Is told of every output, its record, and whether it was made now or there already."""
    made_by: dict[str, Any] = field(default_factory=dict)
    """What all records say: version, checkpoint, backend."""
    together: int = 32
    """Outputs of a call."""
    bad: list[tuple[Item, UnimodalError]] = field(default_factory=list)
    warned: set[str] = field(default_factory=set)
    kept: int = 0
    """Outputs that were there already."""
    records: dict[tuple[int, int], dict[str, Any]] = field(default_factory=dict)
    """Of all outputs, by number and copy."""
    alone: bool = False
    """Whether there is one request, whose failure ends the command."""

    def __post_init__(self) -> None:
        self.watched = Watched(self.sampler.backend, self.sampler, self.show)
        self.sampler.backend = self.watched
        version = metadata.version("unimodal")
        told = {"unimodal": version, "checkpoint": self.sampler.digest, **self.made_by}
        told["vision_tokenizer"] = getattr(self.sampler.tokenizer, "digest", None)
        self.made_by = {key: value for key, value in told.items() if value is not None}

    def run(self, items: Sequence[Item]) -> None:
        """Make all that is asked; what cannot be is in `bad`."""
        groups: dict[str, list[tuple[Item, int]]] = {}
        for item in items:
            groups.setdefault(_alike(item.request), []).extend(
                (item, copy) for copy in range(item.request.n)
            )
        for group in groups.values():
            for start in range(0, len(group), self.together):
                self._together(group[start : start + self.together])

    def _together(self, some: Sequence[tuple[Item, int]]) -> None:
        outputs: list[Output] = []
        ready: dict[int, Ready] = {}
        for item, copy in some:
            try:
                if item.number not in ready:
                    ready[item.number] = self._prepared(item)
            except UnimodalError as error:
                self._failed(item, error)
                continue
            outputs.append(Output(item, copy, ready[item.number]))
        there = [self._there(one) for one in outputs]
        if all(record is not None for record in there):
            for output, record in zip(outputs, there, strict=True):
                self._keep(output, record or {})
            return
        # Clips of shards have rates of their own, and a call has one.
        for rate in sorted({one.fps or 0.0 for one in outputs}):
            mine = [i for i, one in enumerate(outputs) if (one.fps or 0.0) == rate]
            for i, made in zip(mine, self._made([outputs[i] for i in mine]), strict=True):
                output, record = outputs[i], there[i]
                if made is None:
                    continue
                if record is not None:
                    self._keep(output, record)
                    continue
                record = {**output.asked}
                if self.folder is not None:
                    rate_shown = output.fps if output.request.moving else None
                    self.folder.write(output.name, made, rate_shown, output.asked)
                    record = self.folder.records[output.name]
                elif isinstance(made, str):
                    record["text"] = made
                self.show.finished(output.stem, made)
                self._done(output, record)

    def _there(self, output: Output) -> dict[str, Any] | None:
        return None if self.folder is None else self.folder.done(output.name, output.asked)

    def _keep(self, output: Output, record: dict[str, Any]) -> None:
        assert self.folder is not None
        self.kept += 1
        self.show.meter.skip()
        self.folder.note(record)
        self._done(output, record, made=False)

    def _done(self, output: Output, record: dict[str, Any], made: bool = True) -> None:
        self.records[output.item.number, output.copy] = record
        self.report(output, record, made)

    def _failed(self, item: Item, error: UnimodalError) -> None:
        if all(item is not known for known, _ in self.bad):
            self.bad.append((item, error))
            if not self.alone:
                self.show.tell(f"{item.where}: {error}" if item.where else f"unimodal: {error}")
        self.show.meter.skip()

    def _made(self, outputs: Sequence[Output]) -> list[Any]:
        """What the sampler makes of these; None of those that it cannot make.

        What is wrong with one of them is wrong before anything is drawn: halves find it quickly.
        """
        if not outputs:
            return []
        self.watched.keys = [(one.request.seed, one.item.number, one.copy) for one in outputs]
        self.watched.names = [one.stem for one in outputs]
        continued = [one.request.direction == "text" for one in outputs]
        self.watched.heads = [
            one.request.prompt * goes_on for one, goes_on in zip(outputs, continued, strict=True)
        ]
        try:
            return call(self.sampler, outputs)
        except UnimodalError as error:
            if len(outputs) == 1:
                self._failed(outputs[0].item, error)
                return [None]
            middle = len(outputs) // 2
            return [*self._made(outputs[:middle]), *self._made(outputs[middle:])]

    def _prepared(self, item: Item) -> Ready:
        asked, sampler = item.request, self.sampler
        direction = asked.direction
        given = [self._read(path, item) for path in asked.files]
        pieces: list[str | Given] = []
        told: dict[str, Any] = {**self.made_by, "direction": direction}
        if asked.prompt or not (asked.files or asked.document):
            told["prompt"] = asked.prompt
        if asked.document is not None:
            listed, told["document"] = read_document(asked.document, item.base)
            for kind, value in listed:
                pieces.append(value if kind == "text" else self._read(value, item, Path()))
            given = [one for one in pieces if isinstance(one, Given)]
            told |= {"given": len(pieces), "texts": [p for p in pieces if isinstance(p, str)]}
        if given:
            told["inputs"] = [one.told for one in given]
        told |= {"number": item.number, "seed": asked.seed}
        clips = [one for one in given if one.moving]
        if direction in ("edit", "document") and clips:
            raise UsageError(f"{clips[0].name} is a clip: {direction} takes pictures")
        if direction == "continue" and not clips:
            raise UsageError(f"{given[0].name} is a picture: --continue takes a clip")
        if asked.moving or clips:
            self._check_moving(asked)
        if asked.writes_text:
            own = sampler.defaults
            told |= {
                "ask": (own.describe or None) if direction == "describe" else asked.ask,
                "temperature": _warmth(asked.temperature, own.text_temperature) or 0,
                "top_k": asked.top_k or own.text_top_k,
                "top_p": asked.top_p or own.text_top_p,
                "max_tokens": asked.max_tokens or own.max_tokens,
            }
        else:
            told |= self._drawn(asked)
        fps = clips[0].fps if clips else sampler.canvas.fps(asked.fps) if asked.moving else None
        told["fps"] = fps
        return Ready({k: v for k, v in told.items() if v is not None}, given, pieces, fps)

    def _check_moving(self, asked: Request) -> None:
        if not self.sampler.canvas.grids or self.sampler.canvas.commonest("video"):
            return
        if asked.direction == "video" and asked.size and asked.frames:  # whoever insists
            self.warn("this checkpoint was never trained on video: what comes will mean little")
            return
        raise UsageError(
            "this checkpoint was never trained on video: ask it for pictures, or train one on "
            "shards with clips"
        )

    def _check_usual(self) -> None:
        """Say that pictures are drawn in one of several sizes that training saw."""
        seen = [grid for grid in self.sampler.canvas.grids if grid["kind"] == "image"]
        total = sum(grid["samples"] for grid in seen)
        if seen and seen[0]["samples"] < USUAL * total:
            height, width = (side * SPATIAL for side in seen[0]["size"][-2:])
            self.warn(
                f"drawn at {height}x{width}, as {seen[0]['samples']:,} of {total:,} pictures in "
                "training; --size free lets the checkpoint choose"
            )

    def warn(self, message: str) -> None:
        """Tell a person once."""
        if message not in self.warned:
            self.warned.add(message)
            self.show.note(message)

    def _drawn(self, asked: Request) -> dict[str, Any]:
        """How pictures are drawn, for their record."""
        own, direction = self.sampler.defaults, asked.direction
        told: dict[str, Any] = {
            "guidance": asked.guidance or own.guidance,
            "temperature": asked.temperature or own.temperature,
            "top_k": asked.top_k or own.top_k,
            "top_p": asked.top_p or own.top_p,
            "plausible": own.plausible if asked.plausible is None else asked.plausible,
        }
        if direction in ("image", "video", "continue"):  # others are led away from something else
            told["negative"] = (own.negative if asked.negative is None else asked.negative) or None
            told["suffix"] = own.suffix or None
        size = self._size(asked)
        if direction == "image" and size is None:
            self._check_usual()
        if direction in ("image", "video"):
            grid = self.sampler.canvas.grid(None if size == "free" else size, _kind(asked))  # type: ignore[arg-type]
            told["size"] = size if size == "free" else [side * SPATIAL for side in grid[1:]]
            if asked.moving:
                told["frames"] = asked.frames or grid[0] * TEMPORAL
        else:
            told["size"] = list(size) if isinstance(size, tuple) else size
        if direction == "continue":
            told |= {"frames": frames_of(self.sampler, asked), "overlap": asked.overlap}
        if direction == "edit":
            told["image_guidance"] = asked.image_guidance or own.image_guidance
        if direction == "document":
            told |= {"images": asked.images, "max_tokens": asked.max_tokens}
            told["words"] = asked.text.model_dump(exclude_none=True) or None
        return told

    def _size(self, asked: Request) -> tuple[int, int] | str | None:
        def trained() -> tuple[int, int]:
            _, height, width = self.sampler.canvas.grid(None, _kind(asked))
            return height * SPATIAL, width * SPATIAL

        return asked.pixels(trained)

    def _read(self, path: str, item: Item, base: Path | None = None) -> Given:
        sampler, rate = self.sampler, item.request.fps

        def area() -> int:
            _, height, width = sampler.canvas.grid(None, "video")
            return height * width * SPATIAL**2

        whole = item.request.direction == "continue"
        where = resolve(path, item.base if base is None else base)
        digest: str = getattr(sampler.tokenizer, "digest", "")
        most = None if whole else sampler.canvas.seen
        return read(where, digest, area, lambda: sampler.canvas.fps(rate), whole, most, self.warn)


def call(sampler: Sampler, outputs: Sequence[Output]) -> list[Any]:
    """What the sampler makes of outputs that are alike, one for each: see `Folder.write`."""
    asked = [one.request for one in outputs]
    first, direction = asked[0], asked[0].direction
    prompts = [one.prompt for one in asked]
    fps = outputs[0].fps
    how: dict[str, Any] = {
        "temperature": first.temperature,
        "top_k": first.top_k,
        "top_p": first.top_p,
    }
    if first.writes_text:
        if first.max_tokens is not None:
            how["max_tokens"] = first.max_tokens
        if direction == "text":
            return [a + b for a, b in zip(prompts, sampler.write(prompts, **how), strict=True)]
        media = [[given.array for given in one.ready.given] for one in outputs]
        if direction == "describe":
            return sampler.describe([one for (one,) in media], fps=fps, **how)
        return sampler.ask(media, [one.ask or "" for one in asked], fps=fps, **how)
    how["plausible"] = first.plausible
    how["guidance"] = [one.asked["guidance"] for one in outputs]
    sizes: list[Any] = [_told_size(one.asked) for one in outputs]
    if direction == "document":
        return _documents(sampler, outputs, sizes[0], how)
    if direction == "edit":
        images = [one.ready.given[0].array for one in outputs]
        towards = first.image_guidance
        edited = sampler.edit(images, prompts, sizes, image_guidance=towards, **how)
        return [copies[0] for copies in edited]
    how["negative"] = [one.asked.get("negative", "") for one in outputs]
    if direction == "image":
        return [copies[0] for copies in sampler.images(prompts, sizes, **how)]
    if direction == "video":
        made = sampler.videos(prompts, sizes, first.frames, fps, **how)
    else:
        clips = [one.ready.given[0].array for one in outputs]
        more = frames_of(sampler, first)
        made = sampler.extend(clips, more, prompts, first.overlap, fps, **how)
    return [copies[0] for copies in made]


def _documents(
    sampler: Sampler, outputs: Sequence[Output], size: Any, how: Mapping[str, Any]
) -> list[Any]:
    from unimodal.model.choice import Choice

    first, own = outputs[0].request, sampler.defaults
    text = Choice(
        _warmth(first.text.temperature, own.text_temperature) or None,
        first.text.top_k or own.text_top_k,
        first.text.top_p or own.text_top_p,
    )
    documents = [
        [piece if isinstance(piece, str) else piece.array for piece in one.ready.pieces]
        for one in outputs
    ]
    told = {**how, "guidance": how["guidance"][0], "text": text}
    size = "free" if size is None else size
    replies = sampler.interleave(documents, first.images, first.max_tokens, size, **told)
    made = []
    for document, reply in zip(documents, replies, strict=True):
        shown: list[Any] = []
        for piece in document:
            if not isinstance(piece, str) and piece.dtype != np.uint8:
                piece = sampler.canvas.pixels([piece[None]], True)[0][0]
            shown.append(piece)
        made.append([*shown, *reply])
    return made


def _warmth(asked: float | None, own: float | None) -> float | None:
    """Temperature of words; 0 or None: the likeliest, always."""
    return own if asked is None else asked


def frames_of(sampler: Sampler, asked: Request) -> int:
    """Frames that a clip is continued by: as asked, or as many as training saw."""
    return asked.frames or sampler.canvas.grid(None, "video")[0] * TEMPORAL


def _told_size(asked: Mapping[str, Any]) -> Any:
    size = asked.get("size")
    return tuple(size) if isinstance(size, list) else size


def _kind(asked: Request) -> str:
    return "video" if asked.moving else "image"


def _alike(asked: Request) -> str:
    """Equal for requests that a call may make together."""
    names = ("temperature", "top_k", "top_p", "plausible", "image_guidance", "frames", "fps")
    more = ("max_tokens", "overlap", "images", "format")
    told: list[Any] = [asked.direction, *(getattr(asked, name) for name in (*names, *more))]
    told.append(asked.text.model_dump())
    if asked.direction == "document":
        told += [asked.size, asked.ratio, asked.area, asked.guidance]
    return json.dumps(told)


# --- before and after ----------------------------------------------------------------------


def check_inputs(items: Sequence[Item]) -> None:
    """Raise `UnimodalError` for files that cannot be used, before a checkpoint is loaded."""
    for item in items:
        for path in item.request.files:
            check(resolve(path, item.base))
        if item.request.document is not None:
            for kind, value in read_document(item.request.document, item.base)[0]:
                if kind == "image":
                    check(value)


def warning(checkpoint: Path, items: Sequence[Item]) -> str | None:
    """What a person should know who asks a checkpoint for what it never learned."""
    from unimodal.model.checkpoint import find
    from unimodal.model.records import learned

    tasks = learned(find(checkpoint)[0])
    names = {"edit": "edit", "document": "interleaved", "ask": "chat", "text": "text"}
    for item in items:
        direction = item.request.direction
        if tasks is not None and direction in names and not tasks.get(names[direction]):
            kinds = {"edit": "edits", "document": "interleaved documents", "ask": "questions"}
            return (
                f"this checkpoint was never trained on {kinds.get(direction, 'text alone')}: "
                "what comes will mean little"
            )
    return None


def sequences(batch: int, backend: str) -> int:
    """Outputs of a call: vLLM is the better the more it has at a time."""
    return batch if backend == "torch" else max(batch, 256)


def finish(
    studio: Studio, bad: Sequence[Bad], from_file: bool, columns: int
) -> dict[str, Any] | None:
    """Put the folder in order, and lay out several pictures on a sheet: its record.

    With no `columns` there is no sheet.
    """
    folder = studio.folder
    if folder is None:
        return None
    folder.finish(failures(bad, studio.bad) if from_file else ())
    shown = [record for _, record in sorted(studio.records.items()) if record.get("pixels")]
    if len(shown) < 2 or not columns:
        return None
    told = {**studio.made_by, "prompts": [record.get("prompt", "") for record in shown]}
    names = [record["file"] for record in shown]
    path = folder.sheet(names, int(shown[0]["seed"]), columns, told)
    return {"path": str(path), **told}


def conclude(studio: Studio, items: Sequence[Item], bad: Sequence[Bad], from_file: bool) -> int:
    """Tell of what was not made; the exit code. Raises what a single request failed by."""
    if studio.kept:
        studio.show.note(f"{studio.kept} were there already, made from the same")
    lost = len(bad) + len(studio.bad)
    if not lost:
        return 0
    if not from_file:
        if len(items) == 1:
            raise studio.bad[0][1]
        return max(error.exit_code for _, error in studio.bad)
    where = f": {studio.folder.out / FAILED} says why" if studio.folder else ""
    if lost == len(items) + len(bad):
        raise UnimodalError(f"none of the {lost} lines could be used{where}")
    studio.show.tell(f"{lost} of {len(items) + len(bad)} lines could not be used{where}")
    return 0


def failures(bad: Sequence[Bad], failed: Sequence[tuple[Item, UnimodalError]]) -> list[Any]:
    """Lines of failed.jsonl: those that were no request, and those that could not be made."""
    rows = [{"line": one.line, "reason": one.reason, "given": one.given} for one in bad]
    rows += [
        {"line": item.line, "reason": str(error), "given": item.given} for item, error in failed
    ]
    return sorted(rows, key=lambda row: int(row["line"] or 0))
