"""Local encoder: bytes in, byte states and patch vectors out.

In: byte ids [B,T], a `PatchLayout`. Out: byte states [B,T,D] (read by the decoder) and patch slots [B,P,k,D].
Shapes: B rows, T bytes, P patches, k slots of a patch, D width. Source: arXiv 2412.09871.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from blt.cross_attention import CrossAttention
from blt.errors import ConfigError
from blt.hash_embedding import HashEmbedding
from blt.layers import Block, Context, TransformerConfig, init_blocks, init_linear
from blt.patch_layout import PatchLayout
from blt.segments import max_rows, sum_rows
from blt.vocabulary import VOCABULARY_SIZE


@dataclass(frozen=True, kw_only=True)
class HashEmbeddingConfig:
    """Hash n-gram tables; one for each function and size."""

    group_sizes: tuple[int, ...] = (3, 4, 5, 6, 7, 8)
    """N-gram sizes in bytes; empty = no hash embeddings."""
    functions: int = 1
    """Hash functions for each size."""
    table_size: int = 500002
    """Rows of each table."""


@dataclass(frozen=True, kw_only=True)
class CrossAttentionConfig:
    """How bytes are pooled into patches and patches are read by bytes."""

    heads: int = 16
    """Heads of every cross-attention."""
    slots: int = 2
    """k: vectors a patch has at the local width."""
    encoder_layers: Literal["all", "last", "none"] = "last"
    """After which encoder layers patches attend to their bytes; none = pooling only."""
    decoder_layers: Literal["all", "first", "none"] = "all"
    """Before which decoder layers bytes attend to their patch; none = the patch vector is added once."""
    pooling: Literal["max", "mean", "min"] = "max"
    """How a patch's first query is made of its bytes."""

    def __post_init__(self) -> None:
        if self.heads < 1 or self.slots < 1:
            raise ConfigError(f"heads and slots must be at least 1, got {self.heads} and {self.slots}")
        if self.encoder_layers == "none" and self.slots != 1:
            raise ConfigError("slots must be 1 when encoder_layers is none: pooled vectors go on as they are")


class LocalEncoder(nn.Module):
    """Byte and hash n-gram embeddings, windowed blocks, pooled queries refined by cross-attention."""

    def __init__(self, shape: TransformerConfig, cross: CrossAttentionConfig, hashes: HashEmbeddingConfig) -> None:
        super().__init__()
        self.shape, self.cross = shape, cross
        self.byte_embedding = nn.Embedding(VOCABULARY_SIZE, shape.width)
        self.hash_embedding = (
            HashEmbedding(
                group_sizes=hashes.group_sizes,
                functions=hashes.functions,
                table_size=hashes.table_size,
                width=shape.width,
            )
            if hashes.group_sizes
            else None
        )
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        num_cross = {"all": shape.layers, "last": 1, "none": 0}[cross.encoder_layers]
        self.cross_attention = nn.ModuleList(
            CrossAttention(shape.width, cross.heads, shape.norm_eps) for _ in range(num_cross)
        )
        self.slot_projection = nn.Linear(shape.width, cross.slots * shape.width, bias=False) if num_cross else None

    def reset_parameters(self) -> None:
        """Initial weights as the published implementation draws them."""
        init_linear(self.byte_embedding.weight)
        if self.hash_embedding is not None:
            self.hash_embedding.reset_parameters()
        init_blocks(self.blocks, self.shape)
        init_blocks(self.cross_attention, self.shape)
        if self.slot_projection is not None:
            init_linear(self.slot_projection.weight)

    def forward(
        self, byte_ids_BT: Tensor, layout: PatchLayout, shared: Context, isolate: bool
    ) -> tuple[Tensor, Tensor]:
        """Byte states [B,T,D] and patch slots [B,P,k,D]. `isolate`: hash windows restart at each document."""
        h_BTD = self.byte_embedding(byte_ids_BT)
        if self.hash_embedding is not None:
            h_BTD = h_BTD + self.hash_embedding(byte_ids_BT, layout.positions_BT if isolate else None)
        slots: Tensor | None = None
        for layer, block in enumerate(self.blocks):
            h_BTD = block(h_BTD, shared)
            if self.cross.encoder_layers == "all":
                slots = self._attend(self.cross_attention[layer], slots, h_BTD, layout)
        if self.cross.encoder_layers == "last":
            slots = self._attend(self.cross_attention[0], slots, h_BTD, layout)
        return h_BTD, self._pool(h_BTD, layout)[:, :, None] if slots is None else slots

    def _attend(self, attention: nn.Module, slots: Tensor | None, h_BTD: Tensor, layout: PatchLayout) -> Tensor:
        """One round of cross-attention; its residual counts twice (2q + attention), as in released weights."""
        assert isinstance(attention, CrossAttention)
        assert self.slot_projection is not None
        if slots is None:
            slots = self.slot_projection(self._pool(h_BTD, layout)).unflatten(-1, (self.cross.slots, -1))
        return 2 * slots + attention.patches_read_bytes(slots, h_BTD, layout.encoder_patch)

    def _pool(self, h_BTD: Tensor, layout: PatchLayout) -> Tensor:
        """One vector per patch, [B,P,D]; a patch without bytes gets 0."""
        rows, patch, total = h_BTD.flatten(0, 1), layout.encoder_patch, h_BTD.shape[0] * layout.num_patches
        if self.cross.pooling == "max":
            pooled = max_rows(rows, patch, total)
        elif self.cross.pooling == "min":
            pooled = -max_rows(-rows, patch, total)
        else:
            ones = torch.ones(len(rows), 1, device=rows.device)  # float32: bfloat16 cannot count above 256
            pooled = sum_rows(rows, patch, total) / sum_rows(ones, patch, total).clamp(min=1).to(rows.dtype)
        return pooled.view(h_BTD.shape[0], layout.num_patches, -1)
