"""`blt train` as a user runs it, its driver killed; the command in a process of its own, with its own Ray."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import ray  # noqa: F401
import yaml

# isort: split
import psutil  # bundled with Ray, which puts it on the path

# isort: split

from pipelines.train.metrics import read_metrics
from tests.pipelines.train.tiny_run import write_tiny_patches
from tests.processes import kill_all

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(400)]

HERE = Path(__file__).parent


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """`blt train` on patches at spaces, with the train section of tiny.yaml."""
    settings = yaml.safe_load((HERE / "tiny.yaml").read_text(encoding="utf-8"))["train"]
    config = tmp_path / "train.yaml"
    data = write_tiny_patches(tmp_path / "patches")
    config.write_text(yaml.safe_dump(settings | {"data": data}), encoding="utf-8")
    return [sys.executable, "-m", "jobs", "train", "--config", str(config)]


def test_more_workers_than_cpus_are_refused(command: list[str], tmp_path: Path) -> None:
    completed = subprocess.run(
        [*command, f"output={tmp_path / 'too-many'}", "workers=64"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert completed.returncode == 2
    assert "workers 64" in completed.stderr
    assert "Traceback" not in completed.stderr


@pytest.mark.parametrize("survival", ["sharded", "replicated"])
def test_a_killed_driver_goes_on_from_its_checkpoint(command: list[str], tmp_path: Path, survival: str) -> None:
    """kill -9 after two checkpoints, the newest damaged; the same command finishes and each step stands once."""
    output = tmp_path / "run"
    command = [
        *(*command, f"output={output}", "workers=2", f"survival={survival}"),
        *("steps=150", "checkpoint_every=3", "log_every=1", "valid_every=150"),
    ]
    driver = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True)
    while len(list(output.glob("checkpoints/*/step-*/complete.json"))) < 2:
        with pytest.raises(subprocess.TimeoutExpired):  # it must not have ended
            driver.wait(0.02)
    children = psutil.Process(driver.pid).children(recursive=True)
    kill_all([psutil.Process(driver.pid), *children])
    driver.wait()
    psutil.wait_procs(children, timeout=30)
    steps_before = [record["step"] for record in read_metrics(output)]
    assert steps_before[-1] < 150
    newest = max(output.glob("checkpoints/*/step-*/complete.json")).parent
    next(newest.glob("model-*.safetensors")).unlink()
    other = subprocess.run([*command, "optimizer.lr=0.1"], capture_output=True, text=True, timeout=300, check=False)
    assert other.returncode == 2
    assert "unfinished run of another configuration" in other.stderr
    command[command.index(f"output={output}")] = f"output={os.path.relpath(output)}"
    completed = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert completed.returncode == 0, completed.stderr[-3000:]
    assert "going on from a checkpoint" in completed.stderr
    assert re.search(rf"cause=checkpoint detail=passed over: .*{newest.name}/model-.* is missing", completed.stderr)
    steps = [record["step"] for record in read_metrics(output) if "train/loss" in record]
    assert steps == list(range(1, 151))
