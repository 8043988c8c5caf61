"""`model=DIR` in the place of entropy model and rule: patches that the BLT goes on with, and what contradicts it."""

import contextlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from blt.checkpoint import language_model_config, save_language_model
from blt.errors import CheckpointError, ConfigError
from blt.patching import PatchRule
from jobs.command_line import main
from pipelines.manifest import Manifest, read_manifest
from pipelines.model_patching import model_patching, patching_differences
from pipelines.patch import read_calibration
from pipelines.storage import Storage
from tests.pipelines.patch.corpus import prose, write_documents
from tests.pipelines.patch.in_process import use_in_process_pool
from tests.s3_server import S3Server
from tests.small_language_model import save_small_language_model, small_language_model

RISE = PatchRule(threshold=0.4, monotonic=True, max_patch_length=None)
"""Not what a command has by default in any of the three, and without a longest patch, as imported rules are."""


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> str:
    shards = {"train/shard-00000.parquet": [prose(1, 3000), b""], "valid/shard-00000.parquet": [prose(2, 500)]}
    return write_documents(tmp_path_factory.mktemp("own") / "documents", shards)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("model")
    save_language_model(replace(small_language_model(RISE), reset_on_newline=True), directory)
    return str(directory)


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    use_in_process_pool(monkeypatch)
    for job in ("patch", "calibrate"):
        monkeypatch.setattr(f"jobs.{job}.ray_session", lambda: contextlib.nullcontext())


@pytest.fixture
def command(documents: str, tmp_path: Path) -> list[str]:
    return ["patch", f"documents={documents}", f"output={tmp_path / 'patches'}"]


Failure = Callable[..., str]


@pytest.fixture
def failure(capsys: pytest.CaptureFixture[str]) -> Failure:
    def failed(*arguments: str, status: int = 2) -> str:
        assert main(arguments) == status
        return str(json.loads(capsys.readouterr().out.splitlines()[-1])["error"])

    return failed


def patched(command: list[str], *given: str) -> Manifest:
    assert main([*command, *given]) == 0
    return read_manifest(command[2].removeprefix("output="))


def test_the_patches_are_those_that_the_model_goes_on_with(command: list[str], model: str) -> None:
    found = patched(command, "--model", model)
    assert found.patching is not None
    assert (found.patching.rule, found.patching.reset_on_newline) == (replace(RISE, max_patch_length=512), True)
    assert patching_differences(found.patching, language_model_config(model)) == []
    assert main([*command, "--verify", f"model={model}"]) == 0
    assert main([*command, "--dry-run", f"model={model}"]) == 0


def test_the_same_said_key_by_key_is_the_same_output(
    command: list[str], model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    patched(command, f"model={model}")
    capsys.readouterr()
    keys = [
        f"entropy_model={model}/entropy_model",
        "rule.threshold=0.4",
        "rule.monotonic=true",
        "reset_on_newline=true",
    ]
    assert main([*command, *keys]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["status"] == "skipped"


def test_a_rule_without_entropies_needs_no_entropy_model(command: list[str], tmp_path: Path) -> None:
    rule = PatchRule(kind="space", max_patch_length=9)
    found = patched(command, "--model", save_small_language_model(tmp_path / "model", rule))
    assert found.patching is not None
    assert (found.patching.rule, found.patching.entropy_model) == (rule, None)


def test_keys_that_say_otherwise_are_named(command: list[str], model: str, tmp_path: Path, failure: Failure) -> None:
    given = [*command, f"model={model}"]
    advice = f'or leave out "model" and give entropy_model={model}/entropy_model and the rule'
    for key, told in (
        (f"entropy_model={model}/entropy_model", f'key "entropy_model": is that of {model}'),
        ("rule.threshold=0.5", "rule.threshold is 0.5 here, 0.4 for the model"),
        ("rule.max_patch_length=64", "rule.max_patch_length is 64 here, 512 for the model"),
    ):
        error = failure(*given, key)
        assert told in error
        assert advice in error
    error = failure(*given, "store_entropies=true")
    assert 'key "store_entropies": entropies are then rounded before they are compared' in error
    plain = save_small_language_model(tmp_path / "plain")
    error = failure(*command, f"model={plain}", "reset_on_newline=true")
    assert f'key "reset_on_newline": is true here, false for {plain}' in error
    assert "is an entropy model alone" in failure(*command, f"model={model}/entropy_model")
    assert "no such file" in failure(*command, f"model={tmp_path}/none", status=1)


def test_a_model_without_its_entropy_model_or_with_another_is_refused(tmp_path: Path) -> None:
    lm = small_language_model()
    save_language_model(replace(lm, entropy_model=None), tmp_path / "without")
    with pytest.raises(ConfigError, match="was saved without the entropy model that its rule needs"):
        model_patching(str(tmp_path / "without"))
    save_language_model(lm, tmp_path / "other")
    config = tmp_path / "other/entropy_model/config.json"
    config.write_text(config.read_text().replace(str(lm.entropy_fingerprint), "ab" * 32))
    with pytest.raises(
        CheckpointError, match=r"entropy_model: is not the entropy model that .* fingerprint is abababab"
    ):
        model_patching(str(tmp_path / "other"))


def test_another_threshold_for_the_model_comes_from_a_calibration(
    command: list[str], model: str, tmp_path: Path, failure: Failure
) -> None:
    calibrate = ["calibrate", command[1], f"output={tmp_path / 'calibration'}", "target_mean_patch_bytes=3"]
    assert failure(*calibrate).startswith('key "entropy_model" is missing')
    assert 'key "entropy_model": is that of' in failure(*calibrate, f"model={model}", f"entropy_model={model}")
    assert main([*calibrate, "--model", model]) == 0
    calibration = read_calibration(str(tmp_path / "calibration"))
    assert calibration.rule == replace(RISE, max_patch_length=512, threshold=calibration.threshold)
    assert calibration.threshold != RISE.threshold
    found = patched(command, f"model={model}", f"calibration={tmp_path / 'calibration'}")
    assert found.patching is not None
    assert found.patching.rule == calibration.rule


@pytest.mark.s3
def test_of_a_model_on_s3_only_configurations_are_read(s3: S3Server, model: str) -> None:
    there = Storage(s3.url("own/model"))
    for path in ("config.json", "entropy_model/config.json"):
        assert there.write_exclusive(path, Path(model, path).read_bytes())
    found = model_patching(there.root_uri)
    assert found == replace(model_patching(model), entropy_model=there.url("entropy_model"))
