"""The feed: steps in, this rank's micro-batches out, read and assembled by a thread while the model computes.

Row groups are read whole, decoded once and kept while the order needs them (its window plus one).
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, fields

from blt.step import Batch
from pipelines.storage import Storage
from pipelines.train.batch import make_batch
from pipelines.train.config import TrainConfig
from pipelines.train.index import Index
from pipelines.train.order import MixedOrder, micro_steps, rank_slots, sequence_id
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
    """The order that is read."""

    seed: int
    shuffle_row_groups: int
    global_batch: int
    micro_batch: int
    sources: Mapping[str, float] | None = None

    @classmethod
    def of(cls, config: TrainConfig) -> "FeedConfig":
        """What a training run says of it."""
        return cls(**{field.name: getattr(config, field.name) for field in fields(cls)})


@dataclass(frozen=True, kw_only=True)
class StepBatches:
    """What a rank computes of a step."""

    batches: list[Batch]
    """As many on every rank, the last ones empty where slots run out."""
    sequence_hash: int
    """Sum of the `sequence_id`s that were read, modulo 2**64."""
    patches: int
    """Patches of the sequences, those that open a fragment not counted."""


Request = tuple[int, int, int]
"""Step, rank, world size."""


class Feed:
    """Gives any rank's micro-batches of any step; a context manager that ends its thread.

    A thread reads and assembles the steps that follow the last one asked for, for the same rank and world size. Asking
    for anything else drops those and begins there, with the row groups that are in memory.
    """

    def __init__(self, root: str, index: Index, config: FeedConfig, end_step: int, *, pin_memory: bool = False) -> None:
        self._config, self._end, self._pin_memory = config, end_step, pin_memory
        self._with_patches = index.sequence_patches is not None
        self._order = MixedOrder(
            [group.sequences for group in index.row_groups],
            [group.source for group in index.row_groups],
            seed=config.seed,
            window=config.shuffle_row_groups,
            weights=config.sources,
        )
        self._reader = SequenceReader(root, index, (config.shuffle_row_groups + 1) * self._order.num_sources)
        self._changed = threading.Condition()
        self._next: Request | None = None
        """What the thread assembles next; None: nothing was asked for yet."""
        self._ready: dict[Request, StepBatches | BaseException] = {}
        self._stopped = False
        self._thread = threading.Thread(target=self._fill, name="feed", daemon=True)
        self.waited_seconds = 0.0
        """Time that the consumer stood still for data."""

    def __enter__(self) -> "Feed":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join()

    def step(self, step: int, rank: int, world_size: int) -> StepBatches:
        """A rank's micro-batches of a step; what the thread raised while it made them is raised here."""
        wanted, asked = (step, rank, world_size), time.perf_counter()
        with self._changed:
            # A healed worker comes from some steps ago: those that it left behind would take the room of others.
            for made in [made for made in self._ready if made[0] < step or made[1:] != wanted[1:]]:
                del self._ready[made]
            if wanted not in self._ready and wanted != self._next:
                self._ready.clear()
                self._next = wanted
            self._changed.notify_all()
            self._changed.wait_for(lambda: wanted in self._ready)
            found = self._ready.pop(wanted)
            self._changed.notify_all()
        self.waited_seconds += time.perf_counter() - asked
        if isinstance(found, BaseException):
            raise found
        return found

    def assemble(self, step: int, rank: int, world_size: int) -> StepBatches:
        """A rank's micro-batches of a step, made here and now."""
        config = self._config
        positions = [step * config.global_batch + slot for slot in rank_slots(config.global_batch, rank, world_size)]
        places = [self._order.place(position) for position in positions]
        sequences = [self._reader.read(*place) for place in places]
        size = config.micro_batch
        wanted = micro_steps(config.global_batch, size, world_size)
        batches = [make_batch(sequences[i * size : (i + 1) * size], self._with_patches) for i in range(wanted)]
        return StepBatches(
            batches=[batch.pinned() for batch in batches] if self._pin_memory else batches,
            sequence_hash=sum(map(sequence_id, positions, places)) % 2**64,
            patches=sum(len(one.patch_lengths) - len(one.fragment_starts) for one in sequences),
        )

    def _fill(self) -> None:
        while (request := self._awaited()) is not None:
            try:
                made: StepBatches | BaseException = self.assemble(*request)
            except BaseException as error:
                made = error
            with self._changed:
                if self._next == request:  # else something else was asked for meanwhile
                    step, *share = request
                    self._ready[request] = made
                    self._next = (step + 1, *share)  # type: ignore[assignment]
                    self._changed.notify_all()

    def _awaited(self) -> Request | None:
        """The next step to assemble, once there is room for it; None when the feed is over."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._has_work())
            return None if self._stopped else self._next

    def _has_work(self) -> bool:
        return self._next is not None and self._next[0] < self._end and len(self._ready) < PREFETCHED_STEPS
