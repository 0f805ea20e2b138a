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

Shapes: B batch, T frames, t latent frames (T / 4), C channels, H W pixels, h w latents (H / 8).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUPS = 32  # of every GroupNorm, so all channel counts are multiples of 32
QUANTIZE_ROWS = 4096  # latents compared with the codebook at a time: bounds the distance matrix


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
        object.__setattr__(self, "ch_mult", tuple(self.ch_mult))
        object.__setattr__(self, "attn_resolutions", tuple(self.attn_resolutions))
        if any(self.ch * m % GROUPS for m in self.ch_mult):
            raise ValueError(
                f"ch x ch_mult must be multiples of {GROUPS}: {self.ch}, {self.ch_mult}"
            )
        if 2 ** int(math.log2(self.temporal_downsample_factor)) != self.temporal_downsample_factor:
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


def _norm(channels: int, zq_channels: int | None) -> nn.Module:
    return group_norm(channels) if zq_channels is None else SpatialNorm(channels, zq_channels)


def _apply(norm: nn.Module, x: Tensor, zq: Tensor | None) -> Tensor:
    return norm(x) if zq is None else norm(x, zq)


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
        h = self.conv1(F.silu(_apply(self.norm1, x, zq)))
        h = self.conv2(F.silu(_apply(self.norm2, h, zq)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


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
        n, c, height, width = x.shape
        normed = _apply(self.norm, x, zq)
        # [N,C,h,w] -> [N,1,hw,C]; the default scale of SDPA is C^-0.5, as here.
        q, k, v = (
            layer(normed).reshape(n, 1, c, height * width).transpose(2, 3)
            for layer in (self.q, self.k, self.v)
        )
        out = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(out.transpose(2, 3).reshape(n, c, height, width))


class Downsample(nn.Module):
    """Halve both sides: zeros on the right and bottom only, then a 3x3 convolution of stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double both sides: nearest neighbour, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


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

    def forward(self, x: Tensor, zq: Tensor | None = None) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x, zq)
            if len(self.attn):
                x = self.attn[i](x, zq)
        return x


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
        h = self.conv_in(x.flatten(0, 1))
        for stage in self.down:
            h = stage(h)
            if isinstance(down := getattr(stage, "downsample", None), nn.Module):
                h = down(h)
        h = self.conv_out(F.silu(self.norm_out(self.mid(h)))).to(x.dtype)
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


class Decoder(nn.Module):
    """Quantized latents [B,z,t,h,w] -> frames [B,4t,3,H,W] (the first alone for an image)."""

    def __init__(self, cfg: MoVQConfig) -> None:
        super().__init__()
        zq = cfg.embed_dim
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
        h = self.mid(self.conv_in(h), zq)
        for stage in reversed(self.up):
            h = stage(h, zq)
            if isinstance(up := getattr(stage, "upsample", None), nn.Module):
                h = up(h)
        h = self.conv_out(F.silu(self.norm_out(h, zq)))
        return h.unflatten(0, (batch, frames))


class Codebook(nn.Module):
    """Nearest neighbour in squared L2 among K vectors; ties go to the lowest index."""

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size, dim)
        nn.init.uniform_(self.embedding.weight, -1.0 / size, 1.0 / size)

    def forward(self, z: Tensor) -> Tensor:
        """z [B,C,t,h,w] -> codes int64 [B,t,h,w]."""
        flat = z.movedim(1, -1).reshape(-1, z.shape[1])
        book = self.embedding.weight
        # The expanded form of the distance, as the released code computes it: near-ties agree.
        norms = (book**2).sum(1)
        codes = [
            ((rows**2).sum(1, keepdim=True) + norms - 2 * rows @ book.T).argmin(1)
            for rows in flat.split(QUANTIZE_ROWS)
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
