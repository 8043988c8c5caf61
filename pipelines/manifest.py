"""The manifest: what a finished dataset holds. It is written last: a directory with a manifest is a whole dataset.

`ROOT/manifest.json` lists every shard with its rows, bytes and sha256, the counts of every source, and for a patch
dataset what made the patches. Numbers that do not add up are refused when a manifest is made and when it is read.
"""

import dataclasses
import hashlib
from typing import Literal, Self

import msgspec

from blt.errors import DataError
from blt.patching import PatchRule
from pipelines.schema import SCHEMA_VERSION
from pipelines.storage import Storage

MANIFEST_PATH = "manifest.json"

Split = Literal["train", "valid"]
SPLITS: tuple[Split, ...] = ("train", "valid")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """One Parquet file of a dataset."""

    path: str
    """Relative to the root of the dataset."""
    split: Split
    documents: int
    bytes: int
    """Text bytes, uncompressed."""
    patches: int | None = None
    """Set patch starts among the bytes (EOS and BOS not counted); None in a document dataset."""
    sha256: str
    """Of the file."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceCounts:
    """What became of the rows of one source: rows_in = rows_out + quarantined + filtered, or DataError."""

    rows_in: int
    rows_out: int
    quarantined: int
    filtered: int
    bytes: int
    """Text bytes of rows_out."""

    def __post_init__(self) -> None:
        if self.rows_in != self.rows_out + self.quarantined + self.filtered or min(dataclasses.astuple(self)) < 0:
            raise DataError(f"rows do not reconcile: {self}")

    def __add__(self, other: Self) -> Self:
        return type(self)(
            rows_in=self.rows_in + other.rows_in,
            rows_out=self.rows_out + other.rows_out,
            quarantined=self.quarantined + other.quarantined,
            filtered=self.filtered + other.filtered,
            bytes=self.bytes + other.bytes,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Patching:
    """What made the patches of a dataset; two datasets whose Patching differs must not be mixed."""

    entropy_model: str | None
    """Fingerprint of the entropy model; None for rules that need no entropies."""
    rule: PatchRule
    reset_on_newline: bool
    dtype: str
    device: str
    """Device type: "cpu" or "cuda"."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """A complete dataset."""

    kind: Literal["documents", "patches"]
    schema_version: int = SCHEMA_VERSION
    shards: tuple[ShardEntry, ...]
    counts: dict[str, SourceCounts]
    patching: Patching | None = None

    def __post_init__(self) -> None:
        rows, text_bytes = sum(c.rows_out for c in self.counts.values()), sum(c.bytes for c in self.counts.values())
        if (self.documents, self.bytes) != (rows, text_bytes):
            raise DataError(
                f"manifest does not reconcile: its shards hold {self.documents} documents of {self.bytes} bytes, "
                f"its sources {rows} of {text_bytes}"
            )
        if (self.kind == "patches") != (self.patching is not None):
            raise DataError(f"manifest of kind {self.kind!r} with patching {self.patching}")

    @property
    def documents(self) -> int:
        return sum(shard.documents for shard in self.shards)

    @property
    def bytes(self) -> int:
        """Text bytes, uncompressed."""
        return sum(shard.bytes for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """Hex sha256 of the canonical JSON: equal exactly where two datasets hold the same files."""
        return hashlib.sha256(msgspec.json.encode(self, order="sorted")).hexdigest()

    def split(self, name: Split) -> tuple[ShardEntry, ...]:
        return tuple(shard for shard in self.shards if shard.split == name)


def read_manifest(root: str) -> Manifest:
    """The manifest of the dataset at `root`; DataError, naming the file, if it is missing, broken or of another
    schema version.
    """
    storage = Storage(root)
    url = storage.url(MANIFEST_PATH)
    try:
        manifest = msgspec.json.decode(storage.read_bytes(MANIFEST_PATH), type=Manifest)
    except FileNotFoundError as error:
        raise DataError(f"{root} is not a finished dataset: {url} does not exist") from error
    except (ValueError, OSError) as error:
        raise DataError(f"cannot read {url}: {error}") from error
    if manifest.schema_version != SCHEMA_VERSION:
        raise DataError(
            f"{url} has schema version {manifest.schema_version}; this release reads {SCHEMA_VERSION}: "
            "make the dataset again"
        )
    return manifest


def write_manifest(root: str, manifest: Manifest) -> None:
    """Write `manifest` last, once every shard that it names is committed."""
    text = msgspec.json.format(msgspec.json.encode(manifest, order="sorted"), indent=1)
    Storage(root).write_replace(MANIFEST_PATH, text + b"\n")
