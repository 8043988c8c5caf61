"""What the weights of a run start from: drawn from the seed, another model's, or a Llama's in the latent transformer.

In: a run's configuration and the shape of its model. Out: the fingerprint of the given weights, which is part of the
run's name, and the weights by name.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from blt.checkpoint import (
    entropy_model_config,
    entropy_model_fingerprint,
    language_model_config,
    language_model_fingerprint,
    load,
    load_entropy_model,
)
from blt.entropy_model import EntropyModel, EntropyModelConfig
from blt.errors import ConfigError
from blt.interop.llama import LlamaBlocks, llama_blocks
from blt.model import BLT, BLTConfig
from pipelines.manifest import Patching
from pipelines.model_files import local_checkpoint, local_model
from pipelines.model_patching import patching_differences
from pipelines.storage import Storage
from pipelines.train.config import TrainConfig

Config = TypeVar("Config", bound=TrainConfig)

LATENT_LR_SCALE = 0.1
"""Learning rate of a latent transformer that starts from a Llama, over that of the rest (arXiv 2412.09871)."""


def check_start(
    config: TrainConfig, model: BLTConfig | EntropyModelConfig, patching: Patching | None = None
) -> str | None:
    """Fingerprint of the weights that are given to the run; None where there are none. `patching`: of its data (BLT).

    ConfigError or CheckpointError where they do not fit.
    """
    if isinstance(model, EntropyModelConfig):
        for name, value in (
            ("init_latent_from", config.init_latent_from),
            ("optimizer.latent_lr_scale", config.optimizer.latent_lr_scale),
        ):
            if value is not None:
                raise ConfigError(f'key "{name}": an entropy model has no latent transformer')
    if config.init_from is not None:
        return _check_init_from(config.init_from, model, None if config.init_other_patches else patching)
    if config.init_latent_from is not None and isinstance(model, BLTConfig):
        return latent_start(config.init_latent_from, model).fingerprint
    return None


def latent_start(directory: str, model: BLTConfig) -> LlamaBlocks:
    """The blocks of the Llama in `directory`, a path or URI. ConfigError or CheckpointError where they do not fit."""
    try:
        return llama_blocks(local_checkpoint(directory), model)
    except ConfigError as error:
        raise ConfigError(f'key "init_latent_from": {error}') from None  # one line says all


def initial_weights(
    config: TrainConfig, model: BLTConfig | EntropyModelConfig, build: Callable[[], BLT | EntropyModel]
) -> dict[str, Tensor]:
    """The weights that the run starts from. ConfigError or CheckpointError where those given do not fit."""
    if config.init_from is not None:
        directory = local_model(config.init_from)
        found = load(directory).model if isinstance(model, BLTConfig) else load_entropy_model(directory)
        return found.state_dict()
    torch.manual_seed(config.seed)
    weights = build().state_dict()
    if config.init_latent_from is not None and isinstance(model, BLTConfig):
        latent_start(config.init_latent_from, model).place(weights)
    return weights


def resolved(config: Config) -> Config:
    """The configuration with the learning rate of the latent transformer that follows from what it starts from, and
    with paths that workers, who are elsewhere, can follow.
    """
    optimizer = config.optimizer
    if optimizer.latent_lr_scale is None:
        scale = LATENT_LR_SCALE if config.init_latent_from is not None else 1.0
        optimizer = dataclasses.replace(optimizer, latent_lr_scale=scale)
    init_from, init_latent_from = (
        None if path is None else Storage(path).root_uri for path in (config.init_from, config.init_latent_from)
    )
    return dataclasses.replace(config, optimizer=optimizer, init_from=init_from, init_latent_from=init_latent_from)


def _check_init_from(directory: str, model: BLTConfig | EntropyModelConfig, patching: Patching | None) -> str:
    """Fingerprint of the model in `directory`. ConfigError unless it has exactly the shape `model`, and was trained on
    patches like those of `patching`, if that is given.
    """
    local = local_model(directory)
    if isinstance(model, EntropyModelConfig):
        _check_shape(directory, entropy_model_config(local), model)
        return entropy_model_fingerprint(local)
    found = language_model_config(local)
    _check_shape(directory, found.model, model)
    if patching is not None and (differing := patching_differences(patching, found)):
        raise ConfigError(
            f'key "init_from": the patches of the data are not those that {directory} was trained on: '
            f"{'; '.join(differing)} (patch the documents with `blt patch --model {directory}`, or set "
            "init_other_patches=true)"
        )
    return language_model_fingerprint(local)


def _check_shape(directory: str, found: BLTConfig | EntropyModelConfig, wanted: BLTConfig | EntropyModelConfig) -> None:
    if differing := list(_differing(dataclasses.asdict(found), dataclasses.asdict(wanted))):
        raise ConfigError(
            f'key "init_from": {directory} has another shape than the key "model": {"; ".join(sorted(differing))}'
        )


def _differing(found: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in wanted.items():
        if isinstance(value, dict) and isinstance(found[name], dict):
            yield from _differing(found[name], value, f"{prefix}{name}.")
        elif found[name] != value:
            yield f"{prefix}{name} is {found[name]} there, {value} here"
