"""Baselines: what gzip -9, xz -9 and an order-0 model make of the same documents, all of them as one stream.

In: the shards of a split. Out: bytes each of them needs. One Ray task for each reads the shards in stored order, a row
group at a time, so that memory holds one row group whatever the split holds.
"""

import lzma
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import ray

from blt.vocabulary import BYTE_OFFSET
from pipelines.storage import Storage
from pipelines.train.row_group import num_row_groups, read_row_group

_GZIP_FORMAT = 31
"""zlib's window bits for a gzip header and its largest window."""

Pieces = Iterator[npt.NDArray[np.uint8]]


def gzip_bytes(pieces: Pieces) -> float:
    """Size of `gzip -9` of the pieces end to end."""
    compressor = zlib.compressobj(9, zlib.DEFLATED, _GZIP_FORMAT)
    return sum(len(compressor.compress(piece)) for piece in pieces) + len(compressor.flush())


def xz_bytes(pieces: Pieces) -> float:
    """Size of `xz -9` of the pieces end to end."""
    compressor = lzma.LZMACompressor(preset=9)
    return sum(len(compressor.compress(piece.tobytes())) for piece in pieces) + len(compressor.flush())


def order0_bytes(pieces: Pieces) -> float:
    """Bytes times the entropy of their empirical distribution: an ideal code for bytes by themselves, its table free."""
    counts = np.zeros(256, np.int64)
    for piece in pieces:
        counts += np.bincount(piece, minlength=256)
    seen = counts[counts > 0]
    return float((seen * np.log2(seen.sum() / seen)).sum() / 8)


BASELINES: Mapping[str, Callable[[Pieces], float]] = {
    "gzip -9": gzip_bytes,
    "xz -9": xz_bytes,
    "order-0": order0_bytes,
}


def baseline_bpb(data: str, paths: Sequence[str], num_bytes: int) -> dict[str, float]:
    """Bits per byte of each baseline over the shards at `paths`, which hold `num_bytes`. Ray must be initialised."""
    task = ray.remote(num_cpus=1)(baseline_bytes)
    sizes = {name: task.remote(name, data, tuple(paths)) for name in BASELINES}
    return {name: 8 * float(ray.get(size)) / num_bytes for name, size in sizes.items()}


def baseline_bytes(name: str, data: str, paths: Sequence[str]) -> float:
    """Bytes that the baseline needs for the shards at `paths`."""
    return BASELINES[name](_texts(Storage(data), paths))


def _texts(storage: Storage, paths: Sequence[str]) -> Pieces:
    """The text of each row group: document bytes end to end, without special ids."""
    for path in paths:
        for number in range(num_row_groups(storage, path)):
            ids = read_row_group(storage, path, number).ids_N
            yield (ids[ids >= BYTE_OFFSET] - BYTE_OFFSET).astype(np.uint8)
