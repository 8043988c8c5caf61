"""Calibration: the threshold that gives a target mean patch size, found on a seeded sample of training documents.

In: document shards and an entropy model. Out: a `Calibration`. Actors compute the sample's entropies; the driver holds
the sample (about a MiB) and searches.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import torch

from blt.entropy_model import EntropyModel, document_entropies
from blt.errors import ConfigError
from blt.patching import PatchRule
from pipelines.actor_pool import ActorPoolConfig, run_units
from pipelines.manifest import read_manifest
from pipelines.model_files import model_fingerprint
from pipelines.model_patching import DEFAULT_RULE, limited
from pipelines.patch.calibration import Calibration
from pipelines.patch.model import load_model
from pipelines.patch.sample import SampleUnit, choose_sample, read_sample
from pipelines.patch.threshold import SampledDocument, find_threshold, measure_sources, measure_table
from pipelines.storage import Storage


@dataclass(frozen=True, kw_only=True)
class CalibrateConfig(ActorPoolConfig):
    """What mean patch size is aimed at, with which rule, on what sample."""

    rule: PatchRule = DEFAULT_RULE
    """Rule of kind entropy whose threshold is sought; its own is not used; without max_patch_length it gets 512."""
    target_mean_patch_bytes: float = 4.5
    """Mean patch size aimed at: document bytes per patch."""
    sample_bytes: int = 2**20
    """Bytes of whole training documents that are looked at."""
    reset_on_newline: bool = False
    """Open a new entropy-model context after each newline byte."""
    store_entropies: bool = False
    """As patch's: seek among multiples of 1/32 nat, with entropies rounded up to them (sets rule.quantized)."""
    seed: int = 0
    """Which sample."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rule.kind != "entropy":
            raise ConfigError(f"rule.kind must be entropy, whose threshold is sought, got {self.rule.kind}")
        if not self.target_mean_patch_bytes >= 1:
            raise ConfigError(f"target_mean_patch_bytes must be at least 1, got {self.target_mean_patch_bytes}")
        if self.sample_bytes < 1:
            raise ConfigError(f"sample_bytes must be at least 1, got {self.sample_bytes}")

    @property
    def final_rule(self) -> PatchRule:
        """The rule whose threshold is sought: with a longest patch, and quantized where entropies are stored."""
        quantized = self.rule.quantized or self.store_entropies
        return dataclasses.replace(limited(self.rule), quantized=quantized)


class EntropyActor:
    """Computes the entropies of one `SampleUnit` per call; one row per document comes out."""

    def __init__(self, *, documents: str, entropy_model: str, fingerprint: str, config: CalibrateConfig) -> None:
        self._storage = Storage(documents)
        self._config = config
        self._entropy_model, self._fingerprint = entropy_model, fingerprint
        self._model: EntropyModel | None = None

    def __call__(self, batch: Mapping[str, Sequence[str]]) -> dict[str, list[Any]]:
        """Columns path, row, text and entropies (float32 little-endian bytes)."""
        config = self._config
        if self._model is None:
            self._model = load_model(
                self._entropy_model, self._fingerprint, config.device, config.dtype, config.cpus_per_actor
            )
        units = [msgspec.json.decode(text, type=SampleUnit) for text in batch["unit"]]
        keys = [(unit.path, row) for unit in units for row in unit.rows]
        texts = [text for unit in units for text in read_sample(self._storage, unit)]
        entropies = document_entropies(
            self._model, texts, reset_on_newline=config.reset_on_newline, row_bytes=config.row_bytes
        )
        return {
            "path": [path for path, _ in keys],
            "row": [row for _, row in keys],
            "text": texts,
            "entropies": [values.numpy().astype("<f4").tobytes() for values in entropies],
        }


def calibrate(
    config: CalibrateConfig,
    documents: str,
    entropy_model: str,
    on_progress: Callable[[int], None] = lambda num_bytes: None,
) -> Calibration:
    """The threshold for `config.target_mean_patch_bytes` over a sample of the training documents of `documents`.

    `entropy_model` is a directory or an s3:// URI. `on_progress` is called with the bytes of each document whose
    entropies arrive. Ray must be initialised. ConfigError if no threshold comes within 2 % of the target (with a
    quantized rule: if the target lies outside of what thresholds reach); DataError or CheckpointError for broken input.
    """
    manifest = read_manifest(documents)
    fingerprint = model_fingerprint(entropy_model)
    storage = Storage(documents)
    units = choose_sample(storage, manifest.split("train"), config.sample_bytes, config.seed)
    arguments = {
        "documents": storage.root_uri,
        "entropy_model": Storage(entropy_model).root_uri,
        "fingerprint": fingerprint,
        "config": config,
    }
    sample = _sample_entropies(config, units, arguments, on_progress)
    rule = config.final_rule
    chosen = find_threshold(sample, rule, config.target_mean_patch_bytes)
    table = measure_table(sample, rule, chosen)
    return Calibration(
        threshold=chosen.threshold,
        mean_patch_bytes=chosen.mean_patch_bytes,
        target_mean_patch_bytes=config.target_mean_patch_bytes,
        rule=dataclasses.replace(rule, threshold=chosen.threshold),
        reset_on_newline=config.reset_on_newline,
        entropy_model=fingerprint,
        documents=manifest.fingerprint,
        sample_documents=len(sample),
        sample_bytes=sum(len(document.text) for document in sample),
        seed=config.seed,
        dtype=config.dtype,
        device=config.device,
        table=table,
        sources=measure_sources(sample, rule, [row.threshold for row in table]),
    )


def _sample_entropies(
    config: CalibrateConfig,
    units: Sequence[SampleUnit],
    arguments: Mapping[str, Any],
    on_progress: Callable[[int], None],
) -> list[SampledDocument]:
    """Documents of the units with their entropies, in the order of (shard, row)."""
    found: dict[tuple[str, int], SampledDocument] = {}
    source_of = {unit.path: unit.source for unit in units}
    items = [{"unit": msgspec.json.encode(unit).decode()} for unit in units]
    for row in run_units(items, EntropyActor, arguments, config):
        entropies = torch.from_numpy(np.frombuffer(row["entropies"], dtype="<f4").astype(np.float32))
        path, text = row["path"], row["text"]
        found[path, int(row["row"])] = SampledDocument(source=source_of[path], text=text, entropies=entropies)
        on_progress(len(text))
    return [found[key] for key in sorted(found)]
