"""vLLM's engine in a process of its own: it binds threads to cores and joins a process group,
which the tests after it should not inherit. Also what draws are judged by."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from unimodal.model.generate import Draft, Drawing, Watch
from unimodal.model.paired import describe, rebuild
from unimodal.tokenize.vocabulary import Vocabulary


class Engine:
    """A `Backend` that asks a `VllmBackend` in another process."""

    def __init__(self, checkpoint: Path, **options: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(
            target=_serve, args=(theirs, checkpoint, options), daemon=True
        )
        self.process.start()
        theirs.close()
        self._answer()

    def generate(
        self, drafts: Sequence[Draft], drawing: Drawing, watch: Watch | None = None
    ) -> list[list[int]]:
        written, told = self.ask("generate", drafts, drawing)
        for done, steps in told if watch is not None else ():
            watch(done, steps)
        return written

    def ask(self, name: str, *arguments: Any) -> Any:
        """Call one of the functions below; the first of its arguments are drafts."""
        packed = [[_packed(draft) for draft in drafts] for drafts in arguments[:1]]
        self.connection.send((name, (*packed, *arguments[1:])))
        return self._answer()

    def close(self) -> None:
        self.connection.close()
        self.process.join(5)
        self.process.kill()

    def _answer(self) -> Any:
        answer = self.connection.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer


def _serve(connection: Connection, checkpoint: Path, options: dict[str, Any]) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
    try:
        from unimodal.model.vllm import VllmBackend

        vocabulary = Vocabulary.load(checkpoint / "vocabulary")
        backend = VllmBackend.load(checkpoint, vocabulary, "float32", **options)
    except Exception as error:
        connection.send(error)
        return
    connection.send("ready")
    while True:
        try:
            name, arguments = connection.recv()
            drafts = [[_unpacked(*one, vocabulary) for one in packed] for packed in arguments[:1]]
        except EOFError:
            return
        try:
            connection.send(globals()[name](backend, *drafts, *arguments[1:]))
        except Exception as error:
            connection.send(error)


def _packed(draft: Draft) -> tuple[Any, ...]:
    """A draft as it can be sent: text tokenizers hold what cannot."""
    grammar = json.dumps(describe(draft.grammar))
    return draft.contexts, grammar, draft.guidance, draft.key, draft.seed


def _unpacked(contexts: Any, grammar: str, *rest: Any) -> Draft:
    *others, vocabulary = rest
    return Draft(contexts, rebuild(grammar, vocabulary, 1024), *others)


def generate(backend: Any, drafts: Sequence[Draft], drawing: Drawing) -> Any:
    told: list[Any] = []

    def watch(done: Mapping[int, list[int]], steps: int) -> None:
        told.append(({number: [*ids] for number, ids in done.items()}, steps))  # they grow

    return backend.generate(drafts, drawing, watch), told


def preemptions(backend: Any) -> int:
    """How often vLLM took a request out of its batch."""
    found = [one for one in backend.engine.get_metrics() if one.name == "vllm:num_preemptions"]
    return sum(one.value for one in found)


def without_reserve(backend: Any, drafts: Sequence[Draft], drawing: Drawing) -> Any:
    """As if the cache were larger than it is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "blocks", 10**6)
        return backend.generate(drafts, drawing)


def without_processor(backend: Any, drafts: Sequence[Draft], drawing: Drawing) -> Any:
    """As where vLLM does not call it."""
    from unimodal.model.paired import Pairing

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pairing, "apply", lambda self, logits: logits)
        return backend.generate(drafts, drawing)


def twins_late(backend: Any, drafts: Sequence[Draft], drawing: Drawing) -> Any:
    """As if vLLM began the rows of a draft one after the other."""
    engine, early = backend.engine, []

    class Slow:
        def __getattr__(self, name: str) -> Any:
            return getattr(engine, name)

        def add_request(self, name: str, *rest: Any) -> None:
            engine.add_request(name, *rest)
            early.extend(engine.step())

        def step(self) -> list[Any]:
            found = [*early, *engine.step()]
            early.clear()
            return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "engine", Slow())
        return backend.generate(drafts, drawing)


def chi_square_z(seen: Tensor, expected: Tensor) -> float:
    """Standard deviations that the statistic is above what chance gives (Wilson and Hilferty's
    cube root); cells that expect fewer than five are counted as one."""
    few = expected < 5
    cells = [*zip(seen[~few], expected[~few], strict=True), (seen[few].sum(), expected[few].sum())]
    statistic = float(sum((a - b) ** 2 / b for a, b in cells if b > 0))
    freedom = sum(b > 0 for _, b in cells) - 1
    spread = 2 / (9 * freedom)
    return ((statistic / freedom) ** (1 / 3) - (1 - spread)) / spread**0.5
