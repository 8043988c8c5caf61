"""The fast model against the dense oracle of tests/oracle.py: every shape that a configuration allows, float64.

Logits within 1e-9, gradients within 1e-8 of the tensor's largest entry (at least 1): both sides make the same float64
sums in another order, so what is seen is about 1e-13; a wrong mask, scale or residual shows at 1e-3 or more.
"""

from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from blt import attention
from blt.entropy_model import EntropyModel, EntropyModelConfig
from blt.layers import RopeScaling, TransformerConfig
from blt.local_encoder import CrossAttentionConfig, HashEmbeddingConfig
from blt.loss import summed_cross_entropy
from blt.model import BLT, BLTConfig
from tests import oracle
from tests.model_cases import (
    Batch,
    blt_config,
    gradients,
    largest_difference,
    packed_batch,
    plain_batch,
    randomised,
    transformer_config,
)

LOGITS, GRADIENTS = 1e-9, 1e-8
WINDOWS = [1, 2, 3, 7, 8, 9, 20, None]
QUERY_BLOCKS = [3, 8, 128]
"""Small blocks let short rows have many, with windows and documents that begin and end anywhere inside."""


@st.composite
def transformers(draw: st.DrawFn, width: int, max_layers: int, windows: list[int | None]) -> TransformerConfig:
    heads = draw(st.sampled_from([heads for heads in (1, 2, 4) if width % (2 * heads) == 0]))
    return TransformerConfig(
        width=width,
        layers=draw(st.integers(1, max_layers)),
        heads=heads,
        kv_heads=draw(st.sampled_from([None, *(kv for kv in (1, 2, 4) if heads % kv == 0)])),
        ffn_multiplier=draw(st.sampled_from([None, 0.5])),
        ffn_multiple_of=8,
        window=draw(st.sampled_from(windows)),
        rope_theta=draw(st.sampled_from([100.0, 10000.0, 500000.0])),
        rope_scaling=draw(st.sampled_from([None, RopeScaling(factor=4.0, original_max_position_embeddings=20)])),
        norm_eps=draw(st.sampled_from([1e-5, 1e-2])),
    )


@st.composite
def configs(draw: st.DrawFn) -> BLTConfig:
    width = draw(st.sampled_from([8, 16]))
    encoder_layers = draw(st.sampled_from(["all", "last", "none"]))
    slots = 1 if encoder_layers == "none" else draw(st.sampled_from([1, 2, 4]))
    latent_width = draw(st.sampled_from([slots * width, 24, 12]))
    encoder = draw(transformers(width, 3, WINDOWS))
    return BLTConfig(
        local_encoder=encoder,
        latent=draw(transformers(latent_width, 2, [None])),
        local_decoder=encoder if draw(st.booleans()) else draw(transformers(width, 2, WINDOWS)),
        cross_attention=CrossAttentionConfig(
            heads=draw(st.sampled_from([1, 2, 4])),
            slots=slots,
            encoder_layers=encoder_layers,
            decoder_layers=draw(st.sampled_from(["all", "first", "none"])),
            pooling=draw(st.sampled_from(["max", "mean", "min"])),
        ),
        hash_embedding=HashEmbeddingConfig(
            group_sizes=draw(st.sampled_from([(), (1,), (3,), (2, 5), (4, 3, 9)])),
            functions=draw(st.integers(1, 2)),
            table_size=draw(st.sampled_from([1, 13, 64])),
        ),
    )


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    """Rows with and without document ids, of documents around, below and above the windows and blocks."""
    seed, start_rate = draw(st.integers(0, 2**20)), draw(st.sampled_from([0.0, 0.1, 0.3, 1.0]))
    alphabet, trailing_zeros = draw(st.sampled_from([3, 12, 260])), draw(st.integers(0, 2))
    num_bytes = st.one_of(st.integers(1, 9), st.integers(10, 40))
    if draw(st.booleans()):
        rows = draw(st.lists(st.lists(num_bytes, max_size=4), min_size=1, max_size=2))
        padding = draw(st.integers(0, 3))
        return packed_batch(
            rows,
            seed=seed,
            start_rate=start_rate,
            alphabet=alphabet,
            trailing_zeros=trailing_zeros,
            padding=padding,
        )
    return plain_batch(
        draw(st.integers(1, 2)),
        draw(num_bytes),
        seed=seed,
        start_rate=start_rate,
        alphabet=alphabet,
        eos_rate=draw(st.sampled_from([0.0, 0.1, 0.5])),
        trailing_zeros=trailing_zeros,
    )


def scale(tensor: Tensor) -> Tensor:
    return tensor.abs().max().clamp(min=1.0)


def hold(model: nn.Module, fast: Tensor, slow: Tensor, batch: Batch) -> tuple[float, float]:
    """Assert equality on all bytes of documents; the largest differences of logits and of gradients."""
    inside = (
        torch.ones_like(batch.byte_ids, dtype=torch.bool) if batch.document_ids is None else batch.document_ids >= 0
    )
    assert fast.dtype == torch.float64
    logits = float((fast - slow).detach()[inside].abs().max()) if bool(inside.any()) else 0.0
    ours = gradients(summed_cross_entropy(fast, batch.targets), model)
    theirs = gradients(summed_cross_entropy(slow, batch.targets), model)
    grads = largest_difference(ours, theirs, scale)
    assert logits < LOGITS
    assert grads < GRADIENTS
    return logits, grads


def hold_blt(config: BLTConfig, batch: Batch, seed: int) -> tuple[float, float]:
    model = randomised(BLT(config).double(), seed)
    parameters = dict(model.named_parameters())
    fast = model(batch.byte_ids, batch.patch_lengths, batch.document_ids)
    slow = oracle.blt_logits(config, parameters, batch.byte_ids, batch.patch_lengths, batch.document_ids)
    return hold(model, fast, slow, batch)


def hold_entropy_model(shape: TransformerConfig, batch: Batch, seed: int) -> tuple[float, float]:
    config = EntropyModelConfig(transformer=shape)
    model = randomised(EntropyModel(config).double(), seed)
    fast = model(batch.byte_ids, batch.document_ids)
    slow = oracle.entropy_logits(config, dict(model.named_parameters()), batch.byte_ids, batch.document_ids)
    return hold(model, fast, slow, batch)


@settings(max_examples=100)
@given(configs(), batches(), st.sampled_from(QUERY_BLOCKS), st.integers(0, 2**20))
def test_blt_equals_oracle(config: BLTConfig, batch: Batch, query_block: int, seed: int) -> None:
    with patch.object(attention, "QUERY_BLOCK", query_block):
        hold_blt(config, batch, seed)


@settings(max_examples=50)
@given(transformers(16, 3, WINDOWS[:-1]), batches(), st.sampled_from(QUERY_BLOCKS), st.integers(0, 2**20))
def test_entropy_model_equals_oracle(shape: TransformerConfig, batch: Batch, query_block: int, seed: int) -> None:
    with patch.object(attention, "QUERY_BLOCK", query_block):
        hold_entropy_model(shape, batch, seed)


# Rows of more than one query block of the size in use, windows that are no multiple of it.
LONG_ROWS = [[200, 60], [1, 130, 7, 119]]


@pytest.mark.parametrize("window", [100, 128, 129, 200])
def test_long_rows(window: int) -> None:
    entropy_shape = transformer_config(window=window, layers=2, kv_heads=1)
    config = blt_config(encoder={"window": window}, decoder={"window": window - 1, "layers": 1})
    for batch in (packed_batch(LONG_ROWS, seed=window, padding=3), plain_batch(1, 260, seed=window, eos_rate=0.005)):
        hold_entropy_model(entropy_shape, batch, seed=window)
        hold_blt(config, batch, seed=window)


def test_many_patches() -> None:
    """Every byte a patch: the latent transformer, too, runs over several query blocks."""
    config = blt_config(latent={"heads": 1, "kv_heads": 1})
    hold_blt(config, packed_batch([[150, 130]], start_rate=1.0), seed=1)
    hold_blt(config, plain_batch(1, 280, start_rate=1.0, eos_rate=0.005), seed=2)
