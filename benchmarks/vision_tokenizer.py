"""Our vision tokenizer beside transformers' `Emu3VQVAE`, with the same random weights.

    OMP_NUM_THREADS=1 python benchmarks/vision_tokenizer.py [--side 256 512] [--memory 1024]
    python benchmarks/vision_tokenizer.py --small        # a narrow network, in a minute
    python benchmarks/vision_tokenizer.py --device cuda --memory

Prints Markdown tables. Ours and the peer take turns in one process; ratios are medians over the
pairs, of CPU seconds, or of seconds on a GPU (float32 without TF32). Peak memory is that of a
process of its own for each, which may not have more than --limit-gib of data.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.models.emu3 import Emu3VQVAE, Emu3VQVAEConfig

from unimodal.tokenize.vision.tokenizer import VisionTokenizer

NARROW = {"codebook_size": 4096, "base_channels": 64, "hidden_size": 256}


def randomize(peer: Emu3VQVAE) -> None:
    """Give the norms values that matter, and a codebook as wide as the latents."""
    for name, buffer in peer.named_buffers():
        if name.endswith("running_mean"):
            buffer.uniform_(-0.2, 0.2)
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    for name, parameter in peer.named_parameters():
        if "norm" in name:
            parameter.add_(0.1 * torch.randn_like(parameter))


def peer_encode(peer: Emu3VQVAE, pixels: Tensor) -> Tensor:
    """Codes of an image [1,3,H,W] or a clip [1,4,3,H,W]."""
    return torch.stack(peer.encode(pixels, torch.tensor([pixels.shape[-2:]])).image_tokens)


def seconds(work: Callable[[], Tensor], device: str) -> tuple[float, Tensor]:
    """Seconds that `work` took, and its result."""
    if device == "cpu":
        start = time.process_time()
        result = work()
        return time.process_time() - start, result
    torch.cuda.synchronize()
    start = time.perf_counter()
    result = work()
    torch.cuda.synchronize()
    return time.perf_counter() - start, result


def pairs(
    ours: Callable[[], Tensor], theirs: Callable[[], Tensor], repeat: int, device: str
) -> tuple[list[tuple[float, float]], Tensor, Tensor]:
    """(ours, theirs) in seconds, in turn, and the results."""
    found = []
    for _ in range(repeat):
        a, mine = seconds(ours, device)
        b, other = seconds(theirs, device)
        found.append((a, b))
    return found, mine, other


def row(what: str, found: list[tuple[float, float]], agreement: str) -> str:
    """A line of the table."""
    a, b = (statistics.median(one) for one in zip(*found, strict=True))
    ratio = statistics.median(theirs / mine for mine, theirs in found)
    return f"| {what} | {a:.2f} | {b:.2f} | {ratio:.2f} | {agreement} |"


def speed(
    ours: VisionTokenizer, peer: Emu3VQVAE, frames: int, side: int, repeat: int, device: str
) -> None:
    """Print encode, decode and the round trip of an image (1 frame) or a clip (4)."""
    pixels = (torch.rand(1, frames, 3, side, side) * 2 - 1).to(device)
    given = pixels[:, 0] if frames == 1 else pixels
    encoded, codes, theirs = pairs(
        lambda: ours.encode(pixels), lambda: peer_encode(peer, given), repeat, device
    )
    same = f"{(codes.flatten() == theirs.flatten()).float().mean():.4%} of codes equal"
    decoded, mine, other = pairs(
        lambda: ours.decode(codes, image=frames == 1), lambda: peer.decode(theirs), repeat, device
    )
    far = f"largest difference {(mine.flatten() - other.flatten()).abs().max():.1e}"
    both = [(a + c, b + d) for (a, b), (c, d) in zip(encoded, decoded, strict=True)]
    name = f"{'image' if frames == 1 else f'{frames} frames'}, {side}x{side}"
    print(row(f"{name}: encode", encoded, same))
    print(row(f"{name}: decode", decoded, far))
    print(row(f"{name}: both", both, ""), flush=True)


def agreement(ours: VisionTokenizer, side: int, device: str) -> None:
    """Print which share of codes other arithmetic leaves as it is; changes the model's layout."""
    pixels = (torch.rand(2, 1, 3, side, side) * 2 - 1).to(device)
    codes = ours.encode(pixels)
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        rounded = ours.encode(pixels)
    for layer in ours.model.modules():
        if isinstance(layer, nn.Conv2d):
            layer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for what, other in [("bfloat16 trunk", rounded), ("channels last", ours.encode(pixels))]:
        share = (other == codes).float().mean()
        print(f"- {what}: {share:.4%} of {codes.numel()} codes as in contiguous float32")


def memory(directory: Path, side: int, limit_gib: float) -> None:
    """Print peak memory of encoding and decoding one image, ours and the peer's."""
    print("\n| peak memory, one image | ours | transformers | ratio |\n|---|---:|---:|---:|")
    for step in ("encode", "decode"):
        ours, theirs = (peak(directory, who, step, side, limit_gib) for who in ("ours", "peer"))
        cells = [f"{p:.1f} GiB" if p else f"fails at {limit_gib:.0f} GiB" for p in (ours, theirs)]
        ratio = f"{theirs / ours:.1f}" if ours and theirs else ""
        print(f"| {step}, {side}x{side} | {cells[0]} | {cells[1]} | {ratio} |", flush=True)


def peak(directory: Path, who: str, step: str, side: int, limit_gib: float) -> float | None:
    """Peak GiB of a process that does one step, or None if it fails within the limit."""
    command = [sys.executable, __file__, "--alone", who, step, str(directory), str(side)]
    done = subprocess.run([*command, str(limit_gib)], capture_output=True, text=True)
    if done.returncode == 0:
        return float(done.stdout.split()[-1])
    if "can't allocate memory" in done.stderr or "MemoryError" in done.stderr:
        return None
    if done.returncode == -9:
        raise SystemExit(f"{who} {step}: killed; the machine has less memory than --limit-gib")
    raise SystemExit(done.stderr)


@torch.no_grad()
def alone(who: str, step: str, directory: str, side: str, limit_gib: str) -> None:
    """One step within a memory limit, in a process of its own; prints its peak in GiB."""
    Path("/proc/self/oom_score_adj").write_text("1000")  # before anybody else
    limit = int(float(limit_gib) * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    grid = int(side) // 8
    pixels = torch.rand(1, 1, 3, int(side), int(side)) * 2 - 1
    codes = torch.zeros(1, 1, grid, grid, dtype=torch.int64)
    if who == "ours":
        ours = VisionTokenizer.load(directory)
        ours.encode(pixels) if step == "encode" else ours.decode(codes, image=True)
    else:
        peer = Emu3VQVAE.from_pretrained(directory).eval()
        peer_encode(peer, pixels[:, 0]) if step == "encode" else peer.decode(codes[:, 0])
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)


def machine(device: str) -> str:
    """What ran this."""
    if device != "cpu":
        name = torch.cuda.get_device_name()
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        name = f"{models[0] if models else platform.machine()}, {torch.get_num_threads()} thread(s)"
    load = os.getloadavg()[0]
    return f"{name}; torch {torch.__version__}; load average {load:.1f} of {os.cpu_count()} cores"


@torch.no_grad()
def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--side", type=int, nargs="*", default=[256, 512])
    parser.add_argument("--memory", type=int, nargs="*", default=[1024], help="sides; none: skip")
    parser.add_argument("--limit-gib", type=float, default=20.0, help="under what is free")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--small", action="store_true", help="a narrow network at 128x128")
    arguments = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    peer = Emu3VQVAE(Emu3VQVAEConfig(**(NARROW if arguments.small else {}))).eval()
    randomize(peer)
    print(machine(arguments.device))
    parameters = sum(p.numel() for p in peer.parameters())
    print(f"\n{parameters:,} parameters, float32, {arguments.repeat} pairs in turn\n")
    with tempfile.TemporaryDirectory() as folder:
        peer.save_pretrained(folder)
        for side in arguments.memory:
            memory(Path(folder), side, arguments.limit_gib)
        ours = VisionTokenizer.load(folder, arguments.device)
    peer = peer.to(arguments.device)
    sides = [128] if arguments.small else arguments.side
    warm = torch.zeros(1, 1, 3, 64, 64)
    ours.encode(warm), peer_encode(peer, warm[:, 0].to(arguments.device))
    unit = "CPU s" if arguments.device == "cpu" else "s"
    print(f"\n| | ours, {unit} | transformers, {unit} | times faster | same result |")
    print("|---|---:|---:|---:|---|", flush=True)
    for side in sides:
        speed(ours, peer, 1, side, arguments.repeat, arguments.device)
    speed(ours, peer, 4, min(sides), arguments.repeat, arguments.device)
    print()
    agreement(ours, min(sides), arguments.device)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--alone"]:
        alone(*sys.argv[2:])
    else:
        main()
