"""What a training run is asked to do, apart from the model's shape and where things are."""

from collections.abc import Mapping
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
    sources: Mapping[str, float] | None = None
    """Weight of each source in the order of the data; null = by their size. A source that is not named is not read."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW and its schedule."""
    init_from: str | None = None
    """Directory of a trained or imported model whose weights the run starts from; optimiser and schedule start anew."""
    init_other_patches: bool = False
    """Let init_from name a model that was trained on patches of another entropy model, rule or newline reset."""
    init_latent_from: str | None = None
    """Directory of a Llama in transformers' format (config.json, safetensors) whose blocks the latent transformer
    starts from; all other weights are drawn from the seed."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the matrix products; weights and optimiser state stay float32."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """What the backward pass computes again: nothing; all but matrix products; whole blocks."""
    compile: bool = False
    """torch.compile each transformer block; without a compiler the run goes on uncompiled and says so."""
    deterministic: bool = False
    """Use only operations that repeat their result bit for bit, and refuse others: two runs of one configuration, with
    as many workers and threads on the same kind of machine, give the same weights. Held by tests on CPU alone; on CUDA
    it has never run."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """On a loss or gradient that is not finite: stop the run, or skip the update."""
    survival: Literal["sharded", "replicated"] = "sharded"
    """How a lost worker is survived. sharded: weights are spread over the workers, and all start again from the newest
    checkpoint; replicated: every worker holds the whole model, and the others go on at once."""
    workers: int = 1
    """Ray Train workers; the most, where min_workers is given."""
    min_workers: int | None = None
    """Go on with as few workers as this when nodes are lost, and grow again when they come back; null = always all."""
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
    """Failures of workers that are recovered from without a new step between them: a run that gets on goes on however
    often workers die. Preemptions announced by the cluster do not count."""
    hang_seconds: float = 300.0
    """A worker that makes no progress for this long (in a checkpoint, ten times as long) is ended: a failure."""

    def __post_init__(self) -> None:
        positive = ("steps", "global_batch", "micro_batch", "sequence_bytes", "shuffle_row_groups", "workers")
        for name in (*positive, "checkpoint_every", "keep_checkpoints", "valid_every", "valid_sequences", "log_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.sequence_patches < 2:
            raise ConfigError(f"sequence_patches must be at least 2, got {self.sequence_patches}")
        if self.cpus_per_worker <= 0 or self.gpus_per_worker < 0:
            raise ConfigError("cpus_per_worker must be above 0 and gpus_per_worker at least 0")
        if self.min_workers is not None and not 1 <= self.min_workers <= self.workers:
            raise ConfigError(f"min_workers must lie between 1 and workers {self.workers}, got {self.min_workers}")
        if not self.hang_seconds > 0 or self.max_failures < 0:
            raise ConfigError("hang_seconds must be above 0 and max_failures at least 0")
        for name, weight in (self.sources or {}).items():
            if not 0 < weight < float("inf"):
                raise ConfigError(f"sources: the weight of {name!r} must be a finite number above 0, got {weight}")
        if self.init_from is not None and self.init_latent_from is not None:
            raise ConfigError("init_from and init_latent_from cannot both be given: init_from gives all weights")
        if self.sources is not None and not self.sources:
            raise ConfigError("sources must name one source or more, or be null")
