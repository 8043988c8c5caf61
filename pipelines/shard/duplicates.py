"""Deduplication after the hashes are written: which documents go, found per range of hashes, read back per group.

The second pass takes one partition of all hashes, sorts it, and keeps of equal documents the first by (file rank,
offset). The others are the partition's losers: one file, an index of num_groups + 1 positions and then LOSER records
by (group, rank, offset). Writing a group reads its part of each partition's file as one merged, sorted stream.
"""

import heapq
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import msgspec
import numpy as np
import numpy.typing as npt

from blt.errors import DataError
from pipelines.shard.adopt import create_or_adopt
from pipelines.shard.hash_runs import (
    INDEX_BYTES,
    LOSER,
    LOSER_BYTES,
    NUM_BUCKETS,
    POSITION,
    POSITION_BYTES,
    RECORD,
    RECORD_BYTES,
    SCRATCH,
    GroupRuns,
    Records,
    order_by_hash,
    read_runs,
)
from pipelines.storage import Storage

ALL_RUNS = f"{SCRATCH}/runs.json"
"""The runs of all groups, in order: written when the first pass is complete, read by every task of the second."""

PARTITION_BYTES = 128 * 2**20
"""Records of one partition, about; a task takes some five times that while it sorts them."""

_THREADS = 16
"""Reads of small ranges wait on the network and not on the processor."""

_CHUNK_RECORDS = 2**14
"""Losers of one partition that a group holds at a time: 192 KiB."""


def num_partitions(groups: Sequence[GroupRuns]) -> int:
    """Partitions of about PARTITION_BYTES; at most one for each bucket of the hashes."""
    total = sum(run.records for group in groups for run in group.runs) * RECORD_BYTES
    return min(NUM_BUCKETS, max(1, math.ceil(total / PARTITION_BYTES)))


def losers_path(partition: int) -> str:
    return f"{SCRATCH}/losers/{partition:05d}.bin"


def find_losers(partition: int, num_partitions: int, storage: Storage) -> None:
    """Write the losers among the hashes of one partition."""
    groups = msgspec.json.decode(storage.read_bytes(ALL_RUNS), type=list[GroupRuns])
    first = partition * NUM_BUCKETS // num_partitions
    end = (partition + 1) * NUM_BUCKETS // num_partitions
    records, group_of = _read_buckets(groups, first, end, storage)
    order, repeats = order_by_hash(records)
    order = order[repeats]
    records, group_of = records[order], group_of[order]
    order = np.lexsort((records["offset"], records["rank"], group_of))
    losers = records[order][["rank", "offset"]].astype(LOSER)
    index = np.searchsorted(group_of[order], np.arange(len(groups) + 1, dtype=np.uint32)).astype(POSITION)
    with create_or_adopt(losers_path(partition), storage) as new:
        new.write(index.view(np.uint8))
        new.write(losers.view(np.uint8))


def _read_buckets(
    groups: Sequence[GroupRuns], first: int, end: int, storage: Storage
) -> tuple[Records, npt.NDArray[np.uint32]]:
    """The records of the buckets [first, end) of all runs, and the group of each."""
    runs = [(group.group, run) for group in groups for run in group.runs]

    def bounds(place: int) -> tuple[int, int]:
        data = storage.read_range(runs[place][1].path, first * POSITION_BYTES, (end + 1) * POSITION_BYTES)
        index = np.frombuffer(data, dtype=POSITION)
        return int(index[0]), int(index[-1])

    with ThreadPoolExecutor(_THREADS) as pool:
        found = list(pool.map(bounds, range(len(runs))))
        starts = np.cumsum([0, *(stop - start for start, stop in found)])
        records, group_of = np.empty(starts[-1], dtype=RECORD), np.empty(starts[-1], dtype=np.uint32)

        def fill(place: int) -> None:
            (group, run), (start, stop) = runs[place], found[place]
            ends = INDEX_BYTES + start * RECORD_BYTES, INDEX_BYTES + stop * RECORD_BYTES
            data = storage.read_range(run.path, *ends)
            records[starts[place] : starts[place + 1]] = np.frombuffer(data, dtype=RECORD)
            group_of[starts[place] : starts[place + 1]] = group

        list(pool.map(fill, range(len(runs))))
    return records, group_of


class Duplicates:
    """The documents of one group that go, asked for in the order of (rank, offset); bounded in memory."""

    def __init__(self, group: int, num_groups: int, num_partitions: int, storage: Storage) -> None:
        """`num_partitions` 0: nothing goes, since duplicates are kept."""
        self._group, self._num_groups, self._storage = group, num_groups, storage
        losers = heapq.merge(*self._streams(num_partitions)) if num_partitions else iter(())
        self._losers: Iterator[tuple[int, int]] = iter(losers)
        self._next = next(self._losers, None)

    def take(self, rank: int, offset: int) -> bool:
        """Whether this document goes."""
        if self._next is None or self._next > (rank, offset):
            return False
        if self._next < (rank, offset):
            self._changed()
        self._next = next(self._losers, None)
        return True

    def finish(self) -> None:
        """DataError if a document that should go was never met."""
        if self._next is not None:
            self._changed()

    def _changed(self) -> None:
        raise DataError(
            f"{self._storage.root_uri}: an input of group {self._group} changed while its duplicates were looked for; "
            "remove the directory and start again"
        )

    def _streams(self, num_partitions: int) -> list[Iterator[tuple[int, int]]]:
        """Sorted losers: of each run of the group, and of each partition."""
        runs = read_runs(self._group, self._storage).runs
        groups = self._group * POSITION_BYTES, (self._group + 2) * POSITION_BYTES

        def stream(partition: int) -> Iterator[tuple[int, int]]:
            path = losers_path(partition)
            start, stop = np.frombuffer(self._storage.read_range(path, *groups), dtype=POSITION).tolist()
            return self._losers_of(path, (self._num_groups + 1) * POSITION_BYTES, start, stop)

        with ThreadPoolExecutor(_THREADS) as pool:
            streams = list(pool.map(stream, range(num_partitions)))
        return [*streams, *(self._losers_of(run.path, run.losers_start, 0, run.losers) for run in runs)]

    def _losers_of(self, path: str, header: int, start: int, stop: int) -> Iterator[tuple[int, int]]:
        for first in range(start, stop, _CHUNK_RECORDS):
            last = min(first + _CHUNK_RECORDS, stop)
            data = self._storage.read_range(path, header + first * LOSER_BYTES, header + last * LOSER_BYTES)
            yield from np.frombuffer(data, dtype=LOSER).tolist()
