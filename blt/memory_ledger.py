"""Memory ledger: a model, its ranks and what a micro-batch takes in; bytes of the rank that holds most out, by part.

Nothing is allocated: the model may lie on the meta device. Weights, gradients and AdamW's moments are float32.
sharded: FSDP2 shards each weight by rows and gathers a block at a time, in the type of the products; what is in no
block is one more group, gathered for the whole of a micro-batch; n-gram tables are split by columns and never gathered
(`blt.sharding`). replicated: each rank holds everything, and gradients are one buffer (`blt.parallel.FlatGradients`).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from blt.entropy_model import EntropyModel
from blt.hash_embedding import HashEmbedding
from blt.model import BLT
from blt.recomputation import blocks_of

Spread = Literal["sharded", "replicated"]

STATE_BYTES = 4
"""Of a float32: a weight, its gradient, a moment."""

_PARTS = (
    ("local_encoder.hash_embedding.", "hash_tables"),
    ("local_encoder.cross_attention.", "encoder_cross_attention"),
    ("local_decoder.cross_attention.", "decoder_cross_attention"),
    ("local_encoder.slot_projection.", "projections"),
    ("latent.projection.", "projections"),
    ("local_decoder.projection.", "projections"),
    ("local_encoder.", "local_encoder"),
    ("latent.", "latent"),
    ("local_decoder.", "local_decoder"),
)
"""Which part of a BLT a parameter belongs to, by how its name begins: those of `blt.flops.FlopLedger`."""


def parameters_by_part(model: BLT | EntropyModel) -> dict[str, int]:
    """Parameters of each part that `blt.flops` counts too, every parameter in one; an entropy model is one part."""
    if isinstance(model, EntropyModel):
        return {"transformer": sum(parameter.numel() for parameter in model.parameters())}
    counts = dict.fromkeys(dict(_PARTS).values(), 0)
    for name, parameter in model.named_parameters():
        counts[next(part for beginning, part in _PARTS if name.startswith(beginning))] += parameter.numel()
    return counts


@dataclass(frozen=True, kw_only=True)
class WeightGroups:
    """The weights of a model by how they are spread over ranks."""

    tables: tuple[nn.Parameter, ...]
    """N-gram tables [rows, columns]."""
    blocks: tuple[tuple[nn.Parameter, ...], ...]
    rest: tuple[nn.Parameter, ...]

    @classmethod
    def of(cls, model: nn.Module) -> "WeightGroups":
        tables = tuple(module.table for module in model.modules() if isinstance(module, HashEmbedding))
        blocks = tuple(tuple(block.parameters()) for block in blocks_of(model))
        taken = {id(parameter) for group in (tables, *blocks) for parameter in group}
        rest = tuple(parameter for parameter in model.parameters() if id(parameter) not in taken)
        return cls(tables=tables, blocks=blocks, rest=rest)

    @property
    def gathered(self) -> Sequence[tuple[nn.Parameter, ...]]:
        """Groups that FSDP gathers one by one."""
        return (*self.blocks, self.rest)


def shard_elements(parameters: Iterable[nn.Parameter], ranks: int) -> int:
    """What a rank holds of weights that are shared out by rows, and sends of them; the last rank may hold less."""
    return sum(-(-len(p) // ranks) * (p.numel() // len(p)) for p in parameters)


def column_elements(tables: Iterable[nn.Parameter], ranks: int) -> int:
    """What a rank holds of tables that are shared out by columns."""
    return sum(len(table) * -(-table.shape[1] // ranks) for table in tables)


@dataclass(frozen=True, kw_only=True)
class MemoryLedger:
    """Bytes on the rank that holds most."""

    weights: int
    gradients: int
    moments: int
    """Of AdamW, with its count of steps."""
    gathered_weights: int
    """Whole weights of the group without blocks, of the block at work and of the one that is fetched meanwhile."""
    gathered_gradients: int
    """Whole gradients on their way to the ranks that keep them."""
    activations: int
    """`ActivationBytes.peak` of a micro-batch."""
    lookups: int
    """What lookups in n-gram tables keep, for the bytes of all ranks."""
    table_gradient: int
    """A micro-batch's gradient of the tables, before it is added to that of those before it."""

    @property
    def state(self) -> int:
        """What is there all the time."""
        return self.weights + self.gradients + self.moments

    @property
    def working(self) -> int:
        """The most that a micro-batch adds. The tables' gradient is made last, when activations are gone."""
        gathered = self.gathered_weights + self.gathered_gradients
        return gathered + max(self.activations + self.lookups, self.table_gradient)

    @property
    def total(self) -> int:
        return self.state + self.working


def memory_ledger(
    model: nn.Module,
    *,
    ranks: int,
    spread: Spread,
    gathered: torch.dtype,
    activations: int,
    lookups: int,
    accumulates: bool,
) -> MemoryLedger:
    """The ledger of a model. `gathered`: type of gathered weights; `accumulates`: more than one micro-batch a step."""
    groups = WeightGroups.of(model)
    if spread == "replicated":
        elements = sum(parameter.numel() for parameter in model.parameters())
        added, to_gather = True, (0, 0)  # to the one buffer, from the first micro-batch on
        own_tables = column_elements(groups.tables, 1)
    else:
        own_tables = column_elements(groups.tables, ranks)
        elements = own_tables + sum(shard_elements(group, ranks) for group in groups.gathered)
        added, to_gather = accumulates, _gathered(groups, ranks, gathered.itemsize)
    num_parameters = sum(1 for _ in model.parameters())
    return MemoryLedger(
        weights=STATE_BYTES * elements,
        gradients=STATE_BYTES * elements,
        moments=STATE_BYTES * (2 * elements + num_parameters),
        gathered_weights=to_gather[0],
        gathered_gradients=to_gather[1],
        activations=activations,
        lookups=lookups,
        table_gradient=STATE_BYTES * own_tables if added else 0,
    )


def _gathered(groups: WeightGroups, ranks: int, itemsize: int) -> tuple[int, int]:
    """Bytes of whole weights, and of whole gradients, that FSDP holds at once in the backward pass.

    A group's gradients are in the type of its weights, and copied to float32 to be summed and sent.
    """
    sizes = sorted((ranks * shard_elements(block, ranks) for block in groups.blocks), reverse=True)
    rest, largest = ranks * shard_elements(groups.rest, ranks), max(sizes, default=0)
    at_once = sum(sizes[: 2 if ranks > 1 else 1])  # a rank alone fetches nothing ahead
    sent = max(largest * (itemsize + STATE_BYTES), rest * STATE_BYTES)
    return itemsize * (rest + at_once), itemsize * rest + sent
