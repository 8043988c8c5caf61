"""Local encoder: bytes in, byte states and patch vectors out.

In: byte ids [B,T], a `PatchLayout`. Out: byte states [B,T,D] (read by the decoder) and patch slots [B,P,k,D].
Shapes: B rows, T bytes, P patches, k slots of a patch, D width. Source: arXiv 2412.09871.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from blt.cross_attention import CrossAttention
from blt.errors import ConfigError
from blt.hash_embedding import HashEmbedding
from blt.layers import Block, Memory, TransformerConfig, init_blocks, init_linear
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

    def forward(self, byte_ids_BT: Tensor, layout: PatchLayout, memory: Memory, isolate: bool) -> tuple[Tensor, Tensor]:
        """Byte states [B,T,D] and patch slots [B,P,k,D]. `isolate`: hash windows restart at each document."""
        h_BTD = self.embed(byte_ids_BT, layout.positions_BT if isolate else None)
        states = self.byte_states(h_BTD, memory)
        return states[-1], self.patch_slots(states, layout.encoder_patch, layout.num_patches)

    def embed(self, byte_ids_BT: Tensor, positions_BT: Tensor | None = None) -> Tensor:
        """Embeddings [B,T,D] of bytes and of the n-grams that end at them; positions as in `rolling_hashes`."""
        h_BTD: Tensor = self.byte_embedding(byte_ids_BT)
        return h_BTD if self.hash_embedding is None else h_BTD + self.hash_embedding(byte_ids_BT, positions_BT)

    @property
    def hash_reach(self) -> int:
        """How many ids before a byte its embedding reads."""
        return 0 if self.hash_embedding is None else max(self.hash_embedding.group_sizes) - 1

    def byte_states(self, h_BTD: Tensor, memory: Memory) -> list[Tensor]:
        """States [B,T,D] that patches read, of each layer or of the last alone; the decoder reads the last."""
        states = [h_BTD]
        for layer, block in enumerate(self.blocks):
            h_BTD = block(h_BTD, memory, layer)
            states = [*states, h_BTD] if layer > 0 and self.cross.encoder_layers == "all" else [h_BTD]
        return states

    def patch_slots(self, states: Sequence[Tensor], patch_N: Tensor, num_patches: int) -> Tensor:
        """Slots [B,P,k,D] of patches whose bytes have these `byte_states`; patch_N: row * P + patch, int64 [B*T]."""
        if not self.cross_attention:
            return self._pool(states[-1], patch_N, num_patches)[:, :, None]
        assert self.slot_projection is not None
        pooled_BPD = self._pool(states[0], patch_N, num_patches)
        slots: Tensor = self.slot_projection(pooled_BPD).unflatten(-1, (self.cross.slots, -1))
        for attention, h_BTD in zip(self.cross_attention, states, strict=True):
            assert isinstance(attention, CrossAttention)
            # The residual counts twice (2q + attention), as in released weights.
            slots = 2 * slots + attention.patches_read_bytes(slots, h_BTD, patch_N)
        return slots

    def _pool(self, h_BTD: Tensor, patch_N: Tensor, num_patches: int) -> Tensor:
        """One vector per patch, [B,P,D]; a patch without bytes gets 0."""
        rows, total = h_BTD.flatten(0, 1), h_BTD.shape[0] * num_patches
        if self.cross.pooling == "max":
            pooled = max_rows(rows, patch_N, total)
        elif self.cross.pooling == "min":
            pooled = -max_rows(-rows, patch_N, total)
        else:
            ones = torch.ones(len(rows), 1, device=rows.device)  # float32: bfloat16 cannot count above 256
            pooled = sum_rows(rows, patch_N, total) / sum_rows(ones, patch_N, total).clamp(min=1).to(rows.dtype)
        return pooled.view(h_BTD.shape[0], num_patches, -1)
