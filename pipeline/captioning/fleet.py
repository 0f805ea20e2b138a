"""Several vLLM engines side by side: in processes of this machine, or in actors on a Ray cluster.

Each has `tensor_parallel` GPUs to itself and is handed `in_flight` questions and some to follow;
whoever has the fewest gets the next. An engine that dies is started again, once each time that it
had answered something, and its questions are asked again; one that dies without an answer ends
the run.

    python -P -m unimodal.pipeline.captioning.fleet

is such a process: questions as JSON Lines on standard input, answers on standard output.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, Protocol

from unimodal.pipeline.captioning.captioner import Answer, Ask, Captioner, Failure
from unimodal.pipeline.captioning.settings import CaptionSettings
from unimodal.pipeline.engine import gpus_here
from unimodal.pipeline.errors import UnimodalError, UsageError

Event = tuple[str, Answer | Failure] | str
"""An answer with its key; or, of an engine that is gone, why."""


class Member(Protocol):
    """One engine of a fleet."""

    def send(self, ask: Ask) -> None:
        """Hand it a question."""

    def close(self) -> None:
        """End it."""


Tell = Callable[[Event], None]
Start = Callable[[int, Tell], Member]
"""Starts the engine of this number, which tells what happens."""


class Fleet:
    """Engines side by side as one captioner; see `Captioner`."""

    def __init__(self, count: int, in_flight: int, start: Start) -> None:
        self.in_flight = count * in_flight
        self._start = start
        self._events: queue.Queue[tuple[int, Event]] = queue.Queue()
        self._held: list[dict[str, Ask]] = [{} for _ in range(count)]
        self._answers = [0] * count  # of each since it was started
        self._turns = [0] * count  # how often it was started again
        self._members: list[Member] = []
        try:
            for number in range(count):
                self._members.append(start(number, self._teller(number)))
        except BaseException:
            self.close()
            raise

    def submit(self, ask: Ask) -> None:
        """Hand it to the engine that has the least to do."""
        number = min(range(len(self._members)), key=lambda i: len(self._held[i]))
        self._held[number][ask.key] = ask
        self._members[number].send(ask)

    def collect(self) -> list[tuple[str, Answer | Failure]]:
        """Wait for answers; raises `UnimodalError` if an engine cannot be kept alive."""
        told: list[tuple[str, Answer | Failure]] = []
        while not told:
            waiting = [self._events.get()]
            with contextlib.suppress(queue.Empty):
                while True:
                    waiting.append(self._events.get_nowait())
            for number, event in waiting:
                if isinstance(event, str):
                    self._again(number, event)
                elif self._held[number].pop(event[0], None) is not None:
                    self._answers[number] += 1
                    told.append(event)
        return told

    def close(self) -> None:
        """End all engines."""
        for member in self._members:
            with contextlib.suppress(Exception):
                member.close()

    def _again(self, number: int, why: str) -> None:
        """Start an engine anew and ask it what it left unanswered."""
        self._members[number].close()
        if not self._answers[number]:
            raise UnimodalError(f"{why}; what is done is kept: run the same command again")
        self._answers[number] = 0
        self._turns[number] += 1
        self._members[number] = self._start(number, self._teller(number))
        for ask in self._held[number].values():
            self._members[number].send(ask)

    def _teller(self, number: int) -> Tell:
        turn = self._turns[number]

        def tell(event: Event) -> None:
            if turn == self._turns[number]:  # what a dead one still had to say is not waited for
                self._events.put((number, event))

        return tell


class Process:
    """An engine in a process of its own, on these GPUs."""

    def __init__(
        self, settings: CaptionSettings, gpus: Sequence[str], tell: Tell, entry: str
    ) -> None:
        environment = dict(os.environ)
        if gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "unimodal.pipeline.captioning.fleet"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        self._ended = False
        self._tell = tell
        self._write({"settings": settings.model_dump(mode="json"), "entry": entry})
        threading.Thread(target=self._listen, daemon=True).start()

    def send(self, ask: Ask) -> None:
        """Hand it a question."""
        frames = [base64.b64encode(frame).decode() for frame in ask.frames]
        self._write({**asdict(ask), "frames": frames})

    def close(self) -> None:
        """End it."""
        self._ended = True
        self._process.terminate()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _write(self, value: Any) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it is gone: whoever listens will hear of it
            self._process.stdin.write(json.dumps(value).encode() + b"\n")
            self._process.stdin.flush()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            try:
                event = json.loads(line)
            except ValueError:  # it died in the middle of a line
                break
            if "gone" in event:
                self._ended = True
                self._tell(event["gone"])
            elif "answer" in event:
                self._tell((event["key"], Answer(**event["answer"])))
            else:
                self._tell((event["key"], Failure(**event["failure"])))
        if not self._ended:
            code = self._process.wait()
            self._tell(f"a caption engine died (exit code {code})")


class Actor:
    """An engine in a Ray actor."""

    def __init__(self, handle: Any, tell: Tell) -> None:
        self._handle, self._tell = handle, tell
        self._ended = False
        threading.Thread(target=self._listen, daemon=True).start()

    def send(self, ask: Ask) -> None:
        """Hand it a question."""
        self._handle.submit.remote(asdict(ask))

    def close(self) -> None:
        """End it."""
        import ray

        self._ended = True
        ray.kill(self._handle)

    def _listen(self) -> None:
        import ray

        while not self._ended:
            try:
                for key, kind, fields in ray.get(self._handle.collect.remote()):
                    made: Answer | Failure = (
                        Answer(**fields) if kind == "answer" else Failure(**fields)
                    )
                    self._tell((key, made))
            except Exception as error:
                if not self._ended:
                    self._tell(_cause(error))
                return


class Engine:
    """What runs in a Ray actor: a captioner, and a thread that works it."""

    def __init__(self, settings: str, entry: str) -> None:
        self._captioner = opener(entry)(CaptionSettings.model_validate_json(settings))
        self._worked = _Worked(self._captioner)

    def submit(self, ask: dict[str, Any]) -> None:
        """Take a question."""
        self._worked.submit(Ask(**ask))

    def collect(self) -> list[tuple[str, str, dict[str, Any]]]:
        """Answers that are there; waits a moment for the first."""
        found = []
        with contextlib.suppress(queue.Empty):
            event = self._worked.events.get(timeout=1.0)
            while True:
                if isinstance(event, BaseException):
                    raise event
                key, told = event
                kind = "answer" if isinstance(told, Answer) else "failure"
                found.append((key, kind, asdict(told)))
                event = self._worked.events.get_nowait()
        return found


class _Worked:
    """A captioner that is worked in a thread, so that questions can come while it works."""

    def __init__(self, captioner: Captioner) -> None:
        self.events: queue.Queue[tuple[str, Answer | Failure] | BaseException] = queue.Queue()
        self._asks: queue.Queue[Ask] = queue.Queue()
        self._captioner = captioner
        threading.Thread(target=self._work, daemon=True).start()

    def submit(self, ask: Ask) -> None:
        self._asks.put(ask)

    def _work(self) -> None:
        held = 0
        try:
            while True:
                with contextlib.suppress(queue.Empty):
                    while True:
                        ask = self._asks.get(block=not held)
                        self._captioner.submit(ask)
                        held += 1
                        if held >= self._captioner.in_flight or self._asks.empty():
                            break
                for event in self._captioner.collect():
                    held -= 1
                    self.events.put(event)
        except BaseException as error:
            self.events.put(error)


def side_by_side(settings: CaptionSettings, entry: str = "") -> Fleet:
    """`data_parallel` engines on this machine; raises `UsageError` if there are too few GPUs."""
    gpus, each = gpus_here(), settings.tensor_parallel
    if gpus and len(gpus) < each * settings.data_parallel:
        raise UsageError(
            f"{settings.data_parallel} engines of {each} GPUs need {each * settings.data_parallel} "
            f"GPUs, and there are {len(gpus)}: lower caption.data_parallel or tensor_parallel"
        )

    def start(number: int, tell: Tell) -> Member:
        mine = gpus[number * each : (number + 1) * each]
        return Process(settings, mine, tell, entry)

    return Fleet(settings.data_parallel, settings.handed, start)


def on_ray(settings: CaptionSettings, address: str | None, entry: str = "") -> Captioner:
    """`data_parallel` engines as actors on a Ray cluster, or on this machine's."""
    import ray

    from unimodal.pipeline.engine import connect

    mine = not ray.is_initialized()
    if mine:
        connect(address or os.environ.get("RAY_ADDRESS"), None)
    gpus, needed = int(ray.cluster_resources().get("GPU", 0)), settings.tensor_parallel
    if gpus and gpus < needed * settings.data_parallel:
        raise UsageError(
            f"{settings.data_parallel} engines of {needed} GPUs need more than the {gpus} GPUs of "
            "the cluster: lower caption.data_parallel or tensor_parallel"
        )
    kind = ray.remote(Engine).options(num_gpus=needed if gpus else 0, max_concurrency=4)

    def start(number: int, tell: Tell) -> Member:
        return Actor(kind.remote(settings.model_dump_json(), entry), tell)

    fleet = Fleet(settings.data_parallel, settings.handed, start)
    if not mine:
        return fleet
    return _OwnRay(fleet)


class _OwnRay:
    """A fleet on a Ray that was started for it."""

    def __init__(self, fleet: Fleet) -> None:
        self.in_flight = fleet.in_flight
        self.submit, self.collect, self._fleet = fleet.submit, fleet.collect, fleet

    def close(self) -> None:
        import ray

        self._fleet.close()
        ray.shutdown()


def opener(entry: str) -> Callable[[CaptionSettings], Captioner]:
    """Who opens an engine: vLLM's, or "module:function" of a room above this one, or in tests."""
    if entry:
        import importlib

        module, _, name = entry.partition(":")
        return getattr(importlib.import_module(module), name)
    from unimodal.pipeline.captioning.offline import Offline

    return Offline


def _cause(error: Exception) -> str:
    """What an actor died of, on one line."""
    cause = getattr(error, "cause", None) or error
    text = str(cause) if isinstance(cause, UnimodalError) else f"{type(cause).__name__}: {cause}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    named = [line for line in lines if "UnimodalError:" in line or "UsageError:" in line]
    line = (named or lines or ["no reason given"])[-1]
    return line.split("Error: ", 1)[1] if named else f"a caption engine died ({line[:300]})"


def main() -> None:
    """Answer the questions on standard input until it closes."""
    events = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    first = json.loads(sys.stdin.readline())
    try:
        captioner = opener(first["entry"])(CaptionSettings.model_validate(first["settings"]))
    except UnimodalError as error:
        events.write(json.dumps({"gone": str(error)}) + "\n")
        sys.exit(1)
    worked = _Worked(captioner)

    def read() -> None:
        for line in sys.stdin:
            ask = json.loads(line)
            ask["frames"] = tuple(base64.b64decode(frame) for frame in ask["frames"])
            worked.submit(Ask(**ask))
        os._exit(0)  # whoever asked is gone

    threading.Thread(target=read, daemon=True).start()
    while True:
        event = worked.events.get()
        if isinstance(event, BaseException):
            known = isinstance(event, UnimodalError)
            why = str(event) if known else f"a caption engine died ({event})"
            events.write(json.dumps({"gone": why}) + "\n")
            sys.exit(1)
        key, answer = event
        kind = "answer" if isinstance(answer, Answer) else "failure"
        events.write(json.dumps({"key": key, kind: asdict(answer)}) + "\n")


if __name__ == "__main__":
    main()
