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


class ShardEntry(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One Parquet file of a dataset. There may be 100,000: none is tracked by the garbage collector, which would walk
    over all of them again and again.
    """

    path: str
    """Relative to the root of the dataset."""
    split: Split
    source: str
    """The one source that its documents come from."""
    documents: int
    bytes: int
    """Text bytes, uncompressed."""
    patches: int | None = None
    """Set patch starts among the bytes (EOS and BOS not counted); None in a document dataset."""
    sha256: str
    """Of the file."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceCounts:
    """What became of the rows of one source: rows_in = rows_out + quarantined + filtered + duplicates, or DataError."""

    rows_in: int
    rows_out: int
    quarantined: int
    filtered: int
    """Shorter or longer than asked for."""
    duplicates: int = 0
    """Equal, byte for byte, to a document that stays."""
    bytes: int
    """Text bytes of rows_out."""

    def __post_init__(self) -> None:
        accounted = self.rows_out + self.quarantined + self.filtered + self.duplicates
        if self.rows_in != accounted or min(dataclasses.astuple(self)) < 0:
            raise DataError(f"rows do not reconcile: {self}")

    def __add__(self, other: Self) -> Self:
        return type(self)(
            rows_in=self.rows_in + other.rows_in,
            rows_out=self.rows_out + other.rows_out,
            quarantined=self.quarantined + other.quarantined,
            filtered=self.filtered + other.filtered,
            duplicates=self.duplicates + other.duplicates,
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
    licenses: dict[str, str] = dataclasses.field(default_factory=dict)
    """Of the text of each source for which one was given, in words."""
    patching: Patching | None = None
    entropies: bool = False
    """Whether the files hold the column `entropies`."""

    def __post_init__(self) -> None:
        held = dict.fromkeys(self.counts, (0, 0))
        for shard in self.shards:
            if not is_inside(shard.path):
                raise DataError(f"manifest names the file {shard.path!r}, which does not lie inside its dataset")
            documents, num_bytes = held.get(shard.source, (0, 0))
            held[shard.source] = documents + shard.documents, num_bytes + shard.bytes
        for source in sorted(held):
            self._reconcile(source, held[source])
        if (self.kind == "patches") != (self.patching is not None):
            raise DataError(f"manifest of kind {self.kind!r} with patching {self.patching}")

    def _reconcile(self, source: str, held: tuple[int, int]) -> None:
        """DataError if the shards of a source do not hold the documents and bytes that its counts say."""
        counts = self.counts.get(source)
        counted = (counts.rows_out, counts.bytes) if counts else (0, 0)
        if held != counted:
            raise DataError(
                f"manifest does not reconcile: the shards of source {source!r} hold {held[0]} documents of {held[1]} "
                f"bytes, its counts say {counted[0]} of {counted[1]}"
            )

    @property
    def documents(self) -> int:
        return sum(shard.documents for shard in self.shards)

    @property
    def bytes(self) -> int:
        """Text bytes, uncompressed."""
        return sum(shard.bytes for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """Hex sha256 of the canonical JSON without licences: equal exactly where two datasets hold the same files."""
        files = {name: value for name, value in msgspec.to_builtins(self).items() if name != "licenses"}
        return hashlib.sha256(msgspec.json.encode(files, order="sorted")).hexdigest()

    def split(self, name: Split) -> tuple[ShardEntry, ...]:
        return tuple(shard for shard in self.shards if shard.split == name)


def is_inside(path: str) -> bool:
    """Whether a relative path, joined to any root, stays below it."""
    parts = path.split("/")
    return path.isprintable() and "\\" not in path and all(part not in ("", ".", "..") for part in parts)


class _Version(msgspec.Struct):
    schema_version: int


def read_manifest(root: str) -> Manifest:
    """The manifest of the dataset at `root`; DataError, naming the file, if it is missing, broken or of another
    schema version.
    """
    storage = Storage(root)
    url = storage.url(MANIFEST_PATH)
    try:
        data = storage.read_bytes(MANIFEST_PATH)
        version = msgspec.json.decode(data, type=_Version).schema_version
        manifest = msgspec.json.decode(data, type=Manifest) if version == SCHEMA_VERSION else None
    except FileNotFoundError as error:
        raise DataError(f"{root} is not a finished dataset: {url} does not exist") from error
    except (ValueError, OSError) as error:
        raise DataError(f"cannot read {url}: {error}") from error
    if manifest is None:
        raise DataError(
            f"{url} has schema version {version}; this release reads {SCHEMA_VERSION}: make the dataset again"
        )
    return manifest


def is_whole(root: str) -> bool:
    """Whether the manifest of the dataset at `root` and every shard that it lists are there, from one listing."""
    there = Storage(root).sizes()
    return MANIFEST_PATH in there and all(shard.path in there for shard in read_manifest(root).shards)


def write_manifest(root: str, manifest: Manifest) -> None:
    """Write `manifest` last, once every shard that it names is committed."""
    text = msgspec.json.format(msgspec.json.encode(manifest, order="sorted"), indent=1)
    Storage(root).write_replace(MANIFEST_PATH, text + b"\n")
