"""vLLM beside our own loop: 64 guided pictures at once, the same weights and noise.

    python -m benchmarks.vllm_backend                                     on the CPU, one thread
    python -m benchmarks.vllm_backend --width 2048 --layers 16 --side 32  on a GPU, in bfloat16

Emu3's 184,622 ids, guidance 3, top-k 2048, prompts of 20 to 60 ids, random weights. The torch
backend draws first, in one batch; then vLLM starts (not timed, as loading is not) and draws the
same. Every repetition draws all pictures; the ratio is of the fastest of each. In float32 what
both draw is compared.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from benchmarks.sampling import GUIDANCE, TOP_K, VOCABULARY
from unimodal.model.choice import Choice
from unimodal.model.decoder import Decoder, DecoderConfig, Shape
from unimodal.model.generate import Backend, Draft, Drawing, TorchBackend
from unimodal.model.grammar import BlockGrammar
from unimodal.model.naming import config_record
from unimodal.model.vllm import VllmBackend


def model(directory: Path, width: int, layers: int, context: int) -> Decoder:
    """A random decoder, saved as vLLM loads it; heads of 64."""
    heads = width // 64
    shape = Shape(
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=max(1, heads // 4) if heads % 4 == 0 else heads,
        head_dim=64,
        ffn=256 * round(width * 8 / 3 / 256),
        init_std=0.1,
    )
    decoder = Decoder(DecoderConfig(shape, VOCABULARY.size, context)).eval()
    save_file(decoder.state_dict(), directory / "model.safetensors")
    record = config_record(decoder.config, "llama", "float32", VOCABULARY)
    (directory / "config.json").write_text(json.dumps(record))
    VOCABULARY.save(directory / "vocabulary")
    return decoder


def pictures(count: int, side: int) -> list[Draft]:
    """Guided drafts of `side` x `side` codes behind prompts of unequal length."""
    rng = np.random.default_rng(0)
    grammar = BlockGrammar(VOCABULARY, side, side)
    made = []
    for number in range(count):
        prompt = rng.integers(0, 256, rng.integers(20, 61)).tolist()
        own = [VOCABULARY.bos, *prompt, *grammar.opening]
        made.append(
            Draft((own, [VOCABULARY.bos, *grammar.opening]), grammar, (GUIDANCE,), (number, 0))
        )
    return made


def fastest(
    backend: Backend, drafts: list[Draft], drawing: Drawing, repeats: int
) -> tuple[float, list[list[int]]]:
    """Seconds of the fastest of some repetitions, and what was drawn."""
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        ids = backend.generate(drafts, drawing)
        times.append(time.perf_counter() - begun)
    return min(times), ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--side", type=int, default=8, help="codes along a side")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--tensor-parallel", type=int, default=1)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    drafts = pictures(asked.prompts, asked.side)
    context = max(len(one.contexts[0]) + one.grammar.most for one in drafts) + 1
    drawing = Drawing(Choice(1.0, TOP_K), Choice(temperature=None))
    codes = asked.prompts * asked.side**2
    with tempfile.TemporaryDirectory() as folder:
        decoder = model(Path(folder), asked.width, asked.layers, context)
        weights = "float32"
        if device == "cuda":
            weights = "bfloat16"
            decoder = decoder.to(device, torch.bfloat16)
            decoder.compute = torch.bfloat16
        slow, expected = fastest(
            TorchBackend(decoder, asked.prompts), drafts, drawing, asked.repeats
        )
        print(f"torch  {slow:8.2f} s  {codes / slow:8.1f} codes/s", flush=True)
        del decoder
        theirs = VllmBackend.load(
            folder,
            VOCABULARY,
            weights,
            rows=2 * asked.prompts,
            tensor_parallel_size=asked.tensor_parallel,
        )
        fast, found = fastest(theirs, drafts, drawing, asked.repeats)
    same = sum(a == b for a, b in zip(expected, found, strict=True))
    print(f"vLLM   {fast:8.2f} s  {codes / fast:8.1f} codes/s")
    print(f"vLLM is {slow / fast:.2f} times as fast; {same} of {len(drafts)} pictures are the same")


if __name__ == "__main__":
    main()
