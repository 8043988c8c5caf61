"""What a training worker needs to know: plain values that travel to it, and the model they describe."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Literal

import msgspec

from blt.checkpoint import (
    LanguageModel,
    entropy_model_fingerprint,
    load,
    load_entropy_model,
    save_entropy_model,
    save_language_model,
)
from blt.entropy_model import EntropyModel, EntropyModelConfig
from blt.errors import ConfigError
from blt.model import BLT, BLTConfig
from pipelines.manifest import Manifest, Patching
from pipelines.train.config import TrainConfig
from pipelines.train.index import Index

Model = BLT | EntropyModel


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainJob:
    """One run, resolved: what to train, on what, where to."""

    kind: Literal["blt", "entropy_model"]
    config: TrainConfig
    model: BLTConfig | EntropyModelConfig
    data: str
    """Root of the dataset."""
    train_index: Index
    valid_index: Index
    run_directory: str
    patching: Patching | None = None
    """How the patches were made (BLT)."""
    entropy_model: str | None = None
    """Directory of the entropy model that made them (BLT)."""

    @property
    def fingerprint(self) -> str:
        """Of everything that decides the weights: not of workers, paths or how often it is logged and saved."""
        resources = (
            "workers",
            "micro_batch",
            "cpus_per_worker",
            "gpus_per_worker",
            "wait_for_resources",
            "max_failures",
        )
        reporting = ("checkpoint_every", "keep_checkpoints", "valid_every", "valid_sequences", "log_every")
        config = {k: v for k, v in dataclasses.asdict(self.config).items() if k not in resources + reporting}
        parts = [self.kind, config, dataclasses.asdict(self.model), self.train_index.fingerprint]
        return hashlib.sha256(msgspec.json.encode(parts, order="sorted")).hexdigest()

    def build(self) -> Model:
        """The model with fresh weights."""
        return BLT(self.model) if isinstance(self.model, BLTConfig) else EntropyModel(self.model)

    def save_model(self, model: Model, directory: Path, provenance: dict[str, str]) -> None:
        """Write the model so that `blt.load` (with entropy model and rule) or `load_entropy_model` reads it."""
        if isinstance(model, EntropyModel):
            save_entropy_model(model, directory, provenance)
            return
        assert self.patching is not None
        entropy_model = None if self.entropy_model is None else load_entropy_model(self.entropy_model)
        save_language_model(
            LanguageModel(
                model=model,
                entropy_model=entropy_model,
                patch_rule=self.patching.rule,
                reset_on_newline=self.patching.reset_on_newline,
                config=model.config,
                provenance=provenance,
                entropy_fingerprint=self.patching.entropy_model,
            ),
            directory,
        )

    def load_model(self, directory: Path) -> Model:
        """The model of a checkpoint of this run."""
        return load(directory).model if self.kind == "blt" else load_entropy_model(directory)


def check_entropy_model(manifest: Manifest, root: str, entropy_model: str | None) -> None:
    """ConfigError if patches were made with another entropy model than the one at `entropy_model`."""
    assert manifest.patching is not None
    wanted = manifest.patching.entropy_model
    if wanted is None:
        return
    if entropy_model is None:
        raise ConfigError(f'key "entropy_model" is missing: the patches of {root} were made with one ({wanted[:12]})')
    found = entropy_model_fingerprint(entropy_model)
    if found != wanted:
        raise ConfigError(
            f'key "entropy_model": {entropy_model} has fingerprint {found[:12]}, but the patches of {root} were made '
            f"with {wanted[:12]}"
        )
