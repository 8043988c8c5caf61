"""Announced changes of a worker group, as a worker knows them: requests and notices in, a checkpoint and stillness out.

The controller of Ray Train asks for a checkpoint before it makes a group larger (`pipelines.train.elastic`); the
cluster announces the loss of a node. Either way the worker saves, and then stands still or leaves.
"""

import logging
import threading

from ray.train.v2._internal.execution.context import get_train_context

logger = logging.getLogger(__name__)

SECONDS_TO_SAVE = 300.0
"""Longest wait for a requested checkpoint, and for the change that it was made for."""


class PreemptedError(Exception):
    """Raised by every worker once the cluster has announced the loss of a node; says whether the state is saved."""


class Changes:
    """What the controller and the cluster are about to do; one per process, called from two threads."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._is_requested = False
        self._answer: bool | None = None
        """Whether the checkpoint was made, from then on until the worker goes on; None: no answer yet."""

    def request_save(self) -> None:
        """Called for the controller, before it replaces the group."""
        with self._changed:
            self._is_requested = self._answer is None  # else this worker stands still for a request to others

    def wait_until_saved(self, seconds: float) -> bool:
        """Called for the controller; False if no checkpoint was made, or not in time."""
        with self._changed:
            self._changed.wait_for(lambda: self._answer is not None, seconds)
            return bool(self._answer)

    def save_is_requested(self) -> bool:
        """By the controller, or since a node of the group will go."""
        return self._is_requested or self.node_will_go()

    def node_will_go(self) -> bool:
        """Whether the cluster has announced the loss of a node that this group runs on."""
        return get_train_context().preemption_context.preemption_info is not None

    def hold(self, saved: bool) -> None:
        """After the checkpoint: leave the group if a node will go, else wait to be replaced by the controller."""
        if self.node_will_go():
            raise PreemptedError("all workers have saved" if saved else "the checkpoint for it failed")
        self._set(saved)
        if saved:
            threading.Event().wait(SECONDS_TO_SAVE)
            logger.warning("no change came within %.0f s of the checkpoint for it: going on", SECONDS_TO_SAVE)
            self._set(None)

    def finish(self) -> None:
        """The run is over, and all of it saved: who asks from now on need not wait."""
        self._set(True)

    def _set(self, answer: bool | None) -> None:
        with self._changed:
            self._is_requested, self._answer = False, answer
            self._changed.notify_all()


CHANGES = Changes()
"""Of this process: the controller's requests reach it by name."""


def request_save() -> None:
    CHANGES.request_save()


def wait_until_saved() -> bool:
    return CHANGES.wait_until_saved(SECONDS_TO_SAVE)
