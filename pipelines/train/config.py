"""What a training run is asked to do, apart from the model's shape and where things are."""

from dataclasses import dataclass, field
from typing import Literal

from blt.errors import ConfigError
from blt.optim import OptimizerConfig


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length, batches, optimiser and workers of a training run."""

    steps: int
    """Updates in all."""
    global_batch: int
    """Sequences per update, over all workers."""
    micro_batch: int = 4
    """Sequences a worker computes at once; the rest is gradient accumulation."""
    sequence_bytes: int = 8192
    """T: most bytes of a sequence."""
    sequence_patches: int = 2048
    """S: most patches of a sequence; not used by an entropy model."""
    seed: int = 0
    """Of the initial weights and the order of the data."""
    shuffle_row_groups: int = 8
    """Row groups whose sequences are shuffled together."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW and its schedule."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the matrix products; weights and optimiser state stay float32."""
    workers: int = 1
    """Ray Train workers."""
    cpus_per_worker: float = 1.0
    """CPUs of a worker, and its compute threads."""
    gpus_per_worker: float = 0.0
    """GPUs of a worker; above 0 trains on CUDA."""
    checkpoint_every: int = 1000
    """Steps between checkpoints; the last step always makes one."""
    keep_checkpoints: int = 2
    """Checkpoints kept on disk, the newest ones."""
    valid_every: int = 500
    """Steps between held-out evaluations; the last step always makes one, over the whole held-out split."""
    valid_sequences: int = 64
    """Held-out sequences of an evaluation on the way."""
    log_every: int = 10
    """Steps between metric records."""
    wait_for_resources: bool = False
    """true on an autoscaling cluster: wait for nodes instead of refusing what the cluster cannot hold now."""
    max_failures: int = 3
    """Failures of the worker group that are recovered from, each from the newest checkpoint."""

    def __post_init__(self) -> None:
        positive = ("steps", "global_batch", "micro_batch", "sequence_bytes", "shuffle_row_groups", "workers")
        for name in (*positive, "checkpoint_every", "keep_checkpoints", "valid_every", "valid_sequences", "log_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.sequence_patches < 2:
            raise ConfigError(f"sequence_patches must be at least 2, got {self.sequence_patches}")
        if self.cpus_per_worker <= 0 or self.gpus_per_worker < 0:
            raise ConfigError("cpus_per_worker must be above 0 and gpus_per_worker at least 0")
