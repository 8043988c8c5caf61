"""Evaluation: a BLT and a patch dataset in, its bits per byte on a split beside those of compressors out."""

from pipelines.evaluate.config import EvaluateConfig
from pipelines.evaluate.evaluate import evaluate
from pipelines.evaluate.evaluation import Evaluation, SourceFigures, read_evaluation, write_evaluation

__all__ = [
    "EvaluateConfig",
    "Evaluation",
    "SourceFigures",
    "evaluate",
    "read_evaluation",
    "write_evaluation",
]
