"""The rows of a Parquet file, or of the row groups that begin in a range of its bytes; damage is a row that says so."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.shard.config import SourceConfig
from pipelines.shard.files import one_line
from pipelines.shard.lines import SourceReader
from pipelines.shard.plan import Unit
from pipelines.shard.text import refused

_BATCH_ROWS = 64
_BATCH_BYTES = 8 * 2**20
"""Of a batch of usual rows, at most; a longer row comes alone."""
_READ_BYTES = 2**20
"""Read at once: else Arrow takes the whole column of a row group, however large it is."""


@dataclass(slots=True)
class ParquetRow:
    """A row, or a run of rows that are lost."""

    index: int
    """From 0, in the file."""
    text: bytes | None = None
    doc_id: str | None = None
    label: str | None = None
    reason: str = ""
    """Why there is no text."""
    rows: int = 1


def read_parquet(
    stream: SourceReader, unit: Unit, source: SourceConfig, max_line_bytes: int, label_key: str | None = None
) -> Iterator[ParquetRow]:
    """Every row of the unit in order. What concerns a whole file is told in the unit that begins at its start."""
    keys = [source.text_key, source.id_key, *([] if label_key is None else [label_key])]
    try:
        parquet = pq.ParquetFile(stream, pre_buffer=False, buffer_size=_READ_BYTES)
    except MemoryError:
        raise  # Arrow's is one of its own errors, but says nothing of the file
    except (pa.ArrowException, OSError) as error:
        if not unit.start:
            yield ParquetRow(0, reason=f"damaged Parquet file, all of it is lost: {one_line(error)}")
        return
    metadata, names = parquet.metadata, parquet.schema_arrow.names
    if reason := _unusable(names, keys):
        if not unit.start:
            yield ParquetRow(0, reason=reason, rows=max(1, metadata.num_rows))
        return
    first = 0
    for group in range(metadata.num_row_groups):
        num_rows = metadata.row_group(group).num_rows
        if _starts_in(unit, metadata.row_group(group)):
            yield from _row_group(parquet, group, first, num_rows, source, max_line_bytes, keys)
        first += num_rows


def _starts_in(unit: Unit, row_group: pq.RowGroupMetaData) -> bool:
    """Whether a row group belongs to the unit: to the one range in which its first page lies."""
    if not row_group.num_columns:
        return unit.start == 0
    column = row_group.column(0)
    pages = [column.dictionary_page_offset, column.data_page_offset]
    start = max(0, min(page for page in pages if page is not None))
    return unit.start <= start and (unit.end is None or start < unit.end)


def _row_group(
    parquet: pq.ParquetFile,
    group: int,
    first: int,
    num_rows: int,
    source: SourceConfig,
    max_line_bytes: int,
    keys: Sequence[str],
) -> Iterator[ParquetRow]:
    """The rows of one row group, of which the first is `first` of the file."""
    row, end = first, first + num_rows
    columns = [name for name in keys if name in parquet.schema_arrow.names]
    damage = "they end early"
    try:
        for batch in parquet.iter_batches(
            batch_size=_batch_rows(parquet.metadata.row_group(group)),
            row_groups=[group],
            columns=columns,
            use_threads=False,
        ):
            labels = [_labels(batch, key) for key in (source.id_key, *keys[2:])]
            for text, doc_id, *label in zip(_texts(batch, source), *labels, strict=True):
                yield _row(row, text, doc_id, label[0] if label else None, source, max_line_bytes)
                row += 1
    except MemoryError:
        raise
    except (pa.ArrowException, OSError) as error:  # the rows that do not come are told of below
        damage = one_line(error)
    if row < end:
        reason = f"damaged Parquet pages, {end - row} rows are lost: {damage}"
        yield ParquetRow(row, reason=reason, rows=end - row)


def _batch_rows(row_group: pq.RowGroupMetaData) -> int:
    """Rows to hold at a time, by their mean size."""
    return max(1, min(_BATCH_ROWS, int(_BATCH_BYTES * row_group.num_rows // max(1, row_group.total_byte_size))))


def _unusable(names: Sequence[str], keys: Sequence[str]) -> str | None:
    """Why a file of these columns yields no documents, or None; the first key is that of the text."""
    if keys[0] not in names:
        return f"no column {keys[0]!r} (columns: {', '.join(names[:8])})"
    twice = [key for key in keys if names.count(key) > 1]
    return f"more than one column {twice[0]!r}" if twice else None


def _texts(batch: pa.RecordBatch, source: SourceConfig) -> list[Any]:
    """Bytes, or None, or another type, which is refused."""
    column = _plain(batch.column(source.text_key))
    return (column.cast(pa.large_binary()) if _is_string(column.type) else column).to_pylist()  # type: ignore[no-any-return]


def _labels(batch: pa.RecordBatch, key: str) -> list[str | None]:
    """Ids or other labels as text; bytes that are no text are replaced."""
    if key not in batch.schema.names:
        return [None] * batch.num_rows
    column = _plain(batch.column(key))
    values = (column.cast(pa.large_binary()) if _is_string(column.type) else column).to_pylist()
    return [_label(value) for value in values]


def _label(value: object) -> str | None:
    if value is None:
        return None
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _plain(column: pa.Array) -> pa.Array:
    return pc.dictionary_decode(column) if pa.types.is_dictionary(column.type) else column


def _is_string(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _row(
    row: int, text: object, doc_id: str | None, label: str | None, source: SourceConfig, max_line_bytes: int
) -> ParquetRow:
    if not isinstance(text, bytes):
        what = "null" if text is None else type(text).__name__
        return ParquetRow(row, reason=f"{source.text_key!r} is {what}, not text")
    if reason := refused(text, max_line_bytes, source.invalid_utf8 == "keep"):
        return ParquetRow(row, reason=reason)
    return ParquetRow(row, text=text, doc_id=doc_id, label=label)
