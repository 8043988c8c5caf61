"""The index of a split: how many sequences each row group is cut into, for one (S, T). Made once, kept in the dataset.

In: a dataset's manifest and its n_bytes and patch_starts columns. Out: `Index`. Shards are read in parallel by Ray.
"""

import dataclasses
import hashlib

import msgspec
import ray

from blt.errors import DataError
from pipelines.manifest import Split, read_manifest
from pipelines.storage import Storage
from pipelines.train.packing import cut_sequences
from pipelines.train.row_group import num_row_groups, read_row_group


class IndexedRowGroup(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A row group and the number of sequences it is cut into. Large corpora have millions: none is tracked by the
    garbage collector, which would walk over all of them.
    """

    path: str
    source: str
    row_group: int
    sequences: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Index:
    """All row groups of a split, in stored order."""

    dataset: str
    """Fingerprint of the manifest that the index was made from."""
    split: Split
    sequence_patches: int | None
    sequence_bytes: int
    row_groups: tuple[IndexedRowGroup, ...]

    @property
    def sequences(self) -> int:
        return sum(group.sequences for group in self.row_groups)

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(msgspec.json.encode(self, order="sorted")).hexdigest()


def build_index(
    root: str,
    split: Split,
    sequence_patches: int | None,
    sequence_bytes: int,
) -> Index:
    """The index of a split, read from the dataset if it was made before. DataError if the split holds nothing."""
    manifest, storage = read_manifest(root), Storage(root)
    path = f"_index/{split}-{sequence_patches}-{sequence_bytes}.json"
    found = _read_index(storage, path)
    if found is not None and found.dataset == manifest.fingerprint:
        return found
    read = ray.remote(num_cpus=1)(index_shard)
    shards = manifest.split(split)
    pending = [read.remote(root, shard.path, shard.source, sequence_patches, sequence_bytes) for shard in shards]
    row_groups: list[IndexedRowGroup] = []
    for result in pending:
        found_in_shard: list[IndexedRowGroup] = ray.get(result)
        row_groups.extend(found_in_shard)
    if not sum(group.sequences for group in row_groups):
        raise DataError(f"{root}: the {split} split holds no documents")
    index = Index(
        dataset=manifest.fingerprint,
        split=split,
        sequence_patches=sequence_patches,
        sequence_bytes=sequence_bytes,
        row_groups=tuple(row_groups),
    )
    storage.write_replace(path, msgspec.json.encode(index))
    return index


def _read_index(storage: Storage, path: str) -> Index | None:
    """The stored index; None if there is none, or one that another version wrote."""
    if not storage.exists(path):
        return None
    try:
        return msgspec.json.decode(storage.read_bytes(path), type=Index)
    except msgspec.DecodeError:
        return None


def index_shard(
    root: str, path: str, source: str, sequence_patches: int | None, sequence_bytes: int
) -> list[IndexedRowGroup]:
    """The index of one shard."""
    storage, found = Storage(root), []
    for number in range(num_row_groups(storage, path)):
        group = read_row_group(storage, path, number, with_text=False)
        sequences = sum(1 for _ in cut_sequences(group, sequence_patches, sequence_bytes))
        found.append(IndexedRowGroup(path=path, source=source, row_group=number, sequences=sequences))
    return found
