"""Both ends of a changing worker group: the hooks that Ray Train calls, what counts as a failure, and the watchdog."""

import inspect
import signal
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from ray.train.v2._internal.exceptions import WorkerHealthCheckTimeoutError
from ray.train.v2._internal.execution import callback as callbacks
from ray.train.v2._internal.execution import context
from ray.train.v2._internal.execution.controller import state

from blt.errors import DataError, TrainingError
from pipelines.train import elastic
from pipelines.train.elastic import ElasticCallback, PreemptedError

HOOKS = [
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
    assert "preemption_context" in inspect.signature(context.TrainContext).parameters


class Told:
    """Stands for the recorder's actor; keeps the events."""

    def __init__(self) -> None:
        self.causes: list[str] = []
        self.event = SimpleNamespace(remote=lambda cause, detail: self.causes.append(cause))
        self.failures = SimpleNamespace(remote=lambda: len(self.causes))


@pytest.fixture(autouse=True)
def _answers_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elastic.ray, "get", lambda answer: answer)


def polled(errors: dict[int, Exception]) -> Any:
    return SimpleNamespace(errors=errors)


def decides(callback: ElasticCallback) -> None:
    callback.before_controller_execute_failure_decision(None)


def test_failures_are_recovered_from_until_there_are_too_many() -> None:
    told = Told()
    callback = ElasticCallback(told, max_failures=2)
    for _ in range(2):
        callback.after_worker_group_poll_status(polled({}))
        callback.after_worker_group_poll_status(polled({1: RuntimeError("connection lost")}))
        decides(callback)
    callback.after_worker_group_poll_status(polled({0: WorkerHealthCheckTimeoutError("still waiting")}))
    with pytest.raises(TrainingError, match=r"3 failures without .*, max_failures is 2; the last: .*still waiting"):
        decides(callback)
    assert told.causes == ["failure", "failure", "hang"]


def test_an_announced_preemption_is_no_failure() -> None:
    told = Told()
    callback = ElasticCallback(told, max_failures=0)
    callback.after_worker_group_poll_status(polled({0: RuntimeError("peer left"), 1: PreemptedError()}))
    decides(callback)
    assert told.causes == ["preemption"]


def test_what_another_try_would_repeat_ends_the_run() -> None:
    callback = ElasticCallback(Told(), max_failures=9)
    callback.after_worker_group_poll_status(polled({0: RuntimeError("peer left"), 1: DataError("x.parquet: is gone")}))
    with pytest.raises(TrainingError, match=r"x\.parquet: is gone"):
        decides(callback)


def test_changes_of_size_are_told() -> None:
    told = Told()
    callback = ElasticCallback(told, max_failures=0)
    for size in (3, 2, 2, 3):
        callback.after_worker_group_training_start(SimpleNamespace(get_workers=lambda size=size: range(size)))
    assert told.causes == ["shrink", "growth"]


STANDS_STILL = """
import threading
from pipelines.train.elastic import Watchdog
still = threading.Event()
with Watchdog(0.2) as watchdog:
    still.wait(0.6)  # nothing has begun
    for _ in range(6):
        watchdog.resume()
        still.wait(0.1)  # slow, but there is progress
    watchdog.pause()
    still.wait(0.6)
    watchdog.resume()
    print("alive", flush=True)
    still.wait(60)
"""


def test_the_watchdog_kills_who_stands_still_and_nobody_else() -> None:
    done = subprocess.run([sys.executable, "-c", STANDS_STILL], capture_output=True, text=True, timeout=50, check=False)
    assert done.stdout == "alive\n"
    assert done.returncode == -signal.SIGKILL
