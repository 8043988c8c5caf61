"""What a training worker needs to know: plain values that travel to it, and the model they describe."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Literal

import msgspec
import torch
from torch import Tensor

from blt.checkpoint import (
    LanguageModel,
    load_entropy_model,
    save_entropy_model,
    save_language_model,
)
from blt.config_json import to_json
from blt.entropy_model import EntropyModel, EntropyModelConfig
from blt.errors import ConfigError
from blt.flops import entropy_flops_per_byte, flops_per_byte
from blt.model import BLT, BLTConfig
from blt.placement import without_weights
from pipelines.manifest import Manifest, Patching
from pipelines.model_files import local_model, model_fingerprint
from pipelines.train.config import TrainConfig
from pipelines.train.index import Index
from pipelines.train.start import initial_weights

Model = BLT | EntropyModel


RESOURCES = (
    "workers",
    "min_workers",
    "micro_batch",
    "cpus_per_worker",
    "gpus_per_worker",
    "wait_for_resources",
    "max_failures",
    "hang_seconds",
    "survival",
    "activation_checkpointing",
    "compile",
    "deterministic",
    "nonfinite",
)
"""Keys of `TrainConfig` that may change while a run goes on: who computes it, and how faults are taken."""

STARTS = ("init_from", "init_latent_from", "init_other_patches")
"""Keys that say where given weights are; what they are, their fingerprint says."""

REPORTING = ("checkpoint_every", "keep_checkpoints", "valid_every", "valid_sequences", "log_every")


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
    output: str
    """Directory of the run, local (on several machines: shared) or on S3."""
    mean_patch_bytes: float = 1.0
    """Of the training split."""
    patching: Patching | None = None
    """How the patches were made (BLT)."""
    entropy_model: str | None = None
    """Directory of the entropy model that made them (BLT)."""
    init_fingerprint: str | None = None
    """Of the weights that config.init_from or config.init_latent_from gives."""

    @property
    def fingerprint(self) -> str:
        """Of everything that decides the weights: not of workers, paths or how often it is logged and saved."""
        left_out = (*RESOURCES, *REPORTING, *STARTS)
        config = {k: v for k, v in dataclasses.asdict(self.config).items() if k not in left_out}
        parts = [self.kind, config, to_json(self.model), self.train_index.fingerprint, self.init_fingerprint]
        return hashlib.sha256(msgspec.json.encode(parts, order="sorted")).hexdigest()

    @property
    def run(self) -> str:
        """Name of the run: derived from what decides its weights, so that a command started again finds it."""
        return self.fingerprint[:16]

    @property
    def flops_per_byte(self) -> float:
        """Of a training step; patches are there already, so the entropy model that made them does not count."""
        return sum(training_flops(self.config, self.model, self.mean_patch_bytes).values())

    def build(self) -> Model:
        """The model with fresh weights."""
        return BLT(self.model) if isinstance(self.model, BLTConfig) else EntropyModel(self.model)

    def without_weights(self) -> Model:
        """The model with memory for its weights and whatever is in it: all of them are to be written."""
        if isinstance(self.model, BLTConfig):
            return without_weights(BLT, self.model, "cpu", torch.float32)
        return without_weights(EntropyModel, self.model, "cpu", torch.float32)

    def initial_weights(self) -> dict[str, Tensor]:
        """What the run starts from. ConfigError or CheckpointError where given weights do not fit."""
        return initial_weights(self.config, self.model, self.build)

    def save_model(self, model: Model, directory: Path, provenance: dict[str, str]) -> None:
        """Write the model so that `blt.load` (with entropy model and rule) or `load_entropy_model` reads it."""
        if isinstance(model, EntropyModel):
            save_entropy_model(model, directory, provenance)
            return
        assert self.patching is not None
        entropy_model = None if self.entropy_model is None else load_entropy_model(local_model(self.entropy_model))
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


def training_flops(
    config: TrainConfig, model: BLTConfig | EntropyModelConfig, mean_patch_bytes: float
) -> dict[str, float]:
    """FLOPs per byte of a training step by part, as `blt.flops` counts; patches are there already, so the entropy model
    that made them is no part."""
    sequence_bytes = float(config.sequence_bytes)
    if isinstance(model, EntropyModelConfig):
        return {"transformer": 3 * entropy_flops_per_byte(model, sequence_bytes)}
    context = min(sequence_bytes, config.sequence_patches * mean_patch_bytes)
    parts = flops_per_byte(model, mean_patch_bytes, context).training_by_part
    return {name: flops for name, flops in parts.items() if name != "entropy_model"}


def check_entropy_model(manifest: Manifest, root: str, entropy_model: str | None) -> None:
    """ConfigError if patches were made with another entropy model than the one at `entropy_model`."""
    assert manifest.patching is not None
    wanted = manifest.patching.entropy_model
    if wanted is None:
        return
    if entropy_model is None:
        raise ConfigError(f'key "entropy_model" is missing: the patches of {root} were made with one ({wanted[:12]})')
    found = model_fingerprint(entropy_model)
    if found != wanted:
        raise ConfigError(
            f'key "entropy_model": {entropy_model} has fingerprint {found[:12]}, but the patches of {root} were made '
            f"with {wanted[:12]}"
        )
