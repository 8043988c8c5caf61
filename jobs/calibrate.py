"""Find the entropy threshold that gives a target mean patch size, on a sample of the training documents.

Writes calibration.json, which `blt patch calibration=...` takes the threshold from, with a table of other
thresholds, for all sources together and for each.
"""

import dataclasses
from dataclasses import dataclass

from blt.errors import ConfigError
from jobs.own_patching import own_patching
from jobs.patch import NOT_IN_OUTPUT
from jobs.progress import progress
from jobs.ray_session import ray_session
from jobs.record import JobResult, run_once
from pipelines.manifest import read_manifest
from pipelines.model_files import model_fingerprint
from pipelines.patch.calibrate import CalibrateConfig, calibrate
from pipelines.patch.calibration import Calibration, write_calibration

OPTIONS = ("model",)


@dataclass(frozen=True, kw_only=True)
class Config(CalibrateConfig):
    """Keys of `blt calibrate`."""

    documents: str
    """Dataset of documents (the output of `blt shard`)."""
    entropy_model: str | None = None
    """Directory of the entropy model; null with model."""
    model: str | None = None
    """Directory of a BLT: gives entropy_model, reset_on_newline and the rule, but for its threshold."""
    output: str
    """Directory that gets calibration.json."""


def run(config: Config) -> JobResult:
    """Calibrate into `config.output` unless that is done."""
    config, entropy_model = resolved(config)
    documents = read_manifest(config.documents)
    model = model_fingerprint(entropy_model)
    inputs = f"documents={documents.fingerprint} entropy_model={model}"

    def work() -> JobResult:
        total = min(config.sample_bytes, sum(shard.bytes for shard in documents.split("train")))
        with ray_session(), progress("calibrate", total=total, unit="bytes") as bar:
            calibration = calibrate(config, config.documents, entropy_model, bar.advance)
        write_calibration(config.output, calibration)
        return _result(calibration)

    return run_once(config.output, config, inputs, work, ignore=NOT_IN_OUTPUT)


def resolved(config: Config) -> tuple[Config, str]:
    """The configuration with what the BLT of `config.model` says in it, and the entropy model's directory. ConfigError
    for keys that say otherwise, and for neither."""
    if config.model is not None:
        found = own_patching(
            config.model,
            entropy_model=config.entropy_model,
            rule=config.rule,
            reset_on_newline=config.reset_on_newline,
        )
        config = dataclasses.replace(
            config, entropy_model=found.entropy_model, rule=found.rule, reset_on_newline=found.reset_on_newline
        )
    if config.entropy_model is None:
        raise ConfigError('key "entropy_model" is missing: it is required unless the key "model" names a BLT with one')
    return config, config.entropy_model


def _result(calibration: Calibration) -> JobResult:
    return JobResult(
        documents=calibration.sample_documents,
        bytes=calibration.sample_bytes,
        mean_patch_bytes=round(calibration.mean_patch_bytes, 4),
        threshold=calibration.threshold,
        figures={"target_mean_patch_bytes": calibration.target_mean_patch_bytes},
    )
