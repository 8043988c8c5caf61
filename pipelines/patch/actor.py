"""The patch actor: a document shard in, the same documents with patch starts committed to storage, a record out.

It loads the model once and streams each shard: one thread reads row groups, the actor's own computes entropies and
applies the rule, a third encodes and uploads. Only the record of the commit leaves the actor.
"""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import msgspec
import pyarrow as pa

from blt.entropy_model import EntropyModel
from blt.errors import DataError
from pipelines.log_line import add_fields
from pipelines.patch.boundaries import patch_rows
from pipelines.patch.commit import Commit, record
from pipelines.patch.data_file import DataFile, create_data_file, find_data_file
from pipelines.patch.metrics import PatchMetrics
from pipelines.patch.model import load_model
from pipelines.patch.plan import PatchPlan, PatchUnit
from pipelines.patch.reuse import with_stored_entropies
from pipelines.patch.rows import read_row_groups
from pipelines.patch.stages import StageSeconds, run_stages
from pipelines.storage import Storage

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PatchSources:
    """Where an actor reads and writes: roots of datasets and the model's directory, all as any machine sees them."""

    documents: str
    output: str
    entropy_model: str | None
    reuse_entropies: str | None


class PatchActor:
    """Patches one shard per unit; see the module's first lines.

    `plan` comes without its units (a batch brings its own). A missing or broken shard, or one whose counts are not the
    manifest's, is a DataError; another model than the plan's a CheckpointError.
    """

    def __init__(self, *, plan: PatchPlan, sources: PatchSources, cpus_per_actor: int) -> None:
        add_fields(process="patch actor")
        self._plan = plan
        self._documents, self._output = Storage(sources.documents), Storage(sources.output)
        self._entropies = Storage(sources.reuse_entropies) if sources.reuse_entropies is not None else None
        self._entropy_model = sources.entropy_model
        self._cpus = cpus_per_actor
        self._model: EntropyModel | None = None
        self._metrics = PatchMetrics()

    def __call__(self, batch: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
        """A batch of units and of commits, one JSON text each."""
        units = [msgspec.json.decode(text, type=PatchUnit) for text in batch["unit"]]
        return {"commit": [msgspec.json.encode(self.patch(unit)).decode() for unit in units]}

    def patch(self, unit: PatchUnit) -> Commit:
        """Patch and commit one shard, or adopt the file that a worker killed before its commit left."""
        self._load()
        began = time.perf_counter()
        data_file = find_data_file(self._output, self._plan, unit)
        if data_file is None:
            data_file, seconds = self._create(unit)
        else:
            logger.info("adopted shard=%s path=%s: its record was missing", unit.id, unit.path)
            checking_seconds = time.perf_counter() - began
            seconds = StageSeconds(reading=checking_seconds, total=checking_seconds)
        commit = Commit(
            id=unit.id,
            path=unit.path,
            source=unit.source,
            documents=unit.documents,
            bytes=unit.bytes,
            patches=data_file.patches,
            size_bytes=data_file.size_bytes,
            sha256=data_file.sha256,
            plan=self._plan.hash,
            seconds=seconds,
        )
        record(self._output, commit)
        self._metrics.observe(commit)
        return commit

    def _create(self, unit: PatchUnit) -> tuple[DataFile, StageSeconds]:
        """Stream the shard into its data file, or take the one that a second worker made meanwhile."""
        created, seconds = run_stages(
            self._row_groups(unit),
            lambda table: patch_rows(table, self._model, self._plan),
            lambda tables: create_data_file(self._output, self._plan, unit, tables),
        )
        data_file = created or find_data_file(self._output, self._plan, unit)
        if data_file is None:
            raise DataError(f"{self._output.url(unit.path)} vanished while it was committed")
        return data_file, seconds

    def _row_groups(self, unit: PatchUnit) -> Iterator[pa.Table]:
        """Row groups of the document shard, with reused entropies if any; DataError after the last if documents or
        bytes are not the manifest's.
        """
        tables = read_row_groups(self._documents, unit.path, self._plan.row_group_bytes)
        if self._entropies is not None:
            tables = with_stored_entropies(tables, self._entropies, unit.path)
        documents = num_bytes = 0
        for table in tables:
            documents += table.num_rows
            num_bytes += sum(table["n_bytes"].to_pylist())
            yield table
        if (documents, num_bytes) != (unit.documents, unit.bytes):
            raise DataError(
                f"shard {self._documents.url(unit.path)} holds {documents} documents and {num_bytes} bytes; "
                f"the manifest says {unit.documents} and {unit.bytes}"
            )

    def _load(self) -> None:
        """Load the model with the first shard: an error in a constructor reaches the driver as a death."""
        patching = self._plan.patching
        unneeded = self._entropies is not None or patching.entropy_model is None
        if self._model is None and self._entropy_model is not None and not unneeded:
            assert patching.entropy_model is not None
            self._model = load_model(
                self._entropy_model, patching.entropy_model, patching.device, patching.dtype, self._cpus
            )
