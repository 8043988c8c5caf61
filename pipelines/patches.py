"""The public reader of patch datasets: Arrow batches with vectorised patch lengths, or documents one by one.

    dataset = pipelines.open_patches("s3://bucket/patches", split="train")
    for batch in dataset:  # a pyarrow.RecordBatch for each row group
        batch["text"], batch["patch_lengths"]

In: the root of a finished patch dataset, a local path or a URI. Out: its columns, and `patch_lengths` list<int32>, the
lengths in bytes of a document's patches: they sum to n_bytes, and leave out BOS and EOS. Needs no Ray.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from blt.errors import ConfigError, DataError
from blt.patching import ENTROPY_STEPS_PER_NAT
from pipelines.manifest import SPLITS, Manifest, ShardEntry, Split, read_manifest
from pipelines.schema import ENTROPY_FIELD, patch_schema
from pipelines.shard_file import ShardFile, open_shard
from pipelines.storage import Storage

PATCH_LENGTHS = pa.field("patch_lengths", pa.list_(pa.field("element", pa.int32(), nullable=False)), nullable=False)
"""The column that is computed from `patch_starts`; it is not in the files."""

_DECODED_FROM = ("n_bytes", "patch_starts", "n_patches")

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class PatchedDocument:
    """One document and its patches."""

    doc_id: str
    source: str
    text: bytes
    patch_lengths: npt.NDArray[np.int32]
    """Bytes of each patch, [n_patches]; they sum to len(text)."""
    entropies: npt.NDArray[np.float32] | None
    """Nats, rounded up to 1/32: [n_bytes + 1], value 0 made at BOS, value i at byte i - 1. None if none are stored."""


@dataclass(frozen=True, kw_only=True)
class PatchDataset:
    """A finished patch dataset, or some of its shards. Holds no open file, so that it can be pickled.

    Iteration reads shard after shard in the manifest's order, one row group in memory at a time. To share the work,
    give each worker `dataclasses.replace(dataset, shards=dataset.shards[rank::world_size])`.
    """

    uri: str
    manifest: Manifest
    """Of the whole dataset."""
    shards: tuple[ShardEntry, ...]
    """Those that are read."""
    columns: tuple[str, ...]
    """Of the batches, in this order."""
    verify: bool

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        return self.batches()

    def batches(self) -> Iterator[pa.RecordBatch]:
        """One batch for each row group, with the columns asked for.

        DataError, naming shard and row group, for what cannot be read, or rows whose patch starts do not fit their
        n_bytes and n_patches.
        """
        return self._read(self.columns)

    def documents(self) -> Iterator[PatchedDocument]:
        """Every document by itself: a convenience, many times slower than batches. `columns` has no say in it."""
        stored = [ENTROPY_FIELD.name] if self.manifest.entropies else []
        for batch in self._read(("doc_id", "source", "text", PATCH_LENGTHS.name, *stored)):
            lengths = batch[PATCH_LENGTHS.name]
            values, offsets = lengths.values.to_numpy(), lengths.offsets.to_numpy()
            for row in range(batch.num_rows):
                yield PatchedDocument(
                    doc_id=batch["doc_id"][row].as_py(),
                    source=batch["source"][row].as_py(),
                    text=batch["text"][row].as_py(),
                    patch_lengths=values[offsets[row] : offsets[row + 1]],
                    entropies=_nats(batch[ENTROPY_FIELD.name][row].as_buffer()) if stored else None,
                )

    def _read(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        storage, schema = Storage(self.uri), patch_schema(self.manifest.entropies)
        for shard in self.shards:
            yield from _read_shard(storage, shard.path, columns, schema, self.verify)


def open_patches(
    uri: str,
    *,
    split: Split | None = None,
    sources: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
    verify: bool = True,
) -> PatchDataset:
    """The patch dataset at `uri`, all of it, or one split, or the shards of some sources.

    `columns` names those of the batches, `patch_lengths` among them (None: all); what is not asked for is not read.
    `verify` checks the checksum of every page. DataError if there is no finished patch dataset of this release;
    ConfigError for a split, source or column that it does not have.
    """
    manifest = read_manifest(uri)
    if manifest.kind != "patches":
        raise DataError(f"{uri} is a dataset of {manifest.kind}, not of patches")
    if split is not None:
        _known("split", [split], SPLITS)
    if sources is not None:
        _known("sources", sources, sorted(manifest.counts))
    names = (*patch_schema(manifest.entropies).names, PATCH_LENGTHS.name)
    chosen = names if columns is None else tuple(columns)
    _known("columns", chosen, names)
    shards = tuple(
        shard
        for shard in manifest.shards
        if (split is None or shard.split == split) and (sources is None or shard.source in sources)
    )
    return PatchDataset(uri=Storage(uri).root_uri, manifest=manifest, shards=shards, columns=chosen, verify=verify)


def patch_lengths(patch_starts: pa.Array, n_bytes: Integers, n_patches: Integers) -> pa.ListArray:
    """list<int32>: the lengths of each document's patches, from the bits of the column `patch_starts`.

    DataError, naming the first row, unless each value has n_bytes + 1 bits, the first of them set, and n_patches set
    among the first n_bytes.
    """
    packed, borders = _bytes_and_borders(patch_starts)
    _refuse(np.diff(borders) != (n_bytes + 8) // 8, "patch_starts does not have n_bytes + 1 bits")
    bits = np.unpackbits(packed, bitorder="little").view(np.bool_)  # flatnonzero is 5 times slower on uint8
    first = borders[:-1] * 8
    _refuse(~bits[first], "the first byte (or EOS) does not start a patch")
    eos = first + n_bytes
    bits[eos] = True  # closes the last patch, whether or not EOS starts one
    places = np.flatnonzero(bits)
    ends = np.cumsum(n_patches + 1)
    # With as many places as patches and one EOS each, and every EOS where it must stand, no count is wrong and no bit
    # behind an EOS is set.
    if ends[-1:].sum() != len(places) or not np.array_equal(places[ends - 1], eos):
        counted = np.searchsorted(places, eos) - np.searchsorted(places, first)
        _refuse(counted != n_patches, "n_patches is not the number of patch starts among the bytes")
        raise DataError("patch_starts has bits set behind EOS")
    inside = np.ones(max(len(places) - 1, 0), np.bool_)
    inside[ends[:-1] - 1] = False  # from an EOS to the next document
    lengths = np.diff(places)[inside].astype(np.int32)
    offsets = np.concatenate(([0], np.cumsum(n_patches))).astype(np.int32)
    return pa.ListArray.from_arrays(offsets, lengths, type=PATCH_LENGTHS.type)


def _read_shard(
    storage: Storage, path: str, columns: Sequence[str], schema: pa.Schema, verify: bool
) -> Iterator[pa.RecordBatch]:
    """The batches of one shard, whose file has this schema; DataError, naming it and the row group."""
    with open_shard(storage, path, schema, verify=verify) as shard:
        for number in range(shard.num_row_groups):
            yield _batch(shard, number, columns)


def _batch(shard: ShardFile, number: int, columns: Sequence[str]) -> pa.RecordBatch:
    """One row group with these columns, in this order."""
    computed = PATCH_LENGTHS.name in columns
    stored = {*columns, *(_DECODED_FROM if computed else ())} - {PATCH_LENGTHS.name}
    table = shard.read(number, sorted(stored))
    arrays = {name: _one_array(table[name]) for name in stored}
    fields = {field.name: field for field in table.schema} | {PATCH_LENGTHS.name: PATCH_LENGTHS}
    if computed:
        counts = (arrays[name].to_numpy().astype(np.int64) for name in ("n_bytes", "n_patches"))
        try:
            arrays[PATCH_LENGTHS.name] = patch_lengths(arrays["patch_starts"], *counts)
        except DataError as error:
            raise DataError(f"shard {shard.url}, row group {number}: {error}") from error
    schema = pa.schema([fields[name] for name in columns])
    return pa.RecordBatch.from_arrays([arrays[name] for name in columns], schema=schema)


def _one_array(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _bytes_and_borders(column: pa.Array) -> tuple[npt.NDArray[np.uint8], Integers]:
    """The values of a binary array end to end, and where in them each begins, with the end at the end: [rows + 1]."""
    _, offsets, data = column.buffers()
    borders = np.frombuffer(offsets, np.int32)[column.offset : column.offset + len(column) + 1].astype(np.int64)
    values = np.frombuffer(data, np.uint8)[borders[0] : borders[-1]] if data else np.zeros(0, np.uint8)
    return values, borders - borders[0]


def _nats(stored: pa.Buffer) -> npt.NDArray[np.float32]:
    return np.frombuffer(stored, np.uint8).astype(np.float32) / np.float32(ENTROPY_STEPS_PER_NAT)


def _refuse(wrong: npt.NDArray[np.bool_], reason: str) -> None:
    """DataError, naming the first row that is wrong."""
    if wrong.any():
        raise DataError(f"row {int(wrong.argmax())}: {reason}")


def _known(name: str, given: Sequence[str], accepted: Sequence[str]) -> None:
    """ConfigError, naming the first value that is not accepted."""
    for value in given:
        if value not in accepted:
            raise ConfigError(f"{name}: {value!r} is not in the dataset; it has {', '.join(accepted)}")
