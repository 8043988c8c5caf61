"""A pool of one actor in this process, for tests of what is around the pool; others run it on Ray."""

import importlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest

from pipelines.actor_pool import ActorPoolConfig, Unit


def use_in_process_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let calibration, patching and verification run their units here, in order."""
    for name in ("calibrate", "dataset", "verify"):  # modules: one of them has the name of a function beside it
        monkeypatch.setattr(importlib.import_module(f"pipelines.patch.{name}"), "run_units", _run_units)


def _run_units(
    units: Sequence[Unit], actor: type, arguments: Mapping[str, Any], config: ActorPoolConfig
) -> Iterator[dict[str, Any]]:
    pool = actor(**arguments)
    for unit in units:
        batch = pool({name: [value] for name, value in unit.items()})
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(batch, values, strict=True))
