"""transformers' BLT beside ours: the same configuration and the same random weights in both.

Used by tests only. In: a `BLTConfig` or `EntropyModelConfig` that transformers can express. Out: both models, and
transformers' parameters (or their gradients) under our names. Merged projections are the rows of theirs one after the
other, so the mapping is linear and serves gradients as it does weights.

What transformers cannot express or computes otherwise, and tests leave to the oracle:
- cross-attention after each of several encoder layers: it pools again after every layer, so only the last one counts
  (as published: each refines the slots of the one before). One encoder layer is the same in both.
- documents: no EOS ever closes an attention block.
- GQA in local models: its cross-attention takes the local kv heads too. The latent transformer's GQA is compared.
- windows or rotary bases that differ between encoder and decoder: it makes one mask from the encoder's.
- mean and min pooling, cross-attention in no encoder or decoder layer, no hash embeddings: it has none of them.
- `max_patch_length` of its patcher (loses the last start) and rows of unequal patch counts (negative lengths).
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from transformers import BltConfig, BltForCausalLM
from transformers.models.blt.configuration_blt import BltPatcherConfig
from transformers.models.blt.modeling_blt import BltPatcher

from blt.entropy_model import EntropyModel, EntropyModelConfig
from blt.layers import TransformerConfig
from blt.model import BLT, BLTConfig
from tests.model_cases import randomised

Source = tuple[str, ...]
"""Names of transformers' parameters whose rows make up one of ours."""

BLOCK: dict[str, Source] = {
    "attention_norm.weight": ("input_layernorm.weight",),
    "attention.wqkv.weight": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    "attention.wo.weight": ("self_attn.o_proj.weight",),
    "ffn_norm.weight": ("post_attention_layernorm.weight",),
    "feed_forward.w13.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "feed_forward.w2.weight": ("mlp.down_proj.weight",),
}
CROSS_ATTENTION: dict[str, Source] = {
    "norm_q.weight": ("q_norm.weight",),
    "norm_kv.weight": ("k_norm.weight",),
    "wq.weight": ("q_proj.weight",),
    "wkv.weight": ("k_proj.weight", "v_proj.weight"),
    "wo.weight": ("o_proj.weight",),
}
BLT_NAMES: dict[str, Source] = {
    "local_encoder.byte_embedding.weight": ("model.local_encoder.embed_tokens.weight",),
    "local_encoder.hash_embedding.table": ("model.encoder_hash_tok_embedding.weight",),
    "local_encoder.slot_projection.weight": ("model.local_encoder.patch_embedding_projection.weight",),
    "latent.projection.weight": ("model.global_transformer.token_embedding_projection.weight",),
    "local_decoder.projection.weight": ("model.local_decoder.patch_embedding_projection.weight",),
    "local_decoder.norm.weight": ("model.local_decoder.norm.weight",),
    "local_decoder.output.weight": ("lm_head.weight",),
}
STACKS: dict[str, str] = {
    "local_encoder": "model.local_encoder",
    "latent": "model.global_transformer",
    "local_decoder": "model.local_decoder",
}
ENTROPY_NAMES: dict[str, Source] = {
    "byte_embedding.weight": ("embed_tokens.weight",),
    "norm.weight": ("norm.weight",),
    "output.weight": ("lm_head.weight",),
}


def sources(name: str) -> Source:
    """transformers' names for one parameter of ours."""
    if name in BLT_NAMES or name in ENTROPY_NAMES:
        return BLT_NAMES.get(name) or ENTROPY_NAMES[name]
    stack, _, rest = name.rpartition("blocks.") if "blocks." in name else name.rpartition("cross_attention.")
    layer, _, part = rest.partition(".")
    prefix = f"{STACKS[stack.rstrip('.')]}." if stack else ""
    table, kind = (BLOCK, "layers") if "blocks." in name else (CROSS_ATTENTION, "cross_attn_layers")
    return tuple(f"{prefix}{kind}.{layer}.{theirs}" for theirs in table[part])


def under_our_names(ours: nn.Module, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """transformers' tensors merged into the shapes and names of our parameters; each of theirs used at most once."""
    names = {name: sources(name) for name, _ in ours.named_parameters()}
    used = [theirs_name for source in names.values() for theirs_name in source]
    assert len(used) == len(set(used))
    return {name: torch.cat([theirs[part] for part in source]) for name, source in names.items()}


def unused(ours: nn.Module, theirs: nn.Module) -> set[str]:
    """transformers' parameters that none of ours takes."""
    taken = {part for name, _ in ours.named_parameters() for part in sources(name)}
    return {name for name, _ in theirs.named_parameters()} - taken


def blt_pair(
    config: BLTConfig, seed: int, edit: Callable[[nn.Module], None] | None = None
) -> tuple[BltForCausalLM, BLT]:
    """transformers' model and ours with the same weights. `edit` changes transformers' before ours takes them."""
    encoder, decoder, cross = config.local_encoder, config.local_decoder, config.cross_attention
    assert (encoder.window, encoder.rope_theta) == (decoder.window, decoder.rope_theta)
    assert (cross.heads, cross.heads, cross.pooling) == (encoder.heads, decoder.heads, "max")
    assert cross.encoder_layers == "last" or encoder.layers == 1
    local = {"cross_attn_k": cross.slots, "hidden_size_global": config.latent.width}
    theirs = BltForCausalLM(
        BltConfig(
            patch_in_forward=False,
            local_attention_window_len=encoder.window,
            cross_attn_k=cross.slots,
            encoder_hash_byte_group_size=list(config.hash_embedding.group_sizes),
            encoder_hash_byte_group_vocab=config.hash_embedding.table_size,
            encoder_hash_byte_group_nb_functions=config.hash_embedding.functions,
            encoder_config={**_stack(encoder), **local, "cross_attn_all_layers": cross.encoder_layers == "all"},
            decoder_config={**_stack(decoder), **local, "cross_attn_all_layers": cross.decoder_layers == "all"},
            global_config=_stack(config.latent),
            use_cache=False,
            attn_implementation="eager",
        )
    )
    ours = BLT(config)
    randomised(theirs, seed)
    if edit is not None:
        edit(theirs)
    ours.load_state_dict(under_our_names(ours, dict(theirs.named_parameters())))
    return theirs, ours


def entropy_pair(config: EntropyModelConfig, seed: int) -> tuple[BltPatcher, EntropyModel]:
    """transformers' patcher and our entropy model with the same weights."""
    shape = config.transformer
    theirs = BltPatcher(BltPatcherConfig(**_stack(shape), sliding_window=shape.window, attn_implementation="eager"))
    ours = EntropyModel(config)
    randomised(theirs, seed)
    ours.load_state_dict(under_our_names(ours, dict(theirs.named_parameters())))
    return theirs, ours


def _stack(shape: TransformerConfig) -> dict[str, object]:
    return {
        "hidden_size": shape.width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.num_kv_heads,
        "intermediate_size": shape.ffn_width,
        "rms_norm_eps": shape.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
    }
