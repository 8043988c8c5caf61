"""What is sent to a job server, worked out from a command and its resolved configuration; nothing is sent here."""

import hashlib
import json
import shlex
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from blt.errors import ConfigError
from jobs.log import LogFormat

CONFIG_FILE = "blt-job.json"
"""The resolved configuration, in the job's working directory."""

LOCK_FILE, PROJECT_FILE = "requirements.lock", "pyproject.toml"

Dependencies = Literal["image", "lock"]

_WORKING_DIRECTORY = "${RAY_RUNTIME_ENV_CREATE_WORKING_DIR}"
"""Ray puts the job's unpacked working directory there when it makes the environment."""


@dataclass(frozen=True, kw_only=True)
class Submission:
    """One command with its configuration, ready to be a job."""

    command: str
    action: str | None
    config: Mapping[str, Any]
    """Resolved, as plain values."""
    verbose: bool = False
    """Whether its log has the details; this and the next have no say in what the job is."""
    log_format: LogFormat = "text"

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of all that says what the job is to do."""
        text = json.dumps([self.command, self.action, self.config], sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def run(self) -> str:
        """Id of the run: of its first attempt, and with a suffix of the others."""
        words = [*self.command.split(), *([self.action] if self.action else [])]
        return f"{'-'.join(words)}-{self.fingerprint[:12]}"

    @property
    def config_file(self) -> bytes:
        """The content of CONFIG_FILE."""
        return json.dumps(self.config, indent=1, ensure_ascii=False).encode() + b"\n"

    @property
    def output(self) -> str | None:
        """Where the command writes, if it says so."""
        output = self.config.get("output")
        return None if output is None else str(output)

    def entrypoint(self, python: str) -> str:
        """The shell command of the job: the same command, with its configuration from CONFIG_FILE."""
        options = [f"--{self.action}"] if self.action else []
        options += ["--verbose"] if self.verbose else []
        options += ["--log-format", self.log_format] if self.log_format != "text" else []
        return shlex.join([python, "-m", "jobs", *self.command.split(), *options, "--config", CONFIG_FILE])

    def metadata(self, attempt: int) -> dict[str, str]:
        """What stands beside the job in lists."""
        known = {"blt_run": self.run, "blt_attempt": str(attempt), "blt_command": self.command}
        return known | ({"blt_output": self.output} if self.output and not self.action else {})


def pip_packages(directory: Path, dependencies: Dependencies, extras: Sequence[str]) -> list[str]:
    """What pip installs for a job: nothing where the image has it, else the project's dependencies as locked.

    ConfigError where the working directory does not hold the sources, which a job without an image needs.
    """
    if dependencies == "image":
        if extras:
            raise ConfigError('key "extras" goes with dependencies=lock; the image has what it has')
        return []
    for name in (PROJECT_FILE, LOCK_FILE, "jobs/__main__.py"):
        if not (directory / name).is_file():
            raise ConfigError(
                f"dependencies=lock sends the sources of blt-ray with their {LOCK_FILE}, and {directory} has no {name}:"
                " submit from the repository, or give dependencies=image if the cluster's image has blt-ray"
            )
    project = tomllib.loads((directory / PROJECT_FILE).read_text(encoding="utf-8"))["project"]
    optional = project.get("optional-dependencies", {})
    if unknown := sorted(set(extras) - set(optional)):
        raise ConfigError(f'key "extras": {", ".join(unknown)} not known (accepted: {", ".join(sorted(optional))})')
    wanted = [*project["dependencies"], *(package for extra in extras for package in optional[extra])]
    return [*wanted, f"-c {_WORKING_DIRECTORY}/{LOCK_FILE}"]


def check_ray_version(directory: Path, of_cluster: str) -> None:
    """ConfigError where requirements.lock has another Ray than the cluster, which a job cannot change."""
    lines = (directory / LOCK_FILE).read_text(encoding="utf-8").splitlines()
    locked = next((line.removeprefix("ray==") for line in lines if line.startswith("ray==")), of_cluster)
    if locked != of_cluster:
        raise ConfigError(
            f"the cluster runs Ray {of_cluster} and {LOCK_FILE} has {locked}, which a job cannot change: use a cluster "
            "with that version, or dependencies=image"
        )
