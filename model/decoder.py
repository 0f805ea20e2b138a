"""The decoder: Llama's shape, written once and plainly, over packed documents.

Legend: B batch, S sequence, T packed tokens (= B*S for a batch), D width, N query heads,
        G key/value heads, C channels per head, V vocabulary.

Pre-norm blocks, RMSNorm with float32 statistics, grouped-query attention, rotary positions in
float32, SwiGLU, no biases, untied head (Emu3, arXiv 2409.18869, table 2; the same graph as
Llama 2). Modules carry the names of transformers' Llama, so the state dict is such a file.

Weights are kept in float32; `compute` is the dtype of the matrix products alone. Explicit casts
replace autocast: it would cast the input of each projection again and pick other operations.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from unimodal.model.attention import Cache, Cached, Packed, Share, SharedPacked
from unimodal.model.parallel import fill
from unimodal.pipeline.settings import Settings

Context = Packed | SharedPacked | Cached


class Shape(Settings):
    """The part of a decoder that a recipe chooses. Upper bounds lie far over any real decoder:
    they are for configurations of strangers, which name sizes that no machine has."""

    width: int = Field(default=256, ge=8, le=1 << 17)
    """Channels of the residual stream."""
    layers: int = Field(default=4, ge=1, le=1 << 12)
    """Number of blocks."""
    heads: int = Field(default=8, ge=1, le=1 << 12)
    """Query heads."""
    kv_heads: int = Field(default=2, ge=1, le=1 << 12)
    """Key and value heads; divides `heads`."""
    head_dim: int = Field(default=0, ge=0, le=1 << 13)
    """Channels per head, even; 0 means width / heads."""
    ffn: int = Field(default=768, ge=1, le=1 << 20)
    """Channels inside the SwiGLU."""
    rope_theta: float = Field(default=1e6, gt=0)
    """Base of the rotary frequencies; Emu3 uses 1e6."""
    norm_eps: float = Field(default=1e-5, gt=0)
    """Epsilon of RMSNorm."""
    qk_norm: bool = False
    """RMSNorm over each head of q and k before the rotation (Emu3.5, Qwen3)."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """On embeddings, attention probabilities and both residual branches; Emu3 trains with 0.1."""
    init_std: float = Field(default=0.02, gt=0)
    """Standard deviation of the initial weights."""

    @model_validator(mode="after")
    def _consistent(self) -> Shape:
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads {self.kv_heads} must divide heads {self.heads}")
        if not self.head_dim and self.width % self.heads:
            raise ValueError(f"heads {self.heads} must divide width {self.width}, or set head_dim")
        if self.channels % 2:
            raise ValueError(f"head_dim {self.channels} must be even: rotary pairs channels")
        return self

    @property
    def channels(self) -> int:
        """Channels per head."""
        return self.head_dim or self.width // self.heads


@dataclass(frozen=True)
class DecoderConfig:
    """Everything that fixes the decoder's graph."""

    shape: Shape
    vocabulary_size: int
    """Number of ids: rows of the embedding and of the head."""
    context: int = 4096
    """The longest sequence that it was made for, in tokens; sampling refuses longer ones."""


class Linear(nn.Linear):
    """A projection without bias, computed in the dtype of its input, its weight kept as it is."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def reset_parameters(self) -> None:
        """Leave the weight as it was allocated: `initialise` fills it, or a file does."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, the statistics in float32; returns `dtype`."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return F.rms_norm(x.float(), (x.shape[-1],), self.weight.float(), self.eps).to(dtype)


def rotary(positions: Tensor, channels: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin tables [T, 1, C] in float32 for integer positions [T].

    The half-rotated layout of Llama (channel i pairs with i + C/2). Float32 always: at position
    131,072 a bfloat16 table is wrong by whole turns.
    """
    half = torch.arange(0, channels, 2, device=positions.device, dtype=torch.float32) / channels
    angles = positions.float()[:, None] * (1.0 / theta**half)  # [T, C/2]
    angles = torch.cat([angles, angles], dim=-1)[:, None]  # [T, 1, C]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate [T, heads, C] by the tables of `rotary`; float32 out."""
    x = x.float()
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class Attention(nn.Module):
    """Projections around the attention of `unimodal.model.attention`."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        c = self.channels = shape.channels
        self.q_proj = Linear(shape.width, shape.heads * c)
        self.k_proj = Linear(shape.width, shape.kv_heads * c)
        self.v_proj = Linear(shape.width, shape.kv_heads * c)
        self.o_proj = Linear(shape.heads * c, shape.width)
        self.q_norm = RMSNorm(c, shape.norm_eps) if shape.qk_norm else None
        self.k_norm = RMSNorm(c, shape.norm_eps) if shape.qk_norm else None

    def forward(
        self, x: Tensor, tables: tuple[Tensor, Tensor], context: Context, layer: int
    ) -> Tensor:
        """x [T, D] -> [T, D]."""
        q = self.q_proj(x).unflatten(-1, (-1, self.channels))  # [T, N, C]
        k = self.k_proj(x).unflatten(-1, (-1, self.channels))  # [T, G, C]
        v = self.v_proj(x).unflatten(-1, (-1, self.channels))  # [T, G, C]
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q, dtype=q.dtype), self.k_norm(k, dtype=k.dtype)
        attended = context.attend(layer, rotate(q, *tables), rotate(k, *tables), v)
        return self.o_proj(attended.flatten(-2))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = Linear(shape.width, shape.ffn)
        self.up_proj = Linear(shape.width, shape.ffn)
        self.down_proj = Linear(shape.ffn, shape.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Attention and MLP, each on a normalised copy of the residual stream."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.self_attn = Attention(shape)
        self.mlp = MLP(shape)
        self.input_layernorm = RMSNorm(shape.width, shape.norm_eps)
        self.post_attention_layernorm = RMSNorm(shape.width, shape.norm_eps)
        self.dropout = nn.Dropout(shape.dropout)

    def forward(
        self,
        x: Tensor,
        tables: tuple[Tensor, Tensor],
        context: Context,
        layer: int,
        compute: torch.dtype,
    ) -> Tensor:
        attended = self.self_attn(self.input_layernorm(x, dtype=compute), tables, context, layer)
        x = x + self.dropout(attended)
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x, dtype=compute)))


class Trunk(nn.Module):
    """Everything below the head."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        shape = config.shape
        # Given a weight, it draws none: on the meta device that would import torch's compiler, 3 s.
        unset = torch.empty(config.vocabulary_size, shape.width)
        self.embed_tokens = nn.Embedding(config.vocabulary_size, shape.width, _weight=unset)
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = RMSNorm(shape.width, shape.norm_eps)
        self.dropout = nn.Dropout(shape.dropout)


class Decoder(nn.Module):
    """Token ids in, logits of the next token out."""

    def __init__(self, config: DecoderConfig, seed: int | None = 0) -> None:
        """Build with the initial weights of `seed`; None leaves memory as it is."""
        super().__init__()
        self.config = config
        self.compute = torch.float32
        self.share: Share | None = None  # this process's part of each sequence, if it is shared
        self.model = Trunk(config)
        self.lm_head = Linear(config.shape.width, config.vocabulary_size)
        if seed is not None:
            initialise(self, config.shape.init_std, seed)

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> Decoder:
        """Read a training checkpoint, one step of it, or a directory of Emu3, Llama or Qwen3.

        Raises `UnimodalError` naming what is missing or does not fit.
        """
        from unimodal.model.checkpoint import load_decoder

        return load_decoder(Path(path), device)

    def hidden(self, ids: Tensor, positions: Tensor, context: Context) -> Tensor:
        """Final normalised hidden states [T, D] in the compute dtype.

        `ids` and `positions` are int64 [T]: documents end to end for `Packed`, rows end to end
        (R*K) for `Cached`.
        """
        shape = self.config.shape
        tables = rotary(positions, shape.channels, shape.rope_theta)
        x = self.model.dropout(self.model.embed_tokens(ids)).float()
        for index, block in enumerate(self.model.layers):
            x = block(x, tables, context, index, self.compute)
        return self.model.norm(x, dtype=self.compute)

    def forward(
        self, ids: Tensor, positions: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """Logits in float32: ids [B, S] -> [B, S, V]; packed ids [T] -> [T, V].

        `cu_seqlens` [documents + 1] bounds the documents of a packed sequence (default: one).
        `positions`, shaped as `ids`, restart in each document and row by default.
        """
        if ids.dim() == 2:
            lengths = [ids.shape[1]] * ids.shape[0]
        elif cu_seqlens is None:
            lengths = [len(ids)]
        else:
            lengths = cu_seqlens.diff().tolist()
        if positions is None:
            steps = [torch.arange(length, device=ids.device) for length in lengths]
            positions = torch.cat(steps).view(ids.shape)
        x = self.hidden(ids.flatten(), positions.flatten(), self.packed(lengths))
        return self.lm_head(x).float().view(*ids.shape, -1)

    def packed(self, lengths: list[int]) -> Packed | SharedPacked:
        """The attention of documents of these lengths, with dropout while training."""
        dropout = self.config.shape.dropout if self.training else 0.0
        if self.share is not None:
            return SharedPacked(lengths, self.share, dropout)
        return Packed(lengths, dropout)

    def cache(self, rows: int, length: int) -> Cache:
        """An empty key-value cache for `rows` sequences of at most `length` tokens."""
        shape = self.config.shape
        weight = self.lm_head.weight
        # On the CPU float32 throughout: its bfloat16 attention kernel is the slower one.
        dtype = torch.float32 if weight.device.type == "cpu" else self.compute
        return Cache(
            shape.layers,
            rows,
            shape.kv_heads,
            length,
            shape.channels,
            dtype=dtype,
            device=weight.device,
        )


def initialise(decoder: Decoder, std: float, seed: int) -> None:
    """Fill every matrix from N(0, std), every norm with ones.

    Each tensor's random stream is keyed by its name, so that the same seed gives the same model
    bit for bit whatever the order of creation, and however the tensors are split over processes.
    """
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
                continue
            key = hashlib.sha256(f"{seed}:{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)
            values = torch.empty(parameter.shape).normal_(0.0, std, generator=generator)
            fill(parameter, values)


def parameter_count(decoder: Decoder) -> dict[str, int]:
    """Numbers of parameters: of the embedding, of the head, and of the body between them."""
    total = sum(p.numel() for p in decoder.parameters())
    embedding = decoder.model.embed_tokens.weight.numel()
    head = decoder.lm_head.weight.numel()
    return {"embedding": embedding, "body": total - embedding - head, "head": head}
