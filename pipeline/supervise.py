"""A worker process that may die: it is replaced, and the file that did it is set aside.

libav is fast and old; a broken file can crash it or hang it. The supervisor knows from the
worker's events which source it is at (or, in a stage after the decode, which clip). A worker that
dies is tried once more on the same part, as the machine may have killed it; when it dies on the
same source again, or falls silent, that source is quarantined and the rest of the part goes on.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from typing import Any

from unimodal.pipeline.errors import UnimodalError
from unimodal.pipeline.settings import Settings
from unimodal.pipeline.tell import Tell
from unimodal.pipeline.worker import Job


class Patience(Settings):
    """When to give up on a file, a worker or the whole run; a change repeats no work."""

    stall_s: float = 120.0
    """Seconds without any sign of progress."""
    source_s: float = 7200.0
    """Seconds for one source, however alive."""
    deaths: int = 2
    """A source on which so many workers died is quarantined."""
    failures: float = 0.5
    """Share of the sources that may fail before the run stops, as it does when a disk is gone;
    1 never stops."""
    failures_least: int = 50
    """Failed sources below which it goes on whatever their share."""

    def check(self, failed: int, seen: int, what: str, why: str) -> None:
        """Raise `UnimodalError` if too many of the first `what` ("sources") failed, as of `why`."""
        if failed >= self.failures_least and failed > self.failures * seen:
            raise UnimodalError(
                f"stopped: {failed} of the first {seen} {what} could not be read, the last one "
                f"because of: {why}. If a disk or a network was away, run the same command with "
                "--retry-quarantined; if these files are just broken, with "
                "--set patience.failures=1"
            )


START_S = 120.0
"""Seconds that a new worker may take to load its libraries."""


class Supervised:
    """One worker process after another, doing one job at a time, on one `gpu` if it is given."""

    def __init__(self, patience: Patience, gpu: str | None = None) -> None:
        self._patience = patience
        self._gpu = gpu
        self._process: subprocess.Popen[bytes] | None = None
        self._pending = b""
        self._errors: Any = None
        self._stopped = False

    @property
    def pid(self) -> int | None:
        """Process id of the current worker."""
        return self._process.pid if self._process else None

    def do(self, job: Job, tell: Tell) -> None:
        """Do a job, whatever its sources do to the workers.

        Raises `UnimodalError` if it cannot be done at all: a full disk, or workers that die
        before they touch a source.
        """
        deaths: Counter[str] = Counter()
        poison = dict(job.poison)
        while True:
            culprit, reason, final = self._attempt(replace(job, poison=poison), tell)
            if reason is None:
                return
            if self._stopped:
                raise UnimodalError("stopped; run the same command again to go on")
            deaths[culprit] += 1
            if not culprit and deaths[""] >= self._patience.deaths:
                raise UnimodalError(
                    f"part {job.part}: workers die outside of any source ({reason}). "
                    f"{self._tail() or 'If memory is short, lower --workers or batch sizes.'}"
                )
            # Of a batch of clips only the first is known by name: then one by one, to be sure.
            final = final and (job.one_by_one or culprit.startswith("watch:"))
            if culprit and (final or deaths[culprit] >= self._patience.deaths):
                poison[culprit] = reason
            job = replace(job, one_by_one=True)

    def stop(self) -> None:
        """End the worker from another thread; `do` raises there."""
        self._stopped = True  # from here on, none is started
        if (process := self._process) is not None:
            process.kill()

    def close(self) -> None:
        """End the worker."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout):
                if stream is not None:
                    stream.close()
            self._process = None
        if self._errors is not None:
            self._errors.close()
            self._errors = None

    def _attempt(self, job: Job, tell: Tell) -> tuple[str, str | None, bool]:
        """One try: (stage:thing at fault or "", reason or None if done, whether to give it up)."""
        source = ""
        fresh = self._process is None or self._process.poll() is not None
        try:
            process = self._started()
            assert process.stdin is not None
            process.stdin.write(job.text().encode() + b"\n")
            process.stdin.flush()
        except OSError:
            return source, self._buried(), False
        since = heard = time.monotonic()
        stall = START_S if fresh else self._patience.stall_s
        while True:
            limit = min(heard + stall, since + self._patience.source_s)
            event = self._event(limit)
            now = time.monotonic()
            if event is None and now < limit:
                return source, self._buried(), False
            if event is None or now - since > self._patience.source_s:
                silent = now - heard >= stall
                self.close()
                if silent:
                    return source, f"no progress for {stall:g} s", True
                return source, f"not done after {self._patience.source_s:g} s", True
            heard, stall = now, self._patience.stall_s
            if "begin" in event:
                source, since = ":".join(event["begin"]), now
                tell.begin(*event["begin"])
            elif "seconds" in event:
                tell.seconds(event["seconds"])
            elif "done" in event:
                tell.done(*event["done"])
                source, since = "", now
            elif "failed" in event:
                raise UnimodalError(event["failed"])
            elif "finished" in event:
                return source, None, True

    def _started(self) -> subprocess.Popen[bytes]:
        if self._stopped:
            raise UnimodalError("stopped; run the same command again to go on")
        if self._process is None or self._process.poll() is not None:
            self.close()
            self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the worker
            self._pending = b""
            environment = dict(os.environ)
            if self._gpu is not None:
                environment["CUDA_VISIBLE_DEVICES"] = self._gpu
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "unimodal.pipeline.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env=environment,
            )
        return self._process

    def _event(self, limit: float) -> dict[str, Any] | None:
        """The worker's next event; None when it has died or `limit` (monotonic time) has come."""
        process = self._process
        assert process is not None and process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._pending:
                if not selector.select(max(0.0, limit - time.monotonic())):
                    return None
                block = os.read(process.stdout.fileno(), 1 << 16)
                if not block:
                    return None
                self._pending += block
        line, _, self._pending = self._pending.partition(b"\n")
        return json.loads(line)

    def _buried(self) -> str:
        """How the worker died."""
        if self._process is None:
            return "the worker could not be started"
        code = self._process.wait()
        if code >= 0:
            said = self._tail()
            return f"the worker that read it ended with exit code {code}" + (said and f": {said}")
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        return f"the worker that read it died ({name})"

    def _tail(self) -> str:
        """The last line that the dead worker said."""
        if self._errors is None:
            return ""
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else ""
