"""PatchGAN: a small network that tells reconstructed patches from real ones, and its hinge loss.

Isola et al. 2017 (arXiv 1611.07004, §3.2) as VQGAN, MoVQGAN and LlamaGen use it: 4x4 convolutions
on single frames, each value of the result judging one overlapping patch.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Discriminator(nn.Sequential):
    """Frames [N,3,H,W] in [-1,1] -> logits [N,1,h,w], positive for what looks real.

    `n_layers` convolutions of stride 2, the first of `width` channels, then two of stride 1; as
    published, BatchNorm is of the batch at hand (of each process by itself).
    """

    def __init__(self, n_layers: int, width: int) -> None:
        layers: list[nn.Module] = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        channels = width
        for n in range(1, n_layers + 1):
            cout = width * min(2**n, 8)
            stride = 2 if n < n_layers else 1
            layers += [
                nn.Conv2d(channels, cout, 4, stride, 1, bias=False),
                nn.BatchNorm2d(cout, track_running_stats=False),
                nn.LeakyReLU(0.2),
            ]
            channels = cout
        super().__init__(*layers, nn.Conv2d(channels, 1, 4, 1, 1))
        for layer in self:  # as pix2pix and its heirs begin
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, 0.0, 0.02)
            elif isinstance(layer, nn.BatchNorm2d):
                nn.init.normal_(layer.weight, 1.0, 0.02)


def hinge(real: Tensor, fake: Tensor) -> Tensor:
    """What the discriminator minimizes: half of mean relu(1 - real) + mean relu(1 + fake)."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
