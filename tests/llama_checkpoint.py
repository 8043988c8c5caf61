"""A tiny Llama with random weights as transformers saves it, for tests that start a latent transformer from one."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM

from blt.layers import TransformerConfig
from tests.model_cases import blt_config, randomised

SHAPE = blt_config().latent
"""What `write_llama` writes unless told otherwise: the latent shape of the small BLT of all tests."""


def write_llama(
    directory: Path, shape: TransformerConfig = SHAPE, *, seed: int = 3, shard_bytes: int = 10**9, **changes: Any
) -> LlamaForCausalLM:
    """Save a Llama of this shape, its config.json changed by key; in several files where it exceeds `shard_bytes`."""
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.num_kv_heads,
        intermediate_size=shape.ffn_width,
        rms_norm_eps=shape.norm_eps,
        rope_parameters=rope_parameters(shape),
        attn_implementation="eager",
    )
    llama = randomised(LlamaForCausalLM(config), seed).eval()
    llama.save_pretrained(directory, max_shard_size=shard_bytes)
    change_config(directory, **changes)
    return llama


def rope_parameters(shape: TransformerConfig) -> dict[str, Any]:
    """transformers' keys for the angles of this shape."""
    scaling, theta = shape.rope_scaling, {"rope_theta": shape.rope_theta}
    if scaling is None:
        return {"rope_type": "default", **theta}
    return {"rope_type": "llama3", **theta, **asdict(scaling)}


def change_config(directory: Path, **changes: Any) -> None:
    """Set keys of config.json; those set to None are removed."""
    path = directory / "config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
