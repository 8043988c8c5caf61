"""A worker of a replica group by itself: what it begins with. Deaths of its like: test_survival.py."""

from pathlib import Path

import pytest
import ray
import torch
from ray.train.v2._internal.constants import TORCHFT_LIGHTHOUSE_ADDR_ENV_VAR
from torch.distributed import TCPStore
from torchft.coordination import LighthouseServer

from blt.optim import build_optimizer
from blt.training_tensors import training_tensors
from pipelines.train.checkpoints import Checkpoints
from pipelines.train.job import TrainJob
from pipelines.train.recorder import RecorderConfig, start_recorder
from pipelines.train.replicated import ReplicatedTraining
from pipelines.train.survival import Cluster, Place, Share
from tests.pipelines.train.tiny_run import tiny_job, write_tiny_patches

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.usefixtures("ray_local")]


def checkpoint(job: TrainJob, step: int, value: float) -> None:
    """Of a run that stands at `step`, every tensor filled with `value`."""
    model = job.build()
    tensors = training_tensors(model, build_optimizer(model, job.config.optimizer))
    with torch.no_grad():
        for tensor in tensors.values():
            tensor.fill_(value)
    place = Place(steps_done=step, evaluated=step, rounds=step + 2)
    Checkpoints(job.output, job.run, 2).save(step, tensors, place.state(), wait=True)


def test_a_worker_that_comes_when_the_others_are_done_takes_over_their_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They save and go while it starts: nobody is left to heal it, and what they did is not done again."""
    job = tiny_job(write_tiny_patches(tmp_path / "patches"), tmp_path / "run", workers=1, survival="replicated")
    checkpoint(job, 40, 0.4)
    told = RecorderConfig(output=job.output, run="r", log_every=1, checkpoint_every=10, steps=50, flops_per_byte=1.0)
    recorder = start_recorder(told)
    lighthouse = LighthouseServer(bind="127.0.0.1:0", min_replicas=1, join_timeout_ms=1000)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # of the group's one worker
    try:
        monkeypatch.setenv(TORCHFT_LIGHTHOUSE_ADDR_ENV_VAR, lighthouse.address())
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(store.port))
        place = Place()
        training = ReplicatedTraining(place, job, torch.device("cpu"), Cluster(recorder, "127.0.0.1"))
        assert (place.steps_done, place.rounds) == (40, 42)
        checkpoint(job, 50, 0.5)
        assert training.begin() == Share(0, 1)
        assert (place.steps_done, place.evaluated, place.rounds) == (50, 50, 52)
        assert all(bool((parameter == 0.5).all()) for parameter in training.model.parameters())
        assert training.commit()
        training.begin()
        checkpoint(job, 60, 0.6)
        training.begin()
        assert place.steps_done == 50, "only its first round looks for what others left"
        training.close()
    finally:
        lighthouse.shutdown()
        ray.kill(recorder)
