"""Bits per byte of a BLT on a split of a patch dataset: the row groups to an actor pool, per-document sums back.

What comes out does not depend on the number of actors: a row group is computed alone, and the sums are added in stored
order. Counts are held against the manifest, so no document is left out or scored twice.
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence

import msgspec
import numpy as np
import numpy.typing as npt
import ray

from blt.checkpoint import LanguageModelConfig, language_model_config, language_model_fingerprint
from blt.errors import ConfigError, DataError
from blt.loss import bits_per_byte
from pipelines.actor_pool import run_units
from pipelines.evaluate.actor import EvaluateActor, EvaluateUnit, UnitScores
from pipelines.evaluate.baselines import stream_sizes
from pipelines.evaluate.config import EvaluateConfig
from pipelines.evaluate.evaluation import Evaluation, SourceFigures, bootstrap_interval
from pipelines.evaluate.scoring import Nats
from pipelines.manifest import Manifest, Patching, ShardEntry, read_manifest
from pipelines.storage import Storage
from pipelines.train.row_group import num_row_groups


def evaluate(
    config: EvaluateConfig,
    model: str,
    data: str,
    on_progress: Callable[[int], None] = lambda num_bytes: None,
) -> Evaluation:
    """Score the BLT of the directory `model` on `config.split` of the patch dataset `data`, and the baselines.

    `on_progress` is called with the document bytes of each finished row group. Ray must be initialised. ConfigError
    for a dataset whose patches are not the model's, DataError or CheckpointError for what is broken.
    """
    started = time.perf_counter()
    manifest, storage = read_manifest(data), Storage(data)
    check_patching(manifest, data, language_model_config(model), model)
    shards = manifest.split(config.split)
    num_bytes = sum(shard.bytes for shard in shards)
    if not num_bytes:
        raise DataError(f"{data}: the {config.split} split holds no bytes to score")
    # Beside the actors, because xz alone may take as long as they do.
    baselines = ray.remote(num_cpus=1)(stream_sizes).remote(storage.root_uri, [shard.path for shard in shards])
    scores = _score_units(config, _units(shards, storage), model, storage, on_progress)
    _check_counts(shards, scores, storage)
    documents = _Documents(scores)
    low, high = bootstrap_interval(documents.nats, documents.bytes, config.bootstrap_resamples, config.seed)
    total = documents.total()
    return Evaluation(
        documents=total.documents,
        bytes=total.bytes,
        patches=total.patches,
        mean_patch_bytes=total.mean_patch_bytes,
        nats=total.nats,
        bpb=bits_per_byte(total.nats, total.bytes),
        bpb_low=low,
        bpb_high=high,
        baselines={name: 8 * size / num_bytes for name, size in ray.get(baselines).items()},
        entropy_model_bpb=total.entropy_model_bpb,
        per_source=documents.by_source(),
        seconds=time.perf_counter() - started,
        bytes_per_second=num_bytes / sum(part.scoring_seconds for part in scores),
        split=config.split,
        sequence_patches=config.sequence_patches,
        sequence_bytes=config.sequence_bytes,
        model=language_model_fingerprint(model),
        data=manifest.fingerprint,
    )


def _units(shards: Sequence[ShardEntry], storage: Storage) -> list[EvaluateUnit]:
    """Every row group, in stored order."""
    counts = [(shard.path, num_row_groups(storage, shard.path)) for shard in shards]
    return [EvaluateUnit(path=path, row_group=number) for path, count in counts for number in range(count)]


def check_patching(manifest: Manifest, data: str, model: LanguageModelConfig, directory: str) -> None:
    """ConfigError, naming what differs, unless the patches of `data` are those that the model was trained on."""
    patching = manifest.patching
    if patching is None:
        raise DataError(f"{data} holds {manifest.kind}, but evaluation needs patches (the output of blt patch)")
    there, here = _identity(patching), _identity_of_model(model)
    names = [name for name in there if there[name] != here[name]]
    if names:
        differing = "; ".join(f"{name} is {there[name]} there, {here[name]} for the model" for name in names)
        raise ConfigError(
            f'key "data": the patches of {data} are not those that the model {directory} was trained on: {differing} '
            "(patch the documents with the model's entropy model and rule)"
        )


def _identity(patching: Patching) -> Mapping[str, str]:
    """What must agree, each by a name and a short text that tells two of them apart."""
    rule = {f"rule.{name}": str(value) for name, value in msgspec.to_builtins(patching.rule).items()}
    model, reset = patching.entropy_model, patching.reset_on_newline
    return {"entropy_model": str(model and model[:12]), **rule, "reset_on_newline": str(reset)}


def _identity_of_model(model: LanguageModelConfig) -> Mapping[str, str]:
    return _identity(
        Patching(
            entropy_model=model.entropy_fingerprint if model.patch_rule.needs_entropies else None,
            rule=model.patch_rule,
            reset_on_newline=model.reset_on_newline,
            dtype="",
            device="",
        )
    )


def _score_units(
    config: EvaluateConfig,
    units: Sequence[EvaluateUnit],
    model: str,
    storage: Storage,
    on_progress: Callable[[int], None],
) -> list[UnitScores]:
    """The scores of all units, in their order."""
    found: dict[EvaluateUnit, UnitScores] = {}
    items = [{"unit": msgspec.json.encode(unit).decode()} for unit in units]
    arguments = {"config": config, "model": os.path.abspath(model), "data": storage.root_uri}
    for row in run_units(items, EvaluateActor, arguments, config):
        scores = msgspec.json.decode(row["scores"], type=UnitScores)
        found[scores.unit] = scores
        on_progress(sum(scores.bytes))
    return [found[unit] for unit in units]


def _check_counts(shards: Sequence[ShardEntry], scores: Sequence[UnitScores], storage: Storage) -> None:
    """DataError unless documents, bytes and patches of every shard are the manifest's."""
    counted = {shard.path: np.zeros(3, np.int64) for shard in shards}
    for part in scores:
        counted[part.unit.path] += (len(part.bytes), sum(part.bytes), sum(part.patches))
    for shard in shards:
        found, stated = counted[shard.path].tolist(), [shard.documents, shard.bytes, shard.patches]
        if found != stated:
            raise DataError(
                f"shard {storage.url(shard.path)} holds {found} documents, bytes and patches; "
                f"the manifest says {stated}"
            )


class _Documents:
    """All scored documents in stored order, one array each."""

    def __init__(self, scores: Sequence[UnitScores]) -> None:
        self.bytes = np.asarray([value for part in scores for value in part.bytes], np.int64)
        self.nats = np.asarray([value for part in scores for value in part.nats], np.float64)
        self._sources = np.asarray([source for part in scores for source in part.sources])
        self._patches = np.asarray([value for part in scores for value in part.patches], np.int64)
        entropy_nats = [value for part in scores for value in part.entropy_model_nats or ()]
        self._entropy_nats = np.asarray(entropy_nats, np.float64) if entropy_nats else None

    def total(self) -> SourceFigures:
        return self._figures("", np.ones(len(self.bytes), np.bool_))

    def by_source(self) -> tuple[SourceFigures, ...]:
        return tuple(self._figures(str(name), self._sources == name) for name in np.unique(self._sources))

    def _figures(self, name: str, chosen: npt.NDArray[np.bool_]) -> SourceFigures:
        num_bytes, patches = int(self.bytes[chosen].sum()), int(self._patches[chosen].sum())

        def bpb(nats: Nats | None) -> float | None:
            return bits_per_byte(float(nats[chosen].sum()), num_bytes) if nats is not None and num_bytes else None

        return SourceFigures(
            source=name,
            documents=int(chosen.sum()),
            bytes=num_bytes,
            patches=patches,
            mean_patch_bytes=num_bytes / patches if patches else 0.0,
            nats=float(self.nats[chosen].sum()),
            bpb=bpb(self.nats),
            entropy_model_bpb=bpb(self._entropy_nats),
        )
