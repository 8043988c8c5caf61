"""A training worker on a node whose GPU is only a number in Ray's books: it computes with the CPU."""

import ray.train.torch
import torch

from pipelines.train.job import TrainJob
from pipelines.train.survival import Cluster
from pipelines.train.worker import train_worker


def train_worker_with_a_fake_gpu(run: tuple[TrainJob, Cluster]) -> None:
    """The worker itself, told another device than that of the GPU which Ray has given it."""
    ray.train.torch.get_device = lambda: torch.device("cpu")
    train_worker(run)
