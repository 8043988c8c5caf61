"""Byte Latent Transformer: the model, its patching and its entropy model, in plain PyTorch."""

from blt.entropy_model import EntropyModel, EntropyModelConfig, document_entropies, next_byte_entropy
from blt.errors import BltError, CheckpointError, ConfigError, DataError
from blt.hash_embedding import hash_ids
from blt.model import BLT, BLTConfig
from blt.patching import PatchRule, patch_lengths

__all__ = [
    "BLT",
    "BLTConfig",
    "BltError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "EntropyModel",
    "EntropyModelConfig",
    "PatchRule",
    "document_entropies",
    "hash_ids",
    "next_byte_entropy",
    "patch_lengths",
]
