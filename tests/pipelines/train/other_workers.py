"""Training workers as tests need them, in place of `pipelines.train.worker.train_worker`."""

import time
from pathlib import Path

import ray.train.torch
import torch

from pipelines.train.feed import Feed
from pipelines.train.job import TrainJob
from pipelines.train.survival import Cluster
from pipelines.train.worker import Worker, train_worker

SLOW_MARK = "slow"
"""A file beside a run's output: while it is there, steps of slow workers take long."""
_SLOW_FROM_STEP = 30
_SLOW_SECONDS = 0.5
_round = Worker._round


def slow_train_worker(run: tuple[TrainJob, Cluster]) -> None:
    """Steps after the 30th take half a second, as those of a larger model would, so that the run is not over before
    what a test does to it has happened.
    """
    mark = Path(run[0].output).with_name(SLOW_MARK)

    def slow_round(worker: Worker, feed: Feed) -> None:
        if worker.place.steps_done >= _SLOW_FROM_STEP and mark.exists():
            time.sleep(_SLOW_SECONDS)
        _round(worker, feed)

    Worker._round = slow_round  # type: ignore[method-assign]
    train_worker(run)


def train_worker_with_a_fake_gpu(run: tuple[TrainJob, Cluster]) -> None:
    """A slow worker on a node whose GPU is only a number in Ray's books: it is told another device than that."""
    ray.train.torch.get_device = lambda: torch.device("cpu")
    slow_train_worker(run)
