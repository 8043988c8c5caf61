"""Corpus files in, a document dataset out: read, quarantine, split, shuffle, cut into shards of equal bytes."""

from pipelines.shard.config import ShardConfig
from pipelines.shard.corpus import shard_corpus
from pipelines.shard.plan import ShardPlan, plan_corpus

__all__ = ["ShardConfig", "ShardPlan", "plan_corpus", "shard_corpus"]
