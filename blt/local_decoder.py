"""Local decoder: byte states and patch vectors in, next-byte logits out.

In: byte states [B,T,D] of the encoder, patch vectors [B,P,G]. Out: logits [B,T,V]. Byte i reads the newest patch that
is complete at byte i, that is the patch of byte i + 1 less one, so nothing of the future is seen.
Shapes: B rows, T bytes, P patches, k slots of a patch, D local width, G latent width, V vocabulary. Source: the paper.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from blt.cross_attention import CrossAttention
from blt.layers import Block, Memory, RMSNorm, TransformerConfig, init_blocks, init_linear
from blt.local_encoder import CrossAttentionConfig
from blt.patch_layout import PatchLayout
from blt.segments import gather_rows
from blt.vocabulary import VOCABULARY_SIZE


class LocalDecoder(nn.Module):
    """Cross-attention to the patch, windowed block, layer by layer; then RMSNorm and an untied output."""

    def __init__(self, shape: TransformerConfig, cross: CrossAttentionConfig, latent_width: int) -> None:
        super().__init__()
        self.shape, self.cross = shape, cross
        self.slots = 1 if cross.decoder_layers == "none" else cross.slots
        wide = self.slots * shape.width
        self.projection = nn.Linear(latent_width, wide, bias=False) if latent_width != shape.width else None
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        num_cross = {"all": shape.layers, "first": min(1, shape.layers), "none": 0}[cross.decoder_layers]
        self.cross_attention = nn.ModuleList(
            CrossAttention(shape.width, cross.heads, shape.norm_eps) for _ in range(num_cross)
        )
        self.norm = RMSNorm(shape.width, shape.norm_eps)
        self.output = nn.Linear(shape.width, VOCABULARY_SIZE, bias=False)

    def reset_parameters(self) -> None:
        """Initial weights as the published implementation draws them."""
        if self.projection is not None:
            init_linear(self.projection.weight)
        init_blocks(self.blocks, self.shape)
        init_blocks(self.cross_attention, self.shape)
        nn.init.ones_(self.norm.weight)
        init_linear(self.output.weight)

    def forward(self, h_BTD: Tensor, patches_BPG: Tensor, layout: PatchLayout, memory: Memory) -> Tensor:
        """Logits [B,T,V] of the next byte, float32 or wider."""
        patches_BPG = self.project(patches_BPG)

        def reading(layer: int) -> Tensor:
            return gather_rows(self.reading(patches_BPG, layer), layout.decoder_patch)

        return self.logits(self.byte_states(h_BTD, reading, memory))

    def project(self, patches_BPG: Tensor) -> Tensor:
        """Patch vectors [B,P,k*D] at the local width."""
        return patches_BPG if self.projection is None else self.projection(patches_BPG)

    @property
    def num_readings(self) -> int:
        """How often a byte reads its patch."""
        return 1 if self.cross.decoder_layers == "none" else len(self.cross_attention)

    def reading(self, patches_BPE: Tensor, layer: int) -> Tensor:
        """What bytes read of every projected patch at a layer: [B*P,k,2D], or without cross-attention [B*P,D]."""
        if not self.cross_attention:
            return patches_BPE.flatten(0, 1)
        attention = self.cross_attention[layer]
        assert isinstance(attention, CrossAttention)
        return attention.slot_pairs(patches_BPE.unflatten(-1, (self.slots, -1)))

    def byte_states(self, h_BTD: Tensor, reading: Callable[[int], Tensor], memory: Memory) -> Tensor:
        """States [B,T,D] after the last block; `reading` gives, for a layer, the `reading` of each byte's patch."""
        if self.cross.decoder_layers == "none":
            h_BTD = h_BTD + reading(0).view_as(h_BTD)
        for layer, block in enumerate(self.blocks):
            if layer < len(self.cross_attention):
                attention = self.cross_attention[layer]
                assert isinstance(attention, CrossAttention)
                # The residual counts twice (2h + attention), as in released weights.
                h_BTD = 2 * h_BTD + attention.bytes_read_patches(h_BTD, reading(layer))
            h_BTD = block(h_BTD, memory, layer)
        return h_BTD

    def logits(self, h_BTD: Tensor) -> Tensor:
        """Logits [B,T,V] of the next byte, float32 or wider."""
        logits: Tensor = self.output(self.norm(h_BTD))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))
