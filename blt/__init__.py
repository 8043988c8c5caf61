"""Byte Latent Transformer: the model, its patching and its entropy model, in plain PyTorch."""

from blt import interop
from blt.checkpoint import (
    LanguageModel,
    fingerprint,
    load,
    load_entropy_model,
    save_entropy_model,
    save_language_model,
)
from blt.entropy_model import EntropyModel, EntropyModelConfig, document_entropies, next_byte_entropy
from blt.errors import BltError, CheckpointError, ConfigError, DataError
from blt.generation import generate, stream
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
    "LanguageModel",
    "PatchRule",
    "document_entropies",
    "fingerprint",
    "generate",
    "hash_ids",
    "interop",
    "load",
    "load_entropy_model",
    "next_byte_entropy",
    "patch_lengths",
    "save_entropy_model",
    "save_language_model",
    "stream",
]
