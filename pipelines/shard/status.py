"""How far a document dataset is, and what killed runs left in it: from one listing, without a look at the corpus."""

import json
from dataclasses import dataclass

from blt.errors import DataError
from pipelines.manifest import MANIFEST_PATH
from pipelines.shard.corpus import PLAN_PATH
from pipelines.shard.group import RECEIPTS
from pipelines.shard.scratch import remove_scratch
from pipelines.storage import Leftover, Storage


@dataclass(frozen=True, kw_only=True)
class ShardStatus:
    """How far a dataset is."""

    groups: int | None
    """Of the plan; None where no plan has been written."""
    groups_done: int
    shards: int
    stored_bytes: int
    """Of the shards."""
    complete: bool
    """Whether the manifest stands."""


@dataclass(frozen=True, kw_only=True)
class Garbage:
    """What was removed."""

    leftovers: tuple[Leftover, ...]
    """Files that killed runs were writing."""
    scratch: tuple[str, ...]
    """Files that only the making of the finished dataset needed."""


def shard_status(output: str) -> ShardStatus:
    """How far the dataset at `output` is; DataError if its plan is broken."""
    storage = Storage(output)
    there = storage.sizes()
    shards = [size for path, size in there.items() if path.endswith(".parquet")]
    return ShardStatus(
        groups=_num_groups(storage) if PLAN_PATH in there else None,
        groups_done=sum(path.startswith(f"{RECEIPTS}/") for path in there),
        shards=len(shards),
        stored_bytes=sum(shards),
        complete=MANIFEST_PATH in there,
    )


def collect_garbage(output: str, older_than_seconds: float) -> Garbage:
    """Remove what nobody has written to for so long, and of a finished dataset the scratch files."""
    storage = Storage(output)
    leftovers = storage.leftovers(older_than_seconds)
    storage.remove_leftovers(leftovers)
    scratch = remove_scratch(storage) if storage.exists(MANIFEST_PATH) else ()
    return Garbage(leftovers=tuple(leftovers), scratch=tuple(scratch))


def _num_groups(storage: Storage) -> int:
    try:
        return int(json.loads(storage.read_bytes(PLAN_PATH))["groups"])
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{storage.url(PLAN_PATH)} is broken: {error}") from error
