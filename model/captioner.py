"""A checkpoint as a captioner: pictures and clips described by the tokens that it knows them by.

Of a prompt nothing is read: the checkpoint says what its captions taught it to say.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from unimodal.model.checkpoint import find
from unimodal.model.sample import Sampler
from unimodal.model.vllm import VllmBackend
from unimodal.pipeline.captioning.captioner import REFUSED, Answer, Ask, Batched, Failure
from unimodal.pipeline.captioning.settings import CaptionSettings
from unimodal.pipeline.errors import MediaError, UnimodalError, UsageError
from unimodal.pipeline.observers.keyframes import even
from unimodal.tokenize.document import TEMPORAL
from unimodal.tokenize.vision.pixels import resize

ENTRY = f"{__name__}:open_checkpoint"
"""Who opens the source, for engines in other processes."""


def check(settings: CaptionSettings) -> None:
    """Raise `UnimodalError` early if `settings.model` is no checkpoint."""
    find(Path(settings.model))


def open_checkpoint(settings: CaptionSettings) -> Batched:
    """The checkpoint `settings.model` as a captioner; raises `UnimodalError` if it cannot run."""
    return Batched(CheckpointDescriber(settings))


class CheckpointDescriber:
    """See `Describer`."""

    def __init__(self, settings: CaptionSettings) -> None:
        self.batch = settings.in_flight
        self.sampler = _sampler(settings)

    def describe(
        self, clips: Mapping[str, Sequence[np.ndarray]], asks: Mapping[str, Ask]
    ) -> dict[str, Answer | Failure]:
        """Answers by key. What cannot be encoded, or is longer than the context, is a failure."""
        found: dict[str, Answer | Failure] = {}
        contexts: dict[str, list[int]] = {}
        held = self.sampler.decoder.config.context
        for key, frames in clips.items():
            try:
                ids = self.sampler.described(media(frames, self.sampler.canvas.seen))
            except (UsageError, MediaError, ValueError) as error:
                found[key] = Failure(REFUSED, str(error))
                continue
            if len(ids) >= held:
                why = f"{len(ids)} tokens of pictures, the checkpoint's context holds {held}"
                why += ": lower caption.frames" if len(frames) > 1 else ""
                found[key] = Failure(REFUSED, why)
            else:
                contexts[key] = ids
        # Later tries are warmer: a temperature is one call's.
        alike: dict[tuple[float, float, int], list[str]] = {}
        for key in contexts:
            one = asks[key]
            alike.setdefault((one.temperature, one.top_p, one.max_tokens), []).append(key)
        for how, keys in alike.items():
            found |= self._written({key: contexts[key] for key in keys}, asks, *how)
        return found

    def close(self) -> None:
        """Give the engine's memory back."""
        if isinstance(self.sampler.backend, VllmBackend):
            self.sampler.backend.close()

    def _written(
        self,
        contexts: Mapping[str, list[int]],
        asks: Mapping[str, Ask],
        temperature: float,
        top_p: float,
        max_tokens: int,
    ) -> dict[str, Answer | Failure]:
        ids: dict[int, list[int]] = {}

        def watch(done: Mapping[int, list[int]], steps: int) -> None:
            ids.update(done)

        texts = self.sampler.texts(
            list(contexts.values()),
            "picture",
            max_tokens,
            {
                "temperature": temperature,
                "top_p": top_p,
                "seed": [asks[key].seed for key in contexts],
                "watch": watch,
            },
        )
        found: dict[str, Answer | Failure] = {}
        for number, (key, text) in enumerate(zip(contexts, texts, strict=True)):
            written = ids.get(number, [])
            ended = self.sampler.vocabulary.eos in written[-1:]
            finish = "stop" if ended else "length"
            found[key] = Answer(text, finish, len(contexts[key]), len(written))
        return found


def media(frames: Sequence[np.ndarray], seen: int | None) -> np.ndarray:
    """What the sampler is shown of the keyframes of a clip: uint8 [F, H, W, 3], F a multiple of 4
    and at most `seen`, evenly spaced; a single one is a picture, [H, W, 3]."""
    if len(frames) == 1:
        return frames[0]
    if len(frames) < TEMPORAL:
        chosen = [number * len(frames) // TEMPORAL for number in range(TEMPORAL)]
    else:
        most = min(len(frames), seen or len(frames))
        chosen = even(len(frames), most // TEMPORAL * TEMPORAL)
    height, width = frames[0].shape[:2]
    return np.stack([resize(frames[number], (height, width)) for number in chosen])


def _sampler(settings: CaptionSettings) -> Sampler:
    """By vLLM, or by torch where the settings say so or vLLM does not start."""
    engine = {
        "rows": settings.in_flight,
        "tensor_parallel_size": settings.tensor_parallel,
        "gpu_memory_utilization": settings.gpu_memory_utilization,
        **settings.engine,
    }
    if settings.backend == "torch":
        return Sampler.load(settings.model, batch=settings.in_flight)
    try:
        return Sampler.load(settings.model, batch=settings.in_flight, backend="vllm", engine=engine)
    except UnimodalError as error:
        if settings.backend == "vllm":
            raise
        sampler = Sampler.load(settings.model, batch=settings.in_flight)
        print(f"{settings.model} describes with torch, not vLLM ({error})", file=sys.stderr)
        return sampler
