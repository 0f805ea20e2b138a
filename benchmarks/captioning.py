"""`unimodal caption` beside vLLM's own throughput benchmark: one engine, the same questions.

    python -m benchmarks.captioning                                  a random model, on the CPU
    python -m benchmarks.captioning --model Qwen/Qwen2.5-VL-7B-Instruct --in-flight 128 \\
        --pictures 800 --clips 200 --tokens 256                      on a GPU, with real weights

Pictures and clips are painted and curated; then they are described, by turns, by

  ours   the stage that `unimodal caption` runs (`describe`): frames read from the run's tars,
         asked, judged, and written down, with at most `--in-flight` questions at the engine
  theirs what `vllm bench throughput --backend vllm-chat` times (`vllm.benchmarks.throughput`): all
         questions at hand in memory as chat messages with JPEGs, handed to the engine at once

One engine serves both; before each turn its caches of prefixes, pictures and their vectors are
emptied. Both draw at temperature 1 to the full length, past the mark of the end, so that output
tokens are equal in number. What is said is the median of the ratios of the pairs, by the clock and
by processor time (of this process, threads included), which others on the machine disturb less.
Then the same with answers held to a JSON schema, against theirs without: these end when they end.
"""

from __future__ import annotations

import argparse
import base64
import functools
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.looking import make
from unimodal.pipeline.captioning.describe import describe, prompt_of
from unimodal.pipeline.captioning.offline import Offline
from unimodal.pipeline.captioning.requests import ask_of, requests_in
from unimodal.pipeline.captioning.settings import CaptionSettings
from unimodal.pipeline.captioning.store import Store
from unimodal.pipeline.presets import CurateSettings
from unimodal.pipeline.progress import Progress
from unimodal.pipeline.run import Run, curate
from unimodal.pipeline.settings import build
from unimodal.pipeline.supervise import Patience

BARE = (
    *('skip=["text", "quality", "embed", "nsfw", "dedup", "match"]', "decide.image_min_area=0"),
    *("decide.video_min_s=none", "decide.video_min_side=none", "decide.flow_max=none"),
    *("decide.flow_min=none", "report=false"),
)


class Kept(Offline):
    """An engine that serves one turn after another."""

    def close(self) -> None:
        """It stays."""


def painted(folder: Path, pictures: int, clips: int, size: tuple[int, int]) -> Path:
    """Pictures, and clips of three seconds, of moving clouds; all differ."""
    import av
    import cv2

    rng = np.random.default_rng(0)
    width, height = size

    def clouds(wide: int) -> np.ndarray:
        noise = rng.integers(0, 256, (height // 32, wide // 32, 3), dtype=np.uint8)
        return cv2.resize(noise, (wide, height), interpolation=cv2.INTER_CUBIC)

    folder.mkdir()
    for number in range(pictures):
        cv2.imwrite(str(folder / f"{number:05d}.png"), clouds(width))
    for number in range(clips):
        sky = clouds(width + 72)
        with av.open(str(folder / f"{number:05d}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=24, options={"preset": "ultrafast"})
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            for at in range(72):
                pixels = np.ascontiguousarray(sky[:, at : at + width])
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="bgr24")))
            container.mux(stream.encode())
    return folder


def timed(work: Iterator[int]) -> tuple[float, float, int]:
    """Seconds by the clock, seconds of the processor, and output tokens of a turn."""
    clock, processor = time.perf_counter(), time.process_time()
    tokens = sum(work)
    return time.perf_counter() - clock, time.process_time() - processor, tokens


def ours(engine: Kept, run: Run, settings: CaptionSettings) -> Iterator[int]:
    """The caption stage, into a store that is thrown away."""
    wanted: dict[str, list[str]] = {}
    for clip in run.clips.to_pylist():
        wanted.setdefault(clip["part"], []).append(clip["uid"])
    watched = run.path / run.info["stages"]["watch"]
    with tempfile.TemporaryDirectory() as folder:
        made = describe(
            *(Store(Path(folder)), watched, wanted, run.clips.num_rows, settings),
            *(lambda _: engine, Patience(failures=1.0), Progress()),
        )
    assert made.requests == run.clips.num_rows, (made.requests, made.failed)
    yield made.output_tokens


def theirs(engine: Kept, questions: list[Any]) -> Iterator[int]:
    """vLLM's benchmark."""
    from vllm.benchmarks.throughput import _run_vllm_chat_requests

    _, outputs = _run_vllm_chat_requests(engine._llm, questions, 1, False, False, False)
    yield sum(len(output.outputs[0].token_ids) for output in outputs)


def questions_of(run: Run, settings: CaptionSettings) -> list[Any]:
    """What the caption stage asks, as vLLM's benchmark takes it."""
    from vllm.benchmarks.datasets import SampleRequest

    wanted: dict[str, list[str]] = {}
    for clip in run.clips.to_pylist():
        wanted.setdefault(clip["part"], []).append(clip["uid"])
    prompt, found = prompt_of(settings), []
    watched = run.path / run.info["stages"]["watch"]
    for request in requests_in(watched, wanted, lambda key: False, settings):
        ask = ask_of(request, settings, prompt, 0)
        urls = [f"data:image/jpeg;base64,{base64.b64encode(f).decode()}" for f in ask.frames]
        content = [
            {"type": "text", "text": ask.before},
            *({"type": "image_url", "image_url": {"url": url}} for url in urls),
            {"type": "text", "text": ask.after},
        ]
        said = [{"role": "system", "content": ask.system}, {"role": "user", "content": content}]
        found.append(SampleRequest(said, 0, settings.max_tokens))  # type: ignore[arg-type]
    return found


def emptied(engine: Kept) -> None:
    """Nothing is known of earlier turns."""
    engine._llm.reset_prefix_cache()
    engine._llm.reset_mm_cache()
    engine._llm.llm_engine.reset_encoder_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="default: a random one, made on the spot")
    parser.add_argument("--width", type=int, default=256, help="of the random model")
    parser.add_argument("--layers", type=int, default=4, help="of the random model")
    parser.add_argument("--pictures", type=int, default=24)
    parser.add_argument("--clips", type=int, default=8)
    parser.add_argument("--size", type=int, nargs=2, default=(448, 256), metavar=("W", "H"))
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--in-flight", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--engine", default="{}", help="vLLM's arguments, as a TOML table")
    asked = parser.parse_args()
    # One process, so that its processor time is all there is.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    with tempfile.TemporaryDirectory() as folder:
        there = Path(folder)
        model = asked.model or str(make(there / "model", asked.width, asked.layers))
        media = painted(there / "media", asked.pictures, asked.clips, asked.size)
        run = curate([media], there / "run", build(CurateSettings, sets=BARE), engine="inline")
        assert run.clips.num_rows == asked.pictures + asked.clips
        sets = [f"max_tokens={asked.tokens}", f"in_flight={asked.in_flight}", "tries=1"]
        sets += ["temperature=1", "top_p=1", "source='vllm'", f"engine={asked.engine}"]
        free = build(CaptionSettings, {"model": model}, sets=[*sets, "format='text'"])
        held = build(CaptionSettings, {"model": model}, sets=sets)
        engine = Kept(free)
        engine._restore()  # what is printed here is no noise of vLLM's
        compare(engine, run, free, held, asked.pairs)
        Offline.close(engine)


def compare(
    engine: Kept, run: Run, free: CaptionSettings, held: CaptionSettings, pairs: int
) -> None:
    """Print a line for each pair, and the medians."""
    import vllm

    drawn = vllm.SamplingParams
    questions = questions_of(run, free)
    print(f"{len(questions)} questions, {free.max_tokens} tokens each, {free.in_flight} at a time")
    ratios: dict[str, list[tuple[float, float]]] = {"free": [], "held": []}
    rates: dict[str, list[float]] = {"ours": [], "theirs": [], "held": []}
    for number in range(-1, pairs):  # the first is not counted: it warms up
        made = {}
        turns = ["theirs", "free", "held"]
        for turn in turns if number % 2 else turns[::-1]:
            emptied(engine)
            # The caption stage ends answers where the model does; for the comparison it must not.
            vllm.SamplingParams = (
                functools.partial(drawn, ignore_eos=True) if turn == "free" else drawn
            )
            settings = held if turn == "held" else free
            work = theirs(engine, questions) if turn == "theirs" else ours(engine, run, settings)
            made[turn] = timed(work)
        assert made["free"][2] == made["theirs"][2], made
        if number < 0:
            continue
        peer = made["theirs"]
        for turn in ("free", "held"):
            clock, processor = (made[turn][2] / made[turn][i] * peer[i] / peer[2] for i in (0, 1))
            ratios[turn].append((clock, processor))
        for name, turn in (("ours", "free"), ("theirs", "theirs"), ("held", "held")):
            rates[name].append(made[turn][2] / made[turn][0])
        told = (f"{name} {rate[-1]:7.1f}" for name, rate in rates.items())
        print(f"tokens/s  {'  '.join(told)}  ratio {ratios['free'][-1][0]:.3f}", flush=True)
    for name, turn in (("ours / theirs", "free"), ("with a schema / theirs", "held")):
        clock, processor = (statistics.median(r[i] for r in ratios[turn]) for i in (0, 1))
        print(f"{name}: {clock:.3f} by the clock, {processor:.3f} by processor time (medians)")
    print("tokens/s: " + ", ".join(f"{n} {statistics.median(r):.0f}" for n, r in rates.items()))


if __name__ == "__main__":
    main()
