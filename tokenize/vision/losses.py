"""What a tokenizer in training is asked for, beyond equal pixels.

The released tokenizer was trained with L2, LPIPS, GAN and commitment terms (Emu3, arXiv
2409.18869, §2.2). LPIPS needs downloaded weights, so this form uses what needs none: a sharpness
term. L2 alone paints the mean of all pictures that share a code, which is a blur; the sharpness
term asks for as much gradient energy around each place as the source has there.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SCALES = 3  # full, half and quarter size
POOL = 8  # pixels over which gradient energy is compared: the patch of one code
EPS = 1e-4  # under the square root, in squared units of [-1,1]: about half a grey level


def sharpness(painted: Tensor, target: Tensor) -> Tensor:
    """Mean difference of local gradient strength between pictures [B,3,H,W] in [-1,1], a scalar.

    Local strength is the root of the gradient energy averaged over 8x8 pixels; three scales count
    alike. It asks that detail be there, and leaves its position to the L2 term.
    """
    total = painted.new_zeros(())
    for scale in range(SCALES):
        if scale:
            painted, target = F.avg_pool2d(painted, 2), F.avg_pool2d(target, 2)
        if min(painted.shape[-2:]) <= POOL:
            break
        total = total + (_strength(painted) - _strength(target)).abs().mean()
    return total / SCALES


def _strength(x: Tensor) -> Tensor:
    across = (x[..., 1:, 1:] - x[..., 1:, :-1]).square()
    down = (x[..., 1:, 1:] - x[..., :-1, 1:]).square()
    energy = (across + down).mean(dim=1, keepdim=True)
    # Half-overlapping windows, so that no seam falls between two codes.
    return torch.sqrt(F.avg_pool2d(energy, POOL, POOL // 2, ceil_mode=True) + EPS)
