"""Figures: scores of documents in, bits per byte with their interval, accuracy, patches and FLOPs out. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from blt.checkpoint import LanguageModelConfig
from blt.entropy_model import EntropyModelConfig
from blt.flops import entropy_flops_per_byte, flops_per_byte
from blt.loss import bits_per_byte
from pipelines.evaluate.config import EvaluateConfig
from pipelines.evaluate.evaluation import PartFigures, ScoreFigures
from pipelines.evaluate.scores import Scores
from pipelines.evaluate.scoring import Nats
from pipelines.train.packing import Integers


@dataclass(frozen=True, kw_only=True)
class Judge:
    """Makes figures of scores, for one configuration and model."""

    config: EvaluateConfig
    model: LanguageModelConfig
    entropy_model: EntropyModelConfig | None
    """None where the model's directory holds none."""

    def score_figures(self, scores: Scores) -> ScoreFigures:
        """The figures of documents of one form."""
        num_bytes, patches = scores.sum("bytes"), scores.sum("patches")
        nats_D, bytes_D = scores.columns["nats"], scores.columns["bytes"]
        nats = float(nats_D.sum())
        low, high = None, None
        if num_bytes:
            resamples, seed = self.config.bootstrap_resamples, self.config.seed
            low, high = bootstrap_interval(nats_D, bytes_D, resamples, seed)
        return ScoreFigures(
            documents=scores.documents,
            bytes=num_bytes,
            patches=patches,
            mean_patch_bytes=num_bytes / patches if patches else 0.0,
            nats=nats,
            bpb=bits_per_byte(nats, num_bytes) if num_bytes else None,
            bpb_low=low,
            bpb_high=high,
            accuracy=scores.sum("hits") / num_bytes if num_bytes else None,
            one_byte_share=scores.sum("one_byte_patches") / patches if patches else None,
        )

    def part_figures(self, scores: Scores, baselines: Mapping[str, float]) -> PartFigures:
        """The figures of a source, a language or all documents."""
        found = self.score_figures(scores)
        nats = scores.entropy_model_nats
        model = entropy_model = None
        if found.patches:
            model = self._model_flops(found.mean_patch_bytes)
            entropy_model = self._entropy_model_flops(found.mean_patch_bytes)
        return PartFigures(
            **vars(found),
            entropy_model_bpb=bits_per_byte(nats, found.bytes) if nats is not None and found.bytes else None,
            model_flops_per_byte=model,
            entropy_model_flops_per_byte=entropy_model,
            flops_per_byte=None if model is None or entropy_model is None else model + entropy_model,
            baselines=dict(baselines),
        )

    def _model_flops(self, mean_patch_bytes: float) -> float:
        return flops_per_byte(self.model.model, mean_patch_bytes, self._context_bytes(mean_patch_bytes)).forward

    def _entropy_model_flops(self, mean_patch_bytes: float) -> float | None:
        if not self.model.patch_rule.needs_entropies:
            return 0.0
        if self.entropy_model is None:
            return None
        return entropy_flops_per_byte(self.entropy_model, self._context_bytes(mean_patch_bytes))

    def _context_bytes(self, mean_patch_bytes: float) -> float:
        """Bytes that a window holds."""
        return min(float(self.config.sequence_bytes), self.config.sequence_patches * mean_patch_bytes)


def bootstrap_interval(nats_D: Nats, bytes_D: Integers, resamples: int, seed: int) -> tuple[float, float]:
    """95 % confidence interval of bpb: percentiles over resamples of the documents, drawn with replacement.

    A resample of documents without a byte has no bpb and is left out.
    """
    random = np.random.default_rng(seed)
    found = []
    for _ in range(resamples):
        chosen = random.integers(0, len(nats_D), len(nats_D))
        if num_bytes := int(bytes_D[chosen].sum()):
            found.append(bits_per_byte(float(nats_D[chosen].sum()), num_bytes))
    low, high = np.percentile(found, (2.5, 97.5)).tolist()
    return low, high
