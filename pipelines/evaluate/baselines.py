"""Baselines: what gzip -9, xz -9, zstd -19 and an order-0 model make of the same documents, end to end as one stream.

In: all documents, or those of a source or language. Out: bytes by name. A stream is a Ray task of its own, which reads
the documents in their order, so that memory holds the compressors (xz alone takes up to 700 MB) and one document.
"""

import lzma
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
import pyarrow as pa
import ray

from pipelines.evaluate.config import Compressor
from pipelines.evaluate.documents import Documents, Part
from pipelines.shard.tasks import placeable

ORDER_0 = "order-0"

_GZIP_FORMAT = 31
"""zlib's window bits for a gzip header and its largest window."""
_ZSTD_LEVEL = 19
_ZSTD_FRAME_BYTES = 64 * 2**20
"""pyarrow compresses streams at its default level only, so a longer stream is cut into frames of this, each compressed
at once. Level 19 looks back 8 MiB, so a frame can miss no more than that much of what came before."""
_TASK_MEMORY_BYTES = 2**30

Sizes = Mapping[str, float]
"""Bytes by the name of a baseline."""


class Stream(Protocol):
    """A stream whose output is counted and thrown away."""

    def compress(self, data: bytes, /) -> bytes:
        """Output that is ready."""

    def flush(self) -> bytes:
        """The rest of the output."""


class ZstdStream:
    """zstd -19."""

    def __init__(self, frame_bytes: int = _ZSTD_FRAME_BYTES) -> None:
        self._codec, self._frame_bytes = pa.Codec("zstd", compression_level=_ZSTD_LEVEL), frame_bytes
        self._held = bytearray()

    def compress(self, data: bytes, /) -> bytes:
        self._held += data
        frames = []
        while len(self._held) > self._frame_bytes:
            frames.append(self._frame(self._held[: self._frame_bytes]))
            del self._held[: self._frame_bytes]
        return b"".join(frames)

    def flush(self) -> bytes:
        return self._frame(self._held)

    def _frame(self, data: bytearray) -> bytes:
        return bytes(self._codec.compress(data, asbytes=True))


_STREAMS: dict[Compressor, tuple[str, Callable[[], Stream]]] = {
    "gzip": ("gzip -9", lambda: zlib.compressobj(9, zlib.DEFLATED, _GZIP_FORMAT)),
    "xz": ("xz -9", lambda: lzma.LZMACompressor(preset=9)),
    "zstd": (f"zstd -{_ZSTD_LEVEL}", ZstdStream),
}


class StreamSizes:
    """Bytes go in by pieces; what each baseline needs for them end to end comes out."""

    def __init__(self, compressors: Sequence[Compressor] = tuple(_STREAMS)) -> None:
        self._streams = {name: make() for kind, (name, make) in _STREAMS.items() if kind in compressors}
        self._sizes = dict.fromkeys(self._streams, 0)
        self._counts = np.zeros(256, np.int64)

    def add(self, piece: bytes) -> None:
        """Append to the stream."""
        for name, stream in self._streams.items():
            self._sizes[name] += len(stream.compress(piece))
        self._counts += np.bincount(np.frombuffer(piece, np.uint8), minlength=256)

    def finish(self) -> dict[str, float]:
        """Bytes by name; nothing can be added after. order-0: an ideal code of single bytes, its table free."""
        sizes = {name: float(size + len(self._streams[name].flush())) for name, size in self._sizes.items()}
        seen = self._counts[self._counts > 0]
        return {**sizes, ORDER_0: float((seen * np.log2(seen.sum() / seen)).sum() / 8)}


def stream_sizes(documents: Documents, part: Part, compressors: Sequence[Compressor]) -> Sizes:
    """Bytes that each baseline needs for the documents of a part, without special ids."""
    sizes = StreamSizes(compressors)
    for text in documents.texts(part):
        sizes.add(text)
    return sizes.finish()


class Baselines:
    """The sizes of several parts, made by tasks that run beside the scoring, one after the other: each holds a CPU and
    much memory. Ray must be initialised.
    """

    def __init__(self, documents: Documents, compressors: Sequence[Compressor]) -> None:
        self._documents, self._compressors = documents, compressors
        self._sizes: dict[Part, ray.ObjectRef[Sizes]] = {}
        self._last: ray.ObjectRef[Sizes] | None = None

    def start(self, part: Part) -> None:
        """Make those of a part too."""
        task = ray.remote(num_cpus=1, memory=placeable(_TASK_MEMORY_BYTES))(_sizes_after)
        self._last = self._sizes[part] = task.remote(self._documents, part, self._compressors, self._last)

    def share(self, part: Part, other: Part) -> None:
        """Take those of another part, which holds the same documents, for a part too."""
        self._sizes[part] = self._sizes[other]

    def bits_per_byte(self, part: Part, num_bytes: int) -> dict[str, float]:
        """By name, once they are made; empty for a part without bytes."""
        sizes: Sizes = ray.get(self._sizes[part])
        return {name: 8 * size / num_bytes for name, size in sizes.items()} if num_bytes else {}


def _sizes_after(documents: Documents, part: Part, compressors: Sequence[Compressor], before: object) -> Sizes:
    """`stream_sizes`, once the task that gives `before` has ended."""
    return stream_sizes(documents, part, compressors)
