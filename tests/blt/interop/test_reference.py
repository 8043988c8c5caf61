"""The reference's names and arguments: exact round trips, and refusal by name of what does not fit."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from blt.entropy_model import EntropyModel
from blt.interop import from_reference, to_reference
from blt.model import BLT

BLT_ARGUMENTS: dict[str, Any] = {
    "dim_global": 96,
    "dim_local_encoder": 32,
    "dim_local_decoder": 32,
    "dim_token": 32,
    "n_layers_global": 2,
    "n_layers_local_encoder": 2,
    "n_layers_local_decoder": 3,
    "n_heads_global": 6,
    "n_heads_local_encoder": 2,
    "n_heads_local_decoder": 2,
    "n_kv_heads_global": 3,
    "cross_attn_encoder": True,
    "cross_attn_decoder": True,
    "cross_attn_k": 2,
    "cross_attn_nheads": 4,
    "cross_attn_all_layers_encoder": False,
    "cross_attn_all_layers_decoder": True,
    "cross_attn_init_by_pooling": True,
    "downsampling_by_pooling": "max",
    "encoder_hash_byte_group_size": [3, 5],
    "encoder_hash_byte_group_vocab": 53,
    "encoder_hash_byte_group_nb_functions": 2,
    "local_attention_window_len": 16,
    "max_encoder_seq_length": 64,
    "max_seqlen": 16,
    "multiple_of": 16,
    "ffn_dim_multiplier": 1.0,
    "rope_theta": 500000.0,
    "norm_eps": 1e-5,
    "attn_bias_type": "block_causal",
    "eos_id": 2,
    "vocab_size": 260,
    # What a published params.json holds besides.
    "dim": 512,
    "n_layers": 8,
    "n_heads": 8,
    "dropout": 0.0,
    "init_base_std": None,
    "init_std_factor": "current_depth",
    "attn_impl": "xformers",
    "patch_size": 4.5,
    "patching_mode": "entropy",
    "cross_attn_window_encoder": None,
    "patch_only_encoder": False,
    "use_rope": True,
}
ENTROPY_ARGUMENTS: dict[str, Any] = {
    "dim": 32,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "max_seqlen": 64,
    "sliding_window": 16,
    "ffn_dim_multiplier": 1.0,
    "multiple_of": 16,
    "vocab_size": 260,
    "attn_bias_type": "local_block_causal",
}


def block(prefix: str, width: int, kv_width: int, ffn: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}.attention_norm.weight": (width,),
        f"{prefix}.attention.wq.weight": (width, width),
        f"{prefix}.attention.wk.weight": (kv_width, width),
        f"{prefix}.attention.wv.weight": (kv_width, width),
        f"{prefix}.attention.wo.weight": (width, width),
        f"{prefix}.ffn_norm.weight": (width,),
        f"{prefix}.feed_forward.w1.weight": (ffn, width),
        f"{prefix}.feed_forward.w3.weight": (ffn, width),
        f"{prefix}.feed_forward.w2.weight": (width, ffn),
    }


def cross(prefix: str, width: int) -> dict[str, tuple[int, ...]]:
    norms = {f"{prefix}.cross_attn_norm_{part}.weight": (width,) for part in ("q", "kv")}
    return norms | {f"{prefix}.{part}.weight": (width, width) for part in ("wq", "wk", "wv", "wo")}


def blt_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "local_encoder.tok_embeddings.weight": (260, 32),
        "local_encoder.patch_embedding_projection.weight": (64, 32),
        "global_transformer.token_embedding_projection.weight": (96, 64),
        "local_decoder.patch_embedding_projection.weight": (64, 96),
        "local_decoder.norm.weight": (32,),
        "local_decoder.output.weight": (260, 32),
    }
    for table in range(4):
        shapes[f"encoder_hash_tok_embedding.{table}.weight"] = (53, 32)
    for layer in range(2):
        shapes |= block(f"local_encoder.layers.{layer}", 32, 32, 96)
        shapes |= block(f"global_transformer.layers.{layer}", 96, 48, 256)
    shapes |= cross("local_encoder.cross_attn_layers.0", 32)
    for layer in range(3):
        shapes |= block(f"local_decoder.layers.{layer}", 32, 32, 96)
        shapes |= cross(f"local_decoder.cross_attn_layers.{layer}", 32)
    return shapes


def entropy_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "tok_embeddings.weight": (260, 32),
        "norm.weight": (32,),
        "output.weight": (260, 32),
    }
    for layer in range(2):
        shapes |= block(f"layers.{layer}", 32, 16, 96)
    return shapes


def random_state(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_round_trips_are_exact(dtype: torch.dtype) -> None:
    for shapes, arguments, kind in (
        (blt_shapes(), BLT_ARGUMENTS, BLT),
        (entropy_shapes(), ENTROPY_ARGUMENTS, EntropyModel),
    ):
        state = random_state(shapes, dtype)
        model = from_reference(state, arguments)
        assert isinstance(model, kind)
        back = to_reference(model)
        assert back.keys() == state.keys()
        assert all(torch.equal(back[name], state[name]) and back[name].dtype == dtype for name in state)


def test_arguments_reach_the_configuration() -> None:
    model = from_reference(random_state(blt_shapes()), BLT_ARGUMENTS)
    assert isinstance(model, BLT)
    config = model.config
    assert (config.latent.kv_heads, config.latent.window, config.local_decoder.window) == (3, None, 16)
    assert (config.latent.rope_theta, config.local_encoder.rope_theta) == (500000.0, 500000.0)
    assert (config.cross_attention.encoder_layers, config.cross_attention.decoder_layers) == ("last", "all")
    assert (config.hash_embedding.group_sizes, config.hash_embedding.functions) == ((3, 5), 2)
    entropy = from_reference(random_state(entropy_shapes()), ENTROPY_ARGUMENTS | {"sliding_window": None})
    assert isinstance(entropy, EntropyModel)
    assert (entropy.config.window, entropy.config.transformer.rope_theta) == (512, 10000.0)


def test_merged_parts_are_in_their_places() -> None:
    state = random_state(blt_shapes())
    ours = from_reference(state, BLT_ARGUMENTS).state_dict()
    attention = "global_transformer.layers.1.attention"
    q, k, v = ours["latent.blocks.1.attention.wqkv.weight"].split([96, 48, 48])
    assert torch.equal(q, state[f"{attention}.wq.weight"])
    assert torch.equal(k, state[f"{attention}.wk.weight"])
    assert torch.equal(v, state[f"{attention}.wv.weight"])
    gate, up = ours["local_decoder.blocks.2.feed_forward.w13.weight"].chunk(2)
    assert torch.equal(gate, state["local_decoder.layers.2.feed_forward.w1.weight"])
    assert torch.equal(up, state["local_decoder.layers.2.feed_forward.w3.weight"])
    # Tables in the order for function: for size.
    assert torch.equal(
        ours["local_encoder.hash_embedding.table"][2 * 53 : 3 * 53], state["encoder_hash_tok_embedding.2.weight"]
    )


def test_every_shape_of_model_round_trips(small_blt_config: Any) -> None:
    cross, hashes = small_blt_config.cross_attention, small_blt_config.hash_embedding
    for config in (
        small_blt_config,
        replace(small_blt_config, hash_embedding=replace(hashes, group_sizes=())),
        replace(small_blt_config, cross_attention=replace(cross, encoder_layers="none", slots=1)),
        replace(small_blt_config, cross_attention=replace(cross, decoder_layers="none")),
        replace(small_blt_config, cross_attention=replace(cross, encoder_layers="all", decoder_layers="first")),
        replace(
            small_blt_config,
            cross_attention=replace(cross, slots=1),
            latent=replace(small_blt_config.latent, width=32),
        ),
    ):
        model = BLT(config)
        state = to_reference(model)
        assert sum(t.numel() for t in state.values()) == sum(p.numel() for p in model.parameters())


def test_tensors_that_do_not_fit_are_named() -> None:
    state = random_state(blt_shapes())
    # As many rows in all, so that only the parts tell.
    for part, rows in (("wq", 95), ("wk", 49)):
        state[f"global_transformer.layers.0.attention.{part}.weight"] = torch.zeros(rows, 96)
    state["surplus"] = state.pop("local_decoder.norm.weight")
    with pytest.raises(ValueError, match=r"missing: local_decoder\.norm\.weight") as caught:
        from_reference(state, BLT_ARGUMENTS)
    assert "unexpected: surplus" in str(caught.value)
    assert "global_transformer.layers.0.attention.wq.weight is [95, 96] instead of [96, 96]" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_experts": 8}, "unknown arguments n_experts=8"),
        ({"cross_attn_window_encoder": 512}, "unknown arguments cross_attn_window_encoder=512"),
        ({"flag": 0}, "unknown arguments flag=0"),
        ({"dropout": 0.1}, "dropout must be"),
        ({"use_rope": False}, "use_rope must be True"),
        ({"vocab_size": 256}, "vocab_size must be 260"),
        ({"eos_id": 3}, "eos_id must be 2"),
        ({"patching_mode": ""}, "patching_mode"),
        ({"attn_bias_type": "causal"}, "attn_bias_type must be"),
        ({"cross_attn_init_by_pooling": False}, "cross_attn_init_by_pooling"),
        ({"downsampling_by_pooling": "topk"}, "downsampling_by_pooling must be"),
        ({"dim_token": 64}, "dim_token must be 32"),
        ({"n_layers_global": "2"}, "n_layers_global must be a whole number"),
        ({"n_layers_global": 2.5}, "n_layers_global must be a whole number"),
        ({"n_heads_global": None}, "n_heads_global is missing"),
        ({"n_heads_global": 7}, "multiple of"),
    ],
)
def test_arguments_that_are_not_computed_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_reference(random_state(blt_shapes()), BLT_ARGUMENTS | change)


def test_whole_numbers_may_be_written_as_floats() -> None:
    floats = {name: float(value) for name, value in BLT_ARGUMENTS.items() if type(value) is int}
    assert len(floats) > 5
    state = random_state(blt_shapes())
    assert from_reference(state, BLT_ARGUMENTS | floats).config == from_reference(state, BLT_ARGUMENTS).config


def test_unknown_entropy_argument() -> None:
    with pytest.raises(ValueError, match="local_attention_window_len=4"):
        from_reference(random_state(entropy_shapes()), ENTROPY_ARGUMENTS | {"local_attention_window_len": 4})
