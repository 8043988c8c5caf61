"""The feed: the same global batches for any world size and from any step, errors passed on, its thread ended."""

import threading
from collections import Counter
from pathlib import Path

import pytest

from blt.errors import ConfigError, DataError
from blt.loss import NO_TARGET
from blt.step import Batch
from pipelines.manifest import read_manifest
from pipelines.train.batch import make_batch
from pipelines.train.feed import PREFETCHED_STEPS, Feed, FeedConfig, SequenceReader, StepBatches
from pipelines.train.index import Index, index_shard
from pipelines.train.order import micro_steps
from tests.pipelines.train.patched import random_document, write_patches

SHARDS = {
    f"train/shard-0000{shard}.parquet": [random_document(10 * shard + n, 13 * n) for n in range(5)]
    for shard in range(3)
}
SOURCES = dict(zip(SHARDS, ("large", "small", "large"), strict=True))
GLOBAL_BATCH, STEPS = 5, 12


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_patches(tmp_path_factory.mktemp("feed"), SHARDS)


@pytest.fixture(scope="module")
def index(root: str) -> Index:
    return index_of(root)


def index_of(root: str, sequence_patches: int | None = 8) -> Index:
    groups = [group for path in SHARDS for group in index_shard(root, path, SOURCES[path], sequence_patches, 24)]
    dataset = read_manifest(root).fingerprint
    return Index(
        dataset=dataset, split="train", sequence_patches=sequence_patches, sequence_bytes=24, row_groups=tuple(groups)
    )


def config(micro_batch: int = 2, sources: dict[str, float] | None = None) -> FeedConfig:
    return FeedConfig(seed=1, shuffle_row_groups=2, global_batch=GLOBAL_BATCH, micro_batch=micro_batch, sources=sources)


def rows_of(batches: list[Batch]) -> list[list[int]]:
    """The targets of each sequence, in order; rows of padding left out."""
    rows = [[t for t in row if t != NO_TARGET] for batch in batches for row in batch.targets_BT.tolist()]
    return [row for row in rows if row]


def steps_of(
    root: str, index: Index, first: int = 0, *, share: tuple[int, int] = (0, 1), micro_batch: int = 2
) -> list[StepBatches]:
    with Feed(root, index, config(micro_batch), STEPS) as feed:
        return [feed.step(step, *share) for step in range(first, STEPS)]


@pytest.mark.parametrize("world_size", [2, 3, 4, 8])
def test_every_world_size_sees_the_same_global_batches(root: str, index: Index, world_size: int) -> None:
    alone = steps_of(root, index)
    assert all(len(rows_of(step.batches)) == GLOBAL_BATCH for step in alone)
    ranks = [steps_of(root, index, share=(rank, world_size)) for rank in range(world_size)]
    for number, expected in enumerate(alone):
        shares = [rank[number] for rank in ranks]
        assert [row for share in shares for row in rows_of(share.batches)] == rows_of(expected.batches)
        assert {len(share.batches) for share in shares} == {micro_steps(GLOBAL_BATCH, 2, world_size)}
        assert sum(share.sequence_hash for share in shares) % 2**64 == expected.sequence_hash
        assert sum(share.patches for share in shares) == expected.patches


def test_steps_have_hashes_of_their_own(root: str, index: Index) -> None:
    assert len({step.sequence_hash for step in steps_of(root, index)}) == STEPS


@pytest.mark.parametrize("micro_batch", [1, 3, 8])
def test_the_micro_batch_only_cuts_the_batch(root: str, index: Index, micro_batch: int) -> None:
    found, expected = steps_of(root, index, micro_batch=micro_batch), steps_of(root, index)
    assert [rows_of(step.batches) for step in found] == [rows_of(step.batches) for step in expected]


def test_it_starts_at_any_step(root: str, index: Index) -> None:
    whole = [rows_of(step.batches) for step in steps_of(root, index)]
    assert [rows_of(step.batches) for step in steps_of(root, index, 7)] == whole[7:]


def test_shares_may_change_and_steps_may_be_asked_for_again(root: str, index: Index) -> None:
    """As when workers come and go, and a step has to be done again."""
    asked = [(0, 0, 3), (1, 0, 3), (1, 1, 2), (1, 1, 2), (2, 1, 2), (0, 0, 1), (7, 2, 3), (8, 2, 3)]
    with Feed(root, index, config(), STEPS) as feed:
        found = [feed.step(*request) for request in asked]
        expected = [feed.assemble(*request) for request in asked]
    assert [rows_of(step.batches) for step in found] == [rows_of(step.batches) for step in expected]
    assert [step.sequence_hash for step in found] == [step.sequence_hash for step in expected]


@pytest.mark.parametrize("jump", range(1, PREFETCHED_STEPS + 3))
def test_steps_may_be_left_out(root: str, index: Index, jump: int) -> None:
    """A healed worker goes on where the others are; what was made of the steps between keeps no room."""
    with Feed(root, index, config(), STEPS) as feed:
        for step in range(0, STEPS - PREFETCHED_STEPS, jump):
            assert feed.step(step, 0, 1).sequence_hash == feed.assemble(step, 0, 1).sequence_hash
            with feed._changed:
                assert feed._changed.wait_for(lambda: len(feed._ready) == PREFETCHED_STEPS, timeout=60)


def test_an_epoch_brings_every_byte_and_eos_once(root: str, index: Index) -> None:
    found = Counter(target for row in rows_of_positions(root, index, index.sequences) for target in row)
    assert found == Counter(t for documents in SHARDS.values() for document in documents for t in document.ids[1:])


def test_each_source_has_its_own_epochs(root: str, index: Index) -> None:
    """With the small source weighed ten times over, it goes through three epochs while the other is not through one."""
    small = [group for group in index.row_groups if group.source == "small"]
    count = sum(group.sequences for group in small)
    positions = 3 * count * 11 // 10 + 1
    rows = rows_of_positions(root, index, positions, {"small": 10.0, "large": 1.0})
    seen = Counter(tuple(row) for row in rows)
    assert all(seen[tuple(batch_row)] >= 3 for batch_row in small_rows(root, index))


def test_a_source_that_is_not_there_is_named(root: str, index: Index) -> None:
    with pytest.raises(ConfigError, match=r"no source 'smal' \(there are large, small\)"):
        Feed(root, index, config(sources={"smal": 1.0}), STEPS)


def test_a_source_that_is_not_named_is_not_read(root: str, index: Index) -> None:
    rows = rows_of_positions(root, index, 40, {"small": 1.0})
    assert {tuple(row) for row in rows} == {tuple(row) for row in small_rows(root, index)}


def rows_of_positions(root: str, index: Index, count: int, sources: dict[str, float] | None = None) -> list[list[int]]:
    """The targets of the sequences at the first positions."""
    steps = -(-count // GLOBAL_BATCH)
    with Feed(root, index, config(1, sources), steps) as feed:
        return [row for step in range(steps) for row in rows_of(feed.step(step, 0, 1).batches)][:count]


def small_rows(root: str, index: Index) -> list[list[int]]:
    """The targets of every sequence of the small source."""
    reader = SequenceReader(root, index, 4)
    places = [(n, s) for n, group in enumerate(index.row_groups) for s in range(group.sequences)]
    chosen = reader.read([place for place in places if index.row_groups[place[0]].source == "small"])
    return rows_of([make_batch([one], with_patches=True) for one in chosen])


def test_documents_without_patches(root: str) -> None:
    step = steps_of(root, index_of(root, None))[0]
    assert step.batches[0].patch_lengths_BP is None


def test_few_row_groups_are_kept(root: str, index: Index) -> None:
    reader = SequenceReader(root, index, 2)
    for number, group in enumerate(index.row_groups):
        for sequence in range(group.sequences):
            reader.read([(number, sequence)])
    assert len(reader._groups) == 2


def feed_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "feed"]


def test_its_thread_ends_when_the_consumer_leaves_early(root: str, index: Index) -> None:
    with Feed(root, index, config(), 10**9) as feed:
        feed.step(0, 0, 1)
        assert feed_threads()
    assert not feed_threads()
    assert feed.waited_seconds > 0


def test_an_error_while_reading_reaches_the_consumer(tmp_path: Path) -> None:
    root = write_patches(tmp_path, SHARDS)
    index = index_of(root)
    (tmp_path / "train/shard-00001.parquet").unlink()
    with Feed(root, index, config(), 100) as feed, pytest.raises(DataError, match=r"shard-00001\.parquet"):
        [feed.step(step, 0, 1) for step in range(100)]
    assert not feed_threads()
