"""Turn a corpus of text files into document shards: read, quarantine, split, shuffle, cut into files of equal bytes.

Takes .jsonl, .jsonl.gz, .jsonl.zst, .txt and .parquet. The same input and seed give the same bytes, on any number of
workers. Run a killed job again and it does what is missing; an output made from other inputs or settings is refused.
"""

from dataclasses import dataclass

from jobs.progress import progress
from jobs.ray_session import ray_session
from jobs.record import JobResult, run_once
from pipelines.manifest import Manifest
from pipelines.shard import ShardConfig, plan_corpus, shard_corpus
from pipelines.shard.plan import NOT_IN_OUTPUT


@dataclass(frozen=True, kw_only=True)
class Config(ShardConfig):
    """Keys of `blt shard`."""

    output: str
    """Where the document dataset goes."""


def run(config: Config) -> JobResult:
    """Shard the corpus into `config.output` unless that is done."""
    plan = plan_corpus(config)

    def work() -> JobResult:
        with ray_session(), progress("shard", total=plan.input_bytes, unit="bytes") as bar:
            manifest = shard_corpus(config, config.output, bar.advance)
        return _result(manifest)

    return run_once(config.output, config, plan.inputs, work, ignore=("output", *NOT_IN_OUTPUT))


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
        },
    )
