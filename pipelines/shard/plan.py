"""The frozen plan of a shard job: which files make a group, and the pure functions that order, split and cut documents.

A group is the unit of work. Nothing here depends on the number of workers: the same files, settings and seed give the
same groups, and a group's documents the same shards, whoever writes them.
"""

import dataclasses
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from pipelines.schema import SCHEMA_VERSION
from pipelines.shard.config import ShardConfig, SourceConfig
from pipelines.shard.files import InputFile, find_files

NOT_IN_OUTPUT = ("input", "stall_seconds")
"""Settings that have no say in the bytes of a dataset; the inputs have a fingerprint of their own."""

NOT_IN_FILES = ("input", "license")
"""Settings of a source that have no say in the bytes of its files."""

Setting = str | int | float | None


@dataclass(frozen=True, kw_only=True)
class Unit:
    """A file, or the lines or row groups of it that begin in a range of its bytes."""

    file: InputFile
    rank: int
    """Of the file among all by (source name, file name): what the order of equal documents goes by."""
    start: int = 0
    end: int | None = None
    """None: to the end."""

    @property
    def input_bytes(self) -> int:
        """Size as it is stored."""
        return (self.file.size_bytes if self.end is None else self.end) - self.start

    @property
    def text_bytes(self) -> int:
        """Estimated bytes of text."""
        return int(self.input_bytes * self.file.text_per_byte)


@dataclass(frozen=True, kw_only=True)
class Group:
    """Units of one source that one task reads, by (rank, start)."""

    index: int
    source: str
    units: tuple[Unit, ...]

    @property
    def input_bytes(self) -> int:
        """Size of the units as they are stored."""
        return sum(unit.input_bytes for unit in self.units)


@dataclass(frozen=True, kw_only=True)
class ShardPlan:
    """Units of work and everything that decides their bytes."""

    settings: dict[str, Setting]
    """The configuration without what has no say in the bytes, so that a corpus may move; and the schema version."""
    inputs: str
    """Fingerprint of the files: hex sha256 over source, name, size and sample of each. A change that keeps a file's
    size and its first and last 64 KiB goes unseen: reading whole corpora twice would cost more than it saves."""
    files: dict[str, tuple[InputFile, ...]]
    """By source, both by name."""
    groups: tuple[Group, ...]

    @property
    def input_bytes(self) -> int:
        return sum(group.input_bytes for group in self.groups)

    @property
    def num_files(self) -> int:
        return sum(map(len, self.files.values()))

    def to_json(self) -> bytes:
        """The bytes of the plan's record in the dataset: what must not change between two runs on one output."""
        record = {
            **self.settings,
            "groups": len(self.groups),
            "input_files": self.num_files,
            "input_bytes": self.input_bytes,
            "inputs": self.inputs,
        }
        return msgspec.json.format(msgspec.json.encode(record, order="sorted"), indent=1) + b"\n"


def plan_corpus(config: ShardConfig) -> ShardPlan:
    """Find and sample the input files and freeze the plan. DataError names an input that yields nothing."""
    return make_plan(config, {source.name: find_files(source) for source in config.all_sources})


def make_plan(config: ShardConfig, files: Mapping[str, Sequence[InputFile]]) -> ShardPlan:
    """The plan over the files of each source, in whatever order they come."""
    in_order = {name: tuple(sorted(files[name], key=lambda file: file.name)) for name in sorted(files)}
    groups: list[Group] = []
    rank = 0
    for source, members in in_order.items():
        groups += make_groups(source, members, rank, len(groups), config.group_bytes, config.seed)
        rank += len(members)
    return ShardPlan(
        settings=_settings(config),
        inputs=inputs_fingerprint(in_order),
        files=in_order,
        groups=tuple(groups),
    )


def inputs_fingerprint(files: Mapping[str, Sequence[InputFile]]) -> str:
    """Hex sha256 over source, name, size and sample of each file; sources and their files come by name."""
    identity = [[source, f.name, f.size_bytes, f.sample] for source, members in files.items() for f in members]
    return hashlib.sha256(msgspec.json.encode(identity)).hexdigest()


def make_groups(
    source: str, files: Iterable[InputFile], first_rank: int, first_index: int, group_bytes: int, seed: int
) -> tuple[Group, ...]:
    """The units of `files`, which come by name, dealt in a seeded order to groups of at most `group_bytes` of estimated
    text; a larger unit is alone.
    """
    units = [unit for rank, file in enumerate(files, first_rank) for unit in make_units(file, rank, group_bytes)]
    groups: list[list[Unit]] = []
    held = 0
    for unit in sorted(units, key=lambda u: shuffle_key(seed, source, u.file.name, u.start)):
        if not groups or held + unit.text_bytes > group_bytes:
            groups.append([])
            held = 0
        groups[-1].append(unit)
        held += unit.text_bytes
    return tuple(
        Group(index=index, source=source, units=tuple(sorted(members, key=lambda u: (u.rank, u.start))))
        for index, members in enumerate(groups, first_index)
    )


def make_units(file: InputFile, rank: int, group_bytes: int) -> list[Unit]:
    """Equal ranges of about `group_bytes` of text of a file that can be read from the middle; others stay whole."""
    pieces = math.ceil(file.size_bytes * file.text_per_byte / group_bytes)
    splittable = file.format == "parquet" or (file.format == "jsonl" and file.compression is None)
    if not splittable or pieces < 2:
        return [Unit(file=file, rank=rank)]
    pieces = min(pieces, file.size_bytes)
    borders = [file.size_bytes * i // pieces for i in range(pieces)]
    return [
        Unit(file=file, rank=rank, start=start, end=end)
        for start, end in zip(borders, [*borders[1:], None], strict=True)
    ]


def _settings(config: ShardConfig) -> dict[str, Setting]:
    """What decides the bytes, in plain values: those of the sources under sources.NAME.KEY, however they were given."""
    names = {f.name for f in dataclasses.fields(ShardConfig)} - {"sources", "source", *NOT_IN_OUTPUT, *NOT_IN_FILES}
    of_sources = {f.name for f in dataclasses.fields(SourceConfig)} - {"name", *NOT_IN_FILES}
    settings = {name: getattr(config, name) for name in sorted(names - of_sources)}
    for source in config.all_sources:
        settings |= {f"sources.{source.name}.{name}": getattr(source, name) for name in sorted(of_sources)}
    return settings | {"schema_version": SCHEMA_VERSION}


def shuffle_key(seed: int, source: str, name: str, offset: int) -> bytes:
    """16 bytes by which the documents of a group, and the units of a source, are ordered; unique in practice."""
    return hashlib.blake2b(f"{seed}\0{source}\0{name}\0{offset}".encode(), digest_size=16).digest()


def split_position(digest: bytes) -> float:
    """Where a document stands in [0, 1] by sha256 of its content: below `valid_fraction` it is valid, else train.

    Content alone decides, so that equal documents are never on both sides, whatever the corpus, seed or plan.
    """
    return int.from_bytes(digest[:8]) / 2**64


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
