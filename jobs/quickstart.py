"""The whole system on one machine: shard, train-entropy, calibrate, patch, train, eval, generate, report.

Without keys it runs on the speeches shipped with the sources, in a few minutes on two cores. Own text:
`blt quickstart 'shard.input=[my/*.txt]' output=runs/mine`. What is done already is skipped.
"""

import contextlib
import dataclasses
import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from jobs import calibrate, evaluate, generate, patch, report, shard, train, train_entropy
from jobs.generate import Settings as GenerateSettings
from jobs.ray_session import ray_session
from jobs.record import JobResult, read_record
from jobs.report_table import print_summary
from pipelines.evaluate import EvaluateConfig
from pipelines.patch.calibrate import CalibrateConfig
from pipelines.patch.plan import PatchConfig
from pipelines.shard import ShardConfig

logger = logging.getLogger(__name__)

RAY_CPUS = 4
"""Ray is told of at least this many, so that two workers and the small tasks beside them are placed on one core too."""

StageConfig = TypeVar("StageConfig")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Keys of `blt quickstart`: a section for each stage, as of the command of that name without its paths."""

    output: str
    """Directory of everything that is made."""
    shard: ShardConfig
    """The corpus, and how it becomes shards."""
    train_entropy: train_entropy.Settings
    """The entropy model and its training."""
    calibrate: CalibrateConfig = field(default_factory=CalibrateConfig)
    """The mean patch size aimed at."""
    patch: PatchConfig = field(default_factory=PatchConfig)
    """The patch rule; its threshold comes from the calibration."""
    train: train.Settings
    """The BLT and its training."""
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    """The held-out evaluation."""
    generate: GenerateSettings = field(default_factory=GenerateSettings)
    """The sample at the end."""


@dataclass(frozen=True)
class Stage:
    """A stage's name, its directory and what does it."""

    name: str
    output: Path
    run: Callable[[], JobResult]


def run(config: Config) -> JobResult:
    """Run all stages into `config.output`, each unless it is done, and print what came of them."""
    started = time.monotonic()
    stages = _stages(config)
    results: dict[str, JobResult] = {}
    with _session(stages):
        for stage in stages:
            began = time.monotonic()
            results[stage.name] = result = stage.run()
            taken = time.monotonic() - began
            told = f"skipped, done before in {result.seconds:.1f} s" if result.status == "skipped" else "done"
            logger.info("stage %s: %s seconds=%.1f", stage.name, told, taken)
    print_summary(config.output)
    evaluated = results["eval"]
    skipped = all(result.status == "skipped" for result in results.values())
    return JobResult(
        status="skipped" if skipped else "done",
        seconds=round(time.monotonic() - started, 1),
        path=str(Path(config.output) / "report.html"),
        documents=results["shard"].documents,
        bytes=results["shard"].bytes,
        patches=results["patch"].patches,
        mean_patch_bytes=results["patch"].mean_patch_bytes,
        threshold=results["patch"].threshold,
        bpb=evaluated.bpb,
    )


def _stages(config: Config) -> tuple[Stage, ...]:
    root = Path(config.output)
    documents, entropy_run, calibration = root / "documents", root / "entropy_model", root / "calibration"
    patches, model_run, evaluation, sample = root / "patches", root / "model", root / "evaluation", root / "sample"
    entropy_model, model = str(entropy_run / "model"), str(model_run / "model")
    to_patch = dataclasses.replace(config.patch, calibration=str(calibration))

    def stage(name: str, output: Path, module: Any, settings: object, **paths: str) -> Stage:
        return Stage(name, output, lambda: module.run(_with(module.Config, settings, output=str(output), **paths)))

    return (
        stage("shard", documents, shard, config.shard),
        stage("train-entropy", entropy_run, train_entropy, config.train_entropy, documents=str(documents)),
        stage(
            "calibrate",
            calibration,
            calibrate,
            config.calibrate,
            documents=str(documents),
            entropy_model=entropy_model,
        ),
        stage("patch", patches, patch, to_patch, documents=str(documents), entropy_model=entropy_model),
        stage("train", model_run, train, config.train, data=str(patches), entropy_model=entropy_model),
        stage("eval", evaluation, evaluate, config.evaluate, model=model, data=str(patches)),
        stage("generate", sample, generate, config.generate, model=model),
        Stage(
            "report",
            root,
            lambda: report.run(report.Config(run=str(root), output=str(root / "report.html"))),
        ),
    )


def _with(config_class: type[StageConfig], settings: object, **paths: str) -> StageConfig:
    """A command's configuration from its section and its paths."""
    values = {item.name: getattr(settings, item.name) for item in dataclasses.fields(settings)}  # type: ignore[arg-type]
    return config_class(**values, **paths)


@contextlib.contextmanager
def _session(stages: tuple[Stage, ...]) -> Iterator[None]:
    """One Ray for all stages, and none where nothing is left to do."""
    if all(read_record(stage.output) for stage in stages if stage.name != "report"):
        yield
        return
    with ray_session(num_cpus=max(RAY_CPUS, os.cpu_count() or 1)):
        yield
