"""transformers' directories: exact round trips, and its logits and patches equal to ours on exported weights."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from blt.checkpoint import LanguageModel, fingerprint
from blt.entropy_model import document_entropies
from blt.errors import CheckpointError, ConfigError
from blt.interop import from_transformers, to_transformers
from blt.layers import RopeScaling
from blt.model import BLT
from blt.patching import PatchRule, document_patch_starts, patch_lengths
from blt.vocabulary import BOS, encode

SCALING = RopeScaling(factor=8.0, original_max_position_embeddings=16)  # far less than the text is long

Build = Callable[..., LanguageModel]
TEXT = b"We hold these truths to be self-evident, that all men are created equal, \xc3\xa9 1776."
IDS = torch.cat((torch.tensor([BOS]), encode(TEXT)))[None]


def loaded_by_transformers(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def variants(lm: LanguageModel) -> dict[str, LanguageModel]:
    """Language models of other shapes that transformers computes."""
    config, cross = lm.config, lm.config.cross_attention
    gqa = replace(config.latent, heads=4, kv_heads=2, norm_eps=1e-6)
    others = {
        "plain": config,
        "four slots": replace(config, cross_attention=replace(cross, slots=4, encoder_layers="all")),
        "first decoder layer": replace(config, cross_attention=replace(cross, decoder_layers="first")),
        "one slot, grouped latent": replace(config, cross_attention=replace(cross, slots=1), latent=gqa),
        "last of two encoder layers": replace(config, local_encoder=replace(config.local_encoder, layers=2)),
        "no window, own angles": replace(
            config,
            local_encoder=replace(config.local_encoder, window=None, rope_theta=777.0),
            local_decoder=replace(config.local_decoder, window=None, ffn_multiplier=0.5),
        ),
        "scaled angles": replace(
            config,
            local_encoder=replace(config.local_encoder, rope_scaling=SCALING),
            latent=replace(config.latent, rope_scaling=replace(SCALING, factor=2.5, low_freq_factor=0.5)),
        ),
    }
    torch.manual_seed(2)
    return {name: replace(lm, config=shape, model=BLT(shape)) for name, shape in others.items()}


NAMES = ("plain", "four slots", "first decoder layer", "one slot, grouped latent")
NAMES += ("last of two encoder layers", "no window, own angles", "scaled angles")


@pytest.mark.parametrize("name", NAMES)
def test_exported_weights_give_our_logits_and_come_back(language_model: Build, tmp_path: Path, name: str) -> None:
    lm = variants(language_model())[name]
    to_transformers(lm, tmp_path)
    theirs = loaded_by_transformers(tmp_path)
    assert theirs.config.use_cache is False
    lengths = patch_lengths(IDS, None, PatchRule(kind="space"), include_next=True)
    with torch.no_grad():
        logits = theirs(IDS, patch_lengths=lengths).logits
        assert torch.allclose(lm.model(IDS, lengths), logits, rtol=0, atol=3e-5)
    back = from_transformers(tmp_path)
    assert lm.entropy_model is not None
    assert back.entropy_model is not None
    assert (back.config, back.patch_rule, back.provenance) == (lm.config, lm.patch_rule, lm.provenance)
    assert fingerprint(back.model) == fingerprint(lm.model)
    assert fingerprint(back.entropy_model) == fingerprint(lm.entropy_model) == back.entropy_fingerprint


def test_its_own_patcher_finds_our_patches(language_model: Build, tmp_path: Path) -> None:
    lm = language_model()
    assert lm.entropy_model is not None
    (entropies,) = document_entropies(lm.entropy_model, [TEXT])
    ordered = entropies.sort().values
    widest = 20 + int((ordered[21:-20] - ordered[20:-21]).argmax())
    # In the middle of a gap, so that no rounding decides a patch.
    rule = PatchRule(threshold=float(ordered[widest : widest + 2].mean()))
    to_transformers(replace(lm, patch_rule=rule), tmp_path)
    lengths = patch_lengths(IDS, entropies[None], rule, include_next=True)
    with torch.no_grad():
        assert torch.allclose(lm.model(IDS, lengths), loaded_by_transformers(tmp_path)(IDS).logits, rtol=0, atol=3e-5)


def test_byte_patches_need_no_patcher(language_model: Build, tmp_path: Path) -> None:
    lm = replace(language_model(PatchRule(kind="byte")), entropy_model=None)
    to_transformers(lm, tmp_path)
    lengths = torch.ones(1, IDS.shape[1] + 1, dtype=torch.int64)
    with torch.no_grad():
        assert torch.allclose(lm.model(IDS, lengths), loaded_by_transformers(tmp_path)(IDS).logits, rtol=0, atol=3e-5)
    assert from_transformers(tmp_path).entropy_model is None


def test_a_directory_that_transformers_saved(tmp_path: Path) -> None:
    from transformers import BltConfig, BltForCausalLM

    part = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 48}
    config = BltConfig(
        encoder_config=part | {"hidden_size_global": 64},
        decoder_config=part | {"hidden_size_global": 64},
        global_config=part | {"hidden_size": 64, "intermediate_size": 200},
        patcher_config=part | {"sliding_window": 16},
        encoder_hash_byte_group_size=[3],
        encoder_hash_byte_group_vocab=31,
        local_attention_window_len=8,
        patching_threshold=5.0,
    )
    torch.manual_seed(0)
    theirs = BltForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path / "one")
    theirs.save_pretrained(tmp_path / "many", max_shard_size="40KB")
    lm = from_transformers(tmp_path / "one")
    assert fingerprint(from_transformers(tmp_path / "many").model) == fingerprint(lm.model)
    assert (lm.patch_rule.threshold, lm.reset_on_newline, lm.config.local_encoder.window) == (5.0, False, 8)
    assert (lm.config.latent.rope_theta, lm.config.latent.ffn_width, lm.config.local_decoder.ffn_width) == (
        5e5,
        200,
        48,
    )
    assert lm.entropy_model is not None
    lengths = patch_lengths(IDS, None, PatchRule(kind="space"), include_next=True)
    with torch.no_grad():
        ours, logits = lm.model(IDS, lengths), theirs(IDS, patch_lengths=lengths, use_cache=False).logits
        assert torch.allclose(ours, logits, rtol=0, atol=3e-5)
        entropies, _, _ = theirs.model.patcher(IDS)
    assert torch.allclose(document_entropies(lm.entropy_model, [TEXT])[0], entropies[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_rule": PatchRule(monotonic=True)}, "patch_rule must be kind byte"),
        ({"patch_rule": PatchRule(kind="space")}, "patch_rule must be kind byte"),
        ({"reset_on_newline": True}, "reset_on_newline must be false"),
        ({"entropy_model": None}, "entropy model must be there"),
    ],
)
def test_patching_it_cannot_follow_needs_leave(
    language_model: Build, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    lm = replace(language_model(), **change)
    with pytest.raises(ConfigError, match=message):
        to_transformers(lm, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    to_transformers(lm, tmp_path, lossy_patching=True)
    back = from_transformers(tmp_path)
    assert (back.patch_rule, back.reset_on_newline) == (lm.patch_rule, lm.reset_on_newline)


@pytest.mark.parametrize(("threshold", "written"), [(5.21875, 5.21875), (5.21, 5.1875), (-0.01, -0.03125)])
def test_a_quantized_threshold_is_written_as_the_step_that_decides(
    language_model: Build, tmp_path: Path, threshold: float, written: float
) -> None:
    rule = PatchRule(threshold=threshold, quantized=True)
    lm = replace(language_model(), patch_rule=rule)
    to_transformers(lm, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["patching_threshold"] == written
    assert from_transformers(tmp_path).patch_rule == rule
    assert lm.entropy_model is not None
    (entropies,) = document_entropies(lm.entropy_model, [TEXT])
    plain = PatchRule(threshold=written)
    assert torch.equal(document_patch_starts(TEXT, entropies, plain), document_patch_starts(TEXT, entropies, rule))


def test_models_it_does_not_compute_are_refused(language_model: Build, tmp_path: Path) -> None:
    lm = language_model()
    config, cross = lm.config, lm.config.cross_attention
    for changed, message in (
        (replace(config, cross_attention=replace(cross, heads=4)), "cross_attention.heads"),
        (replace(config, cross_attention=replace(cross, pooling="mean")), "pooling"),
        (replace(config, cross_attention=replace(cross, decoder_layers="none")), "decoder_layers"),
        (replace(config, hash_embedding=replace(config.hash_embedding, group_sizes=())), "group_sizes"),
        (replace(config, local_decoder=replace(config.local_decoder, window=8)), "window"),
        (
            replace(
                config,
                local_encoder=replace(config.local_encoder, layers=2),
                cross_attention=replace(cross, encoder_layers="all"),
            ),
            "encoder_layers",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            to_transformers(replace(lm, config=changed, model=BLT(changed)), tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type must be 'blt'"),
        ({"vocab_size": 300}, "vocab_size must be 260"),
        ({"patching_threshold": 1.0}, "says otherwise"),
        ({"cross_attn_k": 4}, "says otherwise"),
        ({"blt_ray": None, "patching_mode": "static"}, "patching_mode must be"),
        ({"blt_ray": None, "cross_attn_k": "2"}, "cross_attn_k must be a whole number"),
    ],
)
def test_configurations_that_are_refused(
    language_model: Build, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    to_transformers(language_model(), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=message) as caught:
        from_transformers(tmp_path)
    assert str(path) in str(caught.value)


def test_parts_that_are_refused(language_model: Build, tmp_path: Path) -> None:
    to_transformers(language_model(), tmp_path)
    path = tmp_path / "config.json"
    original = json.loads(path.read_text()) | {"blt_ray": None}
    for part, change, message in (
        ("global_config", {"hidden_act": "gelu"}, "global_config: argument hidden_act must be 'silu'"),
        ("global_config", {"rope_parameters": {"rope_type": "yarn"}}, "rope_type must be 'default' or 'llama3'"),
        ("decoder_config", {"num_key_value_heads": 1}, "num_key_value_heads"),
        ("patcher_config", {"sliding_window": None}, "sliding_window"),
    ):
        path.write_text(json.dumps(original | {part: original[part] | change}))
        with pytest.raises(CheckpointError, match=message):
            from_transformers(tmp_path)


def test_tensors_that_do_not_fit_and_files_that_are_missing(language_model: Build, tmp_path: Path) -> None:
    to_transformers(language_model(), tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors["model.patcher.surplus"] = torch.zeros(1)
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: .*unexpected: model\.patcher\.surplus"):
        from_transformers(tmp_path)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: no such file"):
        from_transformers(tmp_path)
    with pytest.raises(CheckpointError, match=r"config\.json: no such file"):
        from_transformers(tmp_path / "nowhere")


def test_an_index_may_not_leave_its_directory(language_model: Build, tmp_path: Path) -> None:
    to_transformers(language_model(), tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "other.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../x.safetensors"}}))
    with pytest.raises(CheckpointError, match="files of the same directory"):
        from_transformers(tmp_path)


def test_transformers_is_never_imported() -> None:
    code = "import sys, blt, blt.interop; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
