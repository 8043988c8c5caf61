"""`blt patch` and what it does beside patching: status, dry run, limit, verification, removal of leftovers."""

import contextlib
import json
import os
import time
from pathlib import Path

import pytest
import torch

from blt.checkpoint import save_entropy_model
from blt.entropy_model import EntropyModel, EntropyModelConfig
from blt.layers import TransformerConfig
from jobs.command_line import main
from jobs.patch import Config, dry_run, gc, run, status, verify
from tests.pipelines.patch.corpus import prose, write_documents
from tests.pipelines.patch.in_process import use_in_process_pool

SHARDS = {f"train/shard-{i:05d}.parquet": [prose(i, 3000), b"", b"end\n"] for i in range(4)}


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_documents(tmp_path_factory.mktemp("patch_job") / "documents", SHARDS)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    shape = TransformerConfig(width=32, layers=1, heads=2, window=32)
    save_entropy_model(EntropyModel(EntropyModelConfig(transformer=shape)), directory)
    return str(directory)


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    use_in_process_pool(monkeypatch)
    monkeypatch.setattr("jobs.patch.ray_session", lambda: contextlib.nullcontext())


@pytest.fixture
def arguments(documents: str, model: str, tmp_path: Path) -> list[str]:
    return ["patch", f"documents={documents}", f"entropy_model={model}", f"output={tmp_path / 'patches'}"]


@pytest.fixture
def config(documents: str, model: str, tmp_path: Path) -> Config:
    return Config(documents=documents, entropy_model=model, output=str(tmp_path / "patches"))


def _last_json(capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert isinstance(found, dict)
    return found


def test_a_limit_does_a_part_and_the_next_run_the_rest(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--limit", "3"]) == 1
    found = _last_json(capsys)
    assert (found["status"], found["shards"], found["shards_done"], found["shards_missing"]) == ("incomplete", 4, 3, 1)
    assert not (tmp_path / "patches/manifest.json").exists()
    assert not (tmp_path / "patches/job.json").exists()
    assert main([*arguments, "--limit", "3"]) == 0
    assert _last_json(capsys)["status"] == "done"
    assert main(arguments) == 0
    assert _last_json(capsys)["status"] == "skipped"


def test_a_file_that_is_removed_is_made_again(config: Config, tmp_path: Path) -> None:
    run(config)
    before = {path: path.read_bytes() for path in (tmp_path / "patches").rglob("*.parquet")}
    kept, removed = sorted(before)[:2]
    written = kept.stat().st_mtime_ns
    removed.unlink()
    assert run(config).status == "done"
    assert {path: path.read_bytes() for path in (tmp_path / "patches").rglob("*.parquet")} == before
    assert kept.stat().st_mtime_ns == written
    assert run(config).status == "skipped"


def test_status_before_during_and_after(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main([*arguments, "--status"]) == 1
    assert _last_json(capsys)["shards_missing"] == 4
    main([*arguments, "--limit", "1"])
    monkeypatch.setattr("pipelines.patch.dataset.model_fingerprint", None)  # no model is looked at
    assert main([*arguments, "--status"]) == 1
    during = _last_json(capsys)
    assert (during["documents"], during["bytes"], during["shards_done"]) == (3, 3004, 1)


def test_status_of_a_finished_dataset_is_that_of_its_files(config: Config) -> None:
    done = run(config)
    found = status(config)
    assert (found.status, found.documents, found.bytes) == ("done", done.documents, done.bytes)
    assert (found.patches, found.mean_patch_bytes) == (done.patches, done.mean_patch_bytes)
    files = Path(config.output).glob("train/*.parquet")
    assert found.figures["stored_bytes"] == sum(file.stat().st_size for file in files)
    shares = [found.figures[f"{stage}_share"] for stage in ("reading", "inferring", "writing")]
    assert sum(float(share or 0) for share in shares) == pytest.approx(1, abs=1e-3)


def test_a_dry_run_writes_nothing_and_learns_from_finished_shards(config: Config, documents: str) -> None:
    before = dry_run(config)
    assert not Path(config.output).exists()
    assert (before.documents, before.bytes, before.figures["shards_done"]) == (12, 12016, 0)
    assert float(before.figures["estimated_seconds"] or 0) > 0
    text_bytes = sum(file.stat().st_size for file in Path(documents).glob("train/*.parquet"))
    assert before.figures["estimated_stored_bytes"] == text_bytes + round(0.1 * 12016)
    run(config)
    after = dry_run(config)
    assert (after.figures["shards_done"], after.figures["estimated_seconds"]) == (4, 0.0)
    assert after.figures["estimated_stored_bytes"] == status(config).figures["stored_bytes"]


def test_verification_ends_by_what_it_finds(
    arguments: list[str], config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    run(config)
    assert main([*arguments, "--verify"]) == 0
    found = _last_json(capsys)
    assert (found["status"], found["problems"], found["recomputed_documents"]) == ("done", 0, 12)
    shard = Path(config.output, "train/shard-00002.parquet")
    shard.write_bytes(shard.read_bytes()[:-1])
    assert main([*arguments, "--verify"]) == 1
    printed = capsys.readouterr()
    assert "shard-00002.parquet: has sha256" in printed.err
    assert "shard-00002.parquet" in json.loads(printed.out.splitlines()[-1])["first_problem"]


def test_leftovers_go_once_they_are_old(config: Config) -> None:
    run(config)
    before = sorted(Path(config.output).rglob("*.parquet"))
    leftover = Path(config.output, "_temporary/left")
    leftover.parent.mkdir(exist_ok=True)
    leftover.write_bytes(b"x" * 100)
    assert gc(config).figures == {"removed": 0, "freed_bytes": 0}
    two_hours_ago = time.time() - 7200
    os.utime(leftover, (two_hours_ago, two_hours_ago))
    assert gc(config).figures == {"removed": 1, "freed_bytes": 100}
    assert not leftover.exists()
    assert sorted(Path(config.output).rglob("*.parquet")) == before
    assert verify(config).status == "done"


def test_another_rule_is_refused_with_what_differs(
    arguments: list[str], config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    run(config)
    assert main([*arguments, "rule.threshold=3.0"]) == 2
    printed = capsys.readouterr()
    assert "rule.threshold is 1.335442066192627 there, 3.0 here" in printed.err


@pytest.fixture
def changed_documents(tmp_path: Path) -> str:
    shards = dict(SHARDS) | {"train/shard-00003.parquet": [b"changed"]}
    return write_documents(tmp_path / "changed", shards)


def test_other_documents_are_refused_with_what_differs(
    arguments: list[str], config: Config, changed_documents: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run(config)
    assert main([*arguments, f"documents={changed_documents}"]) == 2
    assert "documents is " in capsys.readouterr().err


def test_reuse_of_entropies_on_the_command_line(
    arguments: list[str], config: Config, documents: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "store_entropies=true", "rule.threshold=5.0"]) == 0
    again = ["patch", f"documents={documents}", f"output={tmp_path / 'again'}", "rule.threshold=5.25"]
    assert main([*again, "--reuse-entropies", config.output]) == 0
    assert _last_json(capsys)["threshold"] == 5.25
