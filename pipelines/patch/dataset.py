"""From documents to a patch dataset: plan, missing shards, actors, commits, manifest last.

Exactly once: a shard is done when its commit and its file exist, and both are created exclusively. A run that was
killed is run again and does what is missing; a run over a complete dataset does nothing.
"""

import dataclasses
import logging
import os
from collections.abc import Callable, Iterator, Mapping

import msgspec

from blt.checkpoint import entropy_model_fingerprint
from blt.errors import ConfigError, DataError
from blt.patching import PatchRule
from pipelines.actor_pool import run_units
from pipelines.manifest import MANIFEST_PATH, Manifest, ShardEntry, read_manifest, write_manifest
from pipelines.patch.actor import PatchActor, Receipt
from pipelines.patch.calibration import read_calibration
from pipelines.patch.commit import Commit, claim, read_commits
from pipelines.patch.plan import PatchConfig, PatchPlan, PatchUnit, limited, make_plan
from pipelines.patch.stats import write_stats
from pipelines.storage import Storage

logger = logging.getLogger(__name__)


def patch_dataset(
    config: PatchConfig,
    documents: str,
    entropy_model: str | None,
    output: str,
    on_progress: Callable[[int], None] = lambda num_bytes: None,
) -> Manifest:
    """Patch every shard of the dataset `documents` into the dataset `output`, and return its manifest.

    `entropy_model` is the directory of the model, None for rules that need no entropies. `on_progress` is called with
    the text bytes of each finished shard, those found finished first. Ray must be initialised. ConfigError or
    CheckpointError for what does not fit together, DataError for broken input, an output made under another plan, or
    counts that differ.
    """
    source = read_manifest(documents)
    plan = plan_dataset(config, source, entropy_model)
    storage = Storage(output)
    claim(storage, plan)
    commits = read_commits(storage, plan)
    missing = [unit for unit in plan.units if unit.id not in commits]
    logger.info("patch shards=%d missing=%d plan=%s", len(plan.units), len(missing), plan.hash[:12])
    on_progress(sum(commit.bytes for commit in commits.values()))
    for receipt in _patch_units(config, plan, missing, documents, entropy_model, output):
        commits[receipt.commit.id] = receipt.commit
        on_progress(receipt.commit.bytes)
        facts = " ".join(f"{name}={value:.6g}" for name, value in receipt.stats.figures.items())
        logger.info("patched shard=%s %s", receipt.commit.id, facts)
    manifest = _manifest(source, plan, commits, storage)
    if missing or not storage.exists(MANIFEST_PATH):
        write_stats(storage)
        write_manifest(output, manifest)
    return manifest


def plan_dataset(config: PatchConfig, documents: Manifest, entropy_model: str | None) -> PatchPlan:
    """The plan of `patch_dataset`: with the entropy model's fingerprint, and a calibration's threshold in the rule."""
    fingerprint: str | None = None
    if config.rule.needs_entropies:
        if entropy_model is None:
            raise ConfigError(
                f"rule.kind {config.rule.kind} needs entropy_model (the directory of a trained entropy model)"
            )
        fingerprint = entropy_model_fingerprint(entropy_model)
    if config.calibration is not None and fingerprint is not None:
        config = dataclasses.replace(config, rule=_calibrated_rule(config, fingerprint))
    return make_plan(config, documents, fingerprint)


def _calibrated_rule(config: PatchConfig, fingerprint: str) -> PatchRule:
    """The rule with the threshold of the calibration, which must be made with the same model, rule and reset."""
    assert config.calibration is not None
    calibration = read_calibration(config.calibration)
    if calibration.entropy_model != fingerprint:
        raise ConfigError(
            f"calibration {config.calibration} was made with entropy model {calibration.entropy_model[:12]}..., "
            f"entropy_model is {fingerprint[:12]}...: calibrate again"
        )
    rule = dataclasses.replace(limited(config.rule), threshold=calibration.threshold)
    if (rule, config.reset_on_newline) != (calibration.rule, calibration.reset_on_newline):
        raise ConfigError(
            f"calibration {config.calibration} was made for {calibration.rule}, "
            f"reset_on_newline={calibration.reset_on_newline}; the configuration says {rule}, "
            f"reset_on_newline={config.reset_on_newline}: calibrate again"
        )
    return rule


def _patch_units(
    config: PatchConfig,
    plan: PatchPlan,
    units: list[PatchUnit],
    documents: str,
    entropy_model: str | None,
    output: str,
) -> Iterator[Receipt]:
    """Run the actor pool over `units`, the largest first so that the last actors finish together."""
    units = sorted(units, key=lambda unit: (-unit.bytes, unit.id))
    arguments: Mapping[str, object] = {
        "plan": dataclasses.replace(plan, units=()),
        "documents": Storage(documents).root_uri,
        "output": Storage(output).root_uri,
        "entropy_model": entropy_model and os.path.abspath(entropy_model),
        "cpus_per_actor": config.cpus_per_actor,
    }
    items = [{"unit": msgspec.json.encode(unit).decode()} for unit in units]
    for row in run_units(items, PatchActor, arguments, config):
        yield msgspec.json.decode(row["receipt"], type=Receipt)


def _manifest(source: Manifest, plan: PatchPlan, commits: Mapping[str, Commit], storage: Storage) -> Manifest:
    """The manifest of a complete dataset; DataError if a shard is missing or its counts are not the documents'."""
    missing = [unit.id for unit in plan.units if unit.id not in commits]
    if missing:
        raise DataError(
            f"{storage.root_uri} is incomplete: {len(missing)} shards are missing, first {missing[0]}; run it again"
        )
    for unit in plan.units:
        commit = commits[unit.id]
        if (commit.documents, commit.bytes) != (unit.documents, unit.bytes):
            raise DataError(
                f"shard {storage.url(unit.path)} holds {commit.documents} documents and {commit.bytes} bytes; "
                f"the documents' manifest says {unit.documents} and {unit.bytes}"
            )
    shards = tuple(
        ShardEntry(
            path=unit.path,
            split=unit.split,
            documents=unit.documents,
            bytes=unit.bytes,
            patches=commits[unit.id].patches,
            sha256=commits[unit.id].sha256,
        )
        for unit in plan.units
    )
    return Manifest(kind="patches", shards=shards, counts=source.counts, patching=plan.patching)
