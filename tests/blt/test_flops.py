"""The FLOP ledger: published figures, and the parts that a configured model adds to them."""

from collections.abc import Callable
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor, nn

from blt.entropy_model import EntropyModelConfig
from blt.flops import (
    FlopLedger,
    Stack,
    attention_flops,
    blt_flops_per_byte,
    entropy_flops_per_byte,
    flat_flops_per_byte,
    flops_per_byte,
)
from blt.layers import TransformerConfig
from blt.local_encoder import CrossAttentionConfig, HashEmbeddingConfig
from blt.model import BLT, BLTConfig

LLAMA2_BYTES_PER_TOKEN, LLAMA3_BYTES_PER_TOKEN = 3.7, 4.4


@pytest.mark.parametrize(
    ("width", "layers", "context_bytes", "bytes_per_token", "vocabulary", "published"),
    [
        pytest.param(1280, 24, 8192, LLAMA2_BYTES_PER_TOKEN, 32000, 3.14e8, id="Llama-2 470M"),
        pytest.param(3072, 32, 8192, LLAMA2_BYTES_PER_TOKEN, 32000, 2.13e9, id="Llama-2 3.6B"),
        pytest.param(4096, 32, 16384, LLAMA3_BYTES_PER_TOKEN, 128256, 3.39e9, id="Llama-3 8B"),
    ],
)
def test_published_token_models(
    width: int, layers: int, context_bytes: int, bytes_per_token: float, vocabulary: int, published: float
) -> None:
    """To the three digits given."""
    flops = flat_flops_per_byte(
        Stack(width=width, layers=layers),
        context_bytes=context_bytes,
        bytes_per_token=bytes_per_token,
        vocabulary=vocabulary,
    )
    assert float(f"{flops:.2e}") == published


PUBLISHED_8B = [(4.5, 1, 3.439e9), (6.0, 1, 2.622e9), (8.0, 1, 2.027e9), (8.0, 3, 2.127e9)]


@pytest.mark.parametrize(("mean_patch_bytes", "encoder_layers", "published"), PUBLISHED_8B)
def test_published_blt_8b(mean_patch_bytes: float, encoder_layers: int, published: float) -> None:
    """To the four digits given, with the paper's k = latent width / encoder width and 256 outputs."""
    ledger = blt_flops_per_byte(
        latent=Stack(width=4096, layers=32),
        encoder=Stack(width=1280, layers=encoder_layers),
        decoder=Stack(width=1280, layers=6),
        mean_patch_bytes=mean_patch_bytes,
        context_bytes=16384,
        vocabulary=256,
    )
    assert float(f"{ledger.published:.3e}") == published
    assert ledger.forward == ledger.published


@pytest.mark.parametrize(("width", "published"), [(512, "0.96e8"), (768, "2.10e8")])
def test_published_entropy_models(width: int, published: str) -> None:
    """To the two digits given; window 512 and 260 outputs."""
    stack = Stack(width=width, layers=14)
    flops = flat_flops_per_byte(stack, context_bytes=512, bytes_per_token=1, vocabulary=260)
    assert f"{flops / 1e8:.2f}e8" == published


def published_8b(encoder_layers: int = 1) -> BLTConfig:
    local = TransformerConfig(width=1280, layers=encoder_layers, heads=20, rope_theta=500000.0)
    return BLTConfig(
        local_encoder=local,
        latent=TransformerConfig(width=4096, layers=32, heads=32, window=None, rope_theta=500000.0),
        local_decoder=replace(local, layers=6),
        cross_attention=CrossAttentionConfig(heads=20, slots=4, encoder_layers="all"),
        hash_embedding=HashEmbeddingConfig(),
    )


ENTROPY_MODEL = EntropyModelConfig(transformer=TransformerConfig(width=768, layers=14, heads=12))


@pytest.mark.parametrize(("mean_patch_bytes", "encoder_layers", "published"), PUBLISHED_8B)
def test_configured_blt_8b_is_near_the_published_count(
    mean_patch_bytes: float, encoder_layers: int, published: float
) -> None:
    """Four slots instead of 3.2 and feed-forward widths rounded up to 256 add 0.9 to 1.2 %."""
    ledger = flops_per_byte(published_8b(encoder_layers), mean_patch_bytes, 16384)
    assert 1.009 * published < ledger.published < 1.0125 * published


def test_parts_that_the_paper_leaves_out() -> None:
    ledger = flops_per_byte(published_8b(), 4.5, 16384, ENTROPY_MODEL)
    assert ledger.hash_tables == 6 * 1280
    assert ledger.projections == pytest.approx(2 * (1280 * 5120 + 5120 * 4096 + 4096 * 5120) / 4.5)
    assert ledger.entropy_model == pytest.approx(2.096e8, rel=1e-3)
    assert ledger.entropy_model == entropy_flops_per_byte(ENTROPY_MODEL, 16384)
    extra = ledger.projections + ledger.hash_tables + ledger.entropy_model
    assert ledger.forward == pytest.approx(ledger.published + extra)
    assert ledger.forward == pytest.approx(sum(getattr(ledger, part.name) for part in fields(FlopLedger)))
    assert ledger.training == pytest.approx(3 * (ledger.forward - ledger.entropy_model) + ledger.entropy_model)


def linear_flops(model: nn.Module, run: Callable[[], object]) -> float:
    """2 x rows x weights, summed over every linear layer that a run of the model passes."""
    total = 0

    def count(linear: nn.Module, inputs: tuple[Tensor], _output: Tensor) -> None:
        nonlocal total
        assert isinstance(linear, nn.Linear)
        total += 2 * linear.weight.numel() * (inputs[0].numel() // linear.in_features)

    handles = [part.register_forward_hook(count) for part in model.modules() if isinstance(part, nn.Linear)]
    run()
    for handle in handles:
        handle.remove()
    return total


SMALL_CROSS = [
    CrossAttentionConfig(heads=2, slots=2, encoder_layers="all"),
    CrossAttentionConfig(heads=2, slots=3, encoder_layers="last", decoder_layers="first"),
    CrossAttentionConfig(heads=2, slots=1, encoder_layers="none", decoder_layers="none"),
]


@pytest.mark.parametrize("cross", SMALL_CROSS, ids=["all", "last and first", "none"])
@pytest.mark.parametrize("latent_width", [48, 64, 96])
def test_matrix_products_are_those_the_model_makes(cross: CrossAttentionConfig, latent_width: int) -> None:
    """Everything in the ledger but attention over keys and table rows is a linear layer: equal to the last FLOP."""
    config = BLTConfig(
        local_encoder=TransformerConfig(width=32, layers=2, heads=2, ffn_multiple_of=16),
        latent=TransformerConfig(width=latent_width, layers=3, heads=4, kv_heads=2, window=None),
        local_decoder=TransformerConfig(width=32, layers=3, heads=4, kv_heads=2, ffn_multiplier=1.5),
        cross_attention=cross,
        hash_embedding=HashEmbeddingConfig(group_sizes=(3, 4), table_size=50),
    )
    patch_lengths_BP = torch.tensor([[1, 3, 5, 1, 2, 4, 5]])
    num_bytes, num_patches = int(patch_lengths_BP.sum()) - 1, patch_lengths_BP.shape[1]
    model = BLT(config)
    made = linear_flops(model, lambda: model(torch.randint(4, 260, (1, num_bytes)), patch_lengths_BP))
    mean_patch_bytes = num_bytes / num_patches
    ledger = flops_per_byte(config, mean_patch_bytes, num_bytes)
    encoder_cross = {"all": 2, "last": 1, "none": 0}[cross.encoder_layers]
    decoder_cross = {"all": 3, "first": 1, "none": 0}[cross.decoder_layers]
    over_keys = sum(
        per_byte * attention_flops(Stack(width=width, layers=layers), keys)
        for per_byte, width, layers, keys in [
            (1.0, 32, 5, num_bytes),
            (1 / mean_patch_bytes, latent_width, 3, num_patches),
            (cross.slots / mean_patch_bytes, 32, encoder_cross, mean_patch_bytes),
            (1.0, 32, decoder_cross, cross.slots),
        ]
    )
    counted = ledger.forward - ledger.hash_tables - over_keys
    assert counted * num_bytes == pytest.approx(made, rel=1e-12)


def test_a_long_patch_leaves_the_latent_transformer_less_to_do() -> None:
    config = published_8b()
    short, long = flops_per_byte(config, 4, 8192), flops_per_byte(config, 8, 8192)
    assert long.latent < short.latent / 2
    assert long.local_encoder == short.local_encoder
    assert long.local_decoder == short.local_decoder
    assert long.projections == short.projections / 2


def test_shape_decides_what_is_counted() -> None:
    config = published_8b(encoder_layers=3)
    every = flops_per_byte(config, 4, 8192)
    cross = replace(config.cross_attention, encoder_layers="last", decoder_layers="first")
    last = flops_per_byte(replace(config, cross_attention=cross), 4, 8192)
    assert last.encoder_cross_attention == pytest.approx(every.encoder_cross_attention / 3)
    assert last.decoder_cross_attention == pytest.approx(every.decoder_cross_attention / 6)
    grouped = flops_per_byte(replace(config, latent=replace(config.latent, kv_heads=8)), 4, 8192)
    assert every.latent - grouped.latent == pytest.approx(2 * 0.75 * 2 * 32 * 4096**2 / 4)
    no_tables = replace(config, hash_embedding=replace(config.hash_embedding, group_sizes=()))
    assert flops_per_byte(no_tables, 4, 8192).hash_tables == 0
    pooled = CrossAttentionConfig(slots=1, encoder_layers="none", decoder_layers="none")
    no_cross = replace(config, cross_attention=pooled)
    plain = flops_per_byte(no_cross, 4, 8192)
    assert plain.encoder_cross_attention == plain.decoder_cross_attention == 0
    assert plain.projections == pytest.approx(2 * (1280 * 4096 + 4096 * 1280) / 4)


def test_a_window_counts_no_more_than_the_context() -> None:
    config = published_8b()
    assert flops_per_byte(config, 4, 64).local_encoder < flops_per_byte(config, 4, 512).local_encoder
    assert flops_per_byte(config, 4, 512).local_encoder == flops_per_byte(config, 4, 8192).local_encoder


@pytest.mark.parametrize(("mean_patch_bytes", "context_bytes"), [(0, 8192), (-1, 8192), (4, 0), (float("nan"), 8192)])
def test_numbers_that_make_no_sense_are_refused(mean_patch_bytes: float, context_bytes: float) -> None:
    with pytest.raises(ValueError, match="above 0"):
        flops_per_byte(published_8b(), mean_patch_bytes, context_bytes)


@pytest.mark.parametrize(("window", "length"), [(4, 3), (4, 4), (4, 5), (4, 40), (7, 100)])
def test_operations_done_are_those_of_the_keys_seen(window: int, length: int) -> None:
    config = EntropyModelConfig(transformer=TransformerConfig(width=8, layers=3, heads=2, window=window))
    keys = sum(min(position + 1, window) for position in range(length)) / length
    done, without = (entropy_flops_per_byte(config, length, "done"), entropy_flops_per_byte(config, 1, "done"))
    assert done - without == pytest.approx(4 * 3 * 8 * (keys - 1))
    assert entropy_flops_per_byte(config, length) <= done
