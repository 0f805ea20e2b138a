"""One job of the pipeline, and the process that does jobs for an engine.

    python -P -m unimodal.pipeline.worker

reads jobs from standard input and writes events to standard output, one JSON object a line. A
process of its own, because libav can crash and hang on broken media; plain pipes, because they
need no import of the caller's main module and carry nothing that must be unpickled.
"""

from __future__ import annotations

import importlib
import json
import os
import queue
import sys
import threading
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from unimodal.pipeline.errors import UnimodalError
from unimodal.pipeline.source import Source
from unimodal.pipeline.stage import PartFiles
from unimodal.pipeline.tell import Tell


@dataclass(frozen=True)
class Step:
    """One stage's share of a job."""

    stage: str
    folder: str  # of the stage, where results are committed
    settings: dict[str, Any]
    reads: str = ""  # folder of the stage before it: watch; for match, embed
    captions: str = ""  # match: the caption stage's file
    model: bool = False  # it runs a network that wants a GPU where there is one
    entry: str = ""  # "module:function" that does it; "" for the stages of curation

    def done(self, part: str) -> bool:
        """Whether the part was committed."""
        return PartFiles(Path(self.folder), part).done()


@dataclass
class Job:
    """What is to be done with a part, step by step; crosses process and machine borders as JSON."""

    part: str
    steps: list[Step]
    sources: list[dict[str, Any]]  # fields of `Source`
    poison: dict[str, str] = field(default_factory=dict)  # "stage:thing": why not to touch it
    threads: int = 1  # processors that it may use; the pool shares them out among its workers
    one_by_one: bool = False  # after a death, so that the culprit is known

    def text(self) -> str:
        """The job as one line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def parse(cls, text: str) -> Job:
        """What `text` wrote."""
        fields = json.loads(text)
        return cls(**{**fields, "steps": [Step(**step) for step in fields["steps"]]})


def do(job: Job, tell: Tell) -> None:
    """Do what is missing of a job, here; raises `UnimodalError` if it cannot be done at all."""
    for step in job.steps:
        if not step.done(job.part):
            _do_step(job, step, tell)


def _do_step(job: Job, step: Step, tell: Tell) -> None:
    from unimodal.pipeline import score
    from unimodal.pipeline.watch import WatchSettings, watch_part

    own = f"{step.stage}:"
    poison = {k.removeprefix(own): why for k, why in job.poison.items() if k.startswith(own)}
    if step.entry:  # work of a room above this one, which is named and not imported
        module, _, function = step.entry.partition(":")
        getattr(importlib.import_module(module), function)(job, step, poison, tell)
    elif step.stage == "watch":
        sources = [Source(**source) for source in job.sources]
        settings = WatchSettings.model_validate(step.settings)
        watch_part(job.part, sources, settings, Path(step.folder), poison, tell, job.threads)
    elif step.stage == "match":
        score.match_part(job, step, tell)
    elif step.stage in score.SCORERS:
        score.score_part(job, step, poison, tell)
    else:
        raise UnimodalError(f"no stage is called {step.stage}")


def main() -> None:
    """Do the jobs that come in on standard input until it closes."""
    # Loaded before the first job, so that slow imports do not look like a stuck file.
    for library in ("av", "cv2", "scenedetect"):
        with suppress(ImportError):  # who needs it says so
            importlib.import_module(library)

    # Libraries that print would garble the events: they get standard error instead.
    events = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    jobs: queue.Queue[str] = queue.Queue()

    def read() -> None:
        for line in sys.stdin:
            jobs.put(line)
        os._exit(0)  # whoever sent the jobs is gone: so is the reason to finish this one

    turn = threading.Lock()  # a job may tell from several threads

    def send(**event: Any) -> None:
        with turn:
            events.write(json.dumps(event) + "\n")

    threading.Thread(target=read, daemon=True).start()
    tell = Tell(
        begin=lambda stage, thing: send(begin=[stage, thing]),
        seconds=lambda seconds: send(seconds=seconds),
        done=lambda stage, thing, why: send(done=[stage, thing, why]),
    )
    send(ready=os.getpid())
    while True:
        try:
            do(Job.parse(jobs.get()), tell)
            send(finished=True)
        except UnimodalError as error:
            send(failed=str(error))


if __name__ == "__main__":
    main()
