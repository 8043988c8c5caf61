"""Train a BLT on a patch dataset, with Ray Train; started again on the same output it goes on where it stood.

Writes OUTPUT/model (which eval, generate and Python's blt.load read), metrics.jsonl, tensorboard/ and checkpoints/.
"""

from dataclasses import dataclass

from blt.entropy_model import EntropyModelConfig
from blt.model import BLTConfig
from jobs.action import Action
from jobs.forecast_result import OPTIONS, SUMMARY, forecast_result
from jobs.progress import progress
from jobs.ray_session import ray_session
from jobs.record import JobResult, run_once
from pipelines.manifest import read_manifest
from pipelines.train.config import TrainConfig
from pipelines.train.job import RESOURCES, TrainJob, check_entropy_model, check_init_from
from pipelines.train.machine import Assumptions
from pipelines.train.trainer import TrainResult, resolve_job, train

NOT_IN_OUTPUT = ("output", "data", "documents", "entropy_model", "init_from", *RESOURCES)
"""Keys that have no say in the output: resources, and paths whose content the fingerprint of the inputs covers."""


@dataclass(frozen=True, kw_only=True)
class Settings(TrainConfig):
    """A training run apart from its paths."""

    model: BLTConfig
    """Shape of the BLT."""


@dataclass(frozen=True, kw_only=True)
class Config(Settings):
    """Keys of `blt train`."""

    data: str
    """Patch dataset (the output of `blt patch`)."""
    entropy_model: str | None = None
    """Directory of the entropy model that made the patches; it becomes part of the trained model."""
    output: str
    """Directory of the run."""


@dataclass(frozen=True, kw_only=True)
class DryRunConfig(Config, Assumptions):
    """Keys of `blt train --dry-run`."""


def run(config: Config) -> JobResult:
    """Train into `config.output` unless that is done."""
    manifest = read_manifest(config.data)
    if manifest.kind == "patches":
        check_entropy_model(manifest, config.data, config.entropy_model)

    def work() -> JobResult:
        with ray_session():
            return follow(resolve_job(config, config.model, config.data, config.output, config.entropy_model))

    inputs = f"data={manifest.fingerprint}" + init_of(config.init_from, config.model)
    return run_once(config.output, config, inputs, work, ignore=NOT_IN_OUTPUT)


def dry_run(config: DryRunConfig) -> JobResult:
    """What `run` would take; nothing is written."""
    return forecast_result(config, config, config.model, config.data, config.output, config.entropy_model)


ACTIONS = {"dry-run": Action(dry_run, SUMMARY, config=DryRunConfig, options=OPTIONS)}


def init_of(init_from: str | None, model: BLTConfig | EntropyModelConfig) -> str:
    """What identifies the weights that a run starts from, if they are given. ConfigError if they do not fit."""
    return "" if init_from is None else f" init={check_init_from(init_from, model)}"


def follow(job: TrainJob) -> JobResult:
    """Run a training job with its progress shown."""
    with progress("train " + job.kind.replace("_", " "), total=job.config.steps, unit="steps") as bar:
        done = 0

        def on_record(record: dict[str, float]) -> None:
            nonlocal done
            bar.advance(max(int(record["step"]) - done, 0))
            done = max(int(record["step"]), done)
            shown = {"train/bpb": "bpb", "train/bytes_per_second": "bytes_per_second", "valid/bpb": "valid_bpb"}
            bar.update(**{name: round(record[key], 3) for key, name in shown.items() if key in record})

        return result_of(train(job, on_record))


def result_of(result: TrainResult) -> JobResult:
    """The figures that a training command reports."""
    account = result.account
    return JobResult(
        bytes=result.bytes,
        bpb=round(result.valid_bpb, 4),
        figures={
            "model": result.model,
            "steps": result.steps,
            "train_loss": round(result.loss, 4),
            "bytes_per_second": round(result.bytes_per_second),
            "data_wait_fraction": round(result.data_wait_fraction, 5),
            "interruptions": len(account.interruptions),
            "steps_redone": account.steps_redone,
            "seconds_lost": account.seconds_lost,
            "goodput": round(account.goodput, 4),
        },
    )
