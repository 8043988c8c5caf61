"""Training with the whole model on every worker (torchft replica groups of one).

The workers agree before every round on who takes part, and share the same global batch out over them; sums go through
torchft. When one dies, the others find the round void, do it again without it, and lose no step. Its replacement
starts from the newest checkpoint, takes model, optimiser and place over from a live worker, and gets its share.
"""

import datetime
import logging
import os
import time
import uuid
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import ray
import torch
from ray.train.v2._internal.constants import TORCHFT_LIGHTHOUSE_ADDR_ENV_VAR
from ray.train.v2.torch.torchft_config import LighthouseServerActor, TorchftConfig, _TorchftBackend
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from torch import Tensor
from torch.distributed import ReduceOp

from blt.optim import build_optimizer
from blt.parallel import FlatGradients, Gradients
from blt.recomputation import prepare_blocks
from blt.training_tensors import training_tensors
from pipelines.train.changes import CHANGES
from pipelines.train.job import Model, TrainJob
from pipelines.train.recorder import RecorderHandle
from pipelines.train.survival import Cluster, Place, Share, checkpoints_of

logger = logging.getLogger(__name__)

HEARTBEAT_TIMEOUT_MS = 1500
"""A worker that was not heard of for so long is not waited for: what a death costs, besides its round. Heartbeats come
every 100 ms from a thread that computing does not hold up."""
JOIN_TIMEOUT_MS = 60_000
"""Longest wait for a worker that is alive but not yet there."""
ARRIVAL_POLL_SECONDS = 0.05


def replicated_backend(bind_address: str, min_workers: int) -> TorchftConfig:
    """Ray Train's torchft backend, its Lighthouse (who is alive?) listening on one address alone."""
    lighthouse = {
        "bind": f"{bind_address}:0",
        "min_replicas": min_workers,
        "join_timeout_ms": JOIN_TIMEOUT_MS,
        "heartbeat_timeout_ms": HEARTBEAT_TIMEOUT_MS,
    }
    return _Config(lighthouse_kwargs=lighthouse, backend="gloo")


class _Config(TorchftConfig):
    @property
    def backend_cls(self) -> type[_TorchftBackend]:
        return _Backend


class _Backend(_TorchftBackend):
    """Ray's, but for a Lighthouse that asks for no CPU: the head of a cluster may have none to give."""

    def _maybe_create_lighthouse_actor(self, backend_config: TorchftConfig) -> str:
        if self.lighthouse_actor is None:
            here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
            lighthouse: Any = LighthouseServerActor
            options = lighthouse.options(num_cpus=0, scheduling_strategy=here)
            self.lighthouse_actor = options.remote(lighthouse_kwargs=backend_config.lighthouse_kwargs)
        return str(ray.get(self.lighthouse_actor.address.remote()))


class ReplicatedTraining:
    """A worker's whole model and optimiser."""

    def __init__(self, place: Place, job: TrainJob, device: torch.device, cluster: Cluster) -> None:
        config = job.config
        self._place, self._has_begun = place, False
        self.model: Model = job.without_weights().to(device)
        prepare_blocks(self.model, config.activation_checkpointing, config.compile, device)
        self.optimizer: torch.optim.Optimizer = build_optimizer(self.model, config.optimizer)
        self._tensors = training_tensors(self.model, self.optimizer)
        self._checkpoints = checkpoints_of(job, cluster.recorder)
        if (loaded := self._checkpoints.load_newest(self._tensors)) is not None:
            place.take(loaded.state)
            place.saved = loaded.step
        else:
            self.model.load_state_dict(job.initial_weights())
        self._manager = self._join(device, cluster.address, datetime.timedelta(seconds=config.hang_seconds))
        self.gradients: Gradients = FlatGradients(self.model.parameters(), self.sum)
        if place.saved < config.steps:
            _wait_for_the_others(cluster.recorder, config.workers)

    def _join(self, device: torch.device, controller_address: str, timeout: datetime.timedelta) -> Any:
        from torchft import Manager, ProcessGroupGloo, ProcessGroupNCCL  # an extra: only this mode needs it
        from torchft.checkpointing.pg_transport import PGTransport

        self._group = group = (ProcessGroupNCCL if device.type == "cuda" else ProcessGroupGloo)(timeout=timeout)
        manager = Manager(
            pg=group,
            # Between the members of the quorum: no server that others could ask for them. Not into the tensors in
            # place: where the giver dies in the middle, they must be what they were.
            checkpoint_transport=PGTransport(group, timeout, device),
            load_state_dict=self._take_over,
            state_dict=self._hand_over,
            min_replica_size=1,
            use_async_quorum=False,
            timeout=timeout,
            quorum_timeout=timeout + datetime.timedelta(milliseconds=JOIN_TIMEOUT_MS),
            rank=0,
            world_size=1,
            hostname=ray.util.get_node_ip_address(),
            # It names itself by its host's name, which need not lead to the address that it listens on.
            lighthouse_addr=f"http://{controller_address}:{urlsplit(os.environ[TORCHFT_LIGHTHOUSE_ADDR_ENV_VAR]).port}",
            init_sync=False,  # the same seed and the same checkpoint: they are equal
        )
        manager.load_state_dict({"step": self._place.rounds, "batches_committed": 0})
        return manager

    def _catch_up(self) -> None:
        """Take over a checkpoint that was made while this worker started: those who made it may be gone, all steps
        done, and nobody is left to take over from.
        """
        newest = next(iter(self._checkpoints.steps()), 0)
        if newest > self._place.steps_done and (loaded := self._checkpoints.load_newest(self._tensors)) is not None:
            self._place.take(loaded.state)
            self._manager.load_state_dict({"step": self._place.rounds, "batches_committed": 0})
        if newest >= self._place.steps_done:
            self._place.saved = self._place.steps_done

    def begin(self) -> Share:
        self._manager.start_quorum()
        if not self._has_begun:
            self._has_begun = True
            self._catch_up()
        return Share(self._manager.participating_rank() or 0, max(self._manager.num_participants(), 1))

    def sum(self, tensor: Tensor) -> None:
        self._manager.allreduce(tensor, reduce_op=ReduceOp.SUM).wait()

    def commit(self) -> bool:
        stands = bool(self._manager.should_commit())
        if not stands:
            # A worker that waits in a sum for this one, and not for the lost one, finds out only when the connection
            # goes: else it is waited for, alive as it is, until JOIN_TIMEOUT_MS is over.
            self._group.abort()
        return stands

    def tells(self, share: Share) -> bool:
        return True  # any of them may die before it has told

    def save_is_requested(self) -> bool:
        return CHANGES.save_is_requested()

    def save(self, share: Share, wait: bool) -> None:
        """By the first of the workers alone; not again where the round was void after it was made."""
        step = self._place.steps_done
        if share.rank == 0 and self._place.saved < step and not (wait and step in self._checkpoints.steps()):
            self._checkpoints.save(step, self._tensors, self._place.state(), wait=wait)

    def hold(self, saved: bool) -> None:
        """Nothing to wait for: whoever goes, the others go on."""

    def close(self) -> None:
        self._manager.shutdown(wait=False)

    def _hand_over(self) -> dict[str, Any]:
        return {"tensors": dict(self._tensors), "place": self._place.state()}

    def _take_over(self, state: Mapping[str, Any]) -> None:
        with torch.no_grad():
            for name, tensor in self._tensors.items():
                tensor.copy_(state["tensors"][name])
        self._place.take(state["place"])


def _wait_for_the_others(recorder: RecorderHandle, workers: int) -> None:
    """Until every worker of a new group is known to the Lighthouse: it takes those it knows for all there are.

    A replacement goes on at once, since its group is complete already (unless the recorder was lost since: then it
    waits in vain, as long as for one that is late).
    """
    worker, deadline = uuid.uuid4().hex, time.monotonic() + JOIN_TIMEOUT_MS / 1000
    while (arrived := ray.get(recorder.arrived.remote(worker))) < workers:
        if time.monotonic() > deadline:
            logger.warning("only %d of %d workers are there: beginning without the others", arrived, workers)
            return
        time.sleep(ARRIVAL_POLL_SECONDS)
