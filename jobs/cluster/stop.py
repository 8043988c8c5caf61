"""End a job: `blt stop JOB`. What it has written stays; the same submission again goes on from there."""

import logging
from dataclasses import dataclass

from jobs.cluster.following import wait
from jobs.cluster.job_server import CLUSTER_OPTIONS, ClusterConfig, connect
from jobs.record import JobResult

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Config(ClusterConfig):
    """Keys of `blt stop`."""

    job: str
    """Id of the job, as `blt jobs` lists it."""


OPTIONS = CLUSTER_OPTIONS
POSITIONAL = ("job",)


def run(config: Config) -> JobResult:
    """Ask the job to end and wait until it has; nothing happens to one that has ended already."""
    server, _ = connect(config)
    job = server.job(config.job)
    if job.has_ended:
        return JobResult(status="skipped", figures={"job": job.id, "job_status": job.status})
    server.stop(job.id)
    ended = wait(server, job.id)
    return JobResult(figures={"job": ended.id, "job_status": ended.status})
