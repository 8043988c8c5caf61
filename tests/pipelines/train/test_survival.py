"""Workers, nodes and drivers die, stop and come: the run ends with the loss curve of one that nothing happened to.

Everything is real: Ray Train groups, raylets, signals. The curve is computed without any of it (`tiny_run`).
"""

import contextlib
import dataclasses
import functools
import itertools
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.core.generated.autoscaler_pb2 import DrainNodeReason
from ray.exceptions import RayActorError
from ray.train import ControllerError
from ray.train.torch import TorchConfig

# isort: split
import psutil  # bundled with Ray, which puts it on the path

# isort: split

from blt.checkpoint import load
from blt.errors import TrainingError
from blt.optim import OptimizerConfig
from pipelines.model_files import local_model
from pipelines.train import trainer
from pipelines.train.account import Account
from pipelines.train.config import TrainConfig
from pipelines.train.job import TrainJob
from pipelines.train.recorder import RecorderHandle
from pipelines.train.timeline import Event, read_timeline
from pipelines.train.trainer import train
from tests import waiting
from tests.llama_checkpoint import write_llama
from tests.pipelines.train.other_workers import SLOW_MARK, slow_train_worker, train_worker_with_a_fake_gpu
from tests.pipelines.train.tiny_run import assert_follows, expected_curve, tiny_job, told_steps, write_tiny_patches
from tests.processes import kill_all
from tests.raylets import raylets
from tests.s3_server import S3Server

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(400)]

PATIENCE_SECONDS = 150.0
wait_for = functools.partial(waiting.wait_for, seconds=PATIENCE_SECONDS)
ON_NODES: Mapping[str, float] = MappingProxyType({"cpus_per_worker": 1.0, "gpus_per_worker": 1.0})
"""What a worker takes of a node of `cluster`."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tiny_patches(tmp_path_factory.mktemp("survival") / "patches")


def worker_processes() -> list[psutil.Process]:
    """The training workers below this process, oldest first; those of other Rays on the machine are not touched."""
    found = [process for process in psutil.Process().children(recursive=True) if _is_worker(process)]
    return sorted(found, key=lambda process: process.create_time())


def _is_worker(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return any("RayTrainWorker" in part for part in process.cmdline())
    return False


class Disturbance(threading.Thread):
    """Does something once the run has made so many updates; `join` passes on what went wrong."""

    def __init__(self, job: TrainJob, after_step: int, what: Callable[[], object]) -> None:
        super().__init__(name="disturbance", daemon=True)
        self._job, self._after, self._what = job, after_step, what
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            wait_for(lambda: any(s.step >= self._after for s in told_steps(self._job.output)), f"step {self._after}")
            self._what()
        except BaseException as error:
            self.error = error

    def finish(self) -> None:
        self.join(PATIENCE_SECONDS)
        assert not self.is_alive()
        if self.error is not None:
            raise self.error


def disturbed(job: TrainJob, *disturbances: tuple[int, Callable[[], object]]) -> Account:
    """The account of a run in which things happen after steps."""
    threads = [Disturbance(job, step, what) for step, what in disturbances]
    for thread in threads:
        thread.start()
    account = train(job).account
    for thread in threads:
        thread.finish()
    return account


def send(number: int, worker: int = 0) -> Callable[[], None]:
    """Send a signal to one of the workers."""

    def act() -> None:
        worker_processes()[worker].send_signal(number)

    return act


@pytest.fixture
def slow_mark(tmp_path: Path) -> Path:
    """While it is there, steps of slow workers take long."""
    (tmp_path / SLOW_MARK).touch()
    return tmp_path / SLOW_MARK


@pytest.mark.usefixtures("ray_local")
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_the_loss_curve_is_the_same_at_any_number_of_workers(data: str, tmp_path: Path, workers: int) -> None:
    job = tiny_job(data, tmp_path / "run", workers=workers, steps=100 if workers == 3 else 50)
    account = train(job).account
    assert_follows(job.output, expected_curve(job))
    assert (account.interruptions, account.goodput) == ((), 1.0)
    assert {step.workers for step in told_steps(job.output)} == {workers}


@pytest.mark.usefixtures("ray_local")
@pytest.mark.parametrize("survival", ["sharded", "replicated"])
def test_kill_9_of_a_worker(
    data: str, tmp_path: Path, slow_mark: Path, monkeypatch: pytest.MonkeyPatch, survival: str
) -> None:
    """Of a run that started from a Llama, its latent transformer with a rate of its own."""
    monkeypatch.setattr(trainer, "train_worker", slow_train_worker)
    write_llama(tmp_path / "llama")
    given = {"survival": survival, "init_latent_from": str(tmp_path / "llama")}
    job = tiny_job(data, tmp_path / "run", workers=3, steps=200, **given)
    assert job.config.optimizer.latent_lr_scale == 0.1

    def kill() -> None:
        worker_processes()[1].kill()
        wait_for(lambda: any(isinstance(one, Event) for one in read_timeline(job.output)), "word of the death")
        slow_mark.unlink()

    account = disturbed(job, (20, kill))
    assert_follows(job.output, expected_curve(job))
    assert "failure" in {one.cause for one in account.interruptions}
    if survival == "replicated":
        assert account.steps_redone == 0
        assert 2 in {step.workers for step in told_steps(job.output)}
    else:
        assert account.steps_redone <= 2 * job.config.checkpoint_every  # the newest may not have been whole yet
    assert account.seconds_lost > 0


@pytest.mark.usefixtures("ray_local")
def test_a_replacement_that_dies_at_once(
    data: str, tmp_path: Path, slow_mark: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The controller is still busy with it then, and not with its regular look at all workers."""
    monkeypatch.setattr(trainer, "train_worker", slow_train_worker)
    job = tiny_job(data, tmp_path / "run", workers=3, steps=200, survival="replicated")

    def kill_two() -> None:
        before, new = set(worker_processes()), set[psutil.Process]()

        def is_replaced() -> bool:
            new.update(set(worker_processes()) - before)
            return bool(new)

        worker_processes()[1].kill()
        wait_for(is_replaced, "the replacement")
        new.pop().kill()
        slow_mark.unlink()

    account = disturbed(job, (20, kill_two))
    assert_follows(job.output, expected_curve(job))
    assert len([one for one in account.interruptions if one.cause == "failure"]) >= 1
    assert account.steps == 200


@pytest.mark.usefixtures("ray_local")
def test_a_run_that_ray_train_gave_up_after_a_death(data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is started again, max_failures times; after anything else that Ray Train gives a run up for it is not."""
    start, met, begun = trainer._fit_once, iter([RayActorError(), None]), []

    def give_up(job: TrainJob, recorder: RecorderHandle) -> None:
        begun.append(job.output)
        if (error := next(met)) is not None:
            raise ControllerError(error)
        start(job, recorder)

    monkeypatch.setattr(trainer, "_fit_once", give_up)
    job = tiny_job(data, tmp_path / "run", workers=1, steps=10, max_failures=2)
    assert train(job).account.steps == 10
    assert [one.cause for one in read_timeline(job.output) if isinstance(one, Event)] == ["failure"]
    assert_follows(job.output, expected_curve(job))
    assert len(begun) == 2
    begun.clear()
    met = itertools.repeat(RayActorError())
    with pytest.raises(TrainingError, match="3 failures without a new step between them, max_failures is 2"):
        train(tiny_job(data, tmp_path / "dies", workers=1, steps=10, max_failures=2))
    assert len(begun) == 3
    met = iter([ValueError("another")])
    with pytest.raises(ControllerError, match="another"):
        train(tiny_job(data, tmp_path / "other", workers=1, steps=10))


@pytest.mark.usefixtures("ray_local")
@pytest.mark.parametrize("survival", ["sharded", "replicated"])
def test_a_stopped_worker_is_ended(
    data: str, tmp_path: Path, slow_mark: Path, monkeypatch: pytest.MonkeyPatch, survival: str
) -> None:
    """SIGSTOP: it neither works nor dies, and cannot do what it is asked to. It alone is ended."""
    monkeypatch.setattr(trainer, "train_worker", slow_train_worker)
    job = tiny_job(data, tmp_path / "run", workers=3, steps=120, survival=survival, hang_seconds=20.0)

    def stop() -> None:
        stopped = worker_processes()[0]
        stopped.send_signal(signal.SIGSTOP)
        wait_for(lambda: not stopped.is_running(), "the end of the stopped process")
        slow_mark.unlink()

    account = disturbed(job, (20, stop))
    assert_follows(job.output, expected_curve(job))
    assert {"hang", "failure"} & {one.cause for one in account.interruptions}
    if survival == "replicated":
        assert account.steps_redone == 0


@pytest.mark.s3
@pytest.mark.parametrize("survival", ["sharded", "replicated"])
def test_a_run_on_s3_goes_on_after_its_worker_died(s3: S3Server, ray_local: None, data: str, survival: str) -> None:
    """On S3 the timeline is stored with every checkpoint: what it tells of is some steps ago."""
    job = tiny_job(data, s3.url(f"survival/{survival}"), workers=2, steps=200, survival=survival, checkpoint_every=5)
    account = disturbed(job, (5, send(signal.SIGKILL, 1)))
    assert_follows(job.output, expected_curve(job))
    assert "failure" in {one.cause for one in account.interruptions}
    assert load(local_model(f"{job.output}/model")).provenance["step"] == "200"


@pytest.mark.usefixtures("ray_local")
def test_a_loss_that_is_not_finite_ends_the_run_at_once(data: str, tmp_path: Path) -> None:
    job = tiny_job(data, tmp_path / "run", workers=2, optimizer=_diverging())
    with pytest.raises(TrainingError, match=r"step \d+: the loss .* is not finite"):
        train(job)
    assert len({step.step for step in told_steps(job.output)}) == len(told_steps(job.output)), "nothing was tried again"


@pytest.mark.usefixtures("ray_local")
def test_updates_that_are_not_finite_can_be_left_out(data: str, tmp_path: Path) -> None:
    job = tiny_job(data, tmp_path / "run", workers=2, optimizer=_diverging(), nonfinite="skip", steps=12)
    account = train(job).account
    assert account.steps == 12
    assert "skipped" in {one.cause for one in account.interruptions}


def _diverging() -> OptimizerConfig:
    return OptimizerConfig(lr=1e20, warmup_steps=0, schedule="constant", clip_norm=None)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A head without CPUs and three nodes of one CPU and one GPU each, on which workers compute with the CPU."""
    monkeypatch.setattr(trainer, "train_worker", train_worker_with_a_fake_gpu)
    monkeypatch.setattr(trainer, "_backend", _gloo(trainer._backend))
    with raylets(head_cpus=0, nodes=3, gpus=1) as cluster:
        yield cluster


def _gloo(backend: Callable[[TrainConfig], TorchConfig]) -> Callable[[TrainConfig], TorchConfig]:
    return lambda config: backend(dataclasses.replace(config, gpus_per_worker=0.0))


def drain(node_id: str) -> None:
    """Announce the loss of a node, as a cloud's notice of preemption does."""
    client = ray._private.worker.global_worker.gcs_client
    reason = DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION
    accepted, message = client.drain_node(node_id, reason, "preemption", int((time.time() + 120) * 1000))
    assert accepted, message


def test_nodes_go_and_come(cluster: Cluster, data: str, tmp_path: Path, slow_mark: Path) -> None:
    """One lost without notice (3 -> 2), one more (2 -> 3), one drained (3 -> 2): only the first costs steps."""
    job = tiny_job(data, tmp_path / "run", workers=3, min_workers=1, **ON_NODES, steps=160, checkpoint_every=20)

    def lose() -> None:
        lose_node(cluster)

    def add_when_two() -> None:
        wait_for(lambda: told_steps(job.output)[-1].workers == 2, "a group of two")
        cluster.add_node(num_cpus=1, num_gpus=1)

    def drain_when_three() -> None:
        wait_for(lambda: 2 in {s.workers for s in told_steps(job.output)}, "a group of two")
        wait_for(lambda: told_steps(job.output)[-1].workers == 3, "a group of three")
        drain(next(node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU")))
        wait_for(lambda: told_steps(job.output)[-1].workers == 2, "a group without the drained node")
        slow_mark.unlink()

    account = disturbed(job, (30, lose), (31, add_when_two), (32, drain_when_three))
    assert_follows(job.output, expected_curve(job))
    redone = {one.cause: one.steps_redone for one in account.interruptions}
    assert redone["failure"] <= 2 * job.config.checkpoint_every  # 0 if the node went just after a checkpoint
    assert (redone["growth"], redone["preemption"]) == (0, 0)
    assert [size for size, _ in itertools.groupby(s.workers for s in told_steps(job.output))] == [3, 2, 3, 2]


def lose_node(cluster: Cluster) -> None:
    """Kill the raylet of a node and all that runs below it; a worker alone may outlive its raylet."""
    raylet = psutil.Process(next(iter(cluster.worker_nodes)).all_processes["raylet"][0].process.pid)
    raylet.suspend()  # it starts no more
    kill_all([raylet, *raylet.children(recursive=True)])


@pytest.mark.parametrize("comes_back", [False, True])
def test_replicas_do_without_a_lost_node(
    cluster: Cluster, data: str, tmp_path: Path, slow_mark: Path, comes_back: bool
) -> None:
    """The others go on at once and to the end, no step lost; where another node comes, its worker joins them."""
    options: dict[str, Any] = {"workers": 3, "survival": "replicated", **ON_NODES}
    job = tiny_job(data, tmp_path / "run", **options, steps=150 if comes_back else 60)

    def lose() -> None:
        lose_node(cluster)
        wait_for(lambda: told_steps(job.output)[-1].workers == 2, "two workers that go on")
        if comes_back:
            cluster.add_node(num_cpus=1, num_gpus=1)
            wait_for(lambda: told_steps(job.output)[-1].workers == 3, "a worker on the other node")
        slow_mark.unlink()

    account = disturbed(job, (30, lose))
    assert_follows(job.output, expected_curve(job))
    assert account.steps_redone == 0
    workers = [size for size, _ in itertools.groupby(s.workers for s in told_steps(job.output))]
    assert workers == ([3, 2, 3] if comes_back else [3, 2])
