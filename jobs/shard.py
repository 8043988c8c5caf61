"""Turn a corpus of text files into document shards: read, quarantine, split, shuffle, cut into files of equal bytes.

Takes .jsonl and .txt, plain, .gz or .zst, .parquet, and files of any kind as they are; local or on S3. The same input
and seed give the same bytes, on any number of workers. Run a killed job again and it does what is missing; an output
made from other inputs or settings is refused.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from blt.errors import ConfigError
from jobs.action import Action
from jobs.configuration import to_plain
from jobs.progress import progress
from jobs.ray_session import ray_session
from jobs.record import JobResult, run_once
from pipelines.manifest import Manifest, is_whole
from pipelines.shard import ShardConfig, collect_garbage, plan_corpus, shard_corpus, shard_status
from pipelines.shard.plan import NOT_IN_OUTPUT

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Config(ShardConfig):
    """Keys of `blt shard`."""

    output: str
    """Where the document dataset goes: a directory or s3://BUCKET/PATH."""
    gc_older_than_seconds: float = 3600.0
    """--gc removes unfinished files that nobody has written to for so long."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gc_older_than_seconds < 0:
            raise ConfigError(f"gc_older_than_seconds must not be negative, got {self.gc_older_than_seconds}")


def run(config: Config) -> JobResult:
    """Shard the corpus into `config.output` unless that is done."""
    plan = plan_corpus(config)

    def work() -> JobResult:
        total = plan.input_bytes * (2 if config.dedup else 1)
        with ray_session(), progress("shard", total=total, unit="bytes") as bar:
            manifest = shard_corpus(plan, config, config.output, bar.advance)
        return _result(manifest)

    places = (f"sources.{source.name}.input" for source in config.sources)
    ignore = ("output", "gc_older_than_seconds", *NOT_IN_OUTPUT, *places)
    return run_once(config.output, _recorded(config), plan.inputs, work, ignore=ignore, is_whole=is_whole)


def dry_run(config: Config) -> JobResult:
    """The plan, from a listing of the corpus."""
    plan = plan_corpus(config)
    text_bytes = sum(unit.text_bytes for group in plan.groups for unit in group.units)
    return JobResult(
        path=config.output,
        figures={
            "files": plan.num_files,
            **{f"files.{source}": len(files) for source, files in plan.files.items()},
            "input_bytes": plan.input_bytes,
            "estimated_text_bytes": text_bytes,
            "groups": len(plan.groups),
        },
    )


def status(config: Config) -> JobResult:
    """How much of the dataset is there."""
    found = shard_status(config.output)
    return JobResult(
        status="done" if found.complete else "incomplete",
        path=config.output,
        figures={
            "groups": "not planned yet" if found.groups is None else found.groups,
            "groups_done": found.groups_done,
            "shards": found.shards,
            "stored_bytes": found.stored_bytes,
        },
    )


def gc(config: Config) -> JobResult:
    """Remove what killed runs left."""
    garbage = collect_garbage(config.output, config.gc_older_than_seconds)
    for leftover in garbage.leftovers:
        logger.info("removed=%s bytes=%d age_seconds=%.0f", leftover.name, leftover.size_bytes, leftover.age_seconds)
    for path in garbage.scratch:
        logger.info("removed=%s", path)
    return JobResult(
        path=config.output,
        figures={
            "removed_leftovers": len(garbage.leftovers),
            "removed_leftover_bytes": sum(leftover.size_bytes for leftover in garbage.leftovers),
            "removed_scratch_files": len(garbage.scratch),
        },
    )


ACTIONS = {
    "dry-run": Action(dry_run, "show files, bytes and groups; write nothing and start no Ray"),
    "status": Action(status, "show how much of the output is done; exit status 1 unless all is"),
    "gc": Action(gc, "remove what killed runs left in the output"),
}


def _recorded(config: Config) -> Mapping[str, Any]:
    """The configuration with its sources by name, so that their order, and where they lie, can have no say."""
    return {**to_plain(config), "sources": {source.name: to_plain(source) for source in config.sources}}


def _result(manifest: Manifest) -> JobResult:
    return JobResult(
        documents=manifest.documents,
        bytes=manifest.bytes,
        figures={
            "shards": len(manifest.shards),
            "train_documents": sum(shard.documents for shard in manifest.split("train")),
            "valid_documents": sum(shard.documents for shard in manifest.split("valid")),
            "quarantined": sum(counts.quarantined for counts in manifest.counts.values()),
            "filtered": sum(counts.filtered for counts in manifest.counts.values()),
            "duplicates": sum(counts.duplicates for counts in manifest.counts.values()),
        },
    )
