"""Metrics of a run: steps in, records over a few steps out, in a JSONL file, TensorBoard events and Ray's gauges.

A run that goes on from a checkpoint drops the records of steps that it does again, so that a step stands in the file
once (the timeline keeps both).
"""

import json
import resource
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType

import torch
from ray.util.metrics import Gauge
from torch.utils.tensorboard import SummaryWriter

from blt.loss import bits_per_byte
from pipelines.storage import Storage

METRICS_NAME = "metrics.jsonl"
TENSORBOARD_NAME = "tensorboard"

Record = dict[str, float]

FIGURES: Mapping[str, str] = MappingProxyType(
    {
        "train/loss": "Mean loss of a record's updates, nats per target (bytes and ends of documents).",
        "train/bpb": "The same loss as bits per document byte.",
        "train/grad_norm": "Norm of the mean loss's gradient before clipping, of a record's last update.",
        "train/lr": "Learning rate of a record's last update.",
        "train/bytes": "Document bytes trained on in a record's updates.",
        "train/bytes_per_second": "Those bytes over the seconds of the updates, all workers together.",
        "train/patches_per_second": "Patches over the seconds of the updates; to an entropy model each byte is one.",
        "train/step_seconds": "Mean seconds of an update, without evaluations and checkpoints.",
        "train/data_wait_fraction": "Share of those seconds in which a worker stood still for data.",
        "train/mfu": "Model FLOPs utilisation: the ledger's FLOPs over those that the devices can do, from 0 to 1.",
        "train/peak_memory_bytes": "Largest memory of a worker so far: resident, or allocated on CUDA.",
        "train/workers": "Workers of a record's last update.",
        "train/interruptions": "Interruptions of the run so far, as its account counts them.",
        "train/checkpoint_seconds": "Seconds from the begin of a checkpoint to its commit, most of them in background.",
        "train/checkpoint_blocked_seconds": "Seconds that training stood still for a checkpoint.",
        "valid/loss": "Mean loss of held-out sequences, nats per target.",
        "valid/bpb": "The same loss as bits per document byte.",
    }
)
"""Every figure of a record and what it means; docs/metrics.md has the same names."""


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One update, as a worker tells the recorder of it. Sums are over all workers, seconds are the worker's own.

    An update that was left out has no nats, targets and bytes.
    """

    step: int
    """Updates done with it."""
    workers: int
    nats: float
    targets: int
    bytes: int
    patches: int
    grad_norm: float
    lr: float
    sequences: str
    """Hash of the ids of the sequences that were read, hexadecimal."""
    seconds: float
    waited_seconds: float
    """For data."""
    paused_seconds: float
    """Evaluation and checkpoint between the step before and this one."""
    tries: int
    peak_memory_bytes: int


def window_figures(steps: Sequence[StepRecord], flops_per_byte: float, peak_flops: float) -> Record:
    """Figures of one record, over consecutive steps.

    flops_per_byte: of a training step; peak_flops: FLOP/s of all workers' devices together; 0 leaves MFU out.
    """
    seconds = sum(step.seconds for step in steps)
    nats, num_bytes = sum(step.nats for step in steps), sum(step.bytes for step in steps)
    last = steps[-1]
    figures = {
        "train/lr": last.lr,
        "train/bytes": num_bytes,
        "train/bytes_per_second": num_bytes / seconds,
        "train/patches_per_second": sum(step.patches for step in steps) / seconds,
        "train/step_seconds": seconds / len(steps),
        "train/data_wait_fraction": sum(step.waited_seconds for step in steps) / seconds,
        "train/peak_memory_bytes": max(step.peak_memory_bytes for step in steps),
        "train/workers": last.workers,
    }
    if num_bytes:  # else every update was left out
        figures["train/loss"] = nats / sum(step.targets for step in steps)
        figures["train/bpb"] = bits_per_byte(nats, num_bytes)
        figures["train/grad_norm"] = next(step.grad_norm for step in reversed(steps) if step.targets)
    if peak_flops:
        figures["train/mfu"] = flops_per_byte * num_bytes / seconds / peak_flops
    return figures


def read_metrics(output: str | Path) -> list[Record]:
    """All records of a run so far, oldest first; a half-written last line is left out."""
    storage = Storage(str(output))
    if not storage.exists(METRICS_NAME):
        return []
    text = storage.read_bytes(METRICS_NAME)
    return [json.loads(line) for line in text[: text.rfind(b"\n") + 1].splitlines()]


class MetricsWriter:
    """Appends records to DIRECTORY/metrics.jsonl and DIRECTORY/tensorboard; goes on after those that are there."""

    def __init__(self, directory: str | Path) -> None:
        self._directory = Path(directory)
        self._directory.mkdir(parents=True, exist_ok=True)
        self.records = read_metrics(self._directory)
        # Not the last record's: a checkpoint is told when it is whole, which may be some steps later.
        self._newest = max((int(record["step"]) for record in self.records), default=0)
        self._open()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()
        self._tensorboard.close()

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """One record; names are area/quantity_unit."""
        record = {"step": step, **figures}
        self.records.append(record)
        self._newest = max(self._newest, step)
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        for name, value in figures.items():
            self._tensorboard.add_scalar(name, value, step)

    def rewind(self, step: int) -> None:
        """Drop the records of the steps after `step`: they are done again."""
        if self._newest > step:
            self.close()
            self.records, self._newest = [record for record in self.records if record["step"] <= step], step
            self._open()

    def flush(self) -> None:
        """Put on disk what TensorBoard's writer still holds."""
        self._tensorboard.flush()

    def _open(self) -> None:
        path = self._directory / METRICS_NAME
        whole = path.with_suffix(".new")  # a kill or a full disk leaves the old file
        whole.write_text("".join(json.dumps(record) + "\n" for record in self.records), encoding="utf-8")
        whole.replace(path)
        self._file = path.open("a", encoding="utf-8")
        self._tensorboard = SummaryWriter(str(self._directory / TENSORBOARD_NAME), purge_step=self._newest + 1)


class RayGauges:
    """The newest of each figure as a gauge `blt_NAME` by run, with "/" as "_": train/loss is ray_blt_train_loss on
    /metrics."""

    def __init__(self, run: str) -> None:
        self._tags, self._gauges = {"run": run}, dict[str, Gauge]()

    def show(self, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            metric = f"blt_{name.replace('/', '_')}"
            if metric not in self._gauges:
                self._gauges[metric] = Gauge(metric, FIGURES[name], ("run",))
            self._gauges[metric].set(value, tags=self._tags)


def peak_memory_bytes() -> int:
    """Largest resident memory of this process so far, or of its device's allocations on CUDA."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
