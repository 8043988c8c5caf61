"""The evaluation actor: one row group of a shard in, the sums of each of its documents out.

It loads the language model once. No text and no logits leave it.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import torch

from blt.checkpoint import LanguageModel, load
from blt.entropy_model import document_nats
from blt.errors import CheckpointError
from pipelines.evaluate.config import EvaluateConfig
from pipelines.evaluate.scoring import document_lengths, document_patches, document_texts, score_documents
from pipelines.shard_file import open_shard
from pipelines.storage import Storage
from pipelines.train.packing import RowGroup
from pipelines.train.row_group import read_row_group

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class EvaluateUnit:
    """One unit of work."""

    path: str
    """Of the shard, relative to the root of the dataset."""
    row_group: int


@dataclass(frozen=True, kw_only=True)
class UnitScores:
    """What the documents of a row group cost, a value for each in stored order."""

    unit: EvaluateUnit
    sources: tuple[str, ...]
    bytes: tuple[int, ...]
    patches: tuple[int, ...]
    nats: tuple[float, ...]
    """Of the bytes and the EOS under the BLT."""
    entropy_model_nats: tuple[float, ...] | None
    """The same under the entropy model; None where the model has none."""
    scoring_seconds: float
    """That the BLT took."""


class EvaluateActor:
    """Scores one unit per call. CheckpointError for a model that is broken or whose loss is not finite, DataError for a
    broken shard.
    """

    def __init__(self, *, config: EvaluateConfig, model: str, data: str) -> None:
        self._config, self._directory, self._storage = config, model, Storage(data)
        self._model: LanguageModel | None = None

    def __call__(self, batch: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
        """A batch of units and of scores, one JSON text each."""
        units = [msgspec.json.decode(text, type=EvaluateUnit) for text in batch["unit"]]
        return {"scores": [msgspec.json.encode(self.score(unit)).decode() for unit in units]}

    def score(self, unit: EvaluateUnit) -> UnitScores:
        """The scores of one row group."""
        language_model = self._load()
        group = read_row_group(self._storage, unit.path, unit.row_group)
        started = time.perf_counter()
        nats = score_documents(
            language_model.model,
            group,
            sequence_patches=self._config.sequence_patches,
            sequence_bytes=self._config.sequence_bytes,
            batch_bytes=self._config.batch_bytes,
        )
        scoring_seconds = time.perf_counter() - started
        entropy_model_nats = self._entropy_model_nats(language_model, group)
        if not np.isfinite((*nats, *(entropy_model_nats or ()))).all():
            raise CheckpointError(f"{self._directory}: the loss on {self._storage.url(unit.path)} is not finite")
        return UnitScores(
            unit=unit,
            sources=tuple(_read_sources(self._storage, unit)),
            bytes=tuple(document_lengths(group).tolist()),
            patches=tuple(document_patches(group).tolist()),
            nats=tuple(nats.tolist()),
            entropy_model_nats=entropy_model_nats,
            scoring_seconds=scoring_seconds,
        )

    def _load(self) -> LanguageModel:
        """Load the model with the first unit: an error in a constructor reaches the driver as a death."""
        if self._model is None:
            torch.set_num_threads(self._config.cpus_per_actor)
            self._model = load(self._directory, device=self._config.device, dtype=_DTYPES[self._config.dtype])
            self._model.model.eval()
        return self._model

    def _entropy_model_nats(self, language_model: LanguageModel, group: RowGroup) -> tuple[float, ...] | None:
        if language_model.entropy_model is None:
            return None
        values = document_nats(
            language_model.entropy_model.eval(),
            document_texts(group),
            reset_on_newline=language_model.reset_on_newline,
            row_bytes=self._config.row_bytes,
        )
        return tuple(float(nats.double().sum()) for nats in values)


def _read_sources(storage: Storage, unit: EvaluateUnit) -> list[str]:
    """The source of each document of a row group."""
    with open_shard(storage, unit.path, verify=False) as shard:
        table = shard.read(unit.row_group, ["source"])
    return [str(source) for source in table["source"].to_pylist()]
