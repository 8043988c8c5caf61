"""Blocks laid out for one position of each row at a time on a CPU: a model in, one of the same function out.

A product with one row reads every weight once and does little else, so that the order of the weights in memory decides
its speed: BLAS reads a matrix with more outputs than inputs two times faster when the outputs lie side by side. It
gives such a product to one core, so it is written as a batch of products, one for each thread: of parts of the inputs,
or of the outputs, whichever lie apart. The weights of a norm go into the projection behind it, x * r * w @ W =
(x @ w W) * r with r = 1 / rms(x), and a residual is added by the product itself: a step of a small model consists of
starting operations as much as of doing them.
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


class _Weight:
    """A weight [I,O] in the order in which products with one row read it fastest, and its parts, one for each thread.

    The parts of a product are sums over parts of the inputs where outputs lie side by side, else parts of the outputs.
    """

    def __init__(self, weight_OI: Tensor) -> None:
        (outputs, inputs), weight = weight_OI.shape, weight_OI.detach()
        self.outputs_side_by_side = outputs > inputs
        self.weight_IO = weight.t().contiguous() if self.outputs_side_by_side else weight.contiguous().t()
        split, threads = inputs if self.outputs_side_by_side else outputs, torch.get_num_threads()
        self.parts = threads if split % threads == 0 else 1
        if self.outputs_side_by_side:
            self.parts_PIO = self.weight_IO.unflatten(0, (self.parts, -1))
        else:
            self.parts_PIO = self.weight_IO.t().unflatten(0, (self.parts, -1)).transpose(1, 2)

    def times(self, x: Tensor) -> Tensor:
        """x @ weight: [..., O]."""
        if self.parts == 1 or x.numel() != len(self.weight_IO):
            return torch.matmul(x, self.weight_IO)
        if self.outputs_side_by_side:
            sums = torch.bmm(x.reshape(self.parts, 1, -1), self.parts_PIO)
            return (sums[0].add_(sums[1]) if self.parts == 2 else sums.sum(0)).view(*x.shape[:-1], -1)
        return torch.bmm(x.reshape(1, 1, -1).expand(self.parts, -1, -1), self.parts_PIO).view(*x.shape[:-1], -1)

    def add_times(self, addend_RO: Tensor, x_RI: Tensor) -> Tensor:
        """addend + x @ weight."""
        if self.parts == 1 or len(x_RI) != 1:
            return torch.addmm(addend_RO, x_RI, self.weight_IO)
        if self.outputs_side_by_side:
            return self.times(x_RI).add_(addend_RO)
        addend_P1O = addend_RO.view(self.parts, 1, -1)
        return torch.baddbmm(addend_P1O, x_RI[None].expand(self.parts, -1, -1), self.parts_PIO).view(1, -1)


class _Projection(nn.Module):
    """A bias-free linear layer."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self._weight = _Weight(linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self._weight.times(x)


class _NormedProjection(nn.Module):
    """A projection of normed rows."""

    def __init__(self, norm: RMSNorm, linear: nn.Linear) -> None:
        super().__init__()
        self._weight = _Weight(linear.weight * norm.weight)
        self.mean = 1.0 / len(norm.weight)
        self.eps = norm.weight.new_tensor(norm.eps)

    def forward(self, x: Tensor) -> Tensor:
        norms = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        factors = torch.addcmul(self.eps, norms, norms, value=self.mean).rsqrt_()
        return self._weight.times(x).mul_(factors)


class _StepBlock(nn.Module):
    """A `Block` for x [R,1,D]."""

    def __init__(self, block: nn.Module) -> None:
        assert isinstance(block, Block)
        super().__init__()
        attention, feed_forward = block.attention, block.feed_forward
        self.heads, self.head_width = attention.config.heads, attention.config.head_width
        self.qkv = _NormedProjection(block.attention_norm, attention.wqkv)
        self._wo = _Weight(attention.wo.weight)
        self.gate_up = _NormedProjection(block.ffn_norm, feed_forward.w13)
        self._w2 = _Weight(feed_forward.w2.weight)

    def forward(self, x_R1D: Tensor, memory: Memory, layer: int) -> Tensor:
        x_RD = x_R1D[:, 0]
        qkv_R1NK = self.qkv(x_RD).view(len(x_RD), 1, -1, self.head_width)
        mixed_R1HK = memory.attend(layer, qkv_R1NK, self.heads)
        x_RD = self._wo.add_times(x_RD, mixed_R1HK.flatten(1))
        gate, up = self.gate_up(x_RD).chunk(2, -1)
        return self._w2.add_times(x_RD, nn.functional.silu(gate).mul_(up))[:, None]


class _StepCrossAttention(CrossAttention):
    """A `CrossAttention` laid out so."""

    wo: nn.Module  # type: ignore[assignment]

    def __init__(self, plain: nn.Module) -> None:
        assert isinstance(plain, CrossAttention)
        nn.Module.__init__(self)
        self.heads, self.wo = plain.heads, _Projection(plain.wo)
        self.normed_queries = _NormedProjection(plain.norm_q, plain.wq)
        self.normed_pairs = _NormedProjection(plain.norm_kv, plain.wkv)

    def _queries(self, x: Tensor) -> Tensor:
        return self._heads(self.normed_queries(x)).flatten(0, 1)

    def _pairs(self, x: Tensor) -> Tensor:
        pairs: Tensor = self.normed_pairs(x).flatten(0, 1)
        return pairs
