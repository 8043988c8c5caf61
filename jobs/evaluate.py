"""Bits per byte of a trained BLT on held-out documents, beside its entropy model, gzip -9, xz -9 and an order-0 model.

Every byte and every document's end is scored once, in windows that carry context over; a dataset whose patches are not
those that the model was trained on is refused. Writes evaluation.json with a 95 % interval and a table by source.
"""

from dataclasses import dataclass

from blt.checkpoint import language_model_config, language_model_fingerprint
from jobs.progress import progress
from jobs.ray_session import ray_session
from jobs.record import JobResult, run_once
from pipelines.evaluate.config import EvaluateConfig
from pipelines.evaluate.evaluate import check_patching, evaluate
from pipelines.evaluate.evaluation import Evaluation, write_evaluation
from pipelines.manifest import read_manifest

NOT_IN_OUTPUT = (
    "output",
    "model",
    "data",
    "min_actors",
    "max_actors",
    "cpus_per_actor",
    "gpus_per_actor",
    "memory_bytes_per_actor",
    "wait_for_resources",
    "stall_seconds",
)
"""Keys that have no say in the output: resources, and paths whose content the fingerprint of the inputs covers."""


@dataclass(frozen=True, kw_only=True)
class Config(EvaluateConfig):
    """Keys of `blt eval`."""

    model: str
    """Directory of the trained model (`blt train` writes it as OUTPUT/model)."""
    data: str
    """Patch dataset (the output of `blt patch`)."""
    output: str
    """Directory that gets evaluation.json."""


def run(config: Config) -> JobResult:
    """Evaluate into `config.output` unless that is done."""
    manifest = read_manifest(config.data)
    check_patching(manifest, config.data, language_model_config(config.model), config.model)
    total = sum(shard.bytes for shard in manifest.split(config.split))

    def work() -> JobResult:
        with ray_session(), progress("eval", total=total, unit="bytes") as bar:
            evaluation = evaluate(config, config.model, config.data, bar.advance)
        write_evaluation(config.output, evaluation)
        return _result(evaluation)

    inputs = f"model={language_model_fingerprint(config.model)} data={manifest.fingerprint}"
    return run_once(config.output, config, inputs, work, ignore=NOT_IN_OUTPUT)


def _result(evaluation: Evaluation) -> JobResult:
    bpb = {"low": evaluation.bpb_low, "high": evaluation.bpb_high, **evaluation.baselines}
    if evaluation.entropy_model_bpb is not None:
        bpb["entropy_model"] = evaluation.entropy_model_bpb
    return JobResult(
        documents=evaluation.documents,
        bytes=evaluation.bytes,
        patches=evaluation.patches,
        mean_patch_bytes=round(evaluation.mean_patch_bytes, 4),
        bpb=round(evaluation.bpb, 4),
        figures={
            **{f"bpb_{name.replace(' -', '_').replace('-', '_')}": round(value, 4) for name, value in bpb.items()},
            "bytes_per_second": round(evaluation.bytes_per_second),
        },
    )
