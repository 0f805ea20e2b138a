"""The protocol between the caption stage and whoever writes captions.

Questions carry a key, answers carry it back, in any order: nothing is ever paired by position.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from unimodal.pipeline.errors import UnimodalError

NO_FRAMES, REFUSED = "no frames", "request refused"
"""What may become of a question before a model says anything; sources add theirs."""


@dataclass(frozen=True)
class Ask:
    """One question about some pictures."""

    key: str
    system: str
    before: str  # words before the pictures, shared by many questions
    frames: tuple[bytes, ...]  # JPEGs, in order of time
    after: str
    schema: Mapping[str, Any] | None  # that the answer is held to
    max_tokens: int
    temperature: float
    top_p: float
    seed: int


@dataclass(frozen=True)
class Answer:
    """What a model said."""

    text: str
    finish: str = "stop"  # "length": it was cut off
    prompt_tokens: int = 0
    output_tokens: int = 0
    repeats: int = 0  # times that the request was sent again before this


@dataclass(frozen=True)
class Failure:
    """Why a model said nothing. Asking again would not help: sources repeat what may pass."""

    status: str  # one of a few, as "server error"
    detail: str = ""
    repeats: int = 0


class Captioner(Protocol):
    """Who writes captions. Used by one thread; raises `UnimodalError` when it is gone for good."""

    in_flight: int
    """How many questions it wants to hold at a time."""

    def submit(self, ask: Ask) -> None:
        """Take a question; its key is of no other that is under way. Does not wait."""

    def collect(self) -> Sequence[tuple[str, Answer | Failure]]:
        """Wait for answers to what was submitted; one at least, by key, in any order."""

    def close(self) -> None:
        """Give up what is under way, and all that it holds."""


class Describer(Protocol):
    """A model of ours that describes pictures, many at a time; `Batched` makes it a captioner."""

    batch: int

    def describe(
        self, clips: Mapping[str, Sequence[np.ndarray]], asks: Mapping[str, Ask]
    ) -> Mapping[str, Answer | Failure]:
        """Answers by key; `clips` are frames by key, uint8 RGB [H, W, 3], one for a picture."""

    def close(self) -> None:
        """Give back all that it holds."""


class Batched:
    """A captioner made of a describer: questions are answered when enough of them wait."""

    def __init__(self, describer: Describer) -> None:
        self.in_flight = max(1, describer.batch)
        self._describer = describer
        self._waiting: list[Ask] = []

    def submit(self, ask: Ask) -> None:
        """Keep it until `collect`."""
        self._waiting.append(ask)

    def collect(self) -> list[tuple[str, Answer | Failure]]:
        """Describe what waits."""
        asks = {ask.key: ask for ask in self._waiting}
        self._waiting = []
        clips: dict[str, list[np.ndarray]] = {}
        found: dict[str, Answer | Failure] = {}
        for key, ask in asks.items():
            try:
                clips[key] = pixels(ask)
            except UnimodalError as error:
                found[key] = Failure(NO_FRAMES, str(error))
        found |= self._describer.describe(clips, asks) if clips else {}
        lost = Failure("no answer", "the model gave none for this clip")
        return [(key, found.get(key, lost)) for key in asks]

    def close(self) -> None:
        """Let the describer go."""
        self._waiting = []
        self._describer.close()


def pixels(ask: Ask) -> list[np.ndarray]:
    """The frames of a question, uint8 RGB [H, W, 3]; raises `UnimodalError` if one is broken."""
    import cv2

    found = []
    for jpeg in ask.frames:
        picture = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR)
        if picture is None:
            raise UnimodalError(f"a stored frame of {ask.key} cannot be decoded")
        found.append(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB))
    return found
