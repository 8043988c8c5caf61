"""The feed: steps in, this rank's micro-batches out, read and assembled by a thread while the model computes.

Row groups are read whole, decoded once and kept while the order needs them (its window plus one).
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from itertools import islice

import torch

from blt.step import Batch
from pipelines.storage import Storage
from pipelines.train.batch import make_batch
from pipelines.train.config import TrainConfig
from pipelines.train.index import Index
from pipelines.train.order import MixedOrder, micro_steps, rank_slots, sequence_id
from pipelines.train.packing import PackedSequence, cut_sequences
from pipelines.train.row_group import read_row_group

PREFETCHED_STEPS = 2
_CPU = torch.device("cpu")
_READERS = 8
"""Row groups read at the same time: requests to S3 wait together, and decompression has all cores."""


class SequenceReader:
    """Sequences of an index, through a cache of row groups; each is cut as far as its sequences are asked for."""

    def __init__(self, root: str, index: Index, cached_row_groups: int) -> None:
        self._storage, self._index, self._cached = Storage(root), index, cached_row_groups
        self._groups: OrderedDict[int, _CutRowGroup] = OrderedDict()

    def read(self, places: Sequence[tuple[int, int]]) -> list[PackedSequence]:
        """Sequences by row group and number. Row groups that are not in memory are read at the same time."""
        wanted: dict[int, int] = {}
        for row_group, number in places:
            wanted[row_group] = max(number, wanted.get(row_group, 0))
        missing = [one for one in wanted.items() if one[0] not in self._groups]
        if len(missing) > 1:
            with ThreadPoolExecutor(min(len(missing), _READERS), "feed-reader") as readers:
                opened = readers.map(lambda one: self._open(*one), missing)
                self._groups |= zip(dict(missing), opened, strict=True)
        elif missing:
            self._groups[missing[0][0]] = self._open(*missing[0])
        for row_group in wanted:
            self._groups.move_to_end(row_group)
        found = [self._groups[row_group].sequence(number) for row_group, number in places]
        while len(self._groups) > self._cached:
            self._groups.popitem(last=False)
        return found

    def _open(self, row_group: int, sequence: int) -> "_CutRowGroup":
        """A row group, cut as far as this sequence."""
        entry = self._index.row_groups[row_group]
        group = read_row_group(self._storage, entry.path, entry.row_group)
        opened = _CutRowGroup(cut_sequences(group, self._index.sequence_patches, self._index.sequence_bytes))
        opened.sequence(sequence)
        return opened


class _CutRowGroup:
    """The sequences of a row group, each cut when one that is not before it is asked for."""

    def __init__(self, sequences: Iterator[PackedSequence]) -> None:
        self._found: list[PackedSequence] = []
        self._rest = sequences

    def sequence(self, number: int) -> PackedSequence:
        self._found += islice(self._rest, max(0, number + 1 - len(self._found)))
        return self._found[number]


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

    def order(self, index: Index) -> MixedOrder:
        """The order of an index's sequences. ConfigError for a source that is not there."""
        return MixedOrder(
            [group.sequences for group in index.row_groups],
            [group.source for group in index.row_groups],
            seed=self.seed,
            window=self.shuffle_row_groups,
            weights=self.sources,
        )


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
    for anything else drops those and begins there, with the row groups that are in memory. For a CPU, batches are as
    `Batch.to` gives them, which leaves the consumer's thread nothing to do; else they are in pinned memory.
    """

    def __init__(
        self, root: str, index: Index, config: FeedConfig, end_step: int, *, device: torch.device = _CPU
    ) -> None:
        self._config, self._end, self._device = config, end_step, device
        self._with_patches = index.sequence_patches is not None
        self._order = config.order(index)
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
        sequences = self._reader.read(places)
        size = config.micro_batch
        wanted = micro_steps(config.global_batch, size, world_size)
        batches = [make_batch(sequences[i * size : (i + 1) * size], self._with_patches) for i in range(wanted)]
        return StepBatches(
            batches=[batch.to(_CPU) if self._device.type == "cpu" else batch.pinned() for batch in batches],
            sequence_hash=sum(map(sequence_id, positions, places)) % 2**64,
            patches=sum(sequence.num_patches for sequence in sequences),
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
