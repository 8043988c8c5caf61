"""What a patch dataset takes on disk and how fast it is read, measured on its files."""

import io
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.manifest import read_manifest
from pipelines.patches import open_patches
from pipelines.schema import write_parquet
from pipelines.storage import Storage


@dataclass(frozen=True, kw_only=True)
class StoredBytes:
    """Bytes of a dataset's files, by byte of text."""

    whole: float
    """All columns and footers."""
    text: float
    """The text alone in the same row groups, written in the same way (zstd, level 3)."""


def stored_bytes(patches: str) -> StoredBytes:
    """Sizes of the files of the dataset `patches` as they are, and of its texts written alone."""
    storage, whole, alone = Storage(patches), 0, 0
    manifest = read_manifest(patches)
    sizes = storage.sizes()
    for shard in manifest.shards:
        whole += sizes[shard.path]
        with storage.open(shard.path) as file:
            parquet = pq.ParquetFile(file, pre_buffer=False)
            groups = range(parquet.num_row_groups)
            sink = io.BytesIO()
            schema = pa.schema([parquet.schema_arrow.field("text")])
            write_parquet(
                sink, (parquet.read_row_group(n, columns=["text"], use_threads=False) for n in groups), schema, {}
            )
            alone += sink.tell()
    return StoredBytes(whole=whole / manifest.bytes, text=alone / manifest.bytes)


def reader_bytes_per_cpu_second(patches: str, *, verify: bool) -> float:
    """Bytes of text per CPU-second of `open_patches`, all columns and patch lengths."""

    def read() -> int:
        return sum(batch.num_rows for batch in open_patches(patches, verify=verify))

    return _bytes_per_cpu_second(patches, read)


def parquet_bytes_per_cpu_second(patches: str) -> float:
    """Bytes of text per CPU-second of pyarrow alone: all stored columns decoded."""
    storage = Storage(patches)

    def read() -> int:
        rows = 0
        for shard in read_manifest(patches).shards:
            with storage.open(shard.path) as file:
                parquet = pq.ParquetFile(file, pre_buffer=False)
                rows += sum(
                    parquet.read_row_group(number, use_threads=False).num_rows
                    for number in range(parquet.num_row_groups)
                )
        return rows

    return _bytes_per_cpu_second(patches, read)


def _tables(parquet: pq.ParquetFile, columns: Sequence[str] | None) -> Iterator[pa.Table]:
    """The row groups of a file, decoded on this thread."""
    for number in range(parquet.num_row_groups):
        yield parquet.read_row_group(number, columns=columns, use_threads=False)


def _bytes_per_cpu_second(patches: str, read: Callable[[], int]) -> float:
    manifest = read_manifest(patches)
    began = time.process_time()
    rows = read()
    seconds = time.process_time() - began
    assert rows == manifest.documents
    return manifest.bytes / seconds
