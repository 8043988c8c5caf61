"""The index: as many sequences as training will cut, made once for a dataset and limits."""

import os
from pathlib import Path

import pytest
import ray

from blt.errors import DataError
from pipelines.storage import Storage
from pipelines.train.index import build_index, index_shard
from pipelines.train.packing import cut_sequences
from pipelines.train.row_group import num_row_groups, read_row_group
from tests.pipelines.train.patched import random_document, write_patches

SHARDS = {
    "train/shard-00000.parquet": [random_document(seed, seed * 11) for seed in range(6)],
    "train/shard-00001.parquet": [],
    "train/shard-00002.parquet": [random_document(9, 250)],
}


def test_a_shard_has_the_sequences_that_reading_it_gives(tmp_path: Path) -> None:
    root = write_patches(tmp_path, SHARDS)
    storage = Storage(root)
    for path in SHARDS:
        counts = [
            len(list(cut_sequences(read_row_group(storage, path, number), 5, 17)))
            for number in range(num_row_groups(storage, path))
        ]
        found = index_shard(root, path, "s", 5, 17)
        assert [(group.path, group.row_group) for group in found] == [(path, n) for n in range(len(counts))]
        assert [group.sequences for group in found] == counts


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_it_is_made_once_and_again_when_the_data_or_the_limits_change(tmp_path: Path) -> None:
    root = write_patches(tmp_path / "a", SHARDS)
    index = build_index(root, "train", 5, 17)
    paths = [group.path for group in index.row_groups]
    assert paths == sorted(paths)
    assert len(set(paths)) == 2, "the empty shard has no row group"
    stored = tmp_path / "a/_index/train-5-17.json"
    written = stored.stat().st_mtime_ns
    assert build_index(root, "train", 5, 17) == index
    assert stored.stat().st_mtime_ns == written
    assert build_index(root, "train", 9, 30).sequences < index.sequences
    stored.write_bytes(b'{"of": "another version"}')
    assert build_index(root, "train", 5, 17) == index
    other = write_patches(tmp_path / "b", {"train/shard-00000.parquet": [random_document(1, 100)]})
    os.makedirs(tmp_path / "b/_index")
    (tmp_path / "b/_index/train-5-17.json").write_bytes(stored.read_bytes())
    assert build_index(other, "train", 5, 17).fingerprint != index.fingerprint


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_an_empty_split_and_a_lost_shard_are_errors(tmp_path: Path) -> None:
    root = write_patches(tmp_path, SHARDS)
    with pytest.raises(DataError, match="the valid split holds no documents"):
        build_index(root, "valid", 5, 17)
    (tmp_path / "train/shard-00002.parquet").unlink()
    with pytest.raises(ray.exceptions.RayTaskError) as raised:
        build_index(root, "train", 5, 17)
    assert "shard-00002.parquet" in str(raised.value.cause)
    assert isinstance(raised.value.cause, DataError)
