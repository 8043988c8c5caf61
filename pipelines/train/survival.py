"""How a run survives the loss of workers: what the training loop needs of either way.

`ShardedTraining` (pipelines.train.sharded): weights are spread over the workers of one group, which starts again from
the newest checkpoint, maybe with other workers. `ReplicatedTraining` (pipelines.train.replicated): every worker holds
the whole model, and when one dies the others do the step again without it.
The loop runs in rounds (an update, an evaluation, the last checkpoint): begin, compute one's share, sum, commit.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from blt.errors import CheckpointError
from blt.parallel import Gradients
from pipelines.train.checkpoints import Checkpoints, Saved
from pipelines.train.job import Model, TrainJob
from pipelines.train.recorder import RecorderHandle

logger = logging.getLogger(__name__)


class Cluster(NamedTuple):
    """What a worker needs to know of where the run is conducted from."""

    recorder: RecorderHandle
    address: str
    """Of the driver's node, where Ray Train's controller runs too."""


class Share(NamedTuple):
    """Which part of a round this worker computes."""

    rank: int
    world_size: int


@dataclass
class Place:
    """Where a worker stands; part of what a checkpoint and a healed worker take over."""

    steps_done: int = 0
    evaluated: int = 0
    """The step after which the newest held-out evaluation was made."""
    rounds: int = 0
    """Updates, evaluations and the last checkpoint, as far as they stand."""
    saved: int = 0
    """Step of the newest checkpoint that is known to be whole."""

    def state(self) -> dict[str, int]:
        """What a checkpoint keeps of it."""
        return {"steps_done": self.steps_done, "evaluated": self.evaluated, "rounds": self.rounds}

    def take(self, state: Mapping[str, int]) -> None:
        """Stand where `state` was taken; what is saved of that is another matter."""
        self.steps_done, self.evaluated, self.rounds = state["steps_done"], state["evaluated"], state["rounds"]


def checkpoints_of(job: TrainJob, recorder: RecorderHandle) -> Checkpoints:
    """The checkpoints of a run, the recorder told of those that are whole, that failed and that are broken."""

    def told(saved: Saved) -> None:
        recorder.saved.remote(saved.step, saved.blocked_seconds, saved.seconds)

    def failed(error: CheckpointError) -> None:
        logger.warning("a checkpoint failed, going on: %s", error)
        recorder.event.remote("checkpoint", str(error))

    def broken(faults: str) -> None:
        recorder.event.remote("checkpoint", f"passed over: {faults}")

    return Checkpoints(
        job.output, job.run, job.config.keep_checkpoints, on_saved=told, on_failed=failed, on_broken=broken
    )


class Survival(Protocol):
    """A worker's model and optimiser, and its ties to the other workers."""

    model: Model
    optimizer: torch.optim.Optimizer
    gradients: Gradients

    def begin(self) -> Share:
        """Begin a round; model, optimiser and place may have been brought up to those of the others by then."""
        ...

    def sum(self, tensor: Tensor) -> None:
        """In-place sum over the workers of the round."""
        ...

    def commit(self) -> bool:
        """End a round; False on every worker if one was lost meanwhile: what was summed is void, do it again."""
        ...

    def tells(self, share: Share) -> bool:
        """Whether this worker tells the recorder of a round."""
        ...

    def save_is_requested(self) -> bool:
        """Whether this worker knows of a reason to save now: the cluster is about to change."""
        ...

    def save(self, share: Share, wait: bool) -> None:
        """Write a checkpoint of this place; in the background unless `wait`: then CheckpointError if it fails."""
        ...

    def hold(self, saved: bool) -> None:
        """After a requested save: stand still until the cluster has changed, or it turns out that it does not."""
        ...

    def close(self) -> None:
        """Leave the others, the run being done."""
        ...
