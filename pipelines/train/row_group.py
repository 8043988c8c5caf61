"""A row group of a shard, read and decoded: Parquet in, `RowGroup` out. Vectorised over all its documents.

Works on document shards (every byte a patch) and on patch shards (starts from the bitmap).
"""

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from blt.errors import DataError
from pipelines.shard_file import open_shard
from pipelines.storage import Storage
from pipelines.train.packing import Integers, RowGroup, join_documents


def num_row_groups(storage: Storage, path: str) -> int:
    """Row groups of the shard at `path`; DataError, naming the file, if it cannot be read."""
    with open_shard(storage, path) as shard:
        return shard.num_row_groups


def read_row_group(storage: Storage, path: str, number: int, with_text: bool = True) -> RowGroup:
    """Row group `number` of the shard at `path`; without text its bytes read as zeros (an index needs no more).

    DataError, naming the file, if it cannot be read or its columns do not agree.
    """
    with open_shard(storage, path, verify=False) as shard:
        columns = {"n_bytes", "patch_starts"} & set(shard.columns) | ({"text"} if with_text else set())
        table = shard.read(number, sorted(columns))
    return decode_row_group(table, f"row group {number} of {storage.url(path)}", with_text)


def decode_row_group(table: pa.Table, name: str, with_text: bool = True) -> RowGroup:
    """The documents of a table with the column n_bytes, text unless it reads as zeros, and, in a patch dataset,
    patch_starts; DataError, beginning with `name`, if they do not agree.
    """
    lengths = table["n_bytes"].to_numpy().astype(np.int64)
    text = _joined(table["text"], lengths, name) if with_text else np.zeros(int(lengths.sum()), np.uint8)
    if "patch_starts" not in table.column_names:
        return join_documents(text, lengths, None)
    packed = _joined(table["patch_starts"], (lengths + 8) // 8, name)
    places, opened = _starts(packed, lengths)
    if not opened.all():
        raise DataError(f"{name}: in patch_starts of a document, the first byte (or EOS) does not start a patch")
    return join_documents(text, lengths, places)


def _joined(column: pa.ChunkedArray, lengths: Integers, name: str) -> npt.NDArray[np.uint8]:
    """All bytes of a binary column, end to end; DataError unless its values have these lengths."""
    parts, sizes = [np.zeros(0, np.uint8)], [np.zeros(0, np.int64)]
    for chunk in column.chunks:
        wide = chunk.cast(pa.large_binary())
        _, offsets, data = wide.buffers()
        borders = np.frombuffer(offsets, np.int64)[wide.offset : wide.offset + len(wide) + 1]
        sizes.append(np.diff(borders))
        if data is not None and len(borders):
            parts.append(np.frombuffer(data, np.uint8)[borders[0] : borders[-1]])
    if not np.array_equal(np.concatenate(sizes), lengths):
        raise DataError(f"{name}: n_bytes does not agree with its other columns")
    parts = [part for part in parts if len(part)] or parts[:1]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _starts(packed: npt.NDArray[np.uint8], lengths: Integers) -> tuple[Integers, npt.NDArray[np.bool_]]:
    """Places of the patch starts among the n + 1 ids of every document end to end, and whether each document's first
    is one. Each document's bits fill whole bytes in `packed`.
    """
    stored = (lengths + 8) // 8 * 8
    first = np.cumsum(stored) - stored
    places = np.flatnonzero(np.unpackbits(packed, bitorder="little").view(np.bool_))  # 5 times slower on uint8
    counts = np.diff(np.searchsorted(places, np.append(first, 8 * len(packed))))
    own = places - np.repeat(first, counts)
    is_start = own <= np.repeat(lengths, counts)
    shift = np.cumsum(lengths + 1) - (lengths + 1)
    return (own + np.repeat(shift, counts))[is_start], (packed[first // 8] & 1).astype(np.bool_)
