"""One unit of a corpus in, its documents and its rejected rows out, as a stream: every row is either, and none is lost.

A row is a JSON line that is not blank, a Parquet row, or a whole .txt or binary file. Damage ends a file with one
rejected row that says where; the rows before it stand. Only an error of the storage itself stops the job.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from pipelines.shard.config import SourceConfig
from pipelines.shard.files import open_file
from pipelines.shard.json_text import RefusedError, TextDecoder
from pipelines.shard.lines import CHUNK_BYTES, Line, SourceReader, decompressed, read_lines
from pipelines.shard.parquet_rows import ParquetRow, read_parquet
from pipelines.shard.plan import Unit
from pipelines.shard.text import refused, too_long


@dataclass(slots=True)
class Document:
    """One document of a corpus file."""

    doc_id: str
    text: bytes
    offset: int
    """Byte offset of its line in the uncompressed file; the row's index in a Parquet file; 0 for a whole file."""
    label: str | None = None
    """Of the reader's `label_key`; None where the row has none."""


@dataclass(slots=True)
class Rejected:
    """One row, or a run of rows, that yields no document."""

    line: int
    """From 1, in the unit; the row's number in a Parquet file."""
    offset: int
    """As Document.offset."""
    reason: str
    rows: int = 1


class UnitReader:
    """Iterates over the rows of a unit in the order of their offsets. DataError if the storage cannot deliver them.

    Memory: one chunk and one line of at most `max_line_bytes`, however large the file is.
    """

    def __init__(self, unit: Unit, source: SourceConfig, max_line_bytes: int, *, label_key: str | None = None) -> None:
        self._unit, self._file, self._source, self._max_line_bytes = unit, unit.file, source, max_line_bytes
        self._label_key = label_key
        self.num_lines = 0
        """Lines that begin in the unit, as far as it is read; 0 where units do not consist of lines."""

    def __iter__(self) -> Iterator[Document | Rejected]:
        file = self._file
        with SourceReader(open_file(file.url), file.url) as stream:
            if file.compression and not file.size_bytes:
                yield Rejected(1, 0, f"the file is empty, which no {file.compression} stream is")
            elif file.format == "jsonl":
                yield from self._lines(stream)
            elif file.format == "parquet":
                for row in read_parquet(stream, self._unit, self._source, self._max_line_bytes, self._label_key):
                    yield self._parquet_row(row)
            else:
                yield self._whole_file(stream)

    def _lines(self, stream: SourceReader) -> Iterator[Document | Rejected]:
        start, end = self._unit.start, self._unit.end
        stream.seek(max(0, start - 1))
        source = self._source
        decoder = TextDecoder(source.text_key, source.id_key, source.invalid_utf8 == "keep", self._label_key)
        content = decompressed(stream, self._file.compression)
        next_offset = start
        try:
            for line in read_lines(content, self._max_line_bytes, start, end):
                self.num_lines, next_offset = line.number, line.offset + line.size_bytes + 1
                if line.data is None:
                    yield Rejected(line.number, line.offset, too_long(line.size_bytes, self._max_line_bytes))
                elif line.data and not line.data.isspace():
                    yield self._parse(line, line.data, decoder)
        except OSError as error:
            yield Rejected(self.num_lines + 1, next_offset, f"{self._damaged()}, the rest of the file is lost: {error}")

    def _parse(self, line: Line, data: bytes, decoder: TextDecoder) -> Document | Rejected:
        try:
            text, doc_id, label = decoder.decode_labelled(data)
        except RefusedError as error:
            return Rejected(line.number, line.offset, str(error))
        return Document(f"{self._file.name}:{line.offset}" if doc_id is None else doc_id, text, line.offset, label)

    def _whole_file(self, stream: SourceReader) -> Document | Rejected:
        content, text = decompressed(stream, self._file.compression), bytearray()
        try:
            while len(text) <= self._max_line_bytes and (chunk := content.read(CHUNK_BYTES)):
                text += chunk
        except OSError as error:
            return Rejected(1, 0, f"{self._damaged()}, all of it is lost: {error}")
        keep_invalid = self._file.format == "binary" or self._source.invalid_utf8 == "keep"
        if reason := refused(text, self._max_line_bytes, keep_invalid):
            return Rejected(1, 0, reason)
        return Document(self._file.name, bytes(text), 0)

    def _parquet_row(self, row: ParquetRow) -> Document | Rejected:
        if row.text is None:
            return Rejected(row.index + 1, row.index, row.reason, row.rows)
        doc_id = f"{self._file.name}:{row.index}" if row.doc_id is None else row.doc_id
        return Document(doc_id, row.text, row.index, row.label)

    def _damaged(self) -> str:
        return f"damaged {self._file.compression} stream"
