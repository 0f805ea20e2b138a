"""The vision tokenizer as everything else uses it: pixels to codes, codes to pixels, files.

A tokenizer directory holds config.json and model.safetensors, under the original names
(BAAI/Emu3-VisionTokenizer) or those of transformers' `Emu3VQVAE`. `small` is the one that ships
with the package.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from unimodal.pipeline.errors import UnimodalError, UsageError
from unimodal.pipeline.files import atomic
from unimodal.tokenize.vision.movq import MoVQ, MoVQConfig
from unimodal.tokenize.vision.weights import from_transformers, is_transformers

SHIPPED = {"small": Path(__file__).parent / "small"}
GROUP = 4  # frames of one latent frame
_ALIASES = {  # names in transformers' config.json
    "base_channels": "ch",
    "channel_multiplier": "ch_mult",
    "latent_channels": "z_channels",
}


class VisionTokenizer:
    """A frozen tokenizer, always in float32: a rounded latent is another code."""

    def __init__(self, model: MoVQ) -> None:
        self.model = model.float().eval().requires_grad_(False)
        self.digest = _digest(model)

    @classmethod
    def load(cls, name: str | Path, device: str = "cpu") -> VisionTokenizer:
        """Load a shipped tokenizer by name, or a directory; raises `UnimodalError`."""
        directory = SHIPPED.get(str(name), Path(name))
        if not (directory / "config.json").exists():
            raise UsageError(
                f"{name}: no vision tokenizer; give one of {', '.join(SHIPPED)}, or a directory "
                "with config.json and model.safetensors"
            )
        model = MoVQ(_read_config(directory / "config.json"))
        files = sorted(directory.glob("*.safetensors"))
        files = [f for f in files if f.name != "state.safetensors"]  # a trainer's, not weights
        if not files:
            raise UnimodalError(f"{directory}: no *.safetensors with the tokenizer's weights")
        state: dict[str, Tensor] = {}
        for file in files:
            try:
                state |= load_file(file)
            except (OSError, SafetensorError) as error:
                raise UnimodalError(f"{file} cannot be read ({error}): copy it again") from error
        if is_transformers(state):
            state = from_transformers(state)
        _check(directory, model, state)
        model.load_state_dict(state)
        return cls(model.to(device))

    @property
    def codebook_size(self) -> int:
        """Number of different codes."""
        return self.model.cfg.codebook_size

    @property
    def spatial_factor(self) -> int:
        """Pixels per code along each side."""
        return self.model.cfg.spatial_factor

    @torch.no_grad()
    def encode(self, pixels: Tensor, joint: bool = False) -> Tensor:
        """Codes of frames in [-1, 1].

        `pixels`: float [B, T, 3, H, W], T = 1 for images, else a multiple of 4, sides multiples of
        8. Returns int64 [B, T', H/8, W/8], T' = 1 for images, else T/4. The groups of four frames
        are encoded each by itself, as the released demo does; `joint` lets later groups see
        earlier ones, which gives other codes.
        """
        batch, frames = pixels.shape[:2]
        if frames > 1 and frames % GROUP:
            raise ValueError(f"{frames} frames: give 1 (images) or a multiple of {GROUP}")
        pixels = pixels.to(self._device, torch.float32).contiguous()
        if frames == 1 or joint:
            return self.model.encode(pixels)
        groups = pixels.view(batch * (frames // GROUP), GROUP, *pixels.shape[2:])
        return self.model.encode(groups).view(batch, frames // GROUP, *self._grid(pixels))

    @torch.no_grad()
    def decode(self, codes: Tensor, image: bool = False, joint: bool = False) -> Tensor:
        """Frames of codes int64 [B, T', h, w]: float32 [B, 4 T', 3, 8h, 8w], not clipped.

        `image` (T' = 1) renders the one frame that a still image is: [B, 1, 3, 8h, 8w].
        """
        codes = codes.to(self._device)
        batch, latent_frames = codes.shape[:2]
        if image or joint:
            return self.model.decode(codes, image)
        groups = codes.reshape(batch * latent_frames, 1, *codes.shape[2:])
        painted = self.model.decode(groups)
        return painted.view(batch, latent_frames * GROUP, *painted.shape[2:])

    def save(self, directory: Path) -> None:
        """Write config.json and model.safetensors under the original names."""
        directory.mkdir(parents=True, exist_ok=True)
        with atomic(directory / "model.safetensors") as temporary:
            save_file({n: t.contiguous() for n, t in self.model.state_dict().items()}, temporary)
        save_config(directory, self.model.cfg)

    @property
    def _device(self) -> torch.device:
        return self.model.quantize.embedding.weight.device

    def _grid(self, pixels: Tensor) -> tuple[int, int]:
        factor = self.spatial_factor
        return pixels.shape[-2] // factor, pixels.shape[-1] // factor


def save_config(directory: Path, cfg: MoVQConfig) -> None:
    """Write config.json."""
    with atomic(directory / "config.json") as temporary:
        text = json.dumps({"model_type": "Emu3VisionVQ", **cfg.to_dict()}, indent=2)
        temporary.write_text(text + "\n")


def _read_config(path: Path) -> MoVQConfig:
    try:
        raw: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UnimodalError(f"{path}: not a tokenizer configuration: {error}") from error
    if not isinstance(raw, dict):
        raise UnimodalError(f"{path}: not a tokenizer configuration: no JSON object")
    raw = raw.get("vq_config", raw)  # a multimodal checkpoint of transformers
    named = {_ALIASES.get(key, key): value for key, value in raw.items()}
    known = MoVQConfig.__dataclass_fields__
    try:
        return MoVQConfig(**{key: value for key, value in named.items() if key in known})
    except (TypeError, ValueError) as error:
        raise UnimodalError(f"{path}: {error}") from error


def _check(directory: Path, model: MoVQ, state: dict[str, Tensor]) -> None:
    """Name what is missing, left over, misshapen or not finite, all at once."""
    wanted = model.state_dict()
    problems = [f"missing {name}" for name in wanted if name not in state]
    problems += [f"unknown {name}" for name in state if name not in wanted]
    for name in wanted.keys() & state.keys():
        if wanted[name].shape != state[name].shape:
            problems.append(f"{name} is {list(state[name].shape)}, not {list(wanted[name].shape)}")
        elif not torch.isfinite(state[name].float()).all():
            problems.append(f"{name} has values that are not finite")
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        listed = "; ".join(sorted(problems)[:5])
        raise UnimodalError(f"{directory}: not the weights of its config.json: {listed}{more}")


def _digest(model: MoVQ) -> str:
    """SHA-256 of configuration and weights, 64 hex digits: equal digests give equal codes."""
    digest = hashlib.sha256(json.dumps(model.cfg.to_dict(), sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if name.endswith("num_batches_tracked"):
            continue
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
