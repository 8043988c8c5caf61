"""The training order: a position in, the sequence that stands there out. Pure; a function of index, seed and position.

Row groups are permuted, and the sequences of each window of R permuted row groups are permuted together, anew in every
epoch. Position p = step * G + slot, G sequences per step; a rank's slots are a contiguous share of the G. World size,
number of workers and timing have no say, and resuming needs the step alone.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np

from pipelines.train.packing import Integers


class Place(NamedTuple):
    """A sequence: number of its row group in the index, and number of the sequence within it."""

    row_group: int
    sequence: int


@dataclass(frozen=True, eq=False)  # compared by identity: the caches below must not hash 100,000 row groups a lookup
class Order:
    """sequences: number of sequences of each row group, in index order."""

    sequences: tuple[int, ...]
    seed: int
    window: int = 8
    """R: row groups that are shuffled together, and so the number a reader has in memory."""

    @cached_property
    def epoch_length(self) -> int:
        return sum(self.sequences)

    def place(self, position: int) -> Place:
        """The sequence at `position` (0, 1, 2, ...; endless)."""
        epoch, within = divmod(position, self.epoch_length)
        _, ends = _epoch(self, epoch)
        window = int(np.searchsorted(ends, within, side="right"))
        row_groups, sequences = _window(self, epoch, window)
        at = within - (int(ends[window - 1]) if window else 0)
        return Place(int(row_groups[at]), int(sequences[at]))


def rank_slots(global_batch: int, rank: int, world_size: int) -> range:
    """Slots of a step that a rank takes: [rank * G / W, (rank + 1) * G / W)."""
    return range(rank * global_batch // world_size, (rank + 1) * global_batch // world_size)


def micro_steps(global_batch: int, micro_batch: int, world_size: int) -> int:
    """Micro-batches per step, the same on every rank: those of the rank with the most slots."""
    most = -(-global_batch // world_size)
    return -(-most // micro_batch)


@lru_cache(maxsize=4)
def _epoch(order: Order, epoch: int) -> tuple[Integers, Integers]:
    """The epoch's permuted row groups and, for each window, the number of sequences up to its end."""
    groups = np.random.default_rng((order.seed, epoch)).permutation(len(order.sequences)).astype(np.int64)
    counts = np.asarray(order.sequences, np.int64)[groups]
    ends = np.cumsum(counts)
    last = np.append(np.arange(order.window - 1, len(ends) - 1, order.window), len(ends) - 1)
    return groups, ends[last]


@lru_cache(maxsize=4)
def _window(order: Order, epoch: int, window: int) -> tuple[Integers, Integers]:
    """Row group and sequence number of every place of a window."""
    groups = _epoch(order, epoch)[0][window * order.window : (window + 1) * order.window]
    counts = [order.sequences[group] for group in groups]
    row_groups = np.repeat(groups, counts)
    sequences = np.concatenate([np.arange(count) for count in counts])
    shuffled = np.random.default_rng((order.seed, epoch, window + 1)).permutation(len(row_groups))
    return row_groups[shuffled], sequences[shuffled]
