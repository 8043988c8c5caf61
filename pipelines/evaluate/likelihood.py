"""Likelihood: a language model and texts in, what each of their bytes cost and whether it is the likeliest, out.

A text is a document: BOS goes before it, and its patches are found by the model's own entropy model and rule, as they
are while it is written. It is read in the windows of an evaluation, so one that fits a window is read in one pass.
Shapes: B rows, T bytes, V vocabulary, N ids of all texts, n bytes of a text.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from blt.checkpoint import LanguageModel
from blt.entropy_model import document_entropies
from blt.errors import CheckpointError, ConfigError
from blt.loss import NO_TARGET
from blt.patching import document_patch_starts
from blt.sampling import Sampling, next_ids
from pipelines.evaluate.config import WindowConfig
from pipelines.evaluate.scoring import Nats, scored_from, window_logits
from pipelines.schema import row_group_slices
from pipelines.train.packing import RowGroup
from pipelines.train.row_group import joined_documents

SLICE_BYTES = 2**18
"""Text that is patched and scored before the next is looked at (a longer text is alone): it bounds the memory, and is
enough to fill batches with windows of like length."""


@dataclass(frozen=True, kw_only=True)
class TextScores:
    """One text, a value for each of its bytes and its EOS [n + 1], given BOS and all before it."""

    nats: Nats
    """-ln p, of all ids."""
    greedy: npt.NDArray[np.bool_]
    """Whether greedy generation would have chosen it: whether it is the likeliest of bytes and EOS."""


def check_scorable(lm: LanguageModel) -> None:
    """ConfigError unless the patches of a text can be found, and from no byte but those before each of them."""
    rule = lm.patch_rule
    if rule.kind == "top_k":
        raise ConfigError(
            "patch rule: kind top_k looks ahead in the text, so what it makes of a byte is no likelihood given the "
            "bytes before it; kinds entropy, space, fixed and byte can be scored"
        )
    if rule.needs_entropies and lm.entropy_model is None:
        raise ConfigError(
            f"patch rule: kind {rule.kind} needs the entropy model that the patches were made with, but the language "
            "model was saved or loaded without one"
        )


def score_texts(lm: LanguageModel, texts: Sequence[bytes], config: WindowConfig) -> Iterator[TextScores]:
    """The scores of each text, in order. ConfigError as `check_scorable`, DataError for a patch longer than a window.

    They do not depend on the other texts, up to rounding. CheckpointError for a loss that is not finite.
    """
    check_scorable(lm)
    return (
        scores
        for part in row_group_slices([len(text) for text in texts], SLICE_BYTES)
        for scores in _score_group(lm, patched_group(lm, texts[part], config.row_bytes), config)
    )


def patched_group(lm: LanguageModel, texts: Sequence[bytes], row_bytes: int) -> RowGroup:
    """The texts as a row group whose patches are those of the model's rule."""
    entropies: Sequence[Tensor | None] = [None] * len(texts)
    if lm.patch_rule.needs_entropies:
        assert lm.entropy_model is not None
        entropies = document_entropies(
            lm.entropy_model, texts, reset_on_newline=lm.reset_on_newline, row_bytes=row_bytes
        )
    starts = [
        document_patch_starts(text, nats, lm.patch_rule).numpy() for text, nats in zip(texts, entropies, strict=True)
    ]
    return joined_documents(texts, starts)


@torch.inference_mode()
def _score_group(lm: LanguageModel, group: RowGroup, config: WindowConfig) -> list[TextScores]:
    nats_N = np.full(group.borders[-1], np.nan)
    greedy_N = np.zeros(group.borders[-1], np.bool_)
    limits = (config.sequence_patches, config.sequence_bytes, config.batch_bytes)
    for windows, batch, logits_BTV in window_logits(lm.model, group, *limits):
        scored_BT = batch.targets_BT != NO_TARGET
        # Rows come one after the other, so the targets of a batch are its windows' scored ids end to end.
        runs = [np.arange(scored_from(window), window.end) for window in windows]
        places, targets, logits = np.concatenate(runs), batch.targets_BT[scored_BT], logits_BTV[scored_BT]
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        nats_N[places] = F.cross_entropy(wide, targets, reduction="none").cpu().numpy()
        greedy_N[places] = np.equal(next_ids(logits, Sampling(), ()), targets.cpu().numpy())
    texts = [slice(start + 1, end) for start, end in pairwise(group.borders)]
    if not all(np.isfinite(nats_N[text]).all() for text in texts):
        raise CheckpointError("the loss of the model is not finite on the text that it is to score")
    return [TextScores(nats=nats_N[text], greedy=greedy_N[text]) for text in texts]
