"""The public reader: vectorised patch lengths equal counting a bit at a time; damage is named."""

import io
import itertools
import pickle
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pipelines
from blt.errors import ConfigError, DataError
from pipelines.manifest import Manifest, write_manifest
from pipelines.schema import PATCH_SCHEMA
from pipelines.storage import Storage
from tests.parquet_bytes import encode_parquet
from tests.pipelines.train.patched import (
    Patched,
    patch_table,
    patched,
    patched_documents,
    random_document,
    stored_entropies,
    write_patches,
)
from tests.s3_server import S3Server

SHARD = "train/shard-00000.parquet"


def naive_lengths(document: Patched) -> list[int]:
    """Lengths of a document's patches, a byte at a time."""
    places = [place for place, start in enumerate(document.starts[:-1]) if start]
    return [end - start for start, end in itertools.pairwise([*places, len(document.text)])]


def assert_read(root: str, documents: Sequence[Patched]) -> None:
    """Batches and documents of the dataset are these, in this order."""
    table = pa.Table.from_batches(list(pipelines.open_patches(root)))
    assert table["patch_lengths"].to_pylist() == [naive_lengths(document) for document in documents]
    assert table["text"].to_pylist() == [document.text for document in documents]
    found = list(pipelines.open_patches(root).documents())
    assert [document.text for document in found] == [document.text for document in documents]
    assert [document.patch_lengths.tolist() for document in found] == [naive_lengths(d) for d in documents]
    assert all(document.patch_lengths.dtype == np.int32 and document.entropies is None for document in found)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(documents=patched_documents(max_bytes=60).filter(bool), number=st.integers(0, 10**9))
def test_lengths_equal_counting_a_bit_at_a_time(tmp_path: Path, documents: list[Patched], number: int) -> None:
    root = write_patches(tmp_path / f"{number}-{len(list(tmp_path.iterdir()))}", {SHARD: documents})
    assert_read(root, documents)


@pytest.mark.parametrize("lengths", [[6], [7], [8], [9], [6, 7, 8, 9, 0, 15, 16, 17, 1], [0], [0, 0, 7, 0], [1]])
@pytest.mark.parametrize("bits", [[True], [False], [True, False], [False, False, True]])
def test_bitmaps_at_byte_borders(tmp_path: Path, lengths: list[int], bits: list[bool]) -> None:
    documents = [patched(bytes(range(length)), bits, max_patch=12) for length in lengths]
    assert_read(write_patches(tmp_path, {SHARD: documents}), documents)


def test_a_batch_is_a_row_group_and_has_all_columns(tmp_path: Path) -> None:
    documents = [random_document(seed, 90) for seed in range(5)]
    dataset = pipelines.open_patches(write_patches(tmp_path, {SHARD: documents}, row_group_bytes=200))
    batches = list(dataset)
    assert [batch.num_rows for batch in batches] == [2, 2, 1]
    assert batches[0].schema.names == [*PATCH_SCHEMA.names, "patch_lengths"]
    assert all(
        batch["patch_lengths"].type == pa.list_(pa.field("element", pa.int32(), nullable=False)) for batch in batches
    )
    for batch in batches:
        batch.validate(full=True)


def test_entropies_come_in_nats_and_stored(tmp_path: Path) -> None:
    documents = [random_document(seed, size) for seed, size in enumerate((0, 1, 300))]
    dataset = pipelines.open_patches(write_patches(tmp_path, {SHARD: documents}, with_entropies=True))
    stored = [bytes(value) for batch in dataset for value in batch["entropies"].to_pylist()]
    assert stored == [stored_entropies(document) for document in documents]
    for found, document in zip(dataset.documents(), documents, strict=True):
        assert found.entropies is not None
        assert found.entropies.dtype == np.float32
        assert found.entropies.tolist() == [value / 32 for value in stored_entropies(document)]


def test_split_sources_and_columns_choose(tmp_path: Path) -> None:
    shards = {
        path: [random_document(seed, 50)] for seed, path in enumerate((SHARD, "train/b.parquet", "valid/c.parquet"))
    }
    root = write_patches(tmp_path, shards, sources={"train/b.parquet": "web"})

    def paths(**choice: object) -> list[str]:
        return [shard.path for shard in pipelines.open_patches(root, **choice).shards]  # type: ignore[arg-type]

    assert paths() == list(shards)
    assert paths(split="valid") == ["valid/c.parquet"]
    assert paths(sources=["web"]) == ["train/b.parquet"]
    assert paths(split="valid", sources=["web"]) == []
    dataset = pipelines.open_patches(root, columns=["patch_lengths", "doc_id"], sources=("web",))
    (batch,) = pickle.loads(pickle.dumps(dataset))
    assert batch.schema.names == ["patch_lengths", "doc_id"]
    assert batch["patch_lengths"].to_pylist() == [naive_lengths(shards["train/b.parquet"][0])]
    (batch,) = pipelines.open_patches(root, columns=["n_bytes"], split="valid")
    assert batch.to_pydict() == {"n_bytes": [50]}


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"split": "test"}, r"split: 'test' .* train, valid"),
        ({"sources": ["web"]}, r"sources: 'web' .* test"),
        ({"columns": ["text", "entropies"]}, r"columns: 'entropies' .* patch_lengths"),
    ],
)
def test_what_a_dataset_does_not_have_is_refused(tmp_path: Path, choice: dict[str, object], message: str) -> None:
    root = write_patches(tmp_path, {SHARD: [random_document(1, 9)]})
    with pytest.raises(ConfigError, match=message):
        pipelines.open_patches(root, **choice)  # type: ignore[arg-type]


def test_a_document_dataset_is_refused(tmp_path: Path) -> None:
    write_manifest(str(tmp_path), Manifest(kind="documents", shards=(), counts={}))
    with pytest.raises(DataError, match="dataset of documents"):
        pipelines.open_patches(str(tmp_path))


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("patch_starts", [b"\x01", b"\x01\x00"], "row 1: patch_starts does not have n_bytes"),
        ("patch_starts", [b"", b"\x01"], "row 0: patch_starts does not have n_bytes"),
        ("patch_starts", [b"\x01", b"\x02"], "row 1: the first byte"),
        ("patch_starts", [b"\x03", b"\x01"], "row 0: n_patches"),
        ("patch_starts", [b"\x01", b"\x81"], "patch_starts has bits set behind EOS"),
        ("patch_starts", [b"\x41", b"\x01"], "patch_starts has bits set behind EOS"),
        ("n_patches", [2, 0], "row 0: n_patches"),
        ("n_patches", [-1, 3], "row 0: n_patches"),
        ("n_patches", [1, 9], "row 1: n_patches"),
        ("n_bytes", [4, 12], "row 1: patch_starts does not have n_bytes"),
    ],
)
def test_damaged_bitmaps_name_shard_row_group_and_row(
    tmp_path: Path, column: str, values: list[object], message: str
) -> None:
    root = write_patches(tmp_path, {SHARD: [patched(b"abcd", []), patched(b"efgh", [])]})
    table = patch_table([patched(b"abcd", []), patched(b"efgh", [])])
    field = PATCH_SCHEMA.field(column)
    damaged = table.set_column(table.column_names.index(column), field, pa.array(values, field.type))
    Storage(root).write_replace(SHARD, encode_parquet([table, damaged], PATCH_SCHEMA, {}))
    with pytest.raises(DataError, match=rf"{SHARD}, row group 1: {message}"):
        list(pipelines.open_patches(root))


def test_missing_foreign_and_cut_shards_are_named(tmp_path: Path) -> None:
    root = write_patches(tmp_path, {SHARD: [random_document(1, 2000)]})
    storage = Storage(root)
    data = storage.read_bytes(SHARD)
    for content in (
        data[: len(data) // 2],
        b"",
        encode_parquet([pa.table({"x": [1]})], pa.schema({"x": pa.int64()}), {}),
    ):
        storage.write_replace(SHARD, content)
        with pytest.raises(DataError, match=SHARD):
            list(pipelines.open_patches(root))
    storage.delete(SHARD)
    with pytest.raises(DataError, match=f"{SHARD} is in the manifest but does not exist"):
        list(pipelines.open_patches(root).documents())


def test_a_flipped_bit_is_found_by_the_page_checksum(tmp_path: Path) -> None:
    # Text that zstd keeps as it is, so that the flipped byte is one of the text and nothing else notices.
    document = patched(np.random.default_rng(0).bytes(4000), [True, False])
    root = write_patches(tmp_path, {SHARD: [document]})
    data = bytearray(Storage(root).read_bytes(SHARD))
    place = data.index(document.text[1000:1100])
    data[place] ^= 1
    Storage(root).write_replace(SHARD, bytes(data))
    with pytest.raises(DataError, match=r"row group 0: .*[Cc][Rr][Cc]"):
        list(pipelines.open_patches(root))
    (unchecked,) = pipelines.open_patches(root, verify=False)
    assert unchecked["text"][0].as_py() != document.text


def test_files_are_read_on_the_calling_thread_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_patches(tmp_path, {SHARD: [random_document(seed, 5000) for seed in range(4)]}, row_group_bytes=6000)
    threads: list[int] = []

    class Watched(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            threads.append(threading.get_ident())
            return super().read(size)

    monkeypatch.setattr(Storage, "open", lambda self, path: Watched(Path(self.url(path)).read_bytes()))
    assert len(list(pipelines.open_patches(root))) == 4
    assert set(threads) == {threading.get_ident()}


@pytest.mark.s3
def test_a_dataset_on_s3_reads_the_same(s3: S3Server) -> None:
    documents = [random_document(seed, 3000) for seed in range(5)]
    root = s3.url("open-patches")
    write_patches(root, {SHARD: documents}, row_group_bytes=7000)
    assert_read(root, documents)


def test_the_package_is_cheap_to_import_and_reads_without_ray(tmp_path: Path) -> None:
    write_patches(tmp_path, {SHARD: [random_document(1, 100)]})
    program = """
import sys, pipelines
assert not {"ray", "torch", "pyarrow", "numpy"} & set(sys.modules), sys.modules
assert len(list(pipelines.open_patches(sys.argv[1]).documents())) == 1
assert "ray" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, timeout=60)
