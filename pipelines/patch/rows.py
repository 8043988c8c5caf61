"""The rows of a shard: row groups of documents in, the same rows with patch starts out, and the hash of their values.

A row group at a time: memory is bounded by the row group, whatever the shard holds.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from blt.errors import DataError
from pipelines.schema import DOCUMENT_SCHEMA, ENTROPY_FIELD, pack_starts, patch_schema, row_group_slices
from pipelines.shard_file import open_shard
from pipelines.storage import Storage

Starts = npt.NDArray[np.bool_]
"""Bool [n_bytes + 1] of one document."""


def read_row_groups(storage: Storage, path: str, row_group_bytes: int) -> Iterator[pa.Table]:
    """Tables of a document shard, at most `row_group_bytes` of text each unless one document is longer.

    DataError, naming the file, for a missing or broken shard or a text that is not n_bytes long.
    """
    with open_shard(storage, path, DOCUMENT_SCHEMA) as shard:
        for index, table in enumerate(shard.tables()):
            if not pc.binary_length(table["text"]).cast(pa.int64()).equals(table["n_bytes"]):
                raise DataError(f"shard {shard.url}, row group {index}: n_bytes is not the length of text")
            for rows in row_group_slices(table["n_bytes"].to_pylist(), row_group_bytes):
                yield table.slice(rows.start, rows.stop - rows.start)


def patched_table(
    table: pa.Table, starts: Sequence[Starts], entropies: Sequence[bytes | memoryview] | None = None
) -> pa.Table:
    """The document rows of `table` with the columns patch_starts, n_patches and, if given, entropies."""
    packed = pa.array([pack_starts(bits) for bits in starts], type=pa.binary())
    num_patches = pa.array([int(bits[:-1].sum()) for bits in starts], type=pa.int32())
    columns = [*(table[name] for name in DOCUMENT_SCHEMA.names), packed, num_patches]
    if entropies is not None:
        columns.append(pa.array(entropies, type=pa.binary()))
    return pa.Table.from_arrays(columns, schema=patch_schema(entropies is not None))


def stored_columns(storage: Storage, path: str, columns: Sequence[str]) -> Iterator[pa.Table]:
    """Some columns of a patch file that stores entropies, a row group at a time; DataError for a broken file."""
    with open_shard(storage, path, patch_schema(True)) as shard:
        yield from shard.tables(columns)


class RowStream:
    """The rows of consecutive tables, taken in other portions than those they come in."""

    def __init__(self, tables: Iterable[pa.Table]) -> None:
        self._tables = iter(tables)
        self._held: pa.Table | None = None

    def take(self, num_rows: int) -> pa.Table | None:
        """The next `num_rows` rows, fewer at the end; None where no table comes at all."""
        while self._held is None or self._held.num_rows < num_rows:
            table = next(self._tables, None)
            if table is None:
                break
            self._held = table if self._held is None else pa.concat_tables([self._held, table])
        if self._held is None:
            return None
        taken, self._held = self._held.slice(0, num_rows), self._held.slice(num_rows)
        return taken


class ContentHash:
    """Sha256 over the values of rows, whatever row groups, compression or library version they are stored with."""

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()

    def update(self, table: pa.Table) -> None:
        """Add the rows of a patch table: per row, length and value of doc_id, source, text, patch_starts and, where
        the table has them, entropies.
        """
        names = ["doc_id", "source", "text", "patch_starts"]
        if ENTROPY_FIELD.name in table.column_names:
            names.append(ENTROPY_FIELD.name)
        for row in zip(*(table[name] for name in names), strict=True):
            for value in row:
                data = value.as_buffer()
                self._sha256.update(data.size.to_bytes(8, "little"))
                self._sha256.update(data)

    @property
    def hexdigest(self) -> str:
        return self._sha256.hexdigest()
