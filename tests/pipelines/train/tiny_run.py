"""A run small enough to be disturbed often: its dataset and job, and the loss curve that it has to follow.

The curve is computed in this process from the order and the step alone, without Ray, groups or checkpoints.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from blt.model import BLT, BLTConfig
from blt.optim import OptimizerConfig, build_optimizer, lr_factor, set_lr
from blt.parallel import FlatGradients
from blt.step import train_step
from pipelines.train.config import TrainConfig
from pipelines.train.feed import Feed, FeedConfig
from pipelines.train.job import TrainJob
from pipelines.train.timeline import Step, read_timeline
from pipelines.train.trainer import resolve_job
from tests.model_cases import blt_config
from tests.pipelines.patch.corpus import prose
from tests.pipelines.train.patched import patched, write_patches

CONFIG = TrainConfig(
    steps=50,
    global_batch=5,  # divides by no number of workers but one
    micro_batch=2,
    sequence_bytes=128,
    sequence_patches=48,
    optimizer=OptimizerConfig(lr=1e-3, warmup_steps=5),
    cpus_per_worker=0.5,
    log_every=1,
    valid_every=25,
    valid_sequences=4,
    checkpoint_every=10,
    hang_seconds=60.0,
)


def write_tiny_patches(root: Path) -> str:
    """Prose of two sources of very different size."""
    shards = {
        "train/shard-00000.parquet": [prose(seed, 3000) for seed in range(6)],
        "train/shard-00001.parquet": [prose(seed, 400) for seed in range(10, 12)],
        "valid/shard-00000.parquet": [prose(20, 900)],
    }
    documents = {path: [patched(text, [b == 32 for b in text]) for text in texts] for path, texts in shards.items()}
    sources = {"train/shard-00000.parquet": "large", "train/shard-00001.parquet": "small"}
    return write_patches(root, documents, row_group_bytes=4000, sources=sources)


def tiny_job(data: str, output: Path | str, **changes: Any) -> TrainJob:
    """The run, with other values for keys of its configuration. Needs Ray."""
    return resolve_job(replace(CONFIG, **changes), model_config(), data, str(output))


def model_config() -> BLTConfig:
    return blt_config()


def expected_curve(job: TrainJob) -> list[tuple[str, float]]:
    """Hash of the sequences and loss of every step, by one process."""
    model = job.build()
    assert isinstance(model, BLT)
    model.load_state_dict(job.initial_weights())
    optimizer, gradients = build_optimizer(model, job.config.optimizer), FlatGradients(model.parameters())
    curve = []
    with Feed(job.data, job.train_index, FeedConfig.of(job.config), job.config.steps) as feed:
        for step in range(job.config.steps):
            set_lr(optimizer, job.config.optimizer.lr * lr_factor(job.config.optimizer, step, job.config.steps))
            given = feed.step(step, 0, 1)
            clip_norm = job.config.optimizer.clip_norm
            tally = train_step(model, optimizer, gradients, given.batches, clip_norm=clip_norm).tally
            curve.append((f"{given.sequence_hash:016x}", tally.nats / tally.targets))
    return curve


def told_steps(output: Path | str) -> list[Step]:
    """Every update that the timeline tells of, repeated ones too."""
    return [entry for entry in read_timeline(str(output)) if isinstance(entry, Step)]


def assert_follows(output: Path | str, curve: list[tuple[str, float]]) -> None:
    """Every update, those made again too, saw the same sequences; the loss is the same to 1e-5 over the first 50 steps
    and to 1e-3 after that.
    """
    steps = told_steps(output)
    assert {step.step for step in steps} == set(range(1, len(curve) + 1))
    for step in steps:
        sequences, loss = curve[step.step - 1]
        assert step.sequences == sequences, f"step {step.step}"
        assert step.loss is not None
        assert abs(step.loss - loss) <= (1e-5 if step.step <= 50 else 1e-3) * loss, f"step {step.step}"
