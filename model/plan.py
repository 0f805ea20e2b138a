"""What a training run takes, before it runs: parameters, memory by kind, arithmetic, days.

All of it is closed form, so that a plan for 1,024 GPUs takes no time on a laptop. The formulas of
memory follow the decoder's code operation by operation; they are checked against the bytes of live
tensors in runs on a CPU (benchmarks/memory.py), not against a GPU's allocator, whose fragments,
workspaces and communication buffers come on top.

Legend, per process: t tokens of its share of a pack, r of those between the blocks (fewer under
sequence parallel), D width, F ffn, Q and K channels of all its query and key heads; b bytes of the
compute dtype, w of the weights, a of attention's operands.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from unimodal.model.decoder import Decoder, DecoderConfig, Shape, parameter_count
from unimodal.model.lora import adapt
from unimodal.model.loss import CHUNK
from unimodal.model.recipe import TrainSettings
from unimodal.pipeline.errors import UsageError
from unimodal.tokenize.vocabulary import EMU3_CODEBOOK_SIZE, EMU3_VISION_START

EMU3_VOCABULARY = EMU3_VISION_START + EMU3_CODEBOOK_SIZE
"""184,622 ids: taken where no shards say otherwise."""
GPUS = {
    "a100": (312e12, 80e9),
    "h100": (989e12, 80e9),
    "h200": (989e12, 141e9),
    "b200": (2250e12, 180e9),
    "l40s": (362e12, 48e9),
}
"""Peak of dense bfloat16 products per second and bytes of memory (NVIDIA's data sheets)."""


@dataclass(frozen=True)
class Memory:
    """Bytes that one process holds, by kind, and the largest sum at one time."""

    weights: int
    gradients: int
    moments: int
    average: int
    """Of the moving average of the weights (`ema`)."""
    activations: int
    """Kept by all blocks for backward, with what `recompute` keeps of them."""
    working: int
    """While backward passes one block: what is computed again, and gradients on their way."""
    gathered_kv: int
    """Keys and values of whole packs under `mesh.context`; a part of activations or working."""
    unsharded: int
    """Weights and gradients that are whole for a while under `mesh.shard`."""
    head: int
    """Of the loss: one chunk of logits, and the head's gradient before it is added up."""
    peak: int


def memory(
    settings: TrainSettings, vocabulary: int, lengths: Sequence[int] | None = None, on: str = "cpu"
) -> Memory:
    """Memory of one process in a training step on packs of documents of `lengths` tokens.

    `lengths` is one document of `data.context` by default; `on` is cpu or cuda. With LoRA what
    blocks keep is an upper bound.
    """
    shape, mesh = settings.decoder, settings.mesh
    lengths = [settings.data.context] if lengths is None else lengths
    b = 2 if settings.precision == "bfloat16" else 4
    w = 2 if settings.parameters == "bfloat16" else 4
    fsdp = mesh.shard * mesh.context
    total, trained, muon = _counts(settings, vocabulary)
    split = fsdp * mesh.tensor
    weights, gradients = w * total // split, w * trained // split
    moments = w * (2 * trained - muon) // split
    average = w * total // split if settings.ema else 0

    t = -(-sum(lengths) // mesh.context)
    kept, gathered = _kept(settings, lengths, b, w, on, settings.recompute)
    whole, again = _kept(settings, lengths, b, w, on, "none")
    streams = 2 if on == "cpu" else 1  # a norm's input, and on the CPU its normalised copy
    stream = 4 * -(-t // mesh.tensor) * shape.width
    ends = streams * stream + 2 * b * t * shape.width + 8 * t * shape.channels
    activations = shape.layers * kept + ends
    # Gradients of the MLP's three wide tensors less what is freed as they come, and of the stream.
    working = 2 * b * t * shape.ffn // mesh.tensor + stream
    if settings.recompute != "none":
        working += whole - kept

    block = _block_matrices(shape) // mesh.tensor
    matrix = vocabulary * shape.width // mesh.tensor  # of the embedding, and of the head
    unsharded = 0
    if fsdp * mesh.replicate > 1:
        # The root's weights and gradients stay whole for the step; of a block the part in use and
        # the next one, and its gradient in both dtypes while it is summed up.
        unsharded = 2 * w * matrix * (1 if settings.lora.rank else 2) + (3 * b + 4) * block
    # Forward: the head in the compute dtype, its gradient in float32, a chunk's part of that and
    # the chunk's logits. Backward: the gradient and its scaled copy.
    own = 0 if settings.lora.rank else 4 * matrix
    head = (b * matrix if b != w else 0) + (own and own + b * matrix)
    head = max(head, 2 * own) + min(CHUNK, t) * vocabulary // mesh.tensor * 8
    fixed = weights + moments + average
    held = gradients if settings.accumulate > mesh.replicate * mesh.shard else 0
    blocks = gradients - (0 if settings.lora.rank else w * matrix // fsdp)  # all but the embedding
    peak = fixed + max(
        held + activations + head,
        max(held, own // fsdp) + activations + working,
        max(held, blocks) + kept + working,  # of the first block: the last one to be passed
        gradients + (own if held else 0),
    )
    gathered = gathered * shape.layers if settings.recompute == "none" else again
    return Memory(
        *(weights, gradients, moments, average, activations, working, gathered, unsharded, head),
        peak + unsharded,
    )


def flops_per_token(
    settings: TrainSettings, vocabulary: int, lengths: Sequence[int]
) -> tuple[float, float]:
    """Floating-point operations of training per token: of the matrices, and of attention.

    6 for each number in the blocks and the head (2 forward, 4 backward; 4 for frozen ones, which
    have no gradient of their own), and 6 * layers * Q * L for causal attention inside a document
    of L tokens. What `recompute` does twice is not counted, as MFU leaves it out too.
    """
    shape = settings.decoder
    numbers = shape.layers * _block_matrices(shape) + vocabulary * shape.width
    squares = sum(length**2 for length in lengths) / sum(lengths)
    attention = 6 * shape.layers * shape.heads * shape.channels * squares
    return (4.0 if settings.lora.rank else 6.0) * numbers, attention


def peak(device: torch.device) -> float | None:
    """Dense bfloat16 operations per second of a GPU whose data sheet stands in `GPUS`."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device).lower()
    if "pcie" in name or "nvl" in name:  # slower ones of the same name
        return None
    return next((figures[0] for gpu, figures in GPUS.items() if gpu in name), None)


def plan(
    settings: TrainSettings,
    vocabulary: int = EMU3_VOCABULARY,
    packs: Sequence[Sequence[int]] | None = None,
    gpus: int | None = None,
    gpu: str | None = None,
    mfu: float = 0.4,
    tokens: float | None = None,
) -> dict[str, Any]:
    """Names and figures of a run; memory in GB (10^9 bytes) per process.

    `packs` are the document lengths of some packs of the run; by default every pack is one
    document, which makes attention as dear as it can be. `gpus` of the kind `gpu` take as many
    copies of the recipe's mesh as they hold. `mfu` is the share of the GPUs' peak that is assumed
    to be reached, `tokens` how many are to be seen (default: those of all steps). Raises
    `UsageError` for GPUs that the mesh does not fit, and figures that cannot be.
    """
    if not 0 < mfu <= 1:
        raise UsageError(f"--mfu {mfu} must be above 0 and at most 1")
    if tokens is not None and not 0 < tokens < math.inf:
        raise UsageError(f"--tokens {tokens} must be a number above 0")
    if gpu is not None and gpu not in GPUS:
        raise UsageError(f"no GPU {gpu} is known: give one of {', '.join(GPUS)}")
    mesh, context = settings.mesh, settings.data.context
    if gpus is not None:
        if gpus % mesh.size:
            raise UsageError(
                f"{gpus} GPUs are no multiple of the mesh's {mesh.size} ({mesh}): change --gpus, "
                "or --set mesh.shard and the others"
            )
        mesh = mesh.model_copy(update={"replicate": mesh.replicate * gpus // mesh.size})
    ranks = mesh.replicate * mesh.shard
    accumulate = math.ceil(settings.accumulate / ranks) * ranks
    changed = "" if accumulate == settings.accumulate else f" (the recipe: {settings.accumulate})"
    settings = settings.model_copy(update={"mesh": mesh, "accumulate": accumulate})
    on = "cuda" if gpu or gpus or settings.device.startswith("cuda") else "cpu"
    packs = packs or [[context]]
    longest = max(packs, key=lambda lengths: sum(length**2 for length in lengths))
    with torch.device("meta"):
        decoder = Decoder(DecoderConfig(settings.decoder, vocabulary, context), seed=None)
    total, trained, _ = _counts(settings, vocabulary)
    record: dict[str, Any] = {"vocabulary": vocabulary}
    record |= {f"parameters {name}": n for name, n in parameter_count(decoder).items()}
    record["parameters"] = sum(p.numel() for p in decoder.parameters())
    if trained != total:
        record["parameters trained"] = trained
    record |= {"processes": mesh.size, "mesh": str(mesh)}
    record["packs a step"] = f"{accumulate}{changed}" if changed else accumulate
    record["packs a step and copy"] = accumulate // ranks
    record |= {"context": context, "tokens a step": accumulate * context, "steps": settings.steps}
    record["tokens"] = accumulate * context * settings.steps

    lengths = [length for pack in packs for length in pack]
    record["documents, mean tokens"] = round(sum(lengths) / len(lengths))
    matrices, attention = flops_per_token(settings, vocabulary, lengths)
    record["FLOPs a token"] = f"{matrices + attention:.4g}"
    record["of these attention"] = f"{attention / (matrices + attention):.1%}"
    held = memory(settings, vocabulary, longest, on)
    record |= {
        f"memory {name.replace('_', ' ')}, GB": round(size / 1e9, 3)
        for name, size in vars(held).items()
        if size
    }
    if on == "cuda":
        flops, room = GPUS[gpu or "h100"]
        speed = mesh.size * flops * mfu / (matrices + attention)
        wanted = tokens or record["tokens"]
        days = wanted / speed / 86_400
        record |= {
            "GPU": f"{gpu or 'h100'}: {flops / 1e12:.0f} TFLOP/s in bfloat16, {room / 1e9:.0f} GB",
            "fits": "yes" if held.peak < 0.9 * room else "no",  # a tenth for what is not counted
            "MFU assumed": mfu,
            "tokens a second": round(speed),
            f"days for {wanted:.3g} tokens": round(days, 2),
            "GPU hours": round(days * 24 * mesh.size),
        }
    return record


def _block_matrices(shape: Shape) -> int:
    """Numbers in the matrices of one block."""
    channels = 2 * (shape.heads + shape.kv_heads) * shape.channels
    return shape.width * (channels + 3 * shape.ffn)


def _counts(settings: TrainSettings, vocabulary: int) -> tuple[int, int, int]:
    """Parameters in all, those that are trained, and of these Muon's."""
    with torch.device("meta"):
        decoder = Decoder(DecoderConfig(settings.decoder, vocabulary), seed=None)
        if settings.lora.rank:
            adapt(decoder, settings.lora)
    sizes = [(p.numel(), p.requires_grad) for p in decoder.parameters()]
    blocks = [
        p.numel() for p in decoder.model.layers.parameters() if p.dim() > 1 and p.requires_grad
    ]
    muon = sum(blocks) if settings.optimizer.kind == "muon" else 0
    return sum(n for n, _ in sizes), sum(n for n, on in sizes if on), muon


def _kept(
    settings: TrainSettings, lengths: Sequence[int], b: int, w: int, on: str, recompute: str
) -> tuple[int, int]:
    """Bytes that one block keeps for backward, and those of them that are gathered k and v."""
    shape, mesh = settings.decoder, settings.mesh
    whole = sum(lengths)
    t = -(-whole // mesh.context)
    r = -(-t // mesh.tensor)
    heads, ffn = shape.heads / mesh.tensor, shape.ffn / mesh.tensor
    q, k = heads * shape.channels, shape.kv_heads * shape.channels / mesh.tensor
    a = 4 if on == "cpu" else b  # see attention.py
    stream = 4 * r * shape.width
    attended = t * (q * a + 4 * heads)  # the log-sum-exp in float32
    gathered = whole * 2 * k * a if mesh.context > 1 else 0
    if recompute == "full":
        return int(stream), 0
    if recompute == "selective":
        products = t * (q + 2 * k + 2 * ffn + 2 * shape.width) * b
        # With dropout attention is computed again, see blocks.py.
        return int(stream + products + (0 if shape.dropout else attended)), 0
    # Inputs of both norms and their statistics; torch's kernel for the CPU also keeps x / rms(x).
    kept: float = (4 if on == "cpu" else 2) * stream + 8 * r
    kept += 2 * b * t * shape.width  # what they return
    kept += t * q * a + (gathered or t * 2 * k * a) + attended
    kept += t * q * b if on == "cpu" else 0  # there documents are joined to one tensor
    kept += 4 * b * t * ffn  # gate, silu of it, up, their product
    if b != w and mesh.shard * mesh.context == 1:
        kept += b * _block_matrices(shape) / mesh.tensor  # every matrix in the compute dtype
    if shape.qk_norm:
        kept += 4 * t * (q + k) * (2 if on == "cpu" else 1)
    if shape.dropout:
        kept += 2 * r * shape.width * (b if on == "cpu" else 1)  # masks
        if on == "cpu":  # no fused kernel has dropout there: probabilities, mask, product
            kept += 3 * 4 * heads * sum(length**2 for length in lengths)
    return int(kept), int(gathered)
