"""One vLLM engine, lent to `unimodal caption` again and again, and then asked alone.

    python lent_engine.py PLAN.json

An engine takes half a minute to start: what is to be seen of it happens in one process. The plan
says what; beside it, `done.json` tells what came of it.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from unimodal.cli.app import main
from unimodal.pipeline.captioning import describe, offline
from unimodal.pipeline.captioning.captioner import Ask
from unimodal.pipeline.captioning.requests import requests_in
from unimodal.pipeline.captioning.settings import CaptionSettings
from unimodal.pipeline.run import Run

LENT: list[Lent] = []


class Lent(offline.Offline):
    """An engine that stays when a command has done with it."""

    def close(self) -> None:
        """Not yet."""
        self._restore()


def lent(settings: CaptionSettings) -> offline.Offline:
    """The engine, started by whoever needs it first; another model has one of its own."""
    if not LENT or LENT[0]._settings.model != settings.model:
        LENT.append(Lent(settings))
        return LENT[-1]
    LENT[0]._stdout = offline._to_stderr()
    return LENT[0]


def call(arguments: list[str]) -> dict[str, Any]:
    """A command in this process: its exit code, and what is on file descriptors 1 and 2."""
    kept = os.dup(1), os.dup(2)
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        sys.argv = ["unimodal", *arguments]
        try:
            main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for to, copy in zip((1, 2), kept, strict=True):
                os.dup2(copy, to)
        out.seek(0)
        err.seek(0)
        return {"code": code, "stdout": out.read().decode(), "stderr": err.read().decode()}


def alone(path: str) -> list[dict[str, Any]]:
    """A run's requests, the last first, each asked when there is no other."""
    run = Run.open(path)
    settings = run.settings.caption
    wanted: dict[str, list[str]] = {}
    for clip in run.clips.to_pylist():
        if clip["verdict"] == "keep":
            wanted.setdefault(clip["part"], []).append(clip["uid"])
    watch = run.path / run.info["stages"]["watch"]
    found = list(requests_in(watch, wanted, lambda key: False, settings))
    prompt = describe.prompt_of(settings)
    rows = []
    for request in reversed(found):
        rows += describe.answered([request], LENT[0], settings, prompt)
    return rows


def odd() -> dict[str, Any]:
    """What becomes of questions that the model cannot take, and of one after them."""
    rng = np.random.default_rng(0)

    def jpeg(height: int, width: int) -> bytes:
        pixels = rng.integers(0, 255, (height, width, 3), dtype=np.uint8)
        return cv2.imencode(".jpg", pixels)[1].tobytes()

    small = jpeg(72, 72)
    asks = {
        "long": ("word " * 4000, (small,)),
        "many": ("", (small,) * 13),
        "thin": ("", (jpeg(3, 900),)),
        "broken": ("", (small[:40] + b"\xff\xd9",)),
        "large": ("", (jpeg(1500, 2000),)),
        "good": ("", (small,)),
    }
    for key, (before, frames) in asks.items():
        LENT[0].submit(Ask(key, "", before, frames, "", None, 5, 0.0, 1.0, 0))
    told: dict[str, Any] = {}
    while len(told) < len(asks):
        told |= {key: vars(answer) for key, answer in LENT[0].collect()}
    return told


if __name__ == "__main__":
    plan = Path(sys.argv[1])
    asked = json.loads(plan.read_text())
    offline.Offline = lent  # type: ignore[assignment,misc]
    done = {
        "commands": [call(arguments) for arguments in asked["commands"]],
        "alone": {path: alone(path) for path in asked["alone"]},
        "odd": odd(),
        "refused": [call(arguments) for arguments in asked["refused"]],
    }
    plan.with_name("done.json").write_text(json.dumps(done))
