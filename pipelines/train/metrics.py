"""Metrics of a run: records in, a JSONL file and TensorBoard events out. Written by rank 0 alone.

A resumed run drops the records of steps that it does again, so that a step stands in the file once.
"""

import json
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import torch
from torch.utils.tensorboard import SummaryWriter

METRICS_NAME = "metrics.jsonl"
TENSORBOARD_NAME = "tensorboard"


def read_metrics(run_directory: str | Path) -> list[dict[str, float]]:
    """All records so far, oldest first; a half-written last line is left out."""
    return read_metrics_from(run_directory, 0)[0]


def read_metrics_from(run_directory: str | Path, offset: int) -> tuple[list[dict[str, float]], int]:
    """The records from a byte offset on, and the offset where the next ones will begin."""
    path = Path(run_directory) / METRICS_NAME
    if not path.exists():
        return [], offset
    with path.open("rb") as file:
        file.seek(offset)
        text = file.read()
    whole = text[: text.rfind(b"\n") + 1]
    return [json.loads(line) for line in whole.splitlines()], offset + len(whole)


def metrics_size(run_directory: str | Path) -> int:
    """Bytes of the records so far."""
    path = Path(run_directory) / METRICS_NAME
    return path.stat().st_size if path.exists() else 0


class MetricsWriter:
    """Appends records to RUN/metrics.jsonl and RUN/tensorboard; a context manager."""

    def __init__(self, run_directory: str | Path, first_step: int) -> None:
        directory = Path(run_directory)
        directory.mkdir(parents=True, exist_ok=True)
        kept = [record for record in read_metrics(directory) if record["step"] <= first_step]
        path = directory / METRICS_NAME
        path.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")
        self._tensorboard = SummaryWriter(str(directory / TENSORBOARD_NAME), purge_step=first_step + 1)

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._tensorboard.close()

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """One record; names are area/quantity_unit."""
        self._file.write(json.dumps({"step": step, **figures}) + "\n")
        self._file.flush()
        for name, value in figures.items():
            self._tensorboard.add_scalar(name, value, step)


def peak_memory_bytes() -> int:
    """Largest resident memory of this process so far, or of its device's allocations on CUDA."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
