"""What an evaluation is asked to do, apart from the model and the documents."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from blt.errors import ConfigError
from blt.sampling import Sampling
from pipelines.actor_pool import ActorPoolConfig
from pipelines.evaluate.noise import NOISES, Noise
from pipelines.manifest import Split

Compressor = Literal["gzip", "xz", "zstd"]


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
    """Resamples of the documents behind the 95 % confidence intervals."""
    compressors: tuple[Compressor, ...] = ("gzip", "xz", "zstd")
    """Of gzip -9, xz -9 and zstd -19, which are measured on the same bytes; [] saves their time on large inputs."""
    noise: bool | tuple[Noise, ...] = False
    """true, or a list of ant_speak, drop, random_case, repeat and upper_case: score the documents noised so as well."""
    samples: int = 0
    """Continuations that are generated from beginnings of the documents to count what of them is no UTF-8; 0: none."""
    sample_bytes: int = 256
    """Length of a continuation; it is shorter where the model ends the document."""
    prefix_bytes: int = 256
    """Most bytes of a beginning: half of a document that is shorter than two of them."""
    temperature: float = 0.8
    """Of the continuations; 0 takes the most likely byte."""
    seed: int = 0
    """Of resamples, noises and continuations."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the models run."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of both models' weights; the loss is always summed in float64."""
    row_bytes: int = 8192
    """Bytes of one row of the entropy model, which is scored on the same documents."""

    def __post_init__(self) -> None:
        ActorPoolConfig.__post_init__(self)
        WindowConfig.__post_init__(self)
        check_least(self, {"bootstrap_resamples": 1, "samples": 0, "sample_bytes": 1, "prefix_bytes": 1, "seed": 0})
        for name in ("noise", "compressors"):
            value = getattr(self, name)
            if not isinstance(value, bool) and len(set(value)) < len(value):
                raise ConfigError(f"{name} must not name one twice, got {', '.join(value)}")
        Sampling(temperature=self.temperature)  # refuses what is out of range

    @property
    def noises(self) -> tuple[Noise, ...]:
        """Those that are asked for, in a fixed order."""
        asked = NOISES if self.noise is True else self.noise or ()
        return tuple(noise for noise in NOISES if noise in asked)


def check_least(config: object, least: Mapping[str, int]) -> None:
    """ConfigError, naming the key, if one of these fields is smaller than it may be."""
    for name, smallest in least.items():
        if getattr(config, name) < smallest:
            raise ConfigError(f"{name} must be at least {smallest}, got {getattr(config, name)}")
