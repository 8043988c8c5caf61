"""Work units through Ray Data: a task for each, small bytes in and out, in the order of completion."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray
import ray.data
from ray.data.exceptions import ExecutionTimeoutError

from blt.errors import BltError
from pipelines.ray_data import quiet_ray_data
from pipelines.shard.config import ShardConfig

_CPUS_PER_TASK = 1

MEMORY_BASE_BYTES = 384 * 2**20
_MEMORY_PER_HELD_BYTE = 2
"""Measured with the default group_bytes: a worker starts at 350 MB and peaks at 590 MB, for a file of 200 MB or 600."""


def run_tasks(
    units: Sequence[bytes], work: Callable[[bytes], bytes], memory_bytes: int, stall_seconds: float
) -> Iterator[bytes]:
    """Yield `work(unit)` of every unit, as it completes. An error that it raises ends the stream with that error.

    Each task declares a CPU and `memory_bytes`, but never more than the largest node has. Ray must be initialised.
    """
    if not units:
        return
    with quiet_ray_data(stall_seconds):
        rows = ray.data.from_items([{"unit": unit} for unit in units], override_num_blocks=len(units)).map(
            functools.partial(_call, work=work), num_cpus=_CPUS_PER_TASK, memory=placeable(memory_bytes)
        )
        try:
            for row in rows.iter_rows():
                yield row["result"]
        except ExecutionTimeoutError as error:
            raise BltError(f"no unit of work finished for stall_seconds={stall_seconds:g}") from error


def task_memory(config: ShardConfig) -> int:
    """Bytes of memory that writing a group takes."""
    return MEMORY_BASE_BYTES + _MEMORY_PER_HELD_BYTE * (config.group_bytes + config.max_line_bytes)


def _call(row: dict[str, Any], *, work: Callable[[bytes], bytes]) -> dict[str, Any]:
    return {"result": work(row["unit"])}


def placeable(memory_bytes: int) -> int:
    """So much memory, or all that the largest node has: a task that asks for more would wait for ever."""
    return int(min(memory_bytes, max(node["Resources"].get("memory", 0) for node in ray.nodes())))
