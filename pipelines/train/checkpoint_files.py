"""Files of a checkpoint: tensors that torch's distributed checkpointing (DCP) plans in, safetensors on storage out.

`FilesWriter` and `FilesReader` are what DCP asks of a storage: it plans who writes and who reads which box of which
tensor, so that a checkpoint loads at any number of ranks; they move bytes. No pickle is written or read.
Each rank writes the parts that it holds, tensors of one kind (NAME's text before the first dot: model, exp_avg, ...) in
files of their own, so that a reader of weights passes the moments over. The headers say where a part belongs in its
tensor as DCP's own safetensors files do, so torch's HuggingFaceStorageReader reads a directory too.

DIR/KIND-ID.safetensors   parts of tensors
DIR/complete.json         `CheckpointRecord`
"""

import contextlib
import dataclasses
import functools
import json
import logging
import math
import uuid
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from blt.errors import BltError, CheckpointError, DataError
from pipelines.storage import Storage
from pipelines.train.checkpoint_record import (
    DTYPES,
    RECORD_NAME,
    CheckpointRecord,
    Part,
    StoredFile,
    StoredTensor,
    encode_record,
)

logger = logging.getLogger(__name__)

FILE_BYTES = 4 * 2**30
"""A file ends with the part that reaches this; an upload to S3 takes no more than 10,000 blocks."""
THREADS = 8
"""Files written, or ranges read, at the same time by a rank."""
READ_BYTES = 16 * 2**20
"""Asked for in one request, at most (but a row at least): what a reader holds in memory for each thread."""
GAP_BYTES = 64 * 1024
"""What may lie unused between two parts that are read in one request."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_SHARDING_KEY, _OFFSETS_KEY = "DCP_SHARDING_INFO", "saved_offsets"


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Written:
    """What a rank tells of a part that it wrote."""

    part: Part
    file: StoredFile


class FilesWriter(StorageWriter):
    """Writes one checkpoint into `directory` of a storage; the coordinating rank completes `record` and puts it there.

    record: without files and tensors.
    """

    def __init__(self, storage: Storage, directory: str, record: CheckpointRecord) -> None:
        self._storage, self._directory = storage, directory
        self.record = record
        self._files: list[str] = []
        self._sealed: bytes | None = None

    def reset(self, checkpoint_id: Any = None) -> None: ...

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None: ...

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> "Future[list[WriteResult]]":
        done: Future[list[WriteResult]] = Future()
        with ThreadPoolExecutor(THREADS, thread_name_prefix="checkpoint-write") as pool:
            written = list(pool.map(functools.partial(self._write, planner), _files(plan.items)))
        done.set_result([result for of_file in written for result in of_file])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        files: dict[str, StoredFile] = {}
        parts: dict[str, list[Part]] = defaultdict(list)
        for result in (result for of_rank in results for result in of_rank):
            part = result.storage_data.part
            parts[result.index.fqn].append(part)
            files[part.file] = result.storage_data.file
        self._check_visible(files)
        tensors = {name: _stored(tensor, parts[name]) for name, tensor in metadata.state_dict_metadata.items()}
        self.record = dataclasses.replace(self.record, files=files, tensors=tensors)
        self._sealed = encode_record(self.record)
        self._storage.write_replace(f"{self._directory}/{RECORD_NAME}", self._sealed)

    def discard(self) -> None:
        """Remove what this rank wrote, as far as storage lets it; a checkpoint of the same step from before stays."""
        record = f"{self._directory}/{RECORD_NAME}"
        try:
            with contextlib.suppress(FileNotFoundError):
                # The answer to its writing may be what was lost; it goes first, while its files are there.
                if self._sealed is not None and self._storage.read_bytes(record) == self._sealed:
                    self._storage.delete(record)
            remove_files(self._storage, (f"{self._directory}/{name}" for name in self._files))
        except (BltError, OSError) as error:
            logger.warning("files of a failed checkpoint stay until the next one is whole: %s", error)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True

    def _write(self, planner: SavePlanner, items: Sequence[WriteItem]) -> list[WriteResult]:
        """One file."""
        # A new name each time: what a killed save left, or another one writes, is never taken for it.
        name = f"{_kind(items[0])}-{uuid.uuid4().hex}.safetensors"
        self._files.append(name)
        header, parts = _header(items, name)
        with self._storage.create(f"{self._directory}/{name}") as new:
            new.write(header)
            for item in items:
                tensor = planner.resolve_data(item)
                assert isinstance(tensor, Tensor)
                new.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        file = StoredFile(bytes=new.size_bytes, sha256=new.sha256)
        return [
            WriteResult(index=item.index, size_in_bytes=_bytes(item), storage_data=_Written(part=part, file=file))
            for item, part in zip(items, parts, strict=True)
        ]

    def _check_visible(self, files: dict[str, StoredFile]) -> None:
        """CheckpointError unless this rank sees what all ranks wrote: what lies on several nodes cannot be loaded."""
        seen = self._storage.sizes(self._directory)
        for name, file in files.items():
            path = f"{self._directory}/{name}"
            if seen.get(path) != file.bytes:
                raise CheckpointError(
                    f"{self._storage.url(path)}: a rank wrote {file.bytes} bytes there and rank 0 finds"
                    f" {seen.get(path, 'none')}: the output must be a directory that all nodes share, or on S3"
                )


class FilesReader(StorageReader):
    """Reads boxes of one checkpoint's tensors, in parallel and in bounded memory."""

    def __init__(self, storage: Storage, directory: str, record: CheckpointRecord) -> None:
        self._storage, self._directory, self._record = storage, directory, record
        self._parts = {(name, part.offsets): part for name, tensor in record.tensors.items() for part in tensor.parts}

    def reset(self, checkpoint_id: Any = None) -> None: ...

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return Metadata(state_dict_metadata={name: _metadata(one) for name, one in self._record.tensors.items()})

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None: ...

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> "Future[None]":
        slabs = [slab for item in plan.items for slab in self._slabs(item, planner.resolve_tensor(item).detach())]
        with ThreadPoolExecutor(THREADS, thread_name_prefix="checkpoint-read") as pool:
            list(pool.map(self._fetch, _requests(slabs)))
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True

    def _slabs(self, item: ReadItem, target: Tensor) -> Iterator["_Slab"]:
        """The rows of a part that an item asks for, cut into what one request may hold. Rows are read whole, though the
        item may ask for some of their columns alone (where tables change from one number of ranks to another).
        """
        name, offsets = item.storage_index.fqn, tuple(item.storage_index.offset or ())
        dtype, part = DTYPES[self._record.tensors[name].dtype], self._parts[name, offsets]
        first, count = (item.storage_offsets[0], item.lengths[0]) if part.shape else (0, 1)
        inner = zip(item.storage_offsets[1:], item.lengths[1:], strict=True)
        columns = tuple(slice(begin, begin + length) for begin, length in inner)
        rows = target if part.shape else target.view(1)
        row_shape = part.shape[1:]
        row_bytes = math.prod(row_shape) * dtype.itemsize
        step = max(1, READ_BYTES // row_bytes)
        for row in range(0, count, step):
            taken = rows[row : row + step]
            begin = part.begin + (first + row) * row_bytes
            yield _Slab(part.file, begin, begin + len(taken) * row_bytes, dtype, row_shape, columns, taken)

    def _fetch(self, slabs: Sequence["_Slab"]) -> None:
        """One request, and what it is good for."""
        begin, end, path = slabs[0].begin, slabs[-1].end, f"{self._directory}/{slabs[0].file}"
        data = memoryview(self._storage.read_range(path, begin, end))
        if len(data) != end - begin:
            raise DataError(f"{self._storage.url(path)}: ends before byte {end}")
        for slab in slabs:
            slab.fill(data[slab.begin - begin : slab.end - begin])


@dataclasses.dataclass(frozen=True)
class _Slab:
    """Whole rows of a part, and the tensor that takes them, or some columns of them."""

    file: str
    begin: int
    end: int
    dtype: torch.dtype
    row_shape: tuple[int, ...]
    columns: tuple[slice, ...]
    target: Tensor

    def fill(self, data: memoryview) -> None:
        # A copy of its own: aligned for the type, and writable, without which torch warns.
        rows = torch.frombuffer(bytearray(data), dtype=self.dtype).view(-1, *self.row_shape)
        self.target.copy_(rows[(slice(None), *self.columns)])


def remove_files(storage: Storage, paths: Iterable[str]) -> None:
    """Remove files of a storage, several at a time."""
    with ThreadPoolExecutor(THREADS, thread_name_prefix="checkpoint-remove") as pool:
        list(pool.map(storage.delete, paths))


def _requests(slabs: Iterable[_Slab]) -> list[list[_Slab]]:
    """Slabs that lie close to each other together: a model's small tensors take one request, not one each."""
    requests: list[list[_Slab]] = []
    for slab in sorted(slabs, key=lambda slab: (slab.file, slab.begin)):
        first, last = (requests[-1][0], requests[-1][-1]) if requests else (slab, slab)
        is_near = slab.file == first.file and last.end <= slab.begin <= last.end + GAP_BYTES
        if is_near and slab.end - first.begin <= READ_BYTES:
            requests[-1].append(slab)
        else:
            requests.append([slab])
    return requests


def _files(items: Iterable[WriteItem]) -> list[list[WriteItem]]:
    """What a rank writes, file by file; empty parts are left out."""
    kinds: dict[str, list[WriteItem]] = defaultdict(list)
    for item in items:
        if item.tensor_data is None:
            raise CheckpointError(f"{item.index.fqn}: a checkpoint holds tensors alone")
        if item.tensor_data.properties.dtype not in _NAMES:
            raise CheckpointError(f"{item.index.fqn}: a checkpoint cannot hold {item.tensor_data.properties.dtype}")
        if math.prod(_shape(item)):
            kinds[_kind(item)].append(item)
    return [file for of_kind in kinds.values() for file in _cut(of_kind)]


def _cut(items: Iterable[WriteItem]) -> Iterator[list[WriteItem]]:
    """Into files of about FILE_BYTES, wide types first, so that every part lies at a multiple of its item's size."""
    file, size = list[WriteItem](), 0
    for item in sorted(items, key=lambda item: -_dtype(item).itemsize):
        file.append(item)
        size += _bytes(item)
        if size >= FILE_BYTES:
            yield file
            file, size = [], 0
    if file:
        yield file


def _header(items: Sequence[WriteItem], file: str) -> tuple[bytes, list[Part]]:
    """The header of a safetensors file with these parts one after the other, and where they lie in it."""
    sharding = {item.index.fqn: {_OFFSETS_KEY: list(_offsets(item))} for item in items}
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", _SHARDING_KEY: json.dumps(sharding)}}
    ends = [0]
    for item in items:
        ends.append(ends[-1] + _bytes(item))
        entries[item.index.fqn] = {"dtype": _NAMES[_dtype(item)], "shape": _shape(item), "data_offsets": ends[-2:]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    parts = [
        Part(offsets=_offsets(item), shape=_shape(item), file=file, begin=len(header) + begin)
        for item, begin in zip(items, ends, strict=False)
    ]
    return header, parts


def _kind(item: WriteItem) -> str:
    return str(item.index.fqn.partition(".")[0])


def _shape(item: WriteItem) -> tuple[int, ...]:
    assert item.tensor_data is not None
    return tuple(item.tensor_data.chunk.sizes)


def _offsets(item: WriteItem) -> tuple[int, ...]:
    assert item.tensor_data is not None
    return tuple(item.tensor_data.chunk.offsets)


def _dtype(item: WriteItem) -> torch.dtype:
    assert item.tensor_data is not None
    return item.tensor_data.properties.dtype


def _bytes(item: WriteItem) -> int:
    return math.prod(_shape(item)) * _dtype(item).itemsize


def _stored(tensor: Any, parts: Sequence[Part]) -> StoredTensor:
    assert isinstance(tensor, TensorStorageMetadata)
    return StoredTensor(dtype=_NAMES[tensor.properties.dtype], shape=tuple(tensor.size), parts=tuple(parts))


def _metadata(stored: StoredTensor) -> TensorStorageMetadata:
    chunks = [ChunkStorageMetadata(torch.Size(part.offsets), torch.Size(part.shape)) for part in stored.parts]
    properties = TensorProperties(dtype=DTYPES[stored.dtype])
    return TensorStorageMetadata(properties=properties, size=torch.Size(stored.shape), chunks=chunks)
