"""A captioner for tests of fleets: says what it sees, out of order, and dies when it is told to."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

from answering import digest_of, saying  # the engine's process has this folder on its path

from unimodal.pipeline.captioning.captioner import Answer, Ask, Failure
from unimodal.pipeline.captioning.settings import CaptionSettings
from unimodal.pipeline.errors import UnimodalError


class Parrot:
    """Answers from the pictures; `settings.engine` says how it fails, and where it notes so."""

    def __init__(self, settings: CaptionSettings) -> None:
        self.in_flight = settings.in_flight
        self._how = settings.engine
        self._asks: list[Ask] = []
        self._done = 0
        if self._how.get("start"):
            raise UnimodalError(str(self._how["start"]))

    def submit(self, ask: Ask) -> None:
        """Keep it."""
        self._asks.append(ask)

    def collect(self) -> list[tuple[str, Answer | Failure]]:
        """Answer one of what waits, not the oldest."""
        ask = self._asks.pop(random.randrange(len(self._asks)))
        self._done += 1
        if (after := self._how.get("dies_after")) and self._done > after:
            note = Path(self._how["note"]) / f"{os.getpid()}"
            note.touch()
            os._exit(9)
        digest = digest_of(ask.frames)
        keys = ask.schema["required"] if ask.schema else ["dense"]
        text = json.dumps({key: saying(digest, key) for key in keys})
        return [(ask.key, Answer(text, "stop", 10, 5))]

    def close(self) -> None:
        """Nothing is held."""
