"""Train a BLT on a patch dataset, with Ray Train; started again on the same output it goes on where it stood.

Writes OUTPUT/model (which eval, generate and Python's blt.load read), metrics.jsonl, tensorboard/ and checkpoints/.
"""

import dataclasses
import logging
from dataclasses import dataclass
from typing import TypeVar

from blt.checkpoint import language_model_config
from blt.entropy_model import EntropyModelConfig
from blt.errors import ConfigError
from blt.model import BLTConfig
from jobs.action import Action
from jobs.forecast_result import OPTIONS as FORECAST_OPTIONS
from jobs.forecast_result import SUMMARY, forecast_result
from jobs.latent_start_table import print_latent_start
from jobs.progress import progress
from jobs.ray_session import ray_session
from jobs.record import JobResult, run_once
from pipelines.manifest import Manifest, Patching, read_manifest
from pipelines.model_files import local_model
from pipelines.storage import Storage
from pipelines.train.config import TrainConfig
from pipelines.train.job import RESOURCES, STARTS, TrainJob, check_entropy_model
from pipelines.train.machine import Assumptions
from pipelines.train.start import check_start, latent_start, resolved
from pipelines.train.trainer import TrainResult, resolve_job, train

logger = logging.getLogger(__name__)

OPTIONS = ("init_from", "init_latent_from")

NOT_IN_OUTPUT = ("output", "data", "documents", "entropy_model", *STARTS, *RESOURCES)
"""Keys that have no say in the output: resources, and paths whose content the fingerprint of the inputs covers."""


@dataclass(frozen=True, kw_only=True)
class Settings(TrainConfig):
    """A training run apart from its paths."""

    model: BLTConfig | None = None
    """Shape of the BLT; null takes that of init_from."""


@dataclass(frozen=True, kw_only=True)
class Config(Settings):
    """Keys of `blt train`."""

    data: str
    """Patch dataset (the output of `blt patch`)."""
    entropy_model: str | None = None
    """Directory of the entropy model that made the patches; it becomes part of the trained model. null takes that of
    init_from, if it made them."""
    output: str
    """Directory of the run."""


AnyConfig = TypeVar("AnyConfig", bound=Config)


@dataclass(frozen=True, kw_only=True)
class DryRunConfig(Config, Assumptions):
    """Keys of `blt train --dry-run`."""


def run(config: Config) -> JobResult:
    """Train into `config.output` unless that is done."""
    manifest, shape = read_manifest(config.data), shape_of(config)
    config = dataclasses.replace(with_entropy_model(resolved(config), manifest), model=shape)
    if manifest.kind == "patches":
        check_entropy_model(manifest, config.data, config.entropy_model)

    def work() -> JobResult:
        _show_latent_start(config, shape)
        with ray_session():
            return follow(resolve_job(config, shape, config.data, config.output, config.entropy_model))

    inputs = f"data={manifest.fingerprint}" + init_of(config, shape, manifest.patching)
    return run_once(config.output, config, inputs, work, ignore=NOT_IN_OUTPUT)


def dry_run(config: DryRunConfig) -> JobResult:
    """What `run` would take; nothing is written."""
    shape = shape_of(config)
    config = with_entropy_model(config, read_manifest(config.data))
    result = forecast_result(config, config, shape, config.data, config.output, config.entropy_model)
    _show_latent_start(config, shape)
    return result


ACTIONS = {"dry-run": Action(dry_run, SUMMARY, config=DryRunConfig, options=FORECAST_OPTIONS)}


def shape_of(config: Settings) -> BLTConfig:
    """The BLT's shape: as it is given, or that of the model which the run starts from. ConfigError without both."""
    if config.model is not None:
        return config.model
    if config.init_from is None:
        raise ConfigError('key "model" is missing: it gives the shape of the BLT, unless init_from names a model')
    return language_model_config(local_model(config.init_from)).model


def with_entropy_model(config: AnyConfig, manifest: Manifest) -> AnyConfig:
    """The configuration with the entropy model of the BLT that the run starts from, where none is given and it is the
    one that made the patches."""
    wanted = manifest.patching and manifest.patching.entropy_model
    if config.entropy_model is not None or config.init_from is None or wanted is None:
        return config
    start = language_model_config(local_model(config.init_from))
    if not start.entropy_stored or start.entropy_fingerprint != wanted:
        return config
    return dataclasses.replace(config, entropy_model=Storage(config.init_from).url("entropy_model"))


def init_of(config: TrainConfig, model: BLTConfig | EntropyModelConfig, patching: Patching | None = None) -> str:
    """What identifies the weights that a run starts from, if they are given. ConfigError if they do not fit."""
    found = check_start(config, model, patching)
    return "" if found is None else f" init={found}"


def _show_latent_start(config: TrainConfig, shape: BLTConfig) -> None:
    if config.init_latent_from is None:
        return
    llama = latent_start(config.init_latent_from, shape)
    facts = (config.init_latent_from, llama.shape.layers, llama.parameters, ",".join(llama.left_out))
    logger.info("latent transformer starts from=%s layers=%d parameters=%d left_out=%s", *facts)
    print_latent_start(llama, config)


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
