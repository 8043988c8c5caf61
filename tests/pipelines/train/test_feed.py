"""The feed: the same global batches for any world size and from any step, errors passed on, its thread ended."""

import threading
from collections import Counter
from pathlib import Path

import pytest

from blt.errors import DataError
from blt.loss import NO_TARGET
from blt.step import Batch
from pipelines.manifest import read_manifest
from pipelines.train.feed import Feed, FeedConfig, SequenceReader
from pipelines.train.index import Index, index_shard
from pipelines.train.order import micro_steps
from tests.pipelines.train.patched import random_document, write_patches

SHARDS = {
    f"train/shard-0000{shard}.parquet": [random_document(10 * shard + n, 13 * n) for n in range(5)]
    for shard in range(3)
}
GLOBAL_BATCH, STEPS = 5, 12


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_patches(tmp_path_factory.mktemp("feed"), SHARDS)


@pytest.fixture(scope="module")
def index(root: str) -> Index:
    return index_of(root)


def index_of(root: str, sequence_patches: int | None = 8) -> Index:
    groups = [group for path in SHARDS for group in index_shard(root, path, sequence_patches, 24)]
    dataset = read_manifest(root).fingerprint
    return Index(
        dataset=dataset, split="train", sequence_patches=sequence_patches, sequence_bytes=24, row_groups=tuple(groups)
    )


def config(rank: int = 0, world_size: int = 1, micro_batch: int = 2) -> FeedConfig:
    return FeedConfig(
        seed=1,
        shuffle_row_groups=2,
        global_batch=GLOBAL_BATCH,
        micro_batch=micro_batch,
        rank=rank,
        world_size=world_size,
    )


def rows_of(batches: list[Batch]) -> list[list[int]]:
    """The targets of each sequence, in order; rows of padding left out."""
    rows = [[t for t in row if t != NO_TARGET] for batch in batches for row in batch.targets_BT.tolist()]
    return [row for row in rows if row]


def steps_of(root: str, index: Index, first: int = 0, **changes: int) -> list[list[Batch]]:
    with Feed(root, index, config(**changes), first, STEPS) as feed:
        found = list(feed)
    assert [step for step, _ in found] == list(range(first, STEPS))
    return [batches for _, batches in found]


@pytest.mark.parametrize("world_size", [2, 3, 4, 8])
def test_every_world_size_sees_the_same_global_batches(root: str, index: Index, world_size: int) -> None:
    alone = [rows_of(batches) for batches in steps_of(root, index)]
    assert all(len(rows) == GLOBAL_BATCH for rows in alone)
    ranks = [steps_of(root, index, rank=rank, world_size=world_size) for rank in range(world_size)]
    for step, expected in enumerate(alone):
        assert [row for rank in ranks for row in rows_of(rank[step])] == expected
        assert {len(rank[step]) for rank in ranks} == {micro_steps(GLOBAL_BATCH, 2, world_size)}


@pytest.mark.parametrize("micro_batch", [1, 3, 8])
def test_the_micro_batch_only_cuts_the_batch(root: str, index: Index, micro_batch: int) -> None:
    expected = [rows_of(batches) for batches in steps_of(root, index)]
    assert [rows_of(batches) for batches in steps_of(root, index, micro_batch=micro_batch)] == expected


def test_it_starts_at_any_step(root: str, index: Index) -> None:
    assert [rows_of(b) for b in steps_of(root, index, 7)] == [rows_of(b) for b in steps_of(root, index)][7:]


def test_an_epoch_brings_every_byte_and_eos_once(root: str, index: Index) -> None:
    with Feed(root, index, config(micro_batch=1), 0, -(-index.sequences // GLOBAL_BATCH)) as feed:
        rows = [row for _, batches in feed for row in rows_of(batches)][: index.sequences]
    found = Counter(target for row in rows for target in row)
    assert found == Counter(t for documents in SHARDS.values() for document in documents for t in document.ids[1:])


def test_documents_without_patches(root: str) -> None:
    batches = steps_of(root, index_of(root, None))[0]
    assert batches[0].patch_lengths_BP is None


def test_few_row_groups_are_kept(root: str, index: Index) -> None:
    reader = SequenceReader(root, index, 2)
    for number, group in enumerate(index.row_groups):
        for sequence in range(group.sequences):
            reader.read(number, sequence)
    assert len(reader._groups) == 2


def feed_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "feed"]


def test_its_thread_ends_when_the_consumer_leaves_early(root: str, index: Index) -> None:
    with Feed(root, index, config(), 0, 10**9) as feed:
        next(iter(feed))
        assert feed_threads()
    assert not feed_threads()
    assert feed.waited_seconds > 0


def test_an_error_while_reading_reaches_the_consumer(tmp_path: Path) -> None:
    root = write_patches(tmp_path, SHARDS)
    index = index_of(root)
    (tmp_path / "train/shard-00001.parquet").unlink()
    with pytest.raises(DataError, match=r"shard-00001\.parquet"), Feed(root, index, config(), 0, 100) as feed:
        for _ in feed:
            pass
    assert not feed_threads()
