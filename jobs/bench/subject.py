"""What measurements of speed run on: shapes of models, drawn weights and patches; and the peer on the same weights.

The shapes are those that published figures of other implementations were taken with.
"""

import tempfile
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from blt.checkpoint import LanguageModel, fingerprint
from blt.entropy_model import EntropyModel, EntropyModelConfig
from blt.errors import ConfigError
from blt.interop.transformers import to_transformers
from blt.layers import TransformerConfig
from blt.local_encoder import CrossAttentionConfig, HashEmbeddingConfig
from blt.model import BLT, BLTConfig
from blt.patching import PatchRule

MEAN_PATCH_BYTES = 4.0


@dataclass(frozen=True, kw_only=True)
class RowShape:
    """Rows of a batch."""

    bytes: int
    """T, bytes of a row."""
    rows: int = 1
    """B, rows at once."""

    def __post_init__(self) -> None:
        if self.bytes < 1 or self.rows < 1:
            raise ConfigError(f"bytes and rows must be at least 1, got {self.bytes} and {self.rows}")


def small_blt() -> BLTConfig:
    """23.8 million parameters: local width 256, latent 512 x 4, 1 encoder and 2 decoder layers, 6 x 4096 n-grams."""
    local = TransformerConfig(width=256, layers=1, heads=4)
    return BLTConfig(
        local_encoder=local,
        latent=TransformerConfig(width=512, layers=4, heads=8, window=None),
        local_decoder=TransformerConfig(width=256, layers=2, heads=4),
        cross_attention=CrossAttentionConfig(heads=4, slots=2),
        hash_embedding=HashEmbeddingConfig(table_size=4096),
    )


def small_entropy_model() -> EntropyModelConfig:
    """Width 256, 6 layers, window 512."""
    return EntropyModelConfig(transformer=TransformerConfig(width=256, layers=6, heads=4))


def drawn(
    model: BLTConfig, entropy_model: EntropyModelConfig, rule: PatchRule, seed: int, device: str = "cpu"
) -> LanguageModel:
    """A language model with initial weights, drawn on its device: billions of them take minutes on a CPU."""
    torch.manual_seed(seed)
    with torch.device(device):
        entropies, blt = EntropyModel(entropy_model).eval(), BLT(model).eval()
    return LanguageModel(
        model=blt,
        entropy_model=entropies,
        patch_rule=rule,
        reset_on_newline=False,
        config=model,
        provenance={},
        entropy_fingerprint=fingerprint(entropies),
    )


def drawn_patch_lengths(shape: RowShape, generator: torch.Generator) -> Tensor:
    """Patch lengths int64 [B,P] of rows, the virtual next byte included: 1, then 1 to 7 evenly, so 4 in the mean."""
    lengths = torch.randint(1, 8, (shape.rows, shape.bytes + 1), generator=generator)
    lengths[:, 0] = 1
    ends = lengths.cumsum(1).clamp(max=shape.bytes + 1)
    cut = ends.diff(dim=1, prepend=torch.zeros_like(ends[:, :1]))
    return cut[:, : int((cut > 0).sum(1).max())]


def transformers_model(lm: LanguageModel) -> Any:
    """transformers' model with the weights of `lm`, in evaluation mode. ConfigError if it is not installed."""
    try:
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise ConfigError('key "against": transformers is not installed (pip install transformers)') from error
    with tempfile.TemporaryDirectory(prefix="blt-peer-") as directory:
        to_transformers(lm, directory, lossy_patching=True)
        model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        return model.eval()
