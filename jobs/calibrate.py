"""Find the entropy threshold that gives a target mean patch size, on a sample of the training documents.

Writes calibration.json, which `blt patch calibration=...` takes the threshold from, with a table of other
thresholds, for all sources together and for each.
"""

from dataclasses import dataclass

from jobs.patch import NOT_IN_OUTPUT
from jobs.progress import progress
from jobs.ray_session import ray_session
from jobs.record import JobResult, run_once
from pipelines.manifest import read_manifest
from pipelines.model_files import model_fingerprint
from pipelines.patch.calibrate import CalibrateConfig, calibrate
from pipelines.patch.calibration import Calibration, write_calibration


@dataclass(frozen=True, kw_only=True)
class Config(CalibrateConfig):
    """Keys of `blt calibrate`."""

    documents: str
    """Dataset of documents (the output of `blt shard`)."""
    entropy_model: str
    """Directory of the entropy model."""
    output: str
    """Directory that gets calibration.json."""


def run(config: Config) -> JobResult:
    """Calibrate into `config.output` unless that is done."""
    documents = read_manifest(config.documents)
    model = model_fingerprint(config.entropy_model)
    inputs = f"documents={documents.fingerprint} entropy_model={model}"

    def work() -> JobResult:
        total = min(config.sample_bytes, sum(shard.bytes for shard in documents.split("train")))
        with ray_session(), progress("calibrate", total=total, unit="bytes") as bar:
            calibration = calibrate(config, config.documents, config.entropy_model, bar.advance)
        write_calibration(config.output, calibration)
        return _result(calibration)

    return run_once(config.output, config, inputs, work, ignore=NOT_IN_OUTPUT)


def _result(calibration: Calibration) -> JobResult:
    return JobResult(
        documents=calibration.sample_documents,
        bytes=calibration.sample_bytes,
        mean_patch_bytes=round(calibration.mean_patch_bytes, 4),
        threshold=calibration.threshold,
        figures={"target_mean_patch_bytes": calibration.target_mean_patch_bytes},
    )
