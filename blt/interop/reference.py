"""The published reference's names: its parameters and arguments in, our model out, and parameters back.

In: a state dict with its parameter names and the arguments of its params.json (for a BLT those of the model, for an
entropy model those of its transformer). Out: `BLT` or `EntropyModel` with the same numbers. Every argument is used,
known to change no number at inference, None or False; anything else is refused.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from blt.entropy_model import EntropyModel, EntropyModelConfig
from blt.interop.arguments import Arguments
from blt.interop.renaming import Names, adopt, blt_renaming, entropy_renaming, split
from blt.layers import TransformerConfig
from blt.local_encoder import CrossAttentionConfig, HashEmbeddingConfig
from blt.model import BLT, BLTConfig
from blt.vocabulary import BOS, EOS, VOCABULARY_SIZE

NAMES = Names(
    attention="attention",
    query="wq",
    key="wk",
    value="wv",
    out="wo",
    gate="feed_forward.w1",
    up="feed_forward.w3",
    down="feed_forward.w2",
    attention_norm="attention_norm",
    ffn_norm="ffn_norm",
    cross_norm_q="cross_attn_norm_q",
    cross_norm_kv="cross_attn_norm_kv",
    byte_embedding="tok_embeddings",
    model="",
    output="local_decoder.output",
    entropy_model="",
    entropy_output="output",
    one_hash_table=False,
)

IGNORED = frozenset(
    [
        "alpha_depth",
        "attn_impl",
        "attn_to_keep",
        "cross_attn_use_flex_attention",
        "data_loader_patching",
        "entropy_model_checkpoint_dir",
        "fixed_seq_len",
        "full_logging_n_layers",
        "init_base_std",
        "init_std_factor",
        "init_use_depth",
        "init_use_gaussian",
        "layer_ckpt",
        "log_patch_lengths",
        "max_encoder_seq_length",
        "max_length",
        "max_patch_length",
        "max_seqlen",
        "max_batch_size",
        "monotonicity",
        "pad_to_max_length",
        "patch_in_forward",
        "patch_size",
        "patching_batch_size",
        "patching_device",
        "patching_mode",
        "patching_threshold",
        "patching_threshold_add",
        "patching_thresholds_str",
        "realtime_patching",
        "recompute_attn",
        "recompute_fc1_out",
        "recompute_fc3_out",
        "rope_use_fp32_in_outer_product",
        "seed",
        "share_encoder_decoder_emb",
        "use_fsdp",
    ]
)
"""Arguments that change no number of a forward pass at inference: initialisation, kernels, recomputing, table lengths,
logging, and how patches are made, which a patch rule says here."""

FIXED: dict[str, tuple[object, ...]] = {
    "bos_id": (BOS,),
    "dropout": (0, 0.0),
    "eos_id": (EOS,),
    "non_linearity": ("swiglu",),
    "norm_affine": (True,),
    "norm_type": ("rmsnorm",),
    "output_size": (-1, VOCABULARY_SIZE),
    "pm_size": (0,),
    "pre_norm": (True,),
    "use_local_encoder_transformer": (True,),
    "use_rope": (True,),
    "vocab_size": (VOCABULARY_SIZE,),
}
"""Arguments that would change numbers in a way no model here computes, and the values they may have."""

UNUSED_BY_BLT = frozenset({"dim", "head_dim", "n_heads", "n_layers", "sliding_window"})
"""Arguments of the base class that a BLT has beside those of its three parts, and does not read."""


def from_reference(
    state_dict: Mapping[str, Tensor], config: Mapping[str, Any], *, dtype: torch.dtype | None = None
) -> BLT | EntropyModel:
    """The model of a reference state dict: a BLT if `config` has `dim_global`, else an entropy model.

    On the CPU, in `dtype` or, if None, in that of the tensors (float32 where they differ). Raises ValueError naming
    every argument that is unknown, missing or of a value that is not computed here, and every tensor missing,
    unexpected or of a wrong shape.
    """
    shape = reference_shape(config)
    if isinstance(shape, BLTConfig):
        return adopt(BLT, shape, state_dict, blt_renaming(shape, NAMES), dtype=dtype)
    return adopt(EntropyModel, shape, state_dict, entropy_renaming(shape, NAMES), dtype=dtype)


def reference_shape(config: Mapping[str, Any]) -> BLTConfig | EntropyModelConfig:
    """What the arguments say that the model is; a BLT if they have `dim_global`. ValueError as `from_reference`'s."""
    arguments = Arguments(config, IGNORED, FIXED)
    return _blt_config(arguments) if "dim_global" in config else _entropy_config(arguments)


def to_reference(model: BLT | EntropyModel) -> dict[str, Tensor]:
    """The model's parameters under the reference's names: the inverse of `from_reference`, bit for bit."""
    if isinstance(model, BLT):
        return split(model.state_dict(), blt_renaming(model.config, NAMES))
    return split(model.state_dict(), entropy_renaming(model.config, NAMES))


def _entropy_config(arguments: Arguments) -> EntropyModelConfig:
    arguments.one_of("attn_bias_type", ("local_block_causal", "block_causal"), "local_block_causal")
    shape = _stack(
        arguments, "dim", "n_layers", "n_heads", "n_kv_heads", arguments.integer("sliding_window", 512), "head_dim"
    )
    arguments.finish()
    return EntropyModelConfig(transformer=shape)


def _blt_config(arguments: Arguments) -> BLTConfig:
    if arguments.given("patching_mode") == "":
        raise ValueError("argument patching_mode must name a patching: the MegaByte mode of '' is not computed here")
    arguments.one_of("attn_bias_type", ("block_causal", "local_block_causal"), "block_causal")
    window = arguments.optional_integer("local_attention_window_len")
    local = ("n_kv_heads", window)
    encoder = _stack(arguments, "dim_local_encoder", "n_layers_local_encoder", "n_heads_local_encoder", *local)
    decoder = _stack(arguments, "dim_local_decoder", "n_layers_local_decoder", "n_heads_local_decoder", *local)
    latent = _stack(arguments, "dim_global", "n_layers_global", "n_heads_global", "n_kv_heads_global", None)
    for name in ("dim_token", "dim_token_emb"):
        arguments.one_of(name, (encoder.width,), encoder.width)
    config = BLTConfig(
        local_encoder=encoder,
        latent=latent,
        local_decoder=decoder,
        cross_attention=_cross_attention(arguments, encoder),
        hash_embedding=_hash_embedding(arguments),
    )
    arguments.finish(UNUSED_BY_BLT)
    return config


def _stack(
    arguments: Arguments, dim: str, layers: str, heads: str, kv_heads: str, window: int | None, head_dim: str = ""
) -> TransformerConfig:
    """A stack of blocks whose own arguments have these names."""
    width, num_heads = arguments.integer(dim), arguments.integer(heads)
    if head_dim:
        arguments.one_of(head_dim, (width // max(num_heads, 1),), width // max(num_heads, 1))
    return TransformerConfig(
        width=width,
        layers=arguments.integer(layers),
        heads=num_heads,
        kv_heads=arguments.optional_integer(kv_heads),
        ffn_multiplier=arguments.optional_number("ffn_dim_multiplier"),
        ffn_multiple_of=arguments.integer("multiple_of", 256),
        window=window,
        rope_theta=arguments.number("rope_theta", 10000.0),
        norm_eps=arguments.number("norm_eps", 1e-5),
    )


def _cross_attention(arguments: Arguments, encoder: TransformerConfig) -> CrossAttentionConfig:
    in_encoder, in_decoder = arguments.flag("cross_attn_encoder", False), arguments.flag("cross_attn_decoder", False)
    all_encoder = arguments.flag("cross_attn_all_layers_encoder", False)
    all_decoder = arguments.flag("cross_attn_all_layers_decoder", False)
    by_pooling = arguments.flag("cross_attn_init_by_pooling", True)
    slots = arguments.integer("cross_attn_k", 1)
    if in_encoder and not by_pooling:
        raise ValueError("argument cross_attn_init_by_pooling must be true: patches start as pooled bytes here")
    pooling: dict[str, Literal["max", "mean", "min"]] = {"max": "max", "avg": "mean", "mean": "mean", "min": "min"}
    return CrossAttentionConfig(
        heads=arguments.integer("cross_attn_nheads", encoder.heads),
        slots=slots if in_encoder or in_decoder else 1,
        encoder_layers=("all" if all_encoder else "last") if in_encoder else "none",
        decoder_layers=("all" if all_decoder else "first") if in_decoder else "none",
        pooling=pooling[arguments.one_of("downsampling_by_pooling", tuple(pooling), "max")],
    )


def _hash_embedding(arguments: Arguments) -> HashEmbeddingConfig:
    sizes = arguments.integers("encoder_hash_byte_group_size")
    if not sizes:
        for name in ("encoder_hash_byte_group_vocab", "encoder_hash_byte_group_nb_functions"):
            arguments.optional_integer(name)
        return HashEmbeddingConfig(group_sizes=())
    return HashEmbeddingConfig(
        group_sizes=sizes,
        functions=arguments.integer("encoder_hash_byte_group_nb_functions"),
        table_size=arguments.integer("encoder_hash_byte_group_vocab"),
    )
