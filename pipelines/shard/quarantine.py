"""The rows that became no documents: what was read where and why, in files of JSON lines under quarantine/.

A task knows the line numbers of its part of a split file only. So it writes raw records, and once every part has been
read and its lines counted, the records get their final lines and move to quarantine/.
"""

from collections.abc import Iterable, Mapping, Sequence

import msgspec

from pipelines.shard.adopt import create_or_adopt
from pipelines.shard.plan import Group
from pipelines.storage import Storage

QUARANTINE = "quarantine"
RAW_QUARANTINE = "_quarantine"


class Record(msgspec.Struct, kw_only=True):
    """One row, or a run of rows, that yields no document."""

    source: str
    file: str
    line: int
    """From 1; the row's number in a Parquet file."""
    offset: int
    """Of the line in the uncompressed file; the row's index in a Parquet file."""
    rows: int
    reason: str


class RawRecord(Record, kw_only=True):
    """A record whose line counts from the start of its unit."""

    unit: int
    """Position of the unit in its group."""


def write_raw(name: str, records: Iterable[RawRecord], storage: Storage) -> None:
    """Create a raw quarantine file, or adopt the same one."""
    encoder = msgspec.json.Encoder()
    with create_or_adopt(f"{RAW_QUARANTINE}/{name}", storage) as new:
        for record in records:
            new.write(encoder.encode(record) + b"\n")


def finish_quarantine(name: str, lines_before: Sequence[int], storage: Storage) -> None:
    """Create quarantine/`name` from its raw file, a record at a time; `lines_before` of each unit of its group."""
    encoder, decoder = msgspec.json.Encoder(), msgspec.json.Decoder(RawRecord)
    path = f"{QUARANTINE}/{name}"
    with storage.open(f"{RAW_QUARANTINE}/{name}") as raw, create_or_adopt(path, storage) as new:
        for line in raw:
            record = decoder.decode(line)
            new.write(encoder.encode(final_record(record, lines_before[record.unit])) + b"\n")


def final_record(record: RawRecord, lines_before: int) -> Record:
    """The record with its line counted from the start of its file; `lines_before` of its unit."""
    return Record(
        source=record.source,
        file=record.file,
        line=lines_before + record.line,
        offset=record.offset,
        rows=record.rows,
        reason=record.reason,
    )


def lines_before(groups: Iterable[Group], num_lines: Mapping[int, Sequence[int]]) -> dict[int, list[int]]:
    """Group index -> for each of its units, the lines of its file before it; `num_lines` of each unit by group."""
    places = sorted(
        (unit.rank, unit.start, group.index, number) for group in groups for number, unit in enumerate(group.units)
    )
    before = {index: [0] * len(counted) for index, counted in num_lines.items()}
    current, total = -1, 0
    for rank, _, group, number in places:
        if rank != current:
            current, total = rank, 0
        before[group][number] = total
        total += num_lines[group][number]
    return before
