"""The training order: a position in, the sequence that stands there out. Pure; a function of index, seed and position.

Each source is an endless stream with epochs of its own: row groups are permuted, and the sequences of each window of R
permuted row groups are permuted together, anew in every epoch. The source of a position follows a closed-form quota by
weight. Position p = step * G + slot, G sequences per step; a rank's slots are a contiguous share of the G. World size,
number of workers and timing have no say, and resuming needs the step alone.
"""

import hashlib
import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import NamedTuple

import numpy as np

from blt.errors import ConfigError
from pipelines.train.packing import Integers


class Place(NamedTuple):
    """A sequence: number of its row group in the index, and number of the sequence within it."""

    row_group: int
    sequence: int


class Quota:
    """Shares positions out by integer weights: in every run of positions each part gets its share, to a few.

    The parts are split in two again and again. With weight a of b on the left, position p of a node goes left exactly
    if floor((p + 1) a / b) > floor(p a / b), as the floor(p a / b)th there. So every part's stream has no gap, any
    position is found in O(log parts), and in the first n positions a part's count is within log2(parts) + 1 of its
    share.
    """

    def __init__(self, weights: Sequence[int]) -> None:
        self._sums = [0]
        for weight in weights:
            self._sums.append(self._sums[-1] + weight)

    def find(self, position: int) -> tuple[int, int]:
        """The part of a position, and its number in that part's stream."""
        low, high = 0, len(self._sums) - 1
        while high - low > 1:
            middle = (low + high) // 2
            left, both = self._sums[middle] - self._sums[low], self._sums[high] - self._sums[low]
            before = position * left // both
            if (position + 1) * left // both > before:
                high, position = middle, before
            else:
                low, position = middle, position - before
        return low, position


class MixedOrder:
    """The order over all sources of an index.

    sequences: number of sequences of each row group, in index order; sources: the source of each. weights: of the
    sources that are read, by name; None: all of them, by their number of sequences, so that an epoch of one is an epoch
    of each. ConfigError for a source that is not there.
    """

    def __init__(
        self,
        sequences: Sequence[int],
        sources: Sequence[str],
        *,
        seed: int,
        window: int,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        row_groups: dict[str, list[int]] = {}
        for number, source in enumerate(sources):
            if sequences[number]:
                row_groups.setdefault(source, []).append(number)
        check_sources(weights, row_groups)
        names = sorted(row_groups if weights is None else weights)
        self._row_groups = [row_groups[name] for name in names]
        counts = [tuple(sequences[number] for number in groups) for groups in self._row_groups]
        self._orders = [
            Order(count, (seed, *_name_seed(name)), window) for name, count in zip(names, counts, strict=True)
        ]
        self._quota = Quota(
            _integer_weights([sum(count) for count in counts] if weights is None else [weights[name] for name in names])
        )

    def place(self, position: int) -> Place:
        """The sequence at `position` (0, 1, 2, ...; endless)."""
        source, number = self._quota.find(position)
        row_group, sequence = self._orders[source].place(number)
        return Place(self._row_groups[source][row_group], sequence)

    @property
    def num_sources(self) -> int:
        return len(self._orders)


def check_sources(weights: Mapping[str, float] | None, there: Iterable[str]) -> None:
    """ConfigError for a weight of a source that is not there."""
    names = sorted(there)
    if unknown := sorted(set(weights or {}) - set(names)):
        raise ConfigError(f"sources: there is no source {unknown[0]!r} (there are {', '.join(names)})")


def sequence_id(position: int, place: Place) -> int:
    """64 bits that name what stands at a position; their sum over a step modulo 2**64 tells its global batch."""
    text = f"{position}:{place.row_group}:{place.sequence}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def _integer_weights(weights: Sequence[float]) -> list[int]:
    """Whole numbers in the same proportions, to a thousand-millionth of their sum; whole numbers as they are."""
    if all(isinstance(weight, int) for weight in weights):
        return [int(weight) for weight in weights]
    total = math.fsum(weights)
    return [max(round(10**9 * (weight / total)), 1) for weight in weights]


def _name_seed(name: str) -> tuple[int, ...]:
    """A source's part of the seed: by its name, so that it does not depend on which other sources are read."""
    return tuple(hashlib.sha256(name.encode()).digest()[:4])


@dataclass(frozen=True)
class Order:
    """The order of one source. sequences: number of sequences of each of its row groups."""

    sequences: tuple[int, ...]
    seed: tuple[int, ...]
    window: int = 8
    """R: row groups that are shuffled together, and so the number a reader has in memory."""

    @cached_property
    def epoch_length(self) -> int:
        return sum(self.sequences)

    def place(self, position: int) -> Place:
        """The sequence at `position` (0, 1, 2, ...; endless)."""
        epoch, within = divmod(position, self.epoch_length)
        ends = self._epoch(epoch)[1]
        window = bisect_right(ends, within)
        row_groups, sequences = self._window(epoch, window)
        there = within - (ends[window - 1] if window else 0)
        return Place(int(row_groups[there]), int(sequences[there]))

    @cached_property
    def _epoch(self) -> Callable[[int], tuple[Integers, list[int]]]:
        return lru_cache(maxsize=2)(partial(_permuted_epoch, self))

    @cached_property
    def _window(self) -> Callable[[int, int], tuple[Integers, Integers]]:
        return lru_cache(maxsize=2)(partial(_permuted_window, self))


def rank_slots(global_batch: int, rank: int, world_size: int) -> range:
    """Slots of a step that a rank takes: [rank * G / W, (rank + 1) * G / W)."""
    return range(rank * global_batch // world_size, (rank + 1) * global_batch // world_size)


def micro_steps(global_batch: int, micro_batch: int, world_size: int) -> int:
    """Micro-batches per step, the same on every rank: those of the rank with the most slots."""
    most = -(-global_batch // world_size)
    return -(-most // micro_batch)


def _permuted_epoch(order: Order, epoch: int) -> tuple[Integers, list[int]]:
    """The epoch's permuted row groups and, for each window, the number of sequences up to its end."""
    groups = np.random.default_rng((*order.seed, epoch)).permutation(len(order.sequences)).astype(np.int64)
    ends = np.cumsum(np.asarray(order.sequences, np.int64)[groups])
    last = np.append(np.arange(order.window - 1, len(ends) - 1, order.window), len(ends) - 1)
    return groups, ends[last].tolist()


def _permuted_window(order: Order, epoch: int, window: int) -> tuple[Integers, Integers]:
    """What stands at every place of a window: row groups and sequences. Arrays, since every source has its windows."""
    groups = order._epoch(epoch)[0][window * order.window : (window + 1) * order.window]
    counts = [order.sequences[group] for group in groups.tolist()]
    row_groups = np.repeat(groups, counts)
    sequences = np.concatenate([np.arange(count) for count in counts])
    shuffled = np.random.default_rng((*order.seed, epoch, window + 1)).permutation(len(row_groups))
    return row_groups[shuffled], sequences[shuffled]
