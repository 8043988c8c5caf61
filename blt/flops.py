"""FLOP ledger: the shape of a model in, floating-point operations per byte of text out, by part.

Source: BLT (arXiv 2412.09871), equations 13 to 17: a multiply-add counts two, embeddings count nothing and attention
over a context of m counts (m + 1) / 2 keys, in windows and cross-attention too. The paper leaves out the entropy
model, the n-gram tables and the projections between local and latent width; the ledger lists them as well.

The equations count a feed-forward layer as two matrices of h x 4h, which is SwiGLU's three of h x 8h/3, and as many
keys as queries; `Stack` says where a model differs. With the paper's k = latent width / encoder width (3.2 for
BLT-8B, where the model has 4 slots) and 256 outputs they reproduce its published figures to the digits given. A model
as configured, with its 4 slots and feed-forward widths rounded up to 256, comes out 0.9 to 1.2 % above them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Literal

from blt.vocabulary import VOCABULARY_SIZE

if TYPE_CHECKING:
    from blt.entropy_model import EntropyModelConfig
    from blt.layers import TransformerConfig
    from blt.model import BLTConfig

Counted = Literal["published", "done"]
"""How a window counts: as the equations have it, or by the keys that its positions do see."""


@dataclass(frozen=True, kw_only=True)
class Stack:
    """What the equations ask of a stack of transformer blocks."""

    width: int
    """h."""
    layers: int
    """l."""
    ffn_width: float | None = None
    """Columns of SwiGLU's gate; None: 8/3 of the width, which is the paper's 2 x 4h."""
    kv_fraction: float = 1.0
    """Key and value heads over query heads."""


@dataclass(frozen=True, kw_only=True)
class FlopLedger:
    """Forward FLOPs per byte of each part."""

    local_encoder: float
    latent: float
    local_decoder: float
    """With the output layer."""
    encoder_cross_attention: float
    decoder_cross_attention: float
    projections: float = 0.0
    """Pooled patch to slots, slots to latent width, latent width to slots; not in the paper's count."""
    hash_tables: float = 0.0
    """Additions of the rows looked up; not in the paper's count."""
    entropy_model: float = 0.0
    """Forward only, and not in the paper's count; 0 where patches come from no entropy model or are stored."""

    @property
    def published(self) -> float:
        """The parts that the paper's equations count."""
        local = self.local_encoder + self.local_decoder
        return local + self.latent + self.encoder_cross_attention + self.decoder_cross_attention

    @property
    def forward(self) -> float:
        """All parts."""
        return float(sum(getattr(self, part.name) for part in fields(self)))

    @property
    def training(self) -> float:
        """All parts of a training step."""
        return float(sum(self.training_by_part.values()))

    @property
    def training_by_part(self) -> dict[str, float]:
        """Three times the forward pass of the model, whose backward pass costs twice as much; the entropy model once,
        for it is not trained along."""
        forward = {part.name: float(getattr(self, part.name)) for part in fields(self)}
        return {name: flops if name == "entropy_model" else 3 * flops for name, flops in forward.items()}


def attention_flops(stack: Stack, context: float) -> float:
    """Scores and mixing of values for one position that sees a causal context."""
    return 4 * stack.layers * stack.width * (context + 1) / 2


def projection_flops(stack: Stack, keys_per_query: float = 1.0) -> float:
    """Query, key, value and output projections for one query (the paper's r is `keys_per_query`)."""
    return (2 * keys_per_query * stack.kv_fraction + 2) * 2 * stack.layers * stack.width**2


def feed_forward_flops(stack: Stack) -> float:
    """SwiGLU for one position."""
    ffn_width = 8 / 3 * stack.width if stack.ffn_width is None else stack.ffn_width
    return 2 * stack.layers * 3 * stack.width * ffn_width


def transformer_flops(stack: Stack, context: float, vocabulary: int = 0) -> float:
    """A stack of blocks, and an output layer where there is a vocabulary, for one position."""
    blocks = attention_flops(stack, context) + projection_flops(stack) + feed_forward_flops(stack)
    return blocks + 2 * stack.width * vocabulary


def cross_attention_flops(stack: Stack, keys: float, keys_per_query: float) -> float:
    """Cross-attention for one query that sees `keys` keys, each projected once for 1 / `keys_per_query` queries."""
    return attention_flops(stack, keys) + projection_flops(stack, keys_per_query)


def flat_flops_per_byte(stack: Stack, *, context_bytes: float, bytes_per_token: float, vocabulary: int) -> float:
    """A transformer over tokens (or bytes, with 1 byte per token), forward, for one byte of text."""
    _check_positive(context_bytes=context_bytes, bytes_per_token=bytes_per_token)
    return transformer_flops(stack, context_bytes / bytes_per_token, vocabulary) / bytes_per_token


def blt_flops_per_byte(
    *,
    latent: Stack,
    encoder: Stack,
    decoder: Stack,
    mean_patch_bytes: float,
    context_bytes: float,
    window: float = 512,
    decoder_window: float | None = None,
    slots: float | None = None,
    encoder_cross_layers: int | None = None,
    decoder_cross_layers: int | None = None,
    vocabulary: int = VOCABULARY_SIZE,
) -> FlopLedger:
    """The paper's FL_BLT with n_p = `mean_patch_bytes` and n_ctx = `context_bytes`.

    `slots` is k, by default the paper's latent width / encoder width. Cross-attention is in every local layer unless
    its numbers of layers are given. A window counts no more than the context.
    """
    _check_positive(context_bytes=context_bytes, mean_patch_bytes=mean_patch_bytes)
    slots = latent.width / encoder.width if slots is None else slots
    slots_per_byte = slots / mean_patch_bytes
    encoder_cross = cross_attention_flops(
        _cross_stack(encoder, encoder_cross_layers), mean_patch_bytes, 1 / slots_per_byte
    )
    decoder_cross = cross_attention_flops(_cross_stack(decoder, decoder_cross_layers), slots, slots_per_byte)
    decoder_context = min(window if decoder_window is None else decoder_window, context_bytes)
    return FlopLedger(
        local_encoder=transformer_flops(encoder, min(window, context_bytes)),
        latent=transformer_flops(latent, context_bytes / mean_patch_bytes) / mean_patch_bytes,
        local_decoder=transformer_flops(decoder, decoder_context, vocabulary),
        encoder_cross_attention=encoder_cross * slots_per_byte,
        decoder_cross_attention=decoder_cross,
    )


def flops_per_byte(
    config: BLTConfig,
    mean_patch_bytes: float,
    context_bytes: float,
    entropy_model_config: EntropyModelConfig | None = None,
    counted: Counted = "published",
) -> FlopLedger:
    """The ledger of a model as configured: its feed-forward widths, key and value heads, slots and cross-attentions.

    `mean_patch_bytes` is bytes per patch, `context_bytes` the bytes that one latent context spans. With an entropy
    model its forward pass counts too. `counted` "done" is for shares of a machine's peak: the equations give a window
    half the operations that it takes far into a document. Numbers that are not above 0 are a ValueError.
    """
    encoder, decoder = config.local_encoder, config.local_decoder
    cross, hashes = config.cross_attention, config.hash_embedding
    encoder_cross_layers = {"all": encoder.layers, "last": 1, "none": 0}[cross.encoder_layers]
    ledger = blt_flops_per_byte(
        latent=_stack(config.latent),
        encoder=_stack(encoder),
        decoder=_stack(decoder),
        mean_patch_bytes=mean_patch_bytes,
        context_bytes=context_bytes,
        window=_window(encoder, context_bytes, counted),
        decoder_window=_window(decoder, context_bytes, counted),
        slots=cross.slots,
        encoder_cross_layers=encoder_cross_layers,
        decoder_cross_layers={"all": decoder.layers, "first": min(1, decoder.layers), "none": 0}[cross.decoder_layers],
    )
    entropy_flops = 0.0
    if entropy_model_config is not None:
        entropy_flops = entropy_flops_per_byte(entropy_model_config, context_bytes, counted)
    return replace(
        ledger,
        projections=_projection_flops(config) / mean_patch_bytes,
        hash_tables=float(len(hashes.group_sizes) * hashes.functions * encoder.width),
        entropy_model=entropy_flops,
    )


def entropy_flops_per_byte(config: EntropyModelConfig, context_bytes: float, counted: Counted = "published") -> float:
    """Forward pass of an entropy model for one byte."""
    shape = config.transformer
    return transformer_flops(_stack(shape), _window(shape, context_bytes, counted), VOCABULARY_SIZE)


def _projection_flops(config: BLTConfig) -> float:
    """Projections between local and latent width for one patch; each is there only where the widths ask for it."""
    cross, local_width, latent_width = config.cross_attention, config.local_encoder.width, config.latent.width
    encoder_slots = cross.slots
    decoder_slots = 1 if cross.decoder_layers == "none" else cross.slots
    to_slots = 0 if cross.encoder_layers == "none" else local_width * encoder_slots * local_width
    to_latent = 0 if encoder_slots * local_width == latent_width else encoder_slots * local_width * latent_width
    from_latent = 0 if latent_width == local_width else latent_width * decoder_slots * local_width
    return 2.0 * (to_slots + to_latent + from_latent)


def _stack(shape: TransformerConfig) -> Stack:
    return Stack(
        width=shape.width,
        layers=shape.layers,
        ffn_width=shape.ffn_width,
        kv_fraction=shape.num_kv_heads / shape.heads,
    )


def _cross_stack(stack: Stack, layers: int | None) -> Stack:
    return Stack(width=stack.width, layers=stack.layers if layers is None else layers)


def _window(shape: TransformerConfig, context_bytes: float, counted: Counted) -> float:
    """m, of which (m + 1) / 2 keys are counted for a position."""
    if shape.window is None or shape.window >= context_bytes:
        return context_bytes
    if counted == "published":
        return shape.window
    # All see a whole window but the first ones: 1 + 2 + ... + (window - 1) keys instead of (window - 1) x window.
    seen = shape.window - shape.window * (shape.window - 1) / (2 * context_bytes)
    return 2 * seen - 1


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name} must be above 0, got {value}")
