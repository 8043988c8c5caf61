"""Blocks laid out for one position of each row at a time on a CPU: a model in, one of the same function out.

A product with one row reads every weight once and does little else, so that the order of the weights in memory decides
its speed: BLAS reads a matrix with more outputs than inputs two times faster when the outputs lie side by side. The
weights of a norm go into the projection behind it, x * r * w @ W = (x @ w W) * r with r = 1 / rms(x), and a residual is
added by the product itself: a step of a small model consists of starting operations as much as of doing them.
Shapes: R rows, D width, I and O inputs and outputs of a projection, N heads of queries, keys and values together.
"""

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

from blt.cross_attention import CrossAttention
from blt.entropy_model import EntropyModel
from blt.layers import Block, Memory, RMSNorm
from blt.model import BLT

Part = TypeVar("Part", bound=nn.Module)


def blt_for_steps(model: BLT) -> BLT:
    """The model for bytes read one by one. It shares embeddings with `model` and holds other weights a second time, so
    weights that change later are not followed. On other devices and in half precision: `model` itself.
    """
    if not _pays(model.local_decoder.output.weight):
        return model
    encoder, latent, decoder = model.local_encoder, model.latent, model.local_decoder
    return _replaced(
        model,
        local_encoder=_replaced(
            encoder,
            blocks=_blocks(encoder.blocks),
            cross_attention=_cross_attentions(encoder.cross_attention),
            slot_projection=_projection(encoder.slot_projection),
        ),
        latent=_replaced(latent, blocks=_blocks(latent.blocks), projection=_projection(latent.projection)),
        local_decoder=_replaced(
            decoder,
            blocks=_blocks(decoder.blocks),
            cross_attention=_cross_attentions(decoder.cross_attention),
            projection=_projection(decoder.projection),
            **_head(decoder.norm, decoder.output),
        ),
    )


def entropy_model_for_steps(model: EntropyModel) -> EntropyModel:
    """The same of an entropy model."""
    if not _pays(model.output.weight):
        return model
    return _replaced(model, blocks=_blocks(model.blocks), **_head(model.norm, model.output))


def _pays(weight: Tensor) -> bool:
    return weight.is_cpu and weight.dtype in (torch.float32, torch.float64)


def _replaced(module: Part, **parts: nn.Module | None) -> Part:
    """The module with other parts; it shares the rest, hooks included."""
    out = copy.copy(module)
    out._modules = {**module._modules, **parts}
    return out


def _blocks(blocks: nn.ModuleList) -> nn.ModuleList:
    return nn.ModuleList(_StepBlock(block) for block in blocks)


def _cross_attentions(attentions: nn.ModuleList) -> nn.ModuleList:
    return nn.ModuleList(_StepCrossAttention(attention) for attention in attentions)


def _projection(linear: nn.Linear | None) -> nn.Module | None:
    return None if linear is None else _Projection(linear)


def _head(norm: RMSNorm, output: nn.Linear) -> dict[str, nn.Module]:
    return {"norm": nn.Identity(), "output": _NormedProjection(norm, output)}


class _Projection(nn.Module):
    """A bias-free linear layer."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight_IO = _laid_out(linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        return torch.matmul(x, self.weight_IO)


class _NormedProjection(nn.Module):
    """A projection of normed rows."""

    def __init__(self, norm: RMSNorm, linear: nn.Linear) -> None:
        super().__init__()
        self.weight_IO = _laid_out(linear.weight * norm.weight)
        self.mean = 1.0 / len(norm.weight)
        self.eps = norm.weight.new_tensor(norm.eps)

    def forward(self, x: Tensor) -> Tensor:
        norms = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        factors = torch.addcmul(self.eps, norms, norms, value=self.mean).rsqrt_()
        return torch.matmul(x, self.weight_IO).mul_(factors)


class _StepBlock(nn.Module):
    """A `Block` for x [R,1,D]."""

    def __init__(self, block: nn.Module) -> None:
        assert isinstance(block, Block)
        super().__init__()
        attention, feed_forward = block.attention, block.feed_forward
        self.heads, self.head_width = attention.config.heads, attention.config.head_width
        self.qkv = _NormedProjection(block.attention_norm, attention.wqkv)
        self.wo_IO = _laid_out(attention.wo.weight)
        self.gate_up = _NormedProjection(block.ffn_norm, feed_forward.w13)
        self.w2_IO = _laid_out(feed_forward.w2.weight)

    def forward(self, x_R1D: Tensor, memory: Memory, layer: int) -> Tensor:
        x_RD = x_R1D[:, 0]
        qkv_R1NK = self.qkv(x_RD).unflatten(-1, (1, -1, self.head_width))
        mixed_R1HK = memory.attend(layer, qkv_R1NK, self.heads)
        x_RD = torch.addmm(x_RD, mixed_R1HK.flatten(1), self.wo_IO)
        gate, up = self.gate_up(x_RD).chunk(2, -1)
        return torch.addmm(x_RD, nn.functional.silu(gate).mul_(up), self.w2_IO)[:, None]


class _StepCrossAttention(CrossAttention):
    """A `CrossAttention` laid out so."""

    def __init__(self, plain: nn.Module) -> None:
        assert isinstance(plain, CrossAttention)
        nn.Module.__init__(self)
        self.heads, self.wo = plain.heads, plain.wo
        self.normed_queries = _NormedProjection(plain.norm_q, plain.wq)
        self.normed_pairs = _NormedProjection(plain.norm_kv, plain.wkv)

    def _queries(self, x: Tensor) -> Tensor:
        return self._heads(self.normed_queries(x)).flatten(0, 1)

    def _pairs(self, x: Tensor) -> Tensor:
        pairs: Tensor = self.normed_pairs(x).flatten(0, 1)
        return pairs


def _laid_out(weight_OI: Tensor) -> Tensor:
    """The weight as [I,O], in the order in which products with one row read it fastest."""
    outputs, inputs = weight_OI.shape
    weight = weight_OI.detach()
    return weight.t().contiguous() if outputs > inputs else weight.contiguous().t()
