"""The parts of every transformer here: RMSNorm, rotary positions, self-attention, SwiGLU, block, initialisation.

In: x [B,T,D] and a `Memory`, which brings queries to the keys they see: the `Context` of a forward (spans and rotary
angles, made once and shared by the layers), or a cache of earlier positions (`blt.decoding_cache`). Out: [B,T,D].
Source: the published models. Projections that read the same input are merged: qkv in one matrix, gate and up in one.
Shapes: B rows, T positions, D width, H heads, N heads of queries, keys and values together, K head width.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import BlockMask

from blt.attention import CausalSpans, causal_attention, causal_spans
from blt.errors import ConfigError
from blt.flex_attention import Turns, block_mask, flex_causal_attention, flex_fits, real_turns

PIECE_POSITIONS = 1024
"""Positions that a feed-forward layer reads at once where nothing is kept for a backward pass, on the CPU."""


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


class Memory(Protocol):
    """Where the queries of a stack's layers find their keys and values."""

    def attend(self, layer: int, qkv_BTNK: Tensor, heads: int) -> Tensor:
        """Attention output [B,T,H,K] of a layer's unrotated queries, keys and values; N = heads + 2 x kv_heads."""


@dataclass(frozen=True)
class Context:
    """The positions of one forward: spans, and rotations complex [B or 1, S, 1, K/2] of queries and of keys."""

    spans: CausalSpans
    query_rotations: Tensor
    key_rotations: Tensor

    def attend(self, layer: int, qkv_BTNK: Tensor, heads: int) -> Tensor:
        return self.attend_to(*split_heads(qkv_BTNK, heads))

    def attend_to(self, q_BTHK: Tensor, k_BSHK: Tensor, v_BSHK: Tensor) -> Tensor:
        """Attention output [B,T,H,K] of unrotated queries, keys and values; carried keys and values come first.

        Without gradients the queries are rotated where they are: keys may be carried on, as they were.
        """
        if flex_fits(q_BTHK):
            out = flex_causal_attention(q_BTHK, k_BSHK, v_BSHK, self.real_turns, self.block_mask)
            if out is not None:
                return out
        queries = (rotate if torch.is_grad_enabled() else rotate_)(q_BTHK, self.query_rotations)
        keys = rotate(k_BSHK, self.key_rotations)
        values, repeats = v_BSHK, q_BTHK.shape[2] // k_BSHK.shape[2]
        if repeats != 1:
            keys, values = keys.repeat_interleave(repeats, 2), values.repeat_interleave(repeats, 2)
        return causal_attention(queries, keys, values, self.spans)

    @cached_property
    def real_turns(self) -> Turns:
        """The rotations as FlexAttention takes them."""
        same = self.key_rotations is self.query_rotations
        queries = real_turns(self.query_rotations)
        return queries, queries if same else real_turns(self.key_rotations)

    @cached_property
    def block_mask(self) -> BlockMask:
        """The spans as FlexAttention takes them: made by the first layer that asks for it."""
        return block_mask(self.spans)


def split_heads(qkv_BTNK: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [B,T,heads,K], keys and values [B,T,kv_heads,K] of what a merged projection gives."""
    kv_heads = (qkv_BTNK.shape[2] - heads) // 2
    q, k, v = qkv_BTNK.split([heads, kv_heads, kv_heads], dim=2)
    return q, k, v


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


def rotate_(x_BTHK: Tensor, rotations_BT1C: Tensor) -> Tensor:
    """`rotate` in place where the dtype is wide enough: fresh pages for a long row cost more than the product."""
    if torch.promote_types(x_BTHK.dtype, torch.float32) != x_BTHK.dtype:
        return rotate(x_BTHK, rotations_BT1C)
    torch.view_as_complex(x_BTHK.unflatten(-1, (-1, 2))).mul_(rotations_BT1C)
    return x_BTHK


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, computed in float32 or wider."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        # In one type, so that it runs as one kernel; the sum of squares is taken in float32 all the same.
        return nn.functional.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class SelfAttention(nn.Module):
    """Causal multi-head attention with rotary positions; merged, bias-free projections."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        merged = (config.heads + 2 * config.num_kv_heads) * config.head_width
        self.wqkv = nn.Linear(config.width, merged, bias=False)
        self.wo = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x_BTD: Tensor, memory: Memory, layer: int) -> Tensor:
        """Attention output [B,T,D]."""
        qkv_BTNK = self.wqkv(x_BTD).unflatten(-1, (-1, self.config.head_width))
        out: Tensor = self.wo(memory.attend(layer, qkv_BTNK, self.config.heads).flatten(-2))
        return out


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(gate x) * up x), gate and up merged in w13."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.w13 = nn.Linear(config.width, 2 * config.ffn_width, bias=False)
        self.w2 = nn.Linear(config.ffn_width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():  # it makes kernels of its own of plain operations, for any length
            gated = _gated(self.w13(x))
        elif torch.is_grad_enabled() or not x.is_cpu:
            gated = _Gated.apply(self.w13(x))  # type: ignore[no-untyped-call]
        else:
            # In pieces that stay in the caches: fresh pages for all of a long row cost a sixth of its time.
            pieces = x.flatten(0, -2).split(PIECE_POSITIONS)
            return torch.cat([self.w2(_gated(self.w13(piece))) for piece in pieces]).view_as(x)
        out: Tensor = self.w2(gated)
        return out


def _gated(merged: Tensor) -> Tensor:
    gate, up = merged.chunk(2, dim=-1)
    return nn.functional.silu(gate) * up


class _Gated(torch.autograd.Function):
    """`_gated` that keeps its input alone, and makes the input's gradient in one piece."""

    @staticmethod
    def forward(ctx: Any, merged: Tensor) -> Tensor:
        ctx.save_for_backward(merged)
        return _gated(merged)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (grad,), (merged,) = grads, ctx.saved_tensors
        gate, up = merged.chunk(2, dim=-1)
        grad_merged = torch.empty_like(merged)
        grad_gate, grad_up = grad_merged.chunk(2, dim=-1)
        torch.mul(grad, nn.functional.silu(gate), out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        return grad_merged


class Block(nn.Module):
    """x += attention(norm(x)); x += feed_forward(norm(x))."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.attention = SelfAttention(config)
        self.ffn_norm = RMSNorm(config.width, config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(self, x_BTD: Tensor, memory: Memory, layer: int) -> Tensor:
        x = x_BTD + self.attention(self.attention_norm(x_BTD), memory, layer)
        out: Tensor = x + self.feed_forward(self.ffn_norm(x))
        return out


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
