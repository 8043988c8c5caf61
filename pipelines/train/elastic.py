"""Changes of a worker group, from both ends: what the controller of Ray Train does to its workers, and what they do.

`ElasticCallback` runs in the controller. It asks the workers for a checkpoint before a group grows, tells the recorder
of every event, and ends the run on faults that another try would only repeat. `Changes` is a worker's end: it
knows of requests and of the cluster's notice that a node will go, and answers when the checkpoint is there.
`Watchdog` ends a worker that makes no progress.

The hooks are internal to Ray Train 2.60 (tests/pipelines/train/test_elastic.py holds them to what is used here).
"""

import logging
import os
import signal
import threading
from collections.abc import Mapping
from typing import Any

import ray
from ray.train.v2._internal.exceptions import WorkerHealthCheckTimeoutError
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.context import get_train_context

from blt.errors import BltError, TrainingError
from pipelines.train.recorder import RecorderHandle
from pipelines.train.timeline import Cause

logger = logging.getLogger(__name__)

SECONDS_TO_SAVE = 300.0
"""Longest wait for a requested checkpoint, and for the change that it was made for."""


class PreemptedError(Exception):
    """Raised by every worker once the state is saved and the cluster has told that a node will go."""


class Changes:
    """A worker's knowledge of what the controller and the cluster are about to do; one per process."""

    def __init__(self) -> None:
        self._requested, self._saved = threading.Event(), threading.Event()

    def request_save(self) -> None:
        """Called by the controller, before it replaces the group."""
        self._saved.clear()
        self._requested.set()

    def wait_until_saved(self, seconds: float) -> bool:
        """Called by the controller; False if no checkpoint was made in time."""
        return self._saved.wait(seconds)

    def save_is_requested(self) -> bool:
        """By the controller, or since a node of the group will go."""
        return self._requested.is_set() or self.node_will_go()

    def node_will_go(self) -> bool:
        """Whether the cluster has announced the loss of a node that this group runs on."""
        return get_train_context().preemption_context.preemption_info is not None

    def hold(self) -> None:
        """After the checkpoint: leave the group if a node will go, else wait to be replaced by the controller."""
        if self.node_will_go():
            raise PreemptedError
        self._requested.clear()
        self._saved.set()
        threading.Event().wait(SECONDS_TO_SAVE)
        logger.warning("no change came within %.0f s of the checkpoint for it: going on", SECONDS_TO_SAVE)


CHANGES = Changes()
"""Of this process: the controller's requests reach it by name."""


def _request_save() -> None:
    CHANGES.request_save()


def _wait_until_saved() -> bool:
    return CHANGES.wait_until_saved(SECONDS_TO_SAVE)


class ElasticCallback(ControllerCallback, WorkerGroupCallback):
    """The controller's end; it ends a run after more than `max_failures` failures without a new step between them."""

    def __init__(self, recorder: RecorderHandle, max_failures: int) -> None:
        self._recorder, self._max_failures = recorder, max_failures
        self._group: Any = None
        self._size = 0
        self._is_resizing = False
        self._fault: str | None = None

    def after_worker_group_training_start(self, worker_group: Any) -> None:
        size = len(worker_group.get_workers())
        if self._size and size != self._size:
            self._tell("growth" if size > self._size else "shrink", f"{self._size} -> {size} workers")
        self._group, self._size = worker_group, size

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        self._is_resizing = type(previous_state).__name__ == "ResizingState"

    def before_controller_execute_resize_decision(self, resize_decision: Any) -> None:
        """Have the workers save before their group is torn down for another one."""
        if not self._is_resizing or self._group is None:
            return
        try:
            self._group.execute(_request_save)
            if not all(ray.get(self._group.execute_async(_wait_until_saved), timeout=SECONDS_TO_SAVE + 30)):
                logger.warning("the workers did not save in time: going back to the newest checkpoint")
        except ray.exceptions.RayError as error:  # a worker died meanwhile: the new group starts from what there is
            self._tell("failure", _line(error))

    def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
        errors: Mapping[int, Exception] = worker_group_status.errors
        if not errors:
            return
        fatal = [error for error in errors.values() if isinstance(error, BltError)]
        if any(isinstance(error, PreemptedError) for error in errors.values()):
            self._tell("preemption", "a node will go; all workers have saved")
            return
        rank, error = next(iter(errors.items()))
        hangs = isinstance(error, WorkerHealthCheckTimeoutError)
        self._tell("hang" if hangs else "failure", f"worker {rank}: {_line(error)}")
        failures: int = ray.get(self._recorder.failures.remote())
        if fatal:
            self._fault = _line(fatal[0])
        elif failures > self._max_failures:
            self._fault = too_many_failures(failures, self._max_failures, _line(error))

    def before_controller_execute_failure_decision(self, failure_decision: Any) -> None:
        """End the run where another try is of no use: an exception from here is not retried."""
        if self._fault is not None:
            raise TrainingError(self._fault)

    def _tell(self, cause: Cause, detail: str) -> None:
        self._recorder.event.remote(cause, detail)


class Watchdog:
    """Kills this process when it makes no progress for `seconds`; a context manager that looks away until `resume`."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._alive, self._ended = seconds, threading.Event(), threading.Event()
        self._is_paused = True
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._alive.set()
        self._thread.join()

    def alive(self) -> None:
        """There was progress."""
        self._alive.set()

    def pause(self) -> None:
        """What follows may take any time."""
        self._is_paused = True

    def resume(self) -> None:
        """There was progress, and there must be more."""
        self._alive.set()
        self._is_paused = False

    def _watch(self) -> None:
        while not self._ended.is_set():
            self._alive.clear()
            if not self._alive.wait(self._seconds) and not self._is_paused:
                logger.error("no progress for %.0f s: this worker ends itself", self._seconds)
                os.kill(os.getpid(), signal.SIGKILL)


def too_many_failures(failures: int, max_failures: int, last: str) -> str:
    """Why a run is given up, for a person."""
    return f"{failures} failures without a new step between them, max_failures is {max_failures}; the last: {last}"


def _line(error: BaseException) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
