"""The evaluation actor: one unit of documents in, the scores of each of its documents out.

It loads the language model once. No logits leave it, and of the text only the prompts that samples are to continue.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import pyarrow as pa

from blt.errors import CheckpointError
from pipelines.evaluate.config import EvaluateConfig
from pipelines.evaluate.documents import Documents, EvaluateUnit, UnitCounts
from pipelines.evaluate.model import EvaluatedModel
from pipelines.evaluate.prompts import Prompt, choose, prompts_of
from pipelines.evaluate.rejects import UnitRows
from pipelines.evaluate.scorer import Scorer
from pipelines.evaluate.scores import CLEAN, encode_scores, scores_of
from pipelines.log_line import add_fields


@dataclass(frozen=True, kw_only=True)
class UnitScores:
    """What the documents of a unit came out at."""

    counts: UnitCounts
    scores: bytes
    """A table of the scores of each form of each document, in order; see `decode_scores`."""
    prompts: tuple[Prompt, ...]
    """Those of the unit that are chosen if no other unit has better ones."""
    scoring_seconds: float
    """That the BLT took for the documents as they are."""


class EvaluateActor:
    """Scores one unit per call. CheckpointError for a model that is broken or whose loss is not finite, DataError for
    documents that cannot be read.
    """

    def __init__(self, *, config: EvaluateConfig, model: str, documents: Documents) -> None:
        add_fields(process="evaluation actor")
        self._config, self._documents, self._model = config, documents, EvaluatedModel(model, config)

    def __call__(self, batch: Mapping[str, Sequence[str]]) -> dict[str, list[bytes]]:
        """A batch of units, one JSON text each, and of scores, one MessagePack each."""
        units = [msgspec.json.decode(text, type=EvaluateUnit) for text in batch["unit"]]
        return {"scores": [msgspec.msgpack.encode(self.score(unit)) for unit in units]}

    def score(self, unit: EvaluateUnit) -> UnitScores:
        """The scores of one unit."""
        scorer = Scorer(self._model.load(), self._config)
        tables: list[pa.Table] = []
        prompts: list[Prompt] = []
        rows: UnitRows | None = None
        for batch in self._documents.read(unit):
            if isinstance(batch, UnitRows):
                rows = batch
                continue
            tables += scorer.score(batch)
            if self._config.samples:
                found = prompts_of(batch.texts, self._config.prefix_bytes, self._config.seed)
                prompts = choose([*prompts, *found], self._config.samples)
        self._check_finite(tables, unit)
        clean = scores_of(tables).of(CLEAN)
        counts = UnitCounts(
            unit=unit,
            documents=clean.documents,
            bytes=clean.sum("bytes"),
            patches=clean.sum("patches"),
            rows=rows,
        )
        return UnitScores(
            counts=counts, scores=encode_scores(tables), prompts=tuple(prompts), scoring_seconds=scorer.seconds
        )

    def _check_finite(self, tables: Sequence[pa.Table], unit: EvaluateUnit) -> None:
        names = ["nats"] if self._model.load().entropy_model is None else ["nats", "entropy_model_nats"]
        if not all(np.isfinite(table[name].to_numpy()).all() for table in tables for name in names):
            raise CheckpointError(
                f"{self._model.directory}: the loss on {self._documents.describe(unit)} is not finite"
            )
