"""Where a command's configuration says that data and output are: what a cluster's nodes cannot reach is found here."""

from collections.abc import Iterator, Mapping
from typing import Any

from blt.errors import ConfigError
from pipelines.filesystem import refuse_credentials

_CORPUS = ("input", "sources.input")
_TRAINING = ("output", "init_from", "init_latent_from")

PLACES: Mapping[str, tuple[str, ...]] = {
    "shard": (*_CORPUS, "output"),
    "train-entropy": ("documents", *_TRAINING),
    "calibrate": ("documents", "entropy_model", "model", "output"),
    "patch": ("documents", "entropy_model", "model", "calibration", "reuse_entropies", "output"),
    "train": ("data", "entropy_model", *_TRAINING),
    "eval": (*_CORPUS, "model", "data", "output"),
    "eval harness": ("model", "include_path", "output"),
    "eval characters": ("model", "words", "output"),
    "generate": ("model", "prompt_file", "output"),
    "bench patch": ("documents", "entropy_model", "patch.calibration", "patch.reuse_entropies", "patches", "directory"),
    "bench feed": ("patches", "train.init_from", "train.init_latent_from", "directory"),
    "bench goodput": ("data", "entropy_model", "train.init_from", "train.init_latent_from", "directory"),
    "bench entropy": (),
    "bench train": (),
    "bench generate": ("trained",),
}
"""The keys that hold a path or URI, of every command that can be a job; SECTION.KEY for those in a section."""


def refuse_credentials_in(command: str, config: Mapping[str, Any]) -> None:
    """ConfigError, which does not repeat it, for a place of the command's configuration that carries credentials."""
    for _, value in _values(config, PLACES.get(command, ())):
        refuse_credentials(value)


def check_places(command: str, config: Mapping[str, Any]) -> list[str]:
    """The keys, with their values, that hold local paths, which all nodes must share.

    `config` is the resolved configuration as plain values. ConfigError for a path that no node has (a relative one,
    ~), and for a command that cannot be a job.
    """
    if command not in PLACES:
        raise ConfigError(
            f'"{command}" is not for a cluster: it works with the files and the terminal of this machine '
            f"(accepted: {', '.join(PLACES)})"
        )
    local = []
    for key, value in _values(config, PLACES[command]):
        path = value.removeprefix("file://")
        if "://" in path:
            continue
        if not path.startswith("/"):
            raise ConfigError(
                f'key "{key}" is "{value}", a path of this machine\'s working directory, which the cluster does not '
                "have: give s3://BUCKET/..., or the absolute path of a directory that all nodes share"
            )
        local.append(f"{key}={value}")
    return local


def _values(config: Mapping[str, Any], keys: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Every text that stands under one of the keys, with its key."""
    for key in keys:
        name, _, inner = key.partition(".")
        value = config.get(name)
        for one in value if isinstance(value, list) else [value]:
            if inner and one is not None:
                yield from ((f"{name}.{below}", text) for below, text in _values(one, (inner,)))
            elif one is not None:
                yield key, str(one)
