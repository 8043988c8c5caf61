"""The settings of `shard`, checked when they are made."""

from dataclasses import dataclass

from blt.errors import ConfigError

_MAX_LINE_BYTES = 2**30
"""Arrow refuses row groups of more than 2 GiB of text, so one document must stay well below."""


@dataclass(frozen=True, kw_only=True)
class ShardConfig:
    """How a corpus becomes document shards; all but `input` and `stall_seconds` decides the bytes of the dataset."""

    input: tuple[str, ...]
    """Files, globs (** for any depth) or directories: .jsonl, .jsonl.gz, .jsonl.zst, .txt, .parquet."""
    text_key: str = "text"
    """JSON key or Parquet column that holds the text of a document."""
    id_key: str = "id"
    """JSON key or Parquet column of the document's id; a document without one is called FILE:LINE, a .txt file FILE.
    An id is a label and no key: documents that share one are all kept."""
    source: str = "corpus"
    """Name of the corpus, written into every row and counted on its own."""
    valid_fraction: float = 0.05
    """Share of the documents, by a hash of their content, that is held out as the valid split; above 0 and below 1."""
    shard_bytes: int = 64 * 2**20
    """Text bytes of a shard, exceeded by at most one document, since documents are never cut."""
    row_group_bytes: int = 8 * 2**20
    """Most text bytes of a Parquet row group, the unit of random access (a longer document has one of its own)."""
    group_bytes: int = 128 * 2**20
    """Text bytes that one task shuffles and holds in memory at a time; larger mixes better and needs more memory."""
    max_line_bytes: int = 64 * 2**20
    """Longest line of JSON, or text of a .txt file or Parquet row; a longer one is quarantined. At most 1 GiB."""
    min_bytes: int = 1
    """Shortest document; a shorter one is filtered out and counted."""
    seed: int = 0
    """Seed of the shuffle."""
    stall_seconds: float = 7200.0
    """Fail when no group of files finishes for this long."""

    def __post_init__(self) -> None:
        if not self.input or not all(self.input):
            raise ConfigError("input must name at least one file, glob or directory")
        for name in ("shard_bytes", "row_group_bytes", "group_bytes", "max_line_bytes", "min_bytes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.stall_seconds <= 0:
            raise ConfigError(f"stall_seconds must be above 0, got {self.stall_seconds}")
        if not 0 < self.valid_fraction < 1:
            raise ConfigError(f"valid_fraction must be above 0 and below 1, got {self.valid_fraction}")
        if self.max_line_bytes > _MAX_LINE_BYTES:
            raise ConfigError(f"max_line_bytes must be at most {_MAX_LINE_BYTES} (1 GiB), got {self.max_line_bytes}")
        if self.text_key == self.id_key or not self.text_key or not self.id_key:
            raise ConfigError(f"text_key and id_key must be two names, got {self.text_key!r} and {self.id_key!r}")
        if not self.source:
            raise ConfigError("source must not be empty")
