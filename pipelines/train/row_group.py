"""A row group of a shard, read and decoded: Parquet in, `RowGroup` out. Vectorised over all its documents.

Works on document shards (every byte a patch) and on patch shards (starts from the bitmap).
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from blt.errors import DataError
from pipelines.schema import pack_starts
from pipelines.shard_file import open_shard
from pipelines.storage import Storage
from pipelines.train.packing import Integers, RowGroup


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
    sizes = (lengths + 8) // 8
    bits, bit_borders = None, _borders(sizes)
    if "patch_starts" in table.column_names:
        bits = _joined(table["patch_starts"], sizes, name)
        if not (bits[bit_borders[:-1]] & 1).all():
            raise DataError(f"{name}: in patch_starts of a document, the first byte (or EOS) does not start a patch")
    return RowGroup(text=text, borders=_borders(lengths + 2).tolist(), bits=bits, bit_borders=bit_borders.tolist())


def joined_documents(texts: Sequence[bytes], starts: Sequence[npt.NDArray[np.bool_]]) -> RowGroup:
    """The row group of documents that are in memory, with the n + 1 patch starts of each."""
    columns = {
        "n_bytes": pa.array([len(text) for text in texts], pa.int64()),
        "text": pa.array(texts, pa.large_binary()),
        "patch_starts": pa.array([pack_starts(one) for one in starts], pa.binary()),
    }
    return decode_row_group(pa.table(columns), "documents")


def _borders(sizes: Integers) -> Integers:
    """Where things of these sizes begin that lie end to end, and where the last one ends."""
    return np.concatenate(([0], np.cumsum(sizes)))


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
