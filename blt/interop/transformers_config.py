"""config.json of a transformers BLT, and what it says about our models; both directions.

Keys that transformers' BLT does not read are not read here, and absent ones have its defaults. A file that we wrote
also holds our own settings under OURS, which say more than its keys can (patch rules, initialisation); they are used as
long as they agree with those keys. Source of keys and defaults: transformers 5,
models/blt/configuration_blt.py.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from blt.config_json import Json, from_json, json_object, to_json
from blt.entropy_model import EntropyModelConfig
from blt.errors import ConfigError
from blt.interop.arguments import Arguments
from blt.interop.rotary import read_rope, write_rope
from blt.layers import TransformerConfig
from blt.local_encoder import CrossAttentionConfig, HashEmbeddingConfig
from blt.model import BLTConfig
from blt.patching import ENTROPY_STEPS_PER_NAT, PatchRule
from blt.vocabulary import BOE, BOS, EOS, VOCABULARY_SIZE

OURS = "blt_ray"

_HINT = "allow lossy patching to export all the same"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What makes a language model, weights aside."""

    model: BLTConfig
    entropy_model: EntropyModelConfig | None
    patch_rule: PatchRule
    reset_on_newline: bool


@dataclass(frozen=True, kw_only=True)
class _Defaults:
    """What transformers takes for keys that a part's config does not have."""

    width: int
    layers: int
    heads: int
    ffn_width: int | None
    rope_theta: float = 500000.0


_ENCODER = _Defaults(width=1024, layers=1, heads=16, ffn_width=None)
_DECODER = _Defaults(width=1024, layers=9, heads=16, ffn_width=2816)
_LATENT = _Defaults(width=2048, layers=25, heads=16, ffn_width=5632)
_PATCHER = _Defaults(width=768, layers=14, heads=12, ffn_width=2048, rope_theta=10000.0)


def read_settings(config: Mapping[str, object]) -> Settings:
    """Our settings for a config.json. ValueError naming the key for what is not computed here."""
    found = _their_settings(config)
    if config.get(OURS) is None:
        return found
    settings = from_json(Settings, json_object(config[OURS], OURS), OURS)
    if _their_settings(write_settings(settings, lossy_patching=True)) != found:
        raise ValueError(f"key {OURS} says otherwise than the other keys: remove it if these were changed on purpose")
    return settings


def write_settings(settings: Settings, *, lossy_patching: bool = False) -> dict[str, Json]:
    """config.json for our settings, without dtype. ConfigError for what transformers does not compute.

    With `lossy_patching` a rule that its patcher cannot follow is written as near as it comes; logits are then equal
    for patch lengths that are passed in.
    """
    model, patcher = settings.model, settings.entropy_model
    unlike_patching = [] if lossy_patching else [f"{it} ({_HINT})" for it in patching_differences(settings)]
    _refuse(_unlike_model(model) + unlike_patching)
    encoder, decoder, cross, hashes = (
        model.local_encoder,
        model.local_decoder,
        model.cross_attention,
        model.hash_embedding,
    )
    local: dict[str, Json] = {"cross_attn_k": cross.slots, "hidden_size_global": model.latent.width}
    return {
        "architectures": ["BltForCausalLM"],
        "model_type": "blt",
        "vocab_size": VOCABULARY_SIZE,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": BOE,
        "tie_word_embeddings": False,
        "use_cache": False,
        "patch_in_forward": patcher is not None,
        "patching_mode": "byte" if settings.patch_rule.kind == "byte" else "entropy",
        "patching_threshold": _plain_threshold(settings.patch_rule),
        "patch_size": 4,
        # Its splitting of long patches loses the start of the next byte's patch.
        "max_patch_length": None,
        "local_attention_window_len": encoder.window,
        "cross_attn_k": cross.slots,
        "encoder_hash_byte_group_size": list(hashes.group_sizes),
        "encoder_hash_byte_group_vocab": hashes.table_size,
        "encoder_hash_byte_group_nb_functions": hashes.functions,
        **write_rope(model.latent),
        "encoder_config": _part("encoder", encoder, {**local, "cross_attn_all_layers": cross.encoder_layers == "all"}),
        "decoder_config": _part("decoder", decoder, {**local, "cross_attn_all_layers": cross.decoder_layers == "all"}),
        "global_config": _part("global", model.latent, {}),
        "patcher_config": None if patcher is None else _part("patcher", patcher.transformer, {}),
        OURS: to_json(settings),
    }


def _part(part: str, shape: TransformerConfig, more: dict[str, Json]) -> Json:
    types = {"global": "blt_global_transformer", "patcher": "blt_patcher"}
    return {
        "model_type": types.get(part, f"blt_local_{part}"),
        "vocab_size": VOCABULARY_SIZE,
        "hidden_size": shape.width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.num_kv_heads,
        "intermediate_size": shape.ffn_width,
        "rms_norm_eps": shape.norm_eps,
        "hidden_act": "silu",
        "dropout": 0.0,
        "sliding_window": shape.window,
        **write_rope(shape),
        "tie_word_embeddings": False,
        **more,
    }


def _unlike_model(model: BLTConfig) -> list[str]:
    """What of a model transformers does not compute."""
    encoder, decoder, cross = model.local_encoder, model.local_decoder, model.cross_attention
    conditions = {
        "local_encoder.layers and local_decoder.layers must be at least 1": min(encoder.layers, decoder.layers) >= 1,
        "local_encoder.window must equal local_decoder.window": encoder.window == decoder.window,
        "cross_attention.heads must equal local_encoder.heads and local_decoder.heads": (
            cross.heads == encoder.heads == decoder.heads
        ),
        "kv_heads of local_encoder and local_decoder must equal their heads": (
            encoder.num_kv_heads == encoder.heads and decoder.num_kv_heads == decoder.heads
        ),
        "cross_attention.encoder_layers must be last, or all with one layer (it pools anew before each)": (
            cross.encoder_layers == "last" or (cross.encoder_layers == "all" and encoder.layers == 1)
        ),
        "cross_attention.decoder_layers must be all or first": cross.decoder_layers != "none",
        "cross_attention.pooling must be max": cross.pooling == "max",
        "hash_embedding.group_sizes must not be empty": bool(model.hash_embedding.group_sizes),
        "latent.width must differ from the local width": model.latent.width != decoder.width,
    }
    return [message for message, holds in conditions.items() if not holds]


def patching_differences(settings: Settings) -> list[str]:
    """What of the patching its patcher does not follow, each as a condition that does not hold; the longest patch
    aside, as it knows none."""
    rule = settings.patch_rule
    plain = rule.kind == "entropy" and not rule.monotonic and rule.threshold_add is None
    conditions = {
        "patch_rule must be kind byte, or entropy with a threshold alone": plain or rule.kind == "byte",
        "patch_rule.threshold must be finite": rule.kind == "byte" or _finite(rule.threshold) == rule.threshold,
        "reset_on_newline must be false": not settings.reset_on_newline or not rule.needs_entropies,
        "the entropy model must be there": settings.entropy_model is not None or not rule.needs_entropies,
    }
    return [message for message, holds in conditions.items() if not holds]


def _refuse(faults: list[str]) -> None:
    if faults:
        raise ConfigError(f"transformers computes no such model: {'; '.join(faults)}")


def _plain_threshold(rule: PatchRule) -> float:
    """The threshold for entropies as they are: rounded up to steps of 1/32 nat they exceed it where they exceed the
    step below it."""
    threshold = _finite(rule.threshold)
    return math.floor(threshold * ENTROPY_STEPS_PER_NAT) / ENTROPY_STEPS_PER_NAT if rule.quantized else threshold


def _finite(threshold: float) -> float:
    """Entropies lie in 0 .. ln 260, so a bound beyond them does what an infinite one does."""
    return min(max(threshold, -1e9), 1e9)


def _their_settings(config: Mapping[str, object]) -> Settings:
    """Our settings, from the keys that transformers reads."""
    top = Arguments(config, (), {"vocab_size": (VOCABULARY_SIZE,), "tie_word_embeddings": (False,)})
    window = top.optional_integer("local_attention_window_len") if "local_attention_window_len" in config else 512
    encoder, encoder_all = _read_local(config, "encoder_config", _ENCODER, window, False)
    decoder, decoder_all = _read_local(config, "decoder_config", _DECODER, window, True)
    if encoder.heads != decoder.heads:
        raise ValueError("num_attention_heads of encoder_config and decoder_config, of their cross-attentions, differ")
    cross = CrossAttentionConfig(
        heads=encoder.heads,
        slots=top.integer("cross_attn_k", 2),
        encoder_layers="all" if encoder_all else "last",
        decoder_layers="all" if decoder_all else "first",
    )
    hashes = HashEmbeddingConfig(
        group_sizes=top.integers("encoder_hash_byte_group_size") or (3, 4, 5, 6, 7, 8),
        functions=top.integer("encoder_hash_byte_group_nb_functions", 1),
        table_size=top.integer("encoder_hash_byte_group_vocab", 500002),
    )
    latent = _read_part(config, "global_config", _LATENT, None)
    mode = top.one_of("patching_mode", ("entropy", "byte", "space"), "entropy")
    rule = PatchRule(
        kind="byte" if mode == "byte" else "space" if mode == "space" else "entropy",
        threshold=top.number("patching_threshold", 1.335442066192627),
        max_patch_length=top.optional_integer("max_patch_length"),
    )
    return Settings(
        model=BLTConfig(
            local_encoder=encoder, latent=latent, local_decoder=decoder, cross_attention=cross, hash_embedding=hashes
        ),
        entropy_model=_read_patcher(config) if top.flag("patch_in_forward", True) else None,
        patch_rule=rule,
        reset_on_newline=False,
    )


def _read_patcher(config: Mapping[str, object]) -> EntropyModelConfig:
    part = json_object(config.get("patcher_config") or {}, "patcher_config")
    window = part.get("sliding_window", 512)
    if not isinstance(window, int):
        raise ValueError(f"patcher_config.sliding_window must be a whole number, got {window!r}")
    return EntropyModelConfig(transformer=_read_part(config, "patcher_config", _PATCHER, window))


def _read_local(
    config: Mapping[str, object], key: str, defaults: _Defaults, window: int | None, all_layers: bool
) -> tuple[TransformerConfig, bool]:
    """A local model's shape, and whether all of its layers have cross-attention."""
    shape = _read_part(config, key, defaults, window)
    if shape.num_kv_heads != shape.heads:
        raise ValueError(f"{key}.num_key_value_heads must equal num_attention_heads, got {shape.kv_heads}")
    part = Arguments(json_object(config.get(key) or {}, key), (), {})
    return shape, part.flag("cross_attn_all_layers", all_layers)


def _read_part(config: Mapping[str, object], key: str, defaults: _Defaults, window: int | None) -> TransformerConfig:
    """The shape that a part's config gives."""
    values = json_object(config.get(key) or {}, key)
    try:
        part = Arguments(values, (), {"hidden_act": ("silu",), "vocab_size": (VOCABULARY_SIZE,)})
        width, heads = part.integer("hidden_size", defaults.width), part.integer("num_attention_heads", defaults.heads)
        kv_heads = part.integer("num_key_value_heads", heads)
        unrounded = int(2 * (4 * width) / 3)
        ffn_width = part.integer("intermediate_size", defaults.ffn_width or unrounded)
        multiplier, multiple_of = ffn_rule(unrounded, ffn_width)
        rope_theta, rope_scaling = read_rope(values, defaults.rope_theta)
        return TransformerConfig(
            width=width,
            layers=part.integer("num_hidden_layers", defaults.layers),
            heads=heads,
            kv_heads=None if kv_heads == heads else kv_heads,
            ffn_multiplier=multiplier,
            ffn_multiple_of=multiple_of,
            window=window,
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            norm_eps=part.number("rms_norm_eps", 1e-5),
        )
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error


def ffn_rule(unrounded: int, ffn_width: int) -> tuple[float | None, int]:
    """A multiplier and a multiple that give this feed-forward width; plain rounding up where that does it."""
    if -(-unrounded // 256) * 256 == ffn_width:
        return None, 256
    if ffn_width >= unrounded:
        return None, ffn_width
    return (ffn_width + 0.5) / unrounded, 1
