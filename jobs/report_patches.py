"""What a report reads from a patch dataset: the distribution of patch lengths, and one passage with its patches.

Row groups are read one at a time and only the columns that are needed, so a dataset of any size streams through.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from blt.errors import ConfigError
from pipelines import open_patches
from pipelines.manifest import Manifest, ShardEntry
from pipelines.schema import unpack_starts


@dataclass(frozen=True, kw_only=True)
class PatchLengths:
    """How many patches have each length; EOS and BOS are not counted."""

    counts: tuple[int, ...]
    """Entry n: patches of n bytes; entry 0 is 0."""

    @property
    def patches(self) -> int:
        return sum(self.counts)

    @property
    def longest(self) -> int:
        return len(self.counts) - 1

    def quantile(self, share: float) -> int:
        """The smallest length that at least this share of the patches does not exceed; 0 without patches."""
        below = np.cumsum(self.counts)
        return int(np.searchsorted(below, share * below[-1])) if below[-1] else 0


@dataclass(frozen=True, kw_only=True)
class Passage:
    """Part of a document, from the start of a patch to the end of one."""

    doc_id: str
    split: str
    offset: int
    """Of its first byte in the document."""
    text: bytes
    starts: tuple[bool, ...]
    """For each byte, whether it starts a patch."""
    before: bytes
    """The document up to `offset`: its entropies depend on it."""


def patch_lengths(
    root: str, manifest: Manifest, on_progress: Callable[[int], None] = lambda num_bytes: None
) -> PatchLengths:
    """Patch lengths of the whole dataset; `on_progress` gets the text bytes of each row group. DataError if broken."""
    counts = np.zeros(1, np.int64)
    for shard in manifest.shards:
        for batch in _batches(root, shard, ["n_bytes", "patch_lengths"]):
            counts = _added(counts, np.bincount(batch["patch_lengths"].values.to_numpy()))
            on_progress(int(batch["n_bytes"].to_numpy().sum()))
    return PatchLengths(counts=tuple(counts.tolist()))


def read_passage(
    root: str, manifest: Manifest, *, num_bytes: int, document: str | None = None, offset: int = 0
) -> Passage | None:
    """About `num_bytes` of a held-out document (of a training document where none is held out), in whole patches.

    `document` is its doc_id; by default it is the first one that is long enough, else the longest. None if the dataset
    has no text; ConfigError for a document that is not there or that ends before `offset`.
    """
    shards = manifest.split("valid") if any(shard.bytes for shard in manifest.split("valid")) else manifest.shards
    found = _find(root, shards, document, offset + num_bytes)
    if found is None:
        if document is None:
            return None
        raise ConfigError(f'passage_document "{document}" is not in {root}')
    shard, group, row = found
    columns = ["doc_id", "text", "n_bytes", "patch_starts"]
    batch = next(itertools.islice(_batches(root, shard, columns), group, None)).slice(row, 1)
    doc_id, text, n_bytes = (batch[name][0].as_py() for name in ("doc_id", "text", "n_bytes"))
    if offset >= n_bytes:
        raise ConfigError(f'passage_offset {offset} is beyond the {n_bytes} bytes of document "{doc_id}"')
    starts = unpack_starts(batch["patch_starts"][0].as_py(), n_bytes)
    first, last = _whole_patches(starts, offset, offset + num_bytes)
    return Passage(
        doc_id=doc_id,
        split=shard.split,
        offset=first,
        text=text[first:last],
        starts=tuple(starts[first:last].tolist()),
        before=text[:first],
    )


def _added(counts: npt.NDArray[np.int64], more: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    longer, shorter = (counts, more) if len(counts) >= len(more) else (more, counts)
    total = longer.copy()
    total[: len(shorter)] += shorter
    return total


def _find(
    root: str, shards: Sequence[ShardEntry], document: str | None, num_bytes: int
) -> tuple[ShardEntry, int, int] | None:
    """Shard, row group and row of the document: the one asked for, or the first of `num_bytes`, or the longest."""
    longest, place = 0, None
    for shard in shards:
        for group, batch in enumerate(_batches(root, shard, ["doc_id", "n_bytes"])):
            names = batch["doc_id"].to_pylist() if document is not None else ()
            for row, size in enumerate(batch["n_bytes"].to_pylist()):
                if document is not None:
                    if names[row] == document:
                        return shard, group, row
                elif size > longest:
                    longest, place = size, (shard, group, row)
                    if size >= num_bytes:
                        return place
    return place


def _whole_patches(starts: npt.NDArray[np.bool_], first: int, last: int) -> tuple[int, int]:
    """Borders of the patches that hold the bytes from `first` to before `last`."""
    n_bytes = len(starts) - 1
    opening = np.flatnonzero(starts[: first + 1])
    closing = np.flatnonzero(starts[last:n_bytes]) if last < n_bytes else np.empty(0, np.int64)
    return (int(opening[-1]) if len(opening) else 0), (last + int(closing[0]) if len(closing) else n_bytes)


def _batches(root: str, shard: ShardEntry, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """The columns of each row group of the shard."""
    return iter(dataclasses.replace(open_patches(root, columns=columns), shards=(shard,)))
