"""What every measurement has: a place to work in, what it ran on, and its figures as one line of JSON."""

import contextlib
import importlib.metadata
import json
import os
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from blt.errors import ConfigError
from jobs.configuration import to_plain


@dataclass(frozen=True, kw_only=True)
class BenchResult:
    """The figures, as `to_json` prints them."""

    figures: dict[str, Any]
    status: Literal["done", "incomplete"] = "done"
    """Incomplete: a check of the measurement failed."""

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps({"status": self.status} | self.figures, ensure_ascii=False)


def circumstances(config: object, device: str) -> dict[str, Any]:
    """Device, CPUs of this machine, versions and configuration of a measurement."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "pyarrow", "ray", "blt-ray")}
    return {"device": device, "cpus": os.cpu_count(), "versions": versions, "configuration": to_plain(config)}


def summary(values: Sequence[float]) -> dict[str, Any]:
    """The median of the repeats, and all of them."""
    digits = 3 if max(values) < 100 else 0
    return {"median": round(statistics.median(values), digits), "repeats": [round(value, digits) for value in values]}


@contextlib.contextmanager
def working_directory(directory: str | None) -> Iterator[Path]:
    """An empty directory to work in: the given one, or for None a temporary one that is removed afterwards.

    ConfigError if the given one holds anything.
    """
    if directory is None:
        with tempfile.TemporaryDirectory(prefix="blt-bench-") as temporary:
            yield Path(temporary)
        return
    given = Path(directory).absolute()
    given.mkdir(parents=True, exist_ok=True)
    if any(given.iterdir()):
        raise ConfigError(f"directory {given} is not empty")
    yield given
