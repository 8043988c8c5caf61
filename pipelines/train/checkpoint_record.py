"""The record of a checkpoint: what was saved in, JSON that tells of its own damage out, and back.

It says where every part of every tensor lies, so that a reader at any number of ranks fetches no more than it needs,
and it carries a checksum of each file and of itself: a bit that flips anywhere in a checkpoint is seen.
"""

import dataclasses
import hashlib
from collections.abc import Mapping

import msgspec
import torch

RECORD_NAME = "complete.json"
"""Written last: a directory without it is no checkpoint."""

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Types of tensors under their names in safetensors files."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """A box of a tensor, stored row by row."""

    offsets: tuple[int, ...]
    """Of its first element in the tensor."""
    shape: tuple[int, ...]
    file: str
    begin: int
    """First byte in the file."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredTensor:
    dtype: str
    """Of DTYPES."""
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    """Boxes that fill the tensor without overlap."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredFile:
    bytes: int
    sha256: str
    """Hex."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointRecord:
    """What a whole checkpoint holds."""

    step: int
    run: str
    """Fingerprint of all that decides the weights of a run."""
    world_size: int
    """Ranks that saved it."""
    state: dict[str, int]
    """Where the run stood."""
    files: dict[str, StoredFile]
    tensors: dict[str, StoredTensor]
    sha256: str = ""
    """Of the record written with this field empty."""


def encode_record(record: CheckpointRecord) -> bytes:
    """The record as JSON, sealed with its checksum."""
    return msgspec.json.encode(dataclasses.replace(record, sha256=_checksum(record)))


def decode_record(data: bytes) -> CheckpointRecord:
    """What `encode_record` wrote. ValueError if that is not what this is."""
    try:
        record = msgspec.json.decode(data, type=CheckpointRecord)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"is no record of a checkpoint: {error}") from error
    if record.sha256 != _checksum(record):
        raise ValueError("has changed since it was written")
    return record


def _checksum(record: CheckpointRecord) -> str:
    return hashlib.sha256(msgspec.json.encode(dataclasses.replace(record, sha256=""))).hexdigest()
