"""What patching cost: documents, bytes, patches and the seconds of each phase, per shard and in all.

Kept beside the data (`_stats/ID.json`, `stats.json`), never in it: data files hold nothing of time.
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

import msgspec

from pipelines.storage import Storage

STATS = "_stats"
"""Directory of one record per shard, replaced when a shard is done again."""
STATS_PATH = "stats.json"


@dataclass(frozen=True, kw_only=True)
class ShardStats:
    """One shard, or the sum of several. Seconds are wall-clock time inside actors, added up over actors."""

    documents: int
    bytes: int
    """Bytes of document text."""
    patches: int
    reading_seconds: float = 0.0
    inferring_seconds: float = 0.0
    """Entropy model and patch rule."""
    writing_seconds: float = 0.0
    """Encoding the Parquet file and committing it."""

    def __add__(self, other: "ShardStats") -> "ShardStats":
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        names = [field.name for field in dataclasses.fields(self)]
        return ShardStats(**dict(zip(names, (a + b for a, b in pairs), strict=True)))

    @property
    def seconds(self) -> float:
        """Seconds of an actor's time."""
        return self.reading_seconds + self.inferring_seconds + self.writing_seconds

    @property
    def figures(self) -> dict[str, float]:
        """Everything by name, with mean_patch_bytes and actor_bytes_per_second, which are 0 where nothing was done."""
        return {
            **dataclasses.asdict(self),
            "mean_patch_bytes": self.bytes / self.patches if self.patches else 0.0,
            "actor_bytes_per_second": self.bytes / self.seconds if self.seconds else 0.0,
        }


def write_shard_stats(storage: Storage, unit_id: str, stats: ShardStats) -> None:
    """Keep the figures of one shard, so that a killed driver loses none."""
    storage.write_replace(f"{STATS}/{unit_id}.json", msgspec.json.encode(stats))


def write_stats(storage: Storage) -> ShardStats:
    """Gather every shard's record into `stats.json`; returns the sum."""
    shards: dict[str, ShardStats] = {}
    for path in storage.list(STATS):
        name = path.rpartition("/")[2].removesuffix(".json")
        shards[name] = msgspec.json.decode(storage.read_bytes(path), type=ShardStats)
    total = total_stats(shards.values())
    record = {"total": total.figures, "shards": {name: stats.figures for name, stats in shards.items()}}
    storage.write_replace(STATS_PATH, msgspec.json.format(msgspec.json.encode(record), indent=1) + b"\n")
    return total


def total_stats(stats: Iterable[ShardStats]) -> ShardStats:
    """The sum of several shards' figures."""
    return sum(stats, start=ShardStats(documents=0, bytes=0, patches=0))
