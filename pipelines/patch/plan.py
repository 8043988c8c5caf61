"""The frozen plan of a patch dataset: document manifest and configuration in, one unit per document shard out. Pure.

The plan's hash covers all that decides the bytes of the data files, and nothing else: worker counts, batch sizes of the
pool and paths may change between runs. It stands in the dataset (`_plan.json`), in every footer and in every commit.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from blt.errors import ConfigError, DataError
from blt.patching import PatchRule
from pipelines.actor_pool import ActorPoolConfig
from pipelines.manifest import Manifest, Patching, ShardEntry, Split
from pipelines.schema import SCHEMA_VERSION

DEFAULT_MAX_PATCH_LENGTH = 512
"""Longest patch in bytes where the rule sets no limit: the pipeline always has one, for patches must fit a sequence."""


@dataclass(frozen=True, kw_only=True)
class PatchConfig(ActorPoolConfig):
    """How documents are cut into patches, and by how many actors."""

    rule: PatchRule = PatchRule(max_patch_length=DEFAULT_MAX_PATCH_LENGTH)
    """Patch rule; a rule without max_patch_length gets 512 bytes."""
    calibration: str | None = None
    """calibration.json (or its directory) that supplies rule.threshold; must be made with the same entropy model."""
    reset_on_newline: bool = False
    """Open a new entropy-model context after each newline byte."""
    row_group_bytes: int = 8 * 2**20
    """Most document bytes of one Parquet row group (a longer document has a row group of its own)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.row_group_bytes < 1:
            raise ConfigError(f"row_group_bytes must be at least 1, got {self.row_group_bytes}")
        if self.calibration is not None and self.rule.kind != "entropy":
            raise ConfigError(f"calibration supplies a threshold, which rule.kind {self.rule.kind} does not use")


@dataclass(frozen=True, kw_only=True)
class PatchUnit:
    """One unit of work: a document shard, which becomes one data file and one commit."""

    id: str
    """SPLIT-00000, the name of its commit."""
    split: Split
    path: str
    """Of the shard, relative to the root: the same in the document dataset and in the patch dataset."""
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
        }
        return values

    @property
    def hash(self) -> str:
        """Hex sha256 of the settings; the document manifest's fingerprint stands for the units."""
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()

    def to_json(self) -> bytes:
        """The bytes of `_plan.json`."""
        return json.dumps({"hash": self.hash, "settings": self.settings}, indent=2, sort_keys=True).encode() + b"\n"


def make_plan(config: PatchConfig, documents: Manifest, entropy_model: str | None) -> PatchPlan:
    """The plan of `documents` under `config`, whose rule is final; `entropy_model` is the model's fingerprint.

    A rule that needs no entropies drops what only entropies depend on: model, reset, dtype and device do not count.
    """
    if documents.kind != "documents":
        raise DataError(f"patch needs a dataset of documents, its manifest says {documents.kind}")
    rule = limited(config.rule)
    needs_model = rule.needs_entropies
    if needs_model and entropy_model is None:
        raise ConfigError(f"rule.kind {rule.kind} needs entropy_model (the directory of a trained entropy model)")
    patching = Patching(
        entropy_model=entropy_model if needs_model else None,
        rule=rule,
        reset_on_newline=needs_model and config.reset_on_newline,
        dtype=config.dtype if needs_model else "float32",
        device=config.device if needs_model else "cpu",
    )
    return PatchPlan(
        schema_version=SCHEMA_VERSION,
        documents=documents.fingerprint,
        patching=patching,
        row_bytes=config.row_bytes if needs_model else 0,
        row_group_bytes=config.row_group_bytes,
        units=tuple(_unit(shard) for shard in documents.shards),
    )


def _unit(shard: ShardEntry) -> PatchUnit:
    return PatchUnit(
        id=unit_id(shard.path), split=shard.split, path=shard.path, documents=shard.documents, bytes=shard.bytes
    )


def limited(rule: PatchRule) -> PatchRule:
    """The rule with the pipeline's limit on patch length where it sets none."""
    if rule.max_patch_length is not None:
        return rule
    return dataclasses.replace(rule, max_patch_length=DEFAULT_MAX_PATCH_LENGTH)


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
