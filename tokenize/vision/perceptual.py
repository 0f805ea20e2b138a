"""LPIPS: how different two pictures look, by the features of a network that names what they show.

Zhang et al. 2018 (arXiv 1801.03924), version 0.1 on VGG16. The features of five layers, made of
unit length over channels, are subtracted and squared, weighted by channel, averaged over places
and summed:  d(x, y) = sum_l mean_hw sum_c w_lc (f_lc(x) / |f_l(x)| - f_lc(y) / |f_l(y)|)^2

The weights are not part of this package. They are two public files, put into one directory or
joined into one file, as .safetensors, or as .pth as published (read without running what is in
them, `torch.load(weights_only=True)`):
- the linear heads, `lpips/weights/v0.1/vgg.pth` of the Python package lpips: lin0.model.1.weight
  to lin4.model.1.weight, each [1, C, 1, 1];
- VGG16 in torchvision's layout, `vgg16-397923af.pth`: features.0.weight to features.28.bias. Other
  tensors of it are not used.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unimodal.pipeline.errors import UnimodalError, UsageError
from unimodal.pipeline.scorers.weights import state_dict

WIDTHS = (64, 128, 256, 512, 512)
# Places of the convolutions in torchvision's `vgg16().features`, by the five stages whose last
# activations are compared; a 2x2 maximum stands before each stage but the first.
STAGES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
SHIFT = (-0.030, -0.088, -0.188)  # ImageNet's mean and deviation, for pixels in [-1, 1]
SCALE = (0.458, 0.448, 0.450)


class LPIPS(nn.Module):
    """Distance of pictures [B,3,H,W] in [-1,1], sides 16 at least; one value a picture."""

    def __init__(self) -> None:
        super().__init__()
        convolutions = {}
        channels = 3
        for stage, width in zip(STAGES, WIDTHS, strict=True):
            for place in stage:
                convolutions[str(place)] = nn.Conv2d(channels, width, 3, padding=1)
                channels = width
        self.features = nn.ModuleDict(convolutions)
        self.heads = nn.ParameterList(torch.ones(1, width, 1, 1) for width in WIDTHS)
        self.register_buffer("shift", torch.tensor(SHIFT).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False)

    shift: Tensor
    scale: Tensor

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        x = (torch.cat([a, b]) - self.shift) / self.scale
        total = a.new_zeros(len(a))
        for i, stage in enumerate(STAGES):
            if i:
                x = F.max_pool2d(x, 2)
            for place in stage:
                x = F.relu(self.features[str(place)](x))
            wide = x.float()
            # The clamp gives places without any feature a gradient of 0, not of 0 / 0.
            unit = wide * wide.square().sum(1, keepdim=True).clamp_min(1e-20).rsqrt()
            one, other = unit.chunk(2)
            total = total + ((one - other).square() * self.heads[i]).sum(1).mean((1, 2))
        return total


def load_lpips(path: str | Path) -> LPIPS:
    """LPIPS with the weights of a file, or of all files of a directory (see above)."""
    path = Path(path)
    files = [path] if path.is_file() else sorted(path.glob("*.*")) if path.is_dir() else []
    files = [f for f in files if f.suffix in (".safetensors", ".pth", ".pt")]
    if not files:
        raise UsageError(f"{path}: no LPIPS weights; give a .safetensors or .pth, or a directory")
    found: dict[str, Tensor] = {}
    for file in files:
        for name, tensor in state_dict(str(file)).items():
            if match := re.fullmatch(r"(?:features|net\.slice\d)\.(\d+\.(?:weight|bias))", name):
                found[f"features.{match[1]}"] = tensor
            elif match := re.fullmatch(r"lins?\.?(\d)\.model\.1\.weight", name):
                found[f"heads.{match[1]}"] = tensor
    model = LPIPS()
    wanted = model.state_dict()
    wrong = sorted(n for n in wanted if n not in found or found[n].shape != wanted[n].shape)
    if wrong:
        listed = ", ".join(wrong[:3]).replace("heads.", "lin")
        raise UnimodalError(
            f"{path}: {len(wrong)} of LPIPS's {len(wanted)} tensors are missing or misshapen "
            f"({listed}, ...): it takes VGG16's features and the linear heads of version 0.1"
        )
    model.load_state_dict({name: found[name].float() for name in wanted})
    return model.eval()
