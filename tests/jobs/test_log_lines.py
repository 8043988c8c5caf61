"""Log lines as JSON: what the driver of a run and its workers write, and what they are told of the run."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs import train
from jobs.cluster.submission import Submission
from jobs.command_line import main
from jobs.configuration import load_config, to_plain
from tests.pipelines.train.tiny_run import CONFIG, model_config, write_tiny_patches

PLANTED = "planted-secret-0123456789"
FIELDS = {"time", "level", "run", "process", "node", "pid", "logger", "message"}


def parsed(text: str) -> list[dict[str, Any]]:
    """Every line; none may be anything but an object with all fields."""
    lines = [json.loads(line) for line in text.splitlines()]
    for line in lines:
        assert line.keys() >= FIELDS, line
    return lines


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_every_line_of_a_run(tmp_path: Path) -> None:
    """Lines of the driver and of two workers, in one stream and in the file; none of them holds a credential."""
    data, output, file = write_tiny_patches(tmp_path / "patches"), tmp_path / "run", tmp_path / "log.jsonl"
    settings = to_plain(train.Config(**vars(CONFIG), model=model_config(), data=data, output=str(output)))
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(settings | {"workers": 2, "steps": 12}))
    arguments = ("--config", str(tmp_path / "train.yaml"), "--log-format", "json", "--log-file", str(file))
    environment = {**os.environ, "AWS_SECRET_ACCESS_KEY": PLANTED, "RAY_AUTH_TOKEN": PLANTED}
    done = subprocess.run(
        [sys.executable, "-m", "jobs", "train", *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    shown, written = parsed(done.stderr), parsed(file.read_text())
    config = load_config(train.Config, tmp_path / "train.yaml", [])
    run = Submission(command="train", action=None, config=to_plain(config)).run
    assert {line["run"] for line in shown + written} == {run}
    ready = [line for line in written if line["message"].startswith("worker is ready")]
    assert sorted(line["rank"] for line in ready) == [0, 1]
    assert {line["process"] for line in ready} == {"train worker"}
    assert {line["metrics_run"] for line in ready} == {path.name for path in (output / "checkpoints").iterdir()}
    account = next(line for line in shown if line["message"].startswith("account steps=12"))
    assert (account["process"], account["logger"], account["level"]) == ("driver", "pipelines.train.trainer", "INFO")
    assert len({line["pid"] for line in ready} | {account["pid"]}) == 3
    assert PLANTED not in done.stderr + done.stdout + file.read_text()


def test_errors_and_warnings_are_lines_too(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["patch", "--log-format", "json", "documents=/nowhere", "output=/nowhere/out", "rule.kind=space"]) == 1
    captured = capfd.readouterr()
    (line,) = parsed(captured.err)
    assert (line["level"], line["command"]) == ("ERROR", "patch")
    assert line["run"].startswith("patch-")
    assert json.loads(captured.out.splitlines()[-1])["error"] in line["message"]
    assert main(["patch", "documents=/nowhere", "output=/nowhere/out", "rule.kind=space"]) == 1
    assert capfd.readouterr().err.startswith("blt patch: error: "), "text again"
