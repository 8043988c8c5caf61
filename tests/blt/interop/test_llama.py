"""A Llama as what a latent transformer starts from: the same hidden states, and what does not fit is named."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM

from blt.errors import CheckpointError, ConfigError
from blt.interop.llama import interleaved, llama_blocks
from blt.latent_transformer import LatentTransformer
from blt.layers import RopeScaling, TransformerConfig, context, frequencies
from blt.model import BLT
from tests.llama_checkpoint import SHAPE, change_config, write_llama
from tests.model_cases import blt_config

GQA = replace(SHAPE, width=48, layers=3, heads=6, kv_heads=2, rope_theta=500000.0, norm_eps=1e-6)
SCALED = replace(
    GQA, width=192, rope_theta=10000.0, rope_scaling=RopeScaling(factor=8.0, original_max_position_embeddings=64)
)
MODEL = blt_config()


def model_with(shape: TransformerConfig) -> BLT:
    """A BLT with drawn weights."""
    torch.manual_seed(0)
    return BLT(replace(MODEL, latent=shape))


def started(directory: Path, shape: TransformerConfig) -> BLT:
    model = model_with(shape)
    llama_blocks(directory, model.config).place(model.state_dict())
    return model


def hidden_states(llama: LlamaForCausalLM, x_BPG: Tensor) -> tuple[Tensor, Tensor]:
    """What transformers' LlamaModel makes of embeddings, before and after its final norm."""
    found: list[Tensor] = []
    hook = llama.model.layers[-1].register_forward_hook(lambda module, given, out: found.append(out))
    normed = llama.model(inputs_embeds=x_BPG, use_cache=False).last_hidden_state
    hook.remove()
    return found[0], normed


@pytest.mark.parametrize("shape", [SHAPE, GQA, SCALED], ids=["heads", "grouped", "scaled"])
@pytest.mark.parametrize("shard_bytes", [10**9, 20_000], ids=["one file", "index"])
def test_hidden_states_are_those_of_transformers(tmp_path: Path, shape: TransformerConfig, shard_bytes: int) -> None:
    llama = write_llama(tmp_path, shape, shard_bytes=shard_bytes)
    assert (tmp_path / "model.safetensors").exists() == (shard_bytes == 10**9)
    model = started(tmp_path, shape)
    latent = LatentTransformer(shape, shape.width)  # without the projection of slots
    latent.load_state_dict({k: v for k, v in model.latent.state_dict().items() if k.startswith("blocks.")})
    x_BPG = torch.randn(2, 300, shape.width, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = latent(x_BPG, context(shape, torch.zeros(2, 300, dtype=torch.int64)))
        before, normed = hidden_states(llama, x_BPG)
        scale = before.abs().max()
        assert float((ours - before).abs().max() / scale) < 1e-5
        assert float((llama.model.norm(ours) - normed).abs().max()) < 1e-5
        # The test could tell a wrong layout: rows as they are stored give other states.
        latent.blocks[0].attention.wqkv.weight[: shape.width] = llama.model.layers[0].self_attn.q_proj.weight
        assert float((latent(x_BPG, context(shape, torch.zeros(2, 300, dtype=torch.int64))) - before).abs().max()) > 0.1


def test_scaled_angles_decide_the_hidden_states(tmp_path: Path) -> None:
    """Some pairs of SCALED keep their frequency, some get an eighth, some lie between, and the states tell of it."""
    write_llama(tmp_path, SCALED)
    model, plain = started(tmp_path, SCALED), replace(SCALED, rope_scaling=None)
    cpu = torch.device("cpu")
    shares = (frequencies(SCALED, cpu) / frequencies(plain, cpu)).tolist()
    assert {1.0, 0.125} < set(shares)
    assert all(0.125 <= share <= 1 for share in shares)
    x_BPG = torch.randn(1, 300, SCALED.width, generator=torch.Generator().manual_seed(1))
    ids = torch.zeros(1, 300, dtype=torch.int64)
    states = [x_BPG, x_BPG]
    with torch.no_grad():
        for layer, block in enumerate(model.latent.blocks):
            states = [block(x, context(it, ids), layer) for x, it in zip(states, (SCALED, plain), strict=True)]
    assert float((states[0] - states[1]).abs().max()) > 0.1


@pytest.mark.parametrize("keep", [True, False], ids=["with the original length", "as long as it may be"])
def test_older_files_say_scaled_angles_in_other_keys(tmp_path: Path, keep: bool) -> None:
    write_llama(tmp_path, SCALED)
    older: dict[str, Any] = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_type": "llama3"}
    if keep:
        older["original_max_position_embeddings"] = 64
    change_config(
        tmp_path,
        rope_parameters=None,
        rope_scaling=older,
        rope_theta=10000.0,
        max_position_embeddings=512 if keep else 64,
    )
    assert llama_blocks(tmp_path, replace(MODEL, latent=SCALED)).shape == SCALED


def test_the_refusal_of_scaled_angles_says_the_keys_that_would_do(tmp_path: Path) -> None:
    write_llama(tmp_path, SCALED)
    with pytest.raises(ConfigError) as refused:
        llama_blocks(tmp_path, replace(MODEL, latent=replace(SCALED, rope_scaling=None)))
    there = "factor=8.0 low_freq_factor=1.0 high_freq_factor=4.0 original_max_position_embeddings=64"
    assert str(refused.value).endswith(f"rope_scaling is {there} there, latent.rope_scaling is null here")


def test_interleaved_rows() -> None:
    rows = torch.arange(8)[:, None]  # two heads of width 4
    assert interleaved(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_all_other_weights_stay_as_drawn(tmp_path: Path) -> None:
    write_llama(tmp_path)
    drawn, model = model_with(SHAPE).state_dict(), started(tmp_path, SHAPE).state_dict()
    changed = {name for name in drawn if not torch.equal(drawn[name], model[name])}
    assert changed == {name for name in drawn if name.startswith("latent.blocks.")}


def test_what_is_left_out_and_the_layer_map(tmp_path: Path) -> None:
    llama = write_llama(tmp_path, GQA)
    found = llama_blocks(tmp_path, replace(MODEL, latent=GQA))
    assert found.left_out == ("lm_head.weight", "model.embed_tokens.weight", "model.norm.weight")
    assert found.parameters == sum(p.numel() for p in llama.model.layers.parameters())
    kept = found.tensors.keys() | set(found.left_out)
    assert kept == {name for name, _ in llama.named_parameters()}
    rows = {theirs: (ours, shape) for theirs, ours, shape in found.layer_map()}
    assert rows["self_attn.{q,k,v}_proj"] == ("attention.wqkv", (80, 48))
    assert rows["mlp.{gate,up}_proj"] == ("feed_forward.w13", (256, 48))
    assert rows["input_layernorm"] == ("attention_norm", (48,))
    assert len(rows) == 6


def test_a_base_model_and_kept_angles_are_read_too(tmp_path: Path) -> None:
    """LlamaModel saves without the prefix; files of older releases hold the rotary frequencies."""
    llama = write_llama(tmp_path / "whole")
    llama.model.save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    save_file(load_file(file) | {"layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, file)
    whole, base = started(tmp_path / "whole", SHAPE).state_dict(), started(tmp_path / "base", SHAPE).state_dict()
    assert all(torch.equal(whole[name], base[name]) for name in whole)
    left_out = ("embed_tokens.weight", "layers.0.self_attn.rotary_emb.inv_freq", "norm.weight")
    assert llama_blocks(tmp_path / "base", MODEL).left_out == left_out


def test_the_fingerprint_is_of_the_weights_that_are_placed(tmp_path: Path) -> None:
    def fingerprint(name: str, **how: Any) -> str:
        write_llama(tmp_path / name, **how)
        return llama_blocks(tmp_path / name, MODEL).fingerprint

    first = fingerprint("first")
    assert fingerprint("in parts", shard_bytes=5000) == first
    assert fingerprint("other", seed=4) != first
    file = tmp_path / "first" / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"lm_head.weight": torch.zeros(3, 3)}, file)
    assert llama_blocks(tmp_path / "first", MODEL).fingerprint == first
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] += 1
    save_file(tensors, file)
    assert llama_blocks(tmp_path / "first", MODEL).fingerprint != first


def test_half_precision_weights_are_taken_exactly(tmp_path: Path) -> None:
    llama = write_llama(tmp_path).to(torch.bfloat16)
    llama.save_pretrained(tmp_path)
    model = started(tmp_path, SHAPE)
    assert torch.equal(
        model.latent.blocks[1].feed_forward.w2.weight, llama.model.layers[1].mlp.down_proj.weight.float()
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 32}, "hidden_size is 32 there, latent.width is 24 here"),
        ({"num_hidden_layers": 3}, "num_hidden_layers is 3 there, latent.layers is 2 here"),
        ({"num_attention_heads": 4}, "num_attention_heads is 4 there, latent.heads is 2 here"),
        ({"num_key_value_heads": 1}, "num_key_value_heads is 1 there, latent.kv_heads is 2 here"),
        ({"head_dim": 16}, "head_dim is 16 there, latent.width / heads is 12 here"),
        (
            {"intermediate_size": 96},
            r"latent's feed-forward width is 64 here \(ffn_multiplier=null ffn_multiple_of=96 would give 96\)",
        ),
        ({"rms_norm_eps": 1e-6}, "rms_norm_eps is 1e-06 there, latent.norm_eps is 1e-05 here"),
        ({"rope_parameters": None, "rope_theta": 5e5}, "rope_theta is 500000.0 there, latent.rope_theta is 10000.0"),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0}},
            "rope_type is 'yarn' there, and can only be 'default' or 'llama3' here",
        ),
        (
            {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_type is 'linear' there, and can only be 'default' or 'llama3' here",
        ),
        ({"attention_bias": True}, "attention_bias is True there, and can only be False here"),
        ({"mlp_bias": True}, "mlp_bias is True there, and can only be False here"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu' there, and can only be 'silu' here"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5 there, and can only be 1.0 here"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor is 0.5 there, and can only be 1.0 here",
        ),
        (
            {"quantization_config": {"bits": 4}},
            r"quantization_config is \{'bits': 4\} there, and can only be None here",
        ),
        ({"model_type": "qwen2"}, "model_type is 'qwen2' there, only 'llama' is read here"),
    ],
)
def test_another_shape_is_refused_with_both_values(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write_llama(tmp_path, **changes)
    with pytest.raises(ConfigError, match=message) as refused:
        llama_blocks(tmp_path, MODEL)
    assert str(refused.value).startswith(f'{tmp_path}/config.json does not fit the key "model.latent": ')


def test_every_difference_is_named_at_once(tmp_path: Path) -> None:
    write_llama(tmp_path, GQA)
    with pytest.raises(ConfigError) as refused:
        llama_blocks(tmp_path, MODEL)
    told = (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "rms_norm_eps",
        "rope_theta",
    )
    assert all(f"{key} is " in str(refused.value) for key in told)


@pytest.mark.parametrize("multiplier", [None, 0.7, 1.3])
def test_the_hint_on_the_feed_forward_width_gives_it(tmp_path: Path, multiplier: float | None) -> None:
    wanted = replace(SHAPE, ffn_multiplier=multiplier, ffn_multiple_of=10)
    write_llama(tmp_path, wanted)
    shape = replace(SHAPE, ffn_multiple_of=512)
    with pytest.raises(ConfigError) as refused:
        llama_blocks(tmp_path, replace(MODEL, latent=shape))
    hint = str(refused.value).split("(ffn_multiplier=")[1]
    factor, multiple = hint.split(" ffn_multiple_of=")
    found = replace(shape, ffn_multiplier=json.loads(factor), ffn_multiple_of=int(multiple.split()[0]))
    assert found.ffn_width == wanted.ffn_width
    llama_blocks(tmp_path, replace(MODEL, latent=found))


def test_tensors_that_do_not_fit_are_named(tmp_path: Path) -> None:
    write_llama(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(24)
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(65, 24)
    del tensors["model.layers.1.post_attention_layernorm.weight"]
    save_file(tensors, file)
    with pytest.raises(CheckpointError) as refused:
        llama_blocks(tmp_path, MODEL)
    for told in (
        str(file),
        "1 missing: model.layers.1.post_attention_layernorm.weight",
        "1 unexpected: model.layers.0.self_attn.q_proj.bias",
        "model.layers.1.mlp.up_proj.weight is [65, 24] instead of [64, 24]",
    ):
        assert told in str(refused.value)


def test_what_is_missing_or_broken_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"{tmp_path}/config.json: no such file"):
        llama_blocks(tmp_path, MODEL)
    write_llama(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: no such file; weights are read from safetensors"):
        llama_blocks(tmp_path, MODEL)
    (tmp_path / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match="no whole safetensors file"):
        llama_blocks(tmp_path, MODEL)
    for rope, message in (
        ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}, "argument high_freq_factor is missing"),
        ({"rope_type": "llama3", "factor": 0.5, "low_freq_factor": 1, "high_freq_factor": 4}, "factor must be at"),
        ({"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}, "low_freq_factor must lie"),
    ):
        change_config(tmp_path, rope_parameters=rope)
        with pytest.raises(CheckpointError, match=message):
            llama_blocks(tmp_path, MODEL)
    change_config(tmp_path, hidden_size="many")
    with pytest.raises(CheckpointError, match="hidden_size must be a whole number"):
        llama_blocks(tmp_path, MODEL)
