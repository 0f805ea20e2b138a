"""Guidance in an engine that batches requests as it likes: rows as requests that run in step.

Legend: P drafts that choose at once, G rows of each, K ids out of which one is chosen,
        V vocabulary.

A draft is written in stretches. Text is one request. A vision block under guidance is two or
three: the conditional one and its twins, each with its own prompt, which run in step, so that
every step has the logits of all rows; one id is chosen from them and forced on each. All requests
of a stretch carry the same `Stretch` as JSON, and `Pairing`, inside the engine, rebuilds the walk
from it, together with what the requests have written so far. Nothing is kept that the engine does
not know too, so what it computes twice or throws away does no harm.

PAD, which no grammar allows, ends every request: where its stretch is over, and at once where its
rows are not in step. Whoever sent it follows the same walk in `Writing` and sees which it was; and
sees a missing PAD where no `Pairing` was at work.
"""

from __future__ import annotations

import json
import math
import zlib
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unimodal.model.choice import Choice, Noise
from unimodal.model.generate import Draft, Drawing
from unimodal.model.grammar import Allowed, BlockGrammar, DocumentGrammar, Grammar
from unimodal.pipeline.errors import UnimodalError, UsageError
from unimodal.tokenize.vocabulary import Vocabulary

ARGUMENT = "unimodal"
"""Name of a request's argument that holds its `Stretch`."""


@dataclass(frozen=True)
class Stretch:
    """What the requests of one stretch have in common."""

    name: str
    """No two stretches that an engine has at a time may share it."""
    rows: list[int]
    """`mark` of each row's prompt: tells which of the rows a request is."""
    guidance: list[float]
    """A scale for each row but the first, of the draft; also where this stretch has one row."""
    grammar: dict[str, Any]
    """See `describe`."""
    written: int
    """Ids at the end of the first row's prompt that the grammar has led to."""
    vision: dict[str, Any]
    text: dict[str, Any]
    seed: int
    key: list[int]

    def json(self) -> str:
        """As it travels."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def parse(cls, text: object) -> Stretch:
        """Raises `ValueError` for anything that `json` did not write."""
        try:
            found = cls(**json.loads(text)) if isinstance(text, str) else None
            if (
                found is None
                or not isinstance(found.name, str)
                or not isinstance(found.grammar, dict)
                or not _numbers(found.rows, int)
                or not _numbers(found.guidance, int, float)
                or not _numbers(found.key, int)
                or not _numbers([found.written, found.seed], int)
                or len(found.rows) not in (1, 1 + len(found.guidance))
                or found.written < 0
            ):
                raise ValueError("fields")
            Choice(**found.vision), Choice(**found.text)
        except (TypeError, ValueError, UnimodalError) as error:
            raise ValueError(
                f"the request's {ARGUMENT} argument is no stretch of a draft ({error}): "
                "send it through unimodal.model.vllm_server"
            ) from error
        return found


def _numbers(values: object, *kinds: type) -> bool:
    return isinstance(values, list) and all(
        type(one) in kinds and math.isfinite(one) for one in values
    )


def mark(prompt: Sequence[int]) -> int:
    """Tells the rows of one draft apart; those of equal prompts need not be."""
    return zlib.crc32(np.asarray(prompt, "<i8").tobytes())


def describe(grammar: Grammar) -> dict[str, Any]:
    """A grammar as JSON; raises `UsageError` for one that cannot travel."""
    if isinstance(grammar, BlockGrammar):
        vision = grammar.vision
        done = sum(vision.start <= one < vision.stop for one in grammar.opening)
        return {"shape": list(grammar.shape), "done": done, "last": done + len(grammar)}
    if isinstance(grammar, DocumentGrammar):
        return {name: getattr(grammar, name) for name in _DOCUMENT}
    raise UsageError(f"vLLM cannot be told of a {type(grammar).__name__}: use the torch backend")


_DOCUMENT = ("room", "tokens", "images", "size", "picture")


@lru_cache(maxsize=256)
def rebuild(text: str, vocabulary: Vocabulary, longest: int) -> Grammar:
    """The grammar that `describe` gave, as JSON; `longest`: the engine's context, which no block
    may exceed. Raises `ValueError`, `TypeError` or `KeyError` for anything else."""
    record = json.loads(text)
    if "shape" not in record:
        size = record.pop("size")
        if not 0 <= record["room"] <= longest or (size and math.prod(size) > longest):
            raise ValueError(f"a document of {record['room']} ids is over the context")
        return DocumentGrammar(vocabulary, **record, size=tuple(size) if size else None)
    *frames, height, width = record["shape"]
    done, last, area = record["done"], record["last"], height * width
    if min(record["shape"]) < 1 or not 0 <= done < last <= math.prod(record["shape"]) <= longest:
        raise ValueError(f"no block of {record['shape']}")
    return BlockGrammar(
        vocabulary,
        height,
        width,
        frames[0] if frames else None,
        fps=1.0 if frames else None,  # its place is in the opening, which the prompt has
        begun=np.zeros(done, np.int64) if done else None,
        until=last // area,
    )


class Course:
    """A walk that is followed along ids which somebody wrote."""

    def __init__(self, grammar: Grammar) -> None:
        self.walk = grammar.start()
        self.due: deque[int] = deque()
        """Given ids that have not been seen yet."""
        self.choices = 0

    def read(self, token: int) -> tuple[Sequence[int], bool]:
        """Go on by one id. Of one that was chosen: itself and the given ids behind it, and
        whether twins see them; else none. Raises `ValueError` for an id that cannot be there."""
        if self.due:
            if token != self.due[0]:
                raise ValueError(f"id {token} where {self.due[0]} is given")
            self.due.popleft()
            return (), False
        allowed = self.walk.allowed
        if allowed is None or not any(a <= token < b for a, b in allowed.ranges):
            raise ValueError(f"id {token} is not allowed there")
        taken = self.walk.take(token)
        self.due.extend(taken.given)
        self.choices += 1
        return [token, *taken.given], taken.shared

    def rows(self, guidance: Sequence[float]) -> int:
        """Rows out of whose logits the next id is chosen: 0 if there is none."""
        allowed = self.walk.allowed
        if allowed is None:
            return 0
        return 1 + len(guidance) if allowed.kind == "vision" else 1


# --- inside the engine ---------------------------------------------------------------------


@dataclass(eq=False)
class Request:
    """A row of the engine's batch that belongs to a stretch."""

    stretch: Stretch
    prompt: Sequence[int]
    written: list[int]
    """What it has written: the engine's own list, which grows."""


@dataclass
class _Group:
    """The requests of a stretch that are in the batch."""

    stretch: Stretch
    present: dict[int, tuple[int, Request]] = field(default_factory=dict)
    """By number of the row: its place in the batch, and the request."""
    others: list[int] = field(default_factory=list)
    """Places of requests that are none of its rows."""
    course: Course | None = None
    read: int = 0
    """Ids that the course has been followed along."""
    choices: dict[str, Choice] = field(default_factory=dict)
    over: bool = False


class Pairing:
    """Chooses for every stretch in the batch, once a step."""

    def __init__(self, vocabulary: Vocabulary, longest: int, device: torch.device | str) -> None:
        """`longest`: the engine's context in ids."""
        self.vocabulary = vocabulary
        self.longest = longest
        self.device = device
        self.requests: dict[int, Request] = {}
        """By place in the batch."""
        self.groups: dict[str, _Group] = {}

    def regroup(self) -> None:
        """To be called when `requests` changed."""
        groups: dict[str, _Group] = {}
        for place, request in sorted(self.requests.items()):
            name, prompt = request.stretch.name, mark(request.prompt)
            if name not in groups:
                groups[name] = self.groups.get(name) or _Group(request.stretch)
                groups[name].present, groups[name].others = {}, []
            group = groups[name]
            fits = (i for i, row in enumerate(group.stretch.rows) if row == prompt)
            row = next((i for i in fits if i not in group.present), None)
            if row is None:
                group.others.append(place)
            else:
                group.present[row] = place, request
        self.groups = groups

    def apply(self, logits: Tensor) -> Tensor:
        """Make the chosen id of each row the largest of its logits [R, V]."""
        places, ids = [], []
        choosing: dict[tuple[Allowed, Choice, int], list[_Group]] = {}
        for group in self.groups.values():
            token = self._next(group)
            places += group.others
            ids += [self.vocabulary.pad] * len(group.others)
            if isinstance(token, Allowed):
                choice = group.choices["vision" if token.kind == "vision" else "text"]
                key = token, choice, len(group.stretch.rows)
                choosing.setdefault(key, []).append(group)
            else:
                places += [place for place, _ in group.present.values()]
                ids += [token] * len(group.present)
        if places:
            self._force(logits, torch.tensor([places]), torch.tensor(ids))
        for (allowed, choice, rows), groups in choosing.items():
            table = torch.tensor([[g.present[i][0] for g in groups] for i in range(rows)])
            self._force(logits, table, self._choose(logits, table, allowed, choice, groups))
        return logits

    def _next(self, group: _Group) -> Allowed | int:
        """The given id that is next, PAD at the end, or the ids of a choice."""
        end, stretch = self.vocabulary.pad, group.stretch
        alike = {len(request.written) for _, request in group.present.values()}
        if group.over or len(alike) != 1 or set(group.present) != set(range(len(stretch.rows))):
            return end  # not in step, and never again: a row that has written PAD is lost
        first = group.present[0][1]
        try:
            if group.course is None:
                text = json.dumps(stretch.grammar)
                course = Course(rebuild(text, self.vocabulary, self.longest))
                for token in first.prompt[len(first.prompt) - stretch.written :]:
                    course.read(token)
                group.choices = {
                    "vision": Choice(**stretch.vision),
                    "text": Choice(**stretch.text),
                }
                group.course = course
            for token in first.written[group.read :]:
                group.course.read(token)
            group.read = len(first.written)
        except (ValueError, TypeError, KeyError, UnimodalError):
            group.over = True
            return end
        if group.course.rows(stretch.guidance) != len(stretch.rows):
            group.over = True
            return end
        if group.course.due:
            return group.course.due[0]
        allowed = group.course.walk.allowed
        assert allowed is not None
        return allowed

    def _choose(
        self,
        logits: Tensor,
        table: Tensor,
        allowed: Allowed,
        choice: Choice,
        groups: list[_Group],
    ) -> Tensor:
        """The next ids int64 [P] from logits [R, V], of whose rows `table` [G, P] has places."""
        where = table.to(logits.device)
        runs = [logits[:, start:stop] for start, stop in allowed.ranges]
        own = [torch.cat([run[row] for run in runs], dim=-1).float() for row in where]  # [P, K]
        scales = torch.tensor([g.stretch.guidance for g in groups], dtype=torch.float32)
        scales = scales.T[: len(own) - 1, :, None].to(logits.device)  # [G - 1, P, 1]
        ids = _ids(allowed, logits.device)
        combined = choice.guide(own, list(scales)) if len(own) > 1 else own[0]

        def noise(columns: Tensor) -> Tensor:
            keys = tuple((g.stretch.seed, *g.stretch.key) for g in groups)
            made = _noise(keys, logits.device)
            steps = torch.tensor([g.course.choices for g in groups if g.course])
            return made.exponential(steps.to(logits.device), ids[columns])

        return ids[choice.pick(combined, noise)]

    def _force(self, logits: Tensor, table: Tensor, ids: Tensor) -> None:
        """Make ids [P] the choice of the rows at places [G, P]."""
        ids = ids.to(logits.device).expand(table.shape)
        most = torch.finfo(logits.dtype).max
        logits[table.to(logits.device), ids] = most


@lru_cache(maxsize=64)
def _ids(allowed: Allowed, device: torch.device) -> Tensor:
    return allowed.ids.to(device)


@lru_cache(maxsize=64)
def _noise(keys: tuple[tuple[int, ...], ...], device: torch.device) -> Noise:
    """Of each sequence seed and key; made once for many steps."""
    return Noise([key[0] for key in keys], [key[1:] for key in keys], device)


# --- outside -------------------------------------------------------------------------------


class OutOfStep(Exception):
    """The rows of a draft parted, and nothing was drawn from them."""


class Writing:
    """One draft, as it is sent stretch by stretch."""

    def __init__(self, draft: Draft, drawing: Drawing, vocabulary: Vocabulary) -> None:
        self.draft, self.drawing, self.end = draft, drawing, vocabulary.pad
        self.course = Course(draft.grammar)
        self.ids: list[int] = []
        """Behind the context."""
        self.shared: list[int] = []
        """Of these, what the twins see."""
        self.untold = 0
        """Choices that a `Watch` has not been told of."""

    @property
    def rows(self) -> int:
        """Requests of the next stretch; 0 if the draft is written."""
        return self.course.rows(self.draft.guidance)

    @property
    def most(self) -> int:
        """The most ids that a request of the next stretch may write, PAD among them."""
        return self.draft.grammar.most - len(self.ids) + 1

    def prompts(self) -> list[list[int]]:
        """Of the requests of the next stretch, the conditional one first."""
        own, *others = self.draft.contexts
        twins = [[*context, *self.shared] for context in others[: self.rows - 1]]
        return [[*own, *self.ids], *twins]

    def stretch(self, name: str) -> Stretch:
        """What goes with each of them; also to go on where a stretch broke off."""
        self.course.due.clear()  # `prompts` has what is given
        return Stretch(
            name=name,
            rows=[mark(prompt) for prompt in self.prompts()],
            guidance=list(self.draft.guidance),
            grammar=describe(self.draft.grammar),
            written=len(self.ids),
            vision=asdict(self.drawing.vision),
            text=asdict(self.drawing.text),
            seed=self.drawing.seed if self.draft.seed is None else self.draft.seed,
            key=list(self.draft.key),
        )

    def read(self, token: int, rows: int) -> bool:
        """Go on by one id that the first of `rows` requests wrote; whether the stretch is over.

        Raises `OutOfStep` if the request ended before its stretch did, `ValueError` for an id that
        the grammar does not have there.
        """
        if token == self.end:
            if self.rows == rows:
                raise OutOfStep(f"its {rows} requests were not computed together")
            return True
        new, shared = self.course.read(token)
        self.ids += new
        if shared:
            self.shared += new
        return False
