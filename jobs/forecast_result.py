"""The forecast of a training run as a result: tables on standard output, every figure in the line of JSON."""

from collections.abc import Mapping

from blt.entropy_model import EntropyModelConfig
from blt.memory_ledger import MemoryLedger
from blt.model import BLTConfig
from jobs.forecast_table import print_forecast
from jobs.record import JobResult
from pipelines.train.config import TrainConfig
from pipelines.train.forecast import Forecast, forecast
from pipelines.train.machine import Assumptions
from pipelines.train.run_sizes import MicroBatch

Figures = Mapping[str, float | str | None]

SUMMARY = "say what memory, FLOPs, traffic and time it would take; writes nothing"
OPTIONS = ("device", "mfu")
"""Of the keys of `Assumptions`, those that are options as well."""


def forecast_result(
    config: TrainConfig,
    assumed: Assumptions,
    model: BLTConfig | EntropyModelConfig,
    data: str,
    output: str,
    entropy_model: str | None = None,
) -> JobResult:
    """Print the forecast of a run and give its figures."""
    found = forecast(config, assumed, model, data, entropy_model)
    print_forecast(found)
    return JobResult(
        path=output,
        bytes=found.bytes,
        mean_patch_bytes=round(found.mean_patch_bytes, 4),
        figures={
            **_model_figures(found),
            **_run_figures(found),
            **_memory_figures(found),
            **_traffic_figures(found),
        },
    )


def _model_figures(found: Forecast) -> Figures:
    return {
        "parameters": sum(found.parameters.values()),
        **{f"parameters.{part}": count for part, count in found.parameters.items()},
        "flops_per_byte": sum(found.flops_per_byte.values()),
        **{f"flops_per_byte.{part}": flops for part, flops in found.flops_per_byte.items()},
    }


def _run_figures(found: Forecast) -> Figures:
    return {
        "steps": found.config.steps,
        "steps_per_epoch": found.steps_per_epoch,
        "step_bytes": found.step_bytes,
        "micro_steps": found.micro_steps,
        **{f"sequences.{name}": source.sequences for name, source in found.sources.items()},
        **{f"epochs.{name}": round(epochs, 6) for name, epochs in found.reading.epochs.items()},
        "workers": found.config.workers,
        "device": found.machine.name,
        "device_flops": found.machine.flops,
        "device_flops_source": found.machine.flops_source,
        "mfu": found.mfu,
        "estimated_seconds": found.seconds,
    }


def _memory_figures(found: Forecast) -> Figures:
    return {
        "memory_bytes": found.world.memory.total,
        **_ledger_figures(found.world.memory),
        **_micro_batch_figures("usual", found.usual),
        **_micro_batch_figures("most", found.most),
        "device_memory_bytes": found.machine.memory_bytes,
        **{f"memory_bytes.of_{world.workers}_workers": world.memory.total for world in found.shown_worlds},
        "smallest_fitting_workers": found.smallest_fitting,
    }


def _ledger_figures(memory: MemoryLedger) -> Figures:
    """Parts whose sum is the total, and those of the last of them."""
    working = memory.working
    inner = ("gathered_weights", "gathered_gradients", "activations", "lookups", "table_gradient")
    return {
        **{f"memory_bytes.{part}": getattr(memory, part) for part in ("weights", "gradients", "moments")},
        "memory_bytes.working": working.total,
        **{f"memory_bytes.working.{part}": getattr(working, part) for part in inner},
        "fullest_moment": working.name,
    }


def _micro_batch_figures(name: str, batch: MicroBatch) -> Figures:
    return {
        f"micro_batch.{name}.rows": batch.rows,
        f"micro_batch.{name}.row_bytes": batch.shape.bytes,
        f"micro_batch.{name}.row_patches": batch.shape.patches,
        f"micro_batch.{name}.kept_bytes": batch.activations.kept,
        f"micro_batch.{name}.peak_bytes": batch.activations.peak,
    }


def _traffic_figures(found: Forecast) -> Figures:
    traffic = found.traffic
    return {
        "traffic_bytes": traffic.total,
        "traffic_bytes.weights": traffic.weights,
        "traffic_bytes.gradients": traffic.gradients,
        "traffic_bytes.tables": traffic.tables.by_columns,
        "traffic_bytes.tables.row_numbers": traffic.tables.row_numbers,
        "traffic_bytes.tables.sums": traffic.tables.sums,
        "instead_of_traffic_bytes.tables.by_rows": traffic.tables.by_rows,
        "instead_of_traffic_bytes.tables.gathered": traffic.tables.gathered,
    }
