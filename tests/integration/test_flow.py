"""The main path as a user runs it, each command a process of its own: done, skipped, refused, resumed."""

import contextlib
import json
import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
import ray  # noqa: F401
import yaml

# isort: split
import psutil  # bundled with Ray, which puts it on the path

# isort: split

import blt
from pipelines.manifest import read_manifest
from pipelines.train.metrics import read_metrics

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

MARK = "BLT_TEST_COMMAND"
HERE = Path(__file__).parent
SPEECHES = HERE.parent / "data" / "speeches.jsonl"


def blt_command(*arguments: str, mark: str = "") -> subprocess.CompletedProcess[str]:
    """`mark` stands in the environment of the command and of all that it starts."""
    return subprocess.run(
        [sys.executable, "-m", "jobs", *arguments],
        env={**os.environ, MARK: mark},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def last_json(completed: subprocess.CompletedProcess[str]) -> dict[str, object]:
    found = json.loads(completed.stdout.strip().splitlines()[-1])
    assert isinstance(found, dict)
    return found


def ray_processes(mark: str) -> list[psutil.Process]:
    """Of a marked command; other Rays on the machine come and go."""
    named = [p for p in psutil.process_iter(["name"]) if p.info["name"] in ("raylet", "gcs_server")]
    return [process for process in named if _environment(process).get(MARK) == mark]


def _environment(process: psutil.Process) -> dict[str, str]:
    with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):  # it has just ended, or is another user's
        return dict(process.environ())
    return {}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("flow")


@pytest.fixture(scope="module")
def arguments(root: Path) -> list[str]:
    """The quickstart's arguments, on the first documents of the test speeches."""
    corpus = root / "speeches.jsonl"
    corpus.write_text("".join(SPEECHES.read_text(encoding="utf-8").splitlines(keepends=True)[:6]), encoding="utf-8")
    return ["quickstart", "--config", str(HERE / "tiny.yaml"), f"shard.input={corpus}", f"output={root / 'run'}"]


@pytest.fixture(scope="module")
def finished(arguments: list[str]) -> dict[str, object]:
    """A whole run, and what it says at the end."""
    mark = uuid.uuid4().hex
    completed = blt_command(*arguments, mark=mark)
    assert completed.returncode == 0, completed.stderr[-3000:]
    assert ray_processes(mark) == []
    return last_json(completed)


def test_a_run_is_complete(finished: dict[str, object], root: Path) -> None:
    run = root / "run"
    documents, patches = read_manifest(str(run / "documents")), read_manifest(str(run / "patches"))
    assert finished["status"] == "done"
    assert finished["documents"] == documents.documents == patches.documents == 6
    assert finished["bytes"] == documents.bytes == patches.bytes
    assert finished["patches"] == sum(shard.patches or 0 for shard in patches.shards)
    records = read_metrics(run / "model")
    assert [record["step"] for record in records if "train/loss" in record] == [2, 3, 4, 6, 8]
    assert [record["step"] for record in records if "valid/bpb" in record] == [4, 8]
    assert all(0 < record["train/bpb"] < 12 for record in records if "train/bpb" in record)
    assert len(list((run / "model" / "tensorboard").glob("events.*"))) >= 1
    evaluation = json.loads((run / "evaluation" / "evaluation.json").read_text(encoding="utf-8"))
    assert evaluation["bpb"] == pytest.approx(finished["bpb"], abs=1e-4)
    assert evaluation["bytes"] == sum(shard.bytes for shard in documents.split("valid"))
    assert (run / "report.html").stat().st_size > 10_000


def test_the_model_loads_with_its_entropy_model_and_rule(finished: dict[str, object], root: Path) -> None:
    lm = blt.load(root / "run" / "model" / "model")
    assert lm.entropy_model is not None
    assert lm.patch_rule.threshold == finished["threshold"]
    patching = read_manifest(str(root / "run" / "patches")).patching
    assert patching is not None
    assert blt.fingerprint(lm.entropy_model) == patching.entropy_model
    assert len(blt.generate(lm, b"Fellow", max_new_bytes=4)) <= 4


def test_a_second_run_skips_everything(finished: dict[str, object], arguments: list[str]) -> None:
    completed = blt_command(*arguments)
    assert completed.returncode == 0
    assert last_json(completed) == finished | {"status": "skipped", "seconds": last_json(completed)["seconds"]}
    assert completed.stderr.count("skipped, done before") == 8
    assert "ray started" not in completed.stderr


def test_another_configuration_is_refused(finished: dict[str, object], arguments: list[str]) -> None:
    completed = blt_command(*arguments, "train.steps=9")
    assert completed.returncode == 2
    assert "another configuration" in completed.stderr
    assert '"steps" was 8, is 9' in completed.stderr
    assert "Traceback" not in completed.stderr


def test_foreign_entropy_models_are_refused(finished: dict[str, object], root: Path) -> None:
    run, other = root / "run", root / "other_entropy_model"
    blt.save_entropy_model(blt.EntropyModel(blt.load(run / "model" / "model").entropy_model.config), other)  # type: ignore[union-attr]
    completed = blt_command(
        "train", "--config", str(train_config(root)), f"entropy_model={other}", f"output={root / 'refused'}"
    )
    assert completed.returncode == 2
    assert 'key "entropy_model"' in completed.stderr
    assert "Traceback" not in completed.stderr


def test_a_broken_checkpoint_is_one_line(finished: dict[str, object], root: Path) -> None:
    source, broken = root / "run" / "model" / "model", root / "broken"
    subprocess.run(["cp", "-r", str(source), str(broken)], check=True)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    completed = blt_command("generate", f"model={broken}")
    assert completed.returncode == 1
    assert str(weights) in completed.stderr
    assert "Traceback" not in completed.stderr


def train_config(root: Path) -> Path:
    """The train section of tiny.yaml as a configuration of `blt train`, on the patches of the run."""
    settings = yaml.safe_load((HERE / "tiny.yaml").read_text(encoding="utf-8"))["train"]
    path = root / "train.yaml"
    path.write_text(yaml.safe_dump(settings | {"data": str(root / "run" / "patches")}), encoding="utf-8")
    return path
