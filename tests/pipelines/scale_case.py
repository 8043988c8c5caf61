"""A dataset of many simulated shards, in a process of its own: what planning, records and order take of it.

    python -m tests.pipelines.scale_case SHARDS SOURCES

Shards are names and counts alone; everything else is what a real run uses. Prints CPU seconds of each stage, and the
largest memory above that before the first, as one line of JSON.
"""

import json
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec

from blt.patching import PatchRule
from pipelines.manifest import Manifest, ShardEntry, SourceCounts, Split, read_manifest, write_manifest
from pipelines.patch.commit import COMMITS, COMMITS_PER_PART, Commit, read_commits
from pipelines.patch.dataset import _manifest
from pipelines.patch.plan import PatchConfig, PatchPlan, PatchUnit, make_plan
from pipelines.shard.config import ShardConfig
from pipelines.shard.files import InputFile
from pipelines.shard.plan import make_plan as make_shard_plan
from pipelines.storage import Storage
from pipelines.train.index import Index, IndexedRowGroup
from pipelines.train.order import MixedOrder
from pipelines.train.sequence_estimate import estimate_sequences

SHARD_BYTES, DOCUMENTS, ROW_GROUPS, SEQUENCES = 150_000_000, 33_000, 4, 1000
STEP = 2048
"""Sequences."""
WINDOW = 8


class Stages:
    """CPU seconds by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        began = time.process_time()
        yield
        self.seconds[name] = time.process_time() - began


class SimulatedFiles(Storage):
    """A dataset whose data files stand in its listing, and nowhere else."""

    def __init__(self, root: str, sizes: dict[str, int]) -> None:
        super().__init__(root)
        self._simulated = sizes

    def sizes(self, prefix: str = "") -> dict[str, int]:
        return dict(super().sizes(prefix)) | self._simulated


def documents(num_shards: int, num_sources: int) -> Manifest:
    """Of every source, one shard of a hundred is held out."""
    splits: list[Split] = ["valid" if number // num_sources % 100 == 99 else "train" for number in range(num_shards)]
    shards = tuple(
        ShardEntry(
            path=f"{split}/shard-{number:06d}.parquet",
            split=split,
            source=f"source-{number % num_sources}",
            documents=DOCUMENTS,
            bytes=SHARD_BYTES,
            sha256=f"{number:064x}",
        )
        for number, split in enumerate(splits)
    )
    held = [len(range(source, num_shards, num_sources)) for source in range(num_sources)]
    counts = {
        f"source-{source}": SourceCounts(
            rows_in=shards * DOCUMENTS,
            rows_out=shards * DOCUMENTS,
            quarantined=0,
            filtered=0,
            bytes=shards * SHARD_BYTES,
        )
        for source, shards in enumerate(held)
    }
    return Manifest(kind="documents", shards=shards, counts=counts)


def commit_of(unit: PatchUnit, plan_hash: str) -> Commit:
    return Commit(
        id=unit.id,
        path=unit.path,
        source=unit.source,
        documents=unit.documents,
        bytes=unit.bytes,
        patches=unit.bytes * 2 // 9,
        size_bytes=1,
        sha256="0" * 64,
        plan=plan_hash,
    )


def write_commits(storage: Storage, plan: PatchPlan) -> None:
    """Records of all shards, gathered into parts."""
    made_by = plan.hash
    lines = [msgspec.json.encode(commit_of(unit, made_by)) for unit in plan.units]
    for start in range(0, len(lines), COMMITS_PER_PART):
        part = b"\n".join(lines[start : start + COMMITS_PER_PART])
        storage.write_exclusive(f"{COMMITS}/part-{start:016x}.jsonl", part + b"\n")


def index_of(manifest: Manifest) -> Index:
    return Index(
        dataset=manifest.fingerprint,
        split="train",
        sequence_patches=1820,
        sequence_bytes=12288,
        row_groups=tuple(
            IndexedRowGroup(path=shard.path, source=shard.source, row_group=number, sequences=SEQUENCES)
            for shard in manifest.split("train")
            for number in range(ROW_GROUPS)
        ),
    )


def check_step(order: MixedOrder, first: int, num_row_groups: int) -> None:
    """A step's sequences exist, and no two are the same."""
    places = {order.place(position) for position in range(first, first + STEP)}
    assert len(places) == STEP
    assert all(0 <= group < num_row_groups and 0 <= sequence < SEQUENCES for group, sequence in places)


def measure(num_shards: int, num_sources: int, root: str) -> dict[str, float]:
    """CPU seconds by stage."""
    stage = Stages()
    files = [
        InputFile(
            url=f"s3://corpus/{number}.jsonl",
            name=f"{number}.jsonl",
            format="jsonl",
            compression=None,
            size_bytes=SHARD_BYTES,
            sample=f"{number:032x}",
        )
        for number in range(num_shards)
    ]
    with stage("plan of blt shard"):
        plan_of_corpus = make_shard_plan(ShardConfig(input=("s3://corpus",)), {"corpus": files})
        assert len(plan_of_corpus.groups) >= num_shards
    del files, plan_of_corpus
    with stage("manifest made"):
        made = documents(num_shards, num_sources)
    with stage("manifest written"):
        write_manifest(root, made)
    with stage("manifest read"):
        source = read_manifest(root)
        assert source == made
    with stage("plan of blt patch"):
        plan = make_plan(PatchConfig(rule=PatchRule(kind="space")), source, None)
        assert len(plan.units) == num_shards
    write_commits(Storage(f"{root}/patches"), plan)
    storage = SimulatedFiles(f"{root}/patches", {unit.path: 1 for unit in plan.units[:-1]})
    with stage("commits read"):
        done = read_commits(storage, plan.hash).commits
        assert {unit.id for unit in plan.units} - done.keys() == {plan.units[-1].id}
    with stage("manifest of patches"):
        last = plan.units[-1]
        done[last.id] = commit_of(last, plan.hash)
        patches = _manifest(source, plan, done, storage)
    with stage("estimate of a dry run"):
        estimate = estimate_sequences(patches, "train", 1820, 12288)
        assert len(estimate) == num_sources
    with stage("index made"):
        index = index_of(patches)
    with stage("index written and read"):
        assert msgspec.json.decode(msgspec.json.encode(index), type=Index).fingerprint == index.fingerprint
    num_row_groups = len(index.row_groups)
    with stage("order made"):
        sequences = [group.sequences for group in index.row_groups]
        order = MixedOrder(sequences, [group.source for group in index.row_groups], seed=1, window=WINDOW)
    with stage("first step of a resumed run"):
        check_step(order, num_row_groups * SEQUENCES // 3, num_row_groups)
    with stage("the next step"):
        check_step(order, num_row_groups * SEQUENCES // 3 + STEP, num_row_groups)
    with stage("end of an epoch"):
        check_step(order, num_row_groups * SEQUENCES - STEP, num_row_groups)
    return stage.seconds


def main(num_shards: int, num_sources: int) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as root:
        seconds = measure(num_shards, num_sources, root)
    memory_bytes = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    sys.stdout.write(json.dumps({"seconds": seconds, "memory_bytes": memory_bytes}) + "\n")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
