"""A Parquet file in memory, for tests that damage it, copy it or put it into a dataset."""

import io
from collections.abc import Iterable, Mapping

import pyarrow as pa

from pipelines.schema import write_parquet


def encode_parquet(row_groups: Iterable[pa.Table], schema: pa.Schema, metadata: Mapping[str, str]) -> bytes:
    """The bytes that `write_parquet` writes."""
    sink = io.BytesIO()
    write_parquet(sink, row_groups, schema, metadata)
    return sink.getvalue()
