"""Kills of training workers, every so many seconds: a run's output in, SIGKILLs in its processes and their times out.

Workers are found in the cluster's table of actors and killed by a task on the node that they are on, so that it is
the same on one machine and on many.
"""

import logging
import os
import random
import signal
import threading
import time
from dataclasses import dataclass

import ray
from ray._private import state as ray_state
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

# isort: split
import psutil  # type: ignore[import-untyped]  # bundled with Ray, which puts it on the path

from pipelines.train.timeline import Step, read_timeline

logger = logging.getLogger(__name__)

_LOOK_SECONDS = 0.2
_WORKER_CLASS = "RayTrainWorker"
"""Of Ray Train 2.60's workers, in the table of actors and in the titles of their processes."""


@dataclass(frozen=True, kw_only=True)
class WorkerProcess:
    """A training worker of this driver."""

    actor: str
    node: str
    pid: int
    began: int
    """When the actor came up, milliseconds since the epoch."""


def worker_processes() -> list[WorkerProcess]:
    """The training workers that are alive and belong to this driver, oldest first. Ray must be initialised."""
    job = ray.JobID.from_hex(ray.get_runtime_context().get_job_id())
    found = ray_state.actors(job_id=job, actor_state_name="ALIVE").values()
    workers = [
        WorkerProcess(
            actor=actor["ActorID"], node=actor["Address"]["NodeID"], pid=actor["Pid"], began=actor["StartTime"]
        )
        for actor in found
        if _WORKER_CLASS in actor["ActorClassName"]
    ]
    return sorted(workers, key=lambda worker: (worker.began, worker.node, worker.pid))


def kill_worker(worker: WorkerProcess) -> bool:
    """SIGKILL a worker's process, by a task on its node; whether it was there."""
    there = NodeAffinitySchedulingStrategy(worker.node, soft=False)
    task = ray.remote(_kill).options(num_cpus=0, max_retries=0, scheduling_strategy=there)
    try:
        return bool(ray.get(task.remote(worker.pid)))
    except ray.exceptions.RayError as error:  # the node went, and the worker with it
        logger.warning("bench could not kill pid=%d error=%s", worker.pid, error)
        return False


def _kill(pid: int) -> bool:
    try:
        if not any(_WORKER_CLASS in part for part in psutil.Process(pid).cmdline()):
            return False  # the number is another process's by now
        os.kill(pid, signal.SIGKILL)
    except (psutil.NoSuchProcess, ProcessLookupError):
        return False
    return True


class Killer(threading.Thread):
    """Kills a worker drawn by `seed` every `every_seconds` from a run's first step on, until the run has made `steps`
    updates or `max_kills` were killed; a context manager around the run. `error` is what went wrong, if anything did.
    """

    def __init__(self, output: str, steps: int, every_seconds: float, max_kills: int, seed: int) -> None:
        super().__init__(name="killer", daemon=True)
        self._output, self._steps, self._every, self._most = output, steps, every_seconds, max_kills
        self._random, self._over = random.Random(seed), threading.Event()
        self.times: list[float] = []
        """Of the kills, seconds since the epoch on this machine, which is also the recorder's."""
        self.error: BaseException | None = None

    def __enter__(self) -> "Killer":
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self.join()

    def run(self) -> None:
        try:
            self._kill_until_over()
        except BaseException as error:
            self.error = error

    def _kill_until_over(self) -> None:
        while not (steps := self._told()):
            if self._over.wait(_LOOK_SECONDS):
                return
        due = steps[0].at - steps[0].seconds
        while len(self.times) < self._most:
            due += self._every
            if self._over.wait(max(due - time.time(), 0.0)) or not self._kill_one():
                return

    def _kill_one(self) -> bool:
        """Kill one as soon as there is one; False if the run is over first."""
        while max(step.step for step in self._told()) < self._steps:
            workers = worker_processes()
            chosen = self._random.choice(workers) if workers else None
            at = time.time()
            if chosen is not None and kill_worker(chosen):
                logger.info("bench killed pid=%d node=%s kills=%d", chosen.pid, chosen.node[:8], len(self.times) + 1)
                self.times.append(at)
                return True
            if self._over.wait(_LOOK_SECONDS):
                return False
        return False

    def _told(self) -> list[Step]:
        return [entry for entry in read_timeline(self._output) if isinstance(entry, Step)]
