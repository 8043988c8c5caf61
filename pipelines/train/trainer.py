"""The trainer: a dataset and a model's shape in, a trained model out, through Ray Train.

In: the root of a dataset (documents for an entropy model, patches for a BLT). Out: OUTPUT/model, which `blt.load` or
`blt.load_entropy_model` reads; OUTPUT/metrics.jsonl; OUTPUT/tensorboard; OUTPUT/checkpoints/RUN/step-N.
The run's name derives from what decides its weights, so a trainer started again on the same output finds it and goes
on from its newest checkpoint.
"""

import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

import ray
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from blt.entropy_model import EntropyModelConfig
from blt.errors import ConfigError, DataError
from blt.model import BLTConfig
from pipelines.manifest import SPLITS, read_manifest
from pipelines.storage import Storage
from pipelines.train.config import TrainConfig
from pipelines.train.index import build_index
from pipelines.train.job import TrainJob, check_entropy_model
from pipelines.train.metrics import metrics_size, read_metrics, read_metrics_from
from pipelines.train.state import MODEL_NAME, TRAINING_NAME, read_training_state
from pipelines.train.worker import train_worker

logger = logging.getLogger(__name__)

CHECKPOINTS_NAME = "checkpoints"
FOLLOW_SECONDS = 0.5


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a finished run reached."""

    model: str
    """Directory of the trained model."""
    steps: int
    bytes: int
    """Document bytes trained on, repeats counted."""
    loss: float
    """Nats per target, last record."""
    valid_bpb: float
    """Bits per byte of the whole held-out split, in the sequences of training."""
    bytes_per_second: float
    """Median over the records."""
    data_wait_fraction: float
    """Median over the records."""


def resolve_job(
    config: TrainConfig, model: BLTConfig | EntropyModelConfig, data: str, output: str, entropy_model: str | None = None
) -> TrainJob:
    """Check a run against its data and index the data. ConfigError or DataError where they do not fit."""
    manifest, is_blt = read_manifest(data), isinstance(model, BLTConfig)
    wanted = "patches" if is_blt else "documents"
    if manifest.kind != wanted:
        raise DataError(f"{data} holds {manifest.kind}, but this training needs {wanted}")
    for split in SPLITS:
        if not sum(shard.bytes for shard in manifest.split(split)):
            raise DataError(f"{data}: the {split} split holds no bytes")
    if is_blt:
        check_entropy_model(manifest, data, entropy_model)
    patches = config.sequence_patches if is_blt else None
    return TrainJob(
        kind="blt" if is_blt else "entropy_model",
        config=TrainConfig(**{item.name: getattr(config, item.name) for item in fields(TrainConfig)}),
        model=model,
        data=Storage(data).root_uri,
        train_index=build_index(data, "train", patches, config.sequence_bytes),
        valid_index=build_index(data, "valid", patches, config.sequence_bytes),
        run_directory=_local_directory(output),
        patching=manifest.patching,
        entropy_model=None if entropy_model is None else Storage(entropy_model).root_uri,
    )


def train(job: TrainJob, on_step: Callable[[dict[str, float]], None] = lambda record: None) -> TrainResult:
    """Run a job to its end, or on from where it stood; `on_step` gets each metrics record as it is written."""
    config, run = job.config, Path(job.run_directory) / CHECKPOINTS_NAME / job.fingerprint[:16]
    _check_output(run)
    if not config.wait_for_resources:
        _check_resources(config)
    resources = {"CPU": config.cpus_per_worker} | ({"GPU": config.gpus_per_worker} if config.gpus_per_worker else {})
    trainer = TorchTrainer(
        train_worker,  # type: ignore[arg-type]  # takes the job as it is instead of a dict
        train_loop_config=job,  # type: ignore[arg-type]
        scaling_config=ScalingConfig(
            num_workers=config.workers, use_gpu=config.gpus_per_worker > 0, resources_per_worker=resources
        ),
        torch_config=TorchConfig(backend="nccl" if config.gpus_per_worker else "gloo"),
        run_config=RunConfig(
            name=run.name,
            storage_path=str(run.parent),
            checkpoint_config=CheckpointConfig(num_to_keep=config.keep_checkpoints),
            failure_config=FailureConfig(max_failures=config.max_failures),
        ),
    )
    if newest := max(run.glob(f"step-*/{TRAINING_NAME}"), default=None):
        logger.info("going on from a checkpoint path=%s", newest.parent)
    with _followed(job.run_directory, on_step):
        result = trainer.fit()
    if result.checkpoint is None:
        raise DataError(f"{job.run_directory}: the run ended without a checkpoint")
    with result.checkpoint.as_directory() as directory:
        steps = read_training_state(Path(directory), job.fingerprint).steps_done
        if steps != config.steps:
            raise DataError(f"{job.run_directory}: the run ended at step {steps} of {config.steps}")
        _replace_directory(Path(directory) / MODEL_NAME, Path(job.run_directory) / MODEL_NAME)
    return _result(job)


def _check_output(run: Path) -> None:
    """ConfigError if the output holds an unfinished run that is another one."""
    others = [path.name for path in run.parent.glob("*") if path.is_dir() and path.name != run.name]
    if others and not run.exists():
        raise ConfigError(
            f"{run.parent.parent}: holds an unfinished run of another configuration or other data "
            f"({others[0]}); choose another output, or remove that directory"
        )


def _check_resources(config: TrainConfig) -> None:
    """ConfigError if the cluster cannot hold the workers; Ray Train would wait for them without end."""
    found = ray.cluster_resources()
    for kind, each in (("CPU", config.cpus_per_worker), ("GPU", config.gpus_per_worker)):
        if config.workers * each > found.get(kind, 0):
            raise ConfigError(
                f"workers {config.workers} of {kind.lower()}s_per_worker {each:g} need {config.workers * each:g} "
                f"{kind}s, the cluster has {found.get(kind, 0):g}; ask for less, or set wait_for_resources=true on an "
                "autoscaling cluster"
            )


def _local_directory(output: str) -> str:
    storage = Storage(output)
    if not storage.is_local:
        raise ConfigError(f'key "output": training writes to a local or shared directory, got {output}')
    os.makedirs(storage.root_uri, exist_ok=True)
    return storage.root_uri


def _replace_directory(source: Path, target: Path) -> None:
    """Copy `source` to `target`, whole or not at all."""
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(source, temporary)
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)


def _result(job: TrainJob) -> TrainResult:
    records = read_metrics(job.run_directory)
    steps = [record for record in records if "train/loss" in record]
    valid = [record for record in records if "valid/bpb" in record]

    def median(name: str) -> float:
        return sorted(record[name] for record in steps)[len(steps) // 2]

    return TrainResult(
        model=str(Path(job.run_directory) / MODEL_NAME),
        steps=job.config.steps,
        bytes=round(sum(record["train/bytes"] for record in steps)),
        loss=steps[-1]["train/loss"],
        valid_bpb=valid[-1]["valid/bpb"],
        bytes_per_second=median("train/bytes_per_second"),
        data_wait_fraction=median("train/data_wait_fraction"),
    )


@contextmanager
def _followed(run_directory: str, on_step: Callable[[dict[str, float]], None]) -> Iterator[None]:
    """Call `on_step` for the records that the worker writes meanwhile: Ray Train itself reports checkpoints only."""
    ended = threading.Event()

    def follow() -> None:
        seen = metrics_size(run_directory)
        while True:
            last_round = ended.wait(FOLLOW_SECONDS)
            if metrics_size(run_directory) < seen:  # a resumed run dropped the records of steps that it does again
                seen = 0
            records, seen = read_metrics_from(run_directory, seen)
            for record in records:
                on_step(record)
            if last_round:
                return

    thread = threading.Thread(target=follow, name="follow-metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
