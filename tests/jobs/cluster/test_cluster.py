"""From documents to a trained model by jobs of a real cluster, with everything on S3."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from blt.checkpoint import load_entropy_model
from jobs.record import read_record
from pipelines.model_files import local_model
from pipelines.storage import Storage
from tests.pipelines.patch.corpus import prose, write_documents
from tests.ray_head import RayHead, ray_head
from tests.s3_server import SECRET_KEY, S3Server

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.s3, pytest.mark.timeout(400)]

ROOT = Path(__file__).parents[3]
TOKEN = "0123456789abcdef-planted-token"


def blt(head: RayHead, *arguments: str) -> list[str]:
    """A command line on the cluster, from the sources; `tests` names the S3 server's key, so it is left out."""
    own = [f"--address={head.address}", "--verbose"]
    sent = [f"working_dir={ROOT}", "exclude=[tests]"] if arguments[0] == "submit" else []
    return [sys.executable, "-m", "jobs", arguments[0], *own, *sent, *arguments[1:]]


def run(head: RayHead, *arguments: str) -> tuple[dict[str, object], str]:
    """The result of a command, and all that it printed. In a process of its own: Ray keeps a token once it has it."""
    done = subprocess.run(blt(head, *arguments), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(result, dict)
    return result, done.stdout + done.stderr


def test_from_documents_to_a_trained_model(s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job is submitted, left alone, attached to and stopped; another is followed to its end, read and listed."""
    root = s3.url("cluster")
    shards = {
        "train/shard-00000.parquet": [prose(1, 8000), prose(2, 8000)],
        "valid/shard-00000.parquet": [prose(3, 4000)],
    }
    write_documents(f"{root}/documents", shards)
    settings = yaml.safe_load((ROOT / "tests/integration/tiny.yaml").read_text())["train_entropy"]
    (tmp_path / "entropy.yaml").write_text(yaml.safe_dump(settings))
    train = ("train-entropy", "--log-format", "json", "--config", str(tmp_path / "entropy.yaml"))
    train = (*train, f"documents={root}/documents")
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    with ray_head({**s3.environment, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}) as head:
        endless = (*train, "steps=100000", f"output={root}/long")
        long, _ = _interrupted(head, *endless)
        again, attached = _interrupted(head, *endless)
        assert again == long
        assert f"attached to the same run job={long} status=RUNNING" in attached
        assert f"Running entrypoint for job {long}" in attached, "the log from its beginning"
        assert run(head, "stop", long)[0]["job_status"] == "STOPPED"
        result, printed = run(head, "submit", "--follow", *train, f"output={root}/entropy")
        job = str(result["job"])
        assert f"Running entrypoint for job {job}" in printed
        assert (result["status"], result["job_status"]) == ("done", "SUCCEEDED")
        assert result["steps"] == settings["steps"]
        log = run(head, "logs", job)[1]
        jobs, listed = run(head, "jobs")
        assert [jobs[f"job.{one}"] for one in (job, long)] == ["SUCCEEDED", "STOPPED"]
        logs = b"".join(
            file.read_bytes() for ending in ("log", "out", "err") for file in head.directory.rglob(f"*.{ending}")
        )
        assert b"train-entropy" in logs
        assert b'"process": "train worker"' in logs, "on the nodes too"
    lines = [json.loads(line) for line in log.splitlines() if line.startswith('{"time"')]
    assert {line["run"] for line in lines} == {job}
    assert {"driver", "train worker"} <= {line["process"] for line in lines}
    record = read_record(f"{root}/entropy")
    assert record is not None
    assert record.result.bytes == result["bytes"]
    assert load_entropy_model(local_model(f"{root}/entropy/model")) is not None
    stored = b"".join(Storage(root).read_bytes(path) for path in Storage(root).list())
    for secret in (SECRET_KEY, TOKEN):
        for place in ((attached + printed + log + listed).encode(), logs, stored):
            assert secret.encode() not in place


def _interrupted(head: RayHead, *command: str) -> tuple[str, str]:
    """Submit, follow until the job runs, and press Ctrl-C; the job's id, and all that was printed."""
    arguments = blt(head, "submit", "--follow", *command)
    with subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ, start_new_session=True
    ) as following:
        assert following.stderr is not None
        said = ""
        while "Running entrypoint" not in said:
            line = following.stderr.readline()
            assert line, said
            said += line
        following.send_signal(signal.SIGINT)
        out, rest = following.communicate(timeout=60)
        assert following.returncode == 130, said + rest
    error = json.loads(out.splitlines()[-1])["error"]
    job = str(error).split()[2]
    assert error == (
        f"interrupted; job {job} goes on: `blt logs {job} --follow` attaches again, `blt stop {job}` ends it"
    )
    return job, said + rest + out
