"""The parts of every transformer here: RMSNorm, rotary positions, self-attention, SwiGLU, block, initialisation.

In: x [B,T,D] and a `Context` (spans and rotary angles, made once per forward and shared by the layers). Out: [B,T,D].
Source: the published models. Projections that read the same input are merged: qkv in one matrix, gate and up in one.
Shapes: B rows, T positions, D width, H heads, K head width.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from blt.attention import CausalSpans, causal_attention, causal_spans
from blt.errors import ConfigError

KeyValue = tuple[Tensor, Tensor]
"""Unrotated keys and values [B,C,H,K] of the C positions before a chunk."""


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Shape of a stack of pre-norm blocks."""

    width: int
    """D, the width of the residual stream."""
    layers: int
    """Number of blocks."""
    heads: int
    """Query heads; each has width / heads columns."""
    kv_heads: int | None = None
    """Key and value heads (grouped-query attention); null = heads."""
    ffn_multiplier: float | None = None
    """Factor on the feed-forward width int(8/3 * width), before rounding up."""
    ffn_multiple_of: int = 256
    """The feed-forward width is rounded up to a multiple of this."""
    window: int | None = 512
    """A position sees this many positions, itself included; null = its whole document."""
    rope_theta: float = 10000.0
    """Base of the rotary angles."""
    norm_eps: float = 1e-5
    """RMSNorm epsilon."""
    init_scaling: Literal["disabled", "current_depth", "global_depth"] = "disabled"
    """Initial standard deviations are divided by 1, sqrt(2 (layer + 1)) or sqrt(2 (layers + 1))."""

    def __post_init__(self) -> None:
        for name in ("width", "heads", "ffn_multiple_of"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.layers < 0:
            raise ConfigError(f"layers must be at least 0, got {self.layers}")
        if self.width % (2 * self.heads):
            raise ConfigError(f"width {self.width} must be a multiple of 2 x heads ({self.heads})")
        if self.kv_heads is not None and (self.kv_heads < 1 or self.heads % self.kv_heads):
            raise ConfigError(f"heads {self.heads} must be a multiple of kv_heads ({self.kv_heads})")
        if self.window is not None and self.window < 1:
            raise ConfigError(f"window must be at least 1, got {self.window}")

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def num_kv_heads(self) -> int:
        return self.kv_heads or self.heads

    @property
    def ffn_width(self) -> int:
        hidden = int(2 * (4 * self.width) / 3)
        if self.ffn_multiplier is not None:
            hidden = int(self.ffn_multiplier * hidden)
        return -(-hidden // self.ffn_multiple_of) * self.ffn_multiple_of

    def init_factor(self, layer: int) -> float:
        depth = {"disabled": 0.5, "current_depth": layer + 1.0, "global_depth": self.layers + 1.0}[self.init_scaling]
        return float((2 * depth) ** 0.5)


@dataclass(frozen=True)
class Context:
    """What the blocks of one forward share: spans, and rotations complex [B or 1, S, 1, K/2] of queries and of keys."""

    spans: CausalSpans
    query_rotations: Tensor
    key_rotations: Tensor


def context(
    config: TransformerConfig, document_ids_BT: Tensor, positions_BT: Tensor | None = None, carried: int = 0
) -> Context:
    """The context of a batch. Positions count from each document's start unless given (as [B,T], of the T queries).

    With `carried` keys, the positions of the row's first document go on from the carried ones.
    """
    spans = causal_spans(document_ids_BT, config.window, carried)
    positions = spans.positions_BT if positions_BT is None else positions_BT
    queries = rotations(positions, config)
    if not carried:
        return Context(spans, queries, queries)
    before = positions[:, :1] + torch.arange(-carried, 0, device=positions.device)
    return Context(spans, queries, torch.cat((rotations(before, config), queries), 1))


def rotations(positions_BT: Tensor, config: TransformerConfig) -> Tensor:
    """exp(i * position * theta ** (-2 j / head_width)), complex64 [B,T,1,head_width / 2]; angles in float32."""
    pair = torch.arange(0, config.head_width, 2, device=positions_BT.device).float()
    frequencies = 1.0 / (config.rope_theta ** (pair / config.head_width))
    angles = positions_BT[..., None, None].float() * frequencies
    return torch.polar(torch.ones_like(angles), angles)


def rotate(x_BTHK: Tensor, rotations_BT1C: Tensor) -> Tensor:
    """Rotary position embedding of interleaved pairs (x[2i], x[2i + 1]), as one complex product."""
    wide = x_BTHK.to(torch.promote_types(x_BTHK.dtype, torch.float32))
    pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotations_BT1C).flatten(-2).to(x_BTHK.dtype)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, computed in float32 or wider."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)


class SelfAttention(nn.Module):
    """Causal multi-head attention with rotary positions; merged, bias-free projections."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.widths = [config.width, config.num_kv_heads * config.head_width, config.num_kv_heads * config.head_width]
        self.wqkv = nn.Linear(config.width, sum(self.widths), bias=False)
        self.wo = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x_BTD: Tensor, shared: Context, carry: KeyValue | None = None) -> tuple[Tensor, KeyValue]:
        """Attention output [B,T,D], and the unrotated keys and values of carried and new positions."""
        q, k, v = (
            part.unflatten(-1, (-1, self.config.head_width)) for part in self.wqkv(x_BTD).split(self.widths, dim=-1)
        )
        if carry is not None:
            k, v = torch.cat((carry[0], k), 1), torch.cat((carry[1], v), 1)
        rotated, values = rotate(k, shared.key_rotations), v
        if self.config.num_kv_heads != self.config.heads:
            repeats = self.config.heads // self.config.num_kv_heads
            rotated, values = rotated.repeat_interleave(repeats, 2), v.repeat_interleave(repeats, 2)
        out = causal_attention(rotate(q, shared.query_rotations), rotated, values, shared.spans)
        return self.wo(out.flatten(-2)), (k, v)


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(gate x) * up x), gate and up merged in w13."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.w13 = nn.Linear(config.width, 2 * config.ffn_width, bias=False)
        self.w2 = nn.Linear(config.ffn_width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.w13(x).chunk(2, dim=-1)
        out: Tensor = self.w2(nn.functional.silu(gate) * up)
        return out


class Block(nn.Module):
    """x += attention(norm(x)); x += feed_forward(norm(x))."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.attention = SelfAttention(config)
        self.ffn_norm = RMSNorm(config.width, config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(self, x_BTD: Tensor, shared: Context) -> Tensor:
        x, _ = self.step(x_BTD, shared, None)
        return x

    def step(self, x_BTD: Tensor, shared: Context, carry: KeyValue | None) -> tuple[Tensor, KeyValue]:
        """The block on a chunk that follows `carry`; also gives the keys and values the next chunk may need."""
        attended, keys_values = self.attention(self.attention_norm(x_BTD), shared, carry)
        x = x_BTD + attended
        return x + self.feed_forward(self.ffn_norm(x)), keys_values


def init_linear(weight: Tensor, factor: float = 1.0, std: float | None = None) -> None:
    """Truncated normal, cut at 3 std; std defaults to (input width) ** -0.5 / factor (the published initialisation)."""
    std = weight.shape[-1] ** -0.5 / factor if std is None else std
    nn.init.trunc_normal_(weight, 0.0, std, -3 * std, 3 * std)


def init_blocks(blocks: nn.ModuleList, config: TransformerConfig) -> None:
    """Initial weights of a stack of blocks."""
    for layer, block in enumerate(blocks):
        factor = config.init_factor(layer)
        for module in block.modules():
            if isinstance(module, nn.Linear):
                init_linear(module.weight, factor)
            elif isinstance(module, RMSNorm):
                nn.init.ones_(module.weight)
