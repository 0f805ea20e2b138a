"""The vision tokenizer as everything else uses it: pixels to codes, codes to pixels, files.

A tokenizer directory holds config.json and model.safetensors, under the original names
(BAAI/Emu3-VisionTokenizer) or those of transformers' `Emu3VQVAE`. `small` is the one that ships
with the package.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from unimodal.pipeline.errors import UsageError
from unimodal.pipeline.files import atomic
from unimodal.tokenize.vision.movq import MoVQ
from unimodal.tokenize.vision.weights import (
    check,
    config_dict,
    read_config,
    read_state,
    to_transformers,
)

HERE = Path(__file__).parent
SHIPPED = {"small": HERE / "small", "small-16k": HERE / "small_16k"}


class VisionTokenizer:
    """A frozen tokenizer, always in float32: a rounded latent is another code."""

    def __init__(self, model: MoVQ) -> None:
        self.model = model.float().eval().requires_grad_(False)
        self.digest = _digest(model)

    @classmethod
    def load(
        cls, name: str | Path, device: str = "cpu", channels_last: bool = False
    ) -> VisionTokenizer:
        """Load a shipped tokenizer by name, or a directory; raises `UnimodalError`.

        `channels_last` lays tensors out as some GPUs like them; sums in another order make some
        codes in thousands differ from those of the default.
        """
        directory = SHIPPED.get(str(name), Path(name))
        if not (directory / "config.json").exists():
            raise UsageError(
                f"{name}: no vision tokenizer; give one of {', '.join(SHIPPED)}, or a directory "
                "with config.json and model.safetensors"
            )
        cfg = read_config(directory / "config.json")
        with torch.device("meta"):  # a wrong configuration takes no memory
            model = MoVQ(cfg)
        state = read_state(directory)
        check(directory, model.state_dict(), state)
        model.load_state_dict(state, assign=True)
        tokenizer = cls(model.to(device))
        if channels_last:  # a convolution's output takes the layout of its weights
            for layer in model.modules():
                if isinstance(layer, nn.Conv2d):
                    layer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return tokenizer

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

        `pixels`: float [B, T, 3, H, W], T = 1 for images. Returns int64 [B, T', H/8, W/8], T' = 1
        for images, else T/4; what is under a code's 8 pixels at the right and bottom is dropped, as
        in the released code. If T is not a multiple of 4, the last frame is repeated (the released
        code drops frames, and fails for 2 or 3). The groups of four frames are encoded each by
        itself, as the released demo does; `joint` lets later groups see earlier ones, which gives
        other codes. Raises `ValueError` for another shape or type, sides under 8, or pixels that
        are not finite.
        """
        if pixels.ndim != 5 or pixels.shape[2] != 3 or 0 in pixels.shape:
            raise ValueError(f"pixels are {list(pixels.shape)}, not [B, T, 3, H, W]")
        if not pixels.is_floating_point():
            raise ValueError(f"pixels are {pixels.dtype}, not floating point in [-1, 1]")
        if min(pixels.shape[3:]) < self.spatial_factor:
            raise ValueError(f"sides {list(pixels.shape[3:])}: under {self.spatial_factor} pixels")
        pixels = pixels.to(self._device, torch.float32).contiguous()
        if not torch.isfinite(pixels).all():
            raise ValueError("pixels are not all finite")
        batch, frames = pixels.shape[:2]
        if frames == 1:
            return self.model.encode(pixels)
        if more := -frames % self.group:
            pixels = torch.cat([pixels, pixels[:, -1:].expand(-1, more, -1, -1, -1)], 1)
        if joint:
            return self.model.encode(pixels)
        groups = pixels.reshape(-1, self.group, *pixels.shape[2:])
        return self.model.encode(groups).unflatten(0, (batch, -1)).flatten(1, 2)

    @torch.no_grad()
    def decode(self, codes: Tensor, image: bool = False, joint: bool = False) -> Tensor:
        """Frames of codes int64 [B, T', h, w]: float32 [B, 4 T', 3, 8h, 8w], not clipped.

        `image` (T' = 1) renders the one frame that a still image is: [B, 1, 3, 8h, 8w]. Raises
        `ValueError` for another shape or type, or codes that the codebook does not have.
        """
        if codes.ndim != 4 or 0 in codes.shape or (image and codes.shape[1] != 1):
            wanted = "[B, 1, h, w]" if image else "[B, T', h, w]"
            raise ValueError(f"codes are {list(codes.shape)}, not {wanted}")
        if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
            raise ValueError(f"codes are {codes.dtype}, not whole numbers")
        codes = codes.to(self._device, torch.int64)
        low, high = codes.aminmax()
        if low < 0 or high >= self.codebook_size:
            raise ValueError(
                f"codes {low} to {high}: the codebook has 0 to {self.codebook_size - 1}"
            )
        if image or joint:
            return self.model.decode(codes, image)
        painted = self.model.decode(codes.flatten(0, 1)[:, None])
        return painted.unflatten(0, codes.shape[:2]).flatten(1, 2)

    def save(self, directory: Path, naming: str = "original") -> None:
        """Write config.json and model.safetensors, `naming` original or transformers."""
        save_model(self.model, directory, naming)

    @property
    def group(self) -> int:
        """Frames of one latent frame."""
        return self.model.cfg.temporal_downsample_factor

    @property
    def _device(self) -> torch.device:
        return self.model.quantize.embedding.weight.device


def save_model(model: MoVQ, directory: Path, naming: str = "original") -> None:
    """Write the network's config.json and model.safetensors, `naming` original or transformers."""
    config = config_dict(model.cfg, naming)
    state = model.state_dict()
    state = state if naming == "original" else to_transformers(state)
    with atomic(directory / "model.safetensors") as temporary:
        tensors = {name: tensor.cpu().contiguous() for name, tensor in state.items()}
        save_file(tensors, temporary, {"format": "pt"})  # transformers asks for this format
    with atomic(directory / "config.json") as temporary:
        temporary.write_text(json.dumps(config, indent=2) + "\n")


def _digest(model: MoVQ) -> str:
    """SHA-256 of configuration and weights, 64 hex digits: equal digests give equal codes."""
    digest = hashlib.sha256(json.dumps(model.cfg.to_dict(), sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if name.endswith("num_batches_tracked"):
            continue
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
