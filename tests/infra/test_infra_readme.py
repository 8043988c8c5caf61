"""infra/README.md: files, image and commands that it names are there, and its shell passes shellcheck."""

import importlib
import re
import shlex
import subprocess

import pytest

from jobs.command_line import COMMANDS
from jobs.configuration import find_config, load_config
from tests.infra.test_docker import TAG
from tests.infra.tools import INFRA, ROOT, installed

README = (INFRA / "README.md").read_text(encoding="utf-8")
SHELL = "\n".join(re.findall(r"^    (.*)$", README, re.MULTILINE)).replace("\\\n", " ")
COMMAND_LINES = [
    line[line.index("blt ") :].rstrip("'")
    for line in SHELL.splitlines()
    if re.search(r"(^|-- |auto )blt [a-z]", line) and "..." not in line
]


def test_files_and_links_exist() -> None:
    named = set(re.findall(r"\binfra/[\w./-]+", README)) - {
        "infra/kuberay/overlays/aws/",
        "infra/kuberay/overlays/gcp/",
    }
    for path in named:
        assert (ROOT / path.rstrip(".")).exists() or "$" in path, path
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (INFRA / target).exists(), target
    assert set(re.findall(r"blt-ray:([\w.-]+)", README)) == {TAG}


@pytest.mark.parametrize("line", COMMAND_LINES)
def test_commands_have_the_keys_they_name(line: str) -> None:
    _, command, *arguments = shlex.split(line)
    module, config = importlib.import_module(COMMANDS[command].module), None
    packaged = ROOT / "jobs" / "configs" / f"{command}.yaml"
    if "--config" in arguments:
        at = arguments.index("--config")
        config = find_config(arguments[at + 1])
        del arguments[at : at + 2]
    elif packaged.exists():
        config = packaged
    load_config(module.Config, config, arguments)


def test_commands_were_found() -> None:
    assert {line.split()[1] for line in COMMAND_LINES} == {"quickstart", "shard", "train-entropy", "calibrate"}


def test_shellcheck_finds_nothing() -> None:
    command = [installed("shellcheck"), "--shell=bash", "--severity=warning", "-"]
    found = subprocess.run(command, input=SHELL, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout
