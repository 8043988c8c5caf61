"""Show what a job has printed, on standard output: `blt logs JOB [--follow]`.

With --follow until the job ends, and the exit status is that of the job; Ctrl-C leaves the job running.
"""

import sys
from dataclasses import dataclass

from jobs.cluster.following import follow, outcome
from jobs.cluster.job_server import CLUSTER_OPTIONS, ClusterConfig, connect
from jobs.record import JobResult


@dataclass(frozen=True, kw_only=True)
class Config(ClusterConfig):
    """Keys of `blt logs`."""

    job: str
    """Id of the job, as `blt jobs` lists it."""
    follow: bool = False
    """Go on until the job ends."""


OPTIONS = (*CLUSTER_OPTIONS, "follow")
POSITIONAL = ("job",)


def run(config: Config) -> JobResult:
    """Print the log; the result tells of the job."""
    server, _ = connect(config)
    if config.follow:
        return outcome(server, follow(server, config.job, _write))
    job = server.job(config.job)
    _write(server.log(job.id))
    return JobResult(figures={"job": job.id, "job_status": job.status})


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
