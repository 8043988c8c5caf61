"""The reference's directories: every layout gives the same weights, nothing runs, and what does not fit is named."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from blt.checkpoint import LanguageModel
from blt.entropy_model import EntropyModel
from blt.errors import CheckpointError, ConfigError
from blt.interop import from_reference_directory, to_reference
from blt.patching import PatchRule
from tests.blt.interop.test_reference import (
    BLT_ARGUMENTS,
    ENTROPY_ARGUMENTS,
    blt_shapes,
    entropy_shapes,
    random_state,
)

STATE, ENTROPY_STATE = random_state(blt_shapes()), random_state(entropy_shapes())
PATCHER = {"patching_mode": "entropy", "threshold": 1.5, "threshold_add": None, "monotonicity": True}


def write(directory: Path, arguments: dict[str, Any], name: str = "params.json") -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / name).write_text(json.dumps(arguments))
    return directory


def entropy_directory(directory: Path) -> Path:
    write(directory, {"entropy_model": ENTROPY_ARGUMENTS, "data": {"patcher_args": {"patching_mode": "byte"}}})
    torch.save({"model": ENTROPY_STATE}, directory / "consolidated.pth")
    return directory


def with_safetensors(root: Path) -> None:
    """The layout of the Hub: config.json with `args`, model.safetensors, the entropy model in its directory."""
    write(root, {"args": BLT_ARGUMENTS | {"patching_threshold": 1.5, "monotonicity": True}}, "config.json")
    save_file(STATE, root / "model.safetensors")
    entropy_directory(root / "entropy_model")


def with_shards(root: Path) -> None:
    write(root, {"model": BLT_ARGUMENTS, "data": {"patcher_args": PATCHER}})
    names = sorted(STATE)
    weight_map = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({name: STATE[name] for name in names if weight_map[name] == file}, root / file)
    (root / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    entropy_directory(root / "entropy_model")


def with_torch_file(root: Path) -> None:
    write(root, {"model": BLT_ARGUMENTS, "data": {"patcher_args": PATCHER}})
    wrapped = {name.replace("layers.0.", "layers.0._checkpoint_wrapped_module."): t for name, t in STATE.items()}
    torch.save({"model": wrapped, "optim": {"step": 3}}, root / "consolidated.00.pth")
    entropy_directory(root / "entropy_model")


def with_prefixes_in_one_old_file(root: Path) -> None:
    arguments = {"model": BLT_ARGUMENTS, "entropy_model": ENTROPY_ARGUMENTS, "data": {"patcher_args": PATCHER}}
    write(root, arguments)
    state = {f"model.{name}": tensor for name, tensor in STATE.items()}
    state |= {f"entropy_model.{name}": tensor for name, tensor in ENTROPY_STATE.items()}
    torch.save(state, root / "consolidated.pth", _use_new_zipfile_serialization=False)


LAYOUTS: dict[str, Callable[[Path], None]] = {
    "safetensors": with_safetensors,
    "shards": with_shards,
    "torch file": with_torch_file,
    "prefixes in one old file": with_prefixes_in_one_old_file,
}


def assert_same(model: Any, state: dict[str, Tensor]) -> None:
    back = to_reference(model)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_model(tmp_path: Path, layout: str) -> None:
    LAYOUTS[layout](tmp_path)
    lm = from_reference_directory(tmp_path)
    assert isinstance(lm, LanguageModel)
    assert_same(lm.model, STATE)
    assert_same(lm.entropy_model, ENTROPY_STATE)
    assert lm.patch_rule == PatchRule(threshold=1.5, monotonic=True)


def test_an_entropy_model_alone_and_elsewhere(tmp_path: Path) -> None:
    apart = entropy_directory(tmp_path / "apart")
    alone = from_reference_directory(apart, dtype=torch.bfloat16)
    assert isinstance(alone, EntropyModel)
    assert alone.output.weight.dtype == torch.bfloat16
    write(tmp_path, {"model": BLT_ARGUMENTS})
    torch.save(STATE, tmp_path / "consolidated.pth")
    with pytest.raises(ConfigError, match="entropy_model must name the directory"):
        from_reference_directory(tmp_path)
    lm = from_reference_directory(tmp_path, entropy_model=apart)
    assert isinstance(lm, LanguageModel)
    assert_same(lm.entropy_model, ENTROPY_STATE)
    assert lm.patch_rule == PatchRule()
    space = from_reference_directory(tmp_path, patch_rule=PatchRule(kind="space"))
    assert isinstance(space, LanguageModel)
    assert space.entropy_model is None


def test_what_does_not_fit_is_named_and_may_be_passed_over(tmp_path: Path) -> None:
    with_safetensors(tmp_path)
    arguments = {"args": BLT_ARGUMENTS | {"n_experts": 8}}
    write(tmp_path, arguments, "config.json")
    state = STATE | {"surplus": torch.ones(1), "local_decoder.norm.weight": torch.ones(31)}
    del state["local_encoder.layers.0.attention.wq.weight"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"config\.json: unknown arguments n_experts=8 \(`ignore` passes over"):
        from_reference_directory(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        from_reference_directory(tmp_path, ignore=["n_experts"])
    for part in (
        f"{tmp_path / 'model.safetensors'}: ",
        "1 missing: local_encoder.layers.0.attention.wq.weight",
        "1 unexpected: surplus",
        "local_decoder.norm.weight is [31] instead of [32]",
    ):
        assert part in str(caught.value)
    save_file(STATE | {"surplus": torch.ones(1)}, tmp_path / "model.safetensors")
    lm = from_reference_directory(tmp_path, ignore=["n_experts", "surplus"])
    assert isinstance(lm, LanguageModel)
    assert_same(lm.model, STATE)


def test_a_second_entropy_model_is_not_passed_over(tmp_path: Path) -> None:
    with_prefixes_in_one_old_file(tmp_path)
    entropy_directory(tmp_path / "entropy_model")
    with pytest.raises(CheckpointError, match=r"unexpected: entropy_model\."):
        from_reference_directory(tmp_path)


class Exploit:
    """Unpickled without restriction, it makes a file."""

    def __init__(self, planted: Path) -> None:
        self.planted = planted

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (str(self.planted),)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_not_run(tmp_path: Path, zipped: bool) -> None:
    with_torch_file(tmp_path)
    planted, path = tmp_path / "planted", tmp_path / "consolidated.00.pth"
    torch.save({"model": STATE, "x": Exploit(planted)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match="nothing else is unpickled") as caught:
        from_reference_directory(tmp_path)
    assert "\n" not in str(caught.value)
    assert "weights_only" not in str(caught.value), "no advice to run the code after all"
    assert not planted.exists()
    torch.load(path, weights_only=False)
    assert planted.exists(), "the exploit works where pickles are trusted"


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no arguments": (lambda root: (root / "params.json").unlink(), r"params\.json: no such file"),
    "arguments that are a list": (lambda root: (root / "params.json").write_text("[]"), "must be an object"),
    "no weights": (lambda root: (root / "consolidated.00.pth").unlink(), "holds no weights; looked for model"),
    "parts": (lambda root: (root / "consolidated.01.pth").touch(), "must be merged"),
    "cut short": (lambda root: os.truncate(root / "consolidated.00.pth", 5000), r"00\.pth: .* or is broken"),
    "empty": (lambda root: os.truncate(root / "consolidated.00.pth", 0), r"00\.pth: .* or is broken"),
    "a bare pickle": (
        lambda root: (root / "consolidated.00.pth").write_bytes(pickle.dumps([1], protocol=2)),
        r"00\.pth: .*(or is broken|instead of tensors)",
    ),
    "no tensors": (lambda root: torch.save({"a": 1}, root / "consolidated.00.pth"), "no ordinary tensor: a"),
    "patching": (
        lambda root: write(root, {"model": BLT_ARGUMENTS, "data": {"patcher_args": {"patching_mode": "bpe"}}}),
        "patching_mode must be",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_directories_are_one_line(tmp_path: Path, name: str) -> None:
    with_torch_file(tmp_path)
    damage, message = BROKEN[name]
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message) as caught:
        from_reference_directory(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ([], "weight_map must be an object"),
        ({"norm.weight": "model-0.safetensors"}, "does not say that model-0.safetensors holds"),
        ({"norm.weight": "absent.safetensors"}, r"absent\.safetensors: no such file"),
    ],
)
def test_an_index_that_lies(tmp_path: Path, weight_map: object, message: str) -> None:
    with_shards(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=message):
        from_reference_directory(tmp_path)
