"""What a run is checked for before anything starts: its configuration, its data and what is installed."""

import importlib.util

from blt.entropy_model import EntropyModelConfig
from blt.errors import ConfigError, DataError
from blt.model import BLTConfig
from pipelines.manifest import SPLITS, Manifest, read_manifest
from pipelines.train.config import TrainConfig
from pipelines.train.job import check_entropy_model
from pipelines.train.order import check_sources


def check_data(
    config: TrainConfig, model: BLTConfig | EntropyModelConfig, data: str, entropy_model: str | None
) -> Manifest:
    """The manifest of a run's data. ConfigError or DataError where they do not fit each other."""
    manifest, is_blt = read_manifest(data), isinstance(model, BLTConfig)
    wanted = "patches" if is_blt else "documents"
    if manifest.kind != wanted:
        raise DataError(f"{data} holds {manifest.kind}, but this training needs {wanted}")
    for split in SPLITS:
        if not sum(shard.bytes for shard in manifest.split(split)):
            raise DataError(f"{data}: the {split} split holds no bytes")
    check_sources(config.sources, {shard.source for shard in manifest.split("train") if shard.documents})
    if is_blt:
        check_entropy_model(manifest, data, entropy_model)
    return manifest


def check_survival(config: TrainConfig) -> None:
    """ConfigError if what the way to survive needs is not installed."""
    if config.survival == "replicated" and importlib.util.find_spec("torchft") is None:
        raise ConfigError('survival=replicated needs torchft: pip install "blt-ray[replicated]"')
