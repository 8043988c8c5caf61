"""Documents patched as they are evaluated, by the model's own entropy model and rule: texts in, row groups out.

The patches are those that `blt patch` would store with that entropy model and rule.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from blt.checkpoint import LanguageModel, LanguageModelConfig
from blt.entropy_model import document_entropies_and_nats, document_nats
from blt.errors import ConfigError
from blt.patching import document_patch_starts
from pipelines.evaluate.scoring import Nats
from pipelines.model_patching import limited
from pipelines.patch.boundaries import batches
from pipelines.train.packing import RowGroup
from pipelines.train.row_group import joined_documents


@dataclass(frozen=True, kw_only=True)
class PatchedBatch:
    """Some documents with their patches."""

    group: RowGroup
    entropy_model_nats: Nats | None
    """What the entropy model pays for each document's bytes and EOS, [D]; None where there is no entropy model."""


def check_can_patch(model: LanguageModelConfig, directory: str, what: str) -> None:
    """ConfigError, beginning with `what`, unless the model's directory has all that patching takes."""
    if model.patch_rule.needs_entropies and not model.entropy_stored:
        raise ConfigError(
            f"{what}: {directory} holds no entropy model, so its documents cannot be patched as they are read "
            "(give a patch dataset as data)"
        )


def patch_texts(model: LanguageModel, texts: Sequence[bytes], row_bytes: int) -> Iterator[PatchedBatch]:
    """The documents in order, batch by batch; each is patched by itself, so the others have no say."""
    for rows in batches([len(text) for text in texts]):
        batch = texts[rows]
        entropies, nats = _predictions(model, batch, row_bytes)
        rule = limited(model.patch_rule)  # as of a patch dataset of these documents
        starts = [document_patch_starts(t, e, rule).numpy() for t, e in zip(batch, entropies, strict=True)]
        yield PatchedBatch(group=joined_documents(batch, starts), entropy_model_nats=nats)


def entropy_model_nats(model: LanguageModel, texts: Sequence[bytes], row_bytes: int) -> Nats | None:
    """As `PatchedBatch.entropy_model_nats`, for documents that have their patches."""
    if model.entropy_model is None:
        return None
    values: list[Tensor] = []
    for rows in batches([len(text) for text in texts]):
        values += document_nats(
            model.entropy_model, texts[rows], reset_on_newline=model.reset_on_newline, row_bytes=row_bytes
        )
    return _sums(values)


def _predictions(
    model: LanguageModel, texts: Sequence[bytes], row_bytes: int
) -> tuple[Sequence[Tensor | None], Nats | None]:
    """Entropies of each document, and the sum of its nats; none without an entropy model."""
    if model.entropy_model is None:
        return [None] * len(texts), None
    both = document_entropies_and_nats(
        model.entropy_model, texts, reset_on_newline=model.reset_on_newline, row_bytes=row_bytes
    )
    return [entropies for entropies, _ in both], _sums([nats for _, nats in both])


def _sums(values: Sequence[Tensor]) -> Nats:
    return np.asarray([float(nats.double().sum()) for nats in values], np.float64)
