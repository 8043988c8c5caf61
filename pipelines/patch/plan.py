"""The frozen plan of a patch dataset: document manifest and configuration in, one unit per document shard out. Pure.

The plan's hash covers all that decides the bytes of the data files, and nothing else: worker counts, batch sizes of the
pool and paths may change between runs. It stands in the dataset (`_plan.json`), in every footer and in every commit.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from blt.errors import ConfigError, DataError
from blt.patching import ENTROPY_STEPS_PER_NAT, PatchRule
from pipelines.actor_pool import ActorPoolConfig
from pipelines.manifest import Manifest, Patching, ShardEntry, Split
from pipelines.model_patching import DEFAULT_RULE, limited
from pipelines.schema import MAX_ROW_GROUP_BYTES, SCHEMA_VERSION


@dataclass(frozen=True, kw_only=True)
class PatchConfig(ActorPoolConfig):
    """How documents are cut into patches, and by how many actors."""

    rule: PatchRule = DEFAULT_RULE
    """Patch rule; a rule without max_patch_length gets 512 bytes."""
    calibration: str | None = None
    """calibration.json (or its directory) that supplies rule.threshold; must be made with the same entropy model."""
    reset_on_newline: bool = False
    """Open a new entropy-model context after each newline byte."""
    row_group_bytes: int = 8 * 2**20
    """Most document bytes of one Parquet row group (a longer document has a row group of its own)."""
    store_entropies: bool = False
    """Keep the entropies (a byte for each), rounded up to 1/32 nat; patches then come from the rounded values."""
    reuse_entropies: str | None = None
    """Patch dataset of the same documents with stored entropies: its entropies are read, and no model runs."""
    limit: int | None = None
    """Shards to do in this run; when some are left, the dataset stays incomplete and the exit status is 1."""
    verify_documents: int = 64
    """Documents whose patches --verify computes again."""
    gc_older_than_seconds: float = 3600.0
    """--gc removes what killed runs left behind if it is older than this."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("row_group_bytes", 1), ("verify_documents", 0), ("gc_older_than_seconds", 0)):
            if not getattr(self, name) >= least:
                raise ConfigError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.row_group_bytes > MAX_ROW_GROUP_BYTES:
            raise ConfigError(
                f"row_group_bytes must be at most {MAX_ROW_GROUP_BYTES} (1 GiB), got {self.row_group_bytes}"
            )
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"limit must be at least 1, got {self.limit}")
        if self.calibration is not None and self.rule.kind != "entropy":
            raise ConfigError(f"calibration supplies a threshold, which rule.kind {self.rule.kind} does not use")
        for name in ("store_entropies", "reuse_entropies"):
            if getattr(self, name) and not self.rule.needs_entropies:
                raise ConfigError(f"{name} needs rule.kind entropy or top_k, rule.kind is {self.rule.kind}")

    @property
    def final_rule(self) -> PatchRule:
        """The rule as the plan holds it: with a longest patch, and quantized where entropies are stored or reused."""
        quantized = self.rule.quantized or self.store_entropies or self.reuse_entropies is not None
        return dataclasses.replace(limited(self.rule), quantized=quantized)


@dataclass(frozen=True, kw_only=True)
class EntropyOrigin:
    """What decided the last digits of entropies, and with them their patches."""

    entropy_model: str
    """Fingerprint of the model."""
    reset_on_newline: bool
    dtype: str
    device: str
    row_bytes: int


class PatchUnit(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One unit of work: a document shard, which becomes one data file and one commit. As many as shards, so not tracked
    by the garbage collector.
    """

    id: str
    """SPLIT-00000, the name of its commit."""
    split: Split
    path: str
    """Of the shard, relative to the root: the same in the document dataset and in the patch dataset."""
    source: str
    documents: int
    bytes: int
    """Bytes of document text."""


@dataclass(frozen=True, kw_only=True)
class PatchPlan:
    """Units of work and everything that decides their bytes."""

    schema_version: int
    documents: str
    """Fingerprint of the document manifest."""
    patching: Patching
    row_bytes: int
    row_group_bytes: int
    store_entropies: bool
    units: tuple[PatchUnit, ...]

    @property
    def settings(self) -> dict[str, Any]:
        """What the hash covers, as plain values by dotted name."""
        patching = dataclasses.asdict(self.patching)
        values: dict[str, Any] = {f"rule.{name}": value for name, value in patching.pop("rule").items()}
        values |= patching
        values |= {
            "schema_version": self.schema_version,
            "documents": self.documents,
            "row_bytes": self.row_bytes,
            "row_group_bytes": self.row_group_bytes,
            "store_entropies": self.store_entropies,
        }
        return values

    @property
    def hash(self) -> str:
        """Hex sha256 of the settings; the document manifest's fingerprint stands for the units."""
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()

    def to_json(self) -> bytes:
        """The bytes of `_plan.json`."""
        return json.dumps({"hash": self.hash, "settings": self.settings}, indent=2, sort_keys=True).encode() + b"\n"


def make_plan(
    config: PatchConfig, documents: Manifest, entropy_model: str | None, reused: EntropyOrigin | None = None
) -> PatchPlan:
    """The plan of `documents` under `config`; `entropy_model` is the model's fingerprint, `reused` the origin of stored
    entropies that take its place.

    A rule that needs no entropies drops what only entropies depend on: model, reset, dtype and device do not count.
    ConfigError for a threshold that stored entropies cannot serve, or a missing model.
    """
    if documents.kind != "documents":
        raise DataError(f"patch needs a dataset of documents, its manifest says {documents.kind}")
    rule = config.final_rule
    if rule.quantized:
        _check_grid(rule)
    origin = reused if rule.needs_entropies else None
    if origin is None and rule.needs_entropies:
        origin = _origin(config, entropy_model)
    patching = Patching(
        entropy_model=origin.entropy_model if origin else None,
        rule=rule,
        reset_on_newline=origin is not None and origin.reset_on_newline,
        dtype=origin.dtype if origin else "float32",
        device=origin.device if origin else "cpu",
    )
    return PatchPlan(
        schema_version=SCHEMA_VERSION,
        documents=documents.fingerprint,
        patching=patching,
        row_bytes=origin.row_bytes if origin else 0,
        row_group_bytes=config.row_group_bytes,
        store_entropies=config.store_entropies,
        units=tuple(unit_of(shard) for shard in documents.shards),
    )


def _origin(config: PatchConfig, entropy_model: str | None) -> EntropyOrigin:
    if entropy_model is None:
        raise ConfigError(
            f"rule.kind {config.rule.kind} needs entropy_model (the directory of a trained entropy model)"
        )
    return EntropyOrigin(
        entropy_model=entropy_model,
        reset_on_newline=config.reset_on_newline,
        dtype=config.dtype,
        device=config.device,
        row_bytes=config.row_bytes,
    )


def unit_of(shard: ShardEntry) -> PatchUnit:
    """The unit of work that makes the patches of a document shard."""
    return PatchUnit(
        id=unit_id(shard.path),
        split=shard.split,
        path=shard.path,
        source=shard.source,
        documents=shard.documents,
        bytes=shard.bytes,
    )


def _check_grid(rule: PatchRule) -> None:
    """ConfigError if a threshold in use lies between two of the values that entropies are rounded up to."""
    used = ("threshold",) if rule.threshold_add is None or rule.monotonic else ("threshold", "threshold_add")
    for name in used if rule.kind == "entropy" else ():
        steps = getattr(rule, name) * ENTROPY_STEPS_PER_NAT
        if math.isfinite(steps) and steps != math.floor(steps):
            below, above = (bound(steps) / ENTROPY_STEPS_PER_NAT for bound in (math.floor, math.ceil))
            raise ConfigError(
                f"rule.{name} must be a multiple of 1/{ENTROPY_STEPS_PER_NAT} nat where entropies are rounded "
                f"(store_entropies, reuse_entropies), got {getattr(rule, name)}; the nearest are {below} and {above}"
            )


def unit_id(path: str) -> str:
    """`train/shard-00003.parquet` -> `train-00003`."""
    split, _, name = path.rpartition("/")
    return f"{split.replace('/', '-')}-{name.removeprefix('shard-').removesuffix('.parquet')}"


def differences(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """One phrase for each setting that differs: `rule.threshold is 1.3 there, 1.5 here`."""
    names = sorted(stored.keys() | wanted.keys())
    return [
        f"{name} is {_short(stored.get(name))} there, {_short(wanted.get(name))} here"
        for name in names
        if stored.get(name) != wanted.get(name)
    ]


def _short(value: object) -> str:
    text = "unset" if value is None else str(value)
    return text if len(text) <= 24 else text[:12] + "..."
