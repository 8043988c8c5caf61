"""Deduplication of a whole corpus before its groups are written: hash every document, then find those that go.

Both passes are Ray Data tasks whose files are created exclusively, so each can be cut off anywhere and run again, with
any number of workers. The driver sees names and counts only.
"""

import functools
from collections.abc import Callable, Collection

import msgspec

from pipelines.shard.config import ShardConfig
from pipelines.shard.duplicates import ALL_RUNS, PARTITION_BYTES, find_losers, losers_path, num_partitions
from pipelines.shard.hash_runs import RECORD_BYTES, RUN_RECORDS, GroupRuns, read_runs, runs_path, write_runs
from pipelines.shard.plan import Group, ShardPlan
from pipelines.shard.scratch import each
from pipelines.shard.tasks import MEMORY_BASE_BYTES, run_tasks
from pipelines.storage import Storage

_MEMORY_PER_RECORD_BYTE = 5


def find_duplicates(
    plan: ShardPlan,
    config: ShardConfig,
    storage: Storage,
    there: Collection[str],
    on_progress: Callable[[int], None],
) -> int:
    """Write what `Duplicates` reads, and return the number of partitions that it lies in.

    `there` lists what the dataset holds already; `on_progress` is told the stored bytes of each group that is hashed.
    """
    groups = _hash_groups(plan, config, storage, there, on_progress)
    storage.write_exclusive(ALL_RUNS, msgspec.json.encode(groups))
    total = num_partitions(groups)
    missing = [partition for partition in range(total) if losers_path(partition) not in there]
    work = functools.partial(_find, total=total, storage=storage)
    memory = MEMORY_BASE_BYTES + _MEMORY_PER_RECORD_BYTE * PARTITION_BYTES
    for _ in run_tasks([msgspec.json.encode(p) for p in missing], work, memory, config.stall_seconds):
        pass
    return total


def _hash_groups(
    plan: ShardPlan,
    config: ShardConfig,
    storage: Storage,
    there: Collection[str],
    on_progress: Callable[[int], None],
) -> list[GroupRuns]:
    """The runs of every group, in the order of the plan."""
    done = [group.index for group in plan.groups if runs_path(group.index) in there]
    found = each(lambda group: read_runs(group, storage), done)
    hashed = {runs.group for runs in found}
    units = [msgspec.json.encode(group) for group in plan.groups if group.index not in hashed]
    work = functools.partial(_hash, config=config, storage=storage)
    memory = MEMORY_BASE_BYTES + _MEMORY_PER_RECORD_BYTE * RUN_RECORDS * RECORD_BYTES + 2 * config.max_line_bytes
    for result in run_tasks(units, work, memory, config.stall_seconds):
        found.append(msgspec.json.decode(result, type=GroupRuns))
        on_progress(found[-1].input_bytes)
    return sorted(found, key=lambda runs: runs.group)


def _hash(unit: bytes, *, config: ShardConfig, storage: Storage) -> bytes:
    return msgspec.json.encode(write_runs(msgspec.json.decode(unit, type=Group), config, storage))


def _find(unit: bytes, *, total: int, storage: Storage) -> bytes:
    find_losers(msgspec.json.decode(unit, type=int), total, storage)
    return b""
