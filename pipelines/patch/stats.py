"""What patching cost: documents, bytes, patches and the seconds of each stage, by shard, by source and in all.

Taken from the commits into `stats.json`, beside the data and never in it: data files hold nothing of time.
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

import msgspec

from pipelines.patch.commit import Commit
from pipelines.storage import Storage

STATS_PATH = "stats.json"


@dataclass(frozen=True, kw_only=True)
class PatchStats:
    """One shard, or the sum of several. Seconds are wall-clock time inside actors, added up over actors."""

    documents: int
    bytes: int
    """Bytes of document text."""
    patches: int
    stored_bytes: int
    """Of data files."""
    reading_seconds: float = 0.0
    inferring_seconds: float = 0.0
    """Entropy model and patch rule."""
    writing_seconds: float = 0.0
    """Encoding the Parquet file and uploading it."""
    seconds: float = 0.0
    """From the start of a shard to its end. The three stages overlap, so that their sum may be more."""

    def __add__(self, other: "PatchStats") -> "PatchStats":
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        names = [field.name for field in dataclasses.fields(self)]
        return PatchStats(**dict(zip(names, (a + b for a, b in pairs), strict=True)))

    @property
    def figures(self) -> dict[str, float]:
        """Everything by name, with mean_patch_bytes, actor_bytes_per_second, waiting_seconds (inference stood still)
        and the share of each stage in the busy seconds; 0 where nothing was done.
        """
        busy = self.reading_seconds + self.inferring_seconds + self.writing_seconds
        return {
            **dataclasses.asdict(self),
            "waiting_seconds": self.seconds - self.inferring_seconds,
            "mean_patch_bytes": _ratio(self.bytes, self.patches),
            "actor_bytes_per_second": _ratio(self.bytes, self.seconds),
            "reading_share": _ratio(self.reading_seconds, busy),
            "inferring_share": _ratio(self.inferring_seconds, busy),
            "writing_share": _ratio(self.writing_seconds, busy),
        }


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def stats_of(commit: Commit) -> PatchStats:
    """The figures of one shard."""
    return PatchStats(
        documents=commit.documents,
        bytes=commit.bytes,
        patches=commit.patches,
        stored_bytes=commit.size_bytes,
        reading_seconds=commit.seconds.reading,
        inferring_seconds=commit.seconds.inferring,
        writing_seconds=commit.seconds.writing,
        seconds=commit.seconds.total,
    )


def total_stats(commits: Iterable[Commit]) -> PatchStats:
    """The sum over shards."""
    return sum(map(stats_of, commits), start=PatchStats(documents=0, bytes=0, patches=0, stored_bytes=0))


def write_stats(storage: Storage, commits: Iterable[Commit]) -> None:
    """Write `stats.json`: keys total, sources and shards."""
    commits = sorted(commits, key=lambda commit: commit.id)
    sources = sorted({commit.source for commit in commits})
    record = {
        "total": total_stats(commits).figures,
        "sources": {
            source: total_stats(commit for commit in commits if commit.source == source).figures for source in sources
        },
        "shards": {commit.id: stats_of(commit).figures for commit in commits},
    }
    storage.write_replace(STATS_PATH, msgspec.json.format(msgspec.json.encode(record), indent=1) + b"\n")
