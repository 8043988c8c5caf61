"""How far a patch dataset is: shards done and missing and what they hold, from the documents' manifest, one listing of
the dataset and its commits. No Ray and no model.
"""

from dataclasses import dataclass

from blt.errors import DataError
from pipelines.manifest import Manifest, read_manifest
from pipelines.patch.commit import Done, read_commits, read_plan
from pipelines.patch.stats import PatchStats, total_stats
from pipelines.storage import Storage


@dataclass(frozen=True, kw_only=True)
class PatchStatus:
    """Of a dataset that may have been begun, or finished."""

    documents: Manifest
    """What it is made from."""
    done: Done

    @property
    def complete(self) -> bool:
        """Whether every shard is there, and the manifest that says so."""
        return self.done.has_manifest and len(self.done.commits) == len(self.documents.shards)

    @property
    def stats(self) -> PatchStats:
        """The sum over finished shards."""
        return total_stats(self.done.commits.values())


def dataset_status(documents: str, output: str) -> PatchStatus:
    """The status of the patch dataset `output` of the dataset `documents`; DataError if it was begun from others."""
    manifest = read_manifest(documents)
    storage = Storage(output)
    try:
        plan_hash, settings = read_plan(storage)
    except FileNotFoundError:
        return PatchStatus(documents=manifest, done=Done(commits={}, ungathered=(), has_manifest=False))
    if settings.get("documents") != manifest.fingerprint:
        raise DataError(
            f"{storage.root_uri} was begun from documents {str(settings.get('documents'))[:12]}..., "
            f"{documents} holds {manifest.fingerprint[:12]}..."
        )
    return PatchStatus(documents=manifest, done=read_commits(storage, plan_hash))
