"""Run a command as a job on a Ray cluster: `blt submit [options] COMMAND [--config FILE] [KEY=VALUE ...]`.

What stands before COMMAND is of submit, what stands behind it of the command. The resolved configuration travels with
the job, and so does the working directory without outputs, data, caches and credentials; data, models and output are
s3:// or on a directory that all nodes share. Credentials are those of the cluster's machines: none is sent.

The job's id follows from the configuration, so the same submission again attaches to the job while it runs, and says so
when it has finished; after a failure or a stop it makes a new attempt, which goes on with what is there.

Returns once the job is submitted. With --wait or --follow the exit status is that of the job; Ctrl-C then leaves the
job running.
"""

import dataclasses
import json
import logging
import os
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blt.errors import ClusterError, ConfigError
from jobs.action import Action
from jobs.cluster.attempts import Decision, decide, refuse_shared_output
from jobs.cluster.following import follow, outcome, wait
from jobs.cluster.job_server import CLUSTER_OPTIONS, ClusterConfig, JobServer, connect
from jobs.cluster.package import Packaged, write_package
from jobs.cluster.places import check_places
from jobs.cluster.secrets import held_secret, is_secret_name, secret_values
from jobs.cluster.submission import CONFIG_FILE, Dependencies, Submission, check_ray_version, pip_packages
from jobs.configuration import to_plain
from jobs.invocation import split_command, understand
from jobs.record import JobResult
from pipelines.log_line import add_fields

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What the command itself holds while it runs, beside its workers; 0 lets it run on the head node."""

    cpus: float = 0.0
    """CPUs."""
    gpus: float = 0.0
    """GPUs."""
    memory_bytes: int = 0
    """Memory."""
    custom: dict[str, float] = field(default_factory=dict)
    """Amounts of resources with names of their own."""


@dataclass(frozen=True, kw_only=True)
class Config(ClusterConfig):
    """Keys of `blt submit`."""

    command: tuple[str, ...] = ()
    """The command and all that belongs to it; what follows the options of submit."""
    wait: bool = False
    """Stay until the job has ended; its exit status is that of submit."""
    follow: bool = False
    """The same, with the job's log on standard error."""
    again: bool = False
    """Submit a run once more that has succeeded."""
    dependencies: Dependencies = "image"
    """image: the cluster's machines have what blt-ray needs; lock: pip installs it there, as requirements.lock says."""
    extras: tuple[str, ...] = ()
    """With dependencies=lock: extras of pyproject.toml to install too, such as replicated."""
    working_dir: Path = Path()
    """Directory that is sent; the job starts in it."""
    exclude: tuple[str, ...] = ()
    """Patterns, as of .gitignore, of what else of it is not sent; .gitignore and .rayignore have their say too."""
    max_package_bytes: int = 100 * 2**20
    """Most bytes of the files that are sent."""
    env: dict[str, str] = field(default_factory=dict)
    """Environment variables of the job and its workers, such as AWS_REGION; never credentials."""
    resources: Resources = field(default_factory=Resources)
    """What the command itself holds."""
    python: str = "python"
    """Interpreter on the cluster's machines."""

    def __post_init__(self) -> None:
        if not self.command:
            raise ConfigError("no command to submit (usage: blt submit [options] COMMAND [--config FILE] [KEY=VALUE])")
        if self.wait and self.follow:
            raise ConfigError("wait and follow exclude each other: --follow waits too")
        if self.max_package_bytes < 1:
            raise ConfigError(f"max_package_bytes must be at least 1, got {self.max_package_bytes}")
        for name in self.env:
            if is_secret_name(name):
                raise ConfigError(
                    f"env.{name} looks like a credential, and whoever sees the cluster's jobs would see it: give the "
                    "cluster's machines a role or a secret of their own (an instance profile, a service account)"
                )


OPTIONS = (*CLUSTER_OPTIONS, "wait", "follow", "again", "dependencies")
REST = "command"


def run(config: Config) -> JobResult:
    """Submit the command, or attach to the job that does it, and stay with it if that is asked for."""
    submission = resolve(config)
    add_fields(run=submission.run)
    with tempfile.TemporaryDirectory(prefix="blt-submit-") as directory:
        package = Path(directory) / "package.zip"
        packaged = pack(config, submission, package)
        request = job_request(config, package)
        server, access = connect(config)
        if config.dependencies == "lock":
            check_ray_version(config.working_dir.resolve(), server.ray_version)
        if access.is_open:
            # Nodes that use a token by default off loopback would look for one.
            request["runtime_env"]["env_vars"] |= {"RAY_AUTH_MODE": "disabled"}
        decision = _submit(config, submission, server, request, packaged)
    if decision.kind == "finished" or not (config.wait or config.follow):
        status = server.job(decision.job_id).status
        figures = {"job": decision.job_id, "job_status": status, "submission": decision.kind}
        finished = decision.kind == "finished"
        return JobResult(status="skipped" if finished else "submitted", path=submission.output, figures=figures)
    stayed = follow(server, decision.job_id, _write) if config.follow else wait(server, decision.job_id)
    return outcome(server, stayed)


def dry_run(config: Config) -> JobResult:
    """What `run` would send; no server is asked."""
    submission = resolve(config)
    with tempfile.TemporaryDirectory(prefix="blt-submit-") as directory:
        packaged = pack(config, submission, Path(directory) / "package.zip")
        job_request(config, Path(directory) / "package.zip")
    print("\n".join(packaged.files))
    return JobResult(
        bytes=packaged.bytes,
        path=submission.output,
        figures={
            "job": submission.run,
            "entrypoint": submission.entrypoint(config.python),
            "files": len(packaged.files),
        },
    )


ACTIONS = {"dry-run": Action(dry_run, "list the files that would be sent; ask no server")}


def resolve(config: Config) -> Submission:
    """The command with its resolved configuration. ConfigError as of the command, and for what cannot be a job."""
    name, arguments = split_command(config.command)
    call = understand(name, arguments)
    if call.help is not None:
        raise ConfigError(f"--help of the command is shown by `blt {name} --help`")
    if call.log_file is not None:
        raise ConfigError("--log-file of the command would be lost with the job's directory: `blt logs` shows its log")
    plain = to_plain(call.load())
    submission = Submission(
        command=name, action=call.action, config=plain, verbose=call.verbose, log_format=call.log_format
    )
    _refuse_secrets("the configuration of the command", submission.config_file)
    if local := check_places(name, plain):
        logger.warning("paths that all nodes of the cluster must share: %s", " ".join(local))
    return submission


def pack(config: Config, submission: Submission, target: Path) -> Packaged:
    """Write what the job starts with. ConfigError."""
    directory = config.working_dir.resolve()
    if not directory.is_dir():
        raise ConfigError(f'key "working_dir": {config.working_dir} is no directory')
    return write_package(
        directory,
        target,
        excludes=config.exclude,
        max_bytes=config.max_package_bytes,
        extra={CONFIG_FILE: submission.config_file},
    )


def job_request(config: Config, package: Path) -> dict[str, Any]:
    """The arguments of JobSubmissionClient.submit_job apart from id, entrypoint and metadata."""
    _refuse_secrets("the configuration of submit", json.dumps(to_plain(config), ensure_ascii=False).encode())
    packages = pip_packages(config.working_dir.resolve(), config.dependencies, config.extras)
    runtime_env: dict[str, Any] = {"working_dir": str(package), "env_vars": dict(config.env)}
    if packages:
        runtime_env["pip"] = {"packages": packages, "pip_check": False}
    return {
        "runtime_env": runtime_env,
        "entrypoint_num_cpus": config.resources.cpus or None,
        "entrypoint_num_gpus": config.resources.gpus or None,
        "entrypoint_memory": config.resources.memory_bytes or None,
        "entrypoint_resources": dict(config.resources.custom) or None,
    }


def _refuse_secrets(what: str, content: bytes) -> None:
    if (secret := held_secret(content, secret_values(os.environ).items())) is not None:
        raise ConfigError(f"{what} holds the value of {secret}: credentials never travel with a job")


def _submit(
    config: Config, submission: Submission, server: JobServer, request: Mapping[str, Any], packaged: Packaged
) -> Decision:
    """Start a job unless the run has one; where another process does the same at once, attach to its job."""
    jobs = server.jobs()
    decision = decide(submission.run, jobs, again=config.again)
    if decision.kind == "new":
        refuse_shared_output(submission.run, submission.output if submission.action is None else None, jobs)
        metadata = submission.metadata(decision.attempt)
        try:
            server.submit(decision.job_id, submission.entrypoint(config.python), metadata=metadata, **request)
        except ClusterError:
            rival = next((job for job in server.jobs() if job.id == decision.job_id), None)
            if rival is None:
                raise
            decision = dataclasses.replace(decision, kind="attach", last=rival)
    _tell(decision, server, packaged)
    return decision


def _tell(decision: Decision, server: JobServer, packaged: Packaged) -> None:
    last = decision.last
    if decision.kind == "new":
        before = f" after={last.id} which={last.status}" if last else ""
        sent = f"files={len(packaged.files)} bytes={packaged.bytes}"
        logger.info("submitted job=%s address=%s %s%s", decision.job_id, server.url, sent, before)
    elif last is not None:
        what = "attached to the same run" if decision.kind == "attach" else "finished before (--again does it anew)"
        logger.info("%s job=%s status=%s", what, last.id, last.status)


def _write(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()
