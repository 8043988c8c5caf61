"""A whole corpus in, a document dataset out: plan, one Ray Data task for each group, the manifest last.

The driver sees names and counts only. A run that was cut off is run again: groups with a receipt are done, the others
are made again and adopt their own shards; the result is the same as that of a run without interruption.
"""

import functools
import json
import math
from collections.abc import Callable, Collection, Sequence

import msgspec

from blt.errors import DataError
from pipelines.manifest import MANIFEST_PATH, Manifest, ShardEntry, SourceCounts, read_manifest, write_manifest
from pipelines.shard.config import ShardConfig
from pipelines.shard.dedup import find_duplicates
from pipelines.shard.duplicates import Duplicates
from pipelines.shard.files import refuse_output_in_input
from pipelines.shard.group import GroupReceipt, read_receipt, receipt_path, write_group
from pipelines.shard.plan import Group, ShardPlan
from pipelines.shard.quarantine import QUARANTINE, RAW_QUARANTINE, finish_quarantine, lines_before
from pipelines.shard.scratch import each, remove_scratch
from pipelines.shard.tasks import run_tasks, task_memory
from pipelines.storage import Storage

PLAN_PATH = "_plan.json"


def shard_corpus(plan: ShardPlan, config: ShardConfig, output: str, on_progress: Callable[[int], None]) -> Manifest:
    """Make the document dataset `output` by `plan`, which is that of `config`; Ray must be running.

    `on_progress` is told the stored bytes of each group when it is read, twice where duplicates are looked for.
    DataError for an input that holds no usable document or is gone, for a split that would be empty, and for an output
    begun with other settings or other inputs.
    """
    storage = Storage(output)
    entries = (entry for source in config.all_sources for entry in source.input)
    refuse_output_in_input(storage.root_uri, entries, (file for files in plan.files.values() for file in files))
    _freeze(plan, storage)
    stood = storage.exists(MANIFEST_PATH)
    try:
        return _make(plan, config, storage, on_progress)
    except (DataError, OSError):
        if stood or not storage.exists(MANIFEST_PATH):
            raise
    # A second driver of the same plan has finished meanwhile, and removed what this one was about to read.
    return read_manifest(output)


def merge(receipts: Sequence[GroupReceipt], config: ShardConfig) -> Manifest:
    """The manifest of all groups, whose receipts come in the order of the plan; shards in the order train, valid."""
    shards: list[ShardEntry] = [shard for receipt in receipts for shard in receipt.shards]
    counts: dict[str, SourceCounts] = {}
    for receipt in receipts:
        before = counts.get(receipt.source)
        counts[receipt.source] = receipt.counts if before is None else before + receipt.counts
    licenses = {source.name: source.license for source in config.all_sources if source.license is not None}
    in_order = tuple(sorted(shards, key=lambda s: s.split))
    return Manifest(kind="documents", shards=in_order, counts=counts, licenses=licenses)


def unusable(receipts: Sequence[GroupReceipt], config: ShardConfig) -> str | None:
    """Why these groups make no dataset with two splits, and what to change; None if they do."""
    counts = [receipt.counts for receipt in receipts]
    documents = sum(c.rows_out for c in counts)
    if not documents:
        problem = next((receipt.first_problem for receipt in receipts if receipt.first_problem), None)
        limit = f"min_bytes={config.min_bytes}" + (f" or max_bytes={config.max_bytes}" if config.max_bytes else "")
        return (
            f"input {config.inputs} holds no usable document: {sum(c.rows_in for c in counts)} rows read, "
            f"{sum(c.quarantined for c in counts)} refused, {sum(c.filtered for c in counts)} filtered out by "
            f"{limit}" + (f"; first refused: {problem}" if problem else "")
        )
    lowest, highest = min(r.lowest for r in receipts), max(r.highest for r in receipts)
    if lowest < config.valid_fraction <= highest:
        return None
    empty = "train" if highest < config.valid_fraction else "valid"
    what = f"none of the {documents} documents falls into the {empty} split at valid_fraction={config.valid_fraction:g}"
    if lowest == highest:
        return f"{what}: the input {config.inputs} needs at least two different documents"
    return f"{what}: set valid_fraction={_fraction_between(lowest, highest)} or give more documents"


def _fraction_between(lowest: float, highest: float) -> str:
    """A short number in (lowest, highest], near the lower end."""
    for digits in range(2, 20):
        fraction = math.floor(lowest * 10**digits + 1) / 10**digits
        if lowest < fraction <= highest:
            return f"{fraction:.{digits}f}"
    return repr(highest)


def _make(plan: ShardPlan, config: ShardConfig, storage: Storage, on_progress: Callable[[int], None]) -> Manifest:
    there = storage.sizes()
    receipts = _finished(plan, there, storage)
    for receipt in receipts:
        on_progress(receipt.input_bytes * (2 if config.dedup else 1))
    done = {receipt.group for receipt in receipts}
    missing = [group for group in plan.groups if group.index not in done]
    num_partitions = find_duplicates(plan, config, storage, there, on_progress) if missing and config.dedup else 0
    work = functools.partial(
        _write, config=config, num_groups=len(plan.groups), num_partitions=num_partitions, storage=storage
    )
    units = [msgspec.json.encode(group) for group in missing]
    for result in run_tasks(units, work, task_memory(config), config.stall_seconds):
        receipts.append(msgspec.json.decode(result, type=GroupReceipt))
        on_progress(receipts[-1].input_bytes)
    receipts.sort(key=lambda receipt: receipt.group)
    if problem := unusable(receipts, config):
        _discard(receipts, storage)
        raise DataError(problem)
    _finish_quarantine(plan, receipts, there, config, storage)
    manifest = merge(receipts, config)
    write_manifest(storage.root_uri, manifest)
    remove_scratch(storage)
    return manifest


def _finished(plan: ShardPlan, there: Collection[str], storage: Storage) -> list[GroupReceipt]:
    """Receipts of the groups of which everything is there."""
    committed = [group.index for group in plan.groups if receipt_path(group.index) in there]
    receipts = each(lambda group: read_receipt(group, storage), committed)
    return [receipt for receipt in receipts if _is_whole(receipt, there)]


def _is_whole(receipt: GroupReceipt, there: Collection[str]) -> bool:
    return all(shard.path in there for shard in receipt.shards) and all(
        f"{QUARANTINE}/{name}" in there or f"{RAW_QUARANTINE}/{name}" in there for name in receipt.quarantine
    )


def _write(unit: bytes, *, config: ShardConfig, num_groups: int, num_partitions: int, storage: Storage) -> bytes:
    group = msgspec.json.decode(unit, type=Group)
    duplicates = Duplicates(group.index, num_groups, num_partitions, storage)
    return msgspec.json.encode(write_group(group, config, storage, duplicates))


def _finish_quarantine(
    plan: ShardPlan, receipts: Sequence[GroupReceipt], there: Collection[str], config: ShardConfig, storage: Storage
) -> None:
    """Give the quarantined rows of every group their final lines, unless that is done."""
    before = lines_before(plan.groups, {receipt.group: receipt.num_lines for receipt in receipts})
    units = [
        msgspec.json.encode((name, before[receipt.group]))
        for receipt in receipts
        for name in receipt.quarantine
        if f"{QUARANTINE}/{name}" not in there
    ]
    for _ in run_tasks(units, functools.partial(_finish_one, storage=storage), 0, config.stall_seconds):
        pass


def _finish_one(unit: bytes, *, storage: Storage) -> bytes:
    name, before = msgspec.json.decode(unit, type=tuple[str, list[int]])
    finish_quarantine(name, before, storage)
    return b""


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
    paths = [path for r in receipts for path in (receipt_path(r.group), *(shard.path for shard in r.shards))]
    each(storage.delete, paths)
    remove_scratch(storage)
    storage.delete(PLAN_PATH)
