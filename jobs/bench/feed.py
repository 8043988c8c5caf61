"""Measure the feed of training: text per CPU-second beside pyarrow alone, its parts, the first batch of a resumed run.

The last line of standard output holds every figure as the median of the repeats, with all repeats beside it, and the
goals. Text is the bytes of documents that are targets. Ray makes dataset and index; no Ray runs while it is measured.
"""

import itertools
import logging
import random
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from blt.errors import ConfigError
from blt.patching import PatchRule
from jobs.bench.circumstances import BenchResult, circumstances, summary, working_directory
from jobs.bench.corpus import prose, write_corpus
from jobs.bench.feed_parts import (
    Fed,
    Parts,
    assemble_alone,
    first_batch_seconds,
    measure_parts,
    run_feed,
    text_targets,
)
from jobs.bench.turns import peak_memory_bytes
from jobs.ray_session import ray_session
from pipelines.manifest import Manifest, read_manifest
from pipelines.patch.dataset import patch_dataset
from pipelines.patch.plan import PatchConfig
from pipelines.storage import Storage
from pipelines.train.config import TrainConfig
from pipelines.train.feed import FeedConfig
from pipelines.train.index import Index, build_index

logger = logging.getLogger(__name__)

GOALS = {"feed_bytes_per_cpu_second": ">= 100000000", "first_batch_seconds": "< 0.1"}

_SOURCES = ("first", "second")
_SHORTEST_BYTES, _LONGEST_BYTES = 500, 7000
_TEXTS = 1500
"""Of the longest length: about 10 MB, which a dataset repeats in other pieces."""
_RULE = PatchRule(kind="space", max_patch_length=7)
"""Gives such words patches of 4.4 bytes."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Keys of `blt bench feed`."""

    patches: str | None = None
    """Patch dataset that is read (the output of `blt patch`); null: seeded words of two sources, made here."""
    train: TrainConfig = field(default_factory=lambda: TrainConfig(steps=1, global_batch=8))
    """As for `blt train`: limits of a sequence, batches, seed, window and sources count here, and cpus_per_worker."""
    rank: int = 0
    """Whose share is read."""
    world_size: int = 1
    """Of how many workers."""
    steps: int | None = None
    """Updates that are read, the first ones; null: as many as hold all sequences once."""
    repeats: int = 3
    """Passes over these updates, and over the parts."""
    resumes: int = 20
    """Steps, drawn at random, that a run is resumed at."""
    bytes: int = 192 * 2**20
    """Text of the dataset that is made: 24 row groups."""
    seed: int = 0
    """Of the words, and of the steps that are resumed at."""
    directory: str | None = None
    """Where to work; null: a temporary directory that is removed."""

    def __post_init__(self) -> None:
        for name in ("world_size", "repeats", "resumes", "bytes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.steps is not None and self.steps < 1:
            raise ConfigError(f"steps must be at least 1, got {self.steps}")
        if not 0 <= self.rank < self.world_size:
            raise ConfigError(f"rank must lie between 0 and world_size - 1 = {self.world_size - 1}, got {self.rank}")


def run(config: Config) -> BenchResult:
    """Measure everything; a minute or two for the dataset that is made, on two cores."""
    with working_directory(config.directory) as directory:
        with ray_session():
            data = config.patches or _dataset(config, directory)
            limits = (config.train.sequence_patches, config.train.sequence_bytes)
            index = build_index(data, "train", *limits)
        feed = FeedConfig.of(config.train)
        fed = Fed(data=data, index=index, config=feed, rank=config.rank, world_size=config.world_size)
        torch.set_num_threads(max(1, int(config.train.cpus_per_worker)))
        steps = config.steps or -(-index.sequences // feed.global_batch)
        figures = _size(read_manifest(data), index, steps) | _throughput(config, fed, steps) | _resume(config, fed)
        memory = {"peak_memory_bytes": peak_memory_bytes(torch.device("cpu"))}
        return BenchResult(figures=circumstances(config, "cpu") | figures | memory | {"goals": GOALS})


def _dataset(config: Config, directory: Path) -> str:
    """A patch dataset of documents of words, some hundreds of bytes to some thousands, of two sources."""
    documents, patches = str(directory / "documents"), str(directory / "patches")
    write_corpus(documents, _texts(config.seed), config.bytes, 2 * len(_SOURCES), sources=_SOURCES)
    patch_dataset(PatchConfig(rule=_RULE), documents, None, patches)
    return patches


def _texts(seed: int) -> Iterator[bytes]:
    lengths = random.Random(seed)
    for text in itertools.cycle(prose(seed, _TEXTS, _LONGEST_BYTES)):
        yield text[: lengths.randint(_SHORTEST_BYTES, _LONGEST_BYTES)]


def _size(manifest: Manifest, index: Index, steps: int) -> dict[str, Any]:
    shards = manifest.split("train")
    return {
        "steps": steps,
        "sequences": index.sequences,
        "row_groups": len(index.row_groups),
        "sources": len({group.source for group in index.row_groups}),
        "mean_patch_bytes": round(sum(s.bytes for s in shards) / sum(s.patches or s.bytes for s in shards), 4),
    }


def _throughput(config: Config, fed: Fed, steps: int) -> dict[str, Any]:
    """The whole feed and its parts, in turns."""
    text_bytes = run_feed(fed, steps, text_targets).text_bytes  # also brings the files into the system's cache
    share = min(1.0, steps * fed.config.global_batch / fed.index.sequences)
    num_row_groups = max(1, round(share * len(fed.index.row_groups)))
    runs, alone_runs, parts = [], [], []
    for repeat in range(config.repeats):
        runs.append(run_feed(fed, steps))
        alone_runs.append(assemble_alone(fed, steps))
        parts.append(measure_parts(fed, num_row_groups))
        logger.info("bench repeat=%d bytes_per_cpu_second=%.0f", repeat, text_bytes / runs[-1].cpu_seconds)
    by_cpu = [text_bytes / run.cpu_seconds for run in runs]
    alone = [part.text_bytes / part.parquet for part in parts]
    return {
        "text_bytes": text_bytes,
        "feed_bytes_per_cpu_second": summary(by_cpu),
        "feed_bytes_per_second": summary([text_bytes / run.seconds for run in runs]),
        "assembled_alone_bytes_per_cpu_second": summary([text_bytes / run.cpu_seconds for run in alone_runs]),
        "parquet_alone_bytes_per_cpu_second": summary(alone),
        "feed_to_parquet_alone": summary([whole / raw for whole, raw in zip(by_cpu, alone, strict=True)]),
        "parts_ns_per_byte": _parts(parts),
    }


def _parts(parts: Sequence[Parts]) -> dict[str, float]:
    """The median of each part, in nanoseconds of CPU time for a byte of text."""
    names = ("parquet", "read", "cut", "batch", "device", "order")
    return {name: round(statistics.median(1e9 * getattr(p, name) / p.text_bytes for p in parts), 3) for name in names}


def _resume(config: Config, fed: Fed) -> dict[str, Any]:
    """The first batch at steps anywhere in the first two epochs."""
    epoch = -(-fed.index.sequences // fed.config.global_batch)
    steps = random.Random(config.seed).sample(range(2 * epoch), min(config.resumes, 2 * epoch))
    cached = first_batch_seconds(fed, steps, from_disk=False)
    from_disk = first_batch_seconds(fed, steps, from_disk=True) if Storage(fed.data).is_local else []
    return {
        "resumed_steps": steps,
        "first_batch_seconds": _seconds(cached),
        "first_batch_from_disk_seconds": _seconds(from_disk),
    }


def _seconds(values: Sequence[float]) -> dict[str, Any]:
    if not values:
        return {"median": None, "max": None}
    return {"median": round(statistics.median(values), 4), "max": round(max(values), 4)}
