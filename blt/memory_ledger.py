"""Memory ledger: a model, its ranks and what a micro-batch takes in; bytes of the rank that holds most out, by part.

Nothing is allocated: the model may lie on the meta device. Weights, gradients and AdamW's moments are float32.
sharded: FSDP2 shards each weight by rows and gathers a block at a time, in the type of the products; what is in no
block is one more group, gathered for the whole of a micro-batch; n-gram tables are split by columns and never gathered
(`blt.sharding`). replicated: each rank holds everything, and gradients are one buffer (`blt.parallel.FlatGradients`).
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from blt.activations import ActivationBytes
from blt.entropy_model import EntropyModel
from blt.hash_embedding import HashEmbedding
from blt.model import BLT
from blt.recomputation import blocks_of

Spread = Literal["sharded", "replicated"]

STATE_BYTES = 4
"""Of a float32: a weight, its gradient, a moment."""

TABLE_GRADIENT = "gradient of the n-gram tables"

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
class Moment:
    """Bytes that are there at one moment of a micro-batch, besides weights, gradients and moments of the optimiser."""

    name: str
    gathered_weights: int = 0
    """Whole weights: of the group without blocks, of the block at work and of the one that is fetched meanwhile."""
    gathered_gradients: int = 0
    """Whole gradients on their way to the ranks that keep them."""
    activations: int = 0
    lookups: int = 0
    """What lookups in n-gram tables keep, for the bytes of all ranks."""
    table_gradient: int = 0
    """The micro-batch's gradient of the tables, before it is added to that of those before it."""

    @property
    def total(self) -> int:
        gathered = self.gathered_weights + self.gathered_gradients
        return gathered + self.activations + self.lookups + self.table_gradient


@dataclass(frozen=True, kw_only=True)
class MemoryLedger:
    """Bytes on the rank that holds most."""

    weights: int
    gradients: int
    moments: int
    """Of AdamW, with its count of steps."""
    working: Moment
    """The moment at which a micro-batch takes most."""

    @property
    def state(self) -> int:
        """What is there all the time."""
        return self.weights + self.gradients + self.moments

    @property
    def total(self) -> int:
        return self.state + self.working.total


def memory_ledger(
    model: nn.Module,
    *,
    ranks: int,
    spread: Spread,
    gathered: torch.dtype,
    activations: ActivationBytes,
    lookups: int,
    accumulates: bool,
) -> MemoryLedger:
    """The ledger of a model. `gathered`: type of gathered weights; `lookups`: `lookup_bytes` of a rank's micro-batch;
    `accumulates`: more than one micro-batch a step.
    """
    groups = WeightGroups.of(model)
    own_tables = column_elements(groups.tables, ranks if spread == "sharded" else 1)
    if spread == "sharded":
        elements = own_tables + sum(shard_elements(group, ranks) for group in groups.gathered)
        added = STATE_BYTES * own_tables if accumulates else 0
        moments = list(_sharded_moments(groups, ranks, gathered.itemsize, activations, lookups * ranks, added))
    else:
        elements = sum(parameter.numel() for parameter in model.parameters())
        moments = [
            Moment(name="activations", activations=activations.peak, lookups=lookups),
            Moment(name=TABLE_GRADIENT, table_gradient=STATE_BYTES * own_tables),  # added to the one buffer
        ]
    num_parameters = sum(1 for _ in model.parameters())
    return MemoryLedger(
        weights=STATE_BYTES * elements,
        gradients=STATE_BYTES * elements,
        moments=STATE_BYTES * (2 * elements + num_parameters),
        working=max(moments, key=lambda moment: moment.total),
    )


def _sharded_moments(
    groups: WeightGroups, ranks: int, itemsize: int, activations: ActivationBytes, lookups: int, table_gradient: int
) -> Iterator[Moment]:
    """From the end of the forward pass to that of the backward pass, of which each block has two.

    When it starts, activations are most, and the gradients of the block after it are being sent: a float32 copy that is
    there until the next one is made. When it ends, its own gradients are whole, in the type of its weights, and copied
    to be sent (a rank alone makes three such copies, one after the other). Gradients of the group without blocks add up
    until the end.
    """
    rest = ranks * shard_elements(groups.rest, ranks)
    blocks = [ranks * shard_elements(block, ranks) for block in groups.blocks]
    ahead = 1 if ranks > 1 else 0  # a rank alone fetches nothing
    sending = itemsize + STATE_BYTES if ranks > 1 else 3 * STATE_BYTES
    yield Moment(
        name="end of the forward pass",
        gathered_weights=itemsize * (rest + (1 + ahead) * sum(blocks[-1:])),
        activations=activations.forward.most,
        lookups=lookups,
    )
    for number in reversed(range(len(blocks))):
        own, name = blocks[number], f"of the backward pass of block {number + 1} of {len(blocks)}"
        fetched = ahead * sum(blocks[number - 1 : number])
        sent = sum(blocks[number + 1 : number + 2])
        yield Moment(
            name=f"start {name}",
            gathered_weights=itemsize * (rest + own + fetched),
            gathered_gradients=itemsize * rest + STATE_BYTES * sent,
            activations=activations.backward[number].most,
            lookups=lookups,
        )
        yield Moment(
            name=f"end {name}",
            gathered_weights=itemsize * (rest + fetched),
            gathered_gradients=itemsize * rest + sending * own,
            activations=activations.backward[number].left,
            lookups=lookups,
        )
    yield Moment(
        name=TABLE_GRADIENT,
        gathered_weights=itemsize * rest,
        gathered_gradients=itemsize * rest + STATE_BYTES * sum(blocks[:1]),
        table_gradient=table_gradient,
    )
    yield Moment(name="end of the backward pass", gathered_gradients=sending * rest)
