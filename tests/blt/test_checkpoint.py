"""Checkpoints: what is saved is what is loaded, and every kind of damage is one line that names the file."""

import json
import os
import pickle
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from blt.checkpoint import (
    LanguageModel,
    entropy_model_fingerprint,
    fingerprint,
    load,
    load_entropy_model,
    model_kind,
    save_entropy_model,
    save_language_model,
    weights_fingerprint,
)
from blt.config_json import canonical_text, from_json, to_json
from blt.entropy_model import EntropyModel, EntropyModelConfig
from blt.errors import CheckpointError
from blt.layers import RopeScaling
from blt.model import BLT
from blt.patching import PatchRule
from tests.model_cases import blt_config, transformer_config

Build = Callable[..., LanguageModel]


@pytest.fixture
def saved(language_model: Build, tmp_path: Path) -> Path:
    save_language_model(language_model(), tmp_path)
    return tmp_path


def test_load_gives_back_what_was_saved(language_model: Build, tmp_path: Path) -> None:
    lm = language_model(PatchRule(threshold=1.5, threshold_add=0.25, max_patch_length=9), reset_on_newline=True)
    save_language_model(lm, tmp_path / "new" / "directory")
    loaded = load(tmp_path / "new" / "directory")
    assert loaded.entropy_model is not None
    assert fingerprint(loaded.model) == fingerprint(lm.model)
    assert (loaded.config, loaded.patch_rule, loaded.reset_on_newline, loaded.provenance) == (
        lm.config,
        lm.patch_rule,
        True,
        lm.provenance,
    )
    assert loaded.entropy_fingerprint == fingerprint(loaded.entropy_model)
    assert all(p.requires_grad and p.is_leaf for p in loaded.model.parameters())
    assert sorted(str(p.relative_to(tmp_path / "new" / "directory")) for p in tmp_path.rglob("*") if p.is_file()) == [
        "config.json",
        "entropy_model/config.json",
        "entropy_model/model.safetensors",
        "model.safetensors",
    ]


def test_the_kind_of_a_directory_is_told_without_its_weights(saved: Path) -> None:
    assert (model_kind(saved), model_kind(saved / "entropy_model")) == ("blt", "entropy_model")
    config = saved / "config.json"
    for text in ('{"kind": "bltx"}', "{}", "[]", "{"):
        config.write_text(text)
        with pytest.raises(CheckpointError, match=re.escape(str(config))):
            model_kind(saved)
    with pytest.raises(CheckpointError, match="no such file"):
        model_kind(saved / "nowhere")


def test_files_are_for_whom_the_umask_lets_read_them(language_model: Build, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        save_language_model(language_model(), tmp_path / "model")
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "model").rglob("*") if path.is_file()]
    assert {path.name: path.stat().st_mode & 0o777 for path in files} == {
        "config.json": 0o640,
        "model.safetensors": 0o640,
    }
    assert len(files) == 4


def test_a_second_save_replaces_the_first(saved: Path, language_model: Build) -> None:
    lm = language_model()
    with torch.no_grad():
        lm.model.local_decoder.output.weight.add_(1)
    save_language_model(lm, saved)
    assert fingerprint(load(saved).model) == fingerprint(lm.model)


def test_save_is_the_same_bytes_every_time(
    language_model: Build, saved: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    again = tmp_path_factory.mktemp("again")
    save_language_model(load(saved), again)
    for name in ("config.json", "model.safetensors", "entropy_model/config.json", "entropy_model/model.safetensors"):
        assert (saved / name).read_bytes() == (again / name).read_bytes()


def test_fingerprint_sees_configuration_values_dtype_but_not_the_object(small_entropy_model: EntropyModel) -> None:
    first = fingerprint(small_entropy_model)
    twin = EntropyModel(small_entropy_model.config)
    twin.load_state_dict(small_entropy_model.state_dict())
    assert fingerprint(twin) == first
    twin.config = replace(twin.config, transformer=replace(twin.config.transformer, rope_theta=1e4 + 1))
    assert fingerprint(twin) != first
    assert fingerprint(small_entropy_model.bfloat16()) != first
    small_entropy_model.float()
    with torch.no_grad():
        small_entropy_model.norm.weight[0] += 1e-6
    assert fingerprint(small_entropy_model) != first


def test_fingerprints_of_models_without_scaled_angles_are_those_of_before_there_were_any(
    small_entropy_model: EntropyModel,
) -> None:
    """As computed before `rope_scaling` was a key: datasets, checkpoints and runs are found by them."""
    shape = EntropyModelConfig(transformer=transformer_config())
    assert weights_fingerprint(blt_config(), ()).startswith("3e3e1f8e8af3bc5c20e7ff03e01ff320")
    assert weights_fingerprint(shape, ()).startswith("802a3e2cc0f502fa5066398cb5a9306b")
    first, twin = fingerprint(small_entropy_model), EntropyModel(small_entropy_model.config)
    twin.load_state_dict(small_entropy_model.state_dict())
    scaled = replace(twin.config.transformer, rope_scaling=RopeScaling(factor=8))
    twin.config = replace(twin.config, transformer=scaled)
    assert fingerprint(twin) != first


def test_scaled_angles_are_kept_and_left_out_where_there_are_none(language_model: Build, tmp_path: Path) -> None:
    lm = language_model()
    save_language_model(lm, tmp_path)
    assert "rope_scaling" not in (tmp_path / "config.json").read_text()
    shape = replace(lm.config, latent=replace(lm.config.latent, rope_scaling=RopeScaling(factor=8, low_freq_factor=2)))
    save_language_model(replace(lm, config=shape, model=BLT(shape)), tmp_path)
    assert load(tmp_path).config == shape


def test_loading_initialises_nothing(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_rng_state()
    load(saved)
    assert torch.equal(torch.get_rng_state(), before)


def test_dtype_is_cast_and_the_stored_fingerprint_kept(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    loaded = load(saved, dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}
    assert loaded.entropy_fingerprint == entropy_model_fingerprint(saved / "entropy_model")
    with pytest.raises(CheckpointError, match="load it in the dtype it was stored in"):
        save_language_model(loaded, tmp_path_factory.mktemp("cast"))


def test_entropy_model_may_be_left_out_but_its_fingerprint_stays(language_model: Build, tmp_path: Path) -> None:
    lm = language_model()
    assert lm.entropy_model is not None
    expected = fingerprint(lm.entropy_model)
    save_language_model(replace(lm, entropy_model=None, entropy_fingerprint=expected), tmp_path)
    loaded = load(tmp_path)
    assert loaded.entropy_model is None
    assert loaded.entropy_fingerprint == expected
    assert not (tmp_path / "entropy_model").exists()


def test_entropy_model_alone_round_trip(small_entropy_model: EntropyModel, tmp_path: Path) -> None:
    save_entropy_model(small_entropy_model, tmp_path, {"bpb": "2.5"})
    assert fingerprint(load_entropy_model(tmp_path)) == fingerprint(small_entropy_model)
    assert entropy_model_fingerprint(tmp_path) == fingerprint(small_entropy_model)


def edit(path: Path, change: Callable[[dict], object]) -> None:  # type: ignore[type-arg]
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


CONFIG_DAMAGE: dict[str, tuple[Callable[[dict], object], str]] = {  # type: ignore[type-arg]
    "format": (lambda v: v.update(format=2), "format must be 1, got 2"),
    "kind": (lambda v: v.update(kind="entropy_model"), "kind must be 'blt'"),
    "unknown": (lambda v: v.update(colour=1), "unknown key colour"),
    "missing": (lambda v: v.pop("patch_rule"), "patch_rule is missing"),
    "nested unknown": (lambda v: v["model"]["latent"].update(depth=1), "unknown key model.latent.depth"),
    "nested missing": (lambda v: v["model"]["latent"].pop("width"), "model.latent.width is missing"),
    "text for number": (
        lambda v: v["model"]["latent"].update(width="64"),
        "model.latent.width must be int, got str '64'",
    ),
    "bool for number": (lambda v: v["model"]["latent"].update(layers=True), "model.latent.layers must be int"),
    "float for int": (lambda v: v["model"]["latent"].update(heads=2.0), "model.latent.heads must be int"),
    "no choice": (
        lambda v: v["model"]["cross_attention"].update(pooling="sum"),
        "pooling must be one of max, mean, min",
    ),
    "list of texts": (
        lambda v: v["model"]["hash_embedding"].update(group_sizes=["3"]),
        r"group_sizes\[0\] must be int",
    ),
    "null object": (lambda v: v.update(model=None), "model must be an object"),
    "refused value": (lambda v: v["model"]["latent"].update(heads=7), "width 64 must be a multiple"),
    "rule": (lambda v: v["patch_rule"].update(max_patch_length=0), "max_patch_length"),
    "reset": (lambda v: v.update(reset_on_newline=1), "reset_on_newline must be true or false"),
    "provenance": (lambda v: v.update(provenance={"a": 1}), "key a must be text"),
    "other shape": (lambda v: v["model"]["latent"].update(layers=1), "6 unexpected: latent.blocks.1"),
}


@pytest.mark.parametrize("name", CONFIG_DAMAGE)
def test_a_damaged_config_is_refused_by_file_and_key(saved: Path, name: str) -> None:
    change, message = CONFIG_DAMAGE[name]
    edit(saved / "config.json", change)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(saved)
    assert str(saved) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe{", b"[" * 100_000])
def test_a_config_that_is_no_json_object(saved: Path, content: bytes) -> None:
    (saved / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json") as caught:
        load(saved)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "entropy_model/config.json", "entropy_model/model.safetensors"]
)
def test_a_missing_file_is_named(saved: Path, name: str) -> None:
    (saved / name).unlink()
    with pytest.raises(CheckpointError, match="no such file") as caught:
        load(saved)
    assert str(saved / name) in str(caught.value)


@pytest.mark.parametrize("kept", [0, 4, 100, 20_000])
def test_truncated_weights(saved: Path, kept: int) -> None:
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"model\.safetensors") as caught:
        load(saved)
    assert "\n" not in str(caught.value)


def test_a_pickle_is_never_read(saved: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
            return (pytest.fail, ("a pickle was loaded",))

    (saved / "model.safetensors").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(CheckpointError):
        load(saved)


def test_tensors_that_do_not_fit_are_named(saved: Path) -> None:
    path = saved / "model.safetensors"
    tensors = load_file(path)
    tensors["latent.extra"] = tensors.pop("local_decoder.projection.weight")
    tensors["local_decoder.norm.weight"] = torch.ones(31)
    tensors["local_encoder.byte_embedding.weight"] = torch.ones(260, 32, dtype=torch.int32)
    save_file(tensors, path)
    with pytest.raises(CheckpointError) as caught:
        load(saved)
    for part in (
        "1 missing: local_decoder.projection.weight",
        "1 unexpected: latent.extra",
        "local_decoder.norm.weight is [31] instead of [32]",
        "local_encoder.byte_embedding.weight is torch.int32",
    ):
        assert part in str(caught.value)


def test_another_entropy_model_is_refused(saved: Path, small_entropy_model: EntropyModel) -> None:
    with torch.no_grad():
        small_entropy_model.norm.weight[0] += 1e-6
    save_entropy_model(small_entropy_model, saved / "entropy_model")
    with pytest.raises(CheckpointError, match="was made with"):
        load(saved)


def test_changed_entropy_weights_are_refused(saved: Path) -> None:
    path = saved / "entropy_model" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="its tensors have fingerprint"):
        load(saved)


def test_configuration_json_keeps_infinities_and_orders_keys() -> None:
    rule = PatchRule(threshold=float("inf"), threshold_add=1)
    text = canonical_text(rule)
    assert text == canonical_text(PatchRule(threshold_add=1, threshold=float("inf")))
    restored = from_json(PatchRule, json.loads(text), "rule")
    assert restored == rule
    assert type(restored.threshold_add) is float
    assert to_json(rule)["threshold"] == "inf"  # type: ignore[index, call-overload]


def test_checkpoints_older_than_a_key_load_with_its_default(saved: Path) -> None:
    path = saved / "config.json"
    values = json.loads(path.read_text())
    assert values["patch_rule"].pop("quantized") is False
    path.write_text(json.dumps(values))
    assert load(saved).patch_rule.quantized is False
