"""The Parquet files of both datasets: columns, packed patch starts, row groups capped by bytes, and the one way a
file is written.

A document row is (doc_id, source, text, n_bytes). A patch row adds `patch_starts`, n_bytes + 1 bits, least
significant bit first: bit i says that byte i starts a patch, the last bit belongs to EOS, bit 0 is always 1, BOS is
implicit; and `n_patches`, the set bits among the bytes (EOS not counted). It may add `entropies`, n_bytes + 1 values
of one byte each, ceil(32 H) for an entropy of H nats: value 0 made at BOS, value i at byte i - 1. A file holds nothing
of time, host or path: same rows, same bytes.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from blt.errors import DataError

SCHEMA_VERSION = 2
"""Raised whenever the meaning of a column or of a manifest field changes."""

DOCUMENT_SCHEMA = pa.schema(
    [
        pa.field("doc_id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("text", pa.large_binary(), nullable=False),
        pa.field("n_bytes", pa.int64(), nullable=False),
    ]
)

PATCH_SCHEMA = pa.schema(
    [
        *DOCUMENT_SCHEMA,
        pa.field("patch_starts", pa.binary(), nullable=False),
        pa.field("n_patches", pa.int32(), nullable=False),
    ]
)

ENTROPY_FIELD = pa.field("entropies", pa.binary(), nullable=False)
"""Follows the columns of PATCH_SCHEMA in a dataset that stores entropies."""

ROW_GROUP_BYTES = 8 * 2**20
"""Usual cap on the text of a row group: the unit of random access (measured best between 8 and 16 MB)."""

MAX_ROW_GROUP_BYTES = 2**30
"""Largest cap, and longest document: Arrow refuses row groups of more than 2 GiB of text."""


def pack_starts(starts: npt.NDArray[np.bool_]) -> bytes:
    """Pack bool [n_bytes + 1] into ceil((n_bytes + 1) / 8) bytes, least significant bit first, zeros after the last."""
    return np.packbits(starts, bitorder="little").tobytes()


def unpack_starts(packed: bytes | memoryview, n_bytes: int) -> npt.NDArray[np.bool_]:
    """Bool [n_bytes + 1] from `patch_starts` of a document of `n_bytes`; DataError if the length cannot be right."""
    if len(packed) != (n_bytes + 8) // 8:
        raise DataError(f"patch_starts has {len(packed)} bytes; a document of {n_bytes} bytes has {(n_bytes + 8) // 8}")
    return np.unpackbits(np.frombuffer(packed, dtype=np.uint8), count=n_bytes + 1, bitorder="little").view(np.bool_)


def row_group_slices(sizes_bytes: Sequence[int], cap_bytes: int) -> list[slice]:
    """Cut rows into consecutive groups of at most `cap_bytes`; a row over the cap is a group of its own.

    The cap counts bytes and not rows because Arrow refuses to write a row group with more than 2 GiB of text.
    """
    slices: list[slice] = []
    start, held = 0, 0
    for row, size in enumerate(sizes_bytes):
        if row > start and held + size > cap_bytes:
            slices.append(slice(start, row))
            start, held = row, 0
        held += size
    if len(sizes_bytes) > start:
        slices.append(slice(start, len(sizes_bytes)))
    return slices


def patch_schema(with_entropies: bool) -> pa.Schema:
    """Columns of a patch dataset's files."""
    return PATCH_SCHEMA.append(ENTROPY_FIELD) if with_entropies else PATCH_SCHEMA


def write_parquet(
    sink: BinaryIO, row_groups: Iterable[pa.Table], schema: pa.Schema, metadata: Mapping[str, str]
) -> None:
    """Write one Parquet file front to back, a row group for each table: zstd, page checksums, `metadata` as key/values
    of the footer (read after the last row group, so that it may be filled meanwhile). `sink` is left open.

    Dictionaries and statistics are kept to the columns where they are of use; entropies are all but incompressible and
    take the quickest level.
    """
    levels = {name: 1 if name == ENTROPY_FIELD.name else 3 for name in schema.names}
    with pq.ParquetWriter(
        sink,
        schema,
        compression=dict.fromkeys(schema.names, "zstd"),
        compression_level=levels,
        use_dictionary=["source"],
        write_statistics=[name for name in ("source", "n_bytes", "n_patches") if name in schema.names],
        write_page_checksum=True,
    ) as writer:
        for table in row_groups:
            writer.write_table(table, row_group_size=max(1, table.num_rows))
        writer.add_key_value_metadata({"schema_version": str(SCHEMA_VERSION), **metadata})
