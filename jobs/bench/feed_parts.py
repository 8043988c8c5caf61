"""What the feed costs, whole and by parts, and how soon it begins: a dataset and its index in, seconds out.

CPU seconds are the process's, all threads, so that other processes on the same cores matter less.
"""

import contextlib
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from blt.step import Batch
from blt.vocabulary import BYTE_OFFSET
from pipelines.shard_file import open_shard
from pipelines.storage import Storage
from pipelines.train.batch import make_batch
from pipelines.train.feed import Feed, FeedConfig
from pipelines.train.index import Index
from pipelines.train.order import sequence_id
from pipelines.train.packing import cut_sequences
from pipelines.train.row_group import read_row_group

_CPU = torch.device("cpu")
_COLUMNS = ("n_bytes", "patch_starts", "text")
"""What is read of a patch dataset."""


@dataclass(frozen=True, kw_only=True)
class Fed:
    """What is read, and by whom."""

    data: str
    index: Index
    config: FeedConfig
    rank: int
    world_size: int


@dataclass(frozen=True, kw_only=True)
class FeedRun:
    """Updates read from first to last."""

    text_bytes: int
    """Targets that are bytes of documents; 0 where they were not counted."""
    cpu_seconds: float
    seconds: float


def run_feed(fed: Fed, steps: int, count: Callable[[Batch], int] = lambda batch: 0) -> FeedRun:
    """The first `steps` updates through a `Feed` as a training worker reads them, each batch moved to its device."""
    began, cpu_began, counted = time.perf_counter(), time.process_time(), 0
    with Feed(fed.data, fed.index, fed.config, steps) as feed:
        for step in range(steps):
            for batch in feed.step(step, fed.rank, fed.world_size).batches:
                counted += count(batch.to(_CPU))
    cpu_seconds, seconds = time.process_time() - cpu_began, time.perf_counter() - began
    return FeedRun(text_bytes=counted, cpu_seconds=cpu_seconds, seconds=seconds)


def assemble_alone(fed: Fed, steps: int) -> FeedRun:
    """The same updates made by the calling thread, so that no thread waits for another."""
    began, cpu_began = time.perf_counter(), time.process_time()
    with Feed(fed.data, fed.index, fed.config, steps) as feed:
        for step in range(steps):
            feed.assemble(step, fed.rank, fed.world_size)
    return FeedRun(text_bytes=0, cpu_seconds=time.process_time() - cpu_began, seconds=time.perf_counter() - began)


def text_targets(batch: Batch) -> int:
    """Targets that are bytes of documents."""
    return int((batch.targets_BT >= BYTE_OFFSET).sum())


@dataclass(frozen=True, kw_only=True)
class Parts:
    """CPU seconds of what a feed does, every part by itself and on one thread."""

    text_bytes: int
    parquet: float
    """pyarrow alone: the columns that are read, decoded. The other parts leave it out."""
    read: float
    """From a file to a row group in memory, pyarrow's part in it."""
    cut: float
    """Its sequences found."""
    batch: float
    """Their micro-batches made."""
    device: float
    """Those on the device, here the CPU: int64."""
    order: float
    """What stands at as many positions, and its ids."""

    @property
    def feed(self) -> float:
        """All but pyarrow alone."""
        return self.read + self.cut + self.batch + self.device + self.order


def measure_parts(fed: Fed, num_row_groups: int) -> Parts:
    """The parts on the first row groups of an index, of whatever source, in stored order."""
    storage, watch, text_bytes, sequences = Storage(fed.data), _Watch(), 0, 0
    index, size = fed.index, fed.config.micro_batch
    for entry in index.row_groups[:num_row_groups]:
        with watch("parquet"), open_shard(storage, entry.path, verify=False) as shard:
            shard.read(entry.row_group, _COLUMNS)
        with watch("read"):
            group = read_row_group(storage, entry.path, entry.row_group)
        with watch("cut"):
            found = list(cut_sequences(group, index.sequence_patches, index.sequence_bytes))
        for first in range(0, len(found), size):
            with watch("batch"):
                batch = make_batch(found[first : first + size], with_patches=index.sequence_patches is not None)
            with watch("device"):
                batch.to(_CPU)
        text_bytes, sequences = text_bytes + len(group.text), sequences + len(found)
    with watch("order"):
        order = fed.config.order(index)
        sum(sequence_id(position, order.place(position)) for position in range(sequences))
    return Parts(text_bytes=text_bytes, **watch.seconds)


class _Watch:
    """CPU seconds by name."""

    def __init__(self) -> None:
        self.seconds = Counter[str]()

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        began = time.process_time()
        yield
        self.seconds[name] += time.process_time() - began  # type: ignore[assignment]


def first_batch_seconds(fed: Fed, steps: Sequence[int], *, from_disk: bool) -> list[float]:
    """From an index in memory to a rank's batches of each of the steps, with a new `Feed` each time.

    from_disk: the system's cache of the dataset's files is dropped before; else they are in it if they fit.
    """
    found = []
    for step in steps:
        if from_disk:
            _drop_from_cache(fed)
        began = time.perf_counter()
        with Feed(fed.data, fed.index, fed.config, step + 1) as feed:
            feed.step(step, fed.rank, fed.world_size)
            found.append(time.perf_counter() - began)
    return found


def _drop_from_cache(fed: Fed) -> None:
    storage = Storage(fed.data)
    for path in {entry.path for entry in fed.index.row_groups}:
        with open(storage.url(path), "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
