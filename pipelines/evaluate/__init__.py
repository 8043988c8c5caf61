"""Evaluation: a BLT and documents in, its bits per byte beside those of compressors, its patches and robustness out."""

from pipelines.evaluate.config import EvaluateConfig
from pipelines.evaluate.corpus import TextConfig, open_corpus
from pipelines.evaluate.evaluate import evaluate
from pipelines.evaluate.evaluation import Evaluation, read_evaluation, write_evaluation
from pipelines.evaluate.patched import open_patched

__all__ = [
    "EvaluateConfig",
    "Evaluation",
    "TextConfig",
    "evaluate",
    "open_corpus",
    "open_patched",
    "read_evaluation",
    "write_evaluation",
]
