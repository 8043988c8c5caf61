"""Thresholds: what each gives on a sample of documents, and the search for the one that meets a target mean patch size.

In: documents with their entropies, and a rule of kind entropy. Out: rows of a calibration's table. Pure. Every figure
is measured with the real patch rule, limits on patch length included.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from blt.errors import ConfigError
from blt.patching import ENTROPY_STEPS_PER_NAT, PatchRule, document_patch_starts, quantize_entropies, stored_entropies
from pipelines.patch.calibration import CalibrationRow, SourceCalibration

_TABLE_QUANTILES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.98)
"""Quantiles of the entropies (or their rises) whose thresholds the table shows."""
_CLOSE = 2e-4
"""Relative distance from the target at which bisection stops."""
_TOLERANCE = 0.02
"""Relative distance from the target that is accepted: on a tiny sample the mean moves in steps."""


@dataclass(frozen=True, kw_only=True)
class SampledDocument:
    """A document of the sample and its entropies, float32 [n + 1] nats."""

    source: str
    text: bytes
    entropies: Tensor


def find_threshold(
    sample: Sequence[SampledDocument], rule: PatchRule, target_mean_patch_bytes: float
) -> CalibrationRow:
    """The row of the threshold nearest to the target; of a quantized rule a multiple of 1/32.

    The mean patch size never falls as the threshold rises: a start that goes away merges two patches, and
    max_patch_length cuts the merged one into no more pieces than the two. ConfigError with the range in reach if the
    target lies outside of it by more than 2 %, or if an unquantized rule comes no nearer.
    """
    scores = _scores(sample, rule)
    low, high = float(scores.min()) - 1.0, float(scores.max()) + 1.0
    smallest, largest = measure(sample, rule, low), measure(sample, rule, high)
    search = _search_steps if rule.quantized else _bisect
    best = search(sample, rule, target_mean_patch_bytes, smallest, largest)
    # Between two steps of a quantized rule there is nothing nearer; beyond the last of them there is no target.
    is_between = smallest.mean_patch_bytes <= target_mean_patch_bytes <= largest.mean_patch_bytes
    if not (rule.quantized and is_between) and abs(best.mean_patch_bytes / target_mean_patch_bytes - 1) > _TOLERANCE:
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


def measure_table(
    sample: Sequence[SampledDocument], rule: PatchRule, chosen: CalibrationRow
) -> tuple[CalibrationRow, ...]:
    """Rows over the range of useful thresholds, ascending, `chosen` among them; of a quantized rule multiples of 1/32,
    those next to the chosen one included."""
    quantiles = np.quantile(_scores(sample, rule), _TABLE_QUANTILES)
    if rule.quantized:
        steps = {round(float(value) * ENTROPY_STEPS_PER_NAT) for value in quantiles}
        chosen_step = round(chosen.threshold * ENTROPY_STEPS_PER_NAT)
        thresholds = {step / ENTROPY_STEPS_PER_NAT for step in steps | {chosen_step - 1, chosen_step + 1}}
    else:
        thresholds = {round(float(value), 4) for value in quantiles}
    rows = [measure(sample, rule, threshold) for threshold in thresholds - {chosen.threshold}]
    return tuple(sorted([*rows, chosen], key=lambda row: row.threshold))


def measure_sources(
    sample: Sequence[SampledDocument], rule: PatchRule, thresholds: Sequence[float]
) -> tuple[SourceCalibration, ...]:
    """What the same thresholds give on the documents of each source, by name."""
    by_source: dict[str, list[SampledDocument]] = {}
    for document in sample:
        by_source.setdefault(document.source, []).append(document)
    return tuple(
        SourceCalibration(
            source=source,
            sample_documents=len(documents),
            sample_bytes=sum(len(document.text) for document in documents),
            table=tuple(measure(documents, rule, threshold) for threshold in thresholds),
        )
        for source, documents in sorted(by_source.items())
    )


def _bisect(
    sample: Sequence[SampledDocument],
    rule: PatchRule,
    target: float,
    smallest: CalibrationRow,
    largest: CalibrationRow,
) -> CalibrationRow:
    low, high = smallest.threshold, largest.threshold
    best = _nearest(target, smallest, largest)
    while high - low > 1e-6 and abs(best.mean_patch_bytes / target - 1) > _CLOSE:
        middle = measure(sample, rule, round((low + high) / 2, 7))
        best = _nearest(target, best, middle)
        if middle.mean_patch_bytes < target:
            low = middle.threshold
        else:
            high = middle.threshold
    return best


def _search_steps(
    sample: Sequence[SampledDocument],
    rule: PatchRule,
    target: float,
    smallest: CalibrationRow,
    largest: CalibrationRow,
) -> CalibrationRow:
    """The nearer of the two neighbouring multiples of 1/32 that the target lies between."""
    low, high = smallest, largest
    while (steps := round((high.threshold - low.threshold) * ENTROPY_STEPS_PER_NAT)) > 1:
        middle = measure(sample, rule, low.threshold + steps // 2 / ENTROPY_STEPS_PER_NAT)
        low, high = (middle, high) if middle.mean_patch_bytes < target else (low, middle)
    return _nearest(target, low, high)


def _nearest(target: float, *rows: CalibrationRow) -> CalibrationRow:
    return min(rows, key=lambda row: abs(row.mean_patch_bytes - target))


def _patch_lengths(document: SampledDocument, rule: PatchRule) -> npt.NDArray[np.int64]:
    starts = document_patch_starts(document.text, document.entropies, rule).numpy()[:-1]
    return np.diff(np.flatnonzero(starts), append=len(starts))


def _scores(sample: Sequence[SampledDocument], rule: PatchRule) -> npt.NDArray[np.float32]:
    """All values that the rule compares with its threshold: entropies, or their rises if it is monotonic."""
    parts = [document.entropies for document in sample]
    if rule.quantized:
        parts = [stored_entropies(quantize_entropies(part)) for part in parts]
    return np.concatenate([np.diff(part.numpy()) if rule.monotonic else part.numpy() for part in parts])
