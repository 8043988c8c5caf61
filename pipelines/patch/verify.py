"""Verification of a finished patch dataset: every file is checked by a pool of actors, and nothing is written."""

import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from blt.entropy_model import EntropyModel
from blt.errors import ConfigError, DataError
from pipelines.actor_pool import run_units
from pipelines.manifest import SPLITS, Manifest, ShardEntry, read_manifest
from pipelines.patch.check import CheckUnit, ShardCheck, ShardReport
from pipelines.patch.commit import read_plan
from pipelines.patch.model import load_model
from pipelines.patch.plan import PatchConfig, PatchPlan
from pipelines.schema import SCHEMA_VERSION
from pipelines.storage import Storage

_SAMPLE_SEED = 0


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What was found."""

    shards: int
    documents: int
    bytes: int
    patches: int
    recomputed_documents: int
    problems: tuple[str, ...]
    num_problems: int
    """All of them; of one file only the first are among `problems`."""


class CheckActor:
    """Checks one data file per unit; loads the model with the first that has rows to make again."""

    def __init__(
        self, *, plan: PatchPlan, documents: str, output: str, entropy_model: str | None, cpus_per_actor: int
    ) -> None:
        self._plan = plan
        self._documents, self._output = Storage(documents), Storage(output)
        self._entropy_model, self._cpus = entropy_model, cpus_per_actor
        self._model: EntropyModel | None = None

    def __call__(self, batch: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
        """A batch of units and of reports, one JSON text each."""
        units = [msgspec.json.decode(text, type=CheckUnit) for text in batch["unit"]]
        return {"report": [msgspec.json.encode(self._check(unit)).decode() for unit in units]}

    def _check(self, unit: CheckUnit) -> ShardReport:
        patching = self._plan.patching
        if self._model is None and unit.recompute_rows and patching.entropy_model is not None:
            assert self._entropy_model is not None
            self._model = load_model(
                self._entropy_model, patching.entropy_model, patching.device, patching.dtype, self._cpus
            )
        return ShardCheck(self._documents, self._output, self._plan, self._model).run(unit)


def verify_dataset(
    config: PatchConfig,
    documents: str,
    entropy_model: str | None,
    output: str,
    on_progress: Callable[[int], None] = lambda num_bytes: None,
) -> Verification:
    """Check every file of the dataset `output` against its manifest, its plan and the dataset `documents`, and make the
    patches of `config.verify_documents` documents again. Ray must be initialised.

    DataError if there is no finished dataset, ConfigError if the model or its device that a recomputation takes is
    not given.
    """
    manifest, source, storage = read_manifest(output), read_manifest(documents), Storage(output)
    plan = _stored_plan(manifest, storage)
    if plan.patching.entropy_model is not None and config.verify_documents:
        _check_model(config, plan, entropy_model)
    units = [
        CheckUnit(shard=shard, recompute_rows=rows)
        for shard, rows in zip(manifest.shards, sample_rows(manifest.shards, config.verify_documents), strict=True)
    ]
    arguments: Mapping[str, object] = {
        "plan": plan,
        "documents": Storage(documents).root_uri,
        "output": storage.root_uri,
        "entropy_model": entropy_model and Storage(entropy_model).root_uri,
        "cpus_per_actor": config.cpus_per_actor,
    }
    problems = list(_dataset_problems(storage, manifest, source, plan))
    reports = []
    items = [{"unit": msgspec.json.encode(unit).decode()} for unit in units]
    for row in run_units(items, CheckActor, arguments, config):
        report = msgspec.json.decode(row["report"], type=ShardReport)
        reports.append(report)
        on_progress(report.bytes)
    return _verification(problems, reports)


def _verification(problems: Sequence[str], reports: Sequence[ShardReport]) -> Verification:
    return Verification(
        shards=len(reports),
        documents=sum(report.documents for report in reports),
        bytes=sum(report.bytes for report in reports),
        patches=sum(report.patches for report in reports),
        recomputed_documents=sum(report.recomputed_documents for report in reports),
        problems=(*problems, *sorted(problem for report in reports for problem in report.problems)),
        num_problems=len(problems) + sum(report.num_problems for report in reports),
    )


def sample_rows(shards: Sequence[ShardEntry], num_documents: int) -> list[tuple[int, ...]]:
    """For each shard the rows of a seeded sample of `num_documents` documents of all shards, or of all there are."""
    ends = list(itertools.accumulate(shard.documents for shard in shards))
    total = ends[-1] if ends else 0
    chosen = sorted(random.Random(_SAMPLE_SEED).sample(range(total), min(num_documents, total)))
    starts = [end - shard.documents for shard, end in zip(shards, ends, strict=True)]
    return [
        tuple(number - start for number in chosen if start <= number < end)
        for start, end in zip(starts, ends, strict=True)
    ]


def _stored_plan(manifest: Manifest, storage: Storage) -> PatchPlan:
    """The plan that the dataset says it was made under, without units; DataError if its parts contradict each other."""
    if manifest.patching is None:
        raise DataError(f"{storage.root_uri} is a dataset of documents, not of patches")
    try:
        stored_hash, settings = read_plan(storage)
    except FileNotFoundError as error:
        raise DataError(f"{storage.root_uri} has lost its _plan.json: copy the dataset whole") from error
    plan = PatchPlan(
        schema_version=SCHEMA_VERSION,
        documents=str(settings["documents"]),
        patching=manifest.patching,
        row_bytes=int(str(settings["row_bytes"])),
        row_group_bytes=int(str(settings["row_group_bytes"])),
        store_entropies=manifest.entropies,
        units=(),
    )
    if plan.hash != stored_hash:
        raise DataError(f"{storage.root_uri}: its manifest and its _plan.json describe different patching")
    return plan


def _check_model(config: PatchConfig, plan: PatchPlan, entropy_model: str | None) -> None:
    hint = f"to make {config.verify_documents} documents again; or set verify_documents=0"
    if entropy_model is None:
        raise ConfigError(f"entropy_model is needed {hint}")
    if config.device != plan.patching.device:
        raise ConfigError(f"device must be {plan.patching.device}, where the dataset was made, {hint}")


def _dataset_problems(storage: Storage, manifest: Manifest, source: Manifest, plan: PatchPlan) -> Iterator[str]:
    """What is wrong with the dataset as a whole: other documents, shards that should not be there, or are missing."""
    if plan.documents != source.fingerprint:
        yield f"{storage.root_uri} was made from documents {plan.documents[:12]}..., not {source.fingerprint[:12]}..."
    listed, expected = {shard.path for shard in manifest.shards}, {shard.path for shard in source.shards}
    data = {path for path in storage.list() if path.startswith(tuple(f"{split}/" for split in SPLITS))}
    for path in sorted(expected - listed):
        yield f"{storage.url(path)} is a shard of the documents and not in the manifest"
    for path in sorted(data - listed):
        yield f"{storage.url(path)} is there and not in the manifest"
