"""Changes of a worker group, from the controller's end: what Ray Train's controller is about to do in, requests out.

`ElasticCallback` runs in the controller. It asks the workers for a checkpoint before a group grows, tells the recorder
of every event, ends the run on faults that another try would only repeat, and has a dead replica replaced only once
there is room for another.

The hooks are internal to Ray Train 2.60 (tests/pipelines/train/test_elastic.py holds them to what is used here).
"""

import logging
import threading
from collections.abc import Mapping
from typing import Any

import ray
from ray.train import ControllerError
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError, WorkerHealthCheckTimeoutError
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.worker_group.poll import _is_preempted_actor
from ray.util.placement_group import placement_group_table

from blt.errors import BltError, StorageError, TrainingError
from pipelines.log_line import add_fields
from pipelines.train.changes import SECONDS_TO_SAVE, PreemptedError, request_save, wait_until_saved
from pipelines.train.recorder import RecorderHandle
from pipelines.train.timeline import Cause

logger = logging.getLogger(__name__)

LOOK_SECONDS = 0.5
"""Between looks for room for a replica."""
SECONDS_TO_ASK = 30.0
"""For a request to reach all workers."""


class RunIsOverError(Exception):
    """The workers that are left have done everything, while another could not be replaced."""


class ElasticCallback(ControllerCallback, WorkerGroupCallback):
    """The controller's end; it ends a run after more than `max_failures` failures without a new step between them."""

    def __init__(self, recorder: RecorderHandle, max_failures: int) -> None:
        self._recorder, self._max_failures = recorder, max_failures
        self._group: Any = None
        self._size = 0
        self._is_resizing = False
        self._fault: str | None = None
        self._told: set[str] = set()
        """Actors whose errors were told: a controller that waits for the others looks again and again."""

    def before_worker_group_start(self, worker_group_context: Any) -> None:
        add_fields(process="train controller")
        ray.get(self._recorder.group_begins.remote())

    def after_worker_group_training_start(self, worker_group: Any) -> None:
        size = len(worker_group.get_workers())
        if self._size and size != self._size:
            self._tell("growth" if size > self._size else "shrink", f"{self._size} -> {size} workers")
        self._group, self._size = worker_group, size

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        self._is_resizing = type(previous_state).__name__ == "ResizingState"
        if type(current_state).__name__ == "ReschedulingState":
            self._note_failed_start(current_state.training_failed_error)

    def before_controller_execute_resize_decision(self, resize_decision: Any) -> None:
        """Have the workers save before their group is torn down for another one; or wait for room for a replica."""
        if self._group is None:
            return
        if not self._is_resizing:
            self._wait_for_room()
            return
        try:
            ray.get(self._group.execute_async(request_save), timeout=SECONDS_TO_ASK)
            if not all(ray.get(self._group.execute_async(wait_until_saved), timeout=SECONDS_TO_SAVE + SECONDS_TO_ASK)):
                logger.warning("the workers did not save: going back to the newest checkpoint")
        except ray.exceptions.RayError as error:  # one died or stands still: the new group starts from what there is
            self._tell("failure", _line(error))

    def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
        errors = self._news(worker_group_status.errors)
        if not errors:
            return
        notice = next((error for error in errors.values() if isinstance(error, PreemptedError)), None)
        if notice is not None or any(_is_preempted_actor(error) for error in errors.values()):
            self._tell("preemption", f"a node will go: {notice}" if notice else "a node went as announced")
            return
        rank, error = next(iter(errors.items()))
        hangs = isinstance(error, WorkerHealthCheckTimeoutError)
        self._tell("hang" if hangs else "failure", f"worker {rank}: {_line(error)}")
        if fatal := [error for error in errors.values() if is_fatal(error)]:
            self._fault = _line(fatal[0])
        else:
            self._end_if_too_many(_line(error))

    def before_controller_execute_failure_decision(self, failure_decision: Any) -> None:
        """End the run where another try is of no use: an exception from here is not retried."""
        if self._fault is not None:
            raise TrainingError(self._fault)

    def _note_failed_start(self, error: Exception) -> None:
        """Of a group; Ray Train starts it again and again. One that waits for places has not failed."""
        cause = error.controller_failure if isinstance(error, ControllerError) else error
        if isinstance(cause, WorkerGroupStartupTimeoutError):
            return
        self._tell("failure", f"the workers did not start: {_line(cause)}")
        self._end_if_too_many(_line(cause))

    def _end_if_too_many(self, last: str) -> None:
        failures: int = ray.get(self._recorder.failures.remote())
        if failures > self._max_failures:
            self._fault = too_many_failures(failures, self._max_failures, last)

    def _news(self, errors: Mapping[int, Exception]) -> dict[int, Exception]:
        """Those of workers whose errors were not told before."""
        if not errors:
            return {}
        workers = self._group.get_workers()
        actors = {rank: str(workers[rank].actor) for rank in errors}
        new = {rank: error for rank, error in errors.items() if actors[rank] not in self._told}
        self._told.update(actors.values())
        return new

    def _wait_for_room(self) -> None:
        """Until a dead replica's place is there again, or none of its group needs it any more.

        Ray would wait for the place without end, and meanwhile see neither the others' deaths nor their end.
        """
        looked = threading.Event()
        while self._group.has_started():
            status = self._group.get_latest_poll_status()
            failing = set() if status is None else status.failing_replica_group_indices
            if not failing or failing == status.all_replica_group_indices:
                return  # the whole group starts again
            if not any(one.running for one in status.worker_statuses.values() if one.error is None):
                raise RunIsOverError
            if _has_room(self._group):
                return
            looked.wait(LOOK_SECONDS)
            self._group.poll_status(timeout=LOOK_SECONDS)

    def _tell(self, cause: Cause, detail: str) -> None:
        self._recorder.event.remote(cause, detail)


def is_fatal(error: Exception) -> bool:
    """Whether another try would only repeat it. Storage that fails now may work again."""
    return isinstance(error, BltError) and not isinstance(error, StorageError)


def too_many_failures(failures: int, max_failures: int, last: str) -> str:
    """Why a run is given up, for a person."""
    return f"{failures} failures without a new step between them, max_failures is {max_failures}; the last: {last}"


def _has_room(group: Any) -> bool:
    """Whether all places of a group are there: on a node that is lost, Ray looks for another one."""
    placement = placement_group_table(group.get_worker_group_state().placement_group_handle.placement_group)
    return bool(placement["state"] == "CREATED")


def _line(error: BaseException) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
