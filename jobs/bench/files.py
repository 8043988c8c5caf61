"""What a patch dataset takes on disk and how fast it is read, measured on its files."""

import io
import time
from collections.abc import Callable
from dataclasses import dataclass

import pyarrow as pa

from pipelines.manifest import read_manifest
from pipelines.patches import open_patches
from pipelines.schema import DOCUMENT_SCHEMA, write_parquet
from pipelines.shard_file import open_shard
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
        with open_shard(storage, shard.path) as file:
            sink = io.BytesIO()
            write_parquet(sink, file.tables(["text"]), pa.schema([DOCUMENT_SCHEMA.field("text")]), {})
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
            with open_shard(storage, shard.path, verify=False) as file:
                rows += sum(table.num_rows for table in file.tables())
        return rows

    return _bytes_per_cpu_second(patches, read)


def _bytes_per_cpu_second(patches: str, read: Callable[[], int]) -> float:
    manifest = read_manifest(patches)
    began = time.process_time()
    rows = read()
    seconds = time.process_time() - began
    assert rows == manifest.documents
    return manifest.bytes / seconds
