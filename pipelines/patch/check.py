"""The check of one finished data file: hash, counts, the bits of every row, its documents, and some patches made again.

In: an entry of the manifest and the rows to make again. Out: one line for each thing that is wrong, none for a file
that is as it was made. Memory is bounded by the row group.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from blt.entropy_model import EntropyModel
from blt.errors import DataError
from pipelines.manifest import ShardEntry
from pipelines.patch.boundaries import batches, patch_documents
from pipelines.patch.data_file import footer
from pipelines.patch.plan import PatchPlan, differences, unit_of
from pipelines.patch.rows import ContentHash, RowStream, read_row_groups
from pipelines.schema import DOCUMENT_SCHEMA, ENTROPY_FIELD, pack_starts, patch_schema, unpack_starts
from pipelines.shard_file import open_shard
from pipelines.storage import Storage

MOST_PROBLEMS = 20
"""Of one file that are told; the rest is counted."""


@dataclass(frozen=True, kw_only=True)
class CheckUnit:
    """One data file to check."""

    shard: ShardEntry
    recompute_rows: tuple[int, ...]
    """Rows whose patches (and stored entropies) are made again."""


@dataclass(frozen=True, kw_only=True)
class ShardReport:
    """What the check of one file found."""

    documents: int
    bytes: int
    patches: int
    recomputed_documents: int
    problems: tuple[str, ...]
    """At most MOST_PROBLEMS, each naming the file."""
    num_problems: int


class ShardCheck:
    """Checks one file; `plan` is the dataset's own, `model` may be None where no row is to be made again with it."""

    def __init__(self, documents: Storage, output: Storage, plan: PatchPlan, model: EntropyModel | None) -> None:
        self._documents, self._output = documents, output
        self._plan, self._model = plan, model
        self._row = self._bytes = self._patches = self._recomputed = 0
        self._content = ContentHash()

    def run(self, unit: CheckUnit) -> ShardReport:
        """What is wrong with the file, a broken or missing one included."""
        told: list[str] = []
        num_problems = 0
        for problem in self._guarded(unit):
            num_problems += 1
            if len(told) < MOST_PROBLEMS:
                told.append(f"{self._output.url(unit.shard.path)}: {problem}")
        return ShardReport(
            documents=self._row,
            bytes=self._bytes,
            patches=self._patches,
            recomputed_documents=self._recomputed,
            problems=tuple(told),
            num_problems=num_problems,
        )

    def _guarded(self, unit: CheckUnit) -> Iterator[str]:
        try:
            yield from self._problems(unit)
        except DataError as error:
            yield str(error)
        except FileNotFoundError:
            yield "is in the manifest but does not exist"

    def _problems(self, unit: CheckUnit) -> Iterator[str]:
        shard = unit.shard
        found = self._output.sha256(shard.path)
        if found != shard.sha256:
            yield f"has sha256 {found[:12]}..., the manifest says {shard.sha256[:12]}..."
        with open_shard(self._output, shard.path, patch_schema(self._plan.store_entropies)) as file:
            documents = RowStream(read_row_groups(self._documents, shard.path, self._plan.row_group_bytes))
            for table in file.tables():
                yield from self._row_group(table, documents.take(table.num_rows), unit)
            metadata = file.footer
        counted = {"documents": self._row, "bytes": self._bytes, "patches": self._patches}
        for name, count in counted.items():
            if count != getattr(shard, name):
                yield f"holds {count} {name}, the manifest says {getattr(shard, name)}"
        wanted = footer(self._plan, unit_of(shard), self._patches, self._content.hexdigest)
        for phrase in differences({name: metadata.get(name) for name in wanted}, wanted):
            yield f"footer: {phrase}"

    def _row_group(self, table: pa.Table, documents: pa.Table | None, unit: CheckUnit) -> Iterator[str]:
        """Check the rows of one row group, the documents of the same rows beside them."""
        first = self._row
        self._row += table.num_rows
        self._bytes += sum(table["n_bytes"].to_pylist())
        self._patches += sum(table["n_patches"].to_pylist())
        self._content.update(table)
        names = DOCUMENT_SCHEMA.names
        if documents is None or not table.select(names).equals(documents.select(names)):
            yield f"rows {first} to {self._row - 1} are not those of {self._documents.url(unit.shard.path)}"
            return
        for row in range(table.num_rows):
            for problem in self._row_problems(table, row):
                yield f"row {first + row}: {problem}"
        for row in unit.recompute_rows:
            if first <= row < self._row:
                yield from self._recompute(table, row - first, row)

    def _row_problems(self, table: pa.Table, row: int) -> Iterator[str]:
        """What the stored bits of a row contradict."""
        n_bytes, packed = table["n_bytes"][row].as_py(), table["patch_starts"][row].as_py()
        try:
            starts = unpack_starts(packed, n_bytes)
        except DataError as error:
            yield str(error)
            return
        if not starts[0]:
            yield "patch_starts: bit 0 is not set"
        if pack_starts(starts) != packed:
            yield "patch_starts: bits after the last are set"
        if (num_patches := int(starts[:-1].sum())) != table["n_patches"][row].as_py():
            yield f"n_patches is {table['n_patches'][row].as_py()}, patch_starts holds {num_patches}"
        longest = int(np.diff(np.flatnonzero(starts), append=len(starts)).max(initial=0))
        if longest > (limit := self._plan.patching.rule.max_patch_length or longest):
            yield f"a patch has {longest} bytes, max_patch_length is {limit}"
        if self._plan.store_entropies and len(table[ENTROPY_FIELD.name][row].as_buffer()) != n_bytes + 1:
            yield f"entropies has {len(table[ENTROPY_FIELD.name][row].as_buffer())} values for {n_bytes} bytes"

    def _recompute(self, table: pa.Table, row: int, shown_row: int) -> Iterator[str]:
        """Make one document's patches again: alone, and where that differs together with the documents that it went
        through the model with, because these may change the last digits of its entropies.
        """
        self._recomputed += 1
        batch = next(rows for rows in batches(table["n_bytes"].to_pylist()) if rows.start <= row < rows.stop)
        bare = table.select(DOCUMENT_SCHEMA.names)
        for rows in (slice(row, row + 1), batch):
            made = list(patch_documents(bare.slice(rows.start, rows.stop - rows.start), self._model, self._plan))
            starts, entropies = made[row - rows.start]
            same_starts = pack_starts(starts) == table["patch_starts"][row].as_py()
            if same_starts and (not self._plan.store_entropies or entropies == table[ENTROPY_FIELD.name][row].as_py()):
                return
        yield f"row {shown_row}: {'patch_starts' if not same_starts else 'entropies'} differ from what the model gives"
