"""`blt submit`, `jobs`, `logs` and `stop`, and all that they send, against a server that records it."""

import io
import json
import zipfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import ray

from jobs.cluster import following
from jobs.cluster.access import Access
from jobs.cluster.address import parse_address
from jobs.cluster.job_server import Job, JobServer, ServerAwayError
from jobs.command_line import main
from tests.job_server import RecordingServer, recording_server

SECRET = "planted-secret-value-0123456789"
COMMAND = ("shard", "input=[s3://b/c]", "output=s3://b/d")


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with credentials in the usual places, and an environment full of them."""
    root = tmp_path / "tree"
    (root / ".aws").mkdir(parents=True)
    (root / ".git").mkdir()
    (root / "train.py").write_text("print('hello')\n")
    for name in (".env", ".aws/credentials", ".git/config", "deploy.pem"):
        (root / name).write_text(f"secret = {SECRET}\n")
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN", "RAY_AUTH_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(name, SECRET)
    monkeypatch.chdir(root)
    return root


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[RecordingServer]:
    with recording_server("open") as server:
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", server.address)
        yield server


def blt(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> tuple[dict[str, object], str]:
    """The result of a command, and all that it printed."""
    assert main(arguments) == status
    captured = capsys.readouterr()
    result = json.loads(captured.out.splitlines()[-1])
    assert isinstance(result, dict)
    return result, captured.out + captured.err


def test_a_command_becomes_a_job_with_its_configuration(
    tree: Path, server: RecordingServer, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("submit", "env.AWS_REGION=eu-west-1", "resources.cpus=2", "--verbose", *COMMAND, "dedup=true")
    result, _ = blt(capsys, *arguments)
    job = server.jobs[str(result["job"])]
    assert (result["status"], result["submission"], result["path"]) == ("submitted", "new", "s3://b/d")
    assert job["entrypoint"] == "python -m jobs shard --config blt-job.json"
    assert job["metadata"]["blt_output"] == "s3://b/d"
    assert job["runtime_env"]["env_vars"] == {"AWS_REGION": "eu-west-1", "RAY_AUTH_MODE": "disabled"}
    (package,) = server.packages.values()
    with zipfile.ZipFile(io.BytesIO(package)) as sent:
        assert sent.namelist() == ["blt-job.json", "train.py"]
        assert json.loads(sent.read("blt-job.json"))["dedup"] is True
    posted = next(json.loads(body) for request, _, body in server.requests if request.startswith("POST"))
    assert posted["entrypoint_num_cpus"] == 2


def test_no_credential_is_printed_or_sent(
    tree: Path, server: RecordingServer, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    log = tmp_path / "submit.log"
    printed = blt(capsys, "submit", "--verbose", "--log-file", str(log), *COMMAND)[1]
    printed += blt(capsys, "jobs", "--verbose")[1]
    for given in (f"env.NAME={SECRET}", f"python={SECRET}", f"exclude=[{SECRET}]"):
        refused, told = blt(capsys, "submit", given, "--again", *COMMAND, "dedup=true", status=2)
        assert "configuration of submit holds the value of" in str(refused["error"])
        printed += told
    sent = b"".join(repr(one).encode() for one in server.requests)
    unpacked = b""
    for package in server.packages.values():
        with zipfile.ZipFile(io.BytesIO(package)) as files:
            unpacked += b"".join(files.read(name) for name in files.namelist())
    assert b"train.py" in sent
    assert b"hello" in unpacked
    for place in (printed.encode(), log.read_bytes(), sent, unpacked):
        assert SECRET.encode() not in place


def test_submitted_again(tree: Path, server: RecordingServer, capsys: pytest.CaptureFixture[str]) -> None:
    """While it runs it is attached to; then it is told finished, failed or stopped, by the rule of attempts."""
    job = str(blt(capsys, "submit", *COMMAND)[0]["job"])
    again, printed = blt(capsys, "submit", *COMMAND)
    assert (again["job"], again["submission"]) == (job, "attach")
    assert "attached to the same run" in printed
    other, _ = blt(capsys, "submit", *COMMAND, "dedup=true", status=2)
    assert "with the same output s3://b/d" in str(other["error"])
    server.end(job, "FAILED")
    second, printed = blt(capsys, "submit", *COMMAND)
    assert (second["job"], second["submission"]) == (f"{job}-2", "new")
    assert f"after={job} which=FAILED" in printed
    server.end(f"{job}-2", "SUCCEEDED")
    third, printed = blt(capsys, "submit", *COMMAND)
    assert (third["status"], third["job"]) == ("skipped", f"{job}-2")
    assert "finished before" in printed
    assert blt(capsys, "submit", "--again", *COMMAND)[0]["job"] == f"{job}-3"
    assert len(server.packages) == 1, "the same files are sent once"


def test_waiting_takes_over_what_the_job_says(
    tree: Path, server: RecordingServer, capsys: pytest.CaptureFixture[str]
) -> None:
    job = str(blt(capsys, "submit", *COMMAND)[0]["job"])
    server.end(job, "SUCCEEDED", 'working\n{"status": "done", "seconds": 2.5, "documents": 7, "shards": 3}\nbye\n')
    assert blt(capsys, "submit", "--wait", *COMMAND)[0]["status"] == "skipped"
    listed, printed = blt(capsys, "jobs")
    assert listed[f"job.{job}"] == "SUCCEEDED"
    assert "s3://b/d" in printed
    assert "working\n" in blt(capsys, "logs", job)[1]
    second = str(blt(capsys, "submit", "--again", *COMMAND)[0]["job"])
    log = 'x\n{"status": "failed", "error": "input is empty"}\n'
    server.end(second, "FAILED", log)
    server.jobs[second]["status"] = "RUNNING"
    failing = server.answer

    def fail_at_second_look(method: str, path: str, headers: dict[str, str], body: bytes) -> tuple[int, object]:
        answer = failing(method, path, headers, body)
        if path == f"/api/jobs/{second}":
            server.end(second, "FAILED", log)
        return answer

    server.answer = fail_at_second_look  # type: ignore[method-assign]
    result, _ = blt(capsys, "submit", "--wait", *COMMAND, status=1)
    assert result["error"] == f"job {second} failed: input is empty (blt logs {second})"


def test_stop(tree: Path, server: RecordingServer, capsys: pytest.CaptureFixture[str]) -> None:
    job = str(blt(capsys, "submit", *COMMAND)[0]["job"])
    assert blt(capsys, "stop", job)[0]["job_status"] == "STOPPED"
    assert blt(capsys, "stop", job)[0]["status"] == "skipped"
    assert 'has no job "nope"' in str(blt(capsys, "stop", "nope", status=2)[0]["error"])


def test_what_the_server_refuses_is_one_line(
    tree: Path, server: RecordingServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "_submit", lambda request: (500, "Traceback\n  many lines\nRuntimeError: no room."))
    result, _ = blt(capsys, "submit", *COMMAND, status=1)
    assert result["error"] == f"{server.address}: the job server refuses (status code 500): RuntimeError: no room.."


def test_two_submissions_at_once_are_one_job(
    tree: Path, server: RecordingServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one was a moment faster, so the server says that the id is taken."""
    submit = server._submit
    monkeypatch.setattr(server, "_submit", lambda request: [submit(request), submit(request)][1])
    result, printed = blt(capsys, "submit", *COMMAND)
    assert (result["submission"], list(server.jobs)) == ("attach", [result["job"]])
    assert "attached to the same run" in printed
    server.end(str(result["job"]), "SUCCEEDED")
    monkeypatch.setattr(server, "_submit", lambda request: (500, "RuntimeError: no room"))
    assert "no room" in str(blt(capsys, "submit", "--again", *COMMAND, status=1)[0]["error"])


def test_the_options_of_submit_stand_before_the_command(
    tree: Path, server: RecordingServer, capsys: pytest.CaptureFixture[str]
) -> None:
    (tree / "cluster.yaml").write_text("env: {AWS_REGION: eu-west-1}\n")
    (tree / "shard.yaml").write_text("dedup: true\n")
    arguments = ("--config", "cluster.yaml", "--address", server.address, "shard", "--config", "shard.yaml")
    result, _ = blt(capsys, "submit", *arguments, *COMMAND[1:])
    assert server.jobs[str(result["job"])]["runtime_env"]["env_vars"]["AWS_REGION"] == "eu-west-1"
    dry, printed = blt(capsys, "submit", "--dry-run", *COMMAND, "dedup=true")
    assert dry["job"] == result["job"]
    assert "train.py\n" in printed
    for given, reason in (
        (("submit", "shrd"), 'did you mean "shard"?'),
        (("submit", "--wiat", "shard"), "unrecognized arguments: --wiat"),
        (("submit", "shard", "inptu=x", "output=s3://b/d"), 'key "inptu" is not known'),
        (("submit", "shard", "--help"), "blt shard --help"),
    ):
        assert reason in str(blt(capsys, *given, status=2)[0]["error"])


def test_a_job_cannot_change_the_version_of_ray(
    tree: Path, server: RecordingServer, capsys: pytest.CaptureFixture[str]
) -> None:
    """With locked dependencies, which need the sources in the working directory."""
    arguments = ("submit", "--dependencies", "lock", *COMMAND)
    assert "has no pyproject.toml" in str(blt(capsys, *arguments, status=2)[0]["error"])
    (tree / "jobs").mkdir()
    (tree / "jobs/__main__.py").touch()
    (tree / "pyproject.toml").write_text('[project]\ndependencies = ["ray[default]"]\n')
    (tree / "requirements.lock").write_text("rich==1\nray==1.2.3\n")
    assert "requirements.lock has 1.2.3" in str(blt(capsys, *arguments, status=2)[0]["error"])
    (tree / "requirements.lock").write_text(f"rich==1\nray=={ray.__version__}\n")
    job = server.jobs[str(blt(capsys, *arguments)[0]["job"])]
    packages = ["ray[default]", "-c ${RAY_RUNTIME_ENV_CREATE_WORKING_DIR}/requirements.lock"]
    assert job["runtime_env"]["pip"]["packages"] == packages


def test_a_server_that_goes_away_for_a_while_is_waited_for(
    tree: Path, server: RecordingServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And given up after a time, with how to attach again; the job is not touched."""
    monkeypatch.setattr(following, "POLL_SECONDS", 0.01)
    job = str(blt(capsys, "submit", *COMMAND)[0]["job"])
    away = iter([True, True, False, True])

    def fail_now_and_then(self: JobServer, job_id: str) -> Job:
        if next(away, False):
            raise ServerAwayError("gone")
        found = plain(self, job_id)
        server.end(job, "SUCCEEDED")
        return found

    plain = JobServer.job
    monkeypatch.setattr(JobServer, "job", fail_now_and_then)
    assert blt(capsys, "submit", "--wait", *COMMAND)[0]["job_status"] == "SUCCEEDED"
    server.jobs[job]["status"] = "RUNNING"
    monkeypatch.setattr(following, "PATIENCE_SECONDS", 0.05)

    def fail(self: JobServer, job_id: str) -> Job:
        raise ServerAwayError("gone")

    monkeypatch.setattr(JobServer, "job", fail)
    error = str(blt(capsys, "submit", "--wait", *COMMAND, status=1)[0]["error"])
    assert error == f"gone; the job may go on: `blt logs {job} --follow` attaches again, `blt stop {job}` ends it"
    assert server.jobs[job]["status"] == "RUNNING"


def test_a_log_that_breaks_off_goes_on_where_it_was(
    tree: Path, server: RecordingServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray sends a log from its start each time; what was shown is not shown again."""
    monkeypatch.setattr(following, "POLL_SECONDS", 0.01)
    server.jobs["x"] = {"type": "SUBMISSION", "submission_id": "x", "entrypoint": "e", "status": "RUNNING", "log": ""}
    chunks = iter([["one\n", "tw"], ["one\ntwo\nth"], ["one\n", "two\n", "three\n"]])

    async def log(self: JobServer, job_id: str) -> AsyncIterator[str]:
        for text in next(chunks):
            yield text
        if len(shown) < 4:
            raise ServerAwayError("gone")
        server.end("x", "SUCCEEDED")

    monkeypatch.setattr(JobServer, "log_as_it_grows", log)
    address = parse_address("address", server.address)
    shown: list[str] = []
    job = following.follow(JobServer(address, Access(is_open=True, headers={})), "x", shown.append)
    assert job.status == "SUCCEEDED"
    assert shown == ["one\n", "tw", "o\nth", "ree\n"]
