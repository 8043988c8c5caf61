"""`blt import`: weights come through the files unchanged, the output is whole or absent, and training goes on."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from blt import checkpoint
from blt.checkpoint import LanguageModel, fingerprint, load, load_entropy_model
from blt.errors import CheckpointError
from blt.interop import to_reference, to_transformers
from blt.patching import PatchRule
from blt.step import tally_batch
from jobs.command_line import main
from pipelines.train.config import TrainConfig
from pipelines.train.feed import Feed, FeedConfig
from pipelines.train.index import build_index
from tests.blt.interop.test_reference_directory import ENTROPY_STATE, STATE, entropy_directory, with_safetensors
from tests.pipelines.patch.corpus import prose, write_documents
from tests.pipelines.patch.in_process import use_in_process_pool
from tests.pipelines.train.tiny_run import told_steps
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


def reference_source(root: Path) -> Path:
    with_safetensors(root)
    return root


def transformers_source(root: Path) -> Path:
    to_transformers(small_language_model(PatchRule(threshold=5.0)), root)
    return root


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_imported_models_are_trained_further(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a user would: import, patch with the imported entropy model and rule, train on from the imported weights."""
    use_in_process_pool(monkeypatch)
    shards = {
        "train/shard-00000.parquet": [prose(1, 4000), prose(2, 3000)],
        "valid/shard-00000.parquet": [prose(3, 300)],
    }
    documents = write_documents(tmp_path / "documents", shards)
    sizes = ["steps=3", "global_batch=4", "micro_batch=2", "sequence_bytes=512", "sequence_patches=48", "log_every=1"]
    for source in (reference_source(tmp_path / "reference"), transformers_source(tmp_path / "transformers")):
        ours, patches, run = (tmp_path / f"{name} of {source.name}" for name in ("model", "patches", "run"))
        assert main(["import", "--from", source.name, str(source), str(ours)]) == 0
        lm = load(ours)
        rule = [f"rule.threshold={lm.patch_rule.threshold}", f"rule.monotonic={str(lm.patch_rule.monotonic).lower()}"]
        patch = ["patch", f"documents={documents}", f"entropy_model={ours}/entropy_model"]
        assert main([*patch, f"output={patches}", *rule]) == 0
        train = ["train", "--init-from", str(ours), f"data={patches}", f"output={run}", *sizes]
        train += [f"entropy_model={ours}/entropy_model", "cpus_per_worker=0.5", "optimizer.warmup_steps=1"]
        assert main(train) == 0
        result = last_line(capsys)
        first = told_steps(run)[0]
        assert (first.step, result["steps"]) == (1, 3)
        assert first.loss == pytest.approx(first_loss(lm, str(patches)), rel=1e-5)
        trained = load(run / "model")
        assert (trained.config, trained.entropy_fingerprint) == (lm.config, lm.entropy_fingerprint)
        assert trained.patch_rule == replace(lm.patch_rule, max_patch_length=512)
        assert trained.provenance["init_from"] == f"{ours.name} ({fingerprint(lm.model)})"
        before, after = lm.model.state_dict(), trained.model.state_dict()
        assert not any(torch.equal(before[name], after[name]) for name in before if name.endswith("weight"))
        assert result["bpb"] == pytest.approx(float(trained.provenance["valid_bpb"]))


@torch.no_grad()
def first_loss(lm: LanguageModel, patches: str) -> float:
    """Nats per target of the first global batch, by the imported model itself."""
    config = TrainConfig(steps=3, global_batch=4, micro_batch=2, sequence_bytes=512, sequence_patches=48)
    index = build_index(patches, "train", config.sequence_patches, config.sequence_bytes)
    nats, targets = 0.0, 0.0
    with Feed(patches, index, FeedConfig.of(config), config.steps) as feed:
        for batch in feed.step(0, 0, 1).batches:
            found = tally_batch(lm.model, batch.to(torch.device("cpu")), None)
            nats, targets = nats + float(found[0]), targets + float(found[1])
    return nats / targets
