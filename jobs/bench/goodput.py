"""Measure what deaths of training workers cost: a run with a kill every so many seconds beside the same run without.

For each way to survive: a short run that gives the time of a step, an undisturbed run of as many steps as fit in
`--seconds`, and the same steps while a worker, drawn at random, gets SIGKILL every `--every` seconds. Both runs must
have the same loss curve; if not, the exit status is 1. One line of JSON for each way, the last one last.
"""

import logging
import os
import shutil
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from blt.errors import ConfigError, TrainingError
from blt.layers import TransformerConfig
from blt.local_encoder import CrossAttentionConfig, HashEmbeddingConfig
from blt.model import BLTConfig
from blt.optim import OptimizerConfig
from blt.patching import PatchRule
from jobs.bench.circumstances import BenchResult, circumstances, working_directory
from jobs.bench.corpus import prose, write_corpus
from jobs.bench.kills import Killer
from jobs.bench.recovery import compare, recovery_seconds, steps_for
from jobs.ray_session import ray_session
from pipelines.patch.dataset import patch_dataset
from pipelines.patch.plan import PatchConfig
from pipelines.train.account import Account
from pipelines.train.config import TrainConfig
from pipelines.train.timeline import Step, read_timeline
from pipelines.train.trainer import resolve_job, train

logger = logging.getLogger(__name__)

OPTIONS = {
    "every": "every_seconds",
    "seconds": "undisturbed_seconds",
    "survival": "survival",
    "workers": "workers",
    "data": "data",
}
GOALS = {
    "sharded": {"same_curve": "true"},
    "replicated": {"same_curve": "true", "steps_redone": "0", "steps_kept": ">= 0.95", "goodput": ">= 0.85"},
}
"""At one kill in 60 seconds, with 3 workers."""

Mode = Literal["sharded", "replicated"]

_MOST_TIMES = 4
_PROBE_STEPS, _PROBE_SKIP = 40, 10
_CORPUS_BYTES, _DOCUMENT_BYTES, _VALID_DOCUMENTS = 2**20, 4096, 8

_TRAIN = TrainConfig(
    steps=1,
    global_batch=12,
    micro_batch=4,
    sequence_bytes=512,
    sequence_patches=128,
    optimizer=OptimizerConfig(lr=1e-3, warmup_steps=20),
    checkpoint_every=20,
    valid_every=100,
    valid_sequences=12,
)


def _small_model() -> BLTConfig:
    """A BLT of about a million parameters."""
    local = TransformerConfig(width=64, layers=1, heads=2, window=128, ffn_multiple_of=32)
    return BLTConfig(
        local_encoder=local,
        latent=TransformerConfig(width=128, layers=3, heads=2, window=None, ffn_multiple_of=32),
        local_decoder=local,
        cross_attention=CrossAttentionConfig(heads=2, slots=2),
        hash_embedding=HashEmbeddingConfig(table_size=1024),
    )


@dataclass(frozen=True, kw_only=True)
class Config:
    """Keys of `blt bench goodput`."""

    survival: Literal["sharded", "replicated", "both"] = "both"
    """Which way to survive is measured."""
    every_seconds: float = 60.0
    """Seconds from the first step to the first kill, and from one kill to the next."""
    undisturbed_seconds: float = 240.0
    """Seconds that the undisturbed run is to take, from its first step to its last."""
    max_kills: int | None = None
    """Most kills of a run; null: as many as come in 4 * undisturbed_seconds, so that a run ends even where kills come
    faster than it can recover."""
    workers: int = 3
    """Training workers."""
    data: str | None = None
    """Patch dataset to train on (the output of `blt patch`); null: a megabyte of seeded words, patched at spaces."""
    entropy_model: str | None = None
    """Directory of the entropy model that made the patches of `data`, if one did."""
    train: TrainConfig = field(default_factory=lambda: _TRAIN)
    """As for `blt train`; steps, workers, survival and max_failures are set here."""
    model: BLTConfig = field(default_factory=_small_model)
    """Shape of the BLT."""
    seed: int = 0
    """Of the choice of workers to kill, and of the words."""
    directory: str | None = None
    """Where to work; null: a temporary directory that is removed. On several machines all of them must reach it."""

    def __post_init__(self) -> None:
        for name in ("every_seconds", "undisturbed_seconds"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"{name} must be a finite number above 0, got {getattr(self, name)}")
        if self.workers < 1 or (self.max_kills is not None and self.max_kills < 1):
            raise ConfigError(f"workers and max_kills must be at least 1, got {self.workers} and {self.max_kills}")

    @property
    def most_kills(self) -> int:
        """Of one run."""
        return self.max_kills or max(1, int(_MOST_TIMES * self.undisturbed_seconds / self.every_seconds))

    @property
    def modes(self) -> tuple[Mode, ...]:
        """The ways to measure, in order."""
        return ("sharded", "replicated") if self.survival == "both" else (self.survival,)


@dataclass(frozen=True, kw_only=True)
class Told:
    """What a finished run tells."""

    account: Account
    steps: tuple[Step, ...]
    """Every update, those made again too."""


@dataclass(frozen=True, kw_only=True)
class GoodputResult:
    """A result for each way to survive; the lines before the last are printed when they are there."""

    results: tuple[BenchResult, ...]

    @property
    def status(self) -> Literal["done", "incomplete"]:
        """Incomplete if any of the disturbed runs has another curve than its undisturbed one."""
        return "done" if all(result.status == "done" for result in self.results) else "incomplete"

    def to_json(self) -> str:
        """The last line."""
        return self.results[-1].to_json()


def run(config: Config) -> GoodputResult:
    """Measure each way; takes about 2.5 * undisturbed_seconds for each, and a minute."""
    results: list[BenchResult] = []
    with working_directory(config.directory) as directory, ray_session(num_cpus=_cpus(config)):
        data = config.data or _corpus(config, directory)
        for mode in config.modes:
            if results:
                sys.stderr.flush()
                print(results[-1].to_json(), flush=True)
            results.append(_measure(config, mode, data, directory / mode))
    return GoodputResult(results=tuple(results))


def _cpus(config: Config) -> int:
    """Of an embedded Ray: what the workers ask for, and one for the small tasks beside them."""
    return max(round(config.workers * config.train.cpus_per_worker + 1.5), os.cpu_count() or 1)


def _corpus(config: Config, directory: Path) -> str:
    """A patch dataset of seeded words."""
    documents, patches = str(directory / "documents"), str(directory / "patches")
    texts = prose(config.seed, _CORPUS_BYTES // _DOCUMENT_BYTES + _VALID_DOCUMENTS, _DOCUMENT_BYTES)
    write_corpus(documents, texts[_VALID_DOCUMENTS:], _CORPUS_BYTES, 4, valid=texts[:_VALID_DOCUMENTS])
    rule = PatchRule(kind="space", max_patch_length=16)
    patch_dataset(PatchConfig(rule=rule, row_group_bytes=_CORPUS_BYTES // 16), documents, None, patches)
    return patches


def _measure(config: Config, mode: Mode, data: str, directory: Path) -> BenchResult:
    """The three runs of a way to survive, and their figures. TrainingError if a kill could not be tried."""
    probe = _train(config, mode, data, directory / "probe", _PROBE_STEPS)
    steps = steps_for(config.undisturbed_seconds, probe.steps, _PROBE_SKIP)
    logger.info("bench survival=%s steps=%d", mode, steps)
    undisturbed = _train(config, mode, data, directory / "undisturbed", steps)
    output = directory / "disturbed"
    with Killer(str(output), steps, config.every_seconds, config.most_kills, config.seed) as killer:
        disturbed = _train(config, mode, data, output, steps)
    if killer.error is not None:
        raise TrainingError(f"a worker could not be killed: {killer.error}") from killer.error
    comparison = compare(undisturbed.steps, disturbed.steps)
    if not comparison.same:
        logger.error("bench survival=%s the loss curve differs step=%s", mode, comparison.first_difference)
    figures = {
        "survival": mode,
        **circumstances(
            replace(config, survival=mode, train=_settings(config, mode, steps)),
            "cuda" if config.train.gpus_per_worker else "cpu",
        ),
        "steps": steps,
        **figures_of(undisturbed, disturbed, killer.times),
        "kills_ran_out": len(killer.times) == config.most_kills,
        "same_curve": comparison.same,
        "largest_loss_difference": comparison.largest_loss_difference,
        "first_difference": comparison.first_difference,
        "goals": GOALS[mode],
    }
    return BenchResult(figures=figures, status="done" if comparison.same else "incomplete")


def figures_of(undisturbed: Told, disturbed: Told, kills: Sequence[float]) -> dict[str, Any]:
    """What the kills cost. Recovery is None where nothing was killed."""
    account = disturbed.account
    recovery = recovery_seconds(account, disturbed.steps, kills)
    return {
        "kills": len(kills),
        "undisturbed_seconds": undisturbed.account.seconds,
        "disturbed_seconds": account.seconds,
        "goodput": round(undisturbed.account.seconds / account.seconds, 4),
        "goodput_by_account": round(account.goodput, 4),
        "steps_redone": account.steps_redone,
        "tries_lost": account.tries_lost,
        "steps_attempted": account.steps + account.steps_redone + account.tries_lost,
        "steps_kept": round(account.steps_kept, 4),
        "recovery_seconds": {
            "median": round(statistics.median(recovery), 3) if recovery else None,
            "max": max(recovery, default=None),
            "kills": recovery,
        },
        "interruptions": dict(Counter(one.cause for one in account.interruptions)),
        "undisturbed_interruptions": len(undisturbed.account.interruptions),
    }


def _settings(config: Config, mode: Mode, steps: int) -> TrainConfig:
    """Of a run of `steps` updates that survives any number of kills."""
    return replace(config.train, steps=steps, workers=config.workers, survival=mode, max_failures=sys.maxsize)


def _train(config: Config, mode: Mode, data: str, output: Path, steps: int) -> Told:
    """A run from its begin to its end; its output is removed."""
    settings = _settings(config, mode, steps)
    logger.info("bench survival=%s run=%s steps=%d", mode, output.name, steps)
    account = train(resolve_job(settings, config.model, data, str(output), config.entropy_model)).account
    told = tuple(entry for entry in read_timeline(str(output)) if isinstance(entry, Step))
    shutil.rmtree(output)
    return Told(account=account, steps=told)
