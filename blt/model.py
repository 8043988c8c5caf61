"""The Byte Latent Transformer: bytes and patch lengths in, next-byte logits out.

    byte ids [B,T] -> local encoder -> byte states [B,T,D], patch slots [B,P,k,D]
                      patch slots -> latent transformer -> patch vectors [B,P,G]
    byte states, patch vectors -> local decoder -> logits [B,T,V]

Shapes: B rows, T bytes, P patches, k slots of a patch, D local width, G latent width, V vocabulary.
Source: arXiv 2412.09871, with the published models' details.
"""

from dataclasses import dataclass, field

from torch import Tensor, nn

from blt.errors import ConfigError
from blt.latent_transformer import LatentTransformer
from blt.layers import Context, TransformerConfig, context
from blt.local_decoder import LocalDecoder
from blt.local_encoder import CrossAttentionConfig, HashEmbeddingConfig, LocalEncoder
from blt.patch_layout import PatchLayout, patch_layout


@dataclass(frozen=True, kw_only=True)
class BLTConfig:
    """Shape of a BLT. Encoder and decoder share width, heads, window and the rest that a byte state passes through."""

    local_encoder: TransformerConfig
    """Windowed transformer over bytes."""
    latent: TransformerConfig
    """Transformer over patches; its window must be null."""
    local_decoder: TransformerConfig
    """Windowed transformer over bytes; as wide as the encoder."""
    cross_attention: CrossAttentionConfig = field(default_factory=CrossAttentionConfig)
    """Between bytes and patches."""
    hash_embedding: HashEmbeddingConfig = field(default_factory=HashEmbeddingConfig)
    """N-gram tables added to the byte embeddings."""

    def __post_init__(self) -> None:
        encoder, decoder, cross = self.local_encoder, self.local_decoder, self.cross_attention
        if encoder.width != decoder.width:
            raise ConfigError(f"local_decoder.width {decoder.width} must equal local_encoder.width {encoder.width}")
        if encoder.width % cross.heads:
            raise ConfigError(
                f"local_encoder.width {encoder.width} must be a multiple of cross_attention.heads {cross.heads}"
            )
        if self.latent.window is not None:
            raise ConfigError(f"latent.window must be null, got {self.latent.window}")
        if self.latent.width == decoder.width and cross.slots != 1:
            raise ConfigError(
                f"cross_attention.slots must be 1 when latent.width equals the local width {decoder.width}"
            )
        if encoder.layers < 1 and cross.encoder_layers == "all":
            raise ConfigError("cross_attention.encoder_layers is all, but local_encoder.layers is 0")


@dataclass(frozen=True)
class Places:
    """Where the bytes and patches of a batch stand: all that a forward knows of it besides the ids."""

    layout: PatchLayout
    over_bytes: Context
    """Of the encoder."""
    over_patches: Context
    over_decoder_bytes: Context
    isolate: bool
    """Whether hash windows restart at each document."""


class BLT(nn.Module):
    """The model; parameters are float32 until moved or cast."""

    def __init__(self, config: BLTConfig) -> None:
        super().__init__()
        self.config = config
        self.local_encoder = LocalEncoder(config.local_encoder, config.cross_attention, config.hash_embedding)
        self.latent = LatentTransformer(config.latent, config.cross_attention.slots * config.local_encoder.width)
        self.local_decoder = LocalDecoder(config.local_decoder, config.cross_attention, config.latent.width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initial weights as the published implementation draws them."""
        self.local_encoder.reset_parameters()
        self.latent.reset_parameters()
        self.local_decoder.reset_parameters()

    def forward(self, byte_ids_BT: Tensor, patch_lengths_BP: Tensor, document_ids_BT: Tensor | None = None) -> Tensor:
        """Logits [B,T,V] of the next byte at every place, float32 or wider.

        byte_ids_BT: int64 ids (byte + 4). patch_lengths_BP: int64, the virtual next byte included: sum T + 1, the first
        patch 1, zeros trailing. document_ids_BT: int64, constant and contiguous per document, -1 = padding: nothing
        crosses from one to the next, positions and hash windows restart, and every document opens with a one-byte
        patch. None: exactly the reference, where an EOS closes an attention block and hash windows run on.
        Raises ValueError where shapes, dtypes, sums or openings are wrong.
        """
        return self.logits(byte_ids_BT, self.places(byte_ids_BT, patch_lengths_BP, document_ids_BT))

    def places(self, byte_ids_BT: Tensor, patch_lengths_BP: Tensor, document_ids_BT: Tensor | None = None) -> Places:
        """The places of a batch, checked; arguments as of `forward`."""
        layout = patch_layout(byte_ids_BT, patch_lengths_BP, document_ids_BT)
        config = self.config
        over_bytes = context(config.local_encoder, layout.document_ids_BT, layout.positions_BT)
        same = config.local_decoder.sight == config.local_encoder.sight
        return Places(
            layout=layout,
            over_bytes=over_bytes,
            over_patches=context(config.latent, layout.patch_document_ids_BP, layout.patch_positions_BP),
            over_decoder_bytes=over_bytes
            if same
            else context(config.local_decoder, layout.document_ids_BT, layout.positions_BT),
            isolate=document_ids_BT is not None,
        )

    def logits(self, byte_ids_BT: Tensor, places: Places) -> Tensor:
        """Logits [B,T,V] of bytes at these places."""
        layout = places.layout
        states_BTD, slots_BPkD = self.local_encoder(byte_ids_BT, layout, places.over_bytes, places.isolate)
        patches_BPG = self.latent(slots_BPkD.flatten(-2), places.over_patches)
        logits: Tensor = self.local_decoder(states_BTD, patches_BPG, layout, places.over_decoder_bytes)
        return logits
