"""What is sent for a command: its id, its configuration, its environment; and which attempt it is."""

import dataclasses
import importlib
import json
import re
from pathlib import Path

import pytest

from blt.errors import ConfigError
from jobs.cluster.attempts import decide, refuse_shared_output
from jobs.cluster.job_server import Job
from jobs.cluster.places import PLACES, check_places
from jobs.cluster.submission import CONFIG_FILE, Submission, pip_packages
from jobs.cluster.submit import Config, resolve
from jobs.configuration import load_config, to_plain
from jobs.invocation import COMMANDS, understand
from jobs.settings import describe

ROOT = Path(__file__).parents[3]
TRAIN = ("train", "--config", "blt_400m", "data=s3://b/p", "entropy_model=s3://b/e", "output=s3://b/m")
SOURCES = "sources=[{name: a, input: s3://b/a}, {name: c, input: [s3://b/c], format: txt}]"


def submission(*command: str) -> Submission:
    return resolve(Config(command=command))


def test_the_id_follows_from_the_configuration_alone() -> None:
    first = submission(*TRAIN)
    assert re.fullmatch(r"train-[0-9a-f]{12}", first.run)
    assert submission(*TRAIN, "steps=2000").run != first.run
    assert submission(*TRAIN[:1], *reversed(TRAIN[3:]), *TRAIN[1:3]).run == first.run
    assert submission(*TRAIN, "--dry-run").run.startswith("train-dry-run-")
    assert submission(*TRAIN, "--verbose").run == first.run
    assert "--verbose" in submission(*TRAIN, "--verbose").entrypoint("python").split()
    as_json = submission(*TRAIN, "--log-format", "json")
    assert (as_json.run, "--log-format json" in as_json.entrypoint("python")) == (first.run, True)


@pytest.mark.parametrize(
    "command",
    [
        TRAIN,
        (*TRAIN, "--dry-run", "--device", "H100"),
        ("train-entropy", "--config", "entropy_100m", "documents=s3://b/d", "output=s3://b/e"),
        ("shard", SOURCES, "output=s3://b/d", "dedup=true"),
        ("patch", "documents=/shared/d", "entropy_model=s3://b/e", "rule.threshold=1.5", "output=s3://b/p"),
        ("eval", "model=s3://b/m", "input=[s3://b/t]", "output=s3://b/e", "noise=true"),
        ("eval characters", "model=s3://b/m", "words=[s3://b/w]"),
    ],
)
def test_the_shipped_configuration_is_the_resolved_one(command: tuple[str, ...], tmp_path: Path) -> None:
    sent = submission(*" ".join(command[:1]).split(), *command[1:])
    (tmp_path / CONFIG_FILE).write_bytes(sent.config_file)
    words = sent.entrypoint("python").split()
    assert words[:3] == ["python", "-m", "jobs"]
    call = understand(
        command[0], [w.replace(CONFIG_FILE, str(tmp_path / CONFIG_FILE)) for w in words[3 + len(command[0].split()) :]]
    )
    assert call.action == sent.action
    assert to_plain(call.load()) == sent.config


def test_every_key_of_a_path_is_known_as_one() -> None:
    """A key that names a file, directory or dataset and is not in PLACES would let a local path through."""
    says_path = re.compile(r"\b([Dd]irectory|[Ff]iles?|[Dd]ataset|Where)\b")
    no_path = {("eval", "language_key"), ("generate", "lines")}
    assert set(PLACES) < set(COMMANDS)
    for command, keys in PLACES.items():
        module = importlib.import_module(COMMANDS[command].module)
        for setting in describe(module.Config):
            key = setting.key.replace("[]", "")
            is_path = "text" in setting.type and says_path.search(setting.doc) and (command, key) not in no_path
            if is_path and not re.search(r"(text|id)_key$", key) and "Name of the source" not in setting.doc:
                assert key in keys, f"{command}: {key}: {setting.doc}"
        known = {setting.key.replace("[]", "") for setting in describe(module.Config)}
        assert set(keys) <= known, command


@pytest.mark.parametrize("path", ["runs/x", "./x", "../x", "~/x", "file://x"])
def test_paths_of_this_machine_are_refused(path: str) -> None:
    with pytest.raises(ConfigError, match=r'key "output" is ".*", a path of this machine'):
        submission("shard", "input=[s3://b/c]", f"output={path}")
    with pytest.raises(ConfigError, match=r'key "sources.input" is'):
        submission("shard", f"sources=[{{name: a, input: '{path}'}}]", "output=s3://b/d")


def test_shared_directories_are_told() -> None:
    assert check_places("shard", {"input": ["/shared/a", "s3://b/c"], "output": "file:///shared/d"}) == [
        "input=/shared/a",
        "output=file:///shared/d",
    ]


@pytest.mark.parametrize("uri", ["s3://key:planted@b/c", "s3://b/c?secret=planted"])
def test_credentials_in_an_uri_are_refused_unseen(uri: str) -> None:
    with pytest.raises(ConfigError, match="credentials") as failure:
        submission("shard", f"input=['{uri}']", "output=s3://b/d")
    assert "planted" not in str(failure.value)


def test_a_secret_in_the_configuration_is_refused_unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted-secret-value")
    with pytest.raises(ConfigError, match="holds the value of AWS_SECRET_ACCESS_KEY") as failure:
        submission("shard", "input=[s3://b/planted-secret-value]", "output=s3://b/d")
    assert "planted" not in str(failure.value)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"command": ()}, "no command"),
        ({"command": ("shard",), "wait": True, "follow": True}, "exclude each other"),
        ({"command": ("shard",), "env": {"AWS_SECRET_ACCESS_KEY": "x"}}, r"env.AWS_SECRET_ACCESS_KEY looks like"),
        ({"command": ("shard",), "max_package_bytes": 0}, "max_package_bytes"),
    ],
)
def test_settings_that_cannot_be(given: dict[str, object], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        Config(**given)  # type: ignore[arg-type]


@pytest.mark.parametrize("command", ["quickstart", "report", "inspect", "submit", "jobs", "logs"])
def test_what_is_no_job(command: str) -> None:
    given = {"submit": ["shard"], "logs": ["x"], "inspect": ["model=m", "text"], "report": ["output=r.html", "run=r"]}
    with pytest.raises(ConfigError, match=rf'"{command}" is not for a cluster'):
        submission(command, *given.get(command, []))


def test_locked_dependencies(tmp_path: Path) -> None:
    assert pip_packages(ROOT, "image", ()) == []
    packages = pip_packages(ROOT, "lock", ("replicated",))
    assert packages[-1] == "-c ${RAY_RUNTIME_ENV_CREATE_WORKING_DIR}/requirements.lock"
    assert any(package.startswith("ray[default,train,data]") for package in packages)
    assert any(package.startswith("torchft") for package in packages)
    assert not any(package.startswith("pytest") for package in packages)
    for directory, dependencies, extras, reason in (
        (tmp_path, "lock", (), "has no pyproject.toml"),
        (ROOT, "lock", ("nope",), "nope not known"),
        (ROOT, "image", ("eval",), "goes with dependencies=lock"),
    ):
        with pytest.raises(ConfigError, match=reason):
            pip_packages(directory, dependencies, extras)  # type: ignore[arg-type]


def job(job_id: str, status: str, output: str = "s3://b/m") -> Job:
    return Job(
        id=job_id,
        status=status,
        message="",
        entrypoint="",
        metadata={"blt_output": output},
        started_ms=1,
        ended_ms=None,
    )


RUN = "train-0123456789ab"


@pytest.mark.parametrize(
    ("jobs", "again", "kind", "job_id"),
    [
        ([], False, "new", RUN),
        ([("train-other", "RUNNING"), (f"{RUN}-x", "RUNNING"), (f"{RUN}-1", "RUNNING")], False, "new", RUN),
        ([(RUN, "PENDING")], False, "attach", RUN),
        ([(RUN, "RUNNING")], True, "attach", RUN),
        ([(RUN, "SUCCEEDED")], False, "finished", RUN),
        ([(RUN, "SUCCEEDED")], True, "new", f"{RUN}-2"),
        ([(RUN, "FAILED")], False, "new", f"{RUN}-2"),
        ([(RUN, "STOPPED")], False, "new", f"{RUN}-2"),
        ([(f"{RUN}-10", "RUNNING"), (f"{RUN}-9", "FAILED"), (RUN, "FAILED")], False, "attach", f"{RUN}-10"),
        ([(RUN, "SUCCEEDED"), (f"{RUN}-2", "FAILED")], False, "new", f"{RUN}-3"),
    ],
)
def test_attempts(jobs: list[tuple[str, str]], again: bool, kind: str, job_id: str) -> None:
    decision = decide(RUN, [job(*one) for one in jobs], again=again)
    assert (decision.kind, decision.job_id) == (kind, job_id)


def test_two_runs_do_not_write_to_one_output() -> None:
    with pytest.raises(ConfigError, match=r"train-other is RUNNING with the same output s3://b/m"):
        refuse_shared_output(RUN, "s3://b/m", [job("train-other", "RUNNING")])
    refuse_shared_output(RUN, "s3://b/m", [job("train-other", "FAILED"), job(f"{RUN}-2", "RUNNING")])
    refuse_shared_output(RUN, "s3://b/n", [job("train-other", "RUNNING")])
    refuse_shared_output(RUN, None, [job("train-other", "RUNNING")])


def test_metadata_says_what_the_job_is() -> None:
    metadata = submission(*TRAIN).metadata(2)
    assert metadata["blt_output"] == "s3://b/m"
    assert metadata["blt_attempt"] == "2"
    assert "blt_output" not in submission(*TRAIN, "--dry-run").metadata(1)
    assert (
        json.loads(submission(*TRAIN).config_file)["steps"]
        == dataclasses.asdict(
            load_config(importlib.import_module("jobs.train").Config, ROOT / "jobs/configs/blt_400m.yaml", TRAIN[3:])
        )["steps"]
    )
