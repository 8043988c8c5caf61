"""The scorer: batches of documents in, tables of their scores out, for the documents as they are and noised.

It patches what comes without patches, and everything that is noised, by the model's own entropy model and rule.
"""

import time
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from blt.checkpoint import LanguageModel
from pipelines.evaluate.config import EvaluateConfig
from pipelines.evaluate.documents import DocumentBatch
from pipelines.evaluate.noise import Noise, disturb
from pipelines.evaluate.patcher import PatchedBatch, entropy_model_nats, patch_texts
from pipelines.evaluate.scores import CLEAN, SCHEMA
from pipelines.evaluate.scoring import (
    document_lengths,
    document_one_byte_patches,
    document_patches,
    score_documents,
)
from pipelines.evaluate.utf8 import is_utf8


class Scorer:
    """Scores batches one by one."""

    def __init__(self, model: LanguageModel, config: EvaluateConfig) -> None:
        self._model, self._config = model, config
        self.seconds = 0.0
        """That the BLT took for documents as they are."""
        self._blt_seconds = 0.0

    def score(self, batch: DocumentBatch) -> Iterator[pa.Table]:
        """Tables of SCHEMA: a row for each document, then for each noise one for each document that is UTF-8."""
        is_text = [is_utf8(text) for text in batch.texts]
        before = self._blt_seconds
        yield _table(batch, CLEAN, is_text, self._figures(self._patched(batch)))
        self.seconds += self._blt_seconds - before
        for noise in self._config.noises:
            chosen = [row for row, valid in enumerate(is_text) if valid]
            noised = self._noised(batch, chosen, noise)
            yield _table(noised, noise, [True] * len(chosen), self._figures(self._patched(noised)))

    def _noised(self, batch: DocumentBatch, chosen: Sequence[int], noise: Noise) -> DocumentBatch:
        texts = (batch.texts[row] for row in chosen)
        doc_ids = [batch.doc_ids[row] for row in chosen]
        return DocumentBatch(
            doc_ids=doc_ids,
            sources=[batch.sources[row] for row in chosen],
            languages=[batch.languages[row] for row in chosen],
            texts=[disturb(t, noise, self._config.seed, doc_id) for t, doc_id in zip(texts, doc_ids, strict=True)],
            group=None,
        )

    def _patched(self, batch: DocumentBatch) -> Iterator[PatchedBatch]:
        row_bytes = self._config.row_bytes
        if batch.group is None:
            yield from patch_texts(self._model, batch.texts, row_bytes)
        else:
            nats = entropy_model_nats(self._model, batch.texts, row_bytes)
            yield PatchedBatch(group=batch.group, entropy_model_nats=nats)

    def _figures(self, batches: Iterator[PatchedBatch]) -> dict[str, npt.NDArray[np.generic]]:
        """The columns of counts and nats."""
        parts = [self._figures_of(batch) for batch in batches]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts else {}

    def _figures_of(self, batch: PatchedBatch) -> dict[str, npt.NDArray[np.generic]]:
        config, group = self._config, batch.group
        began = time.perf_counter()
        found = score_documents(
            self._model.model,
            group,
            sequence_patches=config.sequence_patches,
            sequence_bytes=config.sequence_bytes,
            batch_bytes=config.batch_bytes,
        )
        self._blt_seconds += time.perf_counter() - began
        no_nats = np.full(len(found.nats), np.nan)
        return {
            "bytes": document_lengths(group),
            "patches": document_patches(group),
            "one_byte_patches": document_one_byte_patches(group),
            "hits": found.hits,
            "nats": found.nats,
            "entropy_model_nats": no_nats if batch.entropy_model_nats is None else batch.entropy_model_nats,
        }


def _table(
    batch: DocumentBatch, form: str, is_text: Sequence[bool], figures: dict[str, npt.NDArray[np.generic]]
) -> pa.Table:
    if not batch.texts:
        return SCHEMA.empty_table()
    labels = {
        "source": list(batch.sources),
        "language": list(batch.languages),
        "form": [form] * len(batch.texts),
        "is_text": list(is_text),
    }
    columns = {**labels, **figures}
    return pa.table([pa.array(columns[field.name], field.type) for field in SCHEMA], schema=SCHEMA)
