"""What a micro-batch takes in memory besides weights and their gradients: shape of a model and a batch in, bytes out.

The model runs forward and backward on the meta device, where tensors have shapes and types but no values, and the
storages alive are counted: what autograd keeps (the tensors of `blt.attention`'s function among it), what recomputation
keeps and makes again, what operations hand on to each other. Where bytes and patches stand is worked out with real
integers. Lookups in n-gram tables are counted apart, since what they keep depends on the ranks.
Shapes: B rows, T bytes, D width.
"""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blt.attention import Block as QueryBlock
from blt.attention import CausalSpans
from blt.entropy_model import EntropyModel, EntropyModelConfig
from blt.hash_embedding import HashEmbedding
from blt.live_bytes import LiveBytes
from blt.loss import summed_cross_entropy
from blt.meta_kernels import AsOn, DeviceKind
from blt.model import BLT, BLTConfig
from blt.recomputation import Recomputation, blocks_of, recompute_blocks
from blt.step import Batch

META = torch.device("meta")


class Stretch(NamedTuple):
    """A stretch of a pass."""

    most: int
    """Alive at any time of it."""
    left: int
    """Alive at its end."""


@dataclass(frozen=True, kw_only=True)
class ActivationBytes:
    """Of one micro-batch."""

    kept: int
    """From the forward to the backward pass."""
    forward: Stretch
    """Until the backward pass comes to the last block."""
    backward: tuple[Stretch, ...]
    """From the backward pass of a block to that of the block before it, for each block."""

    @property
    def peak(self) -> int:
        """The most at any time."""
        return max(stretch.most for stretch in (self.forward, *self.backward))


@dataclass(frozen=True, kw_only=True)
class Computation:
    """How a model is computed, as far as it decides what is kept."""

    device: DeviceKind = "cuda"
    autocast: torch.dtype | None = None
    """Of the matrix products; None: as the weights."""
    gathered: torch.dtype = torch.float32
    """Of the weights that the forward reads, but the n-gram tables: FSDP gathers them in the type of the products."""
    recomputation: Recomputation = "none"


def activation_bytes(shape: BLTConfig | EntropyModelConfig, batch: Batch, how: Computation) -> ActivationBytes:
    """Of a micro-batch of this shape, without the lookups in n-gram tables. Only the shape of `batch` matters."""
    with META:
        model = BLT(shape) if isinstance(shape, BLTConfig) else EntropyModel(shape)
        if isinstance(model, BLT) and model.local_encoder.hash_embedding is not None:
            model.local_encoder.hash_embedding = _Sums(model.local_encoder.shape.width)  # type: ignore[assignment]
    batch, kernels = batch.to(torch.device("cpu")), AsOn(how.device, how.autocast)
    ids, targets = batch.byte_ids_BT.to(META), batch.targets_BT.to(META)
    live = LiveBytes([*model.to(how.gathered).parameters(), ids, targets])
    stretches = _Stretches(live)
    _prepare(model, kernels, how.recomputation, stretches)
    forward = _forward(model, batch)
    with live:
        nats = summed_cross_entropy(_computed(kernels, forward, ids), targets)
        kept = live.bytes
        nats.backward()
    before, *backward = stretches.ended()
    return ActivationBytes(kept=kept, forward=before, backward=tuple(reversed(backward)))


def _prepare(model: nn.Module, kernels: AsOn, recomputation: Recomputation, stretches: "_Stretches") -> None:
    """Have the blocks compute as on the device, recompute, and mark where their backward passes begin."""
    for block in blocks_of(model):  # inside: as recomputation brings autocast back in the backward pass
        block.forward = functools.partial(_computed, kernels, block.forward)  # type: ignore[method-assign]
    recompute_blocks(model, recomputation)
    for block in blocks_of(model):
        block.forward = functools.partial(_marked, stretches, block.forward)  # type: ignore[method-assign]
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(_drop_gradient)


class _Stretches:
    """What is alive until the backward pass of the last block, and then in that of each block."""

    def __init__(self, live: LiveBytes) -> None:
        self._live = live
        self._found: list[Stretch] = []

    def next(self, _: object = None) -> None:
        """A block's backward pass begins."""
        self._found.append(Stretch(self._live.lap(), self._live.bytes))

    def ended(self) -> list[Stretch]:
        """All of them, in the order of the pass."""
        self.next()
        return self._found


def _marked(stretches: _Stretches, forward: Callable[..., Tensor], *args: Any) -> Tensor:
    out = forward(*args)
    out.register_hook(stretches.next)
    return out


def lookup_bytes(tables: HashEmbedding, batch: Batch) -> int:
    """What the lookups of a batch's bytes in n-gram tables keep for the backward pass. Where the tables are split by
    columns, every rank looks up the bytes of all ranks.
    """
    ids, positions = batch.byte_ids_BT.to(META).long(), torch.empty_like(batch.document_ids_BT, device=META).long()
    table = torch.empty_like(tables.table, device=META, requires_grad=True)
    with LiveBytes([table, ids, positions]) as live:
        rows = tables.table_rows(ids, positions).flatten(0, 1)
        kept = F.embedding_bag(rows, table, mode="sum").grad_fn
        del rows
        found: int = live.bytes
        del kept
    return found


def _computed(kernels: AsOn, forward: Callable[..., Tensor], *args: Any) -> Tensor:
    with kernels:
        return forward(*args)


def _forward(model: BLT | EntropyModel, batch: Batch) -> Callable[[Tensor], Tensor]:
    """The model's forward on the meta device at the places of a real batch."""
    if isinstance(model, EntropyModel):
        seen = model.places(batch.byte_ids_BT, batch.document_ids_BT)
        return lambda ids_BT: model.logits(ids_BT, _on_meta(seen, {}))
    assert batch.patch_lengths_BP is not None
    places = model.places(batch.byte_ids_BT, batch.patch_lengths_BP, batch.document_ids_BT)
    return lambda ids_BT: model.logits(ids_BT, _on_meta(places, {}))


def _on_meta(value: Any, moved: dict[int, Tensor]) -> Any:
    """A value whose dataclasses hold tensors, with those on the meta device; one that stands twice is moved once."""
    if isinstance(value, Tensor):
        return moved.setdefault(id(value), value.to(META))
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    inner = {field.name: _on_meta(getattr(value, field.name), moved) for field in dataclasses.fields(value)}
    if isinstance(value, CausalSpans):
        return _SpansOnMeta(**inner, largest=_largest_blocks(value))
    return dataclasses.replace(value, **inner)


@dataclass(frozen=True)
class _SpansOnMeta(CausalSpans):
    """Spans without values, whose blocks were worked out before."""

    largest: tuple[tuple[QueryBlock, ...], ...] = ()

    @property
    def blocks(self) -> tuple[tuple[QueryBlock, ...], ...]:
        return self.largest


def _largest_blocks(spans: CausalSpans) -> tuple[tuple[QueryBlock, ...], ...]:
    """The two largest blocks of queries, of which one's scores are still there when the next one's are made. All others
    take no more, and all keep the same tensors.
    """

    def scores(block: QueryBlock) -> int:
        return (block.end_query - block.first_query) * (block.end_query + spans.carried - block.first_key)

    blocks = sorted((block for row in spans.blocks for block in row), key=scores, reverse=True)
    return (tuple(blocks[:2]), *(() for _ in spans.blocks[1:]))


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


class _Sums(nn.Module):
    """In place of n-gram tables: their sums, float32 [B,T,D]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, byte_ids_BT: Tensor, positions_BT: Tensor | None) -> Tensor:
        return torch.empty(*byte_ids_BT.shape, self.width, device=META)
