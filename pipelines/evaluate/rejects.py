"""Rows of a corpus that become no documents of an evaluation: counted, and listed with their place and reason.

An actor knows the lines of its part of a file only, so it writes raw records below OUTPUT/_rejected; once all lines are
counted the driver gives them their final numbers, all in OUTPUT/quarantine.jsonl, and removes the raw ones.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from pipelines.shard.plan import Group, Unit
from pipelines.shard.quarantine import RawRecord, final_record, lines_before
from pipelines.shard.reader import Rejected
from pipelines.storage import Storage

QUARANTINE_PATH = "quarantine.jsonl"
RAW = "_rejected"

_HELD_RECORDS = 10_000
"""Most records that an actor holds in memory."""


@dataclass(frozen=True, kw_only=True)
class UnitRows:
    """What became of the rows of a unit."""

    quarantined: int
    filtered: int
    num_lines: tuple[int, ...]
    """Lines that begin in each of the unit's parts."""
    files: tuple[str, ...]
    """Raw records, in order."""
    first_problem: str | None
    """The first rejected row, for a message."""


class Rejects:
    """The rows of one unit that are no documents."""

    def __init__(self, group: Group, storage: Storage) -> None:
        self._group, self._storage = group, storage
        self._held: list[RawRecord] = []
        self._files: list[str] = []
        self._num_lines = [0] * len(group.units)
        self._quarantined = self._filtered = 0
        self._first_problem: str | None = None

    def filter_out(self) -> None:
        """Count a document that is too short or too long."""
        self._filtered += 1

    def reject(self, number: int, unit: Unit, row: Rejected) -> None:
        """Record a row of part `number` of the unit's files."""
        source, name = self._group.source, unit.file.name
        self._held.append(
            RawRecord(
                source=source,
                file=name,
                line=row.line,
                offset=row.offset,
                rows=row.rows,
                reason=row.reason,
                unit=number,
            )
        )
        self._quarantined += row.rows
        self._first_problem = self._first_problem or f"{name} (offset {row.offset}): {row.reason}"
        if len(self._held) >= _HELD_RECORDS:
            self._flush()

    def count_lines(self, number: int, num_lines: int) -> None:
        """Say how many lines begin in part `number`."""
        self._num_lines[number] = num_lines

    def finish(self) -> UnitRows:
        """Write what is held and tell all."""
        if self._held:
            self._flush()
        return UnitRows(
            quarantined=self._quarantined,
            filtered=self._filtered,
            num_lines=tuple(self._num_lines),
            files=tuple(self._files),
            first_problem=self._first_problem,
        )

    def _flush(self) -> None:
        """Create the next raw file; one that is there is the same, of an attempt whose actor died."""
        path = f"{RAW}/{self._group.index:05d}-{len(self._files):05d}.jsonl"
        encoder = msgspec.json.Encoder()
        with self._storage.create(path) as new:
            for record in self._held:
                new.write(encoder.encode(record) + b"\n")
        self._files.append(path)
        self._held.clear()


def remove_rejects(storage: Storage) -> None:
    """Remove what an earlier run, which did not finish, has told."""
    for path in (QUARANTINE_PATH, *storage.sizes(RAW)):
        storage.delete(path)


def write_quarantine(groups: Sequence[Group], rows: Sequence[UnitRows], storage: Storage) -> None:
    """quarantine.jsonl from the raw records of all units, in order, with lines counted from the start of each file.
    There is none where nothing was rejected.
    """
    paths = [(group.index, path) for group, unit in zip(groups, rows, strict=True) for path in unit.files]
    if not paths:
        return
    before = lines_before(groups, {group.index: unit.num_lines for group, unit in zip(groups, rows, strict=True)})
    encoder, decoder = msgspec.json.Encoder(), msgspec.json.Decoder(RawRecord)
    with storage.create(QUARANTINE_PATH) as new:
        for group, path in paths:
            with storage.open(path) as raw:
                for line in raw:
                    record = decoder.decode(line)
                    new.write(encoder.encode(final_record(record, before[group][record.unit])) + b"\n")
    for _, path in paths:
        storage.delete(path)
    if storage.is_local:
        shutil.rmtree(storage.url(RAW), ignore_errors=True)  # the directory, which objects on S3 do not have
