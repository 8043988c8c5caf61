"""One corpus file in, its documents and its rejected rows out, as a stream: every row is either, and none is lost.

A row is a JSON line that is not blank, a Parquet row, or a .txt file. Damage ends a file with one rejected row that
says where; the rows before it stand. Only an error of the storage itself stops the job.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.shard.config import ShardConfig
from pipelines.shard.files import InputFile, open_file
from pipelines.shard.lines import Line, SourceReader, decompressed, read_lines

_PARQUET_BATCH_ROWS = 64


@dataclass(slots=True)
class Document:
    """One document of a corpus file."""

    doc_id: str
    text: bytes
    """UTF-8."""
    offset: int
    """Byte offset of its line in the uncompressed file; the row's index in a Parquet file; 0 in a .txt file."""


@dataclass(slots=True)
class Rejected:
    """One row, or a run of rows, that yields no document."""

    line: int
    """From 1; the row's number in a Parquet file."""
    offset: int
    """As Document.offset."""
    reason: str
    rows: int = 1


def read_file(file: InputFile, config: ShardConfig) -> Iterator[Document | Rejected]:
    """The rows of `file` in order. DataError if the storage cannot deliver its bytes."""
    with SourceReader(open_file(file.url), file.url) as source:
        if file.compression and not file.size_bytes:
            yield Rejected(1, 0, f"the file is empty, which no {file.compression} stream is")
        elif file.format == "jsonl":
            yield from _read_jsonl(source, file, config)
        elif file.format == "txt":
            yield _read_text(source, file, config)
        else:
            yield from _read_parquet(source, file, config)


def _read_text(source: SourceReader, file: InputFile, config: ShardConfig) -> Document | Rejected:
    text = source.read(config.max_line_bytes + 1)
    if reason := _refused(text, config):
        return Rejected(1, 0, reason)
    return Document(file.name, text, 0)


def _read_jsonl(source: SourceReader, file: InputFile, config: ShardConfig) -> Iterator[Document | Rejected]:
    decoder = _json_decoder(config)
    line = None
    try:
        for line in read_lines(decompressed(source, file.compression), config.max_line_bytes):
            if line.data is None:
                yield Rejected(line.number, line.offset, _too_long(line.size_bytes, config))
            elif line.data and not line.data.isspace():
                yield _parse(line, line.data, decoder, file, config)
    except OSError as error:
        number, offset = (line.number + 1, line.offset + line.size_bytes + 1) if line else (1, 0)
        yield Rejected(number, offset, f"damaged {file.compression} stream, the rest of the file is lost: {error}")


def _json_decoder(config: ShardConfig) -> msgspec.json.Decoder[Any]:
    """Decodes only the two keys asked for; the others are skipped without being built."""
    record = msgspec.defstruct(
        "Record",
        [("text", str), ("id", str | int | None, None)],
        rename={"text": config.text_key, "id": config.id_key},
    )
    return msgspec.json.Decoder(record)


def _parse(
    line: Line, data: bytes, decoder: msgspec.json.Decoder[Any], file: InputFile, config: ShardConfig
) -> Document | Rejected:
    try:
        record = decoder.decode(data)
    except UnicodeDecodeError:
        return Rejected(line.number, line.offset, "not valid UTF-8")
    except RecursionError:
        return Rejected(line.number, line.offset, "JSON is nested too deeply")
    except msgspec.ValidationError as error:
        return Rejected(line.number, line.offset, f"{error}{_keys_of(data)}")
    except msgspec.DecodeError as error:
        return Rejected(line.number, line.offset, f"not valid JSON: {error}")
    doc_id = f"{file.name}:{line.number}" if record.id is None else str(record.id)
    return Document(doc_id, record.text.encode(), line.offset)


def _keys_of(data: bytes) -> str:
    """The first keys of a JSON object, for a reason that helps with a wrong text_key."""
    try:
        keys = list(msgspec.json.decode(data, type=dict[str, msgspec.Raw]))
    except (ValueError, RecursionError):
        return ""
    return f" (keys: {', '.join(keys[:8])}{', ...' if len(keys) > 8 else ''})"


def _read_parquet(source: SourceReader, file: InputFile, config: ShardConfig) -> Iterator[Document | Rejected]:
    try:
        parquet = pq.ParquetFile(source, pre_buffer=False)
    except (pa.ArrowException, OSError) as error:
        yield Rejected(1, 0, f"damaged Parquet file, all of it is lost: {_one_line(error)}")
        return
    metadata, names = parquet.metadata, parquet.schema_arrow.names
    if config.text_key not in names:
        reason = f"no column {config.text_key!r} (columns: {', '.join(names[:8])})"
        yield Rejected(1, 0, reason, rows=max(1, metadata.num_rows))
        return
    row = 0
    for index in range(metadata.num_row_groups):
        end = row + metadata.row_group(index).num_rows
        for item in _read_row_group(parquet, index, row, file, config):
            yield item
            row += 1
        if row < end:
            yield Rejected(row + 1, row, f"damaged Parquet pages, {end - row} rows are lost", rows=end - row)
        row = end


def _read_row_group(
    parquet: pq.ParquetFile, index: int, row: int, file: InputFile, config: ShardConfig
) -> Iterator[Document | Rejected]:
    """The rows of one row group, of which the first is `row` of the file; it ends early where the pages are damaged."""
    columns = [name for name in (config.text_key, config.id_key) if name in parquet.schema_arrow.names]
    try:
        for batch in parquet.iter_batches(batch_size=_PARQUET_BATCH_ROWS, row_groups=[index], columns=columns):
            texts, ids = _columns(batch, config)
            for text, doc_id in zip(texts, ids, strict=True):
                yield _row(row, text, doc_id, file, config)
                row += 1
    except (pa.ArrowException, OSError):
        return


def _columns(batch: pa.RecordBatch, config: ShardConfig) -> tuple[list[Any], list[Any]]:
    """Texts as bytes (or None, or another type, which is refused) and ids of a batch."""
    column = batch.column(config.text_key)
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type) or pa.types.is_string_view(column.type):
        column = column.cast(pa.large_binary())
    ids = batch.column(config.id_key).to_pylist() if config.id_key in batch.schema.names else [None] * batch.num_rows
    return column.to_pylist(), ids


def _row(row: int, text: object, doc_id: object, file: InputFile, config: ShardConfig) -> Document | Rejected:
    if not isinstance(text, bytes):
        return Rejected(
            row + 1, row, f"{config.text_key!r} is {'null' if text is None else type(text).__name__}, not text"
        )
    if reason := _refused(text, config):
        return Rejected(row + 1, row, reason)
    return Document(f"{file.name}:{row + 1}" if doc_id is None else str(doc_id), text, row)


def _refused(text: bytes, config: ShardConfig) -> str | None:
    """Why `text` cannot be a document, or None."""
    if len(text) > config.max_line_bytes:
        return _too_long(len(text), config)
    try:
        text.decode()
    except UnicodeDecodeError as error:
        return f"not valid UTF-8 (byte {error.start})"
    return None


def _too_long(size_bytes: int, config: ShardConfig) -> str:
    return f"longer than max_line_bytes={config.max_line_bytes}: {size_bytes} bytes or more"


def _one_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
