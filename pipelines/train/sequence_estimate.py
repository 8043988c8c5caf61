"""How many sequences a split is cut into, estimated from a manifest alone: shards' bytes, documents and patches in,
sequences by source out. The index counts them, but has to read every document.

A sequence is full at its bytes or at its patches, whichever comes first, so there are at least as many as either asks
for; where patches are long in one place and short in another there are more. Each row group ends with one that is not
full.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pipelines.manifest import Manifest, ShardEntry, Split
from pipelines.schema import ROW_GROUP_BYTES


@dataclass(frozen=True, kw_only=True)
class SourceEstimate:
    """A source of a split."""

    documents: int
    bytes: int
    sequences: int
    """Estimated."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What updates read, on average over many."""

    sequence_bytes: float
    """Document bytes of a sequence."""
    epochs: Mapping[str, float]
    """How often each source is read."""


def estimate_sequences(
    manifest: Manifest, split: Split, sequence_patches: int | None, sequence_bytes: int
) -> dict[str, SourceEstimate]:
    """Every source of the split that holds documents, by name; `sequence_patches` None where nothing has patches."""
    shards: dict[str, list[ShardEntry]] = {}
    for shard in manifest.split(split):
        if shard.documents:
            shards.setdefault(shard.source, []).append(shard)
    return {
        source: SourceEstimate(
            documents=sum(shard.documents for shard in held),
            bytes=sum(shard.bytes for shard in held),
            sequences=sum(_sequences(shard, sequence_patches, sequence_bytes) for shard in held),
        )
        for source, held in sorted(shards.items())
    }


def estimate_reading(
    sources: Mapping[str, SourceEstimate], weights: Mapping[str, float] | None, num_sequences: int
) -> Reading:
    """What `num_sequences` are of, drawn by `weights`; None: by the sources' numbers of sequences."""
    shares = weights or {name: float(source.sequences) for name, source in sources.items()}
    whole = sum(shares.values())
    each = {name: share / whole for name, share in shares.items()}
    return Reading(
        sequence_bytes=sum(share * sources[name].bytes / sources[name].sequences for name, share in each.items()),
        epochs={name: share * num_sequences / sources[name].sequences for name, share in each.items()},
    )


def mean_patch_bytes(shards: Iterable[ShardEntry]) -> float:
    """Bytes for each patch; 1 where nothing has patches."""
    held = list(shards)
    patches = sum(shard.patches or 0 for shard in held)
    return sum(shard.bytes for shard in held) / patches if patches else 1.0


def _sequences(shard: ShardEntry, max_patches: int | None, max_bytes: int) -> int:
    """Of a shard whose row groups are of the usual size."""
    num_groups = -(-shard.bytes // ROW_GROUP_BYTES) or 1
    ids = shard.bytes + 2 * shard.documents  # BOS and EOS
    mean = mean_patch_bytes([shard])
    # A sequence is cut at the border of a patch, on average half a patch before it is full.
    full = ids / max(max_bytes - mean / 2, 1.0)
    if max_patches is not None:
        # BOS is a patch, and EOS about as often one as a byte is. A fragment opens with a patch of the one before it.
        patches = (shard.patches or 0) + shard.documents * (1 + 1 / mean)
        full = max(full, patches / (max_patches - 1))
    return num_groups * math.ceil(full / num_groups)
