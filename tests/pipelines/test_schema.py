"""The Parquet side of both datasets: packed starts, row groups, files that depend on their rows alone."""

import io
import itertools

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blt.errors import DataError
from pipelines.schema import DOCUMENT_SCHEMA, pack_starts, row_group_slices, unpack_starts
from tests.parquet_bytes import encode_parquet


@given(st.lists(st.booleans(), min_size=1, max_size=100))
def test_starts_survive_packing(starts: list[bool]) -> None:
    packed = pack_starts(np.array(starts, dtype=np.bool_))
    assert unpack_starts(packed, len(starts) - 1).tolist() == starts
    assert len(packed) == (len(starts) + 7) // 8


def test_starts_are_packed_from_the_least_significant_bit() -> None:
    assert pack_starts(np.array([True, False, False, True, False, False, False, False, True])) == b"\x09\x01"


@pytest.mark.parametrize(("packed", "n_bytes"), [(b"", 0), (b"\x01", 8), (b"\x01\x00", 7)])
def test_starts_of_the_wrong_length_are_refused(packed: bytes, n_bytes: int) -> None:
    with pytest.raises(DataError, match="patch_starts"):
        unpack_starts(packed, n_bytes)


@given(st.lists(st.integers(0, 50)), st.integers(1, 60))
def test_row_groups_cover_all_rows_within_the_cap(sizes: list[int], cap: int) -> None:
    slices = row_group_slices(sizes, cap)
    assert [size for s in slices for size in sizes[s]] == sizes
    for s in slices:
        assert sum(sizes[s]) <= cap or s.stop - s.start == 1
    for left, right in itertools.pairwise(slices):
        assert sum(sizes[left]) + sizes[right.start] > cap  # no group could have taken one more


def _table(texts: list[bytes]) -> pa.Table:
    columns = {
        "doc_id": [str(i) for i in range(len(texts))],
        "source": ["s"] * len(texts),
        "text": texts,
        "n_bytes": [len(text) for text in texts],
    }
    return pa.table(columns, schema=DOCUMENT_SCHEMA)


def test_file_is_a_function_of_its_rows() -> None:
    groups = [_table([b"one", b"two"]), _table([b"\xff\x00 any bytes"])]
    data, again = (encode_parquet(iter(groups), DOCUMENT_SCHEMA, {"documents": "3"}) for _ in range(2))
    assert data == again
    file = pq.ParquetFile(io.BytesIO(data))
    assert [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)] == [2, 1]
    assert file.metadata.row_group(0).column(2).compression == "ZSTD"
    assert file.metadata.metadata[b"documents"] == b"3"
    assert file.schema_arrow.equals(DOCUMENT_SCHEMA)
    assert file.read()["text"].to_pylist() == [b"one", b"two", b"\xff\x00 any bytes"]


def test_page_checksums_find_a_flipped_byte() -> None:
    text = np.random.default_rng(0).bytes(5000)
    data = bytearray(encode_parquet([_table([text])], DOCUMENT_SCHEMA, {}))
    data[data.find(text[1000:1010])] ^= 1  # random bytes stay as they are under zstd
    with pytest.raises(OSError, match="CRC"):
        pq.ParquetFile(io.BytesIO(data), page_checksum_verification=True).read()
