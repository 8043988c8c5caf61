"""Row groups from Parquet: the vectorised decoding equals one document at a time, whatever the lengths."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blt.errors import DataError
from pipelines.schema import DOCUMENT_SCHEMA, PATCH_SCHEMA
from pipelines.storage import Storage
from pipelines.train.packing import RowGroup
from pipelines.train.row_group import _joined, num_row_groups, read_row_group
from tests.parquet_bytes import encode_parquet
from tests.pipelines.train.patched import (
    Patched,
    naive_row_group,
    patch_table,
    patched,
    patched_documents,
    random_document,
)


def assert_equal(found: RowGroup, expected: RowGroup) -> None:
    assert found.text.tobytes() == expected.text.tobytes()
    assert found.borders == expected.borders
    num_documents = len(expected.borders) - 1
    assert found.patch_starts(0, num_documents).tolist() == expected.patch_starts(0, num_documents).tolist()


def write(root: Path, tables: Sequence[pa.Table], schema: pa.Schema = PATCH_SCHEMA) -> Storage:
    storage = Storage(str(root))
    storage.write_replace("shard.parquet", encode_parquet(tables, schema, {}))
    return storage


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(st.lists(patched_documents(max_bytes=20), min_size=1, max_size=3))
def test_decoding_equals_one_document_at_a_time(tmp_path: Path, groups: list[list[Patched]]) -> None:
    storage = write(tmp_path, [patch_table(documents) for documents in groups])
    assert num_row_groups(storage, "shard.parquet") == len(groups)
    for number, documents in enumerate(groups):
        assert_equal(read_row_group(storage, "shard.parquet", number), naive_row_group(documents))


@pytest.mark.parametrize("lengths", [[6], [7], [8], [9], [6, 7, 8, 9, 0, 15, 16, 17, 1], [0], [0, 0, 7, 0], []])
@pytest.mark.parametrize("bits", [[True], [False], [True, False], [False, False, True]])
def test_bitmaps_at_byte_borders(tmp_path: Path, lengths: list[int], bits: list[bool]) -> None:
    documents = [patched(bytes(range(length)), bits) for length in lengths]
    storage = write(tmp_path, [patch_table(documents)])
    assert_equal(read_row_group(storage, "shard.parquet", 0), naive_row_group(documents))


def test_without_text_only_the_bytes_differ(tmp_path: Path) -> None:
    documents = [random_document(seed, seed * 5) for seed in range(6)]
    storage = write(tmp_path, [patch_table(documents)])
    blank = read_row_group(storage, "shard.parquet", 0, with_text=False)
    expected = naive_row_group([Patched(bytes(len(d.text)), d.starts) for d in documents])
    assert_equal(blank, expected)


def test_document_shards_have_a_patch_for_every_byte(tmp_path: Path) -> None:
    documents = [patched(text, [True]) for text in (b"", b"abc", b"\xff" * 9)]
    table = patch_table(documents).select(DOCUMENT_SCHEMA.names)
    storage = write(tmp_path, [table], DOCUMENT_SCHEMA)
    assert_equal(read_row_group(storage, "shard.parquet", 0), naive_row_group(documents))


@pytest.mark.parametrize("type_", [pa.binary(), pa.large_binary()])
def test_columns_of_several_chunks_and_slices_are_joined(type_: pa.DataType) -> None:
    whole = pa.array([b"zz", b"abc", b"", b"d", b"zz"], type=type_)
    column = pa.chunked_array(
        [whole.slice(1, 2), pa.array([], type=type_), whole.slice(3, 1), pa.array([b"ef"], type_)]
    )
    found = _joined(column, np.asarray([3, 0, 1, 2]), "column")
    assert found.tobytes() == b"abcdef"


def test_missing_and_broken_shards_are_named(tmp_path: Path) -> None:
    storage = write(tmp_path, [patch_table([random_document(1, 2000)])])
    with pytest.raises(DataError, match=r"missing\.parquet"):
        read_row_group(storage, "missing.parquet", 0)
    data = storage.read_bytes("shard.parquet")
    storage.write_replace("shard.parquet", data[: len(data) // 2])
    with pytest.raises(DataError, match=r"shard\.parquet"):
        read_row_group(storage, "shard.parquet", 0)
    with pytest.raises(DataError, match=r"shard\.parquet"):
        num_row_groups(storage, "shard.parquet")


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("n_bytes", [3, 5], "n_bytes does not agree"),  # the sum is right
        ("n_bytes", [4, 5], "n_bytes does not agree"),
        ("patch_starts", [b"\x01", b"\x01\x00"], "n_bytes does not agree"),
        ("patch_starts", [b"", b"\x01"], "n_bytes does not agree"),
        ("patch_starts", [b"\x01", b"\x02"], "does not start a patch"),
    ],
)
def test_columns_that_do_not_agree_are_refused(tmp_path: Path, column: str, values: list[object], message: str) -> None:
    table = patch_table([patched(b"abcd", []), patched(b"efgh", [])])
    place = table.column_names.index(column)
    table = table.set_column(place, PATCH_SCHEMA.field(column), pa.array(values, PATCH_SCHEMA.field(column).type))
    storage = write(tmp_path, [table])
    with pytest.raises(DataError, match=message):
        read_row_group(storage, "shard.parquet", 0)
