"""Train the entropy model: a small byte transformer on a document dataset, with Ray Train.

Writes OUTPUT/model (which calibrate and patch read), metrics.jsonl, tensorboard/ and checkpoints/.
"""

from dataclasses import dataclass

from blt.entropy_model import EntropyModelConfig
from jobs.action import Action
from jobs.forecast_result import OPTIONS as FORECAST_OPTIONS
from jobs.forecast_result import SUMMARY, forecast_result
from jobs.ray_session import ray_session
from jobs.record import JobResult, run_once
from jobs.train import NOT_IN_OUTPUT, follow, init_of
from pipelines.manifest import read_manifest
from pipelines.train.config import TrainConfig
from pipelines.train.machine import Assumptions
from pipelines.train.trainer import resolve_job

OPTIONS = ("init_from",)


@dataclass(frozen=True, kw_only=True)
class Settings(TrainConfig):
    """A training run apart from its paths."""

    model: EntropyModelConfig
    """Shape of the entropy model."""


@dataclass(frozen=True, kw_only=True)
class Config(Settings):
    """Keys of `blt train-entropy`."""

    documents: str
    """Document dataset (the output of `blt shard`)."""
    output: str
    """Directory of the run."""


@dataclass(frozen=True, kw_only=True)
class DryRunConfig(Config, Assumptions):
    """Keys of `blt train-entropy --dry-run`."""


def run(config: Config) -> JobResult:
    """Train into `config.output` unless that is done."""
    manifest = read_manifest(config.documents)

    def work() -> JobResult:
        with ray_session():
            return follow(resolve_job(config, config.model, config.documents, config.output))

    inputs = f"documents={manifest.fingerprint}" + init_of(config, config.model)
    return run_once(config.output, config, inputs, work, ignore=NOT_IN_OUTPUT)


def dry_run(config: DryRunConfig) -> JobResult:
    """What `run` would take; nothing is written."""
    return forecast_result(config, config, config.model, config.documents, config.output)


ACTIONS = {"dry-run": Action(dry_run, SUMMARY, config=DryRunConfig, options=FORECAST_OPTIONS)}
