"""The Emu3 vision tokenizer network: a causal video VQ autoencoder of the MoVQGAN family.

A 2-D encoder works on single frames (8x down), a small causal 3-D stack joins 4 frames into one
latent frame, a nearest-neighbour codebook makes them discrete, and a decoder whose every norm is
modulated by the quantized latents (SpatialNorm) paints frames again. Sources: Emu3, arXiv
2409.18869, §2.2; MoVQ, arXiv 2209.09002; Stable Video Diffusion's time layers. Module names are
those of the released Emu3-VisionTokenizer, so that its state dict loads as it is.

Two identities make still images four times cheaper than in the released code, with equal results:
- four identical frames have four identical 2-D features, so the encoder's trunk runs once and its
  latents are repeated;
- an image decode returns the first of four frames, and the trunk works frame by frame, so only
  that frame is rendered.

Without gradients three more things save time and memory: a norm and its SiLU work in slices that
stay in the cache, and in place; the trunk takes a bounded number of pixels at a time, large frames
by bands of rows, and frames that repeat the one before only once; and enlarging is folded into the
convolution behind it.

Shapes: B batch, T frames, t latent frames (T / 4), C channels, H W pixels, h w latents (H / 8).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUPS = 32  # of every GroupNorm, so all channel counts are multiples of 32
# Latents compared with the codebook at a time: on a processor their distances stay in its cache,
# which is twice as fast; on a GPU the bound is memory.
QUANTIZE_ROWS, QUANTIZE_ROWS_GPU = 256, 4096
PART_PIXELS = 1 << 18  # that the trunk takes at a time without gradients, at least one frame
BAND = 1 << 24  # elements of a frame from which a convolution on a CPU takes it in bands of rows
# Elements of a norm's slice: 2 MiB stay in a core's cache; a GPU wants few and large kernels.
SLICE = {"cpu": 1 << 19, "cuda": 1 << 26}


@dataclass(frozen=True)
class MoVQConfig:
    """Shape of the network; the defaults are those of the released Emu3-VisionTokenizer."""

    codebook_size: int = 32768
    embed_dim: int = 4
    z_channels: int = 4
    ch: int = 256
    ch_mult: tuple[int, ...] = (1, 2, 2, 4)
    num_res_blocks: int = 2
    attn_resolutions: tuple[int, ...] = (3,)
    """Level indices (not pixel sizes) whose every residual block is followed by attention."""
    temporal_downsample_factor: int = 4

    def __post_init__(self) -> None:
        for name in ("ch_mult", "attn_resolutions"):
            if not isinstance(getattr(self, name), list | tuple):
                raise ValueError(f"{name} is {getattr(self, name)!r}, not a list of numbers")
            object.__setattr__(self, name, tuple(getattr(self, name)))
        # Upper bounds keep a damaged file from asking for all memory; the released sizes are far.
        bounds = {
            "codebook_size": (1, 1 << 24),
            "embed_dim": (1, 4096),
            "z_channels": (1, 4096),
            "ch": (1, 4096),
            "num_res_blocks": (1, 64),
            "temporal_downsample_factor": (1, 64),
        }
        values = [(name, getattr(self, name), *bound) for name, bound in bounds.items()]
        values += [("len(ch_mult)", len(self.ch_mult), 1, 8)]
        values += [("ch_mult", mult, 1, 64) for mult in self.ch_mult]
        values += [("attn_resolutions", level, 0, 64) for level in self.attn_resolutions]
        for name, value, low, high in values:
            if type(value) is not int or not low <= value <= high:
                raise ValueError(f"{name} is {value!r}, not a whole number from {low} to {high}")
        if any(self.ch * m % GROUPS for m in self.ch_mult):
            raise ValueError(
                f"ch x ch_mult must be multiples of {GROUPS}: {self.ch}, {self.ch_mult}"
            )
        if self.z_channels != self.embed_dim:  # both go through the decoder's time layers
            raise ValueError(f"z_channels {self.z_channels} is not embed_dim {self.embed_dim}")
        if 2**self.time_steps != self.temporal_downsample_factor:
            raise ValueError(f"temporal factor {self.temporal_downsample_factor}: a power of two")

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent along each side."""
        return 2 ** (len(self.ch_mult) - 1)

    @property
    def time_steps(self) -> int:
        """Number of halvings along time."""
        return int(math.log2(self.temporal_downsample_factor))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm(32, eps 1e-6) of the encoder."""
    return nn.GroupNorm(GROUPS, channels, eps=1e-6)


class _Enlarge(torch.autograd.Function):
    """Nearest-neighbour enlarging of [N,C,h,w] by a whole factor, with a fast backward on CPU.

    Its gradient is a sum over blocks, for which torch's own backward takes twice the time of
    average pooling with divisor 1.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: int) -> Tensor:
        ctx.factor = factor
        n, c, h, w = x.shape
        blocks = x[:, :, :, None, :, None].expand(n, c, h, factor, w, factor)
        return blocks.reshape(n, c, h * factor, w * factor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return F.avg_pool2d(grads[0], ctx.factor, divisor_override=1), None


class SpatialNorm(nn.Module):
    """GroupNorm of f [N,C,H,W], scaled and shifted per latent by 1x1 convolutions of zq [N,4,h,w].

    A 1x1 convolution and nearest-neighbour enlarging commute, so both convolutions run on the
    small zq and only their result is enlarged.
    """

    def __init__(self, channels: int, zq_channels: int) -> None:
        super().__init__()
        self.norm_layer = group_norm(channels)
        self.conv_y = nn.Conv2d(zq_channels, channels, 1)
        self.conv_b = nn.Conv2d(zq_channels, channels, 1)

    def forward(self, f: Tensor, zq: Tensor) -> Tensor:
        factor = f.shape[-1] // zq.shape[-1]
        scale = _Enlarge.apply(self.conv_y(zq), factor)
        shift = _Enlarge.apply(self.conv_b(zq), factor)
        return torch.addcmul(shift, self.norm_layer(f), scale)


Norm = nn.GroupNorm | SpatialNorm


def _norm(channels: int, zq_channels: int | None) -> Norm:
    return group_norm(channels) if zq_channels is None else SpatialNorm(channels, zq_channels)


def _activate(
    norm: Norm, x: Tensor, zq: Tensor | None = None, silu: bool = True, overwrite: bool = False
) -> Tensor:
    """The norm of x [N,C,H,W], then SiLU; without gradients slice by slice, on x if `overwrite`."""
    if torch.is_grad_enabled() or not x.is_contiguous():
        normed = norm(x) if zq is None else norm(x, zq)
        return F.silu(normed, inplace=not torch.is_grad_enabled()) if silu else normed
    plain = norm.norm_layer if isinstance(norm, SpatialNorm) else norm
    if isinstance(norm, SpatialNorm) and zq is not None:
        scale, shift = norm.conv_y(zq), norm.conv_b(zq)
        factor = x.shape[-1] // zq.shape[-1]
    out = x if overwrite else torch.empty_like(x)
    width = x.shape[1] // GROUPS
    for part in _slices(x):
        channels = part[1]
        weight, bias = plain.weight[channels], plain.bias[channels]
        y = F.group_norm(x[part], len(weight) // width, weight, bias, plain.eps)
        if zq is not None:
            # Enlarged along the rows by copies and along the columns by broadcasting.
            rows = y.unflatten(2, (-1, factor))  # [n,c,h,H/h,W]
            rows.mul_(scale[part].repeat_interleave(factor, -1).unsqueeze(3))
            rows.add_(shift[part].repeat_interleave(factor, -1).unsqueeze(3))
        out[part] = F.silu(y, inplace=True) if silu else y
    return out


def _slices(x: Tensor) -> Iterator[tuple[slice, slice]]:
    """Samples and channels (whole norm groups) of contiguous x, about SLICE elements at a time."""
    limit = SLICE["cpu" if x.device.type == "cpu" else "cuda"]
    samples = max(1, limit // x[0].numel())
    group = x.shape[1] // GROUPS
    # torch normalizes groups in parallel: every thread gets one.
    groups = min(GROUPS, max(torch.get_num_threads(), limit // x[0, :group].numel()))
    for n in range(0, x.shape[0], samples):
        for c in range(0, x.shape[1], groups * group):
            yield slice(n, n + samples), slice(c, c + groups * group)


def _convolve(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A 3x3 convolution: zeros all around, or for stride 2 on the right and at the bottom alone.

    On a CPU torch copies input and output into another layout: of large frames, without gradients,
    only of a band of rows at a time.
    """
    stride, left = conv.stride[0], int(conv.padding[0])
    large = x[0].numel() > BAND and x.device.type == "cpu" and x.is_contiguous()
    if torch.is_grad_enabled() or not large:
        return conv(x if left else F.pad(x, (0, 1, 0, 1)))
    height, width = x.shape[2] // stride, x.shape[3] // stride
    out = x.new_empty(len(x), conv.out_channels, height, width)
    rows = max(1, BAND // (stride * x[0, :, 0].numel()))
    for n in range(len(x)):
        for row in range(0, height, rows):
            end = min(row + rows, height)
            top, bottom = stride * row - left, stride * (end - 1) + 3 - left  # that it reads
            zeros = (left, 1, max(-top, 0), max(bottom - x.shape[2], 0))
            band = F.pad(x[n : n + 1, :, max(top, 0) : bottom], zeros)
            out[n : n + 1, :, row:end] = F.conv2d(band, conv.weight, conv.bias, stride)
    return out


def _in_parts(trunk: Callable[..., Tensor], pixels: int, *frames: Tensor) -> Tensor:
    """A trunk's output for tensors [N,...]; without gradients PART_PIXELS (`pixels` a frame) each.

    The trunk works frame by frame, so the parts change nothing but the memory that it takes.
    """
    if torch.is_grad_enabled():
        return trunk(*frames)
    count = max(1, PART_PIXELS // pixels)
    parts = zip(*(one.split(count) for one in frames), strict=True)
    return torch.cat([trunk(*part) for part in parts])


class ResBlock(nn.Module):
    """norm, SiLU, 3x3 convolution, twice, plus the input; a decoder's norms are SpatialNorm."""

    def __init__(self, cin: int, cout: int, zq_channels: int | None = None) -> None:
        super().__init__()
        self.norm1 = _norm(cin, zq_channels)
        self.conv1 = nn.Conv2d(cin, cout, 3, padding=1)
        self.norm2 = _norm(cout, zq_channels)
        self.conv2 = nn.Conv2d(cout, cout, 3, padding=1)
        if cin != cout:
            self.nin_shortcut = nn.Conv2d(cin, cout, 1)

    def forward(self, x: Tensor, zq: Tensor | None = None) -> Tensor:
        h = _convolve(self.conv1, _activate(self.norm1, x, zq))
        h = _convolve(self.conv2, _activate(self.norm2, h, zq, overwrite=True))
        skip = self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x
        return h + skip if torch.is_grad_enabled() else h.add_(skip)


class Attention(nn.Module):
    """Single-head self-attention over the h x w positions of one frame."""

    def __init__(self, channels: int, zq_channels: int | None = None) -> None:
        super().__init__()
        self.norm = _norm(channels, zq_channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, zq: Tensor | None = None) -> Tensor:
        tokens = _activate(self.norm, x, zq, silu=False).flatten(2).transpose(1, 2)  # [N,hw,C]
        # With channels last in memory, torch's attention never holds all hw x hw scores; the
        # default scale of SDPA is C^-0.5, as here.
        q, k, v = (_pointwise(layer, tokens)[:, None] for layer in (self.q, self.k, self.v))
        out = _pointwise(self.proj_out, F.scaled_dot_product_attention(q, k, v)[:, 0])
        return x + out.transpose(1, 2).unflatten(2, x.shape[2:])


def _pointwise(layer: nn.Conv2d, tokens: Tensor) -> Tensor:
    """A 1x1 convolution of tokens [N,hw,C]."""
    return F.linear(tokens, layer.weight.flatten(1), layer.bias)


class Downsample(nn.Module):
    """Halve both sides: zeros on the right and bottom only, then a 3x3 convolution of stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor, zq: Tensor | None = None) -> Tensor:
        return _convolve(self.conv, x)


class Upsample(nn.Module):
    """Double both sides: nearest neighbour, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, zq: Tensor | None = None) -> Tensor:
        if torch.is_grad_enabled():
            return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        # Of each pixel's 3x3 neighbours after enlarging, some are copies of one pixel: the sum of
        # their weights on the small picture does the same with 4 products in place of 9.
        n, _, height, width = x.shape
        weight, bias = self.conv.weight, self.conv.bias
        layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
        size = (n, len(weight), 2 * height, 2 * width)
        out = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=layout)
        for i, rows in enumerate(_halves(weight, 2)):
            for j, kernel in enumerate(_halves(rows, 3)):
                part = F.conv2d(x, kernel, bias, padding=1)
                out[:, :, i::2, j::2] = part[:, :, i : i + height, j : j + width]
        return out


def _halves(weight: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The 2 taps along `dim` that 3 become on a picture not yet enlarged: even and odd pixels."""
    first, middle, last = weight.split(1, dim)
    return torch.cat([first, middle + last], dim), torch.cat([first + middle, last], dim)


class CausalConv3d(nn.Module):
    """3-D convolution that sees no later frame: two zero frames in front, whatever the kernel."""

    def __init__(
        self,
        cin: int,
        cout: int,
        kernel: tuple[int, int, int],
        stride: tuple[int, int, int] = (1, 1, 1),
    ) -> None:
        super().__init__()
        pads: list[int] = []
        for k, s in list(zip(kernel, stride, strict=True))[:0:-1]:  # width, then height
            pads += [(k - s + 1) // 2, (k - s) // 2]
        self.padding = (*pads, 2, 0)
        self.conv = nn.Conv3d(cin, cout, kernel, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, self.padding))


class TimeDownsample(nn.Module):
    """Halve the frames of [B,C,T,h,w]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, channels, (4, 3, 3), (2, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class TimeUpsample(nn.Module):
    """Double the frames of [B,C,t,h,w]: nearest neighbour along time, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, channels, (3, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.repeat_interleave(2, dim=2))


class TimeResBlock(nn.Module):
    """BatchNorm, SiLU, causal convolution, twice, plus the input, on [B,C,T,h,w]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm3d(channels)
        self.conv1 = CausalConv3d(channels, channels, (3, 3, 3))
        self.norm2 = nn.BatchNorm3d(channels)
        self.conv2 = CausalConv3d(channels, channels, (3, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(h)))


class _Mid(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, channels: int, zq_channels: int | None = None) -> None:
        super().__init__()
        self.block_1 = ResBlock(channels, channels, zq_channels)
        self.attn_1 = Attention(channels, zq_channels)
        self.block_2 = ResBlock(channels, channels, zq_channels)

    def forward(self, x: Tensor, zq: Tensor | None = None) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x, zq), zq), zq)


class _Level(nn.Module):
    """The residual blocks of one resolution, with attention where asked, and a change of size."""

    def __init__(
        self, cin: int, cout: int, blocks: int, attention: bool, zq_channels: int | None = None
    ) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            ResBlock(cin if i == 0 else cout, cout, zq_channels) for i in range(blocks)
        )
        self.attn = nn.ModuleList(
            Attention(cout, zq_channels) for _ in range(blocks if attention else 0)
        )

    def layers(self) -> Iterator[nn.Module]:
        """The modules in order; a caller who applies them one by one keeps no old tensor alive."""
        for i, block in enumerate(self.block):
            yield block
            if len(self.attn):
                yield self.attn[i]
        for resize in ("downsample", "upsample"):
            if resize in self._modules:
                yield getattr(self, resize)


class Encoder(nn.Module):
    """Frames [B,T,3,H,W] in [-1,1] -> latents [B,z,T/4,H/8,W/8] before the quantizer."""

    def __init__(self, cfg: MoVQConfig) -> None:
        super().__init__()
        self.repeat = cfg.temporal_downsample_factor
        self.conv_in = nn.Conv2d(3, cfg.ch, 3, padding=1)
        self.down = nn.ModuleList()
        channels = cfg.ch
        for level, mult in enumerate(cfg.ch_mult):
            cout = cfg.ch * mult
            stage = _Level(channels, cout, cfg.num_res_blocks, level in cfg.attn_resolutions)
            channels = cout
            if level < len(cfg.ch_mult) - 1:
                stage.downsample = Downsample(channels)
            self.down.append(stage)
        self.mid = _Mid(channels)
        self.norm_out = group_norm(channels)
        self.conv_out = nn.Conv2d(channels, cfg.z_channels, 3, padding=1)
        self.time_conv = nn.ModuleList(
            TimeDownsample(cfg.z_channels) for _ in range(cfg.time_steps)
        )
        self.time_res_stack = nn.ModuleList(
            TimeResBlock(cfg.z_channels) for _ in range(cfg.num_res_blocks)
        )

    def forward(self, x: Tensor) -> Tensor:
        batch, frames = x.shape[:2]
        flat, order = x.flatten(0, 1), None
        if frames > 1 and not torch.is_grad_enabled():
            # A frame that repeats the one before has its features, too.
            new = [i == 0 or not torch.equal(frame, flat[i - 1]) for i, frame in enumerate(flat)]
            distinct = torch.tensor(new)
            flat, order = flat[distinct], distinct.cumsum(0) - 1
        h = _in_parts(self.trunk, x[0, 0, 0].numel(), flat).to(x.dtype)
        h = h if order is None else h[order]
        h = h.unflatten(0, (batch, frames)).transpose(1, 2).contiguous()  # [B,z,T,h,w]
        if frames == 1:  # a still image is its frame four times; the trunk has run once
            h = h.expand(-1, -1, self.repeat, -1, -1).contiguous()
        # Latents decide the codes: they stay in full precision when the trunk runs in bfloat16.
        with torch.autocast(h.device.type, enabled=False):
            for layer in self.time_conv:
                h = F.silu(layer(h))
            for layer in self.time_res_stack:
                h = layer(h)
        return h

    def trunk(self, h: Tensor) -> Tensor:
        """Frames [N,3,H,W] -> features [N,z,H/8,W/8], each frame by itself."""
        h = self.conv_in(h)
        for stage in self.down:
            assert isinstance(stage, _Level)
            for layer in stage.layers():
                h = layer(h)
        return self.conv_out(_activate(self.norm_out, self.mid(h), overwrite=True))


class Decoder(nn.Module):
    """Quantized latents [B,z,t,h,w] -> frames [B,4t,3,H,W] (the first alone for an image)."""

    def __init__(self, cfg: MoVQConfig) -> None:
        super().__init__()
        zq = cfg.embed_dim
        self.enlarged = cfg.spatial_factor**2  # pixels of a latent
        self.time_res_stack = nn.ModuleList(
            TimeResBlock(cfg.z_channels) for _ in range(cfg.num_res_blocks)
        )
        self.time_conv = nn.ModuleList(TimeUpsample(cfg.z_channels) for _ in range(cfg.time_steps))
        channels = cfg.ch * cfg.ch_mult[-1]
        self.conv_in = nn.Conv2d(cfg.z_channels, channels, 3, padding=1)
        self.mid = _Mid(channels, zq)
        stages: list[_Level] = []
        for level in reversed(range(len(cfg.ch_mult))):
            cout = cfg.ch * cfg.ch_mult[level]
            attention = level in cfg.attn_resolutions
            stage = _Level(channels, cout, cfg.num_res_blocks + 1, attention, zq)
            channels = cout
            if level:
                stage.upsample = Upsample(channels)
            stages.append(stage)
        self.up = nn.ModuleList(reversed(stages))  # indexed by level, as in the released weights
        self.norm_out = SpatialNorm(channels, zq)
        self.conv_out = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, z: Tensor, zq: Tensor, image: bool = False) -> Tensor:
        batch = z.shape[0]
        both = torch.cat([z, zq])  # the codes go through the same temporal stack as the features
        with torch.autocast(both.device.type, enabled=False):
            for layer in self.time_res_stack:
                both = layer(both)
            for layer in self.time_conv:
                both = F.silu(layer(both))
        if image:
            both = both[:, :, :1]
        frames = both.shape[2]
        h, zq = both.transpose(1, 2).flatten(1, 2).unflatten(1, (frames, -1)).split(batch)
        h, zq = h.flatten(0, 1).contiguous(), zq.flatten(0, 1).contiguous()  # [B*T,z,h,w]
        pixels = zq[0, 0].numel() * self.enlarged
        return _in_parts(self.trunk, pixels, h, zq).unflatten(0, (batch, frames))

    def trunk(self, h: Tensor, zq: Tensor) -> Tensor:
        """Features and latents [N,z,h,w] -> frames [N,3,H,W], each frame by itself."""
        h = self.mid(self.conv_in(h), zq)
        for stage in reversed(self.up):
            assert isinstance(stage, _Level)
            for layer in stage.layers():
                h = layer(h, zq)
        return self.conv_out(_activate(self.norm_out, h, zq, overwrite=True))


class Codebook(nn.Module):
    """Nearest neighbour in squared L2 among K vectors; ties go to the lowest index."""

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        # Its own values are not drawn first: on the meta device that imports torch's compiler, 2 s.
        self.embedding = nn.Embedding(size, dim, _weight=torch.empty(size, dim))
        nn.init.uniform_(self.embedding.weight, -1.0 / size, 1.0 / size)

    def forward(self, z: Tensor) -> Tensor:
        """z [B,C,t,h,w] -> codes int64 [B,t,h,w]."""
        flat = z.detach().movedim(1, -1).reshape(-1, z.shape[1])
        book = self.embedding.weight.detach()
        # The expanded form of the distance, as the released code computes it: near-ties agree.
        norms = (book**2).sum(1)
        codes = [
            ((rows**2).sum(1, keepdim=True) + norms).sub_((2 * rows) @ book.T).argmin(1)
            for rows in flat.split(QUANTIZE_ROWS_GPU if flat.is_cuda else QUANTIZE_ROWS)
        ]
        return torch.cat(codes).view(z.shape[0], *z.shape[2:])

    def lookup(self, codes: Tensor) -> Tensor:
        """codes [B,t,h,w] -> vectors [B,C,t,h,w]."""
        return self.embedding(codes).movedim(-1, 1).contiguous()


class MoVQ(nn.Module):
    """The whole autoencoder."""

    def __init__(self, cfg: MoVQConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.encoder = Encoder(cfg)
        self.decoder = Decoder(cfg)
        self.quantize = Codebook(cfg.codebook_size, cfg.embed_dim)
        self.quant_conv = CausalConv3d(cfg.z_channels, cfg.embed_dim, (3, 1, 1))
        self.post_quant_conv = CausalConv3d(cfg.embed_dim, cfg.z_channels, (3, 1, 1))

    def latents(self, x: Tensor) -> Tensor:
        """Frames [B,T,3,H,W], T = 1 (image) or a multiple of 4 -> [B,embed,t,h,w]."""
        h = self.encoder(x)
        with torch.autocast(h.device.type, enabled=False):
            return self.quant_conv(h)

    def encode(self, x: Tensor) -> Tensor:
        """Frames [B,T,3,H,W] in [-1,1] -> codes int64 [B,t,H/8,W/8]; several groups are joint."""
        return self.quantize(self.latents(x))

    def decode(self, codes: Tensor, image: bool = False) -> Tensor:
        """Codes [B,t,h,w] -> frames [B,4t,3,8h,8w], or the first frame [B,1,3,8h,8w] if `image`."""
        return self.paint(self.quantize.lookup(codes), image)

    def paint(self, zq: Tensor, image: bool = False) -> Tensor:
        """Codebook vectors [B,embed,t,h,w] -> frames."""
        with torch.autocast(zq.device.type, enabled=False):
            z = self.post_quant_conv(zq)
        return self.decoder(z, zq, image)
