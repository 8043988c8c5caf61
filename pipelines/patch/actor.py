"""The patch actor: a document shard in, the same documents with patch starts committed to storage, a receipt out.

It loads the model once, reads its shard a row group at a time, computes the entropies of a row group's documents
together (the entropy model packs them into rows), applies the rule and commits. Only the receipt leaves the actor.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import msgspec
import pyarrow as pa

from blt.entropy_model import EntropyModel, document_entropies
from blt.errors import DataError
from blt.patching import document_patch_starts
from pipelines.patch.commit import Commit, adopt, commit_shard, footer
from pipelines.patch.model import load_model
from pipelines.patch.plan import PatchPlan, PatchUnit
from pipelines.patch.shard_file import ContentHash, Starts, patched_table, read_row_groups
from pipelines.patch.stats import ShardStats, write_shard_stats
from pipelines.schema import PATCH_SCHEMA, encode_parquet
from pipelines.storage import Storage


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """What an actor returns for a shard."""

    commit: Commit
    stats: ShardStats


class PatchActor:
    """Patches one shard per call; see the module's first lines.

    `plan` comes without its units (a batch brings its own), `documents` and `output` are roots of datasets. A missing
    or broken shard, or one whose counts are not the manifest's, is a DataError; another model than the plan's a
    CheckpointError.
    """

    def __init__(
        self, *, plan: PatchPlan, documents: str, output: str, entropy_model: str | None, cpus_per_actor: int
    ) -> None:
        self._plan = plan
        self._documents = Storage(documents)
        self._output = Storage(output)
        self._entropy_model = entropy_model
        self._cpus = cpus_per_actor
        self._model: EntropyModel | None = None

    def __call__(self, batch: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
        """A batch of units and of receipts, one JSON text each."""
        units = [msgspec.json.decode(text, type=PatchUnit) for text in batch["unit"]]
        return {"receipt": [msgspec.json.encode(self.patch(unit)).decode() for unit in units]}

    def patch(self, unit: PatchUnit) -> Receipt:
        """Patch and commit one shard, or adopt the file that a worker killed before its commit left."""
        self._load()
        began = time.perf_counter()
        work = _ShardWork(self._documents, self._model, self._plan, unit)
        commit = adopt(self._output, self._plan, unit)
        if commit is None:
            data = encode_parquet(work.row_groups(), PATCH_SCHEMA, work.metadata)
            commit = commit_shard(self._output, self._plan, unit, data, work.patches)
        busy_seconds = time.perf_counter() - began
        stats = ShardStats(
            documents=commit.documents,
            bytes=commit.bytes,
            patches=commit.patches,
            reading_seconds=work.reading_seconds,
            inferring_seconds=work.inferring_seconds,
            writing_seconds=busy_seconds - work.reading_seconds - work.inferring_seconds,
        )
        write_shard_stats(self._output, unit.id, stats)
        return Receipt(commit=commit, stats=stats)

    def _load(self) -> None:
        """Load the model with the first shard: an error in a constructor reaches the driver as a death."""
        patching = self._plan.patching
        if self._model is None and self._entropy_model is not None and patching.entropy_model is not None:
            self._model = load_model(
                self._entropy_model, patching.entropy_model, patching.device, patching.dtype, self._cpus
            )


class _ShardWork:
    """The patched row groups of one shard, made while the Parquet writer asks for them, and what they add up to."""

    def __init__(self, storage: Storage, model: EntropyModel | None, plan: PatchPlan, unit: PatchUnit) -> None:
        self._storage, self._model, self._plan, self._unit = storage, model, plan, unit
        self.patches = 0
        self.reading_seconds = 0.0
        self.inferring_seconds = 0.0
        self.metadata: dict[str, str] = {}
        """Footer, filled after the last row group."""

    def row_groups(self) -> Iterator[pa.Table]:
        """Patch tables in stored order; DataError after the last if documents or bytes are not the manifest's."""
        content, documents, num_bytes = ContentHash(), 0, 0
        for table in self._timed_reads():
            patched = self._patched(table)
            content.update(patched)
            documents += table.num_rows
            num_bytes += sum(table["n_bytes"].to_pylist())
            self.patches += sum(patched["n_patches"].to_pylist())
            yield patched
        if (documents, num_bytes) != (self._unit.documents, self._unit.bytes):
            raise DataError(
                f"shard {self._storage.url(self._unit.path)} holds {documents} documents and {num_bytes} bytes; "
                f"the manifest says {self._unit.documents} and {self._unit.bytes}"
            )
        self.metadata.update(footer(self._plan, self._unit, self.patches, content.hexdigest))

    def _timed_reads(self) -> Iterator[pa.Table]:
        tables = read_row_groups(self._storage, self._unit.path, self._plan.row_group_bytes)
        while True:
            began = time.perf_counter()
            table = next(tables, None)
            self.reading_seconds += time.perf_counter() - began
            if table is None:
                return
            yield table

    def _patched(self, table: pa.Table) -> pa.Table:
        began = time.perf_counter()
        starts = patch_documents(self._model, table["text"].to_pylist(), self._plan)
        self.inferring_seconds += time.perf_counter() - began
        return patched_table(table, starts)


def patch_documents(model: EntropyModel | None, documents: Sequence[bytes], plan: PatchPlan) -> list[Starts]:
    """Patch starts of each document under the plan's rule; `model` may be None for rules that need no entropies."""
    patching = plan.patching
    if not patching.rule.needs_entropies:
        return [document_patch_starts(document, None, patching.rule).numpy() for document in documents]
    assert model is not None
    entropies = document_entropies(
        model, documents, reset_on_newline=patching.reset_on_newline, row_bytes=plan.row_bytes
    )
    pairs = zip(documents, entropies, strict=True)
    return [document_patch_starts(document, values, patching.rule).numpy() for document, values in pairs]
