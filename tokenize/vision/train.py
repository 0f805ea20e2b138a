"""Train a vision tokenizer on one machine: pictures and short clips in, a loadable directory out.

    unimodal train-tokenizer photos/ icons/ film.mp4 -o tokenizer

Three phases: an autoencoder without a bottleneck for `warmup` steps, so that the codebook can start
as the k-means centres of useful latents; then the quantized autoencoder, whose codebook follows the
latents by exponential moving averages (van den Oord et al. 2017, appendix A.1) and whose unused
entries are moved onto random latents; the learning rate falls along a cosine.

The output directory is a tokenizer at every save (model.safetensors, config.json) and also holds
what a resumed training needs (state.safetensors), metrics.jsonl and reconstruction grids.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from unimodal.pipeline.errors import UnimodalError, UsageError
from unimodal.pipeline.files import atomic
from unimodal.pipeline.progress import Progress
from unimodal.pipeline.settings import Settings
from unimodal.tokenize.vision import bank as banks
from unimodal.tokenize.vision import metrics
from unimodal.tokenize.vision.init import start_from_colour
from unimodal.tokenize.vision.losses import sharpness
from unimodal.tokenize.vision.movq import MoVQ, MoVQConfig
from unimodal.tokenize.vision.pixels import to_pixels, to_uint8
from unimodal.tokenize.vision.tokenizer import VisionTokenizer, save_config

REVIVE_EVERY = 50  # steps between two looks for dead codes
WEIGHT_DECAY = 1e-4
DEAD = 0.02  # expected uses a step under which a code counts as dead


class Network(Settings):
    """Shape of the network (see `MoVQConfig`)."""

    codebook_size: int = Field(default=4096, ge=2)
    ch: int = 32
    ch_mult: tuple[int, ...] = (1, 1, 2, 4)
    num_res_blocks: int = Field(default=1, ge=1)


class TokenizerSettings(Settings):
    """Settings of `unimodal train-tokenizer`."""

    network: Network = Network()
    steps: int = Field(default=4000, ge=1)
    batch: int = Field(default=16, ge=1)
    """Crops of a step; a step of clips takes a quarter of it, of four frames each."""
    crop: int = Field(default=64, ge=16, multiple_of=8)
    """Pixels; side of a training crop, a multiple of 8."""
    clip_share: float = Field(default=0.15, ge=0, le=1)
    """Share of the steps that see clips instead of pictures, where there are clips."""
    lr: float = Field(default=2e-3, gt=0)
    min_lr: float = 2e-5
    lr_warmup: int = Field(default=100, ge=0)
    """Steps over which the learning rate rises."""
    warmup: int = Field(default=100, ge=0)
    """Steps without a codebook."""
    grad_clip: float = 1.0
    sharpness: float = Field(default=0.3, ge=0)
    """Weight of the local gradient term, against 1 for L2."""
    commitment: float = Field(default=0.05, ge=0)
    """Weight of the squared distance of latents from their codes."""
    codebook_decay: float = 0.99
    short_side: int = Field(default=512, ge=64)
    """Pixels; larger pictures are reduced to it when they are read (clips to half of it)."""
    fps: float = Field(default=12.0, gt=0)
    """Frames per second of training clips."""
    val_fraction: float = Field(default=0.05, ge=0, lt=1)
    """Share of the sources, by a hash of their name, that training never sees."""
    memory_gib: float = Field(default=6.0, gt=0)
    """Decoded pictures held in memory at most."""
    seed: int = 0
    save_every: int = Field(default=250, ge=1)
    """Steps between two saves, each with a measurement on held-out pictures and a grid."""
    bf16: bool = True
    """Run the 2-D trunk in bfloat16 while training (the latents and the codebook stay float32)."""


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

    `init` is a tokenizer directory whose weights are the start (its codebook included, so no
    warm-up is done). Returns `out`. Raises `UnimodalError` for a state of other settings.
    """
    progress = progress or Progress()
    torch.manual_seed(settings.seed)
    try:
        cfg = MoVQConfig(**settings.network.model_dump(), attn_resolutions=_lowest(settings))
    except ValueError as error:
        raise UsageError(f"setting network: {error}") from error
    if settings.crop % cfg.spatial_factor:
        raise UsageError(f"setting crop = {settings.crop}: a multiple of {cfg.spatial_factor}")
    inherited = None if init is None else _inherited(init, cfg)
    model = MoVQ(cfg)
    start_from_colour(model)
    spans = banks.list_spans(inputs)
    data = banks.load_bank(
        spans,
        short_side=settings.short_side,
        fps=settings.fps,
        val_fraction=settings.val_fraction,
        limit_bytes=int(settings.memory_gib * 2**30),
        progress=progress,
    )
    model.to(device).train()
    freeze_batch_norm(model)
    book = MovingCodebook(model, settings.codebook_decay)
    optimizer = Optimizer(model, settings)
    out.mkdir(parents=True, exist_ok=True)
    start = _resume(out, settings, model, optimizer, book, device)
    warmup = settings.warmup
    if (out / "inherited").exists():
        warmup = 0
    elif inherited is not None:
        warmup = 0
        if start == 0:
            (out / "inherited").touch()  # a resumed training needs no warm-up either
            model.load_state_dict(inherited)
            book.adopt()

    progress.note(
        f"{len(data.pictures)} pictures and {len(data.clips)} clips to train on, "
        f"{len(data.held_pictures)} and {len(data.held_clips)} held out; "
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters"
    )
    progress.begin("steps", settings.steps, "steps")
    progress.advance("steps", start)
    clock = time.monotonic()
    for step in range(start, settings.steps):
        lr = _rate(step, settings)
        rng = np.random.default_rng([settings.seed, step])
        pixels = to_pixels(_batch(data, rng, settings)).to(device)
        if step == warmup and step > 0:
            with torch.no_grad():
                book.start([model.latents(p) for p in _sample(data, settings, device)])
        values = _step(model, book, pixels, settings, quantized=step >= warmup)
        loss = values["loss"]
        if not torch.isfinite(loss):
            raise UnimodalError(
                f"{out}: the loss of step {step} is {float(loss)}; lower lr (now {settings.lr}) "
                "and run the same command again: it resumes from the last save"
            )
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip)
        optimizer.step(lr)
        if step >= warmup and step % REVIVE_EVERY == REVIVE_EVERY - 1:
            book.revive(rng)
        progress.advance("steps")
        done = step + 1
        if done % 10 == 0:
            shown = {name: value.item() for name, value in values.items()}
            progress.show({"step": done, "lr": lr, **shown})
        if done % settings.save_every == 0 or done == settings.steps:
            measured = evaluate(model, data, out / "grids" / f"{done:06d}.png", device)
            model.train()
            freeze_batch_norm(model)
            row = {"step": done, "seconds": round(time.monotonic() - clock, 1), "lr": lr}
            row |= {name: value.item() for name, value in values.items()} | measured
            with (out / "metrics.jsonl").open("a") as log:
                log.write(json.dumps(row) + "\n")
            progress.show(row)
            _save(out, settings, model, optimizer, book, done)
    progress.end("steps")
    return out


def _lowest(settings: TokenizerSettings) -> tuple[int, ...]:
    """Attention at the lowest resolution alone, as released."""
    return (len(settings.network.ch_mult) - 1,)


def _inherited(init: Path, cfg: MoVQConfig) -> dict[str, Tensor]:
    """Weights to start from; raises `UsageError` if their network has another shape."""
    model = VisionTokenizer.load(init).model
    if model.cfg != cfg:
        theirs, ours = model.cfg.to_dict(), cfg.to_dict()
        other = ", ".join(f"{k} {theirs[k]}, not {ours[k]}" for k in ours if ours[k] != theirs[k])
        raise UsageError(f"{init}: is of another shape ({other}); set network.… to its values")
    return model.state_dict()


def _step(
    model: MoVQ,
    book: MovingCodebook,
    pixels: Tensor,
    settings: TokenizerSettings,
    quantized: bool,
) -> dict[str, Tensor]:
    """Losses of one batch of frames [B,T,3,H,W]."""
    image = pixels.shape[1] == 1
    with torch.autocast(pixels.device.type, torch.bfloat16, enabled=settings.bf16):
        z = model.latents(pixels)
        zq, commit = z, z.new_zeros(())
        if quantized:
            codes = model.quantize(z.detach())
            vectors = model.quantize.lookup(codes).detach()
            book.update(z.detach(), codes)
            commit = (z - vectors).square().mean()
            zq = z + (vectors - z).detach()  # straight through
        painted = model.paint(zq, image).float()
    painted, target = painted.flatten(0, 1), pixels.flatten(0, 1)
    l2 = (painted - target).square().mean()
    sharp = sharpness(painted, target)
    loss = l2 + settings.sharpness * sharp + settings.commitment * commit
    return {
        "loss": loss,
        "l2": l2.detach(),
        "sharpness": sharp.detach(),
        "commitment": commit.detach(),
    }


class Optimizer:
    """Muon for convolutions, AdamW for everything else, under one learning rate.

    Muon (Jordan 2024) makes the update of a matrix orthogonal. A convolution [out, in, ...] is the
    matrix [out, in * ...]; scaled to AdamW's usual step size, both take the same learning rate.
    """

    def __init__(self, model: nn.Module, settings: TokenizerSettings) -> None:
        trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        wide = [(n, p) for n, p in trained if p.ndim > 1 and min(p.shape[0], p[0].numel()) >= 32]
        # torch's Muon takes matrices only: these share their storage with the weights.
        self.matrices = {n: (p, nn.Parameter(p.detach().view(len(p), -1))) for n, p in wide}
        self.rest = {n: p for n, p in trained if n not in self.matrices}
        self.muon = torch.optim.Muon(
            [m for _, m in self.matrices.values()],
            lr=settings.lr,
            weight_decay=WEIGHT_DECAY,
            adjust_lr_fn="match_rms_adamw",
        )
        self.adamw = torch.optim.AdamW(
            self.rest.values(),
            lr=settings.lr,
            betas=(0.9, 0.95),
            weight_decay=WEIGHT_DECAY,
            fused=True,
        )

    def step(self, lr: float) -> None:
        """One update at learning rate `lr`; gradients are used up."""
        for weight, matrix in self.matrices.values():
            matrix.grad = None if weight.grad is None else weight.grad.view_as(matrix)
            weight.grad = None
        for optimizer in (self.muon, self.adamw):
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def _each(self) -> Iterator[tuple[str, torch.optim.Optimizer, nn.Parameter]]:
        for name, (_, matrix) in self.matrices.items():
            yield name, self.muon, matrix
        for name, parameter in self.rest.items():
            yield name, self.adamw, parameter

    def state(self) -> dict[str, Tensor]:
        """Moments by `parameter name/key`."""
        return {
            f"{name}/{key}": torch.as_tensor(value)
            for name, optimizer, parameter in self._each()
            for key, value in optimizer.state.get(parameter, {}).items()
        }

    def load(self, state: dict[str, Tensor]) -> None:
        """Take the moments that `state()` gave."""
        values: dict[str, dict[str, Tensor]] = {}
        for key, value in state.items():
            name, _, moment = key.rpartition("/")
            values.setdefault(name, {})[moment] = value
        for name, optimizer, parameter in self._each():
            if name in values:
                optimizer.state[parameter] = values[name]


class MovingCodebook:
    """Codebook entries as moving averages of the latents that chose them."""

    def __init__(self, model: MoVQ, decay: float) -> None:
        self.weight = model.quantize.embedding.weight
        self.weight.requires_grad_(False)
        self.decay = decay
        self.adopt()
        self.recent = torch.zeros_like(self.weight)  # latents of the last batch, for revival

    def adopt(self) -> None:
        """Begin from the entries as they are, each as if used once a step."""
        self.count = torch.ones_like(self.weight[:, 0])
        self.total = self.weight.detach().clone()

    @torch.no_grad()
    def start(self, latents: Sequence[Tensor]) -> None:
        """Begin from the k-means centres of latents [B,C,t,h,w]: eight rounds of Lloyd."""
        rows = torch.cat([z.movedim(1, -1).flatten(0, -2) for z in latents])
        size = len(self.weight)
        pick = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
        centres = rows[pick[torch.arange(size) % len(rows)].to(rows.device)].clone()
        for _ in range(8):
            nearest = torch.cat([torch.cdist(r, centres).argmin(1) for r in rows.split(8192)])
            count = torch.bincount(nearest, minlength=size).unsqueeze(1)
            total = torch.zeros_like(centres).index_add_(0, nearest, rows)
            centres = torch.where(count > 0, total / count.clamp_min(1), centres)
        self.weight.copy_(centres)
        self.adopt()

    @torch.no_grad()
    def update(self, z: Tensor, codes: Tensor) -> None:
        """Move the chosen entries towards the latents z [B,C,t,h,w] that chose them."""
        rows, flat = z.movedim(1, -1).flatten(0, -2), codes.flatten()
        count = torch.bincount(flat, minlength=len(self.weight)).to(rows.dtype)
        total = torch.zeros_like(self.total).index_add_(0, flat, rows)
        self.count.mul_(self.decay).add_(count, alpha=1 - self.decay)
        self.total.mul_(self.decay).add_(total, alpha=1 - self.decay)
        alive = self.count > 1e-4
        self.weight[alive] = self.total[alive] / self.count[alive].unsqueeze(1)
        self.recent = rows

    @torch.no_grad()
    def revive(self, rng: np.random.Generator) -> int:
        """Put entries that are hardly used onto latents of the last batch; returns how many."""
        dead = (self.count < DEAD).nonzero().flatten()
        if len(dead):
            pick = torch.from_numpy(rng.integers(len(self.recent), size=len(dead)))
            chosen = self.recent[pick.to(self.recent.device)]
            self.weight[dead] = chosen
            self.count[dead] = 5 * DEAD
            self.total[dead] = chosen * 5 * DEAD
        return len(dead)


def freeze_batch_norm(model: nn.Module) -> None:
    """Keep BatchNorm at its stored statistics, so that training and use compute the same."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm3d):
            module.eval()


def _batch(data: banks.Bank, rng: np.random.Generator, settings: TokenizerSettings) -> np.ndarray:
    clips = bool(data.clips) and (rng.random() < settings.clip_share or not data.pictures)
    if clips:
        return banks.clip_batch(data, rng, max(1, settings.batch // 4), settings.crop)
    return banks.picture_batch(data, rng, settings.batch, settings.crop)


def _sample(data: banks.Bank, settings: TokenizerSettings, device: str) -> Iterator[Tensor]:
    """Enough batches for k-means: about sixteen latents an entry."""
    latents = settings.batch * (settings.crop // 8) ** 2
    for i in range(math.ceil(16 * settings.network.codebook_size / latents)):
        rng = np.random.default_rng([settings.seed, 1 << 30, i])
        yield to_pixels(_batch(data, rng, settings)).to(device)


def _rate(step: int, settings: TokenizerSettings) -> float:
    """Linear rise, then cosine to `min_lr`."""
    if step < settings.lr_warmup:
        return settings.lr * (step + 1) / settings.lr_warmup
    t = (step - settings.lr_warmup) / max(1, settings.steps - settings.lr_warmup)
    return settings.min_lr + (settings.lr - settings.min_lr) * (1 + math.cos(math.pi * t)) / 2


@torch.no_grad()
def evaluate(model: MoVQ, data: banks.Bank, grid: Path, device: str) -> dict[str, float]:
    """PSNR, SSIM, kept gradient energy and codebook use on held-out material; writes a grid.

    Up to 24 pictures (centre squares, sides reduced to 256 at most) and 8 clips.
    """
    model.eval()
    rows: list[tuple[np.ndarray, np.ndarray]] = []
    found: dict[str, list[float]] = {"psnr": [], "ssim": [], "energy": []}
    used: list[Tensor] = []
    for picture in data.held_pictures[:24]:
        original = _square(picture)
        pixels = to_pixels(original)[None, None].to(device)
        codes = model.encode(pixels)
        painted = to_uint8(model.decode(codes, image=True)[0, 0])
        a, b = _tensor(original), _tensor(painted)
        found["psnr"].append(float(metrics.psnr(a, b)))
        found["ssim"].append(float(metrics.ssim(a, b)))
        energy = metrics.gradient_energy(b) / metrics.gradient_energy(a).clamp_min(1e-6)
        found["energy"].append(float(energy))
        used.append(codes.flatten())
        rows.append((original, painted))
    video = []
    for clip in data.held_clips[:8]:
        height, width = (side // 8 * 8 for side in clip.shape[1:3])
        original = clip[:, :height, :width]
        painted = to_uint8(model.decode(model.encode(to_pixels(original)[None].to(device)))[0])
        video.append(float(metrics.psnr(_tensor(original), _tensor(painted)).mean()))
        rows.append((original[-1], painted[-1]))
    measured = {f"val_{name}": float(np.mean(v)) for name, v in found.items() if v}
    if used:
        share, perplexity = metrics.codebook_usage(torch.cat(used), model.cfg.codebook_size)
        measured |= {"val_usage": share, "val_perplexity": perplexity}
    if video:
        measured["val_video_psnr"] = float(np.mean(video))
    _grid(rows[:24], grid)
    return measured


def _square(picture: np.ndarray) -> np.ndarray:
    side = min(picture.shape[:2])
    top, left = (picture.shape[0] - side) // 2, (picture.shape[1] - side) // 2
    cut = Image.fromarray(picture[top : top + side, left : left + side])
    size = min(256, side // 8 * 8)
    return np.asarray(cut.resize((size, size), Image.Resampling.BICUBIC))


def _tensor(pixels: np.ndarray) -> Tensor:
    frames = pixels if pixels.ndim == 4 else pixels[None]
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(frames, -1, 1))).float()


def _grid(rows: Sequence[tuple[np.ndarray, np.ndarray]], path: Path) -> None:
    """Original and reconstruction, side by side, six pairs to a row of 128-pixel cells."""
    if not rows:
        return
    cell = 128
    sheet = Image.new("RGB", (12 * cell, math.ceil(len(rows) / 6) * cell), "white")
    for i, pair in enumerate(rows):
        for j, pixels in enumerate(pair):
            image = Image.fromarray(pixels)
            image.thumbnail((cell, cell))
            sheet.paste(image, (((i % 6) * 2 + j) * cell, i // 6 * cell))
    with atomic(path) as temporary:
        sheet.save(temporary, format="PNG")


def _save(
    out: Path,
    settings: TokenizerSettings,
    model: MoVQ,
    optimizer: Optimizer,
    book: MovingCodebook,
    step: int,
) -> None:
    state = {f"model.{name}": t for name, t in model.state_dict().items()}
    state |= {f"optimizer.{name}": t for name, t in optimizer.state().items()}
    state |= {"book.count": book.count, "book.total": book.total}
    record = {"step": step, "settings": settings.model_dump(mode="json")}
    # The state is one file, with the step inside, so that no mixture of two saves can be resumed.
    with atomic(out / "state.safetensors") as temporary:
        tensors = {name: t.detach().cpu().contiguous() for name, t in state.items()}
        save_file(tensors, temporary, metadata={"train": json.dumps(record, sort_keys=True)})
    with atomic(out / "model.safetensors") as temporary:
        save_file({n: t.cpu().contiguous() for n, t in model.state_dict().items()}, temporary)
    save_config(out, model.cfg)


def _resume(
    out: Path,
    settings: TokenizerSettings,
    model: MoVQ,
    optimizer: Optimizer,
    book: MovingCodebook,
    device: str,
) -> int:
    """Load the last save of `out`, if there is one; returns the step to go on from."""
    path = out / "state.safetensors"
    if not path.exists():
        return 0
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        record = json.loads(file.metadata()["train"])
    free = {"steps", "save_every"}  # may change between two runs of one training
    before = {k: v for k, v in record["settings"].items() if k not in free}
    now = {k: v for k, v in settings.model_dump(mode="json").items() if k not in free}
    changed = sorted(k for k in now if now[k] != before.get(k))
    if changed:
        raise UnimodalError(
            f"{out}: was trained with other settings ({', '.join(changed)}); give another -o to "
            "start anew, with --init to start from these weights"
        )
    state = load_file(path, device=device)
    model.load_state_dict({k[6:]: v for k, v in state.items() if k.startswith("model.")})
    optimizer.load({k[10:]: v for k, v in state.items() if k.startswith("optimizer.")})
    book.count, book.total = state["book.count"], state["book.total"]
    return int(record["step"])
