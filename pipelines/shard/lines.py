"""Lines of a byte stream, plain or compressed, in bounded memory: a line over the cap is counted and skipped.

A damaged or truncated compressed stream raises OSError out of the iteration, after the lines before the damage; an
error of the storage below raises DataError instead, so that a bad disk is never taken for bad data.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, cast

import pyarrow as pa

from blt.errors import DataError
from pipelines.shard.files import Compression

CHUNK_BYTES = 2**20
"""Bytes decompressed at a time. What was decompressed of the chunk in which a stream breaks is lost with it."""

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(slots=True)
class Line:
    """One line without its newline."""

    number: int
    """From 1."""
    offset: int
    """Of its first byte in the uncompressed stream."""
    data: bytes | None
    """None if it is longer than the cap."""
    size_bytes: int


class SourceReader(io.RawIOBase):
    """A binary file whose own failures are DataErrors that name it, told apart from damage found in its content."""

    def __init__(self, file: BinaryIO, url: str) -> None:
        super().__init__()
        self._file, self._url = file, url

    def read(self, size: int = -1, /) -> bytes:
        try:
            return self._file.read(size)
        except OSError as error:
            raise DataError(f"cannot read {self._url}: {error.strerror or error}") from error

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
    """A forward reader of the content. pyarrow's, because it raises where a truncated .zst or .gz ends."""
    if compression is None:
        return cast(BinaryIO, file)
    return cast(BinaryIO, pa.CompressedInputStream(pa.PythonFile(file, mode="r"), compression))


def read_lines(stream: BinaryIO, cap_bytes: int) -> Iterator[Line]:
    """The lines of `stream`; a last one without a newline counts, an empty rest does not.

    Memory: one chunk and one line of at most `cap_bytes`. A UTF-8 byte order mark at the start is dropped.
    """
    number, offset, held, pieces = 1, 0, 0, list[bytes]()

    def take() -> Line:
        data = b"".join(pieces) if held <= cap_bytes else None
        if number == 1 and data is not None and data.startswith(_BYTE_ORDER_MARK):
            data = data[len(_BYTE_ORDER_MARK) :]
        return Line(number=number, offset=offset, data=data, size_bytes=held)

    while chunk := stream.read(CHUNK_BYTES):
        start = 0
        while (end := chunk.find(b"\n", start)) >= 0:
            pieces.append(chunk[start:end])
            held += end - start
            yield take()
            number, offset, held = number + 1, offset + held + 1, 0
            pieces.clear()
            start = end + 1
        held += len(chunk) - start
        if held <= cap_bytes:
            pieces.append(chunk[start:])
        else:
            pieces.clear()
    if held:
        yield take()
