"""Baselines: what gzip -9, xz -9 and an order-0 model make of the same documents, all of them as one stream.

In: the shards of a split. Out: bits per byte of each. One Ray task reads the shards once, in stored order, a row group
at a time, so that memory holds one row group whatever the split holds.
"""

import lzma
import zlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from pipelines.storage import Storage
from pipelines.train.row_group import num_row_groups, read_row_group

_GZIP_FORMAT = 31
"""zlib's window bits for a gzip header and its largest window."""


class Compressor(Protocol):
    """A stream whose output is counted and thrown away."""

    def compress(self, data: bytes, /) -> bytes:
        """Output that is ready."""

    def flush(self) -> bytes:
        """The rest of the output."""


class StreamSizes:
    """Bytes go in by pieces; what each baseline needs for them end to end comes out."""

    def __init__(self) -> None:
        self._compressors: dict[str, Compressor] = {
            "gzip -9": zlib.compressobj(9, zlib.DEFLATED, _GZIP_FORMAT),
            "xz -9": lzma.LZMACompressor(preset=9),
        }
        self._sizes = dict.fromkeys(self._compressors, 0)
        self._counts = np.zeros(256, np.int64)

    def add(self, piece: bytes) -> None:
        """Append to the stream."""
        for name, compressor in self._compressors.items():
            self._sizes[name] += len(compressor.compress(piece))
        self._counts += np.bincount(np.frombuffer(piece, np.uint8), minlength=256)

    def finish(self) -> dict[str, float]:
        """Bytes by name; nothing can be added after. order-0: an ideal code of single bytes, its table free."""
        sizes = {name: float(size + len(self._compressors[name].flush())) for name, size in self._sizes.items()}
        seen = self._counts[self._counts > 0]
        return {**sizes, "order-0": float((seen * np.log2(seen.sum() / seen)).sum() / 8)}


def stream_sizes(data: str, paths: Sequence[str]) -> dict[str, float]:
    """Bytes that each baseline needs for the documents of the shards at `paths`, without special ids."""
    storage, sizes = Storage(data), StreamSizes()
    for path in paths:
        for number in range(num_row_groups(storage, path)):
            sizes.add(read_row_group(storage, path, number).text.tobytes())
    return sizes.finish()
