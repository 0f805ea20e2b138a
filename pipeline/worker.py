"""One job of the pipeline, and the process that does jobs for an engine.

    python -P -m unimodal.pipeline.worker

reads jobs from standard input and writes events to standard output, one JSON object a line. A
process of its own, because libav can crash and hang on broken media; plain pipes, because they
need no import of the caller's main module and carry nothing that must be unpickled.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from unimodal.pipeline.errors import UnimodalError
from unimodal.pipeline.inputs import Source
from unimodal.pipeline.watch import Tell, WatchSettings, watch_part


@dataclass
class Job:
    """A part to be done by a stage; crosses process and machine borders as JSON."""

    stage: str
    part: str
    folder: str  # of the stage, where results are committed
    sources: list[dict[str, Any]]  # fields of `Source`
    settings: dict[str, Any]
    poison: dict[str, str] = field(default_factory=dict)  # uri: why it must not be touched
    threads: int = 1

    def text(self) -> str:
        """The job as one line of JSON."""
        return json.dumps(asdict(self))


def do(job: Job, tell: Tell) -> None:
    """Do a job in this process; raises `UnimodalError` if it cannot be done at all."""
    if job.stage != "watch":
        raise UnimodalError(f"no stage is called {job.stage}")
    watch_part(
        job.part,
        [Source(s["uri"], s["size"], s["mtime_ns"], s["sha256"]) for s in job.sources],
        WatchSettings.model_validate(job.settings),
        Path(job.folder),
        poison=job.poison,
        tell=tell,
        threads=job.threads,
    )


def main() -> None:
    """Do the jobs that come in on standard input until it closes."""
    # Loaded before the first job, so that slow imports do not look like a stuck file.
    import av  # noqa: F401
    import cv2  # noqa: F401
    import scenedetect  # noqa: F401

    # Libraries that print would garble the events: they get standard error instead.
    events = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    jobs: queue.Queue[str] = queue.Queue()

    def read() -> None:
        for line in sys.stdin:
            jobs.put(line)
        os._exit(0)  # whoever sent the jobs is gone: so is the reason to finish this one

    def send(**event: Any) -> None:
        events.write(json.dumps(event) + "\n")

    threading.Thread(target=read, daemon=True).start()
    tell = Tell(
        source=lambda uri: send(source=uri),
        seconds=lambda seconds: send(seconds=seconds),
        done=lambda uri: send(done=uri),
    )
    send(ready=os.getpid())
    while True:
        try:
            do(Job(**json.loads(jobs.get())), tell)
            send(finished=True)
        except UnimodalError as error:
            send(failed=str(error))


if __name__ == "__main__":
    main()
