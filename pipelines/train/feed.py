"""The feed: steps in, this rank's micro-batches out, read and assembled by a thread while the model computes.

Row groups are read whole, decoded once and kept while the order needs them (its window plus one).
"""

import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

from blt.step import Batch
from pipelines.storage import Storage
from pipelines.train.batch import make_batch
from pipelines.train.index import Index
from pipelines.train.order import Order, micro_steps, rank_slots
from pipelines.train.packing import Integers, PackedSequence, RowGroup, cut_sequences, take_sequence
from pipelines.train.row_group import read_row_group

PREFETCHED_STEPS = 2


class SequenceReader:
    """Sequences of an index by (row group, number), through a cache of decoded row groups."""

    def __init__(self, root: str, index: Index, cached_row_groups: int) -> None:
        self._storage, self._index, self._cached = Storage(root), index, cached_row_groups
        self._groups: OrderedDict[int, tuple[RowGroup, Integers]] = OrderedDict()

    def read(self, row_group: int, sequence: int) -> PackedSequence:
        group, cuts = self._group(row_group)
        return take_sequence(group, int(cuts[sequence]), int(cuts[sequence + 1]))

    def _group(self, number: int) -> tuple[RowGroup, Integers]:
        if number not in self._groups:
            entry = self._index.row_groups[number]
            group = read_row_group(self._storage, entry.path, entry.row_group)
            cuts = cut_sequences(group, self._index.sequence_patches, self._index.sequence_bytes)
            self._groups[number] = (group, cuts)
            if len(self._groups) > self._cached:
                self._groups.popitem(last=False)
        self._groups.move_to_end(number)
        return self._groups[number]


@dataclass(frozen=True, kw_only=True)
class FeedConfig:
    """Which part of the order a rank reads."""

    seed: int
    shuffle_row_groups: int
    global_batch: int
    micro_batch: int
    rank: int
    world_size: int


class Feed:
    """Iterates over (step, micro-batches) from `first_step` to `end_step`; a context manager that ends its thread."""

    def __init__(self, root: str, index: Index, config: FeedConfig, first_step: int, end_step: int) -> None:
        self._config, self._index = config, index
        self._steps = range(first_step, end_step)
        counts = tuple(group.sequences for group in index.row_groups)
        self._order = Order(counts, config.seed, config.shuffle_row_groups)
        self._reader = SequenceReader(root, index, config.shuffle_row_groups + 1)
        self._queue: queue.Queue[tuple[int, list[Batch]] | BaseException] = queue.Queue(PREFETCHED_STEPS)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._fill, name="feed", daemon=True)
        self.waited_seconds = 0.0
        """Time that the consumer stood still for data."""

    def __enter__(self) -> "Feed":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stopped.set()
        while self._thread.is_alive():
            self._drain()
            self._thread.join(0.05)

    def __iter__(self) -> Iterator[tuple[int, list[Batch]]]:
        for _ in self._steps:
            asked = time.perf_counter()
            item = self._queue.get()
            self.waited_seconds += time.perf_counter() - asked
            if isinstance(item, BaseException):
                raise item
            yield item

    def batches(self, step: int) -> list[Batch]:
        """This rank's micro-batches of a step: as many on every rank, the last ones empty where slots run out."""
        config = self._config
        slots = rank_slots(config.global_batch, config.rank, config.world_size)
        places = [self._order.place(step * config.global_batch + slot) for slot in slots]
        sequences = [self._reader.read(*place) for place in places]
        size = config.micro_batch
        wanted = micro_steps(config.global_batch, size, config.world_size)
        with_patches = self._index.sequence_patches is not None
        return [make_batch(sequences[i * size : (i + 1) * size], with_patches) for i in range(wanted)]

    def _fill(self) -> None:
        try:
            for step in self._steps:
                if not self._put((step, self.batches(step))):
                    return
        except BaseException as error:
            self._put(error)

    def _put(self, item: tuple[int, list[Batch]] | BaseException) -> bool:
        while not self._stopped.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def _drain(self) -> None:
        while not self._queue.empty():
            self._queue.get_nowait()
