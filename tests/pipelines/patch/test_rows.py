"""One shard in and out, without Ray: row groups, bitmaps, content hash, broken files."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from blt.errors import DataError
from blt.patching import PatchRule, document_patch_starts
from pipelines.patch.rows import ContentHash, patched_table, read_row_groups
from pipelines.schema import DOCUMENT_SCHEMA, PATCH_SCHEMA, unpack_starts
from pipelines.storage import Storage
from tests.parquet_bytes import encode_parquet
from tests.pipelines.patch.corpus import EDGE_DOCUMENTS, write_documents

PATH = "train/shard-00000.parquet"


@pytest.mark.parametrize("row_group_bytes", [1, 300, 10**6])
def test_rows_come_back_in_order_in_capped_groups(tmp_path: Path, row_group_bytes: int) -> None:
    storage = Storage(write_documents(tmp_path, {PATH: EDGE_DOCUMENTS}))
    tables = list(read_row_groups(storage, PATH, row_group_bytes))
    assert [text for table in tables for text in table["text"].to_pylist()] == EDGE_DOCUMENTS
    sizes = [[len(text) for text in table["text"].to_pylist()] for table in tables]
    assert all(len(group) == 1 or sum(group) <= row_group_bytes for group in sizes)


@pytest.mark.parametrize(
    "rule", [PatchRule(kind="space"), PatchRule(kind="byte"), PatchRule(kind="fixed", patch_size=3)]
)
def test_bitmaps_hold_the_starts_of_every_document(tmp_path: Path, rule: PatchRule) -> None:
    storage = Storage(write_documents(tmp_path, {PATH: EDGE_DOCUMENTS}))
    for table in read_row_groups(storage, PATH, 500):
        texts = table["text"].to_pylist()
        starts = [document_patch_starts(text, None, rule).numpy() for text in texts]
        patched = patched_table(table, starts)
        assert patched.schema == PATCH_SCHEMA
        for row, bits in zip(patched.to_pylist(), starts, strict=True):
            assert np.array_equal(unpack_starts(row["patch_starts"], row["n_bytes"]), bits)
            assert row["n_patches"] == bits[:-1].sum()
            assert bits[0]


def test_content_hash_depends_on_rows_alone() -> None:
    texts = [text for text in EDGE_DOCUMENTS if text]
    columns = [[str(row) for row in range(len(texts))], ["s"] * len(texts), texts, [len(text) for text in texts]]
    table = pa.table(columns, schema=DOCUMENT_SCHEMA)
    starts = [document_patch_starts(text, None, PatchRule(kind="space")).numpy() for text in texts]
    patched = patched_table(table, starts)
    whole, parts, shorter = ContentHash(), ContentHash(), ContentHash()
    whole.update(patched)
    parts.update(patched.slice(0, 2))
    parts.update(patched.slice(2))
    shorter.update(patched.slice(0, 2))
    assert whole.hexdigest == parts.hexdigest != shorter.hexdigest
    starts[-1] = ~starts[-1]
    changed = ContentHash()
    changed.update(patched_table(table, starts))
    assert changed.hexdigest != whole.hexdigest


def test_a_missing_torn_or_foreign_shard_is_named(tmp_path: Path) -> None:
    root = write_documents(tmp_path, {PATH: [b"one", b"two"]})
    with pytest.raises(DataError, match="shard-00009"):
        list(read_row_groups(Storage(root), "train/shard-00009.parquet", 100))
    shard = Path(root) / PATH
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="shard-00000"):
        list(read_row_groups(Storage(root), PATH, 100))
    foreign = pa.schema([pa.field("text", pa.string())])
    shard.write_bytes(encode_parquet([pa.table([["x"]], schema=foreign)], foreign, {}))
    with pytest.raises(DataError, match="columns text string"):
        list(read_row_groups(Storage(root), PATH, 100))


def test_n_bytes_must_be_the_length_of_text(tmp_path: Path) -> None:
    root = write_documents(tmp_path, {PATH: [b"one"]})
    table = pa.table([["0"], ["s"], [b"four"], [3]], schema=DOCUMENT_SCHEMA)
    (Path(root) / PATH).write_bytes(encode_parquet([table], DOCUMENT_SCHEMA, {}))
    with pytest.raises(DataError, match="n_bytes"):
        list(read_row_groups(Storage(root), PATH, 100))
