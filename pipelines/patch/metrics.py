"""Ray metrics of patching: counters of documents, bytes, patches and stage seconds, a gauge of speed, by source.

On a cluster's /metrics they appear as `ray_blt_patch_documents_total` and so on; the figures are those of stats.json.
"""

from ray.util.metrics import Counter, Gauge

from pipelines.patch.commit import Commit
from pipelines.patch.stats import stats_of

_TAGS = ("source",)
_COUNTERS = {
    "documents": "Documents patched.",
    "bytes": "Bytes of document text patched.",
    "patches": "Patches made, BOS and EOS not counted.",
    "reading_seconds": "Seconds in which actors read documents.",
    "inferring_seconds": "Seconds in which actors ran the entropy model and the patch rule.",
    "writing_seconds": "Seconds in which actors encoded and uploaded data files.",
}
"""Figures of a shard that add up."""


class PatchMetrics:
    """The metrics of one actor."""

    def __init__(self) -> None:
        self._counters = {name: Counter(f"blt_patch_{name}", doc, _TAGS) for name, doc in _COUNTERS.items()}
        self._speed = Gauge("blt_patch_actor_bytes_per_second", "Bytes per second of an actor's last shard.", _TAGS)

    def observe(self, commit: Commit) -> None:
        """Add one finished shard."""
        stats = stats_of(commit)
        tags = {"source": commit.source}
        for name, counter in self._counters.items():
            if value := getattr(stats, name):  # a counter refuses 0
                counter.inc(value, tags=tags)
        self._speed.set(stats.figures["actor_bytes_per_second"], tags=tags)
