"""A seeded sample of whole training documents, spread over shards, of a dataset that is never loaded.

In: the shards of a manifest. Out: which rows to read, as a pure function of manifest and seed; and their texts, read
from the row groups that hold them. Only the n_bytes column of the shards looked at is read to choose.
"""

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from blt.errors import DataError
from pipelines.manifest import ShardEntry
from pipelines.patch.shard_file import open_shard, read_row_group
from pipelines.storage import Storage

_MIN_SHARDS = 32
"""Shards to choose from, at least (or all)."""
_CANDIDATE_FACTOR = 16
"""Bytes to choose from, in samples, at least (or all)."""
_READERS = 16


@dataclass(frozen=True, kw_only=True)
class SampleUnit:
    """Documents of one shard that one actor call reads."""

    path: str
    rows: tuple[int, ...]
    """Ascending row numbers within the shard."""
    bytes: int


def choose_sample(storage: Storage, shards: Sequence[ShardEntry], sample_bytes: int, seed: int) -> list[SampleUnit]:
    """Documents of about `sample_bytes` in all (the last may go over); DataError if the shards hold no text.

    Empty documents are left out, and documents longer than the sample as long as there are others.
    """
    chosen = candidate_shards(shards, sample_bytes, seed)
    with ThreadPoolExecutor(_READERS) as pool:
        sizes = list(pool.map(lambda shard: _read_sizes(storage, shard.path), chosen))
    rows = choose_rows([shard.path for shard in chosen], sizes, sample_bytes, seed)
    if not rows:
        raise DataError(f"{storage.root_uri} has no training text to sample")
    unit_bytes = max(sample_bytes // 16, 1)
    return [
        unit
        for index, shard in enumerate(chosen)
        for unit in _units(shard.path, sorted(rows.get(index, ())), sizes[index], unit_bytes)
    ]


def candidate_shards(shards: Sequence[ShardEntry], sample_bytes: int, seed: int) -> list[ShardEntry]:
    """Shards in seeded order, until there are enough of them and enough bytes."""
    chosen: list[ShardEntry] = []
    held = 0
    for shard in sorted(shards, key=lambda shard: _hash(seed, shard.path)):
        if len(chosen) >= _MIN_SHARDS and held >= _CANDIDATE_FACTOR * sample_bytes:
            break
        chosen.append(shard)
        held += shard.bytes
    return chosen


def choose_rows(
    paths: Sequence[str], sizes: Sequence[npt.NDArray[np.int64]], sample_bytes: int, seed: int
) -> dict[int, list[int]]:
    """Row numbers by index of the shard: rows in an order drawn from (seed, path, row), up to `sample_bytes`."""
    keys = [np.random.PCG64(_hash(seed, path)).random_raw(len(size)) for path, size in zip(paths, sizes, strict=True)]
    shard_of = np.repeat(np.arange(len(paths)), [len(size) for size in sizes])
    row_of = np.concatenate([np.arange(len(size)) for size in sizes]) if sizes else np.empty(0, np.int64)
    size_of = np.concatenate(sizes) if sizes else np.empty(0, np.int64)
    order = np.argsort(np.concatenate(keys), kind="stable") if keys else np.empty(0, np.int64)
    order = order[size_of[order] > 0]
    fitting = order[size_of[order] <= sample_bytes]
    if not len(fitting) and len(order):
        fitting = order[[int(np.argmin(size_of[order]))]]
    before = np.cumsum(size_of[fitting]) - size_of[fitting]
    rows: dict[int, list[int]] = {}
    for index in fitting[before < sample_bytes]:
        rows.setdefault(int(shard_of[index]), []).append(int(row_of[index]))
    return rows


def read_sample(storage: Storage, unit: SampleUnit) -> Iterator[bytes]:
    """Texts of the unit's rows, in order; row groups without one of them are not read."""
    with storage.open(unit.path) as file:
        parquet = open_shard(storage, unit.path, file)
        first = 0
        for group in range(parquet.num_row_groups):
            after = first + parquet.metadata.row_group(group).num_rows
            wanted = [row - first for row in unit.rows if first <= row < after]
            if wanted:
                table = read_row_group(storage, unit.path, parquet, group, ["text"])
                yield from table["text"].take(wanted).to_pylist()
            first = after


def _read_sizes(storage: Storage, path: str) -> npt.NDArray[np.int64]:
    try:
        with storage.open(path) as file:
            parquet = open_shard(storage, path, file)
            tables = [read_row_group(storage, path, parquet, i, ["n_bytes"]) for i in range(parquet.num_row_groups)]
    except FileNotFoundError as error:
        raise DataError(f"shard {storage.url(path)} is in the manifest but does not exist") from error
    return np.concatenate([np.empty(0, np.int64), *(table["n_bytes"].to_numpy() for table in tables)])


def _units(path: str, rows: Sequence[int], sizes: npt.NDArray[np.int64], unit_bytes: int) -> Iterator[SampleUnit]:
    """Rows of one shard in units of about `unit_bytes`, so that several actors share a shard."""
    held: list[int] = []
    for row in rows:
        held.append(row)
        if sizes[held].sum() >= unit_bytes:
            yield SampleUnit(path=path, rows=tuple(held), bytes=int(sizes[held].sum()))
            held = []
    if held:
        yield SampleUnit(path=path, rows=tuple(held), bytes=int(sizes[held].sum()))


def _hash(seed: int, path: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{path}".encode()).digest()[:8], "little")
