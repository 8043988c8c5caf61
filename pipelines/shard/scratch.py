"""Many small operations on storage at once, and the removal of what a finished dataset does not need."""

import shutil
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from pipelines.shard.hash_runs import SCRATCH
from pipelines.shard.quarantine import RAW_QUARANTINE
from pipelines.storage import Storage

_THREADS = 32
"""They wait on the network and not on the processor."""

Item = TypeVar("Item")
Result = TypeVar("Result")


def each(work: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """`work` of every item, in their order, several at a time."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(work, items))


def scratch_files(there: Iterable[str]) -> list[str]:
    """Those of these paths that only an unfinished dataset needs."""
    return [path for path in there if path.partition("/")[0] in (SCRATCH, RAW_QUARANTINE)]


def remove_scratch(storage: Storage) -> Sequence[str]:
    """Remove the scratch files and return their paths."""
    found = scratch_files([*storage.sizes(SCRATCH), *storage.sizes(RAW_QUARANTINE)])
    each(storage.delete, found)
    if storage.is_local:
        for directory in (SCRATCH, RAW_QUARANTINE):
            shutil.rmtree(storage.url(directory), ignore_errors=True)  # directories only; a second driver may write
    return found
