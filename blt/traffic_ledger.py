"""Traffic ledger: a model and its ranks in, the bytes that a rank sends in an update out, by what they are.

sharded (`blt.sharding`), for every micro-batch: FSDP gathers each block for the forward pass and again for the backward
pass, what is in no block once, and sums gradients in float32 onto the ranks that keep them. The n-gram tables exchange
sums of looked-up rows (`blt.column_embedding`); beside that stands what the same tables would cost otherwise.
replicated: the gradients of all micro-batches are summed once. Collectives count as rings: to gather or to sum onto
owners, a rank sends (W - 1) / W of what is whole; to sum onto all, twice that. The few numbers that a step counts and
clips by are left out. Shapes: N bytes of a rank's micro-batch, W ranks.
"""

from dataclasses import dataclass

import torch
from torch import nn

from blt.hash_embedding import HashEmbedding
from blt.memory_ledger import STATE_BYTES, Spread, WeightGroups, shard_elements

ROW_NUMBER_BYTES = 8
"""Row numbers and counts of bytes travel as int64."""


@dataclass(frozen=True, kw_only=True)
class TableTraffic:
    """Bytes that a rank sends in an update for the n-gram tables, in each of the ways to hold them."""

    row_numbers: int = 0
    """By columns: every rank's row numbers to all ranks."""
    sums: int = 0
    """By columns: sums of rows, and their gradients back."""
    by_rows: int = 0
    """By rows instead: each row looked up, from the rank that has it, and its gradient back; row numbers besides."""
    gathered: int = 0
    """As weights of FSDP instead: gathered whole, once for a micro-batch, and the gradient summed onto its ranks."""

    @property
    def by_columns(self) -> int:
        """What is really sent."""
        return self.row_numbers + self.sums


@dataclass(frozen=True, kw_only=True)
class TrafficLedger:
    """Bytes that a rank sends in an update."""

    weights: int
    """Gathered."""
    gradients: int
    """Summed."""
    tables: TableTraffic

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.tables.by_columns


def traffic_ledger(
    model: nn.Module, *, ranks: int, spread: Spread, gathered: torch.dtype, micro_steps: int, micro_batch_bytes: int
) -> TrafficLedger:
    """The ledger of a model; `micro_batch_bytes` = N, padding included. Rank 0's where ranks differ."""
    if spread == "replicated":
        whole = STATE_BYTES * sum(parameter.numel() for parameter in model.parameters())
        return TrafficLedger(weights=0, gradients=2 * (ranks - 1) * whole // ranks, tables=TableTraffic())
    groups, to_others = WeightGroups.of(model), micro_steps * (ranks - 1)
    blocks, rest = (
        sum(shard_elements(group, ranks) for group in groups.blocks),
        shard_elements(groups.rest, ranks),
    )
    tables = [module for module in model.modules() if isinstance(module, HashEmbedding)]
    return TrafficLedger(
        weights=to_others * gathered.itemsize * (2 * blocks + rest),
        gradients=to_others * STATE_BYTES * (blocks + rest),
        tables=_table_traffic(tables[0], ranks, gathered, micro_steps, micro_batch_bytes) if tables else TableTraffic(),
    )


def _table_traffic(
    tables: HashEmbedding, ranks: int, gathered: torch.dtype, micro_steps: int, micro_batch_bytes: int
) -> TableTraffic:
    num_lookups, width = tables.functions * len(tables.group_sizes), tables.table.shape[1]
    own_columns, num_others = min(-(-width // ranks), width), ranks - 1
    sums = micro_batch_bytes * (num_others * own_columns + width - own_columns) * STATE_BYTES
    numbers = micro_batch_bytes * num_lookups * ROW_NUMBER_BYTES
    rows = 2 * micro_batch_bytes * num_lookups * width * STATE_BYTES
    whole = shard_elements([tables.table], ranks) * (gathered.itemsize + STATE_BYTES)
    return TableTraffic(
        row_numbers=micro_steps * num_others * (numbers + ROW_NUMBER_BYTES),
        sums=micro_steps * sums,
        by_rows=micro_steps * (rows + numbers) * num_others // ranks,
        gathered=micro_steps * num_others * whole,
    )
