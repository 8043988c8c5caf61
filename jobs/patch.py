"""Cut documents into patches: a dataset of documents with their patch starts, one file per document shard.

Each shard is done exactly once: run a killed job again and it does what is missing. An output made from other
documents, with another entropy model or another rule is refused.
"""

from dataclasses import dataclass

from jobs.progress import progress
from jobs.ray_session import ray_session
from jobs.record import JobResult, run_once
from pipelines.manifest import Manifest, read_manifest
from pipelines.patch.dataset import patch_dataset, plan_dataset
from pipelines.patch.plan import PatchConfig, PatchPlan

NOT_IN_OUTPUT = (
    "output",
    "documents",
    "entropy_model",
    "calibration",
    "min_actors",
    "max_actors",
    "cpus_per_actor",
    "gpus_per_actor",
    "wait_for_resources",
    "stall_seconds",
)
"""Keys that have no say in the output: resources, and paths whose content the fingerprint of the inputs covers."""


@dataclass(frozen=True, kw_only=True)
class Config(PatchConfig):
    """Keys of `blt patch`."""

    documents: str
    """Dataset of documents (the output of `blt shard`)."""
    entropy_model: str | None = None
    """Directory of the entropy model; null for rule.kind space, fixed and byte."""
    output: str
    """Where the patch dataset goes."""


def run(config: Config) -> JobResult:
    """Patch the documents into `config.output` unless that is done."""
    documents = read_manifest(config.documents)
    plan = plan_dataset(config, documents, config.entropy_model)

    def work() -> JobResult:
        with ray_session(), progress("patch", total=documents.bytes, unit="bytes") as bar:
            manifest = patch_dataset(config, config.documents, config.entropy_model, config.output, bar.advance)
        return _result(manifest, plan)

    return run_once(config.output, config, _inputs_fingerprint(config, plan), work, ignore=NOT_IN_OUTPUT)


def _inputs_fingerprint(config: Config, plan: PatchPlan) -> str:
    """Documents, entropy model and, where a calibration supplies it, the threshold."""
    threshold = plan.patching.rule.threshold if config.calibration is not None else None
    return f"documents={plan.documents} entropy_model={plan.patching.entropy_model} threshold={threshold}"


def _result(manifest: Manifest, plan: PatchPlan) -> JobResult:
    patches = sum(shard.patches or 0 for shard in manifest.shards)
    rule = plan.patching.rule
    return JobResult(
        documents=manifest.documents,
        bytes=manifest.bytes,
        patches=patches,
        mean_patch_bytes=round(manifest.bytes / patches, 4) if patches else 0.0,
        threshold=rule.threshold if rule.kind == "entropy" else None,
        figures={"shards": len(manifest.shards)},
    )
