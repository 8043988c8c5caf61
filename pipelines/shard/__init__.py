"""Corpus files in, a document dataset out: read, quarantine, deduplicate, split, shuffle, cut into shards."""

from pipelines.shard.config import ShardConfig, SourceConfig
from pipelines.shard.corpus import shard_corpus
from pipelines.shard.plan import ShardPlan, plan_corpus
from pipelines.shard.status import collect_garbage, shard_status

__all__ = [
    "ShardConfig",
    "ShardPlan",
    "SourceConfig",
    "collect_garbage",
    "plan_corpus",
    "shard_corpus",
    "shard_status",
]
