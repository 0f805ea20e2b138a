"""Train a vision tokenizer: pictures and short clips in, a loadable directory out.

    unimodal train-tokenizer photos/ icons/ film.mp4 -o tokenizer --recipe small
    torchrun --nproc-per-node 8 -m unimodal.cli train-tokenizer RUN -o tokenizer --recipe movqgan

A network that starts from nothing starts as a linear map that carries most of a patch (`init.py`),
its codebook as k-means centres of what that gives; `init` starts from weights instead. A step is a
pure function of (weights, moments, settings, step number), so that a resumed training ends, bit for
bit on a processor, where an uninterrupted one does.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from signal import SIGTERM

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from unimodal.pipeline.errors import UnimodalError, UsageError
from unimodal.pipeline.files import atomic, sweep
from unimodal.pipeline.lock import first_rank_lock
from unimodal.pipeline.progress import Progress
from unimodal.tokenize.device import out_of_memory
from unimodal.tokenize.training import Interrupted, Record, WeightAverage, not_finite, signals
from unimodal.tokenize.vision import checkpoint, init
from unimodal.tokenize.vision.bank import Bank, batch, list_spans, load_bank
from unimodal.tokenize.vision.checkpoint import Learners
from unimodal.tokenize.vision.codebook import MovingCodebook
from unimodal.tokenize.vision.discriminator import Discriminator, hinge
from unimodal.tokenize.vision.evaluate import evaluate
from unimodal.tokenize.vision.losses import sharpness
from unimodal.tokenize.vision.movq import MoVQ, MoVQConfig
from unimodal.tokenize.vision.optim import Optimizer, jump
from unimodal.tokenize.vision.perceptual import LPIPS, load_lpips
from unimodal.tokenize.vision.pixels import to_pixels
from unimodal.tokenize.vision.ranks import Ranks, joined
from unimodal.tokenize.vision.recipe import (
    Network,
    OptimizerSettings,
    TokenizerSettings,
    learning_rate,
)
from unimodal.tokenize.vision.tokenizer import VisionTokenizer

__all__ = ["Interrupted", "Network", "TokenizerSettings", "train_tokenizer"]

START_CROPS = 512  # looked at for principal components
LATENTS_AN_ENTRY = 16  # for k-means
START = 1 << 31  # steps from here on are the batches of the start
AHEAD = 4  # batches that threads cut while a GPU works


def train_tokenizer(
    inputs: Sequence[str | Path],
    out: Path,
    settings: TokenizerSettings,
    *,
    init: Path | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Path:
    """Train on `inputs` (run directories, files, folders, globs); resumes if `out` has a state.

    `init` is a tokenizer directory whose weights are the start. Under `torchrun`, every process
    calls this. Returns `out`. SIGTERM and Ctrl-C save and raise `Interrupted`; raises
    `UnimodalError` for a state of other settings or data, for a loss that is not finite, and if
    another process writes to `out`.
    """
    progress = progress or Progress()
    full = out_of_memory(f"batch (now {settings.batch}) or crop (now {settings.crop})")
    with first_rank_lock(out, progress), joined(device) as (ranks, device), full:
        return _train(inputs, out, settings, init, device, ranks, progress)


def _train(
    inputs: Sequence[str | Path],
    out: Path,
    settings: TokenizerSettings,
    weights: Path | None,
    device: str,
    ranks: Ranks,
    progress: Progress,
) -> Path:
    progress = progress if ranks.rank == 0 else Progress()
    cfg = settings.network.config()
    _check(settings, cfg, weights)
    spans = list_spans(inputs)
    data_digest = hashlib.sha256(repr(spans).encode()).hexdigest()
    previous = checkpoint.find(out, settings, data_digest)
    if ranks.rank == 0:
        sweep(out)
    torch.manual_seed(settings.seed)
    model = MoVQ(cfg)
    if weights is not None and previous is None:
        model.load_state_dict(_inherited(weights, cfg))
    lpips = None if settings.loss.lpips is None else load_lpips(settings.loss.lpips).to(device)
    data = load_bank(spans, settings.data, progress)
    _check_shares(settings, data, ranks)
    latents = settings.batch * (settings.crop // cfg.spatial_factor) ** 2
    model.to(device).train()
    freeze_batch_norm(model)
    for half in (model.encoder, model.quant_conv):
        half.requires_grad_(settings.optimizer.encoder > 0)
    book = MovingCodebook(model, settings.codebook, latents / cfg.codebook_size, ranks)
    if weights is None and previous is None:
        if ranks.rank == 0:
            progress.note(_start(model, book, data, settings, device))
        ranks.share(model)
        book.adopt()
    learners = Learners(
        model, Optimizer(model, settings.optimizer), book, WeightAverage(model, settings.ema)
    )
    if settings.loss.adversarial:
        judge = Discriminator(settings.discriminator.n_layers, settings.discriminator.width)
        learners.judge = judge.to(device)
        learners.judge_optimizer = Optimizer(judge, _judge_settings(settings))
        ranks.share(judge)
    if previous is not None:
        checkpoint.resume(out, learners, device)
    progress.note(_introduction(model, data, settings, lpips, ranks))
    run = _Run(out, settings, learners, data, data_digest, lpips, device, ranks, progress)
    if previous is not None:
        run.done, run.seconds = previous["step"], previous["seconds"]
        progress.note(f"resuming at step {run.done} of {settings.steps}")
    run.steps()
    return out


def _check(settings: TokenizerSettings, cfg: MoVQConfig, weights: Path | None) -> None:
    """Raise `UsageError` for settings that do not go together."""
    if settings.crop % cfg.spatial_factor:
        raise UsageError(f"setting crop = {settings.crop}: a multiple of {cfg.spatial_factor}")
    if settings.needs_init and weights is None:
        raise UsageError("this recipe refines weights: give --init DIR (or --set needs_init=false)")


def _check_shares(settings: TokenizerSettings, data: Bank, ranks: Ranks) -> None:
    """Raise `UsageError` if the crops of a step cannot be shared out evenly."""
    clips = data.clips and (settings.clip_share or not data.pictures)
    most = settings.data.clip_frames if clips else 1
    if any(max(1, settings.batch // frames) % ranks.world for frames in {1, min(4, most), most}):
        raise UsageError(
            f"setting batch = {settings.batch}: with {ranks.world} processes a multiple of "
            f"{most * ranks.world}"
        )


def _inherited(directory: Path, cfg: MoVQConfig) -> dict[str, Tensor]:
    """Weights to start from; raises `UsageError` if their network has another shape."""
    model = VisionTokenizer.load(directory).model
    if model.cfg != cfg:
        theirs, ours = model.cfg.to_dict(), cfg.to_dict()
        other = ", ".join(f"{k} {theirs[k]}, not {ours[k]}" for k in ours if ours[k] != theirs[k])
        raise UsageError(f"{directory}: is of another shape ({other}); set network.… to its values")
    return model.state_dict()


@torch.no_grad()
def _start(
    model: MoVQ, book: MovingCodebook, data: Bank, settings: TokenizerSettings, device: str
) -> str:
    """Weights and codebook from the data alone; says how. Raises `UsageError` if that cannot be."""

    def crops(index: int) -> Tensor:
        cut = batch(data, settings.seed, START + index, frames=settings.batch, crop=settings.crop)
        return to_pixels(cut).to(device)

    few = [crops(i).flatten(0, 1) for i in range(math.ceil(START_CROPS / settings.batch))]
    carried = init.start(model, torch.cat(few))
    if not carried and settings.optimizer.encoder == 0:
        raise UsageError(
            "setting optimizer.encoder = 0 keeps the encoder as it begins, and this network is too "
            "narrow for patches' principal components: set optimizer.encoder=1, or network.ch_mult "
            "so that the last level has 128 channels"
        )
    rows: list[Tensor] = []
    wanted, index = LATENTS_AN_ENTRY * model.cfg.codebook_size, 0
    while wanted > 0:
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=settings.bf16):
            z = model.latents(crops(index))
        rows.append(z.movedim(1, -1).flatten(0, -2))
        wanted, index = wanted - len(rows[-1]), index + 1
    book.start(torch.cat(rows))
    return f"starting from {'principal components' if carried else 'random weights'} and k-means"


def _judge_settings(settings: TokenizerSettings) -> OptimizerSettings:
    """Of the discriminator: Adam with the betas of the network's optimizer, as published."""
    lr = settings.discriminator.lr
    own = {"kind": "adamw", "lr": lr, "min_lr": lr, "warmup": 0, "weight_decay": 0.0}
    return settings.optimizer.model_copy(update=own)


def _introduction(
    model: MoVQ, data: Bank, settings: TokenizerSettings, lpips: LPIPS | None, ranks: Ranks
) -> str:
    look = f"LPIPS x {settings.loss.perceptual:g}"
    if lpips is None:
        look = f"sharpness x {settings.loss.sharpness:g}"
        if settings.loss.perceptual and settings.loss.adversarial:
            look += " in place of LPIPS (no --lpips weights)"
    return (
        f"{len(data.pictures)} pictures and {len(data.clips)} clips to train on, "
        f"{len(data.held_pictures)} and {len(data.held_clips)} held out; "
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters; "
        f"{settings.loss.pixel}, {look}; {ranks.world} process{'es' * (ranks.world > 1)}"
    )


def freeze_batch_norm(model: nn.Module) -> None:
    """Keep BatchNorm at its stored statistics, so that training and use compute the same."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm3d):
            module.eval()


@dataclass
class _Run:
    """What the loop works on."""

    out: Path
    settings: TokenizerSettings
    learners: Learners
    data: Bank
    data_digest: str
    lpips: LPIPS | None
    device: str
    ranks: Ranks
    progress: Progress
    done: int = 0  # steps
    seconds: float = 0.0  # of training in earlier processes

    def steps(self) -> None:
        """Run to the end of the schedule, or until a signal comes."""
        settings, learners, began = self.settings, self.learners, time.monotonic()
        first = self.ranks.rank == 0
        record = Record(self.out, self.done, settings.tensorboard) if first else None
        self.progress.begin("steps", settings.steps, "steps")
        self.progress.advance("steps", self.done)
        try:
            with signals() as received, closing(_batches(self)) as batches:
                for step in range(self.done, settings.steps):
                    pixels = next(batches)
                    values, stopped = self.step(step, pixels, bool(received))
                    self.done = step + 1
                    self.progress.advance("steps")
                    last = self.done == settings.steps
                    seconds = self.seconds + time.monotonic() - began
                    if record and (last or self.done % settings.log_every == 0):
                        row = {**values, "seconds": round(seconds, 2)}
                        record.write(self.done, row)
                        self.progress.show({"step": self.done, **row})
                    saving = last or self.done % settings.save_every == 0
                    if record and saving:
                        self.measure(record)
                    if record and (saving or stopped):
                        checkpoint.save(
                            self.out, settings, self.data_digest, learners, self.done, seconds
                        )
                    if stopped and not last:
                        raise Interrupted(
                            f"stopped by a signal at step {self.done} of {settings.steps}; saved "
                            f"in {self.out}: run the same command again to go on",
                            received[0] if received else SIGTERM,  # another process had it
                        )
        finally:
            self.progress.end("steps")
            if record:
                record.close()

    def step(self, step: int, pixels: Tensor, stop: bool) -> tuple[dict[str, float], bool]:
        """One step on this rank's frames [B,T,3,H,W]; returns values, and whether to stop.

        Both are of all ranks: a signal to any of them stops all after the same step.
        """
        settings, learners = self.settings, self.learners
        optimizer, judge = learners.optimizer, learners.judge
        if step < settings.discriminator.start:
            judge = None
        terms, painted = self.losses(pixels, judge)
        terms["loss"].backward()
        self.ranks.mean_gradients(optimizer.parameters())
        terms["grad_norm"] = optimizer.clip()
        if judge is not None and learners.judge_optimizer is not None:
            judge.requires_grad_(True)
            with self._autocast():
                real, fake = judge(pixels.flatten(0, 1)), judge(painted.detach())
            terms["hinge"] = hinge(real.float(), fake.float())
            terms["hinge"].backward()
            self.ranks.mean_gradients(learners.judge_optimizer.parameters())
            learners.judge_optimizer.clip()
        terms["stop"] = torch.tensor(float(stop), device=pixels.device)
        means = self.ranks.mean(torch.stack([t.detach().float() for t in terms.values()])).tolist()
        values = dict(zip(terms, means, strict=True))
        stopped = values.pop("stop") > 0
        if not all(math.isfinite(value) for value in values.values()):
            self.stop_not_finite(step, values)
        lr = learning_rate(step, settings.steps, settings.optimizer)
        optimizer.step(lr)
        if judge is not None and learners.judge_optimizer is not None:
            learners.judge_optimizer.step(settings.discriminator.lr)
        learners.average.update(step)
        every = settings.codebook.revive_every
        if every and step % every == every - 1:
            moved = learners.book.revive(np.random.default_rng([settings.seed, step, 0, 1]))
            jump(learners.average, moved)
            values["revived"] = float(len(moved))
        return {**values, "lr": lr}, stopped

    def losses(
        self, pixels: Tensor, judge: Discriminator | None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Terms of one batch of frames [B,T,3,H,W], and the frames as painted [B*T,3,H,W]."""
        model, book, weights = self.learners.model, self.learners.book, self.settings.loss
        image = pixels.shape[1] == 1
        with self._autocast():
            z = model.latents(pixels)
            codes = model.quantize(z.detach())
            vectors = model.quantize.lookup(codes)
            book.update(z.detach(), codes)
            zq = z + (vectors - z).detach()  # straight through
            painted = model.paint(zq, image).float().flatten(0, 1)
        target = pixels.flatten(0, 1)
        terms: dict[str, Tensor] = {}
        if weights.pixel == "l2":
            loss = terms["l2"] = F.mse_loss(painted, target)
        else:
            loss = terms["l1"] = F.l1_loss(painted, target)
        if self.lpips is not None and weights.perceptual:
            with self._autocast():
                terms["lpips"] = self.lpips(painted, target).mean()
            loss = loss + weights.perceptual * terms["lpips"]
        elif self.lpips is None and weights.sharpness:
            terms["sharpness"] = sharpness(painted, target)
            loss = loss + weights.sharpness * terms["sharpness"]
        terms["commitment"] = F.mse_loss(z, vectors.detach())
        loss = loss + weights.commitment * terms["commitment"]
        if not book.moving:
            loss = loss + book.settings.weight * F.mse_loss(vectors, z.detach())
        if judge is not None:
            judge.requires_grad_(False)
            with self._autocast():
                terms["adversarial"] = -judge(painted).float().mean()
            loss = loss + weights.adversarial * terms["adversarial"]
        return {"loss": loss, **terms}, painted

    def _autocast(self) -> torch.autocast:
        kind = torch.device(self.device).type
        return torch.autocast(kind, torch.bfloat16, enabled=self.settings.bf16)

    def measure(self, record: Record) -> None:
        """Measure the averaged weights on what is held out, and paint a grid."""
        learners = self.learners
        measured, sheet = evaluate(learners.average.model, self.data, self.device, self.lpips)
        learners.model.train()
        freeze_batch_norm(learners.model)
        if sheet is None:
            return
        record.write(self.done, measured)
        record.image(self.done, "held out", sheet)
        self.progress.show({"step": self.done, **measured})
        with atomic(self.out / "grids" / f"{self.done:06d}.png") as temporary:
            Image.fromarray(sheet).save(temporary, format="PNG")

    def stop_not_finite(self, step: int, values: dict[str, float]) -> None:
        """Write down what is known, and stop; the last save is from before this step."""
        bad = not_finite(self.learners.model)
        path = self.out / "not-finite.json"
        if self.ranks.rank == 0:
            report = {"step": step, **{k: str(v) for k, v in values.items()}, "not_finite": bad}
            with atomic(path) as file:
                file.write_text(json.dumps(report, indent=2) + "\n")
        raise UnimodalError(
            f"the loss is {values['loss']} (gradient norm {values['grad_norm']}) at step {step}; "
            f"{path} names the tensors: lower optimizer.lr (now {self.settings.optimizer.lr}) and "
            "start from the last save, with --init"
        )


def _batches(run: _Run) -> Generator[Tensor]:
    """This rank's frames [B,T,3,H,W] of each step to come, cut by threads while others are used."""
    settings = run.settings
    depth = AHEAD if run.device.startswith("cuda") else 1

    def cut(step: int) -> Tensor:
        crops = batch(
            run.data,
            settings.seed,
            step,
            frames=settings.batch,
            crop=settings.crop,
            clip_share=settings.clip_share,
            part=(run.ranks.rank, run.ranks.world),
        )
        return to_pixels(crops)

    steps = iter(range(run.done, settings.steps))
    with ThreadPoolExecutor(depth) as pool:
        coming = deque(pool.submit(cut, step) for step in islice(steps, depth))
        try:
            while coming:
                coming.extend(pool.submit(cut, step) for step in islice(steps, 1))
                yield coming.popleft().result().to(run.device, non_blocking=True)
        finally:
            pool.shutdown(cancel_futures=True)
