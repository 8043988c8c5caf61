"""Measure patching: actors beside the bare entropy model, two actors beside one, files, the reader, memory.

The last line of standard output holds every figure as the median of the repeats, with all repeats beside it, and the
goals. Runs of the model, of one actor and of two take turns, so that a machine that slows down slows all of them.
"""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blt.errors import ConfigError
from blt.patching import PatchRule
from jobs.bench.actors import BareRun, PoolRun, run_bare, run_pool
from jobs.bench.circumstances import BenchResult, circumstances, summary, working_directory
from jobs.bench.corpus import repeated, sample_texts, write_corpus
from jobs.bench.files import parquet_bytes_per_cpu_second, reader_bytes_per_cpu_second, stored_bytes
from jobs.ray_session import ray_session
from pipelines.patch.dataset import patch_dataset
from pipelines.patch.plan import PatchConfig

logger = logging.getLogger(__name__)

GOALS = {
    "pipeline_to_bare": ">= 0.95",
    "two_actors_to_one": ">= 1.8 when each has a core",
    "stored_beyond_text": "<= 0.12",
    "open_patches_bytes_per_cpu_second": ">= 150000000",
    "memory_growth": "about 1",
}
_MEMORY_FACTOR = 4
_RAY_CPUS = 4
"""Ray is told of at least this many, so that the small tasks beside two actors are placed on two cores too."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Keys of `blt bench patch`."""

    documents: str
    """Dataset of documents (the output of `blt shard`) that a sample is taken from."""
    entropy_model: str
    """Directory of the entropy model."""
    patch: PatchConfig = field(default_factory=PatchConfig)
    """As for `blt patch`; the numbers of actors are set here."""
    patches: str | None = None
    """Patch dataset on which files and reader are measured; null: what the measurement of the actors made."""
    bytes: int = 4 * 2**20
    """Text bytes that are patched in each run; 64 pieces of the corpus where it has as many row groups."""
    shards: int = 8
    """Shards that they are cut into; documents longer than a shard are passed over."""
    repeats: int = 3
    """Runs of the bare model, of one actor and of two; passes of the reader."""
    memory_bytes: int = 32 * 2**20
    """Text bytes of the smaller of the two shards that memory is measured on; the other has four times as many."""
    seed: int = 0
    """Seed of the sample."""
    directory: str | None = None
    """Where to work; null: a temporary directory that is removed."""

    def __post_init__(self) -> None:
        for name in ("bytes", "shards", "repeats", "memory_bytes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.patch.rule.needs_entropies:
            raise ConfigError(f"patch.rule.kind must be one that runs the entropy model, got {self.patch.rule.kind}")
        if self.patch.reuse_entropies is not None:
            raise ConfigError("patch.reuse_entropies runs no entropy model: leave it out")


def run(config: Config) -> BenchResult:
    """Measure everything; takes about bytes * repeats * 2.5 / (bytes per second of the model), and a minute."""
    with working_directory(config.directory) as directory:
        texts = sample_texts(config.documents, config.bytes, config.bytes // config.shards, config.seed)
        corpus = str(directory / "documents")
        write_corpus(corpus, texts, config.bytes, config.shards)
        with ray_session(num_cpus=max(_RAY_CPUS, os.cpu_count() or 1)):
            figures = _throughput(config, corpus, directory)
            made = str(directory / "one-0")
            patch_dataset(config.patch, corpus, config.entropy_model, made)
            figures |= _memory(config, texts, directory)
        figures |= _files(config.patches or made, config.repeats)
        return BenchResult(figures=circumstances(config, config.patch.device) | figures | {"goals": GOALS})


def _throughput(config: Config, corpus: str, directory: Path) -> dict[str, Any]:
    """Bytes per second of the bare model, of one actor and of two, in turns."""
    bare: list[BareRun] = []
    one: list[PoolRun] = []
    two: list[PoolRun] = []
    for repeat in range(config.repeats):
        bare.append(run_bare(config.patch, corpus, config.entropy_model))
        logger.info("bench repeat=%d bare bytes_per_second=%.0f", repeat, bare[-1].bytes_per_second)
        for runs, num_actors, name in ((one, 1, "one"), (two, 2, "two")):
            output = str(directory / f"{name}-{repeat}")
            runs.append(run_pool(config.patch, corpus, config.entropy_model, output, num_actors))
            logger.info(
                "bench repeat=%d actors=%d bytes_per_second=%.0f", repeat, num_actors, runs[-1].bytes_per_second
            )
    model, alone, together = ([run.bytes_per_second for run in runs] for runs in (bare, one, two))
    model_cpu, alone_cpu, together_cpu = ([run.bytes_per_cpu_second for run in runs] for runs in (bare, one, two))
    commits = one[-1].commits
    return {
        "measured_bytes": sum(commit.bytes for commit in commits),
        "mean_patch_bytes": round(sum(c.bytes for c in commits) / sum(c.patches for c in commits), 4),
        "bare_bytes_per_second": summary(model),
        "bare_share_of_peak": summary([run.share_of_peak for run in bare]),
        "one_actor_bytes_per_second": summary(alone),
        "one_actor_busy_bytes_per_second": summary([run.busy_bytes_per_second for run in one]),
        "two_actors_bytes_per_second": summary(together),
        "pipeline_to_bare": _ratios(alone, model),
        "pipeline_to_bare_by_cpu_second": _ratios(alone_cpu, model_cpu),
        "two_actors_to_one": _ratios(together, alone),
        "two_actors_to_one_by_cpu_second": _ratios(together_cpu, alone_cpu),
        "stage_seconds": {
            stage: round(sum(getattr(commit.seconds, stage) for commit in commits), 3)
            for stage in ("reading", "inferring", "writing", "total")
        },
        "actor_peak_rss_bytes_after_each_shard": [unit.peak_rss_bytes for unit in one[-1].units],
    }


def _memory(config: Config, texts: Sequence[bytes], directory: Path) -> dict[str, Any]:
    """Peak memory of an actor on one shard and on one of four times the bytes: read, patched at spaces and written."""
    rule = PatchRule(kind="space", max_patch_length=512)
    patch = PatchConfig(rule=rule, row_group_bytes=config.patch.row_group_bytes)
    peaks = []
    for factor in (1, _MEMORY_FACTOR):
        corpus, output = str(directory / f"memory-{factor}"), str(directory / f"memory-patches-{factor}")
        write_corpus(corpus, repeated(texts), config.memory_bytes * factor, 1)
        peaks.append(run_pool(patch, corpus, None, output, 1).units[-1].peak_rss_bytes)
    return {
        "memory_peak_rss_bytes": {"shard": peaks[0], "shard_of_4_times_the_bytes": peaks[1]},
        "memory_growth": round(peaks[1] / peaks[0], 3),
    }


def _files(patches: str, repeats: int) -> dict[str, Any]:
    """Stored bytes and reading speed of a patch dataset."""
    stored = stored_bytes(patches)
    verified = [reader_bytes_per_cpu_second(patches, verify=True) for _ in range(repeats)]
    unverified = [reader_bytes_per_cpu_second(patches, verify=False) for _ in range(repeats)]
    return {
        "stored_bytes_per_byte": round(stored.whole, 4),
        "text_alone_bytes_per_byte": round(stored.text, 4),
        "stored_beyond_text": round(stored.whole - stored.text, 4),
        "open_patches_bytes_per_cpu_second": summary(verified),
        "open_patches_without_checksums_bytes_per_cpu_second": summary(unverified),
        "parquet_alone_bytes_per_cpu_second": summary([parquet_bytes_per_cpu_second(patches) for _ in range(repeats)]),
    }


def _ratios(values: Sequence[float], others: Sequence[float]) -> dict[str, Any]:
    """Of the figures of each repeat."""
    return summary([value / other for value, other in zip(values, others, strict=True)])
