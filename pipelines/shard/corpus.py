"""A whole corpus in, a document dataset out: plan, one Ray Data task for each group, the manifest last.

The driver sees receipts only. A run that was cut off is run again: groups with a receipt are done, the others are made
again and adopt their own shards; the result is the same as that of a run without interruption.
"""

import functools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec
import ray
import ray.data

from blt.errors import ConfigError, DataError
from pipelines.manifest import Manifest, ShardEntry, SourceCounts, write_manifest
from pipelines.ray_data import quiet_ray_data
from pipelines.shard.config import ShardConfig
from pipelines.shard.group import GroupReceipt, receipt_path, write_group
from pipelines.shard.plan import Group, ShardPlan, plan_corpus
from pipelines.storage import Storage

PLAN_PATH = "_plan.json"

_CPUS_PER_TASK = 1
_MEMORY_BASE_BYTES = 384 * 2**20
_MEMORY_PER_HELD_BYTE = 2
"""Measured with the default group_bytes: a worker starts at 350 MB and peaks at 590 MB, for a file of 200 MB or 600."""


def shard_corpus(config: ShardConfig, output: str, on_progress: Callable[[int], None]) -> Manifest:
    """Make the document dataset `output` from `config.input`; Ray must be running.

    `on_progress` is told the stored bytes of the input files of each group when it is done. DataError for an input that
    is missing or holds no usable document, for a split that would be empty, and for an output begun with other settings
    or other inputs.
    """
    storage = Storage(output)
    plan = plan_corpus(config)
    _refuse_output_in_input(plan, storage)
    _freeze(plan, storage)
    receipts = []
    for receipt in _write_groups(plan, config, storage):
        receipts.append(receipt)
        on_progress(receipt.input_bytes)
    receipts.sort(key=lambda receipt: receipt.group)
    if problem := unusable(receipts, config):
        _discard(receipts, storage)
        raise DataError(problem)
    manifest = merge(receipts)
    write_manifest(output, manifest)
    return manifest


def merge(receipts: Sequence[GroupReceipt]) -> Manifest:
    """The manifest of all groups, whose receipts come in the order of the plan; shards in the order train, valid."""
    shards: list[ShardEntry] = [shard for receipt in receipts for shard in receipt.shards]
    counts: dict[str, SourceCounts] = {}
    for receipt in receipts:
        for source, found in receipt.counts.items():
            counts[source] = counts[source] + found if source in counts else found
    return Manifest(kind="documents", shards=tuple(sorted(shards, key=lambda s: s.split)), counts=counts)


def unusable(receipts: Sequence[GroupReceipt], config: ShardConfig) -> str | None:
    """Why these groups make no dataset with two splits, and what to change; None if they do."""
    counts = [counts for receipt in receipts for counts in receipt.counts.values()]
    documents = sum(c.rows_out for c in counts)
    if not documents:
        problem = next((receipt.first_problem for receipt in receipts if receipt.first_problem), None)
        return (
            f"input {', '.join(config.input)} holds no usable document: {sum(c.rows_in for c in counts)} rows read, "
            f"{sum(c.quarantined for c in counts)} refused, {sum(c.filtered for c in counts)} shorter than "
            f"min_bytes={config.min_bytes}" + (f"; first refused: {problem}" if problem else "")
        )
    lowest, highest = min(r.lowest for r in receipts), max(r.highest for r in receipts)
    if lowest < config.valid_fraction <= highest:
        return None
    empty = "train" if highest < config.valid_fraction else "valid"
    what = f"none of the {documents} documents falls into the {empty} split at valid_fraction={config.valid_fraction:g}"
    if lowest == highest:
        return f"{what}: the input {', '.join(config.input)} needs at least two different documents"
    return f"{what}: set valid_fraction={_fraction_between(lowest, highest)} or give more documents"


def _fraction_between(lowest: float, highest: float) -> str:
    """A short number in (lowest, highest], near the lower end."""
    for digits in range(2, 20):
        fraction = math.floor(lowest * 10**digits + 1) / 10**digits
        if lowest < fraction <= highest:
            return f"{fraction:.{digits}f}"
    return repr(highest)


def _write_groups(plan: ShardPlan, config: ShardConfig, storage: Storage) -> Iterator[GroupReceipt]:
    """Run every group as a task of its own and yield the receipts as they come."""
    groups = [{"group": msgspec.json.encode(group)} for group in plan.groups]
    with quiet_ray_data(config.stall_seconds):
        receipts = ray.data.from_items(groups, override_num_blocks=len(groups)).map(
            functools.partial(_write_row, config=config, output=storage.root_uri),
            num_cpus=_CPUS_PER_TASK,
            memory=_task_memory(config),
        )
        for row in receipts.iter_rows():
            yield msgspec.json.decode(row["receipt"], type=GroupReceipt)


def _write_row(row: dict[str, Any], *, config: ShardConfig, output: str) -> dict[str, Any]:
    group = msgspec.json.decode(row["group"], type=Group)
    return {"receipt": msgspec.json.encode(write_group(group, config, output))}


def _task_memory(config: ShardConfig) -> int:
    """Bytes of memory that a task declares; never more than the largest node has, so that it can always be placed."""
    wanted = int(_MEMORY_BASE_BYTES + _MEMORY_PER_HELD_BYTE * (config.group_bytes + config.max_line_bytes))
    nodes = ray.nodes()
    return int(min(wanted, max(node["Resources"].get("memory", 0) for node in nodes)))


def _refuse_output_in_input(plan: ShardPlan, storage: Storage) -> None:
    """A second run would read what the first one wrote."""
    root = storage.root_uri + "/"
    for group in plan.groups:
        for file in group.files:
            if file.url.startswith(root):
                raise ConfigError(
                    f"input file {file.url} lies inside the output {storage.root_uri}: choose another output"
                )


def _freeze(plan: ShardPlan, storage: Storage) -> None:
    """Write the plan's record, or find the same one there; DataError naming what differs from another."""
    if storage.write_exclusive(PLAN_PATH, plan.to_json()):
        return
    url = storage.url(PLAN_PATH)
    try:
        there = dict(json.loads(storage.read_bytes(PLAN_PATH)))
    except (ValueError, TypeError) as error:
        raise DataError(f"{url} is broken; remove the directory or choose another output") from error
    here = json.loads(plan.to_json())
    names = [name for name in sorted(there.keys() | here.keys()) if there.get(name) != here.get(name)]
    if names:
        differing = "; ".join(f"{name} is {there.get(name)} there, {here.get(name)} here" for name in names)
        raise DataError(
            f"{storage.root_uri} was begun with other settings or inputs: {differing}; "
            "choose another output or remove the directory"
        )


def _discard(receipts: Sequence[GroupReceipt], storage: Storage) -> None:
    """Remove what these groups wrote, so that the same output can be made with the settings mended."""
    for receipt in receipts:
        for path in (receipt_path(receipt.group), *(shard.path for shard in receipt.shards), *receipt.quarantine):
            storage.delete(path)
    storage.delete(PLAN_PATH)
