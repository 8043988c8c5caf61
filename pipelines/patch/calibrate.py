"""Calibration: the threshold that gives a target mean patch size, found on a seeded sample of training documents.

In: document shards and an entropy model. Out: a `Calibration`. Actors compute the sample's entropies; the driver holds
the sample (about a MiB) and bisects with the real patch rule, limits on patch length included.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from blt.checkpoint import entropy_model_fingerprint
from blt.entropy_model import EntropyModel, document_entropies
from blt.errors import ConfigError
from blt.patching import PatchRule, document_patch_starts
from pipelines.actor_pool import ActorPoolConfig, run_units
from pipelines.manifest import read_manifest
from pipelines.patch.calibration import Calibration, CalibrationRow
from pipelines.patch.model import load_model
from pipelines.patch.plan import DEFAULT_MAX_PATCH_LENGTH, limited
from pipelines.patch.sample import SampleUnit, choose_sample, read_sample
from pipelines.storage import Storage

_TABLE_QUANTILES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.98)
"""Quantiles of the entropies (or their rises) whose thresholds the table shows."""
_CLOSE = 2e-4
"""Relative distance from the target at which bisection stops."""
_TOLERANCE = 0.02
"""Relative distance from the target that is accepted: on a tiny sample the mean moves in steps."""


@dataclass(frozen=True, kw_only=True)
class CalibrateConfig(ActorPoolConfig):
    """What mean patch size is aimed at, with which rule, on what sample."""

    rule: PatchRule = PatchRule(max_patch_length=DEFAULT_MAX_PATCH_LENGTH)
    """Rule of kind entropy whose threshold is sought; its own is not used; without max_patch_length it gets 512."""
    target_mean_patch_bytes: float = 4.5
    """Mean patch size aimed at: document bytes per patch."""
    sample_bytes: int = 2**20
    """Bytes of whole training documents that are looked at."""
    reset_on_newline: bool = False
    """Open a new entropy-model context after each newline byte."""
    seed: int = 0
    """Which sample."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rule.kind != "entropy":
            raise ConfigError(f"calibrate seeks the threshold of rule.kind entropy, got {self.rule.kind}")
        if not self.target_mean_patch_bytes >= 1:
            raise ConfigError(f"target_mean_patch_bytes must be at least 1, got {self.target_mean_patch_bytes}")
        if self.sample_bytes < 1:
            raise ConfigError(f"sample_bytes must be at least 1, got {self.sample_bytes}")


@dataclass(frozen=True, kw_only=True)
class SampledDocument:
    """A document of the sample and its entropies, float32 [n + 1] nats."""

    text: bytes
    entropies: Tensor


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

    `on_progress` is called with the bytes of each document whose entropies arrive. Ray must be initialised. ConfigError
    if no threshold comes within 2 % of the target; DataError or CheckpointError for broken input.
    """
    manifest = read_manifest(documents)
    fingerprint = entropy_model_fingerprint(entropy_model)
    storage = Storage(documents)
    units = choose_sample(storage, manifest.split("train"), config.sample_bytes, config.seed)
    arguments = {
        "documents": storage.root_uri,
        "entropy_model": os.path.abspath(entropy_model),
        "fingerprint": fingerprint,
        "config": config,
    }
    sample = _sample_entropies(config, units, arguments, on_progress)
    rule = limited(config.rule)
    chosen = find_threshold(sample, rule, config.target_mean_patch_bytes)
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
        table=_table(sample, rule, chosen),
    )


def _sample_entropies(
    config: CalibrateConfig,
    units: Sequence[SampleUnit],
    arguments: Mapping[str, Any],
    on_progress: Callable[[int], None],
) -> list[SampledDocument]:
    """Documents of the units with their entropies, in the order of (shard, row)."""
    found: dict[tuple[str, int], SampledDocument] = {}
    items = [{"unit": msgspec.json.encode(unit).decode()} for unit in units]
    for row in run_units(items, EntropyActor, arguments, config):
        entropies = torch.from_numpy(np.frombuffer(row["entropies"], dtype="<f4").astype(np.float32))
        found[row["path"], int(row["row"])] = SampledDocument(text=row["text"], entropies=entropies)
        on_progress(len(row["text"]))
    return [found[key] for key in sorted(found)]


def find_threshold(
    sample: Sequence[SampledDocument], rule: PatchRule, target_mean_patch_bytes: float
) -> CalibrationRow:
    """Bisect the threshold of `rule`; ConfigError with the reachable range if no threshold comes within 2 %.

    The mean patch size never falls as the threshold rises: a start that goes away merges two patches, and
    max_patch_length cuts the merged one into no more pieces than the two.
    """
    scores = _scores(sample, rule)
    low, high = float(scores.min()) - 1.0, float(scores.max()) + 1.0
    smallest, largest = measure(sample, rule, low), measure(sample, rule, high)
    best = min(smallest, largest, key=lambda row: abs(row.mean_patch_bytes - target_mean_patch_bytes))
    while high - low > 1e-6 and abs(best.mean_patch_bytes / target_mean_patch_bytes - 1) > _CLOSE:
        middle = measure(sample, rule, round((low + high) / 2, 7))
        best = min(best, middle, key=lambda row: abs(row.mean_patch_bytes - target_mean_patch_bytes))
        if middle.mean_patch_bytes < target_mean_patch_bytes:
            low = middle.threshold
        else:
            high = middle.threshold
    if abs(best.mean_patch_bytes / target_mean_patch_bytes - 1) > _TOLERANCE:
        raise ConfigError(
            f"target_mean_patch_bytes {target_mean_patch_bytes:g} is out of reach: on this sample the rule gives "
            f"{smallest.mean_patch_bytes:.2f} to {largest.mean_patch_bytes:.2f}, nearest {best.mean_patch_bytes:.2f}"
        )
    return best


def measure(sample: Sequence[SampledDocument], rule: PatchRule, threshold: float) -> CalibrationRow:
    """What `threshold` gives on the sample; patches are counted among the bytes, BOS and EOS apart."""
    rule = dataclasses.replace(rule, threshold=threshold)
    lengths = np.concatenate([_patch_lengths(document, rule) for document in sample])
    return CalibrationRow(
        threshold=threshold,
        mean_patch_bytes=float(lengths.sum() / len(lengths)),
        p99_patch_bytes=int(np.percentile(lengths, 99, method="inverted_cdf")),
        one_byte_share=float((lengths == 1).mean()),
    )


def _patch_lengths(document: SampledDocument, rule: PatchRule) -> npt.NDArray[np.int64]:
    starts = document_patch_starts(document.text, document.entropies, rule).numpy()[:-1]
    return np.diff(np.flatnonzero(starts), append=len(starts))


def _scores(sample: Sequence[SampledDocument], rule: PatchRule) -> npt.NDArray[np.float32]:
    """All values that the rule compares with its threshold: entropies, or their rises if it is monotonic."""
    parts = [document.entropies.numpy() for document in sample]
    return np.concatenate([np.diff(part) if rule.monotonic else part for part in parts])


def _table(sample: Sequence[SampledDocument], rule: PatchRule, chosen: CalibrationRow) -> tuple[CalibrationRow, ...]:
    thresholds = {round(float(value), 4) for value in np.quantile(_scores(sample, rule), _TABLE_QUANTILES)}
    rows = [measure(sample, rule, threshold) for threshold in thresholds - {chosen.threshold}]
    return tuple(sorted([*rows, chosen], key=lambda row: row.threshold))
