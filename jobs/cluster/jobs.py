"""List the jobs of a cluster, the oldest first."""

import datetime
import time
from dataclasses import dataclass

from jobs.cluster.job_server import CLUSTER_OPTIONS, ClusterConfig, Job, connect
from jobs.record import JobResult


@dataclass(frozen=True, kw_only=True)
class Config(ClusterConfig):
    """Keys of `blt jobs`."""


OPTIONS = CLUSTER_OPTIONS


def run(config: Config) -> JobResult:
    """Print a table of the jobs; the result holds the status of each."""
    server, _ = connect(config)
    jobs = server.jobs()
    rows = [("job", "status", "started", "seconds", "output or command"), *(_row(job) for job in jobs)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
    return JobResult(figures={"jobs": len(jobs), **{f"job.{job.id}": job.status for job in jobs}})


def _row(job: Job) -> tuple[str, ...]:
    if job.started_ms is None:
        return job.id, job.status, "", "", _what(job)
    started = datetime.datetime.fromtimestamp(job.started_ms / 1000).astimezone()
    ended = job.ended_ms / 1000 if job.ended_ms else time.time()
    return job.id, job.status, f"{started:%Y-%m-%d %H:%M}", f"{ended - job.started_ms / 1000:.0f}", _what(job)


def _what(job: Job) -> str:
    return job.metadata.get("blt_output") or job.entrypoint
