"""The trainer: a dataset and a model's shape in, a trained model out, through Ray Train.

In: the root of a dataset (documents for an entropy model, patches for a BLT). Out: OUTPUT/model, which `blt.load` or
`blt.load_entropy_model` reads; OUTPUT/metrics.jsonl, tensorboard and timeline; OUTPUT/checkpoints/RUN/step-N.
The run's name derives from what decides its weights, so a trainer started again on the same output finds it and goes
on from its newest checkpoint, with as many workers as there are now.
"""

import logging
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

import ray
from ray._raylet import PlacementGroupID
from ray.exceptions import RayActorError, RayTaskError
from ray.train import ControllerError, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

from blt.entropy_model import EntropyModelConfig
from blt.errors import ConfigError, TrainingError
from blt.model import BLTConfig
from pipelines.environment import environment_defaults
from pipelines.log_line import add_fields
from pipelines.manifest import read_manifest
from pipelines.model_files import store_model
from pipelines.storage import Storage
from pipelines.train.account import Account
from pipelines.train.checkpoints import CHECKPOINTS_NAME, Checkpoints
from pipelines.train.checks import check_data, check_survival
from pipelines.train.config import TrainConfig
from pipelines.train.elastic import ElasticCallback, too_many_failures
from pipelines.train.index import build_index
from pipelines.train.job import TrainJob
from pipelines.train.metrics import Record, read_metrics
from pipelines.train.recorder import RecorderConfig, RecorderHandle, start_recorder
from pipelines.train.replicated import replicated_backend
from pipelines.train.sequence_estimate import mean_patch_bytes
from pipelines.train.start import check_start, resolved
from pipelines.train.survival import Cluster
from pipelines.train.timeline import Event
from pipelines.train.told_sources import training_sources, write_sources
from pipelines.train.worker import train_worker

logger = logging.getLogger(__name__)

MODEL_NAME = "model"
FOLLOW_SECONDS = 0.5
CUBLAS_WORKSPACES = "CUBLAS_WORKSPACE_CONFIG"
RESIZE_SECONDS = 15.0
"""Between looks for nodes that a group could grow onto."""


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
    account: Account
    """What interruptions cost."""


def resolve_job(
    config: TrainConfig, model: BLTConfig | EntropyModelConfig, data: str, output: str, entropy_model: str | None = None
) -> TrainJob:
    """Check a run against its data and index the data. ConfigError or DataError where they do not fit."""
    manifest, is_blt = check_data(config, model, data, entropy_model), isinstance(model, BLTConfig)
    patches = config.sequence_patches if is_blt else None
    return TrainJob(
        kind="blt" if is_blt else "entropy_model",
        config=resolved(TrainConfig(**{item.name: getattr(config, item.name) for item in fields(TrainConfig)})),
        model=model,
        data=Storage(data).root_uri,
        train_index=build_index(data, "train", patches, config.sequence_bytes),
        valid_index=build_index(data, "valid", patches, config.sequence_bytes),
        output=Storage(output).root_uri,
        mean_patch_bytes=mean_patch_bytes(manifest.split("train")),
        patching=manifest.patching,
        entropy_model=None if entropy_model is None else Storage(entropy_model).root_uri,
        init_fingerprint=check_start(config, model, manifest.patching),
    )


def train(job: TrainJob, on_step: Callable[[Record], None] = lambda record: None) -> TrainResult:
    """Run a job to its end, or on from where it stood; `on_step` gets each metrics record as it is written."""
    add_fields(metrics_run=job.run)
    check_survival(job.config)
    checkpoints = Checkpoints(job.output, job.run, job.config.keep_checkpoints)
    _check_output(job)
    if not job.config.wait_for_resources:
        _check_resources(job.config)
    if steps := checkpoints.steps():
        logger.info("going on from a checkpoint run=%s step=%d", job.run, steps[0])
    recorder = start_recorder(
        RecorderConfig(
            output=job.output,
            run=job.run,
            log_every=job.config.log_every,
            checkpoint_every=job.config.checkpoint_every,
            steps=job.config.steps,
            flops_per_byte=job.flops_per_byte,
        )
    )
    ray.get(recorder.started.remote())
    with _followed(recorder, on_step):
        _fit(job, recorder, checkpoints)
    _check_whole(job, checkpoints)
    account: Account = ray.get(recorder.account.remote())
    fault: str | None = ray.get(recorder.close.remote())
    result = None if fault is not None else _result(job, account)
    _export(job, checkpoints, result)
    checkpoints.clean()
    if result is None:
        raise TrainingError(f"{job.output}: the model is there, but not all of the run could be recorded: {fault}")
    _tell(account)
    return result


def _fit(job: TrainJob, recorder: RecorderHandle, checkpoints: Checkpoints) -> None:
    """Have the workers train. TrainingError with what a worker told last if that is nothing a retry mends."""
    while True:
        try:
            with environment_defaults(_ray_train_settings(job.config)), _placement_groups_removed():
                _fit_once(job, recorder)
            return
        except Exception as error:
            message: str | None = ray.get(recorder.failure.remote())
            if message is not None:
                raise TrainingError(message) from error
            if job.config.steps in checkpoints.steps():
                logger.warning("the run is whole, though Ray Train gave it up: %s", error)
                return
            if not _is_death_met_by_the_controller(error):
                raise
            recorder.event.remote("failure", "Ray Train gave up at the death of a worker")
            failures: int = ray.get(recorder.failures.remote())
            if failures > job.config.max_failures:
                raise TrainingError(too_many_failures(failures, job.config.max_failures, str(error))) from error
            logger.warning("Ray Train gave up at the death of a worker, starting the workers again: %s", error)


def _fit_once(job: TrainJob, recorder: RecorderHandle) -> None:
    config = job.config
    with tempfile.TemporaryDirectory(prefix="blt-train-") as directory:
        TorchTrainer(
            train_worker,  # type: ignore[arg-type]  # takes what it is given instead of a dict
            train_loop_config=(job, Cluster(recorder, ray.util.get_node_ip_address())),  # type: ignore[arg-type]
            scaling_config=_scaling(config),
            torch_config=_backend(config),
            run_config=RunConfig(  # type: ignore[call-arg]  # Ray's types are those of an earlier version
                name=job.run,
                storage_path=directory,  # Ray's own notes: checkpoints are ours
                failure_config=FailureConfig(max_failures=-1),  # the callback counts
                callbacks=[ElasticCallback(recorder, config.max_failures)],  # type: ignore[list-item]
                worker_runtime_env={"env_vars": _worker_environment(config)},
            ),
        ).fit()


@contextmanager
def _placement_groups_removed() -> Iterator[None]:
    """Gives back what the block reserved if it fails.

    A controller that gives up while its workers start leaves their placement group behind, and Ray keeps it as long as
    this job is alive: the next try would wait for the same CPUs for ever.
    """
    before = _own_placement_groups()
    try:
        yield
    except Exception:
        for group in _own_placement_groups() - before:
            logger.warning("giving back what Ray Train left reserved placement_group=%s", group)
            remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(group)))
        raise


def _own_placement_groups() -> set[str]:
    """Ids of this job's placement groups that hold or ask for resources; an id ends with that of its job."""
    job = ray.get_runtime_context().get_job_id()
    table = placement_group_table()
    return {group for group, info in table.items() if group.endswith(job) and info["state"] != "REMOVED"}


def _is_death_met_by_the_controller(error: Exception) -> bool:
    """Ray Train gives a run up when it meets a dead worker elsewhere than in its regular look at all of them: as an
    actor that does not answer, or as an error of another that waited for it.
    """
    return isinstance(error, ControllerError) and isinstance(error.controller_failure, RayActorError | RayTaskError)


def _scaling(config: TrainConfig) -> ScalingConfig:
    resources = {"CPU": config.cpus_per_worker} | ({"GPU": config.gpus_per_worker} if config.gpus_per_worker else {})
    least = _least_workers(config)
    return ScalingConfig(
        num_workers=(least, config.workers) if least < config.workers else config.workers,  # type: ignore[arg-type]
        use_gpu=config.gpus_per_worker > 0,
        resources_per_worker=resources,
        elastic_resize_monitor_interval_s=RESIZE_SECONDS,  # type: ignore[call-arg]
    )


def _least_workers(config: TrainConfig) -> int:
    """The smallest group that a run starts with. Replica groups begin with all and may then do with fewer."""
    return config.min_workers or config.workers if config.survival == "sharded" else config.workers


def _backend(config: TrainConfig) -> TorchConfig:
    if config.survival == "replicated":
        return replicated_backend(ray.util.get_node_ip_address(), config.min_workers or 1)
    # A collective that waits longer than this for a worker is given up, and with it the group.
    seconds = max(round(config.hang_seconds), 1)
    return TorchConfig(backend="nccl" if config.gpus_per_worker else "gloo", timeout_s=seconds)


def _ray_train_settings(config: TrainConfig) -> dict[str, str]:
    """Ray Train's settings that come from the environment."""
    return {
        "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": f"{config.hang_seconds:g}",
        "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
        # After a node is lost, the old size is tried for so long before the smaller one.
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",
    }


def _worker_environment(config: TrainConfig) -> dict[str, str]:
    """Variables that a worker's process must be started with."""
    if not config.deterministic:
        return {}
    # cuBLAS repeats its sums only with workspaces of fixed size, and torch refuses its products without.
    return {CUBLAS_WORKSPACES: os.environ.get(CUBLAS_WORKSPACES, ":4096:8")}


def _check_whole(job: TrainJob, checkpoints: Checkpoints) -> None:
    """TrainingError unless there is the checkpoint of the last step."""
    steps = checkpoints.steps()
    if not steps or steps[0] != job.config.steps:
        raise TrainingError(f"{job.output}: the run ended at step {steps[0] if steps else 0} of {job.config.steps}")


def _export(job: TrainJob, checkpoints: Checkpoints, result: TrainResult | None) -> None:
    """OUTPUT/model from the checkpoint of the last step; it tells the figures of the run, if they were recorded."""
    model = job.without_weights()
    checkpoints.load_model(job.config.steps, model.state_dict())
    with tempfile.TemporaryDirectory(prefix="blt-model-") as directory:
        job.save_model(model, Path(directory), _provenance(job, result))
        store_model(directory, f"{job.output}/{MODEL_NAME}")


def _provenance(job: TrainJob, result: TrainResult | None) -> dict[str, str]:
    """What the model's directory tells of the run: its card is filled from this."""
    told = {"run": job.fingerprint, "step": str(job.config.steps), "data": job.train_index.dataset}
    told["sources"] = write_sources(training_sources(read_manifest(job.data), job.config.sources))
    if result is not None:
        told |= {"bytes": str(result.bytes), "valid_bpb": f"{result.valid_bpb:.4f}"}
    for key in ("init_from", "init_latent_from"):
        if (given := getattr(job.config, key)) is not None:
            told[key] = f"{given.rstrip('/').rpartition('/')[2]} ({job.init_fingerprint})"
    return told


def _tell(account: Account) -> None:
    for one in account.interruptions:
        logger.info(
            "interruption cause=%s step=%d steps_redone=%d tries_lost=%d seconds_lost=%.1f detail=%s",
            *(one.cause, one.step, one.steps_redone, one.tries_lost, one.seconds_lost, one.detail),
        )
    logger.info(
        "account steps=%d steps_redone=%d seconds=%.1f seconds_lost=%.1f goodput=%.4f checkpoints=%d",
        *(account.steps, account.steps_redone, account.seconds, account.seconds_lost, account.goodput),
        account.checkpoints,
    )


def _check_output(job: TrainJob) -> None:
    """ConfigError if the output holds an unfinished run that is another one."""
    runs = {path.split("/")[1] for path in Storage(job.output).list(CHECKPOINTS_NAME)}
    if runs and job.run not in runs:
        raise ConfigError(
            f"{job.output}: holds an unfinished run of another configuration or other data ({min(runs)}); "
            "choose another output, or remove that directory"
        )


def _check_resources(config: TrainConfig) -> None:
    """ConfigError if the cluster cannot hold the workers; Ray Train would wait for them without end."""
    found, least = ray.cluster_resources(), _least_workers(config)
    for kind, each in (("CPU", config.cpus_per_worker), ("GPU", config.gpus_per_worker)):
        if least * each > found.get(kind, 0):
            raise ConfigError(
                f"workers {least} of {kind.lower()}s_per_worker {each:g} need {least * each:g} "
                f"{kind}s, the cluster has {found.get(kind, 0):g}; ask for less, or set wait_for_resources=true on an "
                "autoscaling cluster"
            )


def _result(job: TrainJob, account: Account) -> TrainResult:
    records = read_metrics(job.output)
    steps = [record for record in records if "train/loss" in record]
    valid = [record for record in records if "valid/bpb" in record]

    def median(name: str) -> float:
        return sorted(record[name] for record in steps)[len(steps) // 2]

    return TrainResult(
        model=f"{job.output}/{MODEL_NAME}",
        steps=job.config.steps,
        bytes=round(sum(record["train/bytes"] for record in steps)),
        loss=steps[-1]["train/loss"],
        valid_bpb=valid[-1]["valid/bpb"],
        bytes_per_second=median("train/bytes_per_second"),
        data_wait_fraction=median("train/data_wait_fraction"),
        account=account,
    )


@contextmanager
def _followed(recorder: RecorderHandle, on_step: Callable[[Record], None]) -> Iterator[None]:
    """Call `on_step` for the records that are written meanwhile, and log what happens to the run."""
    ended = threading.Event()

    def follow() -> None:
        seen, events_seen, last_round = int(ray.get(recorder.num_records.remote())), 0, False
        while not last_round:
            last_round = ended.wait(FOLLOW_SECONDS)
            records: tuple[list[Record], int] = ray.get(recorder.records_since.remote(seen))
            events: tuple[list[Event], int] = ray.get(recorder.events_since.remote(events_seen))
            seen, events_seen = records[1], events[1]
            for record in records[0]:
                on_step(record)
            for event in events[0]:
                logger.warning("training event cause=%s detail=%s", event.cause, event.detail)

    thread = threading.Thread(target=follow, name="follow-metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
