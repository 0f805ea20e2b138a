"""Where training starts: a network that already carries each 8x8 patch's principal components.

Drawn at random, the network loses colour for thousands of steps (every GroupNorm on the way takes
out the mean), and spends thousands more on finding out what a patch is made of. That is known
beforehand: of all linear maps to a few numbers, principal components keep the most of a patch.
So the encoder's skip path begins as that map, made of one small step per level; the latents keep
the distances of patches, so that a nearest code is a nearest patch; and the decoder begins by
painting the mean colour that a code stands for. The residual branches begin at zero (Fixup, arXiv
1901.09321, §3) and learn the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unimodal.tokenize.vision.movq import (
    GROUPS,
    Attention,
    CausalConv3d,
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
SCALE = 2.0  # a patch of one colour at 1 is a latent of this size
CONSTANT = 8.0  # a constant beside each component, so that its GroupNorm divides by all but that
FAINT = 0.05  # components under this share of the first are not amplified further in the decoder
NOISE = 1e-4  # of temporal weights around the identity
CARRIED = 0.75  # share of a level's channels that components may take


@torch.no_grad()
def start(model: MoVQ, pictures: Tensor) -> bool:
    """Initialize `model` in place for pictures like these: float [N,3,H,W] in [-1, 1].

    Sides are multiples of the spatial factor. Returns whether the channels have room for the
    components; if not, encoder and colours keep torch's own start.
    """
    cfg = model.cfg
    for module in model.modules():
        if isinstance(module, ResBlock):
            module.conv2.weight.zero_()
            _bias(module.conv2).zero_()
        elif isinstance(module, Attention):
            module.proj_out.weight.zero_()
            _bias(module.proj_out).zero_()
    _time(model)
    widths = [cfg.ch * mult for mult in cfg.ch_mult]
    size = cfg.embed_dim
    room = len(widths) > 1 and widths[-1] >= 4 * GROUPS and size <= min(GROUPS, *widths)
    if room:
        _decoder(model, *_encoder(model, pictures))
    return room


def _time(model: MoVQ) -> None:
    """Temporal layers that pass latents through, averaged over two frames on the way down."""
    shift = OFFSET
    for module in model.modules():
        if isinstance(module, TimeDownsample | TimeUpsample):
            # Each half of the network has two: the first adds the shift, the second keeps it.
            _identity(module.conv, (2, 3) if isinstance(module, TimeDownsample) else (2,), shift)
            shift = OFFSET - shift
        elif isinstance(module, TimeResBlock):
            nn.init.normal_(module.conv2.conv.weight, std=NOISE)
            _bias(module.conv2.conv).zero_()
    _identity(model.quant_conv, (2,), -THROUGH / SLOPE)
    model.quant_conv.conv.weight.div_(SLOPE)
    _identity(model.post_quant_conv, (2,), 0.0)


def _identity(conv: CausalConv3d, taps: Sequence[int], bias: float) -> None:
    weight = conv.conv.weight
    middle = weight.shape[-1] // 2
    nn.init.normal_(weight, std=NOISE)
    for channel in range(weight.shape[0]):
        for tap in taps:
            weight[channel, channel, tap, middle, middle] = 1.0 / len(taps)
    _bias(conv.conv).fill_(bias)


def _encoder(model: MoVQ, pictures: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Components through the encoder: each level joins those of 2x2 blocks and keeps the largest.

    Returns of the latents their deviations [D], and what they say of a patch's mean colour:
    weights [3, D] and constant [3].

    Component j ends in channels group*j + (0, 1, 2, 3) as (v, -v, constant, -constant). They fill
    a group of the last norm, whose mean is then 0 and whose deviation all but constant; and
    silu(v) - silu(-v) = v, so the component leaves the encoder as it came.
    """
    encoder, size = model.encoder, model.cfg.embed_dim
    widths = [model.cfg.ch * mult for mult in model.cfg.ch_mult]
    mean = pictures.mean(dim=(0, 2, 3))
    here = pictures - mean[:, None, None]
    _carry(encoder.conv_in, range(3), torch.eye(3)[:, :, None, None], 1)
    _bias(encoder.conv_in)[:3] = -mean
    colour = torch.eye(3)  # mean colour of a block per unit of each component
    last: nn.Conv2d = encoder.conv_in
    filters = torch.empty(0)
    levels: list[Any] = list(encoder.down)
    for stage, width in zip(levels[:-1], widths[:-1], strict=True):
        if (shortcut := getattr(stage.block[0], "nin_shortcut", None)) is not None:
            count = here.shape[1]
            _carry(shortcut, range(count), torch.eye(count)[:, :, None, None])
        blocks = F.pixel_unshuffle(here, 2)  # [N, 4 count, h, w]
        rows = blocks.movedim(1, -1).flatten(0, -2).double()
        final = stage is levels[-2]
        most = size if final else int(CARRIED * width)
        basis = torch.linalg.eigh(rows.T @ rows)[1].flip(1).T[:most].float()
        here = torch.einsum("kc,nchw->nkhw", basis, blocks)
        colour = colour.repeat_interleave(4, dim=1) @ basis.T / 4
        # 2x2 filters, which never reach the padding of the 3x3 ones.
        last, filters = stage.downsample.conv, basis.unflatten(1, (-1, 2, 2))
        _carry(last, range(len(basis)), filters)
    unit = SCALE / (2.0 ** (len(widths) - 1) * 3**0.5)  # a patch of one colour at 1: length SCALE
    group = widths[-1] // GROUPS
    first = group * torch.arange(size)
    if (shortcut := getattr(levels[-1].block[0], "nin_shortcut", None)) is not None:
        last, filters = shortcut, torch.eye(size)[:, :, None, None]
    for k, sign in enumerate((1.0, -1.0)):
        _carry(last, first + k, sign * unit / SCALE * filters)
        _carry(last, first + 2 + k, 0 * filters)
        _bias(last)[first + 2 + k] = sign * CONSTANT
        encoder.norm_out.weight[first + k] = CONSTANT / 2**0.5 if group == 4 else 1.0
    encoder.conv_out.weight[:size] = 0.0
    _bias(encoder.conv_out)[:size] = 0.0
    for k, sign in enumerate((SCALE, -SCALE)):
        encoder.conv_out.weight[range(size), first + k, 1, 1] = sign
    return here.std(dim=(0, 2, 3)) * unit, colour / unit, mean


def _decoder(model: MoVQ, deviations: Tensor, colour: Tensor, mean: Tensor) -> None:
    """Every layer that reads codes sees all components alike; the last norm paints their colour."""
    decoder = model.decoder
    gain = deviations.max() / deviations.clamp_min(FAINT * float(deviations.max()))
    for module in decoder.modules():
        if isinstance(module, SpatialNorm):  # begins as a plain GroupNorm
            for conv, bias in ((module.conv_y, 1.0), (module.conv_b, 0.0)):
                nn.init.normal_(conv.weight, std=0.02)
                conv.weight.mul_(gain[:, None, None])
                # The codes arrive shifted: take the shift out of what the convolution sees.
                _bias(conv).copy_(bias - conv.weight.sum(dim=(1, 2, 3)) * THROUGH)
    # Only the centre: zeros at the border are no shifted latents.
    _carry(
        decoder.conv_in,
        range(decoder.conv_in.out_channels),
        3 * gain[:, None, None] * (decoder.conv_in.weight[:, :, 1:2, 1:2].clone()),
        1,
    )
    _bias(decoder.conv_in).sub_(decoder.conv_in.weight.sum(dim=(1, 2, 3)) * THROUGH)
    # silu(u) - silu(-u) = u paints the colour that the last norm adds.
    norm, last = decoder.norm_out, decoder.conv_out
    last.weight.mul_(0.1)
    _bias(last).zero_()
    for k, sign in enumerate((1.0, -1.0)):
        channels = 2 * torch.arange(3) + k
        norm.conv_y.weight[channels] = 0.0
        _bias(norm.conv_y)[channels] = 0.0
        norm.conv_b.weight[channels, :, 0, 0] = sign * colour / SLOPE
        _bias(norm.conv_b)[channels] = sign * (mean - colour.sum(1) * THROUGH / SLOPE)
        last.weight[:, channels] = 0.0
        last.weight[range(3), channels, 1, 1] = sign


def _bias(layer: nn.Conv2d | nn.Conv3d) -> Tensor:
    """The layer's bias, which every layer here has."""
    return cast(Tensor, layer.bias)


def _carry(conv: nn.Conv2d, rows: Sequence[int] | Tensor, filters: Tensor, at: int = 0) -> None:
    """Make output channels `rows` of `conv` these filters [rows, in, h, w] and nothing else."""
    rows = torch.as_tensor(list(rows))
    _, count, height, width = filters.shape
    conv.weight[rows] = 0.0
    conv.weight[rows, :count, at : at + height, at : at + width] = filters
    _bias(conv)[rows] = 0.0
