"""The image: its Dockerfile is clean, holds the versions of the lock, and copies what is there; scripts are clean."""

import json
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest
import ray
import torch

from infra.docker.versions import differences, locked_versions
from tests.infra.tools import INFRA, ROOT, installed

DOCKERFILE = INFRA / "docker" / "Dockerfile"
TEXT = DOCKERFILE.read_text(encoding="utf-8")
LOCKED = locked_versions((ROOT / "requirements.lock").read_text(encoding="utf-8"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
TAG = f"{PROJECT['version']}-ray{LOCKED['ray']}-torch{LOCKED['torch']}"


def instructions(name: str) -> list[str]:
    """Arguments of all instructions of one kind, continued lines joined."""
    joined = re.sub(r"\\\n", " ", re.sub(r"^\s*#.*\n", "", TEXT, flags=re.MULTILINE))
    return [line.partition(" ")[2].strip() for line in joined.splitlines() if line.startswith(f"{name} ")]


def test_hadolint_finds_nothing() -> None:
    found = subprocess.run(
        [installed("hadolint"), "--format", "json", DOCKERFILE], capture_output=True, text=True, check=False
    )
    assert json.loads(found.stdout) == []
    assert found.returncode == 0


def test_hadolint_would_find_something(tmp_path: Path) -> None:
    bad = tmp_path / "Dockerfile"
    bad.write_text(TEXT.replace(" --no-install-recommends", "").replace("USER 10001:10001", "USER root"))
    found = subprocess.run(
        [installed("hadolint"), "--format", "json", bad], capture_output=True, text=True, check=False
    )
    assert {"DL3015", "DL3002"} <= {item["code"] for item in json.loads(found.stdout)}


@pytest.mark.parametrize("script", [*sorted(ROOT.glob("infra/**/*.sh")), ROOT / ".ci" / "run"], ids=lambda p: p.name)
def test_shellcheck_finds_nothing(script: Path) -> None:
    found = subprocess.run(
        [installed("shellcheck"), "--enable=all", "--exclude=SC2310,SC2311,SC2312,SC2250,SC2248,SC2292", script],
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stdout
    assert script.stat().st_mode & 0o111, "not executable"


def test_versions_are_those_of_the_lock() -> None:
    labels = dict(shlex.split(part)[0].split("=") for part in shlex.split(instructions("LABEL")[0]))
    assert labels["io.ray.version"] == LOCKED["ray"] == ray.__version__
    assert labels["org.pytorch.version"] == LOCKED["torch"] == torch.__version__.partition("+")[0]
    assert labels["org.opencontainers.image.version"] == PROJECT["version"]
    assert f"-t blt-ray:{TAG} ." in TEXT


def test_one_python_that_the_project_takes() -> None:
    (version,) = {line.partition("=")[2] for line in instructions("ARG") if line.startswith("PYTHON_VERSION=")}
    low, high = re.findall(r"[\d.]+", PROJECT["requires-python"])
    assert tuple(map(int, low.split("."))) <= tuple(map(int, version.split("."))) < tuple(map(int, high.split(".")))


def test_pip_installs_nothing_but_what_is_locked() -> None:
    installs = [part for run in instructions("RUN") for part in run.split("&&") if "pip install" in part]
    assert len(installs) == 3
    for install in installs:
        words = shlex.split(install)
        from_lock = "--constraint" in words and words[words.index("--constraint") + 1] == "requirements.lock"
        assert from_lock or words[-1] == "/tmp/build.txt", install  # taken from the lock by grep
    assert instructions("RUN")[-2].endswith("versions.py requirements.lock")  # of the first stage: ends a wrong build


def test_what_is_copied_is_there_and_not_ignored() -> None:
    sent = {
        line[1:] for line in (INFRA / "docker" / "Dockerfile.dockerignore").read_text().splitlines() if line[0] == "!"
    }
    copied = {source for copy in instructions("COPY") if "--from" not in copy for source in copy.split()[:-1]}
    for source in copied:
        assert (ROOT / source).exists(), source
        assert any(source == allowed or source.startswith(f"{allowed}/") for allowed in sent), source
    assert all(any(source == each or source.startswith(f"{each}/") for source in copied) for each in sent)
    packages = {include.partition(".")[0] for include in ("blt.*", "pipelines.*", "jobs.*")}
    assert packages <= copied


def test_nothing_runs_as_root() -> None:
    user = instructions("USER")
    assert user == ["10001:10001"]
    assert TEXT.index("USER 10001") > TEXT.index("FROM ${BASE}\n"), "of the last stage"
    (check,) = instructions("HEALTHCHECK")
    (script,) = json.loads(check.partition("CMD ")[2])
    assert (ROOT / script).exists()


def test_versions_that_differ_are_told() -> None:
    locked = {"ray": "2.60.0", "torch": "2.13.0"}
    good = {"blt-ray": "0.1.0", "ray": "2.60.0", "torch": "2.13.0+cu130", "torchft": "0.2.0", "boto3": "1"}
    assert differences(good, locked) == []
    assert differences({**good, "ray": "2.59.0"}, locked) == ["ray is 2.59.0, the lock says 2.60.0"]
    assert differences({**good, "numpy": "1.0"}, locked) == []
    del good["torchft"]
    assert differences(good, locked) == ["torchft is not installed"]
    assert locked_versions("# a==1\nTorch_X.Y==2.0\n") == {"torch-x-y": "2.0"}
