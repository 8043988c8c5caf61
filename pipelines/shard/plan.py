"""The frozen plan of a shard job: which files make a group, and the pure functions that order, split and cut documents.

A group is the unit of work. Nothing here depends on the number of workers: the same files, settings and seed give the
same groups, and a group's documents the same shards, whoever writes them.
"""

import dataclasses
import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import msgspec

from pipelines.schema import SCHEMA_VERSION
from pipelines.shard.config import ShardConfig
from pipelines.shard.files import InputFile, find_files

NOT_IN_OUTPUT = ("input", "stall_seconds")
"""Settings that have no say in the bytes of a dataset; the inputs have a fingerprint of their own."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Files that one task reads, in this order."""

    index: int
    files: tuple[InputFile, ...]

    @property
    def input_bytes(self) -> int:
        """Size of the files as they are stored."""
        return sum(file.size_bytes for file in self.files)


@dataclass(frozen=True, kw_only=True)
class ShardPlan:
    """Units of work and everything that decides their bytes."""

    settings: dict[str, str | int | float]
    """The configuration without NOT_IN_OUTPUT, so that a corpus may move; and the schema version."""
    inputs: str
    """Fingerprint of the files: hex sha256 over name, size and sample of each. A change that keeps a file's size and
    its first and last 64 KiB goes unseen: reading whole corpora twice would cost more than it saves."""
    groups: tuple[Group, ...]

    @property
    def input_bytes(self) -> int:
        return sum(group.input_bytes for group in self.groups)

    @property
    def num_files(self) -> int:
        return sum(len(group.files) for group in self.groups)

    def to_json(self) -> bytes:
        """The bytes of the plan's record in the dataset: what must not change between two runs on one output."""
        record = {
            **self.settings,
            "input_files": self.num_files,
            "input_bytes": self.input_bytes,
            "inputs": self.inputs,
        }
        return msgspec.json.format(msgspec.json.encode(record, order="sorted"), indent=1) + b"\n"


def plan_corpus(config: ShardConfig) -> ShardPlan:
    """Find and sample the input files and freeze the plan. DataError names an input that yields nothing."""
    return make_plan(config, find_files(config.input))


def make_plan(config: ShardConfig, files: Sequence[InputFile]) -> ShardPlan:
    """The plan over `files`, in whatever order they come."""
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(ShardConfig) if f.name not in NOT_IN_OUTPUT}
    settings = values | {"schema_version": SCHEMA_VERSION}
    identity = sorted([file.name, file.size_bytes, file.sample] for file in files)
    inputs = hashlib.sha256(msgspec.json.encode(identity)).hexdigest()
    return ShardPlan(settings=settings, inputs=inputs, groups=make_groups(files, config.group_bytes, config.seed))


def make_groups(files: Iterable[InputFile], group_bytes: int, seed: int) -> tuple[Group, ...]:
    """Files in a seeded order, in groups of at most `group_bytes` of estimated text (a larger file is alone)."""
    groups: list[list[InputFile]] = []
    held = 0
    for file in sorted(files, key=lambda f: shuffle_key(seed, f.name, -1)):
        if not groups or held + file.text_bytes > group_bytes:
            groups.append([])
            held = 0
        groups[-1].append(file)
        held += file.text_bytes
    return tuple(Group(index=i, files=tuple(members)) for i, members in enumerate(groups))


def shuffle_key(seed: int, name: str, offset: int) -> bytes:
    """16 bytes by which the documents of a group are ordered (offset -1: by which files are); unique in practice."""
    return hashlib.blake2b(f"{seed}\0{name}\0{offset}".encode(), digest_size=16).digest()


def split_position(text: bytes) -> float:
    """Where a document stands in [0, 1] by sha256 of its content: below `valid_fraction` it is valid, else train.

    Content alone decides, so that equal documents are never on both sides, whatever the corpus, seed or plan.
    """
    return int.from_bytes(hashlib.sha256(text).digest()[:8]) / 2**64


def balanced_cuts(sizes_bytes: Sequence[int], cap_bytes: int) -> list[slice]:
    """Cut rows into ceil(total / cap) consecutive runs of nearly equal bytes (fewer where rows are large; never empty).

    A row belongs to the run in which its middle lies, so a run is over or under its share by at most one row.
    """
    total = sum(sizes_bytes)
    num_runs = max(1, math.ceil(total / cap_bytes))
    cuts: list[slice] = []
    start, before, run = 0, 0, 0
    for row, size in enumerate(sizes_bytes):
        current = min(num_runs - 1, (2 * before + size) * num_runs // (2 * total)) if total else 0
        if current != run and row > start:
            cuts.append(slice(start, row))
            start = row
        run = current
        before += size
    if len(sizes_bytes) > start:
        cuts.append(slice(start, len(sizes_bytes)))
    return cuts
