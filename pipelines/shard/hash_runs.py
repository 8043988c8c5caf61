"""First pass of deduplication: the content hashes of a group, in sorted runs of fixed-width records.

A run is one file: an index of NUM_BUCKETS + 1 positions (uint64) by the top bits of the hash; RECORD of every distinct
document of the run, by hash; LOSER of each that equals an earlier document of the same run, by (rank, offset). So equal
documents meet in the second pass at most once per run, however often one occurs.
"""

import hashlib
import struct
from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt

from pipelines.shard.adopt import create_or_adopt
from pipelines.shard.config import ShardConfig
from pipelines.shard.plan import Group
from pipelines.shard.reader import Document, UnitReader
from pipelines.storage import Storage

SCRATCH = "_dedup"
"""Directory of everything that deduplication writes; removed once the dataset is finished."""

RECORD = np.dtype([("high", "<u8"), ("low", "<u8"), ("rank", "<u4"), ("offset", "<u8")])
"""A document: the first 128 bits of its sha256, the rank of its file and its offset there."""
LOSER = np.dtype([("rank", "<u4"), ("offset", "<u8")])
"""A document that goes, because an equal one stays."""
POSITION = np.dtype("<u8")
RECORD_BYTES: int = RECORD.itemsize
LOSER_BYTES: int = LOSER.itemsize
POSITION_BYTES: int = POSITION.itemsize

BUCKET_BITS = 12
NUM_BUCKETS = 1 << BUCKET_BITS
INDEX_BYTES = (NUM_BUCKETS + 1) * POSITION_BYTES

RUN_RECORDS = 2**21
"""Documents sorted at a time: 56 MiB of records, and about four times that while they are sorted."""

_PACK = struct.Struct("<QQIQ").pack

Records = npt.NDArray[np.void]


@dataclass(frozen=True, kw_only=True)
class Run:
    """A file of hashes."""

    path: str
    records: int
    losers: int

    @property
    def losers_start(self) -> int:
        """Byte offset of the losers in the file."""
        return INDEX_BYTES + self.records * RECORD_BYTES


@dataclass(frozen=True, kw_only=True)
class GroupRuns:
    """All runs of a group. Committed after its files: a group with this record is hashed."""

    group: int
    input_bytes: int
    runs: tuple[Run, ...]


def runs_path(group: int) -> str:
    return f"{SCRATCH}/runs/group-{group:05d}.json"


def read_runs(group: int, storage: Storage) -> GroupRuns:
    """FileNotFoundError if the group is not hashed."""
    return msgspec.json.decode(storage.read_bytes(runs_path(group)), type=GroupRuns)


def write_runs(group: Group, config: ShardConfig, storage: Storage) -> GroupRuns:
    """Read a group and write the hashes of its documents that pass the filters."""
    source = config.source_named(group.source)
    held, runs = bytearray(), list[Run]()
    for unit in group.units:
        for row in UnitReader(unit, source, config.max_line_bytes):
            if not isinstance(row, Document) or not config.keeps(len(row.text)):
                continue
            high, low = struct.unpack_from(">QQ", hashlib.sha256(row.text).digest())
            held += _PACK(high, low, unit.rank, row.offset)
            if len(held) == RUN_RECORDS * RECORD_BYTES:
                runs.append(_write_run(group.index, len(runs), held, storage))
                held = bytearray()
    if held:
        runs.append(_write_run(group.index, len(runs), held, storage))
    result = GroupRuns(group=group.index, input_bytes=group.input_bytes, runs=tuple(runs))
    storage.write_exclusive(runs_path(group.index), msgspec.json.encode(result))
    return result


def order_by_hash(records: Records) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.bool_]]:
    """The order of `records` by (hash, rank, offset), and which in that order repeat the hash before them."""
    order: npt.NDArray[np.intp] = np.lexsort((records["offset"], records["rank"], records["low"], records["high"]))
    high, low = records["high"][order], records["low"][order]
    repeats = np.zeros(len(order), dtype=np.bool_)
    repeats[1:] = (high[1:] == high[:-1]) & (low[1:] == low[:-1])
    return order, repeats


def _write_run(group: int, number: int, held: bytearray, storage: Storage) -> Run:
    records = np.frombuffer(held, dtype=RECORD)
    order, repeats = order_by_hash(records)
    distinct, losers = records[order[~repeats]], records[np.sort(order[repeats])][["rank", "offset"]].astype(LOSER)
    buckets = distinct["high"] >> np.uint64(64 - BUCKET_BITS)
    index = np.searchsorted(buckets, np.arange(NUM_BUCKETS + 1, dtype=np.uint64)).astype(POSITION)
    path = f"{SCRATCH}/runs/group-{group:05d}-{number:05d}.bin"
    with create_or_adopt(path, storage) as new:
        for part in (index, distinct, losers):
            new.write(part.view(np.uint8))
    return Run(path=path, records=len(distinct), losers=len(losers))
