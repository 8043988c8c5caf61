"""`blt import`: weights come through the files unchanged, the output is whole or absent, and training goes on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from blt import checkpoint
from blt.checkpoint import fingerprint, load, load_entropy_model
from blt.errors import CheckpointError
from blt.interop import to_reference, to_transformers
from blt.optim import OptimizerConfig, build_optimizer, set_lr
from blt.parallel import FlatGradients
from blt.step import Batch, train_step
from jobs.command_line import main
from tests.blt.interop.test_reference_directory import ENTROPY_STATE, STATE, entropy_directory, with_safetensors
from tests.small_language_model import small_language_model


def last_line(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return result


def test_reference_to_ours_and_back_is_exact(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, output = tmp_path / "blt-tiny", tmp_path / "new/ours"
    with_safetensors(source)
    assert main(["import", "--from", "reference", str(source), str(output)]) == 0
    result = last_line(capsys)
    assert (result["kind"], result["parameters"]) == ("blt", sum(t.numel() for t in STATE.values()))
    lm = load(output)
    for model, state in ((lm.model, STATE), (lm.entropy_model, ENTROPY_STATE)):
        assert model is not None
        back = to_reference(model)
        assert back.keys() == state.keys()
        assert all(torch.equal(back[name], state[name]) for name in state)
    assert lm.patch_rule.monotonic
    assert lm.provenance == {"imported_from": "reference", "source": "blt-tiny"}
    assert main(["import", "--from", "reference", str(source), str(output)]) == 2
    assert "exists; choose another directory" in last_line(capsys)["error"]


def test_an_entropy_model_in_bfloat16(tmp_path: Path) -> None:
    source = entropy_directory(tmp_path / "entropy")
    output = str(tmp_path / "ours")
    assert main(["import", f"source={source}", f"output={output}", "source_format=reference", "dtype=bfloat16"]) == 0
    model = load_entropy_model(output, dtype=torch.bfloat16)
    expected = ENTROPY_STATE["norm.weight"].bfloat16()
    assert torch.equal(model.norm.weight, expected)


def test_what_fails_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "source"
    with_safetensors(source)
    save_file(STATE | {"surplus": torch.ones(1)}, source / "model.safetensors")
    assert main(["import", "--from", "reference", str(source), str(tmp_path / "ours")]) == 1
    assert "unexpected: surplus" in last_line(capsys)["error"]
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    options = ["--from", "transformers", "--entropy-model", "x"]
    assert main(["import", *options, str(source), str(tmp_path / "ours")]) == 2


def test_half_an_import_does_not_load_and_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, output = tmp_path / "source", tmp_path / "ours"
    with_safetensors(source)
    write = checkpoint.replace_file

    def stopped(path: Path, content: Callable[[Path], object]) -> None:
        if path.name == "config.json" and path.parent.name != "entropy_model":
            assert (path.parent / "model.safetensors").exists(), "the last file is still to come"
            with pytest.raises(CheckpointError):
                load(path.parent)
            assert not output.exists()
            raise KeyboardInterrupt
        write(path, content)

    monkeypatch.setattr(checkpoint, "replace_file", stopped)
    assert main(["import", "--from", "reference", str(source), str(output)]) == 130
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_transformers_to_ours(tmp_path: Path) -> None:
    lm = small_language_model()
    to_transformers(lm, tmp_path / "theirs")
    assert main(["import", "--from", "transformers", str(tmp_path / "theirs"), str(tmp_path / "ours")]) == 0
    back = load(tmp_path / "ours")
    assert lm.entropy_model is not None
    assert back.entropy_model is not None
    assert (back.config, back.patch_rule) == (lm.config, lm.patch_rule)
    assert fingerprint(back.model) == fingerprint(lm.model)
    assert fingerprint(back.entropy_model) == fingerprint(lm.entropy_model)


def test_an_imported_model_is_trained_further(tmp_path: Path) -> None:
    with_safetensors(tmp_path / "source")
    assert main(["import", "--from", "reference", str(tmp_path / "source"), str(tmp_path / "ours")]) == 0
    model = load(tmp_path / "ours").model.train()
    config = OptimizerConfig(lr=1e-3)
    optimizer = build_optimizer(model, config)
    set_lr(optimizer, config.lr)
    ids = torch.tensor([[1, 50, 60, 70, 80, 90, 50, 60]])
    batch = Batch(
        byte_ids_BT=ids,
        targets_BT=torch.tensor([[50, 60, 70, 80, 90, 50, 60, 2]]),
        document_ids_BT=torch.zeros_like(ids),
        patch_lengths_BP=torch.tensor([[1, 3, 2, 3]]),
    )
    gradients = FlatGradients(model.parameters())
    losses = [train_step(model, optimizer, gradients, [batch], clip_norm=1.0).tally.nats for _ in range(5)]
    assert losses[-1] < losses[0]
    changed = to_reference(model)
    assert not any(torch.equal(changed[name], STATE[name]) for name in STATE if "layers.0" in name)
