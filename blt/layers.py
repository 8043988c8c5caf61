"""The parts of every transformer here: RMSNorm, rotary positions, self-attention, SwiGLU, block, initialisation.

In: x [B,T,D] and a `Memory`, which brings queries to the keys they see: the `Context` of a forward (spans and rotary
angles, made once and shared by the layers), or a cache of earlier positions (`blt.decoding_cache`). Out: [B,T,D].
Source: the published models. Projections that read the same input are merged: qkv in one matrix, gate and up in one.
Shapes: B rows, T positions, D width, H heads, N heads of queries, keys and values together, K head width.
"""

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import BlockMask

from blt.attention import CausalSpans, causal_attention, causal_spans
from blt.config_json import ONLY_IF_GIVEN
from blt.errors import ConfigError
from blt.flex_attention import Turns, block_mask, flex_causal_attention, flex_fits, real_turns

PIECE_POSITIONS = 1024
"""Positions that a feed-forward layer reads at once where nothing is kept for a backward pass, on the CPU."""


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Slower rotary angles for contexts longer than those trained on, as Llama 3.1 has them (`rope_type: llama3`).
    Its numbers are the defaults.

    A pair that turns more than `high_freq_factor` times within the original context keeps its frequency, one that turns
    less than `low_freq_factor` times has it divided by `factor`, and those between go over from one to the other.
    """

    factor: float = 8.0
    """What slow pairs' frequencies are divided by."""
    low_freq_factor: float = 1.0
    """Turns below which a pair is slow."""
    high_freq_factor: float = 4.0
    """Turns above which a pair is fast."""
    original_max_position_embeddings: int = 8192
    """Positions of the original context."""

    def __post_init__(self) -> None:
        if not 1 <= self.factor < math.inf:
            raise ConfigError(f"factor must be at least 1 and finite, got {self.factor}")
        if not 0 < self.low_freq_factor < self.high_freq_factor < math.inf:
            raise ConfigError(
                f"low_freq_factor must lie above 0 and below high_freq_factor ({self.high_freq_factor}, finite), got "
                f"{self.low_freq_factor}"
            )
        if self.original_max_position_embeddings < 1:
            raise ConfigError(
                f"original_max_position_embeddings must be at least 1, got {self.original_max_position_embeddings}"
            )


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
    rope_scaling: RopeScaling | None = field(default=None, metadata=ONLY_IF_GIVEN)
    """Slower angles for a longer context, as of Llama 3.1; null = those of the base."""
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

    @property
    def sight(self) -> tuple[object, ...]:
        """What a context depends on: stacks that agree in it can share theirs."""
        return self.window, self.head_width, self.rope_theta, self.rope_scaling

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
    """exp(i * position * frequency), complex64 [B,T,1,head_width / 2]; angles in float32."""
    angles = positions_BT[..., None, None].float() * frequencies(config, positions_BT.device)
    return torch.polar(torch.ones_like(angles), angles)


def frequencies(config: TransformerConfig, device: torch.device) -> Tensor:
    """Of the rotary pairs, in radians per position: theta ** (-2 j / head_width), scaled; float32 [head_width / 2]."""
    pair = torch.arange(0, config.head_width, 2, device=device).float()
    plain: Tensor = 1.0 / (config.rope_theta ** (pair / config.head_width))
    scaling = config.rope_scaling
    if scaling is None:
        return plain
    turns = scaling.original_max_position_embeddings / (2 * math.pi / plain)
    fast = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    fast = fast.clamp(0, 1)
    return (1 - fast) * plain / scaling.factor + fast * plain


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
