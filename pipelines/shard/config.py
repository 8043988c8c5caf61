"""The settings of a corpus and of `shard`, checked when they are made."""

import dataclasses
from dataclasses import dataclass
from typing import Literal, get_args

from blt.errors import ConfigError
from pipelines.schema import MAX_ROW_GROUP_BYTES

SourceFormat = Literal["auto", "jsonl", "txt", "parquet", "binary"]
InvalidUtf8 = Literal["quarantine", "keep"]


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One named part of a corpus: its files and how to read them."""

    name: str
    """Name of the source, written into every row and counted on its own."""
    input: tuple[str, ...]
    """Files, globs (** for any depth) or directories, local or s3://."""
    format: SourceFormat = "auto"
    """auto takes .jsonl, .txt (both also .gz, .zst) and .parquet by name and passes over others; any other format
    reads every visible file as that; binary takes each file as one document, bytes as they are."""
    text_key: str = "text"
    """JSON key or Parquet column that holds the text of a document."""
    id_key: str = "id"
    """JSON key or Parquet column of the document's id; a document without one is called FILE:OFFSET (the byte its line
    starts at, uncompressed, or the row's index in Parquet), a whole file FILE. An id is a label and no key."""
    invalid_utf8: InvalidUtf8 = "quarantine"
    """keep: bytes that are not UTF-8 stay as they are, and a lone surrogate in JSON becomes its three bytes."""
    license: str | None = None
    """Licence of its text in a few words (CC-BY-4.0, public domain), for the manifest and the cards of models; null
    says that none is known."""

    def __post_init__(self) -> None:
        if not self.name or not self.name.isprintable():
            raise ConfigError(f"name must be printable and not empty, got {self.name!r}")
        check_reading(self)


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """Which files are a corpus, and which of their rows are its documents."""

    input: tuple[str, ...] = ()
    """Files, globs (** for any depth) or directories, local or s3://; for a corpus of one source."""
    source: str = "corpus"
    """Name of the source of `input`, written into every row."""
    format: SourceFormat = "auto"
    """auto takes .jsonl, .txt (both also .gz, .zst) and .parquet by name and passes over others; any other format
    reads every visible file as that; binary takes each file as one document, bytes as they are."""
    text_key: str = "text"
    """JSON key or Parquet column that holds the text of a document."""
    id_key: str = "id"
    """JSON key or Parquet column of the document's id; a document without one is called FILE:OFFSET (the byte its line
    starts at, uncompressed, or the row's index in Parquet), a whole file FILE. An id is a label and no key."""
    invalid_utf8: InvalidUtf8 = "quarantine"
    """keep: bytes that are not UTF-8 stay as they are, and a lone surrogate in JSON becomes its three bytes."""
    license: str | None = None
    """Licence of its text in a few words (CC-BY-4.0, public domain), for the manifest and the cards of models; null
    says that none is known."""
    sources: tuple[SourceConfig, ...] = ()
    """In place of the seven keys above: several sources, each counted on its own."""
    max_line_bytes: int = 64 * 2**20
    """Longest line of JSON, whole file or Parquet text; a longer one is quarantined. At most 1 GiB."""
    min_bytes: int = 1
    """Shortest document; a shorter one is filtered out and counted."""
    max_bytes: int | None = None
    """Longest document; a longer one is filtered out and counted."""

    def __post_init__(self) -> None:
        self._check_sources()
        for name in ("max_line_bytes", "min_bytes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.max_bytes is not None and self.max_bytes < self.min_bytes:
            raise ConfigError(f"max_bytes must be at least min_bytes={self.min_bytes}, got {self.max_bytes}")
        check_longest("max_line_bytes", self.max_line_bytes)

    @property
    def all_sources(self) -> tuple[SourceConfig, ...]:
        """The sources, however they were given, by name."""
        if self.sources:
            return tuple(sorted(self.sources, key=lambda source: source.name))
        shared = {f.name: getattr(self, f.name) for f in dataclasses.fields(SourceConfig) if f.name != "name"}
        return (SourceConfig(name=self.source, **shared),)

    def source_named(self, name: str) -> SourceConfig:
        """The source of that name, which there must be."""
        return next(source for source in self.all_sources if source.name == name)

    def keeps(self, size_bytes: int) -> bool:
        """Whether a document of this size passes the filters."""
        return size_bytes >= self.min_bytes and (self.max_bytes is None or size_bytes <= self.max_bytes)

    @property
    def inputs(self) -> str:
        """All inputs, for a message."""
        return ", ".join(entry for source in self.all_sources for entry in source.input)

    def _check_sources(self) -> None:
        if not self.sources:
            if not self.source or not self.source.isprintable():
                raise ConfigError(f"source must be printable and not empty, got {self.source!r}")
            check_reading(self)
            return
        for field in dataclasses.fields(CorpusConfig):
            if field.name == "sources":
                break
            if getattr(self, field.name) != field.default:
                raise ConfigError(f"{field.name} does not go with sources: give it in each of them")
        names = [source.name for source in self.sources]
        if shared := [name for name in names if names.count(name) > 1]:
            raise ConfigError(f"sources must have distinct names, {shared[0]!r} is given more than once")


@dataclass(frozen=True, kw_only=True)
class ShardConfig(CorpusConfig):
    """How a corpus becomes document shards; all but the inputs and `stall_seconds` decides the bytes of the dataset."""

    valid_fraction: float = 0.05
    """Share of the documents, by a hash of their content, that is held out as the valid split; above 0 and below 1."""
    dedup: bool = False
    """Of equal documents, byte for byte and in all sources, keep the first by source name, file name and offset."""
    shard_bytes: int = 64 * 2**20
    """Text bytes of a shard, exceeded by at most one document, since documents are never cut."""
    row_group_bytes: int = 8 * 2**20
    """Most text bytes of a Parquet row group, the unit of random access (a longer document has one of its own)."""
    group_bytes: int = 128 * 2**20
    """Text bytes that one task shuffles and holds in memory at a time; larger mixes better and needs more memory. Large
    uncompressed files are cut into ranges of this size."""
    seed: int = 0
    """Seed of the shuffle."""
    stall_seconds: float = 7200.0
    """Fail when no group of files finishes for this long."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("shard_bytes", "row_group_bytes", "group_bytes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.stall_seconds <= 0:
            raise ConfigError(f"stall_seconds must be above 0, got {self.stall_seconds}")
        if not 0 < self.valid_fraction < 1:
            raise ConfigError(f"valid_fraction must be above 0 and below 1, got {self.valid_fraction}")
        check_longest("row_group_bytes", self.row_group_bytes)


def check_longest(name: str, size_bytes: int) -> None:
    """ConfigError for more than Arrow can hold in a row group."""
    if size_bytes > MAX_ROW_GROUP_BYTES:
        raise ConfigError(f"{name} must be at most {MAX_ROW_GROUP_BYTES} (1 GiB), got {size_bytes}")


def check_reading(config: SourceConfig | CorpusConfig) -> None:
    """ConfigError unless the keys that say what to read and how fit together."""
    if config.license is not None and not (config.license.strip() and config.license.isprintable()):
        raise ConfigError(f"license must be printable and not empty, got {config.license!r}")
    if not config.input or not all(config.input):
        raise ConfigError("input must name at least one file, glob or directory")
    if config.text_key == config.id_key or not config.text_key or not config.id_key:
        raise ConfigError(f"text_key and id_key must be two names, got {config.text_key!r} and {config.id_key!r}")
    for name, choices in (("format", SourceFormat), ("invalid_utf8", InvalidUtf8)):
        if getattr(config, name) not in get_args(choices):
            raise ConfigError(f"{name} must be one of {', '.join(get_args(choices))}, got {getattr(config, name)!r}")
