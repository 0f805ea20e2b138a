"""Training beside transformers' Trainer and beside plain loops: tokens a second, and memory.

    pip install --no-deps --target PEERS accelerate psutil
    PYTHONPATH=PEERS OMP_NUM_THREADS=1 python benchmarks/training.py [--small]

The same Llama with the same first weights, AdamW, clipping and documents on every side, float32 on
one thread: half of the documents text (lognormal, median 120 tokens), half images (64 to 1024).

  ours      a pack of the documents a step, with the trainer's own loss and optimizer
  Trainer   transformers' Trainer and LlamaForCausalLM, the documents padded to the longest
  loop      LlamaForCausalLM in a plain loop on the packs as rows, one causal sequence each
  litgpt    the same loop around litgpt's GPT, where litgpt is installed

Ours and a peer take turns; times are CPU seconds of whole steps, ratios medians over the pairs.
Every side does two steps and says its last loss: Trainer's is ours, as the mathematics is the same;
the loops', whose documents see one another, only nearly. Peak memory, with Emu3's 184,622 ids, is
that of a process of its own for each side.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from unimodal.model.decoder import Decoder, DecoderConfig, Shape
from unimodal.model.loss import weighted_cross_entropy
from unimodal.model.naming import config_record
from unimodal.model.optim import optimizers
from unimodal.model.recipe import OptimizerSettings

SPEED = DecoderConfig(Shape(width=384, layers=6, heads=6, kv_heads=2, ffn=1024), 8456, 1024)
MEMORY = DecoderConfig(Shape(width=128, layers=2, heads=4, kv_heads=2, ffn=384), 184_622, 1024)
OPTIMIZER = OptimizerSettings(lr=1e-3, beta2=0.95, weight_decay=0.1, clip=1.0)
STEPS = 2
BOUNDS = {"Trainer": 1.5, "loop": 1.0, "litgpt": 1.0}


@dataclass(frozen=True)
class Work:
    """The documents of the steps of one run: whole ones, and the last cut to fill its row."""

    config: DecoderConfig
    steps: list[list[Tensor]]

    @property
    def rows(self) -> int:
        """Rows of `config.context` tokens of a step."""
        return sum(map(len, self.steps[0])) // self.config.context

    @property
    def padded(self) -> int:
        """Tokens of a step with every document as long as its longest."""
        return sum(len(step) * max(map(len, step)) for step in self.steps) // len(self.steps)


def work(config: DecoderConfig, tokens: int, seed: int) -> Work:
    """Steps of `tokens` each, a multiple of the context."""
    rng = np.random.default_rng(seed)
    steps = []
    for _ in range(STEPS):
        documents: list[Tensor] = []
        left = tokens
        while left:
            text = rng.lognormal(np.log(120), 1.0)
            side = rng.integers(8, 33)
            length = int(np.clip(text if rng.random() < 0.5 else side * side, 2, 1024))
            documents.append(torch.from_numpy(rng.integers(0, config.vocabulary_size, length)))
            documents[-1] = documents[-1][:left]
            left -= len(documents[-1])
        steps.append(documents)
    return Work(config, steps)


def _decoder(config: DecoderConfig) -> Decoder:
    return Decoder(config, seed=0).train()


def ours(work: Work) -> tuple[float, float]:
    """CPU seconds of the steps, and the last loss, of this project's trainer."""
    decoder = _decoder(work.config)
    moving = optimizers(decoder, OPTIMIZER)
    loss = 0.0
    start = time.process_time()
    for documents in work.steps:
        pack = [document for document in documents if len(document) > 1]
        lengths = [len(document) - 1 for document in pack]
        ids = torch.cat([document[:-1] for document in pack])
        targets = torch.cat([document[1:] for document in pack])
        positions = torch.cat([torch.arange(length) for length in lengths])
        hidden = decoder.hidden(ids, positions, decoder.packed(lengths))
        weights = torch.ones(len(ids))
        total, _ = weighted_cross_entropy(hidden, decoder.lm_head.weight, targets, weights)
        (total / len(ids)).backward()
        loss = float(total.detach()) / len(ids)
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), OPTIMIZER.clip)
        for one in moving:
            one.step()
            one.zero_grad(set_to_none=True)
    return time.process_time() - start, loss


def _llama(config: DecoderConfig) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**config_record(config)))
    model.load_state_dict(_decoder(config).state_dict())
    return model.train()


def trainer(work: Work) -> tuple[float, float]:
    """The same of transformers' Trainer, padded batches made beforehand."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    batches = []
    for documents in work.steps:
        ids = torch.nn.utils.rnn.pad_sequence(documents, batch_first=True)
        lengths = torch.tensor([len(document) for document in documents])
        there = torch.arange(ids.shape[1]) < lengths[:, None]
        labels = ids.masked_fill(~there, -100)
        batches.append({"input_ids": ids, "attention_mask": there.long(), "labels": labels})

    class Clock(TrainerCallback):
        started = ended = 0.0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.started = time.process_time()

        def on_train_end(self, *_: Any, **__: Any) -> None:
            self.ended = time.process_time()

    class InOrder(Trainer):
        losses: tuple[float, ...] = ()

        def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
            return torch.utils.data.SequentialSampler(batches)  # type: ignore[arg-type]

        def training_step(self, *arguments: Any, **named: Any) -> Tensor:
            loss = super().training_step(*arguments, **named)
            self.losses = (*self.losses, float(loss))
            return loss

    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder,
            use_cpu=True,
            max_steps=len(batches),
            per_device_train_batch_size=1,
            learning_rate=OPTIMIZER.lr,
            lr_scheduler_type="constant",
            optim="adamw_torch_fused",
            adam_beta1=OPTIMIZER.beta1,
            adam_beta2=OPTIMIZER.beta2,
            weight_decay=OPTIMIZER.weight_decay,
            max_grad_norm=OPTIMIZER.clip,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        clock = Clock()
        run = InOrder(
            _llama(work.config),
            settings,
            data_collator=lambda items: items[0],
            train_dataset=batches,  # type: ignore[arg-type]
            callbacks=[clock],
        )
        run.train()
        return clock.ended - clock.started, run.losses[-1]


def _loop(work: Work, model: Any, logits: Callable[[Tensor], Tensor]) -> tuple[float, float]:
    """A plain loop: packed rows [rows, context + 1], cross-entropy over all logits at once."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    norms = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices}, {"params": norms, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(
        groups,
        lr=OPTIMIZER.lr,
        betas=(OPTIMIZER.beta1, OPTIMIZER.beta2),
        weight_decay=OPTIMIZER.weight_decay,
        fused=True,
    )
    loss = torch.zeros(())
    start = time.process_time()
    for documents in work.steps:
        rows = torch.cat(documents).view(-1, work.config.context)
        found = logits(rows[:, :-1])
        loss = F.cross_entropy(found.flatten(0, 1), rows[:, 1:].flatten())
        del found
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.clip)
        adamw.step()
        adamw.zero_grad(set_to_none=True)
    return time.process_time() - start, float(loss.detach())


def loop(work: Work) -> tuple[float, float]:
    """The same of a plain loop around transformers' Llama."""
    model = _llama(work.config)
    return _loop(work, model, lambda ids: model(ids, use_cache=False).logits)


def litgpt(work: Work) -> tuple[float, float]:
    """The same of a plain loop around litgpt's model."""
    from litgpt.config import Config
    from litgpt.model import GPT

    shape, size = work.config.shape, work.config.vocabulary_size
    model = GPT(
        Config(
            block_size=work.config.context,
            vocab_size=size,
            padded_vocab_size=size,
            n_layer=shape.layers,
            n_head=shape.heads,
            n_query_groups=shape.kv_heads,
            n_embd=shape.width,
            intermediate_size=shape.ffn,
            norm_class_name="RMSNorm",
            mlp_class_name="LLaMAMLP",
            rotary_percentage=1.0,
            parallel_residual=False,
            bias=False,
            rope_base=int(shape.rope_theta),
            norm_eps=shape.norm_eps,
        )
    )
    state = _decoder(work.config).state_dict()
    renamed = {
        "lm_head.weight": state["lm_head.weight"],
        "transformer.wte.weight": state["model.embed_tokens.weight"],
        "transformer.ln_f.weight": state["model.norm.weight"],
    }
    parts = {
        "norm_1": "input_layernorm",
        "norm_2": "post_attention_layernorm",
        "attn.proj": "self_attn.o_proj",
        "mlp.fc_1": "mlp.gate_proj",
        "mlp.fc_2": "mlp.up_proj",
        "mlp.proj": "mlp.down_proj",
    }
    for n in range(shape.layers):
        ours, theirs = f"model.layers.{n}", f"transformer.h.{n}"
        for name, mine in parts.items():
            renamed[f"{theirs}.{name}.weight"] = state[f"{ours}.{mine}.weight"]
        qkv = [state[f"{ours}.self_attn.{x}_proj.weight"] for x in "qkv"]
        renamed[f"{theirs}.attn.qkv.weight"] = torch.cat(qkv)
    model.load_state_dict(renamed)
    return _loop(work, model, model)


SIDES = {"ours": ours, "Trainer": trainer, "loop": loop, "litgpt": litgpt}


def alone(side: str, tokens: str, limit_gib: str) -> None:
    """Steps of one side in a process of its own; prints its peak in GiB."""
    Path("/proc/self/oom_score_adj").write_text("1000")  # before anybody else
    limit = int(float(limit_gib) * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    SIDES[side](work(MEMORY, int(tokens), 0))
    # Not getrusage: its peak is also that of the process that forked this one.
    status = Path("/proc/self/status").read_text().split("VmHWM:")[1]
    print(int(status.split()[0]) / 2**20)


def peak(side: str, tokens: int, limit_gib: float) -> float | None:
    """Peak GiB of a side, or None where `limit_gib` is too little."""
    command = [sys.executable, __file__, "--alone", side, str(tokens), str(limit_gib)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return float(done.stdout.split()[-1])
    if "can't allocate memory" in done.stderr or "MemoryError" in done.stderr:
        return None
    raise SystemExit(done.stderr)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--small", action="store_true", help="a row a step, one pair, less memory")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--rows", type=int, default=4, help="of 1024 tokens, in a step")
    parser.add_argument("--limit-gib", type=float, default=14.0, help="for the memory of one side")
    arguments = parser.parse_args()
    pairs, rows = (1, 2) if arguments.small else (arguments.pairs, arguments.rows)
    peers = ["Trainer", "loop"]
    try:
        import litgpt as _  # noqa: F401

        peers.append("litgpt")
    except ImportError:
        print("litgpt is not installed: left out")
    cores = f"load average {os.getloadavg()[0]:.1f} of {os.cpu_count()} cores"
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), {cores}")
    first = work(SPEED, rows * 1024, 0)
    share = 1 - rows * 1024 / first.padded
    print(f"{rows * 1024} tokens in {len(first.steps[0])} documents a step; padding {share:.0%}\n")
    print("| peer | ours, tokens/s | peer | times faster | bound | last loss: ours, peer |")
    print("|---|---:|---:|---:|---:|---|", flush=True)
    tiny = work(SPEED, 1024, 99)
    for side in ["ours", *peers]:
        SIDES[side](tiny)  # imports and first calls
    for peer in peers:
        found, losses = [], (0.0, 0.0)
        for pair in range(pairs):
            data = work(SPEED, rows * 1024, pair)
            (mine, a), (theirs, b) = ours(data), SIDES[peer](data)
            found.append((STEPS * rows * 1024 / mine, STEPS * rows * 1024 / theirs))
            losses = (a, b)
        speeds = [statistics.median(side) for side in zip(*found, strict=True)]
        ratio = statistics.median(mine / theirs for mine, theirs in found)
        cells = f"{speeds[0]:.0f} | {speeds[1]:.0f} | {ratio:.2f} | {BOUNDS[peer]}"
        print(f"| {peer} | {cells} | {losses[0]:.4f}, {losses[1]:.4f} |", flush=True)
    tokens = 1024 * (1 if arguments.small else 2)
    print(f"\n| peak memory, {tokens} tokens a step, 184,622 ids | GiB | ours / it | bound |")
    print("|---|---:|---:|---:|", flush=True)
    base = peak("ours", tokens, arguments.limit_gib)
    for side in ["ours", *peers]:
        size = base if side == "ours" else peak(side, tokens, arguments.limit_gib)
        cells = f"{size:.2f}" if size else f"over {arguments.limit_gib:.0f}"
        ratio = "" if side == "ours" else f"{base / size:.2f}" if size and base else "under 1"
        print(f"| {side} | {cells} | {ratio} | {0.5 if ratio else ''} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--alone"]:
        alone(*sys.argv[2:])
    else:
        main()
