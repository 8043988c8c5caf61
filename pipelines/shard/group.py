"""One group of corpus files in, committed shards and a receipt out: the work of one task.

Memory is bounded by `group_bytes` of text, one line, one chunk and one encoded shard, however large a file is: whenever
the held text reaches the bound it is shuffled and written, and reading goes on. What is written is a function of the
group and the settings alone, so a task that runs twice finds its own bytes and adopts them.
"""

import hashlib
import logging
from collections import Counter
from dataclasses import dataclass

import msgspec
import pyarrow as pa

from blt.errors import DataError
from pipelines.manifest import SPLITS, ShardEntry, SourceCounts, Split
from pipelines.schema import DOCUMENT_SCHEMA, encode_parquet, row_group_slices
from pipelines.shard.config import ShardConfig
from pipelines.shard.files import InputFile
from pipelines.shard.plan import Group, balanced_cuts, shuffle_key, split_position
from pipelines.shard.reader import Document, Rejected, read_file
from pipelines.storage import Storage

_LOGGER = logging.getLogger(__name__)

_ROW_OVERHEAD_BYTES = 512
"""What a held document or rejected row takes beside its text, about: so that a million tiny rows are bounded too."""


@dataclass(frozen=True, kw_only=True)
class GroupReceipt:
    """What a group became. Committed after its shards: a group with a receipt is done."""

    group: int
    input_bytes: int
    """Size of the files as they are stored."""
    shards: tuple[ShardEntry, ...]
    quarantine: tuple[str, ...]
    """Paths of its quarantine files."""
    counts: dict[str, SourceCounts]
    first_problem: str | None
    """The first rejected row, for a message: FILE:LINE: reason."""
    lowest: float
    """Least split position of its documents; 1 if it has none."""
    highest: float
    """Greatest split position of its documents; 0 if it has none."""


def receipt_path(group: int) -> str:
    return f"_commits/group-{group:05d}.json"


def write_group(group: Group, config: ShardConfig, output: str) -> GroupReceipt:
    """Read, shuffle and write one group, or find that it is done. DataError if foreign files are in the way."""
    storage = Storage(output)
    if (receipt := _finished(group.index, storage)) is not None:
        return receipt
    writer = _GroupWriter(group.index, config, storage)
    for file in group.files:
        for row in read_file(file, config):
            writer.add(file, row)
    receipt = writer.finish(group.input_bytes)
    storage.write_exclusive(receipt_path(group.index), msgspec.json.encode(receipt))
    return receipt


def _finished(group: int, storage: Storage) -> GroupReceipt | None:
    """The receipt of a group that is done; None if it is not, or if a shard was removed since."""
    path = receipt_path(group)
    try:
        receipt = msgspec.json.decode(storage.read_bytes(path), type=GroupReceipt)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise DataError(f"{storage.url(path)} is broken: {error}; remove it to have its group made again") from error
    return receipt if all(storage.exists(shard.path) for shard in receipt.shards) else None


@dataclass(slots=True)
class _Held:
    """A document that waits to be written."""

    key: bytes
    position: float
    document: Document


class _GroupWriter:
    """Takes rows one by one and writes them whenever the bound on held bytes is reached."""

    def __init__(self, group: int, config: ShardConfig, storage: Storage) -> None:
        self._group, self._config, self._storage = group, config, storage
        self._held: list[_Held] = []
        self._quarantine = bytearray()
        self._held_bytes = 0
        self._counts: Counter[str] = Counter()
        self._shards: list[ShardEntry] = []
        self._quarantine_paths: list[str] = []
        self._first_problem: str | None = None
        self._lowest, self._highest = 1.0, 0.0

    def add(self, file: InputFile, row: Document | Rejected) -> None:
        if isinstance(row, Rejected):
            self._reject(file, row)
        elif len(row.text) < self._config.min_bytes:
            self._counts["filtered"] += 1
        else:
            self._hold(file, row)
        if self._held_bytes >= self._config.group_bytes:
            self._flush()

    def finish(self, input_bytes: int) -> GroupReceipt:
        self._flush()
        rows_in = self._counts["rows_out"] + self._counts["filtered"] + self._counts["quarantined"]
        counts = SourceCounts(
            rows_in=rows_in,
            rows_out=sum(shard.documents for shard in self._shards),
            quarantined=self._counts["quarantined"],
            filtered=self._counts["filtered"],
            bytes=sum(shard.bytes for shard in self._shards),
        )
        return GroupReceipt(
            group=self._group,
            input_bytes=input_bytes,
            shards=tuple(self._shards),
            quarantine=tuple(self._quarantine_paths),
            counts={self._config.source: counts},
            first_problem=self._first_problem,
            lowest=self._lowest,
            highest=self._highest,
        )

    def _hold(self, file: InputFile, document: Document) -> None:
        position = split_position(document.text)
        self._lowest, self._highest = min(self._lowest, position), max(self._highest, position)
        self._held.append(_Held(shuffle_key(self._config.seed, file.name, document.offset), position, document))
        self._held_bytes += len(document.text) + _ROW_OVERHEAD_BYTES
        self._counts["rows_out"] += 1

    def _reject(self, file: InputFile, row: Rejected) -> None:
        record = {
            "source": self._config.source,
            "file": file.name,
            "line": row.line,
            "offset": row.offset,
            "rows": row.rows,
            "reason": row.reason,
        }
        self._quarantine += msgspec.json.encode(record) + b"\n"
        self._held_bytes += len(row.reason) + _ROW_OVERHEAD_BYTES
        self._counts["quarantined"] += row.rows
        self._first_problem = self._first_problem or f"{file.name}:{row.line}: {row.reason}"

    def _flush(self) -> None:
        """Write all that is held: each split in shuffled order, cut into balanced shards."""
        self._held.sort(key=lambda held: held.key)
        for split in SPLITS:
            documents = [
                h.document for h in self._held if (h.position < self._config.valid_fraction) == (split == "valid")
            ]
            for rows in balanced_cuts([len(d.text) for d in documents], self._config.shard_bytes):
                self._write_shard(split, documents[rows])
        if self._quarantine:
            path = f"quarantine/group-{self._group:05d}-{len(self._quarantine_paths):05d}.jsonl"
            self._commit(path, bytes(self._quarantine))
            self._quarantine_paths.append(path)
        self._held.clear()
        self._quarantine.clear()
        self._held_bytes = 0

    def _write_shard(self, split: Split, documents: list[Document]) -> None:
        number = sum(shard.split == split for shard in self._shards)
        path = f"{split}/shard-{self._group:05d}-{number:05d}.parquet"
        sizes = [len(document.text) for document in documents]
        tables = (self._table(documents[rows]) for rows in row_group_slices(sizes, self._config.row_group_bytes))
        footer = {"documents": str(len(sizes)), "bytes": str(sum(sizes))}
        data: bytes = encode_parquet(tables, DOCUMENT_SCHEMA, footer).to_pybytes()
        self._commit(path, data)
        digest = hashlib.sha256(data).hexdigest()
        self._shards.append(ShardEntry(path=path, split=split, documents=len(sizes), bytes=sum(sizes), sha256=digest))

    def _table(self, documents: list[Document]) -> pa.Table:
        columns = {
            "doc_id": [document.doc_id for document in documents],
            "source": [self._config.source] * len(documents),
            "text": [document.text for document in documents],
            "n_bytes": [len(document.text) for document in documents],
        }
        return pa.table(columns, schema=DOCUMENT_SCHEMA)

    def _commit(self, path: str, data: bytes) -> None:
        """Write exclusively; a file that is there already must hold the same bytes."""
        if self._storage.write_exclusive(path, data):
            return
        if self._storage.read_bytes(path) != data:
            raise DataError(
                f"{self._storage.url(path)} exists and holds something else: an input changed under a run that was "
                "cut off, or the directory is not the job's own; choose another output or remove the directory"
            )
        _LOGGER.info("adopted=%s", path)
