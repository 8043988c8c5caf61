"""Training with weights spread over the workers of one group (FSDP2, n-gram tables by columns).

When a worker is lost, or the number of workers changes, the whole group starts again from the newest checkpoint, which
loads at any number of workers. Changes that are announced (a growth, the loss of a node) are preceded by a checkpoint,
so that no step is lost.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from blt.optim import build_optimizer
from blt.parallel import Gradients, sum_over_ranks
from blt.sharding import ShardedGradients, load_full, sharded
from blt.training_tensors import training_tensors
from pipelines.train.changes import CHANGES
from pipelines.train.job import Model, TrainJob
from pipelines.train.survival import Cluster, Place, Share, checkpoints_of


class ShardedTraining:
    """A rank's shards of model and optimiser."""

    def __init__(self, place: Place, job: TrainJob, device: torch.device, cluster: Cluster) -> None:
        config = job.config
        self._place = place
        self._share = Share(dist.get_rank(), dist.get_world_size())
        mesh = init_device_mesh(device.type, (self._share.world_size,))
        self.model: Model = sharded(
            job.build,
            mesh,
            precision=config.precision,
            recomputation=config.activation_checkpointing,
            compile=config.compile,
        )
        self.optimizer: torch.optim.Optimizer = build_optimizer(self.model, config.optimizer)
        self.gradients: Gradients = ShardedGradients(self.model, mesh)
        self._tensors = training_tensors(self.model, self.optimizer)
        self._checkpoints = checkpoints_of(job, cluster.recorder)
        if (loaded := self._checkpoints.load_newest(self._tensors)) is not None:
            place.take(loaded.state)
            place.saved = loaded.step
        else:
            load_full(self.model, job.initial_weights() if self._share.rank == 0 else None)

    def begin(self) -> Share:
        return self._share

    def sum(self, tensor: Tensor) -> None:
        sum_over_ranks(tensor)

    def commit(self) -> bool:
        return True

    def tells(self, share: Share) -> bool:
        return share.rank == 0

    def save_is_requested(self) -> bool:
        return CHANGES.save_is_requested()

    def save(self, share: Share, wait: bool) -> None:
        self._checkpoints.save(self._place.steps_done, self._tensors, self._place.state(), wait=wait)
        if wait:
            self._place.saved = self._place.steps_done

    def hold(self, saved: bool) -> None:
        CHANGES.hold(saved)

    def close(self) -> None:
        CHANGES.finish()
