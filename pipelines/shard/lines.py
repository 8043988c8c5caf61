"""Lines of a byte stream, plain or compressed, in bounded memory: a line over the cap is counted and skipped.

A damaged or truncated compressed stream raises OSError out of the iteration, after the lines before the damage; an
error of the storage below raises DataError instead, so that a bad disk is never taken for bad data.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

import pyarrow as pa

from blt.errors import DataError
from pipelines.shard.files import Compression, one_line

CHUNK_BYTES = 2**20
"""Bytes decompressed at a time. What was decompressed of the chunk in which a stream breaks is lost with it."""

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(slots=True)
class Line:
    """One line without its newline."""

    number: int
    """From 1, in the stream or the range of it that is read."""
    offset: int
    """Of its first byte in the uncompressed stream."""
    data: bytes | None
    """None if it is longer than the cap."""
    size_bytes: int


_BLOCK_BYTES = 8 * 2**20
"""Asked of the storage at a time where a file is read front to back: a request to S3 costs some ten milliseconds."""


class SourceReader(io.RawIOBase):
    """A binary file whose own failures are DataErrors that name it, told apart from damage found in its content."""

    def __init__(self, file: BinaryIO, url: str) -> None:
        super().__init__()
        self._file, self._url = file, url

    def read(self, size: int = -1, /) -> bytes:
        try:
            return self._file.read(size)
        except OSError as error:
            raise DataError(f"cannot read {self._url}: {one_line(error)}") from error

    def readinto(self, buffer: Any, /) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = 0, /) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()


def decompressed(file: SourceReader, compression: Compression | None) -> BinaryIO:
    """A forward reader of the content, from where `file` stands. pyarrow's for what is compressed, because it raises
    where a truncated .zst or .gz ends.
    """
    blocks = io.BufferedReader(file, _BLOCK_BYTES)
    if compression is None:
        return blocks
    return cast(BinaryIO, pa.CompressedInputStream(pa.PythonFile(blocks, mode="r"), compression))


def read_lines(stream: BinaryIO, cap_bytes: int, start: int = 0, end: int | None = None) -> Iterator[Line]:
    """The lines of `stream`; a last one without a newline counts, an empty rest does not.

    With a range, those that begin at an offset in [start, end); a `stream` for start > 0 must stand at start - 1, for
    the byte before a range decides whether a line begins with it. Numbers then count from the range's first line.
    Memory: one chunk and one line of at most `cap_bytes`. A UTF-8 byte order mark at offset 0 is dropped.
    """
    number, offset, held, pieces = (0, start - 1, 0, list[bytes]()) if start else (1, 0, 0, list[bytes]())

    def take() -> Line:
        data = b"".join(pieces) if held <= cap_bytes else None
        if offset == 0 and data is not None and data.startswith(_BYTE_ORDER_MARK):
            data = data[len(_BYTE_ORDER_MARK) :]
        return Line(number=number, offset=offset, data=data, size_bytes=held)

    while chunk := stream.read(CHUNK_BYTES):
        begin = 0
        while (newline := chunk.find(b"\n", begin)) >= 0:
            pieces.append(chunk[begin:newline])
            held += newline - begin
            if number:  # 0 is the rest of a line that begins before the range
                yield take()
            number, offset, held = number + 1, offset + held + 1, 0
            pieces.clear()
            begin = newline + 1
            if end is not None and offset >= end:
                return
        held += len(chunk) - begin
        if number and held <= cap_bytes:
            pieces.append(chunk[begin:])
        else:
            pieces.clear()
        if not number and end is not None and offset + held >= end:
            return  # no line begins in the range
    if held and number:
        yield take()
