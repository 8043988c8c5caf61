"""Where patches start: rows of documents in, the same rows with patch starts and, where they are kept, entropies out.

Entropies come from the model, or from the column `entropies` of the rows where another dataset's are used again. A
function of the rows and the plan alone, so that a shard done twice has the same bytes.
"""

from collections.abc import Iterator, Sequence

import pyarrow as pa
from torch import Tensor

from blt.entropy_model import EntropyModel, document_entropies
from blt.errors import DataError
from blt.patching import document_patch_starts, quantize_entropies, stored_entropies
from pipelines.patch.plan import PatchPlan
from pipelines.patch.rows import Starts, patched_table
from pipelines.schema import ENTROPY_FIELD, row_group_slices

BATCH_BYTES = 2**20
"""Most document bytes whose entropies are made together (a longer document is alone): each takes some 50 bytes of
memory, which a whole row group would multiply by more than a smaller batch costs."""


def batches(sizes_bytes: Sequence[int]) -> list[slice]:
    """The documents of a row group that go through the model together."""
    return row_group_slices(sizes_bytes, BATCH_BYTES)


def patch_rows(table: pa.Table, model: EntropyModel | None, plan: PatchPlan) -> pa.Table:
    """A row group of documents, as a row group of a patch dataset.

    `model` may be None for rules that need no entropies and for tables that bring theirs.
    """
    starts: list[Starts] = []
    stored: list[bytes] = []
    for rows in batches(table["n_bytes"].to_pylist()):
        batch = table.slice(rows.start, rows.stop - rows.start)
        for document_starts, entropies in patch_documents(batch, model, plan):
            starts.append(document_starts)
            stored.append(entropies)
    return patched_table(table, starts, stored if plan.store_entropies else None)


def patch_documents(batch: pa.Table, model: EntropyModel | None, plan: PatchPlan) -> Iterator[tuple[Starts, bytes]]:
    """Patch starts and stored entropies (empty unless the plan's rule reads them rounded) of each document."""
    rule = plan.patching.rule
    texts: list[bytes] = batch["text"].to_pylist()
    for text, entropies in zip(texts, _entropies(batch, texts, model, plan), strict=True):
        stored = b""
        if entropies is not None and rule.quantized:
            values = quantize_entropies(entropies)
            stored, entropies = values.numpy().tobytes(), stored_entropies(values)
        yield document_patch_starts(text, entropies, rule).numpy(), stored


def _entropies(
    batch: pa.Table, texts: Sequence[bytes], model: EntropyModel | None, plan: PatchPlan
) -> Sequence[Tensor | None]:
    """Nats of each document, float32 [n + 1]; None for each where the rule needs none."""
    patching = plan.patching
    if not patching.rule.needs_entropies:
        return [None] * len(texts)
    if ENTROPY_FIELD.name in batch.column_names:
        return [_read_entropies(row) for row in batch.select(["doc_id", "n_bytes", ENTROPY_FIELD.name]).to_pylist()]
    assert model is not None
    return document_entropies(model, texts, reset_on_newline=patching.reset_on_newline, row_bytes=plan.row_bytes)


def _read_entropies(row: dict[str, object]) -> Tensor:
    values, n_bytes = row[ENTROPY_FIELD.name], row["n_bytes"]
    assert isinstance(values, bytes)
    assert isinstance(n_bytes, int)
    if len(values) != n_bytes + 1:
        raise DataError(f"document {row['doc_id']} has {len(values)} stored entropies for {n_bytes} bytes")
    return stored_entropies(values)
