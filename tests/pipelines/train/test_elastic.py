"""The controller's end of a changing worker group: the hooks that Ray Train calls, and what counts as a failure."""

import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError
from ray.train import ControllerError
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)
from ray.train.v2._internal.execution import callback as callbacks
from ray.train.v2._internal.execution import context
from ray.train.v2._internal.execution.controller import state
from ray.train.v2._internal.execution.worker_group.poll import WorkerGroupPollStatus, WorkerStatus

from blt.errors import CheckpointStorageError, DataError, StorageError, TrainingError
from pipelines.train import elastic
from pipelines.train.changes import PreemptedError
from pipelines.train.elastic import ElasticCallback, RunIsOverError, is_fatal

HOOKS = [
    (callbacks.WorkerGroupCallback, "before_worker_group_start"),
    (callbacks.WorkerGroupCallback, "after_worker_group_training_start"),
    (callbacks.WorkerGroupCallback, "after_worker_group_poll_status"),
    (callbacks.ControllerCallback, "after_controller_state_update"),
    (callbacks.ControllerCallback, "before_controller_execute_resize_decision"),
    (callbacks.ControllerCallback, "before_controller_execute_failure_decision"),
]


@pytest.mark.parametrize(("base", "name"), HOOKS, ids=[name for _, name in HOOKS])
def test_ray_train_has_the_hooks_that_are_used(base: type, name: str) -> None:
    theirs, ours = getattr(base, name), getattr(ElasticCallback, name)
    assert list(inspect.signature(theirs).parameters) == list(inspect.signature(ours).parameters)


def test_ray_train_has_the_state_and_the_notice_that_are_looked_for() -> None:
    assert state.ResizingState.__name__ == "ResizingState"
    assert state.ReschedulingState.__name__ == "ReschedulingState"
    assert "preemption_context" in inspect.signature(context.TrainContext).parameters


class Told:
    """Stands for the recorder's actor; keeps the events."""

    def __init__(self) -> None:
        self.causes: list[str] = []
        self.details: list[str] = []
        self.event = SimpleNamespace(remote=self._tell)
        self.failures = SimpleNamespace(remote=lambda: len(self.causes))

    def _tell(self, cause: str, detail: str) -> None:
        self.causes.append(cause)
        self.details.append(detail)


class Group:
    """Stands for a worker group of three replicas; each look at it is the next of `looks`."""

    def __init__(self, *looks: WorkerGroupPollStatus) -> None:
        self.workers = [SimpleNamespace(actor=f"actor {rank}") for rank in range(3)]
        self._looks = list(looks)
        self.latest = self._looks.pop(0) if looks else None

    def get_workers(self) -> list[Any]:
        return self.workers

    def has_started(self) -> bool:
        return True

    def get_latest_poll_status(self) -> WorkerGroupPollStatus | None:
        return self.latest

    def poll_status(self, timeout: float) -> None:
        self.latest = self._looks.pop(0)


@pytest.fixture(autouse=True)
def _answers_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elastic.ray, "get", lambda answer: answer)


def made(told: Told, max_failures: int, group: Any = None) -> ElasticCallback:
    """A callback whose group has begun."""
    callback = ElasticCallback(told, max_failures)
    callback.after_worker_group_training_start(group or Group())
    return callback


def polled(callback: ElasticCallback, errors: dict[int, Exception]) -> None:
    """The controller looks at the workers, and decides what to do of errors."""
    callback.after_worker_group_poll_status(SimpleNamespace(errors=errors))
    if errors:
        callback.before_controller_execute_failure_decision(None)


def test_failures_are_recovered_from_until_there_are_too_many() -> None:
    told, group = Told(), Group()
    callback = made(told, 2, group)
    for actor in ("first", "second"):
        group.workers[1].actor = actor
        polled(callback, {})
        polled(callback, {1: RuntimeError("connection lost")})
    with pytest.raises(TrainingError, match=r"3 failures without .*, max_failures is 2; the last: .*still waiting"):
        polled(callback, {0: WorkerHealthCheckTimeoutError("still waiting")})
    assert told.causes == ["failure", "failure", "hang"]


def test_workers_that_never_start_end_the_run() -> None:
    """Ray Train would start them without end: a node on which a library is missing, say."""
    told = Told()
    callback = made(told, max_failures=1)
    failed = state.ReschedulingState(ControllerError(WorkerGroupStartupFailedError("no module named torch")))
    callback.after_controller_state_update(state.SchedulingState(None), failed)
    callback.before_controller_execute_failure_decision(None)
    callback.after_controller_state_update(state.SchedulingState(None), failed)
    assert told.causes == ["failure", "failure"]
    with pytest.raises(TrainingError, match=r"2 failures without .*no module named torch"):
        callback.before_controller_execute_failure_decision(None)


def test_waiting_for_places_is_no_failure() -> None:
    told = Told()
    callback = made(told, max_failures=0)
    waits = state.ReschedulingState(ControllerError(WorkerGroupStartupTimeoutError(3)))
    callback.after_controller_state_update(state.SchedulingState(None), waits)
    callback.before_controller_execute_failure_decision(None)
    assert told.causes == []


def test_an_error_that_is_looked_at_again_and_again_is_one() -> None:
    """The controller waits for the other workers of an announced loss, and looks several times a second."""
    told = Told()
    callback = made(told, max_failures=1)
    for _ in range(5):
        polled(callback, {1: RuntimeError("connection lost")})
    polled(callback, {1: RuntimeError("connection lost"), 2: PreemptedError("all workers have saved")})
    assert told.causes == ["failure", "preemption"]


def test_an_announced_preemption_is_no_failure() -> None:
    told = Told()
    callback = made(told, max_failures=0)
    polled(callback, {0: RuntimeError("peer left"), 1: PreemptedError("all workers have saved")})
    assert told.causes == ["preemption"]
    assert told.details == ["a node will go: all workers have saved"]


class PreemptedActorError(ActorDiedError):
    """Of an actor on a node whose loss was announced."""

    preempted = property(lambda self: True)


def test_a_node_that_goes_as_announced_before_all_have_saved_is_no_failure() -> None:
    told = Told()
    callback = made(told, max_failures=0)
    polled(callback, {1: WorkerHealthCheckFailedError("gone", PreemptedActorError(cause=None))})
    assert told.causes == ["preemption"]


def test_what_another_try_would_repeat_ends_the_run() -> None:
    callback = made(Told(), max_failures=9)
    with pytest.raises(TrainingError, match=r"x\.parquet: is gone"):
        polled(callback, {0: RuntimeError("peer left"), 1: DataError("x.parquet: is gone")})


@pytest.mark.parametrize("error", [StorageError("s3://b/x: slow down"), CheckpointStorageError("cannot be read")])
def test_storage_that_fails_now_is_tried_again(error: Exception) -> None:
    told = Told()
    polled(made(told, max_failures=1), {0: error})
    assert told.causes == ["failure"]
    assert not is_fatal(error)


def test_changes_of_size_are_told() -> None:
    told = Told()
    callback = ElasticCallback(told, max_failures=0)
    for size in (3, 2, 2, 3):
        callback.after_worker_group_training_start(SimpleNamespace(get_workers=lambda size=size: range(size)))
    assert told.causes == ["shrink", "growth"]


def status(*replicas: str) -> WorkerGroupPollStatus:
    """What a look at replicas that run, are done or are dead gives."""
    statuses = {
        rank: WorkerStatus(running=word == "runs", error=RuntimeError("gone") if word == "dead" else None)
        for rank, word in enumerate(replicas)
    }
    return WorkerGroupPollStatus(
        worker_statuses=statuses, worker_rank_to_replica_group_rank={rank: rank for rank in statuses}
    )


def replaces(monkeypatch: pytest.MonkeyPatch, *looks: WorkerGroupPollStatus, room: Callable[[], bool]) -> Group:
    """The controller is about to replace what is dead, at the first of `looks`."""
    monkeypatch.setattr(elastic, "LOOK_SECONDS", 0.001)
    monkeypatch.setattr(elastic, "_has_room", lambda group: room())
    group = Group(*looks)
    made(Told(), 0, group).before_controller_execute_resize_decision(None)
    return group


def test_a_dead_replica_is_replaced_once_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    answers, looks = iter([False, False, True]), [status("runs", "dead", "runs")] * 3
    group = replaces(monkeypatch, *looks, room=lambda: next(answers))
    assert group._looks == []
    assert next(answers, None) is None


def test_a_dead_replica_is_not_waited_for_once_the_others_are_done(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = [status("runs", "dead", "runs"), status("runs", "dead", "done"), status("done", "dead", "done")]
    with pytest.raises(RunIsOverError):
        replaces(monkeypatch, *looks, room=lambda: False)


def test_a_group_whose_replicas_all_died_starts_again(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = [status("dead", "dead", "runs"), status("dead", "dead", "dead")]
    assert replaces(monkeypatch, *looks, room=lambda: False)._looks == []


def test_workers_of_one_group_are_not_replaced_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = WorkerGroupPollStatus(worker_statuses={0: WorkerStatus(running=True, error=RuntimeError("gone"))})
    replaces(monkeypatch, alone, room=lambda: False)
