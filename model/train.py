"""One loop from shards to a decoder. Reads top to bottom: set up, step, report, save.

A step is a pure function of (weights, moments, settings, step number): the data comes from a
cursor, dropout from a seed per step. That makes resuming exact: on a CPU, an interrupted run
gives bit for bit the losses of one that was left alone.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from unimodal.model.blocks import prepare
from unimodal.model.checkpoint import (
    Learners,
    Saver,
    keep_inputs,
    latest_step,
    load_step,
    start,
    to_toml,
)
from unimodal.model.data import (
    KINDS,
    Batch,
    Cursor,
    DataSettings,
    Loader,
    Samples,
    coding,
    open_shards,
    share,
    validation,
)
from unimodal.model.decoder import Decoder, DecoderConfig, parameter_count
from unimodal.model.dpo import MEANS, PairBatch, Pairs, Position, Triplets, pair_loss
from unimodal.model.lora import adapt
from unimodal.model.loss import LossByKind, weighted_cross_entropy
from unimodal.model.optim import optimizers
from unimodal.model.parallel import Mesh, joined
from unimodal.model.plan import flops_per_token, peak
from unimodal.model.recipe import TrainSettings, check_resumed, learning_rate
from unimodal.model.records import read_about
from unimodal.model.samples import TASKS, draw, hashed
from unimodal.pipeline.errors import UnimodalError, UsageError
from unimodal.pipeline.files import atomic, sweep
from unimodal.pipeline.kinds import mistaken
from unimodal.pipeline.lock import first_rank_lock
from unimodal.pipeline.progress import Progress
from unimodal.tokenize.device import usable
from unimodal.tokenize.training import Interrupted, Record, WeightAverage, not_finite, signals

__all__ = ["Interrupted", "TrainSettings", "train"]

FIRST_PACE = 16
"""With `minutes`, the schedule is fitted to the pace at this step and at each doubling of it."""


@dataclass
class Clock:
    """Time and tokens of a run, across its resumptions."""

    step: int = 0
    """Steps done."""
    total: int = 0
    """Steps of the schedule."""
    tokens: int = 0
    elapsed_s: float = 0.0
    began: float = field(default_factory=time.perf_counter)

    def seconds(self) -> float:
        """Seconds of training so far, those of earlier processes included."""
        return self.elapsed_s + time.perf_counter() - self.began

    def fitting(self, steps: int, minutes: float) -> int:
        """Steps of a schedule, at most `steps`, that `minutes` allow at the pace so far."""
        seconds = self.seconds()
        left = (minutes * 60 - seconds) * self.step / seconds
        return min(steps, self.step + max(1, int(left)))


def train(
    shards: Sequence[Path],
    out: Path,
    settings: TrainSettings,
    *,
    init: Path | None = None,
    progress: Progress | None = None,
    resume: bool = True,
) -> Path:
    """Train on shard directories and return `out`, the checkpoint directory.

    `init` is a directory of weights to start from (see `unimodal.model.naming`). With `resume`, a
    run that `out` already holds is continued (or found finished), whatever `init` is; without,
    such a directory is refused. SIGTERM and Ctrl-C save and raise `Interrupted`. Raises
    `UnimodalError` for unusable shards or weights, changed settings or data, a loss that is not
    finite, and if another process writes to `out`.
    """
    progress = progress or Progress()
    with (
        first_rank_lock(out, progress),
        joined(settings.mesh, usable(settings.device)) as mesh,
    ):
        return _train(shards, out, settings, mesh, init, progress, resume)


def _train(
    shards: Sequence[Path],
    out: Path,
    settings: TrainSettings,
    mesh: Mesh,
    init: Path | None,
    progress: Progress,
    resume: bool,
) -> Path:
    progress = progress if mesh.is_main else Progress()
    mesh.check(settings.decoder, settings.accumulate)
    previous = latest_step(out)
    if previous is None:
        _must_be_ours(out)
    if previous is not None and not resume:
        raise UnimodalError(f"{out} already holds a run: resume it, or choose another directory")

    samples: Samples | Triplets
    if settings.objective == "dpo":
        samples = source = Triplets.behind(init if previous is None else out, shards)
        about = samples.about
    else:
        opened = open_shards(shards)
        share(opened, mesh)
        samples, source = Samples(opened, settings.data.styles), opened[0]
        about = _about(opened, samples, settings.data.context)
        _check_learned(samples, settings.data)
    out.mkdir(parents=True, exist_ok=True)
    if previous is not None:
        if read_about(out) != json.loads(json.dumps(about)):
            raise UnimodalError(
                f"the shards are not those that {out} was trained on: choose another directory"
            )
        check_resumed(out, previous, settings)
    elif settings.needs_init and init is None:
        raise UsageError(
            "this recipe goes on from trained weights: give --init DIR (or --set needs_init=false)"
        )
    learners = _learners(settings, samples.vocabulary.size, mesh)
    if previous is None:
        start(learners, settings.seed, init, about)
    if mesh.is_main:
        sweep(out)
        keep_inputs(out, source, previous is not None)
        with atomic(out / "data.json") as file:
            file.write_text(json.dumps(about, indent=2) + "\n")
        with atomic(out / "config.toml") as file:
            file.write_text(to_toml(settings.model_dump(mode="json")))
    losses = LossByKind((*KINDS, *MEANS) if isinstance(samples, Triplets) else KINDS)
    clock, cursor = _resumed(previous, learners, settings, mesh, losses, progress)
    loader: Loader | Pairs
    if isinstance(samples, Triplets):
        place = _place(Position, cursor, out)
        loader = Pairs(samples, settings.dpo, settings.data, settings.seed, place)
        loader.refer(learners.decoder, out / "reference.npy", mesh, previous is not None)
    else:
        loader = Loader(samples, settings.data, settings.seed, _place(Cursor, cursor, out))
    progress.note(_introduction(learners.decoder, loader, settings, mesh))
    run = _Run(out, settings, mesh, learners, loader, clock, losses, progress)
    run.peak = peak(mesh.device) if settings.precision == "bfloat16" else None
    log = settings.log
    if mesh.is_main:
        asked = settings.model_dump(mode="json")
        run.record = Record(out, clock.step, log.tensorboard, log.wandb, asked)
    progress.begin("train", clock.total, "steps")
    progress.advance("train", clock.step)
    try:
        save = settings.checkpoint
        run.saver = Saver(out, save.keep, save.background, mesh.world)
        with signals() as received, run.saver:
            run.steps(received)
    finally:
        progress.end("train")
        if run.record is not None:
            run.record.close()
    return out


def _resumed(
    previous: Path | None,
    learners: Learners,
    settings: TrainSettings,
    mesh: Mesh,
    losses: LossByKind,
    progress: Progress,
) -> tuple[Clock, dict[str, Any]]:
    """The clock and the place in the data that a run goes on from; fills learners and losses."""
    if previous is None:
        return Clock(total=settings.steps), {}
    state = load_step(previous, learners)
    clock = Clock(state["step"], settings.steps, state["tokens"], state["elapsed_s"])
    if settings.minutes is not None:
        same = state.get("asked") == [settings.steps, settings.minutes]
        total = state["total"] if same else clock.fitting(settings.steps, settings.minutes)
        clock.total = int(mesh.most(total))
    if mesh.leads:
        losses.restore(state["losses"])
    progress.note(f"resuming at step {clock.step} of {clock.total}")
    return clock, state["cursor"]


def _must_be_ours(out: Path) -> None:
    """Raise `UsageError` if `out` holds something else than a training that has not saved yet."""
    if why := mistaken(out, "checkpoint"):
        raise UsageError(f"{why}; choose another -o")
    names = {path.name for path in out.iterdir()} - {"run.lock"} if out.is_dir() else set()
    begun = {"vocabulary", "vision_tokenizer", "data.json", "config.toml"}
    if names and not names & begun and not all(name.endswith(".tmp") for name in names):
        raise UsageError(f"{out} is not empty and not a checkpoint: choose another -o")


def _learners(settings: TrainSettings, ids: int, mesh: Mesh) -> Learners:
    """Decoder, optimizers and average on this process's device, yet without values."""
    with torch.device("meta"):
        decoder = Decoder(DecoderConfig(settings.decoder, ids, settings.data.context), None)
    decoder.to(getattr(torch, settings.parameters))
    decoder.compute = getattr(torch, settings.precision)
    if settings.lora.rank:
        adapt(decoder, settings.lora)
    average = WeightAverage(decoder, settings.ema)
    for one in dict.fromkeys((decoder, average.model)):  # in one order on every process
        mesh.apply(one)
        one.to_empty(device=mesh.device)
    prepare(decoder, settings.recompute, settings.compile)
    return Learners(decoder, optimizers(decoder, settings.optimizer), average)


@dataclass
class _Run:
    """What the loop works on."""

    out: Path
    settings: TrainSettings
    mesh: Mesh
    learners: Learners
    loader: Loader | Pairs
    clock: Clock
    losses: LossByKind
    """Of this process's tokens; sums over the mesh are reported and saved."""
    progress: Progress
    record: Record | None = None
    """Kept by the main process alone."""
    saver: Saver = field(init=False)
    peak: float | None = None
    """Operations per second of this process's device, where they are known."""
    operations: float = 0.0  # of this process since the last record
    _validation: list[Batch] | None = None

    def steps(self, received: list[int]) -> None:
        """Run to the end of the schedule, or until a signal is in `received`."""
        clock, settings = self.clock, self.settings
        mark, marked = clock.seconds(), clock.tokens
        while clock.step < clock.total:
            self.saver.check()
            values = self.step()
            clock.step += 1
            if settings.minutes is not None:
                self.fit_schedule(settings.minutes)
            last = clock.step >= clock.total
            if last or clock.step % settings.log.every == 0:
                seconds = clock.seconds()
                passed = max(1e-9, seconds - mark)
                values["tokens_per_s"] = round((clock.tokens - marked) / passed, 1)
                if self.peak is not None:
                    values["mfu"] = round(self.operations / passed / self.peak, 4)
                mark, marked, self.operations = seconds, clock.tokens, 0.0
                self.report(values)
            self.progress.advance("train")
            if _due(clock.step, settings.log.validate_every, last):
                self.validate()
            if settings.log.sample_every and _due(clock.step, settings.log.sample_every, last):
                self.sample()
            stop = int(self.mesh.most(received[0] if received else 0))
            if last or stop or clock.step % settings.checkpoint.every == 0:
                self.save()
            if stop and not last:
                self.saver.wait()
                name = signal.Signals(stop).name
                raise Interrupted(
                    f"stopped by {name} at step {clock.step} of {clock.total}; saved in "
                    f"{self.out}: run the same command again to go on",
                    stop,
                )

    def step(self) -> dict[str, float]:
        """One optimizer step; returns loss, lr, grad_norm and fill."""
        settings, clock, decoder = self.settings, self.clock, self.learners.decoder
        mesh = self.mesh
        if settings.decoder.dropout:  # each process draws masks of its own
            who = str(mesh.rank or "")
            drawn = draw(settings.seed, clock.step, hashed(who), "dropout")[0]
            torch.manual_seed(int(drawn * 2**63))
        decoder.train()
        with mesh.together():  # a damaged shard is met by one process alone
            packs = self.loader.step(settings.accumulate, mesh.data_rank, mesh.data_world)
        for pack in packs if self.peak is not None else ():
            ids = decoder.config.vocabulary_size
            each = sum(flops_per_token(settings, ids, pack.lengths)) * len(pack.ids)
            self.operations += each / (settings.mesh.context * settings.mesh.tensor)
        batches = [mesh.split(pack).to(mesh.device) for pack in packs]
        weight, tokens = mesh.totals(  # of the whole step
            sum(float(batch.weights.sum()) for batch in batches),
            sum(len(pack.ids) for pack in packs) / settings.mesh.context,
        )
        clock.tokens += round(tokens)
        lr = learning_rate(clock.step, clock.total, settings.optimizer)
        fill = round(tokens / (settings.accumulate * settings.data.context), 4)
        if not weight:  # on every process alike: nothing in these packs is a target
            self.learners.stepped(clock.step + 1)
            return {"loss": 0.0, "lr": lr, "grad_norm": 0.0, "fill": fill}
        total = 0.0
        for batch in batches:
            loss = self.loss(decoder, batch, self.losses)
            (loss / weight).backward()
            total += float(loss.detach()) / weight
        (total,) = mesh.totals(total)
        norm = mesh.clip(decoder.parameters(), settings.optimizer.clip)
        if not torch.isfinite(torch.tensor([total, norm])).all():
            self.stop_not_finite(batches, total, norm)
        for optimizer in self.learners.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.learners.average.update(clock.step)
        return {"loss": total, "lr": lr, "grad_norm": norm, "fill": fill}

    def write(self, values: dict[str, float], shown: Mapping[str, Any] | None = None) -> None:
        """Record and show `values`, and `shown` as well."""
        if self.record is not None:
            self.record.write(self.clock.step, values)
        self.progress.show({"step": self.clock.step, **(shown or {}), **values})

    def loss(self, decoder: Decoder, batch: Batch, tally: LossByKind) -> torch.Tensor:
        """Sum of a pack's weighted losses; each goes to `tally` by its kind."""
        if isinstance(batch, PairBatch):
            return pair_loss(decoder, batch, tally, self.settings.dpo)
        hidden = decoder.hidden(batch.ids, batch.positions, decoder.packed(batch.lengths))
        head = decoder.lm_head.weight
        loss, losses = weighted_cross_entropy(hidden, head, batch.targets, batch.weights)
        tally.add(losses, batch.kinds, batch.weights)
        return loss

    def report(self, values: dict[str, float]) -> None:
        """Write and show a record: this step's loss, means by kind since the last record."""
        means = self.losses.summed(self.mesh.sum).means()
        by_kind = {f"loss/{name}": mean for name, mean in means.items()}
        clock = self.clock
        record = {
            **values,
            **by_kind,
            "tokens": clock.tokens,
            "epoch": self.loader.cursor.epoch,
            "elapsed_s": round(clock.seconds(), 3),
        }
        if isinstance(self.loader, Loader) and self.loader.plan.skipped:
            record["skipped"] = self.loader.plan.skipped  # of this window, too long for the context
        self.losses.clear()
        self.write(record, {"steps": clock.total})

    def validate(self) -> None:
        """Mean loss by kind over the validation split, without dropout."""
        if self._validation is None:
            data, limit = self.settings.data, self.settings.log.validate_samples
            samples = self.loader.samples
            if isinstance(samples, Triplets):  # they have no split of their own
                self._validation = []
            else:
                self._validation = validation(samples, data, limit)
        if not self._validation:
            return
        mesh, decoder = self.mesh, self.learners.average.model.eval()
        losses = LossByKind(KINDS)
        with torch.no_grad():
            for pack in mesh.deal(self._validation):
                self.loss(decoder, mesh.split(pack).to(mesh.device), losses)
        means = losses.summed(mesh.sum).means()
        self.write({f"validation/{name}": mean for name, mean in means.items()})

    def sample(self) -> None:
        """Draw a grid of pictures, to see what the figures mean."""
        from unimodal.model.canvas import contact_sheet
        from unimodal.model.sample import Sampler

        decoder = self.mesh.assembled(self.learners.average.model.eval())
        if decoder is None or self.record is None:
            return
        samples = self.loader.samples
        prompts = list(self.settings.log.sample_prompts)
        if isinstance(samples, Triplets):
            prompts = prompts or samples.prompts[:8]
        elif not prompts:
            for split in ("train", "val"):
                rows = [row for row in samples.rows[split].tolist() if samples.captions(row)][:4]
                prompts += [samples.caption(row, 0) for row in rows]
        if not prompts:
            return
        sampler = Sampler.for_checkpoint(self.out, decoder)
        try:
            pictures = sampler.images(prompts, seed=self.settings.seed)
        except UnimodalError as error:  # shards of clips alone, a caption that leaves no room
            self.progress.note(f"no samples at step {self.clock.step}: {error}")
            return
        sheet = contact_sheet([row[0] for row in pictures])
        path = self.out / "samples" / f"step-{self.clock.step:08d}.png"
        path.parent.mkdir(exist_ok=True)
        from PIL import Image

        with atomic(path) as temporary:
            Image.fromarray(sheet).save(temporary, format="png")
        self.record.image(self.clock.step, "samples", sheet)

    def save(self) -> None:
        """Write a checkpoint of the present step."""
        clock = self.clock
        state = {
            "step": clock.step,
            "total": clock.total,
            "asked": [self.settings.steps, self.settings.minutes],
            "tokens": clock.tokens,
            "elapsed_s": clock.seconds(),
            "cursor": asdict(self.loader.cursor),
            "losses": self.losses.summed(self.mesh.sum).state(),
        }
        self.saver.save(clock.step, self.learners, state)

    def fit_schedule(self, minutes: float) -> None:
        """Choose the number of steps that the measured pace allows."""
        clock = self.clock
        doublings = clock.step // FIRST_PACE
        if clock.step % FIRST_PACE or doublings & (doublings - 1):
            return
        clock.total = int(self.mesh.most(clock.fitting(self.settings.steps, minutes)))
        self.progress.begin("train", clock.total, "steps")
        self.progress.advance("train", clock.step - 1)

    def stop_not_finite(self, batches: list[Batch], loss: float, norm: float) -> None:
        """Write down what is known of a loss that is not finite, and stop before the weights go.

        The last checkpoint is from before this step.
        """
        report = {
            "step": self.clock.step,
            "loss": str(loss),
            "grad_norm": str(norm),
            "lr": learning_rate(self.clock.step, self.clock.total, self.settings.optimizer),
            "samples": [key for batch in batches for key in batch.keys],
            "not_finite": not_finite(self.learners.decoder),
        }
        rank = self.mesh.rank
        path = self.out / (f"not-finite-{rank}.json" if rank else "not-finite.json")
        with atomic(path) as file:
            file.write_text(json.dumps(report, indent=2) + "\n")
        raise UnimodalError(
            f"the loss is {loss} (gradient norm {norm}) at step {self.clock.step}; {path} names "
            "the samples and tensors: lower optimizer.lr or raise optimizer.warmup, and resume"
        )


P = TypeVar("P", Position, Cursor)


def _place(kind: type[P], saved: Mapping[str, Any], out: Path) -> P:
    """The place in the data that a step of `out` saved."""
    try:
        return kind(**saved)
    except TypeError as error:
        raise UnimodalError(
            f"{out} was saved by another version, whose place in the data this one cannot read: "
            f"start anew in another directory with --init {out}"
        ) from error


def _check_learned(samples: Samples, data: DataSettings) -> None:
    """Raise `UsageError` if no target of any document has a weight."""
    rows = samples.rows["train"]
    texts = data.understanding > 0 or (data.caption_weight > 0 and data.caption_dropout < 1)
    told = texts and samples.captions(rows).any()
    if len(rows) and not (data.vision_weight or told or samples.tasks[rows].any()):
        raise UsageError(
            "nothing would be learned: data.vision_weight is 0 and no text of these shards is a "
            "target; raise it, data.caption_weight or data.understanding, or give captions"
        )


def _about(opened: Sequence[Any], samples: Samples, context: int) -> dict[str, Any]:
    """What a checkpoint must remember of its data."""
    counts = np.bincount(samples.tasks[samples.rows["train"]], minlength=len(TASKS)).tolist()
    tasks = {name: count for name, count in zip(TASKS, counts, strict=True) if count}
    return {
        "vision_tokenizer": coding(opened[0].manifest),
        "vocabulary": dict(opened[0].manifest["vocabulary"]),
        "samples": {split: len(rows) for split, rows in samples.rows.items()},
        "shards": samples.digests(),
        "grids": samples.grids(context),
    } | ({"tasks": tasks} if tasks.keys() - {"caption"} else {})


def _introduction(
    decoder: Decoder, loader: Loader | Pairs, settings: TrainSettings, mesh: Mesh
) -> str:
    count = parameter_count(decoder)
    millions = ", ".join(f"{name} {number / 1e6:.2f} M" for name, number in count.items())
    if isinstance(loader, Pairs):
        data = str(loader)
    else:
        plan, rows = loader.plan, loader.samples.rows
        context = settings.data.context
        left_out = plan.left_out(context)
        data = (
            f"{len(rows['train'])} training and {len(rows['val'])} validation samples; "
            f"packs {plan.fill(context):.1%} full" + f"\n{left_out}" * bool(left_out)
        )
    return (
        f"decoder {sum(count.values()) / 1e6:.2f} M parameters ({millions}) on {mesh.device}, "
        f"{settings.precision}; {data}"
    )


def _due(step: int, every: int, last: bool) -> bool:
    return bool(every) and (last or step % every == 0)
