"""One group of corpus units in, committed shards and a receipt out: the work of one task.

Memory is bounded by `group_bytes` of text, one line and a few blocks, however large a file is: whenever the held text
reaches the bound it is shuffled and written, and reading goes on. What is written is a function of the group and the
settings alone, so a task that runs twice finds its own bytes and adopts them.
"""

import hashlib
from collections import Counter
from dataclasses import dataclass

import msgspec
import pyarrow as pa

from blt.errors import DataError
from pipelines.manifest import SPLITS, ShardEntry, SourceCounts, Split
from pipelines.schema import DOCUMENT_SCHEMA, row_group_slices, write_parquet
from pipelines.shard.adopt import create_or_adopt
from pipelines.shard.config import ShardConfig
from pipelines.shard.duplicates import Duplicates
from pipelines.shard.plan import Group, Unit, balanced_cuts, shuffle_key, split_position
from pipelines.shard.quarantine import QUARANTINE, RAW_QUARANTINE, RawRecord, write_raw
from pipelines.shard.reader import Document, Rejected, UnitReader
from pipelines.storage import Storage

RECEIPTS = "_commits"

_ROW_OVERHEAD_BYTES = 512
"""What a held document or rejected row takes beside its text, about: so that a million tiny rows are bounded too."""


@dataclass(frozen=True, kw_only=True)
class GroupReceipt:
    """What a group became. Committed after its shards: a group with a receipt is done."""

    group: int
    source: str
    input_bytes: int
    """Size of the units as they are stored."""
    shards: tuple[ShardEntry, ...]
    quarantine: tuple[str, ...]
    """Names of its quarantine files."""
    num_lines: tuple[int, ...]
    """Lines that begin in each unit, from which the final line numbers of split files come."""
    counts: SourceCounts
    first_problem: str | None
    """The first rejected row, for a message: where, and the reason."""
    lowest: float
    """Least split position of its documents; 1 if it has none."""
    highest: float
    """Greatest split position of its documents; 0 if it has none."""


def receipt_path(group: int) -> str:
    return f"{RECEIPTS}/group-{group:05d}.json"


def write_group(group: Group, config: ShardConfig, storage: Storage, duplicates: Duplicates) -> GroupReceipt:
    """Read, shuffle and write one group, or find that it is done. DataError if foreign files are in the way."""
    if (receipt := _finished(group.index, storage)) is not None:
        return receipt
    writer = _GroupWriter(group, config, storage)
    num_lines = []
    source = config.source_named(group.source)
    for number, unit in enumerate(group.units):
        rows = UnitReader(unit, source, config.max_line_bytes)
        for row in rows:
            writer.add(number, unit, row, duplicates)
        num_lines.append(rows.num_lines)
    duplicates.finish()
    receipt = writer.finish(tuple(num_lines))
    storage.write_exclusive(receipt_path(group.index), msgspec.json.encode(receipt))
    return receipt


def read_receipt(group: int, storage: Storage) -> GroupReceipt:
    """The receipt of a group. FileNotFoundError if there is none, DataError if it is broken."""
    path = receipt_path(group)
    try:
        return msgspec.json.decode(storage.read_bytes(path), type=GroupReceipt)
    except ValueError as error:
        raise DataError(f"{storage.url(path)} is broken: {error}; remove it to have its group made again") from error


def _finished(group: int, storage: Storage) -> GroupReceipt | None:
    """The receipt of a group that another driver has done meanwhile; None if it is not done, or a shard is gone."""
    try:
        receipt = read_receipt(group, storage)
    except FileNotFoundError:
        return None
    there = all(storage.exists(shard.path) for shard in receipt.shards) and all(
        storage.exists(f"{RAW_QUARANTINE}/{name}") or storage.exists(f"{QUARANTINE}/{name}")
        for name in receipt.quarantine
    )
    return receipt if there else None


@dataclass(slots=True)
class _Held:
    """A document that waits to be written."""

    key: bytes
    digest: bytes
    """sha256 of its text."""
    document: Document


class _GroupWriter:
    """Takes rows one by one and writes them whenever the bound on held bytes is reached."""

    def __init__(self, group: Group, config: ShardConfig, storage: Storage) -> None:
        self._group, self._config, self._storage = group, config, storage
        self._held: list[_Held] = []
        self._rejected: list[RawRecord] = []
        self._held_bytes = 0
        self._counts: Counter[str] = Counter()
        self._shards: list[ShardEntry] = []
        self._quarantine: list[str] = []
        self._first_problem: str | None = None
        self._lowest, self._highest = 1.0, 0.0

    def add(self, number: int, unit: Unit, row: Document | Rejected, duplicates: Duplicates) -> None:
        """Take a row of unit `number` of the group."""
        if isinstance(row, Rejected):
            self._reject(number, unit, row)
        elif not self._config.keeps(len(row.text)):
            self._counts["filtered"] += 1
        elif duplicates.take(unit.rank, row.offset):
            self._counts["duplicates"] += 1
        else:
            self._hold(unit, row)
        if self._held_bytes >= self._config.group_bytes:
            self._flush()

    def finish(self, num_lines: tuple[int, ...]) -> GroupReceipt:
        self._flush()
        counts = SourceCounts(
            rows_in=self._counts.total(),
            rows_out=sum(shard.documents for shard in self._shards),
            quarantined=self._counts["quarantined"],
            filtered=self._counts["filtered"],
            duplicates=self._counts["duplicates"],
            bytes=sum(shard.bytes for shard in self._shards),
        )
        return GroupReceipt(
            group=self._group.index,
            source=self._group.source,
            input_bytes=self._group.input_bytes,
            shards=tuple(self._shards),
            quarantine=tuple(self._quarantine),
            num_lines=num_lines,
            counts=counts,
            first_problem=self._first_problem,
            lowest=self._lowest,
            highest=self._highest,
        )

    def _hold(self, unit: Unit, document: Document) -> None:
        digest = hashlib.sha256(document.text).digest()
        position = split_position(digest)
        self._lowest, self._highest = min(self._lowest, position), max(self._highest, position)
        key = shuffle_key(self._config.seed, self._group.source, unit.file.name, document.offset)
        self._held.append(_Held(key, digest, document))
        self._held_bytes += len(document.text) + len(document.doc_id) + _ROW_OVERHEAD_BYTES
        self._counts["rows_out"] += 1

    def _reject(self, number: int, unit: Unit, row: Rejected) -> None:
        self._rejected.append(
            RawRecord(
                source=self._group.source,
                file=unit.file.name,
                line=row.line,
                offset=row.offset,
                rows=row.rows,
                reason=row.reason,
                unit=number,
            )
        )
        self._held_bytes += len(row.reason) + _ROW_OVERHEAD_BYTES
        self._counts["quarantined"] += row.rows
        place = f" (byte {row.offset})" if unit.start and unit.file.format == "jsonl" else f":{row.line}"
        self._first_problem = self._first_problem or f"{unit.file.name}{place}: {row.reason}"

    def _flush(self) -> None:
        """Write all that is held: each split in shuffled order, cut into balanced shards."""
        self._held.sort(key=lambda held: held.key)
        for split in SPLITS:
            rows = [
                h for h in self._held if (split_position(h.digest) < self._config.valid_fraction) == (split == "valid")
            ]
            for cut in balanced_cuts([len(h.document.text) for h in rows], self._config.shard_bytes):
                self._shards.append(self._write_shard(split, rows[cut]))
        if self._rejected:
            name = f"group-{self._group.index:05d}-{len(self._quarantine):05d}.jsonl"
            write_raw(name, self._rejected, self._storage)
            self._quarantine.append(name)
        self._held.clear()
        self._rejected.clear()
        self._held_bytes = 0

    def _write_shard(self, split: Split, rows: list[_Held]) -> ShardEntry:
        number = sum(shard.split == split for shard in self._shards)
        path = f"{split}/shard-{self._group.index:05d}-{number:05d}.parquet"
        sizes = [len(held.document.text) for held in rows]
        tables = (self._table(rows[cut]) for cut in row_group_slices(sizes, self._config.row_group_bytes))
        footer = {
            "source": self._group.source,
            "split": split,
            "documents": str(len(sizes)),
            "bytes": str(sum(sizes)),
            "content_sha256": hashlib.sha256(b"".join(held.digest for held in rows)).hexdigest(),
        }
        with create_or_adopt(path, self._storage) as new:
            write_parquet(new, tables, DOCUMENT_SCHEMA, footer)
        return ShardEntry(
            path=path,
            split=split,
            source=self._group.source,
            documents=len(sizes),
            bytes=sum(sizes),
            sha256=new.sha256,
        )

    def _table(self, rows: list[_Held]) -> pa.Table:
        columns = {
            "doc_id": [held.document.doc_id for held in rows],
            "source": [self._group.source] * len(rows),
            "text": [held.document.text for held in rows],
            "n_bytes": [len(held.document.text) for held in rows],
        }
        return pa.table(columns, schema=DOCUMENT_SCHEMA)
