"""Cut documents into patches: a dataset of documents with their patch starts, one file per document shard.

Each shard is done exactly once: run a killed job again and it does what is missing. An output made from other
documents, with another entropy model or another rule is refused. Paths may be local or s3://.
"""

import dataclasses
import logging
from dataclasses import dataclass

from blt.errors import ConfigError
from jobs.action import Action
from jobs.own_patching import own_patching
from jobs.progress import progress
from jobs.ray_session import ray_session
from jobs.record import JobResult, run_once
from pipelines.manifest import Manifest, is_whole, read_manifest
from pipelines.patch.commit import is_claimed
from pipelines.patch.dataset import patch_dataset, plan_dataset
from pipelines.patch.estimate import estimate
from pipelines.patch.plan import PatchConfig, PatchPlan
from pipelines.patch.status import PatchStatus, dataset_status
from pipelines.patch.verify import verify_dataset
from pipelines.storage import Storage

logger = logging.getLogger(__name__)

OPTIONS = ("limit", "reuse_entropies", "model")

NOT_IN_OUTPUT = (
    "output",
    "documents",
    "entropy_model",
    "model",
    "calibration",
    "reuse_entropies",
    "min_actors",
    "max_actors",
    "cpus_per_actor",
    "gpus_per_actor",
    "memory_bytes_per_actor",
    "wait_for_resources",
    "stall_seconds",
    "limit",
    "verify_documents",
    "gc_older_than_seconds",
)
"""Keys that have no say in the output: resources, what other actions read, and paths whose content the fingerprint of
the inputs covers."""


@dataclass(frozen=True, kw_only=True)
class Config(PatchConfig):
    """Keys of `blt patch`."""

    documents: str
    """Dataset of documents (the output of `blt shard`)."""
    entropy_model: str | None = None
    """Directory of the entropy model; null for rule.kind space, fixed and byte, with reuse_entropies, and
    with model."""
    model: str | None = None
    """Directory of a BLT that is to read the patches: gives entropy_model, rule and reset_on_newline; a calibration's
    threshold goes before its own."""
    output: str
    """Where the patch dataset goes."""


def run(config: Config) -> JobResult:
    """Patch the documents into `config.output` unless that is done; incomplete if `config.limit` left some to do."""
    config = resolved(config)
    documents = read_manifest(config.documents)
    plan = plan_dataset(config, documents, config.entropy_model)
    is_claimed(Storage(config.output), plan)  # refuses another plan by what differs: a record only knows the hash

    def work() -> JobResult:
        with ray_session(), progress("patch", total=documents.bytes, unit="bytes") as bar:
            manifest = patch_dataset(config, config.documents, config.entropy_model, config.output, bar.advance)
        return _result(manifest, plan) if manifest else status(config)

    return run_once(config.output, config, f"plan={plan.hash}", work, ignore=NOT_IN_OUTPUT, is_whole=is_whole)


def resolved(config: Config) -> Config:
    """The configuration with what the BLT of `config.model` says in it. ConfigError for keys that say otherwise."""
    if config.model is None:
        return config
    found = own_patching(
        config.model,
        entropy_model=config.entropy_model,
        rule=config.rule,
        reset_on_newline=config.reset_on_newline,
    )
    for name in ("store_entropies", "reuse_entropies"):
        if getattr(config, name) and not found.rule.quantized and config.calibration is None:
            raise ConfigError(
                f'key "{name}": entropies are then rounded before they are compared, which those of {config.model}, '
                'that the key "model" names, are not'
            )
    return dataclasses.replace(
        config, entropy_model=found.entropy_model, rule=found.rule, reset_on_newline=found.reset_on_newline
    )


def _result(manifest: Manifest, plan: PatchPlan) -> JobResult:
    patches = sum(shard.patches or 0 for shard in manifest.shards)
    rule = plan.patching.rule
    return JobResult(
        documents=manifest.documents,
        bytes=manifest.bytes,
        patches=patches,
        mean_patch_bytes=_mean_patch_bytes(manifest.bytes, patches),
        threshold=rule.threshold if rule.kind == "entropy" else None,
        figures={"shards": len(manifest.shards)},
    )


def status(config: Config) -> JobResult:
    """How far the output is: what its finished shards hold and cost."""
    return _status_result(config, dataset_status(config.documents, config.output))


def _status_result(config: Config, found: PatchStatus) -> JobResult:
    stats, num_shards, num_done = found.stats, len(found.documents.shards), len(found.done.commits)
    speeds = ("actor_bytes_per_second", "reading_share", "inferring_share", "writing_share")
    return JobResult(
        status="done" if found.complete else "incomplete",
        path=config.output,
        documents=stats.documents,
        bytes=stats.bytes,
        patches=stats.patches,
        mean_patch_bytes=_mean_patch_bytes(stats.bytes, stats.patches),
        figures={
            "shards": num_shards,
            "shards_done": num_done,
            "shards_missing": num_shards - num_done,
            "stored_bytes": stats.stored_bytes,
            **{name: round(stats.figures[name], 4) for name in speeds},
        },
    )


def verify(config: Config) -> JobResult:
    """Check every file of the finished output; incomplete, with a line in the log for each problem, if any is wrong."""
    config = resolved(config)
    with ray_session(), progress("verify", total=read_manifest(config.output).bytes, unit="bytes") as bar:
        found = verify_dataset(config, config.documents, config.entropy_model, config.output, bar.advance)
    for problem in found.problems:
        logger.error("%s", problem)
    return JobResult(
        status="incomplete" if found.num_problems else "done",
        path=config.output,
        documents=found.documents,
        bytes=found.bytes,
        patches=found.patches,
        mean_patch_bytes=_mean_patch_bytes(found.bytes, found.patches),
        figures={
            "shards": found.shards,
            "recomputed_documents": found.recomputed_documents,
            "problems": found.num_problems,
            **({"first_problem": found.problems[0]} if found.problems else {}),
        },
    )


def dry_run(config: Config) -> JobResult:
    """What `run` would do, and about how long it would take; nothing is written."""
    config = resolved(config)
    documents = read_manifest(config.documents)
    plan = plan_dataset(config, documents, config.entropy_model)
    found = estimate(config, plan, documents, config.documents, config.entropy_model, config.output)
    return JobResult(
        path=config.output,
        documents=found.documents,
        bytes=found.bytes,
        threshold=plan.patching.rule.threshold if plan.patching.rule.kind == "entropy" else None,
        figures={
            "plan": plan.hash,
            "shards": found.shards,
            "shards_done": found.shards_done,
            "bytes_done": found.bytes_done,
            "estimated_stored_bytes": found.stored_bytes,
            "estimated_actors": found.actors,
            "estimated_seconds": None if found.seconds is None else round(found.seconds, 3),
        },
    )


def gc(config: Config) -> JobResult:
    """Remove what killed runs left in the output and nothing writes to any more."""
    storage = Storage(config.output)
    leftovers = storage.leftovers(config.gc_older_than_seconds)
    storage.remove_leftovers(leftovers)
    freed_bytes = sum(leftover.size_bytes for leftover in leftovers)
    return JobResult(path=config.output, figures={"removed": len(leftovers), "freed_bytes": freed_bytes})


def _mean_patch_bytes(num_bytes: int, num_patches: int) -> float:
    return round(num_bytes / num_patches, 4) if num_patches else 0.0


ACTIONS = {
    "status": Action(status, "say how many shards are done and what they hold; needs neither Ray nor model"),
    "verify": Action(verify, "check every file of the output, and the patches of verify_documents documents"),
    "dry-run": Action(dry_run, "say what there is to do, its bytes and about its seconds; writes nothing"),
    "gc": Action(gc, "remove what killed runs left behind, if older than gc_older_than_seconds"),
}
