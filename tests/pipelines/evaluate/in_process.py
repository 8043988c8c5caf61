"""Evaluation without Ray, for tests of what is around it: units and baselines one after the other in this process."""

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch

from pipelines.actor_pool import ActorPoolConfig, Unit
from pipelines.evaluate import EvaluateConfig, Evaluation, evaluate, samples
from pipelines.evaluate.baselines import Sizes, stream_sizes
from pipelines.evaluate.config import Compressor
from pipelines.evaluate.documents import Documents, Part


def evaluate_here(
    config: EvaluateConfig, model: str, documents: Documents, on_progress: Callable[[int], None] = lambda _: None
) -> Evaluation:
    """As `evaluate`; units run last one first, since actors end in any order."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        use_in_process_pool(patch)
        try:
            return evaluate(config, model, documents, on_progress)
        finally:
            torch.set_num_threads(threads)  # an actor sets those of its process


def use_in_process_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let evaluation need no Ray."""
    evaluation = importlib.import_module("pipelines.evaluate.evaluate")  # the package names a function so
    for module in (evaluation, samples):
        monkeypatch.setattr(module, "run_units", _run_units)
    monkeypatch.setattr(evaluation, "Baselines", _Baselines)


def _run_units(
    units: Sequence[Unit], actor: type, arguments: Mapping[str, Any], config: ActorPoolConfig
) -> Iterator[dict[str, Any]]:
    pool = actor(**arguments)
    for unit in reversed(units):
        batch = pool({name: [value] for name, value in unit.items()})
        yield {name: values[0] for name, values in batch.items()}


class _Baselines:
    def __init__(self, documents: Documents, compressors: Sequence[Compressor]) -> None:
        self._documents, self._compressors, self._sizes = documents, compressors, dict[Part, Sizes]()

    def start(self, part: Part) -> None:
        self._sizes[part] = stream_sizes(self._documents, part, self._compressors)

    def share(self, part: Part, other: Part) -> None:
        self._sizes[part] = self._sizes[other]

    def bits_per_byte(self, part: Part, num_bytes: int) -> dict[str, float]:
        return {name: 8 * size / num_bytes for name, size in self._sizes[part].items()} if num_bytes else {}
