"""Where training starts: a network that already carries colour through, 8x8 mean by 8x8 mean.

Drawn at random, the network loses colour for thousands of steps: every GroupNorm on the way takes
out the mean, and six temporal layers with SiLU scramble the four latent channels. Seen here: after
1,200 steps edges were sharp and every picture greenish. So three of the four latents begin as the
mean luma and chroma of their patch, and the decoder begins by painting them; the residual
branches begin at zero (Fixup, arXiv 1901.09321, §3) and learn the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from unimodal.tokenize.vision.movq import (
    GROUPS,
    Attention,
    CausalConv3d,
    Downsample,
    MoVQ,
    ResBlock,
    SpatialNorm,
    TimeDownsample,
    TimeResBlock,
    TimeUpsample,
)

OFFSET = 4.0  # latents in the temporal stack are shifted here, where SiLU is all but linear
THROUGH = 3.8522  # silu(silu(OFFSET)): the shift behind the two temporal layers of either half
SLOPE = 1.1106  # derivative of silu(silu(x)) at OFFSET: by how much the two layers stretch
SCALE = 2.0  # latents per unit of luma in [-1, 1]
CONSTANT = 3.0  # a constant beside each colour, so that its GroupNorm divides by all but a constant

# ITU-R BT.601: RGB to luma and chroma, and back.
TO_YCC = torch.tensor([[0.299, 0.587, 0.114], [-0.169, -0.331, 0.5], [0.5, -0.419, -0.081]])
TO_RGB = torch.tensor([[1.0, 0.0, 1.402], [1.0, -0.344, -0.714], [1.0, 1.772, 0.0]])


@torch.no_grad()
def start_from_colour(model: MoVQ) -> None:
    """Initialize `model` in place; channel counts that have no room for it keep torch's own."""
    for module in model.modules():
        if isinstance(module, ResBlock):
            module.conv2.weight.zero_()
            _bias(module.conv2).zero_()
        elif isinstance(module, Attention):
            module.proj_out.weight.zero_()
            _bias(module.proj_out).zero_()
        elif isinstance(module, SpatialNorm):  # begins as a plain GroupNorm
            for conv, bias in ((module.conv_y, 1.0), (module.conv_b, 0.0)):
                nn.init.normal_(conv.weight, std=0.02)
                # The codes arrive shifted: take the shift out of what the convolution sees.
                _bias(conv).copy_(bias - conv.weight.sum(dim=(1, 2, 3)) * THROUGH)
    _time(model)
    group = model.cfg.ch * model.cfg.ch_mult[-1] // GROUPS
    if group >= 4 and model.cfg.ch >= 2 * group + 4 and model.cfg.embed_dim >= 3:
        _encoder(model, group)
        _decoder(model)


def _time(model: MoVQ) -> None:
    """Temporal layers that pass latents through, averaged over two frames on the way down."""
    shift = OFFSET
    for module in model.modules():
        if isinstance(module, TimeDownsample | TimeUpsample):
            # Each half of the network has two: the first adds the shift, the second keeps it.
            _identity(module.conv, (2, 3) if isinstance(module, TimeDownsample) else (2,), shift)
            shift = OFFSET - shift
        elif isinstance(module, TimeResBlock):
            nn.init.normal_(module.conv2.conv.weight, std=1e-3)
            _bias(module.conv2.conv).zero_()
    _identity(model.quant_conv, (2,), -THROUGH / SLOPE)
    model.quant_conv.conv.weight.div_(SLOPE)
    _identity(model.post_quant_conv, (2,), 0.0)
    first = model.decoder.conv_in  # only the centre: zeros at the border are no shifted latents
    centre = first.weight[:, :, 1, 1].clone()
    first.weight.zero_()
    first.weight[:, :, 1, 1] = 3 * centre
    _bias(first).sub_(first.weight.sum(dim=(1, 2, 3)) * THROUGH)


def _identity(conv: CausalConv3d, taps: Sequence[int], bias: float) -> None:
    weight = conv.conv.weight
    middle = weight.shape[-1] // 2
    nn.init.normal_(weight, std=1e-3)
    for channel in range(weight.shape[0]):
        for tap in taps:
            weight[channel, channel, tap, middle, middle] = 1.0 / len(taps)
    _bias(conv.conv).fill_(bias)


def _encoder(model: MoVQ, group: int) -> None:
    """Colour j travels in channels group*j + (0, 1, 2, 3) as (v, -v, constant, -constant).

    They fill a group of the last norm, whose mean is then 0 and whose deviation all but constant;
    and silu(v) - silu(-v) = v, so the colour leaves the encoder as it came.
    """
    encoder = model.encoder
    carried = [group * j + k for j in range(3) for k in range(4)]
    weight, bias = encoder.conv_in.weight, _bias(encoder.conv_in)
    weight[carried] = 0.0
    for j in range(3):
        for k, sign in enumerate((1.0, -1.0)):
            weight[group * j + k, :, 1, 1] = sign * TO_YCC[j]
            bias[group * j + k] = 0.0
            bias[group * j + 2 + k] = sign * CONSTANT
    for module in encoder.modules():
        if isinstance(module, Downsample):  # a 2x2 box, which never reaches the padding
            _carry(module.conv, carried, [(0, 0), (0, 1), (1, 0), (1, 1)])
        elif isinstance(module, ResBlock) and hasattr(module, "nin_shortcut"):
            _carry(module.nin_shortcut, carried, [(0, 0)])
    gain = CONSTANT / 2**0.5 if group == 4 else 1.0
    last = encoder.conv_out
    for j in range(3):
        encoder.norm_out.weight[group * j : group * j + 2] = gain
        last.weight[j].mul_(0.02)
        last.weight[j, group * j, 1, 1] = SCALE
        last.weight[j, group * j + 1, 1, 1] = -SCALE
        _bias(last)[j] = 0.0


def _bias(layer: nn.Conv2d | nn.Conv3d) -> Tensor:
    """The layer's bias, which every layer here has."""
    return cast(Tensor, layer.bias)


def _carry(conv: nn.Conv2d, channels: Sequence[int], taps: Sequence[tuple[int, int]]) -> None:
    conv.weight[channels] = 0.0
    _bias(conv)[channels] = 0.0
    for channel in channels:
        for row, column in taps:
            conv.weight[channel, channel, row, column] = 1.0 / len(taps)


def _decoder(model: MoVQ) -> None:
    """The last norm adds (u, -u) of each colour's code; silu(u) - silu(-u) = u paints it."""
    norm, last = model.decoder.norm_out, model.decoder.conv_out
    last.weight.mul_(0.1)
    _bias(last).zero_()
    for j in range(3):
        for k, sign in enumerate((1.0, -1.0)):
            channel = 2 * j + k
            norm.conv_y.weight[channel] = 0.0
            _bias(norm.conv_y)[channel] = 0.0
            norm.conv_b.weight[channel] = 0.0
            norm.conv_b.weight[channel, j] = sign / SCALE / SLOPE
            _bias(norm.conv_b)[channel] = -sign * THROUGH / SCALE / SLOPE
            last.weight[:, channel] = 0.0
            last.weight[:, channel, 1, 1] = sign * TO_RGB[:, j]
