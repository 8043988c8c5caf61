"""What an evaluation is asked to do, apart from the model and the data."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from blt.errors import ConfigError
from pipelines.actor_pool import ActorPoolConfig
from pipelines.manifest import Split


@dataclass(frozen=True, kw_only=True)
class WindowConfig:
    """Windows in which a model reads texts longer than itself."""

    sequence_patches: int = 2048
    """S: most patches of a window; as in training, unless the model is to be judged at another length."""
    sequence_bytes: int = 8192
    """T: most bytes of a window."""
    batch_bytes: int = 32768
    """Bytes of windows computed at once, padding included; one window if it is longer."""
    row_bytes: int = 8192
    """Bytes of one row of the entropy model."""

    def __post_init__(self) -> None:
        check_least(self, {"sequence_patches": 2, "sequence_bytes": 1, "batch_bytes": 1, "row_bytes": 1})


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(ActorPoolConfig, WindowConfig):
    """Windows in which the model reads the documents, and the actors that compute them."""

    split: Split = "valid"
    """Which documents are scored."""
    bootstrap_resamples: int = 1000
    """Resamples of the documents behind the 95 % confidence interval."""
    seed: int = 0
    """Of the resamples."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the models run."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of both models' weights; the loss is always summed in float64."""
    row_bytes: int = 8192
    """Bytes of one row of the entropy model, which is scored on the same documents."""

    def __post_init__(self) -> None:
        ActorPoolConfig.__post_init__(self)
        WindowConfig.__post_init__(self)
        check_least(self, {"bootstrap_resamples": 1, "seed": 0})


def check_least(config: object, least: Mapping[str, int]) -> None:
    """ConfigError, naming the key, if one of these fields is smaller than it may be."""
    for name, smallest in least.items():
        if getattr(config, name) < smallest:
            raise ConfigError(f"{name} must be at least {smallest}, got {getattr(config, name)}")
