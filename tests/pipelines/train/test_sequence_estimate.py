"""Sequences estimated from a manifest: near what the index counts, at least what bytes and patches ask for."""

import pytest

from blt.patching import PatchRule
from pipelines.manifest import Manifest, Patching, ShardEntry, SourceCounts, read_manifest
from pipelines.schema import ROW_GROUP_BYTES
from pipelines.train.index import index_shard
from pipelines.train.sequence_estimate import SourceEstimate, estimate_reading, estimate_sequences, mean_patch_bytes
from tests.pipelines.patch.corpus import prose
from tests.pipelines.train.patched import patched, write_patches


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Prose cut at spaces, in one row group a shard, as datasets of this size have."""
    shards = {
        "train/shard-00000.parquet": [prose(seed, 9000) for seed in range(12)],
        "train/shard-00001.parquet": [prose(seed, 300) for seed in range(20, 80)],
        "valid/shard-00000.parquet": [prose(99, 900)],
    }
    documents = {path: [patched(text, [b == 32 for b in text], 64) for text in texts] for path, texts in shards.items()}
    sources = {"train/shard-00000.parquet": "long", "train/shard-00001.parquet": "short"}
    root = tmp_path_factory.mktemp("estimate") / "patches"
    return write_patches(root, documents, row_group_bytes=ROW_GROUP_BYTES, sources=sources)


@pytest.mark.parametrize(
    ("patches", "num_bytes"), [(64, 4096), (512, 256), (60, 340)], ids=["patches bind", "bytes bind", "both"]
)
def test_it_is_near_the_index(dataset: str, patches: int, num_bytes: int) -> None:
    """To 5 %: where both limits bind in turn, more sequences are needed than either asks for."""
    manifest = read_manifest(dataset)
    estimated = estimate_sequences(manifest, "train", patches, num_bytes)
    for shard in manifest.split("train"):
        indexed = sum(group.sequences for group in index_shard(dataset, shard.path, shard.source, patches, num_bytes))
        assert estimated[shard.source].sequences == pytest.approx(indexed, rel=0.05), shard.source


def test_without_patches_bytes_alone_count(dataset: str) -> None:
    manifest = read_manifest(dataset)
    estimated = estimate_sequences(manifest, "train", None, 128)
    assert estimated["long"].sequences == pytest.approx(12 * 9002 / 127.5, rel=0.05)
    assert list(estimated) == ["long", "short"]
    assert list(estimate_sequences(manifest, "valid", None, 128)) == ["test"]


def test_every_row_group_ends_with_a_sequence_of_its_own() -> None:
    rule = PatchRule(kind="byte", max_patch_length=1)
    patching = Patching(entropy_model=None, rule=rule, reset_on_newline=False, dtype="float32", device="cpu")
    size = 3 * ROW_GROUP_BYTES
    entry = ShardEntry(
        path="train/a", split="train", source="a", documents=3, bytes=size, patches=size, sha256="of the file"
    )
    counts = {"a": SourceCounts(rows_in=3, rows_out=3, quarantined=0, filtered=0, bytes=size)}
    manifest = Manifest(kind="patches", shards=(entry,), counts=counts, patching=patching)
    per_group = ROW_GROUP_BYTES / 4095  # one patch of each fragment is the end of that before it
    assert estimate_sequences(manifest, "train", 4096, 2**20)["a"].sequences == 3 * (int(per_group) + 1)


def test_weights_decide_what_is_read() -> None:
    sources = {
        "web": SourceEstimate(documents=10, bytes=8000, sequences=10),
        "code": SourceEstimate(documents=1, bytes=3000, sequences=10),
    }
    even = estimate_reading(sources, None, 40)
    assert (even.sequence_bytes, even.epochs) == (550.0, {"web": 2.0, "code": 2.0})
    weighed = estimate_reading(sources, {"web": 3, "code": 1}, 40)
    assert weighed.sequence_bytes == 0.75 * 800 + 0.25 * 300
    assert weighed.epochs == {"web": 3.0, "code": 1.0}
    alone = estimate_reading(sources, {"code": 2.0}, 40)
    assert (alone.sequence_bytes, alone.epochs) == (300.0, {"code": 4.0})


def test_mean_patch_bytes_is_over_all_shards(dataset: str) -> None:
    shards = read_manifest(dataset).split("train")
    patches = sum(shard.patches or 0 for shard in shards)
    assert mean_patch_bytes(shards) == sum(shard.bytes for shard in shards) / patches
    assert mean_patch_bytes([]) == 1.0
