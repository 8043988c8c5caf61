"""From documents to a patch dataset: plan, missing shards, actors, commits, manifest last.

Exactly once: a shard is done when its commit and its file exist, and both are created exclusively. A run that was
killed is run again and does what is missing; a run over a complete dataset does nothing.
"""

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping

import msgspec

from blt.errors import ConfigError, DataError
from blt.patching import PatchRule
from pipelines.actor_pool import run_units
from pipelines.manifest import Manifest, ShardEntry, read_manifest, write_manifest
from pipelines.model_files import model_fingerprint
from pipelines.patch.actor import PatchActor, PatchSources
from pipelines.patch.calibration import read_calibration
from pipelines.patch.commit import COMMITS_PER_PART, Commit, claim, gather, read_commits
from pipelines.patch.plan import PatchConfig, PatchPlan, PatchUnit, make_plan
from pipelines.patch.reuse import stored_origin
from pipelines.patch.stats import stats_of, write_stats
from pipelines.storage import Storage

logger = logging.getLogger(__name__)


def patch_dataset(
    config: PatchConfig,
    documents: str,
    entropy_model: str | None,
    output: str,
    on_progress: Callable[[int], None] = lambda num_bytes: None,
) -> Manifest | None:
    """Patch every shard of the dataset `documents` into the dataset `output`, and return its manifest; None, with no
    manifest written, if `config.limit` left some to do.

    `entropy_model` is the directory of the model, None for rules that need no entropies. `on_progress` is called with
    the text bytes of each finished shard, those found finished first. Ray must be initialised. ConfigError or
    CheckpointError for what does not fit together, an output made under another plan included, DataError for broken
    input or counts that differ.
    """
    source = read_manifest(documents)
    plan = plan_dataset(config, source, entropy_model)
    storage = Storage(output)
    claim(storage, plan)
    done = read_commits(storage, plan.hash)
    missing = [unit for unit in plan.units if unit.id not in done.commits]
    logger.info("patch shards=%d missing=%d plan=%s", len(plan.units), len(missing), plan.hash[:12])
    on_progress(sum(commit.bytes for commit in done.commits.values()))
    gather(storage, done.ungathered)
    commits = dict(done.commits)
    for commit in _patch_units(config, plan, missing[: config.limit], documents, entropy_model, storage):
        commits[commit.id] = commit
        on_progress(commit.bytes)
    if config.limit is not None and config.limit < len(missing):
        return None
    manifest = _manifest(source, plan, commits, storage)
    if missing or not done.has_manifest:
        write_stats(storage, commits.values())
        write_manifest(output, manifest)
    return manifest


def plan_dataset(config: PatchConfig, documents: Manifest, entropy_model: str | None) -> PatchPlan:
    """The plan of `patch_dataset`: with the entropy model's fingerprint, and a calibration's threshold in the rule.

    With `config.reuse_entropies` the stored entropies' origin takes the place of model, dtype, device and row_bytes.
    """
    fingerprint, reused = None, None
    if config.rule.needs_entropies and entropy_model is not None:
        fingerprint = model_fingerprint(entropy_model)
    if config.reuse_entropies is not None:
        reused = stored_origin(
            config.reuse_entropies, documents, entropy_model=fingerprint, reset_on_newline=config.reset_on_newline
        )
        fingerprint = reused.entropy_model
    if config.calibration is not None and fingerprint is not None:
        config = dataclasses.replace(config, rule=_calibrated_rule(config, fingerprint))
    return make_plan(config, documents, fingerprint, reused)


def _calibrated_rule(config: PatchConfig, fingerprint: str) -> PatchRule:
    """The rule with the threshold of the calibration, which must be made with the same model, rule and reset."""
    assert config.calibration is not None
    calibration = read_calibration(config.calibration)
    if calibration.entropy_model != fingerprint:
        raise ConfigError(
            f"calibration {config.calibration} was made with entropy model {calibration.entropy_model[:12]}..., "
            f"entropy_model is {fingerprint[:12]}...: calibrate again"
        )
    rule = dataclasses.replace(config.final_rule, threshold=calibration.threshold)
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
    output: Storage,
) -> Iterator[Commit]:
    """Run the actor pool over `units`, the largest first so that the last actors finish together, and gather their
    commits into parts.
    """
    arguments: Mapping[str, object] = {
        "plan": dataclasses.replace(plan, units=()),
        "sources": PatchSources(
            documents=Storage(documents).root_uri,
            output=output.root_uri,
            entropy_model=entropy_model and Storage(entropy_model).root_uri,
            reuse_entropies=config.reuse_entropies and Storage(config.reuse_entropies).root_uri,
        ),
        "cpus_per_actor": config.cpus_per_actor,
    }
    units = sorted(units, key=lambda unit: (-unit.bytes, unit.id))
    items = [{"unit": msgspec.json.encode(unit).decode()} for unit in units]
    ungathered: list[Commit] = []
    for row in run_units(items, PatchActor, arguments, config):
        commit = msgspec.json.decode(row["commit"], type=Commit)
        facts = " ".join(f"{name}={value:.6g}" for name, value in stats_of(commit).figures.items())
        logger.info("patched shard=%s %s", commit.id, facts)
        yield commit
        ungathered.append(commit)
        if len(ungathered) >= COMMITS_PER_PART:
            gather(output, ungathered)
            ungathered.clear()
    gather(output, ungathered)


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
            source=unit.source,
            documents=unit.documents,
            bytes=unit.bytes,
            patches=commits[unit.id].patches,
            sha256=commits[unit.id].sha256,
        )
        for unit in plan.units
    )
    return Manifest(
        kind="patches",
        shards=shards,
        counts=source.counts,
        licenses=source.licenses,
        patching=plan.patching,
        entropies=plan.store_entropies,
    )
