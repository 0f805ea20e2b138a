"""A small sampler that can be held up at every row, and a server of it that really listens."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from unimodal.model.decoder import Decoder, DecoderConfig, Shape
from unimodal.model.generate import Backend, Draft, Drawing, TorchBackend, Watch
from unimodal.model.sample import Sampler
from unimodal.tokenize.vision.movq import MoVQ, MoVQConfig
from unimodal.tokenize.vision.tokenizer import VisionTokenizer
from unimodal.tokenize.vocabulary import Vocabulary

CODEBOOK = 64
GRIDS = [
    {"kind": "image", "size": [1, 4, 5], "fps": None, "samples": 8},
    {"kind": "video", "size": [2, 4, 4], "fps": 6.0, "samples": 1},
]


@dataclass
class Held:
    """A backend that waits at the end of each row while it is held."""

    inner: Backend
    calls: list[int] = field(default_factory=list)
    """Drafts of each call."""
    free: threading.Event = field(default_factory=threading.Event)
    reached: threading.Event = field(default_factory=threading.Event)
    """Set where a row has ended."""
    breaks: bool = False
    most: int = 1 << 30
    """Drafts of a call; for more there is no memory."""

    def generate(
        self, drafts: Sequence[Draft], drawing: Drawing, watch: Watch | None = None
    ) -> list[list[int]]:
        self.calls.append(len(drafts))
        if self.breaks:
            raise RuntimeError("a screw is loose")
        if len(drafts) > self.most:
            raise MemoryError("out of memory")

        def seen(done: Mapping[int, list[int]], steps: int) -> None:
            assert watch is not None
            self.reached.set()
            assert self.free.wait(30)
            watch(done, steps)

        return self.inner.generate(drafts, drawing, seen)


def small_sampler(batch: int = 8) -> tuple[Sampler, Held]:
    """A decoder of random weights whose pictures differ much from seed to seed."""
    vocabulary = Vocabulary.bytes(CODEBOOK)
    shape = Shape(width=48, layers=2, heads=6, kv_heads=2, ffn=80, init_std=0.2)
    decoder = Decoder(DecoderConfig(shape, vocabulary.size, context=256)).eval()
    torch.manual_seed(0)
    tokenizer = VisionTokenizer(MoVQ(MoVQConfig(codebook_size=CODEBOOK, ch=32, num_res_blocks=1)))
    held = Held(TorchBackend(decoder, batch))
    held.free.set()
    return Sampler(decoder, vocabulary, tokenizer, GRIDS, batch=batch, backend=held), held


@contextmanager
def listening(app: Any) -> Iterator[str]:
    """Serve an application on a free port of loopback; its URL."""
    import uvicorn

    from unimodal.model.serve import listening as socket_of

    socket = socket_of("127.0.0.1", 0)
    config = uvicorn.Config(app, log_level="error", lifespan="off", access_log=False)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{socket.getsockname()[1]}"
    finally:
        app.state.queue.close(abort=True)
        server.should_exit = True
        thread.join(20)
        assert app.state.queue.join(20)
