"""Drawing pictures beside transformers' generate: time per code and per picture.

    python benchmarks/sampling.py                                   the table of the docs
    python benchmarks/sampling.py --widths 192 --batches 1 --rows 4 one line of it, soon
    python benchmarks/sampling.py --smaller                         bfloat16, int8 and float32
    python benchmarks/sampling.py --device cuda --dtype bfloat16    1.5 B against the memory

Emu3's 184,622 ids, a grid of 32x32 codes, guidance 3, top-k 2048, the same random weights.

  ours   `TorchBackend`, as `unimodal sample` draws
  peer   transformers' LlamaForCausalLM.generate with a key-value cache, as Emu3's documentation
         draws: `guidance_scale` and `negative_prompt_ids` (its classifier-free guidance with two
         caches) and `prefix_allowed_tokens_fn` for the grammar, whose codes are a list; in
         inference mode. `--tensors` spares it the conversion of that list

The two take turns; a ratio is that of one pair, and what is said is the median over the pairs.
Times are of whole rows of the grid (32 codes and the end of line), read at the ends of rows, so
that the prompt's own pass and set-up are in neither. The first rows of a picture are timed; with
`--late` its last too, behind given ones (the peer computes the logits of everything given: 6 GB
for 8 pictures); with `--whole` one picture from end to end. Before, both draw a row greedily,
which must be the same.

On a GPU our steps alone are timed, against the time in which a copy moves as many bytes as a step
must read: the weights that it uses and the cached keys and values. That part has not been run by
the project yet: its machines had no GPU.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from unimodal.model.choice import Choice
from unimodal.model.decoder import Decoder, DecoderConfig, Shape, parameter_count
from unimodal.model.generate import Draft, Drawing, TorchBackend
from unimodal.model.grammar import BlockGrammar
from unimodal.model.naming import config_record
from unimodal.model.quantize import WEIGHTS, convert, weight_bytes
from unimodal.tokenize.text import TextTokenizer
from unimodal.tokenize.vocabulary import (
    EMU3_CODEBOOK_SIZE,
    EMU3_IDS,
    EMU3_VISION_START,
    Vocabulary,
)

# Emu3's ranges; the words of its 151,643 text ids play no part here.
VOCABULARY = Vocabulary(
    TextTokenizer.load("bytes"),
    vision_start=EMU3_VISION_START,
    codebook_size=EMU3_CODEBOOK_SIZE,
    **EMU3_IDS,
)
SIDE = 32
SHAPES = {
    192: Shape(width=192, layers=8, heads=6, kv_heads=2, ffn=512, init_std=0.1),
    512: Shape(width=512, layers=12, heads=8, kv_heads=2, ffn=1408, init_std=0.1),
}
BOUNDS = {(192, 1): 5.0, (192, 8): 10.0, (512, 1): 3.5, (512, 8): 7.0}
GPU_SHAPE = Shape(width=2048, layers=16, heads=16, kv_heads=8, ffn=5632)  # 1.5 B
GUIDANCE = 3.0
TOP_K = 2048
# Text of this many bytes stands before a picture; negative prompts are as long.
PROMPT = 40

Marks = list[tuple[float, float]]
"""Wall and CPU seconds at the ends of rows."""


def now() -> tuple[float, float]:
    """Wall and CPU seconds."""
    return time.perf_counter(), time.process_time()


@dataclass(frozen=True)
class Job:
    """Pictures to draw: `rows` of them, behind `given` rows of codes that are there already."""

    decoder: Decoder
    batch: int
    given: int
    rows: int
    seed: int
    greedy: bool = False

    def grammar(self) -> BlockGrammar:
        """Of the grid up to the last row that is drawn, begun with the given rows."""
        rng = np.random.default_rng(self.seed)
        begun = rng.integers(0, VOCABULARY.codebook_size, (self.given, SIDE))
        return BlockGrammar(VOCABULARY, self.given + self.rows, SIDE, begun=begun)

    def contexts(self) -> list[tuple[list[int], list[int]]]:
        """Conditional and unconditional ids of each picture, all of one length."""
        rng = np.random.default_rng(self.seed)
        opening = self.grammar().opening

        def context() -> list[int]:
            return [VOCABULARY.bos, *rng.integers(0, 256, PROMPT).tolist(), *opening]

        return [(context(), context()) for _ in range(self.batch)]


def ours(job: Job, compile: bool = False) -> tuple[list[list[int]], Marks]:
    """Ids of each picture behind its context, and when each row ended."""
    marks: Marks = []
    drafts = [
        Draft(contexts, job.grammar(), (GUIDANCE,), key=(number, 0))
        for number, contexts in enumerate(job.contexts())
    ]
    choice = Choice(temperature=None if job.greedy else 1.0, top_k=TOP_K)

    def watch(done: Mapping[int, list[int]], steps: int) -> None:
        if job.decoder.lm_head.weight.is_cuda:
            torch.cuda.synchronize()
        marks.append(now())

    backend = TorchBackend(job.decoder, compile=compile)
    ids = backend.generate(drafts, Drawing(choice, choice, job.seed), watch)
    return ids, marks


class Peer:
    """transformers' Llama with the weights of a decoder."""

    def __init__(self, decoder: Decoder) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        record = config_record(decoder.config) | {
            "pad_token_id": VOCABULARY.pad,
            "bos_token_id": VOCABULARY.bos,
            "eos_token_id": VOCABULARY.eos,
        }
        with torch.device("meta"):
            self.model = LlamaForCausalLM(LlamaConfig(**record)).eval()
        # The very same tensors: no second copy of them is in memory.
        self.model.load_state_dict(decoder.state_dict(), assign=True)
        self.model.model.rotary_emb = type(self.model.model.rotary_emb)(self.model.config)

    def __call__(self, job: Job, tensors: bool = False) -> tuple[list[list[int]], Marks]:
        """As `ours`. `tensors`: allowed ids not as a list, as in Emu3's documentation."""
        marks: Marks = []
        contexts = job.contexts()
        conditional, unconditional = (
            torch.tensor([pair[which] for pair in contexts]) for which in (0, 1)
        )
        start = conditional.shape[1]
        vision: Any = torch.arange(VOCABULARY.vision_start, VOCABULARY.size)
        if not tensors:
            vision = vision.tolist()
        eol, tail = [VOCABULARY.eol], [VOCABULARY.eof, VOCABULARY.eoi]

        def allowed(batch: int, ids: torch.Tensor) -> Any:
            place = len(ids) - start
            if place == job.rows * (SIDE + 1):
                return tail[:1]
            if place > job.rows * (SIDE + 1):
                return tail[1:]
            if place % (SIDE + 1) != SIDE:
                return vision
            if batch == 0:
                marks.append(now())
            return eol

        sampling: dict[str, Any] = {"do_sample": False}
        if not job.greedy:
            sampling = {"do_sample": True, "temperature": 1.0, "top_k": TOP_K, "top_p": 1.0}
        torch.manual_seed(job.seed)
        with torch.inference_mode():
            out = self.model.generate(
                conditional,
                attention_mask=torch.ones_like(conditional),
                max_new_tokens=job.rows * (SIDE + 1) + len(tail),
                guidance_scale=GUIDANCE,
                negative_prompt_ids=unconditional,
                negative_prompt_attention_mask=torch.ones_like(unconditional),
                prefix_allowed_tokens_fn=allowed,
                use_cache=True,
                **sampling,
            )
        return out[:, start:].tolist(), marks


def per_code(marks: Marks) -> tuple[float, float]:
    """Median wall and CPU milliseconds for each code of each picture-row timed."""
    spent = [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(marks)]
    return tuple(statistics.median(one) / SIDE * 1e3 for one in zip(*spent, strict=True))  # type: ignore[return-value]


def compare(decoder: Decoder, batch: int, arguments: argparse.Namespace) -> None:
    """Print the lines of a decoder and batch size."""
    width = decoder.config.shape.width
    peer = Peer(decoder)
    check = Job(decoder, batch, 0, 1, seed=99, greedy=True)
    a, b = ours(check)[0], peer(check)[0]
    same = sum(x == y for x, y in zip(a, b, strict=True))
    if same != batch:
        raise SystemExit(f"width {width}: of {batch} greedy rows {same} are the same")
    stretches = {"first rows": 0} | (
        {"last rows": SIDE - arguments.rows - 1} if arguments.late else {}
    )
    for name, given in stretches.items():
        pairs = []
        for pair in range(arguments.pairs):
            job = Job(decoder, batch, given, arguments.rows + 1, pair)
            sides: list[Callable[[], tuple[Any, Marks]]] = [
                lambda job=job: ours(job, arguments.compile),  # type: ignore[misc]
                lambda job=job: peer(job, arguments.tensors),  # type: ignore[misc]
            ]
            order = (0, 1) if pair % 2 == 0 else (1, 0)
            found = {side: per_code(sides[side]()[1]) for side in order}
            pairs.append((found[0], found[1]))
        show(width, batch, name, pairs)
    if arguments.whole:
        job = Job(decoder, batch, 0, SIDE, 0)
        taken = []
        for side in (lambda: ours(job, arguments.compile), lambda: peer(job, arguments.tensors)):
            start = now()
            side()
            end = now()
            taken.append(tuple((b - a) / SIDE**2 * 1e3 for a, b in zip(start, end, strict=True)))
        show(width, batch, "a whole picture", [(taken[0], taken[1])])


def show(
    width: int,
    batch: int,
    name: str,
    pairs: Sequence[tuple[tuple[float, ...], tuple[float, ...]]],
) -> None:
    """One line: milliseconds per step on both sides, and ratios in wall and CPU time."""
    mine, theirs = (
        [statistics.median(pair[side][clock] for pair in pairs) for clock in (0, 1)]
        for side in (0, 1)
    )
    wall, cpu = (statistics.median(b[clock] / a[clock] for a, b in pairs) for clock in (0, 1))
    bound = BOUNDS.get((width, batch), "")
    print(
        f"| {width} | {batch} | {torch.get_num_threads()} | {name} | {mine[0]:.1f} ({mine[1]:.1f}) "
        f"| {theirs[0]:.1f} ({theirs[1]:.1f}) | {wall:.1f} ({cpu:.1f}) | {bound} |",
        flush=True,
    )


def smaller(decoder: Decoder, batch: int, arguments: argparse.Namespace) -> None:
    """Print our time and the bytes held for each kind of weights; they take turns."""
    copies = {one: convert(deepcopy(decoder), one) for one in WEIGHTS}
    found: dict[str, list[tuple[float, ...]]] = {one: [] for one in WEIGHTS}
    for pair in range(arguments.pairs):
        for one in WEIGHTS if pair % 2 == 0 else reversed(WEIGHTS):
            job = Job(copies[one], batch, 0, arguments.rows + 1, pair)
            found[one].append(per_code(ours(job, arguments.compile)[1]))
    for one, copy in copies.items():
        wall, cpu = (statistics.median(clock) for clock in zip(*found[one], strict=True))
        times = zip(found["float32"], found[one], strict=True)
        ratio = statistics.median(whole[1] / small[1] for whole, small in times)
        print(
            f"| {decoder.config.shape.width} | {batch} | {one} | {weight_bytes(copy) / 2**20:.0f} "
            f"| {wall:.1f} ({cpu:.1f}) | {ratio:.2f} |",
            flush=True,
        )


def against_memory(arguments: argparse.Namespace) -> None:
    """Our steps on a GPU against the time in which a copy moves as many bytes as they read."""
    device = torch.device(arguments.device)
    dtype = getattr(torch, arguments.dtype)
    with torch.device(device):
        decoder = Decoder(DecoderConfig(GPU_SHAPE, VOCABULARY.size, 4096), seed=None)
    decoder = decoder.to(dtype).eval()
    decoder.compute = dtype
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.02)
    shape = decoder.config.shape
    size = torch.empty((), dtype=dtype).element_size()
    weights = parameter_count(decoder)["body"] + EMU3_CODEBOOK_SIZE * shape.width
    bandwidth = copy_bandwidth(device)
    print(f"{torch.cuda.get_device_name(device)}, {arguments.dtype}, torch {torch.__version__}")
    print(f"a copy moves {bandwidth / 1e9:.0f} GB/s (read and written)\n")
    print("| pictures | ms per step | bytes read, GB | bound, ms | share of the bound | codes/s |")
    print("|---:|---:|---:|---:|---:|---:|", flush=True)
    for batch in arguments.batches:
        job = Job(decoder, batch, 0, SIDE, 0)
        ours(job, arguments.compile)  # compiles and captures
        _, marks = ours(job, arguments.compile)
        # A row is 32 steps: the end of line is fed with the next row's first code.
        step = (marks[-1][0] - marks[0][0]) / (len(marks) - 1) / SIDE
        middle = len(job.contexts()[0][0]) + SIDE * (SIDE + 1) // 2
        cache = 2 * batch * middle * shape.layers * 2 * shape.kv_heads * shape.channels
        read = (weights + cache) * size
        bound = read / bandwidth
        print(
            f"| {batch} | {step * 1e3:.2f} | {read / 1e9:.2f} | {bound * 1e3:.2f} "
            f"| {bound / step:.0%} | {batch / step:.0f} |",
            flush=True,
        )


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, of a large copy on the GPU; the best of ten."""
    source = torch.empty(2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = 0.0
    for _ in range(10):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        best = max(best, 2 * source.numel() / (start.elapsed_time(end) / 1e3))
    return best


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--widths", type=int, nargs="+", default=list(SHAPES))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="pictures at once")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rows", type=int, default=4, help="of 32 codes that are timed")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--late", action="store_true", help="the last rows of a picture too")
    parser.add_argument("--whole", action="store_true", help="a whole picture too, once")
    parser.add_argument("--tensors", action="store_true", help="the peer's allowed ids as tensors")
    parser.add_argument("--smaller", action="store_true", help="bfloat16 and int8 beside float32")
    parser.add_argument("--compile", action="store_true", help="our step through torch.compile")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    arguments = parser.parse_args()
    if arguments.device != "cpu":
        against_memory(arguments)
        return
    load = f"load average {os.getloadavg()[0]:.1f} of {os.cpu_count()} cores"
    if arguments.smaller:
        torch.set_num_threads(arguments.threads[0])
        print("| width | pictures | weights | MiB | ms per code | times faster, CPU time |")
        print("|---:|---:|---|---:|---:|---:|", flush=True)
        for width in arguments.widths:
            decoder = Decoder(DecoderConfig(SHAPES[width], VOCABULARY.size, 2048), seed=0).eval()
            for batch in arguments.batches:
                smaller(decoder, batch, arguments)
        return
    print(f"torch {torch.__version__}, {load}; milliseconds for a code of every picture,")
    print("wall time and in brackets CPU time\n")
    print("| width | pictures | threads | what | ours | generate | times faster | bound |")
    print("|---:|---:|---:|---|---:|---:|---:|---:|", flush=True)
    for width in arguments.widths:
        config = DecoderConfig(SHAPES[width], VOCABULARY.size, 2048)
        decoder = Decoder(config, seed=0).eval()
        for batch in arguments.batches:
            for threads in arguments.threads:
                torch.set_num_threads(threads)
                compare(decoder, batch, arguments)


if __name__ == "__main__":
    main()
