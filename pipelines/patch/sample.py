"""A seeded sample of whole training documents, spread over sources and shards, of a dataset that is never loaded.

In: the shards of a manifest. Out: which rows to read, as a pure function of manifest and seed; and their texts, read
from the row groups that hold them. Only the n_bytes column of the shards looked at is read to choose.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from blt.errors import DataError
from pipelines.manifest import ShardEntry
from pipelines.schema import DOCUMENT_SCHEMA
from pipelines.shard_file import open_shard
from pipelines.storage import Storage

_MIN_SHARDS = 32
"""Shards to choose from, at least (or all), of a source that makes up the whole sample."""
_CANDIDATE_FACTOR = 16
"""Bytes to choose from, in samples, at least (or all)."""
_READERS = 16


@dataclass(frozen=True, kw_only=True)
class SampleUnit:
    """Documents of one shard that one actor call reads."""

    path: str
    source: str
    rows: tuple[int, ...]
    """Ascending row numbers within the shard."""
    bytes: int


@dataclass(frozen=True, kw_only=True)
class SourceShare:
    """What one source adds to the sample."""

    shards: tuple[ShardEntry, ...]
    """To choose from."""
    wanted_bytes: int
    longest_bytes: int
    """Longer documents are left out as long as there are others."""


def choose_sample(storage: Storage, shards: Sequence[ShardEntry], sample_bytes: int, seed: int) -> list[SampleUnit]:
    """Documents of about `sample_bytes` in all, of each source its share of the bytes, and at least one document.

    The last document of a source may go over its share. Empty documents are left out, and documents longer than the
    share (or than the sample divided by the number of sources) as long as the source has others. DataError if the
    shards hold no text.
    """
    units: list[SampleUnit] = []
    unit_bytes = max(sample_bytes // 16, 1)
    shares = share_sample(shards, sample_bytes, seed)
    with ThreadPoolExecutor(_READERS) as pool:
        sizes = pool.map(lambda shard: _read_sizes(storage, shard.path), [s for share in shares for s in share.shards])
        for share in shares:
            sizes_of = {shard.path: size for shard, size in zip(share.shards, sizes, strict=False)}
            rows = choose_rows(sizes_of, share.wanted_bytes, share.longest_bytes, seed)
            for shard in share.shards:
                units += _units(shard, sorted(rows.get(shard.path, ())), sizes_of[shard.path], unit_bytes)
    if not units:
        raise DataError(f"{storage.root_uri} has no training text to sample")
    return units


def share_sample(shards: Sequence[ShardEntry], sample_bytes: int, seed: int) -> list[SourceShare]:
    """Shares of the sources that have text, in proportion to their bytes, by name."""
    by_source: dict[str, list[ShardEntry]] = {}
    for shard in shards:
        if shard.bytes:
            by_source.setdefault(shard.source, []).append(shard)
    total_bytes = sum(shard.bytes for shard in shards)
    shares = []
    for _, held in sorted(by_source.items()):
        wanted_bytes = max(sample_bytes * sum(shard.bytes for shard in held) // total_bytes, 1)
        min_shards = math.ceil(_MIN_SHARDS * wanted_bytes / sample_bytes)
        shares.append(
            SourceShare(
                shards=tuple(candidate_shards(held, wanted_bytes, min_shards, seed)),
                wanted_bytes=wanted_bytes,
                longest_bytes=max(wanted_bytes, sample_bytes // len(by_source)),
            )
        )
    return shares


def candidate_shards(shards: Sequence[ShardEntry], wanted_bytes: int, min_shards: int, seed: int) -> list[ShardEntry]:
    """Shards in seeded order, until there are enough of them and enough bytes."""
    chosen: list[ShardEntry] = []
    held = 0
    for shard in sorted(shards, key=lambda shard: _hash(seed, shard.path)):
        if len(chosen) >= min_shards and held >= _CANDIDATE_FACTOR * wanted_bytes:
            break
        chosen.append(shard)
        held += shard.bytes
    return chosen


def choose_rows(
    sizes: Mapping[str, npt.NDArray[np.int64]], wanted_bytes: int, longest_bytes: int, seed: int
) -> dict[str, list[int]]:
    """Row numbers by path of the shard: rows in an order drawn from (seed, path, row), up to `wanted_bytes`.

    `sizes` are the bytes of the documents of each shard. Without a document of 1 to `longest_bytes` it is the shortest.
    """
    paths = list(sizes)
    keys = np.concatenate([np.random.PCG64(_hash(seed, path)).random_raw(len(size)) for path, size in sizes.items()])
    shard_of = np.repeat(np.arange(len(paths)), [len(size) for size in sizes.values()])
    row_of = np.concatenate([np.arange(len(size)) for size in sizes.values()])
    size_of = np.concatenate(list(sizes.values()))
    order = np.argsort(keys, kind="stable")
    order = order[size_of[order] > 0]
    fitting = order[size_of[order] <= longest_bytes]
    if not len(fitting) and len(order):
        fitting = order[[int(np.argmin(size_of[order]))]]
    before = np.cumsum(size_of[fitting]) - size_of[fitting]
    rows: dict[str, list[int]] = {}
    for index in fitting[before < wanted_bytes]:
        rows.setdefault(paths[shard_of[index]], []).append(int(row_of[index]))
    return rows


def read_sample(storage: Storage, unit: SampleUnit) -> Iterator[bytes]:
    """Texts of the unit's rows, in order; row groups without one of them are not read."""
    with open_shard(storage, unit.path, DOCUMENT_SCHEMA) as shard:
        first = 0
        for group in range(shard.num_row_groups):
            after = first + shard.num_rows(group)
            wanted = [row - first for row in unit.rows if first <= row < after]
            if wanted:
                yield from shard.read(group, ["text"])["text"].take(wanted).to_pylist()
            first = after


def _read_sizes(storage: Storage, path: str) -> npt.NDArray[np.int64]:
    with open_shard(storage, path, DOCUMENT_SCHEMA) as shard:
        return np.concatenate([np.empty(0, np.int64), *(t["n_bytes"].to_numpy() for t in shard.tables(["n_bytes"]))])


def _units(
    shard: ShardEntry, rows: Sequence[int], sizes: npt.NDArray[np.int64], unit_bytes: int
) -> Iterator[SampleUnit]:
    """Rows of one shard in units of about `unit_bytes`, so that several actors share a shard."""
    held: list[int] = []
    for row in rows:
        held.append(row)
        if sizes[held].sum() >= unit_bytes or row == rows[-1]:
            yield SampleUnit(path=shard.path, source=shard.source, rows=tuple(held), bytes=int(sizes[held].sum()))
            held = []


def _hash(seed: int, path: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{path}".encode()).digest()[:8], "little")
