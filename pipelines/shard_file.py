"""A shard of a dataset, open for reading a row group at a time; whatever is wrong with it is one line that names it.

In: a storage, the path of a Parquet file, and the columns it must have. Out: tables.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from blt.errors import DataError, StorageError
from pipelines.storage import Storage


class ShardFile:
    """An open shard."""

    def __init__(self, url: str, file: BinaryIO, parquet: pq.ParquetFile) -> None:
        self.url = url
        self._file, self._parquet = file, parquet

    @property
    def num_row_groups(self) -> int:
        return int(self._parquet.num_row_groups)

    @property
    def columns(self) -> Sequence[str]:
        """Names, in stored order."""
        return tuple(self._parquet.schema_arrow.names)

    @property
    def footer(self) -> Mapping[str, str]:
        """Its key/values."""
        return {key.decode(): value.decode() for key, value in (self._parquet.metadata.metadata or {}).items()}

    @property
    def size_bytes(self) -> int:
        return self._file.seek(0, 2)

    def num_rows(self, row_group: int) -> int:
        return int(self._parquet.metadata.row_group(row_group).num_rows)

    def read(self, row_group: int, columns: Sequence[str] | None = None) -> pa.Table:
        """One row group, all columns or some; DataError if it cannot be read, StorageError if that may pass."""
        try:
            # On this thread: Arrow's own may hold the Python file beyond the end of the process, and abort it.
            return self._parquet.read_row_group(row_group, columns=columns, use_threads=False)
        except (pa.ArrowException, OSError) as error:
            text = f"shard {self.url}, row group {row_group}: cannot be read: {_one_line(error)}"
            # Arrow tells of broken files by an OSError too, without a number of the system's.
            raise (StorageError if getattr(error, "errno", None) else DataError)(text) from error

    def tables(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """Every row group in order."""
        return (self.read(index, columns) for index in range(self.num_row_groups))


@contextlib.contextmanager
def open_shard(
    storage: Storage, path: str, schema: pa.Schema | None = None, *, verify: bool = True
) -> Iterator[ShardFile]:
    """The shard at `path`; `verify` checks the checksum of every page that is read.

    DataError if it is missing, no Parquet file, or has other columns than `schema` (None: any).
    """
    url = storage.url(path)
    try:
        file = storage.open(path)
    except FileNotFoundError as error:
        raise DataError(f"shard {url} is in the manifest but does not exist") from error
    with file:
        try:
            parquet = pq.ParquetFile(file, pre_buffer=False, page_checksum_verification=verify)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"cannot read shard {url}: {_one_line(error)}") from error
        if schema is not None and not parquet.schema_arrow.equals(schema):
            found = ", ".join(f"{field.name} {field.type}" for field in parquet.schema_arrow)
            raise DataError(f"shard {url} has columns {found}; expected {', '.join(schema.names)}")
        yield ShardFile(url, file, parquet)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
